"""The flags that choose a KV scheme, the same in every command that runs a model, and the scheme they mean."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .errors import RotorError

# Flags of mlx_lm that choose a cache of its own.
STOCK_CACHES = ("--kv-bits",)


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the flags, as a group of their own."""
    from .cache import DEFAULT

    kv = parser.add_argument_group("compressed KV cache")
    what = f"trellis3, turbo4v2, k=…,v=…, a calibration's .json, or exact (default: {DEFAULT})"
    kv.add_argument("--kv", metavar="SCHEME", help=what)
    kv.add_argument("--cache-type-k", metavar="CODEC", help="the codec of K, as llama.cpp spells it; f16 is exact")
    kv.add_argument("--cache-type-v", metavar="CODEC", help="the codec of V")
    kv.add_argument("--kv-sinks", type=int, metavar="N", help="first tokens kept exact (default: 4)")
    kv.add_argument("--kv-ring", type=int, metavar="N", help="recent tokens kept exact (default: 128)")
    kv.add_argument("--kv-protect-layers", type=int, metavar="N", help="end layers one codec step up (default: 2)")


def scheme_of(args: argparse.Namespace, stock_caches: Sequence[str] = STOCK_CACHES) -> Any:
    """The scheme `args` ask for, or None for exact KV.

    Args:
        stock_caches: those flags of mlx_lm, among the ones this command has, that choose a cache of its own.

    Raises:
        RotorError: an unknown scheme, or flags that contradict each other.
    """
    from .cache import DEFAULT, EXACT, parse

    text, k, v = args.kv, args.cache_type_k, args.cache_type_v
    if k or v:
        if text:
            raise RotorError("--kv and --cache-type-k/--cache-type-v say the same thing: use one of them")
        if not (k and v):
            raise RotorError("give both --cache-type-k and --cache-type-v")
        text = EXACT if k == v == "f16" else f"k={k},v={v}"
    asked = text is not None or any(x is not None for x in (args.kv_sinks, args.kv_ring, args.kv_protect_layers))
    for flag in stock_caches:
        if getattr(args, flag.removeprefix("--").replace("-", "_")) is not None:
            if asked and text != EXACT:
                raise RotorError(
                    f"{flag} is mlx_lm's own cache and can't be combined with a compressed one; drop either"
                )
            return None
    if not asked and getattr(args, "max_kv_size", None) is not None:
        from .host.layers import SHORTEST_WINDOW

        if args.max_kv_size < SHORTEST_WINDOW:
            return None  # too few tokens to gain from packing, and nobody asked for it
    return parse(text or DEFAULT, sinks=args.kv_sinks, ring=args.kv_ring, protect_layers=args.kv_protect_layers)
