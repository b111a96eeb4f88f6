"""The part of `benchmark` that is about caches: Python's time for a token, and memory, beside mlx_lm's own cache."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..bundled import held_out_text
from ..cache import DEFAULT, EXACT, Scheme, scheme
from ..errors import RotorError
from ..tables import text
from .arguments import listed, positive, whole

if TYPE_CHECKING:
    from ..bench.cache_memory import Prefill, PrefixHit
    from ..bench.cache_overhead import Overhead

SCHEMES = ("turbo4v2", DEFAULT)
TOKENS = 2048  # in one layer's cache where its steps and copies are measured
PROMPTS = (2048, 4096)


def add(parts: Any) -> None:
    """Adds it to the benchmark's sub-commands; it sets `measure`, which returns what --json prints."""
    m = parts.add_parser(
        "cache",
        help="what a compressed cache costs in Python and takes in memory, mlx_lm's own cache beside it",
        description="Time to build one layer's graph for one token, bytes that a prefix hit adds, and peak memory of "
        "reading a prompt with the bundled model (a minute or two a scheme for 4096 tokens; --prompts 0: left out).",
    )
    m.add_argument("--schemes", default=",".join(SCHEMES), help=f"comma-separated ({','.join(SCHEMES)})")
    m.add_argument("--tokens", type=positive, default=TOKENS, help=f"held while measured ({TOKENS})")
    m.add_argument(
        "--prompts", type=listed(whole), default=PROMPTS, help="prompt lengths, multiples of --chunk (2048,4096)"
    )
    m.add_argument("--chunk", type=positive, default=512, help="prompt tokens fed at a time (512)")
    m.add_argument("--json", action="store_true", help="print one JSON object, no progress bar")
    m.set_defaults(measure=_measure)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    from ..bench import cache_memory, cache_overhead

    schemes = [s for name in dict.fromkeys(args.schemes.split(",")) if (s := scheme.parse(name)) is not None]
    if not schemes:
        raise RotorError(f"--schemes {args.schemes}: exact KV is measured beside each; name one that packs tokens")
    lengths = sorted({n for n in args.prompts if n})
    if any(n % args.chunk for n in lengths):
        raise RotorError(f"--prompts {','.join(map(str, args.prompts))}: must be multiples of --chunk {args.chunk}")
    exact = max(s.sinks + s.ring for s in schemes)
    if args.tokens <= exact:
        raise RotorError(f"--tokens {args.tokens}: nothing is packed in so few; {exact} stay exact")
    overheads = [
        o for b in cache_overhead.BACKENDS for o in cache_overhead.measure_cache_overhead(schemes, b, args.tokens)
    ]
    hits = [cache_memory.prefix_hit(s, args.tokens) for s in (None, *schemes)]
    if not args.json:
        _show_overhead(overheads)
        _show_hits(hits)
    peaks = _peaks(schemes, lengths, args.chunk, args.json) if lengths else []
    if peaks and not args.json:
        _show_peaks(peaks)
    parts: dict[str, Sequence[Any]] = {"overhead": overheads, "prefix_hit": hits, "prefill": peaks}
    return {name: [row.to_dict() for row in rows] for name, rows in parts.items()}


def _peaks(schemes: Sequence[Scheme], lengths: Sequence[int], chunk: int, quiet: bool) -> list[Prefill]:
    from ..bench import cache_memory
    from ..host import load
    from ..quality.sample import encode

    model, tokenizer = load()
    tokens = encode(tokenizer, held_out_text())
    found: list[Prefill] = []
    with tqdm(total=(1 + len(schemes)) * max(lengths), unit="tok", disable=True if quiet else None) as bar:
        for kv in (None, *schemes):
            found += cache_memory.prefill(model, kv, tokens, lengths, chunk, bar.update)
    return found


def _show_overhead(rows: Sequence[Overhead]) -> None:
    titles = ["graph of a token", "backend", "µs", "stock", "ratio", "nodes", "stock", "ratio a node", "launches"]
    cells = []
    for r in rows:
        times = [f"{r.microseconds:.1f}", f"{r.stock_microseconds:.1f}", f"{r.ratio:.2f}"]
        nodes = [f"{r.nodes:.1f}", f"{r.stock_nodes:.1f}", f"{r.ratio_a_node:.2f}"]
        cells.append([r.scheme, r.backend, *times, *nodes, f"{r.launches:.2f}"])
    print(text(titles, cells, left=(0, 1)))
    print(
        f"\nPython's time for update_and_fetch and attention of one layer and one token behind {rows[0].tokens}.\n"
        "Nothing is evaluated in it; the time to pack tokens is shared among them. stock: mlx_lm's own cache.\n"
        "metal: a Mac's launch code over a stand-in for kernels, without MLX's own call, some microseconds each.\n"
    )


def _show_hits(rows: Sequence[PrefixHit]) -> None:
    cells = [[r.kv, str(r.tokens), *(f"{x / 1e6:.3f}" for x in (r.held, r.added, r.ring))] for r in rows]
    print(text(["prefix hit", "tokens", "held MB", "added MB", "of it recent tokens"], cells))
    print("\nA cache is copied and 64 tokens are appended to the copy: one layer, 8 KV heads of 128, float16.\n")


def _show_peaks(rows: Sequence[Prefill]) -> None:
    stock = {r.tokens: r for r in rows if r.kv == EXACT}
    cells = []
    for r in rows:
        share = f"{r.peak_16_bit / stock[r.tokens].peak_16_bit:.1%}"
        sizes = [f"{r.peak / 1e6:.2f}", f"{r.peak_16_bit / 1e6:.2f}", share, f"{r.held / 1e6:.2f}"]
        cells.append([r.kv, str(r.tokens), *sizes])
    print(text(["reading a prompt", "tokens", "peak MB", "in 16 bits", "of stock", "held MB"], cells))
    print(
        f"\nThe bundled model in {rows[0].dtype}, {rows[0].chunk} tokens at a time. peak: of MLX's memory, without\n"
        "what the model takes. in 16 bits: half of what is not packed, and all that is packed at the end. of stock:\n"
        "of the peak with exact KV. On a CPU stock attention keeps a chunk's scores, which MLX's GPU kernels do not."
    )
