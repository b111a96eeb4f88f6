"""The operations everything above calls: each picks the backend and runs its kernel, or its reference twin."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import reference, verdicts
from .attention import attend_metal
from .dequantizing import dequantize_metal
from .encoding import encode_metal, encode_reference
from .exact import attend_exact
from .launch import backend
from .runs import ExactRun, PackedRun, PackedSide, StoredRun, in_order
from .spec import KernelCodec
from .tiles import TILE

__all__ = ["TILE", "ExactRun", "PackedRun", "PackedSide", "StoredRun", "attend", "backend", "dequantize", "encode"]


def encode(codec: KernelCodec, x: mx.array) -> tuple[mx.array, mx.array]:
    """Packs x [B, H, n, D] into whole tiles; words and scales behind token n are 0.

    Returns:
        (tiles uint32 [B, H, ceil(n / 32), D · bits], scale float16 [B, H, 32 ceil(n / 32)]).

    Raises:
        RotorError: if the codec has no kernel for the backend, or one that failed its check on this machine.
    """
    if backend() == "reference":
        return encode_reference(codec, x)
    verdicts.refuse("encode", x.dtype, codec)
    return encode_metal(codec, x)


def attend(
    q: mx.array,
    runs: Sequence[StoredRun],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    window: int | None = None,
    lengths: mx.array | None = None,
) -> mx.array:
    """Attention over [exact sinks][packed body][exact recent], each optional; see `reference.attend` for the rest.

    Raises:
        RotorError: if a codec of the packed run has no kernel for the backend, or one that failed its check here.
    """
    if backend() == "reference":
        return reference.attend(q, runs, scale=scale, mask=mask, sinks=sinks, window=window, lengths=lengths)
    exact = [run for run in runs if isinstance(run, ExactRun)]
    first, body, recent = in_order(runs)
    if body is None:
        return attend_exact(q, exact, scale=scale, mask=mask, sinks=sinks, window=window, lengths=lengths)
    verdicts.refuse("attend", q.dtype, body.k.codec, body.v.codec)
    return attend_metal(q, first, body, recent, scale=scale, mask=mask, sinks=sinks, window=window, lengths=lengths)


def dequantize(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side in the model's basis, [B, H, stop - start, D] of dtype.

    Raises:
        RotorError: if the codec has no kernel for the backend, or one that failed its check on this machine.
    """
    if backend() == "reference":
        return reference.dequantize(side, start, stop, dtype)
    verdicts.refuse("dequantize", dtype, side.codec)
    return dequantize_metal(side, start, stop, dtype)
