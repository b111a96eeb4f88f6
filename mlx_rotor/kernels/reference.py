"""The references of the kernels: what they compute, in plain mx operations, with float32 accumulation.

Knows segments of keys and values, not where they are stored or how they are packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

from .mask import TokenMask, held_by, kept_in_front
from .segments import PackedSegment, PackedSide

# Elements of one score tile: bounds a tile's scores at 8 MiB and its keys at a thousand tokens.
TILE_SCORES = 1 << 21
MIN_TILE, MAX_TILE = 64, 1024


class Run(Protocol):
    """Consecutive tokens that attention reads, in some basis of its own."""

    @property
    def length(self) -> int: ...

    def keys(self, start: int, stop: int) -> mx.array:
        """float32 [B, Hkv, stop - start, D] in the basis of `rotate_query`."""

    def values(self, start: int, stop: int) -> mx.array:
        """float32 [B, Hkv, stop - start, Dv] in the basis that `unrotate_output` undoes."""

    def rotate_query(self, q: mx.array) -> mx.array: ...

    def unrotate_output(self, o: mx.array) -> mx.array: ...


def dequantize(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side in the model's basis, [B, H, stop - start, D]."""
    if start == stop:
        return mx.zeros((*side.tiles.shape[:2], 0, side.codec.dim), dtype)
    return side.codec.unrotate(side.rotated(start, stop)).astype(dtype)


def _tiles(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, size):
        yield at, min(at + size, stop)


def attend(
    q: mx.array,
    segments: Sequence[Run],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sink_logits: mx.array | None = None,
    window: int | None = None,
    kept: bool = False,
    lengths: mx.array | None = None,
) -> mx.array:
    """Attention of q over consecutive segments, tile by tile with an online softmax.

    Args:
        q: [B, Hq, L, D]; Hq is a multiple of the segments' heads.
        segments: in token order; together S tokens, of which q's are the last L.
        scale: multiplies the scores.
        mask: None, "causal", boolean (True is seen) or additive, broadcastable to [B, Hq, L, S].
        sink_logits: [Hq] attention-sink logits, which take softmax mass and no value.
        window: a query at position p sees positions above p - window only; None: all.
        kept: the exact segment in front, if other tokens follow it, is seen whatever the window.
        lengths: int32 [B, 3], for batches of unequal rows: how many tokens of sinks, body and recent tokens each row
            holds, from each segment's first. q's rows are then the last L of the row's own tokens; positions before its
            first see nothing. A mask's columns stay the S slots.

    Returns:
        [B, Hq, L, Dv] in q's dtype. A row that sees nothing is zero.
    """
    B, heads, L, D = q.shape
    held = None if lengths is None else held_by([isinstance(segment, PackedSegment) for segment in segments], lengths)
    token_mask = TokenMask(
        L, [segment.length for segment in segments], mask, window, held, kept_in_front(segments) if kept else 0
    )
    kv_heads = next(segment.keys(0, 1).shape[1] for segment in segments if segment.length)
    group = heads // kv_heads
    queries = (q.astype(mx.float32) * scale).reshape(B, kv_heads, group * L, D)
    size = max(MIN_TILE, min(MAX_TILE, TILE_SCORES // (B * heads * L)))

    if sink_logits is None:
        top = mx.full((B, heads, L, 1), -mx.inf)
        mass = mx.zeros((B, heads, L, 1))
    else:
        top = mx.broadcast_to(sink_logits.astype(mx.float32).reshape(1, heads, 1, 1), (B, heads, L, 1))
        mass = mx.ones((B, heads, L, 1))
    out: mx.array | None = None
    for nth, segment in enumerate(segments):
        rotated = segment.rotate_query(queries)
        part: mx.array | None = None
        for start, stop in _tiles(token_mask.first(nth), segment.length, size):
            scores = (rotated @ segment.keys(start, stop).swapaxes(-1, -2)).reshape(B, heads, L, stop - start)
            seen = token_mask.part(nth, start, stop)
            if seen is not None:
                scores = mx.where(seen, scores, -mx.inf) if seen.dtype == mx.bool_ else scores + seen
            new_top = mx.maximum(top, scores.max(-1, keepdims=True))
            # A row that has seen nothing yet keeps -inf as its maximum: shift by 0, not by -inf.
            shift = mx.where(new_top == -mx.inf, 0.0, new_top)
            keep, weights = mx.exp(top - shift), mx.exp(scores - shift)
            mass = mass * keep + weights.sum(-1, keepdims=True)
            values, empty = segment.values(start, stop), token_mask.empty(nth, start, stop)
            if empty is not None:
                values = mx.where(empty, 0.0, values)  # Zero weight does not hide what is no number.
            weighted = weights.reshape(B, kv_heads, group * L, stop - start) @ values
            weighted = weighted.reshape(B, heads, L, -1)
            part = weighted if part is None else part * keep + weighted
            out = None if out is None else out * keep
            top = new_top
        if part is not None:
            # The basis of a segment's values is undone once a segment, not once a token.
            restored = segment.unrotate_output(part)
            out = restored if out is None else out + restored
    assert out is not None
    return (out / mx.where(mass > 0, mass, 1.0)).astype(q.dtype)
