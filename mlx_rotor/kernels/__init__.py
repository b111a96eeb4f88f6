"""The operations everything above calls: each picks the backend and runs its kernel or its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from . import check_results, reference
from .attention import attend_exact, attend_metal
from .launch import backend
from .packed import TILE
from .packing import dequantize_metal, encode_metal, encode_reference
from .segments import ExactSegment, PackedSegment, PackedSide, Segment, in_order
from .spec import KernelCodec

__all__ = [
    "TILE",
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
    codec: KernelCodec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """Packs x [B, H, n, D] into whole tiles; words and scales behind token n are 0.

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


def attend(
    q: mx.array,
    segments: Sequence[Segment],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sink_logits: mx.array | None = None,
    window: int | None = None,
    kept: bool = False,
    lengths: mx.array | None = None,
) -> mx.array:
    """Attention over [sink tokens][packed segments …][exact recent], each optional; see `reference.attend`.

    Raises:
        RotorError: if a codec's kernel failed its check on this machine, or for a shape no kernel takes.
    """
    how: dict[str, Any] = {
        "scale": scale, "mask": mask, "sink_logits": sink_logits, "window": window, "kept": kept, "lengths": lengths,
    }  # fmt: skip
    if backend() == "reference":
        return reference.attend(q, segments, **how)
    first, bodies, recent = in_order(segments)
    if not bodies:
        return attend_exact(q, [segment for segment in (first, recent) if segment], **how)
    for segment in bodies:
        if segment.k.codec.kernel is None or segment.v.codec.kernel is None:
            return reference.attend(q, segments, **how)
        check_results.refuse("attend", q.dtype, segment.k.codec, segment.v.codec)
    return attend_metal(q, first, bodies, recent, **how)


def dequantize(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side in the model's basis, [B, H, stop - start, D] of dtype.

    Raises:
        RotorError: if the codec's kernel failed its check on this machine.
    """
    if backend() == "reference" or side.codec.kernel is None:
        return reference.dequantize(side, start, stop, dtype)
    check_results.refuse("dequantize", dtype, side.codec)
    return dequantize_metal(side, start, stop, dtype)
