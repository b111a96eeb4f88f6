"""The operations that caches call: encode, attend, dequantize. Each runs its kernel or its reference, see `backend`."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import check_results, reference
from .arguments import AttentionArgs
from .attention import attend_exact, attend_metal
from .launch import backend
from .packed import TILE
from .packing import dequantize_metal, encode_metal, encode_reference
from .segments import ExactSegment, PackedSegment, PackedSide, Segment, in_order
from .spec import Codec

__all__ = [
    "TILE",
    "AttentionArgs",
    "ExactSegment",
    "PackedSegment",
    "PackedSide",
    "Segment",
    "attend",
    "backend",
    "dequantize",
    "encode",
]


def encode(
    codec: Codec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """Packs x [B, H, n, D], of any float dtype, into whole tiles; words and scales behind token n are 0.

    Args:
        mean: float16 [B, H, groups, D] in the codec's basis, subtracted before encoding: token i has mean
            (first + i) // span; span 0: one for all. first is a multiple of 32.

    Returns:
        (tiles uint32 [B, H, ceil(n / 32), D · bits], scale float16 [B, H, 32 ceil(n / 32)] or None).

    Raises:
        RotorError: if the codec has a kernel that failed its check on this machine.
    """
    if backend() == "reference" or codec.kernel is None:
        return encode_reference(codec, x, mean, first=first, span=span)
    check_results.refuse("encode", x.dtype, codec)
    return encode_metal(codec, x, mean, first=first, span=span)


def attend(q: mx.array, segments: Sequence[Segment], args: AttentionArgs) -> mx.array:
    """Attention of q over segments in token order: sink tokens, packed segments, recent tokens, each optional.

        attend(q, [ExactSegment(k, v), PackedSegment(4096, k_side, v_side)], AttentionArgs(scale=128**-0.5))

    Args:
        q: [B, Hq, L, D], float16, bfloat16 or float32, the dtype of the exact tokens; Hq is a multiple of their heads.

    Returns:
        [B, Hq, L, Dv] in q's dtype. A row that sees nothing is zero.

    Raises:
        RotorError: if a codec's kernel failed its check on this machine, or for a shape no kernel takes.
    """
    if backend() == "reference":
        return reference.attend(q, segments, args)
    sinks, bodies, recent = in_order(segments)
    if not bodies:
        return attend_exact(q, [segment for segment in (sinks, recent) if segment], args)
    for body in bodies:
        if body.k.codec.kernel is None or body.v.codec.kernel is None:
            return reference.attend(q, segments, args)
        check_results.refuse("attend", q.dtype, body.k.codec, body.v.codec)
    return attend_metal(q, sinks, bodies, recent, args)


def dequantize(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side in the model's basis, [B, H, stop - start, D] of dtype.

    Raises:
        RotorError: if the codec's kernel failed its check on this machine.
    """
    if backend() == "reference" or side.codec.kernel is None:
        return reference.dequantize(side, start, stop, dtype)
    check_results.refuse("dequantize", dtype, side.codec)
    return dequantize_metal(side, start, stop, dtype)
