"""`python -m mlx_rotor.benchmark`: parts measured: codecs, the cache, experts, fits, jobs, policies."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import codec
from .bench import codecs
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

CACHED = (DEFAULT, "turbo4", "trellis3", "iso3", "fp8")
CACHE_TOKENS = 2048  # in one layer's cache where its steps and copies are measured
PROMPTS = (2048, 4096)


def parser() -> Parser:
    p = Parser(prog="mlx_rotor benchmark", description="measurements of parts")
    parts = p.add_subparsers(dest="part", required=True, metavar="PART")
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
    benchmark_experts.add(parts)
    benchmark_weights.add(parts)
    return p


@finishes
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    found = args.measure(args)
    if args.json:
        print(json.dumps(found | {"machine": machine()}, indent=2))
    return 0


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


if __name__ == "__main__":
    sys.exit(run(main))
