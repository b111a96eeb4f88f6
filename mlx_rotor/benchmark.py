"""`python -m mlx_rotor.benchmark`: parts measured: kernels, codecs, the cache, fits, jobs, policies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import codec
from .bench import codecs
from .bench import kernel_traffic as traffic
from .bench.codecs import DIM, VECTORS, BiasedKeys, Distortion, measure_all
from .bundled import held_out_text
from .cache import DEFAULT, EXACT, scheme
from .cli import benchmark_experts, benchmark_weights
from .cli.arguments import Parser, listed, positive, whole
from .cli.command import finishes, run
from .errors import RotorError
from .quality.machine import machine

if TYPE_CHECKING:
    from .bench.cache_memory import Prefill, PrefixHit
    from .bench.cache_overhead import Overhead

PAIRS = ("turbo4v2", "turbo2", "turbo3", "turbo4", "trellis2", "trellis3", "trellis4", "iso3", "planar3", "rotor3")
ENCODED = ("turbo2", "turbo3", "turbo4", "trellis2", "trellis3", "trellis4", "iso3", "planar3", "rotor3")
TOKENS = (4096, 16384)
CACHED = (DEFAULT, "turbo4", "trellis3", "iso3", "fp8")
CACHE_TOKENS = 2048  # in one layer's cache where its steps and copies are measured
PROMPTS = (2048, 4096)
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


def parser() -> Parser:
    p = Parser(prog="mlx_rotor benchmark", description="measurements of parts")
    parts = p.add_subparsers(dest="part", required=True, metavar="PART")
    k = parts.add_parser(
        "kernels",
        help="bytes moved, line use and modelled time of the kernels, MLX's own beside them",
        description="Runs the kernels in the Metal simulator of the source tree (x86-64 Linux) and counts. Times are "
        "those of a throughput model, never measurements; `mlx_rotor doctor --kernels` measures on a Mac.",
    )
    k.add_argument("--part", dest="kernels", choices=("attention", "experts", "all"), default="all", help="(all)")
    k.add_argument("--schemes", default=",".join(PAIRS), help=f"comma-separated ({','.join(PAIRS)})")
    k.add_argument("--tokens", type=listed(positive), default=TOKENS, help="comma-separated (4096,16384)")
    k.add_argument("--heads", type=int, default=32, help="query heads, over 8 KV heads of 128 (32)")
    k.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    k.set_defaults(measure=_kernels)
    c = parts.add_parser(
        "codecs",
        help="error and stored bits of every codec on Gaussian vectors, beside the bound of any code",
        description="Encodes and decodes random vectors whose coordinates are normal, which is what rotations make of "
        "most vectors, and others with a few strong channels, which show what a rotation is worth.",
    )
    c.add_argument("--codecs", default="", help="comma-separated (all)")
    c.add_argument("--dim", type=int, default=DIM, help=f"head dimension ({DIM})")
    c.add_argument("--vectors", type=int, default=VECTORS, help=f"how many ({VECTORS})")
    c.add_argument("--json", action="store_true", help="print one JSON object")
    c.set_defaults(measure=_codecs)
    m = parts.add_parser(
        "cache",
        help="what a compressed cache costs in Python and takes in memory, the stock cache beside it",
        description="Time to build one layer's graph for one token, bytes that a prefix hit adds, and peak memory of "
        "reading a prompt with the bundled model (a minute or two a scheme for 4096 tokens; --prompts 0: left out).",
    )
    m.add_argument("--schemes", default=",".join(CACHED), help=f"comma-separated ({','.join(CACHED)})")
    m.add_argument("--tokens", type=positive, default=CACHE_TOKENS, help=f"held while measured ({CACHE_TOKENS})")
    m.add_argument(
        "--prompts", type=listed(whole), default=PROMPTS, help="prompt lengths, multiples of --chunk (2048,4096)"
    )
    m.add_argument("--chunk", type=positive, default=512, help="prompt tokens fed at a time (512)")
    m.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    m.set_defaults(measure=_cache)
    benchmark_weights.add(parts)
    return p


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found = args.measure(args)
    if args.json:
        print(json.dumps(found | {"machine": machine()}, indent=2))
    return 0


def _kernels(args: argparse.Namespace) -> dict[str, Any]:
    tokens = args.tokens
    if args.heads < traffic.KV_HEADS or args.heads > 8 * traffic.KV_HEADS or args.heads % traffic.KV_HEADS:
        raise RotorError(f"--heads {args.heads}: a multiple of 8 from 8 to 64, one query row being up to 8 a KV head")
    jobs: list[Callable[[], traffic.Row]] = []
    attention, experts = args.kernels != "experts", args.kernels != "attention"
    for n in tokens if attention else ():
        jobs.append(partial(traffic.stock, n, heads=args.heads))
        for name in args.schemes.split(","):
            parsed = scheme.parse(name)
            if parsed is None:
                raise RotorError(f"{name}: nothing is packed; the row sdpa_vector is exact attention")
            jobs.append(partial(traffic.decode, (parsed.k, parsed.v), n, heads=args.heads))
    jobs += [partial(traffic.encode, name, min(tokens)) for name in ENCODED if attention]
    traffic.simulator()
    rows = [job() for job in tqdm(jobs, disable=True if args.json else None, dynamic_ncols=True)]
    if rows and not args.json:
        _print_traffic(rows)
        _print_operations(rows)
    found: dict[str, Any] = {"rows": [row.facts() for row in rows]} if attention else {}
    return found | (benchmark_experts.measure(args.json) if experts else {})


def _codecs(args: argparse.Namespace) -> dict[str, Any]:
    names = args.codecs.split(",") if args.codecs else codec.names()
    if unknown := sorted({name.partition(":")[0] for name in names} - set(codec.names())):
        raise RotorError(f"--codecs {', '.join(unknown)}: there is {', '.join(codec.names())}")
    if args.vectors < 1 or args.dim < 1:
        raise RotorError("--vectors and --dim must be at least 1")
    every = list(measure_all(names, args.dim, args.vectors))
    rows = [r for r in every if isinstance(r, Distortion)]
    left_out = dict(r for r in every if not isinstance(r, Distortion))
    if not rows:
        raise RotorError("; ".join(left_out.values()))
    biased = {r.codec: codecs.measure_biased_keys(r.codec) for r in rows if codec.get(r.codec, args.dim).scaled}
    if not args.json:
        _print_codecs(rows, biased, left_out, args.dim, args.vectors)
    facts = {"codecs": [r.to_dict() for r in rows], "biased_keys": [b.to_dict() for b in biased.values()]}
    return {"dim": args.dim, "vectors": args.vectors, **facts, "left_out": left_out}


def _print_codecs(
    rows: Sequence[Distortion], biased: dict[str, BiasedKeys], left_out: dict[str, str], dim: int, count: int
) -> None:
    print(
        f"{'codec':<12}{'bits':>8}{'error':>10}{'4^-bits':>10}{'dB above':>10}{'scores':>10}{'biased':>10}{'means':>10}"
    )
    for r in rows:
        cells = f"{r.bits:>8.4g}{r.error:>10.4g}{r.bound:>10.4g}{r.decibels:>10.2f}{r.scores:>10.4g}"
        if r.codec in biased:
            cells += f"{biased[r.codec].plain:>10.4g}{biased[r.codec].centred:>10.4g}"
        print(f"{r.codec:<12}{cells}")
    print(
        f"\n{count} Gaussian vectors of {dim}. bits: stored bits an element, scales included; error: relative squared\n"
        "error; 4^-bits: the least any code of as many bits can have (Shannon), and how far above it the error is;\n"
        "scores: variance of a score's error over that of scores, where 4 channels are 6 times larger; biased: the\n"
        "same for 2048 keys of 128 after rotary positions, 4 slow channels of which have a constant of 25 standard\n"
        "deviations; means: those with means subtracted, as caches do."
    )
    for name, why in left_out.items():
        print(f"{name} left out: {why}")


def _cache(args: argparse.Namespace) -> dict[str, Any]:
    from .bench import cache_memory, cache_overhead

    schemes = [s for name in args.schemes.split(",") if (s := scheme.parse(name)) is not None]
    if not schemes:
        raise RotorError(f"--schemes {args.schemes}: exact KV is measured beside each; name one that packs tokens")
    lengths = sorted({n for n in args.prompts if n})
    if any(n % args.chunk for n in lengths):
        raise RotorError(f"--prompts {','.join(map(str, args.prompts))}: must be multiples of --chunk {args.chunk}")
    overheads = [o for b in cache_overhead.BACKENDS for o in cache_overhead.measure(schemes, b, args.tokens)]
    hits = [cache_memory.prefix_hit(s, args.tokens) for s in (None, *schemes)]
    if not args.json:
        _print_overhead(overheads)
        _print_hits(hits)
    peaks: list[Prefill] = []
    if lengths:
        from .host import load
        from .quality.sample import encode

        model, tokenizer = load()
        text = encode(tokenizer, held_out_text())
        total = (1 + len(schemes)) * max(lengths)
        with tqdm(total=total, unit="tok", disable=True if args.json else None) as bar:
            for kv in (None, *schemes):
                peaks += cache_memory.prefill(model, kv, text, lengths, args.chunk, bar.update)
        if not args.json:
            _print_peaks(peaks)
    parts: dict[str, Sequence[Any]] = {"overhead": overheads, "prefix_hit": hits, "prefill": peaks}
    return {name: [row.to_dict() for row in rows] for name, rows in parts.items()}


def _print_overhead(rows: Sequence[Overhead]) -> None:
    print(f"{'graph of a token':<20}{'backend':<11}{'µs':>8}{'stock':>8}{'ratio':>8}{'nodes':>8}{'stock':>7}", end="")
    print(f"{'ratio a node':>14}{'launches':>10}")
    for r in rows:
        print(f"{r.scheme:<20}{r.backend:<11}{r.microseconds:>8.1f}{r.stock_microseconds:>8.1f}{r.ratio:>8.2f}", end="")
        print(f"{r.nodes:>8.1f}{r.stock_nodes:>7.1f}{r.ratio_a_node:>14.2f}{r.launches:>10.2f}")
    print(
        f"\nOne layer, one token behind {rows[0].tokens}: Python's time for update_and_fetch and attention, nothing\n"
        "evaluated in it, packing shared among the tokens that are packed. metal: the launch code of a Mac over a\n"
        "stand-in for kernels; MLX's own call, some microseconds a launch, is not in it.\n"
    )


def _print_hits(rows: Sequence[PrefixHit]) -> None:
    print(f"{'prefix hit':<20}{'tokens':>8}{'held MB':>10}{'added MB':>10}{'of it ring':>12}")
    for r in rows:
        print(f"{r.kv:<20}{r.tokens:>8}{r.held / 1e6:>10.3f}{r.added / 1e6:>10.3f}{r.ring / 1e6:>12.3f}")
    print("\nA cache copied and 64 tokens appended to the copy: one layer, 8 KV heads of 128, float16.\n")


def _print_peaks(rows: Sequence[Prefill]) -> None:
    print(f"{'reading a prompt':<20}{'tokens':>8}{'peak MB':>10}{'in 16 bits':>12}{'of stock':>10}{'held MB':>10}")
    stock = {r.tokens: r for r in rows if r.kv == EXACT}
    for r in rows:
        share = r.peak_16_bit / stock[r.tokens].peak_16_bit
        print(f"{r.kv:<20}{r.tokens:>8}{r.peak / 1e6:>10.2f}{r.peak_16_bit / 1e6:>12.2f}{share:>10.1%}", end="")
        print(f"{r.held / 1e6:>10.2f}")
    print(
        f"\nThe bundled model in {rows[0].dtype}, {rows[0].chunk} tokens at a time. peak: of MLX's memory, less what\n"
        "the model takes; in 16 bits: half of what is not packed, and all that is packed at the end; of stock: of\n"
        "exact KV's there. "
        "On a CPU, stock attention keeps all scores of a chunk, which MLX's GPU kernels do not."
    )


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
