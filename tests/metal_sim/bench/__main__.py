"""Tables of what the kernels move and do, counted in the simulator: `python -m tests.metal_sim.bench` in a clone.

Times are those of a throughput model and no measurements; `mlx_rotor doctor --kernels` measures on a Mac.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm

from mlx_rotor.cache import scheme
from mlx_rotor.cli.arguments import positive
from mlx_rotor.cli.command import run
from mlx_rotor.diagnose.expert_speed import Dims, Triple
from mlx_rotor.errors import RotorError
from mlx_rotor.experts import formats
from mlx_rotor.quality.machine import machine

from .. import SUPPORTED, UNSUPPORTED, ToolsMissing, tools
from . import expert_traffic
from . import kernel_traffic as traffic

PAIRS = ("turbo4v2", "turbo2", "turbo3", "turbo4", "trellis2", "trellis3", "trellis4", "iso3", "planar3", "rotor3")
ENCODED = ("turbo2", "turbo3", "turbo4", "trellis2", "trellis3", "trellis4", "iso3", "planar3", "rotor3")
TOKENS = (4096, 16384)
# Columns of the second table: kinds that are counted as one.
COLUMNS = {
    "FMA": ("fma",),
    "float": ("float",),
    "integer": ("integer", "bitwise", "compare", "select"),
    "shift": ("shift", "shift_left_dynamic", "shift_right_dynamic", "extract"),
    "multiply": ("multiply", "integer_divide"),
    "convert": ("convert",),
    "exp2": ("exp2",),
    "look-up": ("load_table",),
    "shuffle": ("shuffle", "shuffle_any"),
    "reduction": ("reduction",),
    "device": ("load_device", "store_device"),
    "threadgroup": ("load_threadgroup", "store_threadgroup"),
}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.metal_sim.bench", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--part", choices=("attention", "experts", "all"), default="all", help="(all)")
    p.add_argument("--schemes", default=",".join(PAIRS), help=f"comma-separated ({','.join(PAIRS)})")
    p.add_argument("--tokens", type=_positives, default=TOKENS, help="comma-separated (4096,16384)")
    p.add_argument("--heads", type=int, default=32, help="query heads, over 8 KV heads of 128 (32)")
    p.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    check_tools()
    found: dict[str, Any] = {}
    if args.part != "experts":
        found |= attention(args)
    if args.part != "attention":
        found |= experts(args.json)
    if args.json:
        print(json.dumps(found | {"machine": machine()}, indent=2))
    return 0


def check_tools() -> None:
    """Raises RotorError where the simulator can't run: without an x86-64 Linux or a compiler."""
    if not SUPPORTED:
        raise RotorError(UNSUPPORTED)
    try:
        tools.clang()
    except ToolsMissing as missing:
        raise RotorError(str(missing)) from None


