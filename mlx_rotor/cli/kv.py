"""mlx_lm's flags with those for the KV scheme and the experts, the same in every command that runs a model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import RotorError
from .arguments import Parser, adopted

if TYPE_CHECKING:
    from ..cache import Scheme

PARTS = ("kv_sinks", "kv_ring", "kv_protect_layers")


def completed(parser: argparse.ArgumentParser, command: str, description: str) -> Parser:
    """A parser of mlx_lm's as that of `command`: the bundled model is the default, and ours are added."""
    from ..cache import DEFAULT
    from ..host.experts import AUTO, MODES

    parser = adopted(parser)
    parser.prog, parser.description = f"mlx_rotor {command}", description
    parser.set_defaults(model=None)
    for action in parser._actions:
        if action.dest == "model":
            action.help = "A local model folder or Hugging Face repo (default: the bundled model)."
        elif action.dest == "kv_bits":
            action.help = "mlx_lm's own quantized KV cache with so many bits, in place of --kv (default: none)."
        elif action.dest in ("kv_group_size", "quantized_kv_start"):
            action.help = f"Of mlx_lm's own cache. {action.help}"
    kv = parser.add_argument_group("compressed KV cache")
    what = f"trellis3, turbo4v2, k=…,v=…, a calibration's .json, or exact (default: {DEFAULT})"
    kv.add_argument("--kv", metavar="SCHEME", help=what)
    kv.add_argument("--cache-type-k", metavar="CODEC", help="the codec of K, as llama.cpp spells it; f16 is exact")
    kv.add_argument("--cache-type-v", metavar="CODEC", help="the codec of V")
    kv.add_argument("--kv-sinks", type=int, metavar="N", help="first tokens kept exact (default: 4)")
    kv.add_argument("--kv-ring", type=int, metavar="N", help="recent tokens kept exact (default: 128)")
    kv.add_argument("--kv-protect-layers", type=int, metavar="N", help="end layers one codec step up (default: 2)")
    experts = parser.add_argument_group("experts of mixture-of-experts models")
    what = "fused: our kernels; stock: mlx_lm's own way; auto (the default): fused where it is known to run and to pay"
    experts.add_argument("--experts", choices=MODES, default=AUTO, help=what)
    return parser


@dataclass(frozen=True)
class Choice:
    """The KV cache that flags ask for.

    Attributes:
        scheme: of compressed caches; None leaves caches to mlx_lm.
        name: what the output calls it.
        why: why nothing is compressed, "" where something is.
    """

    scheme: Scheme | None
    name: str
    why: str = ""


def choice_of(args: argparse.Namespace) -> Choice:
    """What `args` ask for.

    Raises:
        RotorError: an unknown scheme, or flags that contradict each other.
    """
    from ..cache import DEFAULT, EXACT, parse

    text, k, v = args.kv, args.cache_type_k, args.cache_type_v
    limit, kv_bits = getattr(args, "max_kv_size", None), getattr(args, "kv_bits", None)
    if k is not None or v is not None:
        if text is not None:
            raise RotorError("--kv and --cache-type-k/--cache-type-v say the same thing: use one of them")
        if not (k and v):
            raise RotorError("give both --cache-type-k and --cache-type-v")
        text = EXACT if k == v == "f16" else f"k={k},v={v}"
    parts = [f"--{part.replace('_', '-')}" for part in PARTS if getattr(args, part) is not None]
    exact = text is not None and text.strip() == EXACT
    if exact and parts:
        raise RotorError(f"{', '.join(parts)}: all tokens are exact in exact KV; leave it out, or give another --kv")
    if kv_bits is not None:
        if not exact and (text is not None or parts):
            raise RotorError("--kv-bits is mlx_lm's own cache and can't be combined with a compressed one; drop either")
        if limit is not None:
            raise RotorError("--kv-bits and --max-kv-size: mlx_lm packs no cache of limited size; drop either")
        why = f"--kv-bits {kv_bits} asks for mlx_lm's own quantized cache, from token {args.quantized_kv_start} on"
        return Choice(None, f"mlx_lm's own {kv_bits}-bit", why)
    if exact:
        return Choice(None, EXACT, "as was asked for")
    if text is None and not parts and limit is not None:
        from ..host.layers import SHORTEST_WINDOW

        if limit < SHORTEST_WINDOW:
            why = f"--max-kv-size {limit} leaves too few tokens to compress; from {SHORTEST_WINDOW} on they are"
            return Choice(None, EXACT, why)
    text = DEFAULT if text is None else text
    scheme = parse(text, sinks=args.kv_sinks, ring=args.kv_ring, protect_layers=args.kv_protect_layers)
    assert scheme is not None
    return Choice(scheme, scheme.name)
