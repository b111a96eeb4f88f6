"""`python -m mlx_rotor.benchmark kernels`: what the attention kernels move and do, counted in the simulator."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial

from tqdm import tqdm

from .cache import scheme
from .command import run
from .errors import RotorError
from .evals import kernel_traffic as traffic
from .evals.machine import machine

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
    p = argparse.ArgumentParser(prog="mlx_rotor benchmark", description="measurements of parts; no model is loaded")
    parts = p.add_subparsers(dest="part", required=True, metavar="PART")
    k = parts.add_parser(
        "kernels",
        help="bytes moved, line use and modelled time of the attention kernels, MLX's own beside them",
        description="Runs the kernels in the Metal simulator of the source tree (x86-64 Linux) and counts. Times are "
        "those of a throughput model, never measurements; `mlx_rotor doctor --kernels` measures on a Mac.",
    )
    k.add_argument("--schemes", default=",".join(PAIRS), help=f"comma-separated ({','.join(PAIRS)})")
    k.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated (4096,16384)")
    k.add_argument("--heads", type=int, default=32, help="query heads, over 8 KV heads of 128 (32)")
    k.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    tokens = [_positive(text) for text in args.tokens.split(",")]
    if args.heads < traffic.KV_HEADS or args.heads > 8 * traffic.KV_HEADS or args.heads % traffic.KV_HEADS:
        raise RotorError(f"--heads {args.heads}: a multiple of 8 from 8 to 64, one query row being up to 8 a KV head")
    jobs: list[Callable[[], traffic.Row]] = []
    for n in tokens:
        jobs.append(partial(traffic.stock, n, heads=args.heads))
        for name in args.schemes.split(","):
            parsed = scheme.parse(name)
            if parsed is None:
                raise RotorError(f"{name}: nothing is packed; the row sdpa_vector is exact attention")
            jobs.append(partial(traffic.decode, (parsed.k, parsed.v), n, heads=args.heads))
    jobs += [partial(traffic.encode, name, min(tokens)) for name in ENCODED]
    traffic.simulator()
    rows = [job() for job in tqdm(jobs, disable=True if args.json else None, dynamic_ncols=True)]
    if args.json:
        print(json.dumps({"rows": [row.facts() for row in rows], "machine": machine()}, indent=2))
    else:
        _print_traffic(rows)
        _print_operations(rows)
    return 0


def _positive(text: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise RotorError(f"--tokens {text!r}: whole numbers from 1, separated by commas")
    return int(text)


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


if __name__ == "__main__":
    sys.exit(run(main))