def _positives(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def attention(args: argparse.Namespace) -> dict[str, Any]:
    if args.heads < traffic.KV_HEADS or args.heads > 8 * traffic.KV_HEADS or args.heads % traffic.KV_HEADS:
        raise RotorError(f"--heads {args.heads}: a multiple of 8 from 8 to 64, one query row being up to 8 a KV head")
    jobs: list[Callable[[], traffic.Row]] = []
    for n in args.tokens:
        jobs.append(partial(traffic.stock, n, heads=args.heads))
        for name in args.schemes.split(","):
            parsed = scheme.parse(name)
            if parsed is None:
                raise RotorError(f"{name}: nothing is packed; the row sdpa_vector is exact attention")
            jobs.append(partial(traffic.decode, (parsed.k, parsed.v), n, heads=args.heads))
    jobs += [partial(traffic.encode, name, min(args.tokens)) for name in ENCODED]
    rows = [job() for job in tqdm(jobs, disable=True if args.json else None, dynamic_ncols=True)]
    if not args.json:
        _print_traffic(rows)
        _print_operations(rows)
    return {"rows": [row.facts() for row in rows]}


def experts(quiet: bool) -> dict[str, Any]:
    """Every row; prints unless `quiet`."""
    jobs: list[Callable[[], list[expert_traffic.ExpertRow]]] = []
    for dims, triples in expert_traffic.TRIPLES.items():
        for triple in triples:
            jobs.append(partial(expert_traffic.fused, dims, triple))
            # MLX has another kernel for the bundled model's few columns.
            few = dims.intermediate % expert_traffic.FAST_COLUMNS
            if {mode for mode, *_ in triple} == {formats.MLX} and not few:
                jobs.append(partial(_stock, dims, triple))
    rows = [row for job in tqdm(jobs, disable=True if quiet else None, dynamic_ncols=True) for row in job()]
    launches = expert_traffic.stock_launches()
    if not quiet:
        _print_experts(rows, launches)
    return {"experts": [row.facts() for row in rows], "stock_launches": dict(launches)}


def _stock(dims: Dims, triple: Triple) -> list[expert_traffic.ExpertRow]:
    return [expert_traffic.stock(dims, triple)]


def _print_traffic(rows: Sequence[traffic.Row]) -> None:
    devices = list(rows[0].predicted)
    fp16 = {row.tokens: row for row in rows if row.kernel == "sdpa_vector"}
    print(f"{'kernel':<12}{'codec K/V':<20}{'tokens':>7}{'MB moved':>10}{'ratio':>7}{'line use':>10}", end="")
    print("".join(f"{d:>10}" for d in devices))
    for row in rows:
        print(f"{row.kernel:<12}{row.codec:<20}{row.tokens:>7}{row.moved / 1e6:>10.2f}", end="")
        print(f"{row.bytes_ratio:>7.3f}{row.line_use:>10.1%}", end="")
        if row.predicted:
            print("".join(f"{row.predicted[d] / fp16[row.tokens].predicted[d]:>10.2f}" for d in devices), end="")
        print()
    print(
        f"\n{rows[0].heads} query heads, 8 KV heads of 128, one query row. MB moved: all device loads and stores;\n"
        "ratio: to the bytes that must move (tokens, queries, output); line use: 128-byte lines needed over\n"
        "touched. Under a device: time over that of MLX's fp16 sdpa_vector, by a throughput model of arithmetic\n"
        "and bandwidth. No measurement."
    )


def _width(name: str) -> int:
    return max(len(name), 6) + 2


def _print_operations(rows: Sequence[traffic.Row]) -> None:
    print(f"\n{'kernel':<12}{'codec K/V':<20}{'tokens':>7}" + "".join(f"{name:>{_width(name)}}" for name in COLUMNS))
    for row in rows:
        if row.operations:
            sums = {name: sum(row.operations.get(kind, 0) for kind in kinds) for name, kinds in COLUMNS.items()}
            cells = "".join(f"{n:>{_width(name)}.2f}" for name, n in sums.items())
            print(f"{row.kernel:<12}{row.codec:<20}{row.tokens:>7}{cells}")
    print(
        "\nOperations of a pair of elements, one of K and one of V, for all its query heads, counted in the compiled\n"
        "kernel; addresses and loops are in them. `--json` has every kind."
    )


def _print_experts(rows: Sequence[expert_traffic.ExpertRow], launches: dict[str, int]) -> None:
    devices = list(rows[0].predicted)
    wide = max(len(row.weights) for row in rows) + 2
    print(
        f"\n{'experts':<16}{'gate + up + down':<{wide}}{'model':<15}{'MB moved':>10}{'ratio':>7}{'line use':>10}",
        end="",
    )
    print(f"{'launches':>10}{'operations':>12}" + "".join(f"{name + ' µs':>13}" for name in devices))
    for row in rows:
        print(f"{row.kernel:<16}{row.weights:<{wide}}{row.model:<15}{row.moved / 1e6:>10.3f}", end="")
        print(
            f"{row.bytes_ratio:>7.3f}{row.line_use:>10.1%}{row.launches:>10}{sum(row.operations.values()):>12.2f}",
            end="",
        )
        print("".join(f"{1e6 * row.predicted[name]:>13.2f}" for name in devices))
    named = ", ".join(f"{n} {name if len(name) < 20 else 'compiled'}" for name, n in launches.items())
    print(
        "\nOne token through a layer's chosen experts; weights as mode, bits, group size. Counts are of "
        f"{rows[0].run} of them, scaled\n"
        "to all: each costs the same. layer: routing and both launches. ratio: of bytes moved to those that must be:\n"
        "the experts' packed weights, logits, token, output, what is between projections. operations: of a weight,\n"
        "idle lanes included. Under a device: a throughput model of arithmetic and bandwidth, without what a launch\n"
        "costs; no measurement. MLX gather_qmv: MLX's kernel for each projection, every byte once in the model; its\n"
        "launches are those of mlx_lm's block behind the router's matrix, counted in MLX's graph without views:\n"
        f"{named}."
    )


if __name__ == "__main__":
    sys.exit(run(main))
