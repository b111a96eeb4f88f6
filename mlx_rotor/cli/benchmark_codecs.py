"""The part of `benchmark` that is about codecs: error and stored bits on random vectors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .. import codec
from ..bench import codecs
from ..bench.codecs import DIM, VECTORS, BiasedKeys, Distortion, measure_all
from ..errors import RotorError
from ..tables import text
from .arguments import positive

TITLES = ("codec", "bits", "error", "4^-bits", "dB above", "scores", "biased", "means")


def add(parts: Any) -> None:
    """Adds it to the benchmark's sub-commands; it sets `measure`, which returns what --json prints."""
    c = parts.add_parser(
        "codecs",
        help="error and stored bits of every codec on Gaussian vectors, beside the bound of any code",
        description="Encodes and decodes random vectors whose coordinates are normal, as rotations make those of most"
        " vectors, and vectors with a few strong channels, which show what a rotation is worth.",
    )
    c.add_argument("--codecs", default="", help="comma-separated (all)")
    c.add_argument("--dim", type=positive, default=DIM, help=f"head dimension ({DIM})")
    c.add_argument("--vectors", type=positive, default=VECTORS, help=f"how many ({VECTORS})")
    c.add_argument("--json", action="store_true", help="print one JSON object")
    c.set_defaults(measure=_measure)


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    names = args.codecs.split(",") if args.codecs else codec.names()
    if unknown := sorted({name.partition(":")[0] for name in names} - set(codec.names())):
        raise RotorError(f"--codecs {', '.join(unknown)}: there is {', '.join(codec.names())}")
    every = list(measure_all(names, args.dim, args.vectors))
    rows = [r for r in every if isinstance(r, Distortion)]
    left_out = dict(r for r in every if not isinstance(r, Distortion))
    if not rows:
        raise RotorError("; ".join(left_out.values()))
    biased = {r.codec: codecs.measure_biased_keys(r.codec) for r in rows if codec.get(r.codec, args.dim).scaled}
    if not args.json:
        _show(rows, biased, left_out, args.dim, args.vectors)
    facts = {"codecs": [r.to_dict() for r in rows], "biased_keys": [b.to_dict() for b in biased.values()]}
    return {"dim": args.dim, "vectors": args.vectors, **facts, "left_out": left_out}


def _show(
    rows: Sequence[Distortion], biased: dict[str, BiasedKeys], left_out: dict[str, str], dim: int, count: int
) -> None:
    cells = []
    for r in rows:
        known = biased.get(r.codec)
        means = [f"{known.plain:.4g}", f"{known.centred:.4g}"] if known else ["", ""]
        found = [f"{x:.4g}" for x in (r.bits, r.error, r.bound)]
        cells.append([r.codec, *found, f"{r.decibels:.2f}", f"{r.scores:.4g}", *means])
    print(text(TITLES, cells))
    print(
        f"\n{count} Gaussian vectors of {dim}.\n"
        "bits: stored bits an element, scales included. error: squared error over squared length.\n"
        "4^-bits: the least error any code of as many bits can have (Shannon). dB above: the error over that bound.\n"
        "scores: variance of a score's error over that of scores, where 4 channels are 6 times larger.\n"
        "biased: the same for 2048 keys of 128 after rotary positions, in which 4 slow channels hold a constant of 25\n"
        "standard deviations. means: the same after the mean is subtracted, as caches do."
    )
    for name, why in left_out.items():
        print(f"{name} left out: {why}")
