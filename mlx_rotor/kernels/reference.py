"""References in plain mx operations, with float32 sums: `attend` of the decode, prefill and merge kernels, `dequantize`
of the dequantize kernel. That of the encode kernel is the codec itself (`packing.encode_reference`), that of the rotate
kernel `Codec.rotate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx

from .arguments import AttentionArgs
from .mask import TokenMask
from .segments import PackedSide, Segment

# Elements of one score tile: bounds a tile's scores at 8 MiB and its keys at a thousand tokens.
TILE_SCORES = 1 << 21
MIN_TILE, MAX_TILE = 64, 1024


def dequantize(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side in the model's basis, [B, H, stop - start, D] of dtype."""
    if start == stop:
        return mx.zeros((*side.tiles.shape[:2], 0, side.codec.dim), dtype)
    return side.codec.unrotate(side.rotated(start, stop)).astype(dtype)


def attend(q: mx.array, segments: Sequence[Segment], args: AttentionArgs) -> mx.array:
    """Attention of q over consecutive segments, tile by tile with an online softmax. No array is as long as the past.

    Args:
        q: [B, Hq, L, D]; Hq is a multiple of the segments' heads.
        segments: in token order.

    Returns:
        [B, Hq, L, Dv] in q's dtype. A row that sees nothing is zero.

    Raises:
        RotorError: lengths that don't go with these segments.
    """
    B, heads, L, D = q.shape
    token_mask = TokenMask.over(segments, L, args)
    kv_heads = next(segment.keys(0, 1).shape[1] for segment in segments if segment.length)
    group = heads // kv_heads
    queries = (q.astype(mx.float32) * args.scale).reshape(B, kv_heads, group * L, D)
    size = max(MIN_TILE, min(MAX_TILE, TILE_SCORES // (B * heads * L)))

    if args.sink_logits is None:
        top = mx.full((B, heads, L, 1), -mx.inf)
        mass = mx.zeros((B, heads, L, 1))
    else:
        top = mx.broadcast_to(args.sink_logits.astype(mx.float32).reshape(1, heads, 1, 1), (B, heads, L, 1))
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


def _tiles(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, size):
        yield at, min(at + size, stop)
