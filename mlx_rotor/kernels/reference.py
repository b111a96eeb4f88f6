"""Twins: what the kernels compute, in plain mx operations, with float32 accumulation.

Knows runs of keys and values, not where they are stored or how they are packed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import mlx.core as mx

# Elements of one score tile: bounds a tile's scores at 16 MiB and its keys at a few thousand tokens.
TILE_SCORES = 1 << 22
MIN_TILE, MAX_TILE = 64, 4096


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


def _tiles(length: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _mask_tile(
    mask: mx.array | str | None, first: int, start: int, stop: int, rows: int, total: int
) -> mx.array | None:
    """The part of a mask that covers tokens first + start .. first + stop, as an array, or None where all are seen."""
    if mask is None:
        return None
    lo, hi = first + start, first + stop
    if isinstance(mask, str):
        if mask != "causal":
            raise ValueError(f"unknown mask {mask!r}")
        if hi <= total - rows + 1:
            return None
        return mx.arange(total - rows, total)[:, None] >= mx.arange(lo, hi)[None]
    return mask if mask.shape[-1] == 1 else mask[..., lo:hi]


def attend(
    q: mx.array,
    runs: Sequence[Run],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of q over consecutive runs, tile by tile with an online softmax: nothing as long as the past is made.

    Args:
        q: [B, Hq, L, D]; Hq is a multiple of the runs' heads.
        runs: in token order; together S tokens, of which q's are the last L.
        scale: multiplies the scores.
        mask: None, "causal", boolean (True is seen) or additive, broadcastable to [B, Hq, L, S].
        sinks: [Hq] attention-sink logits, which take softmax mass and no value.

    Returns:
        [B, Hq, L, Dv] in q's dtype. A row that sees nothing is zero.
    """
    B, heads, L, D = q.shape
    runs = [r for r in runs if r.length]
    total = sum(r.length for r in runs)
    kv_heads = runs[0].keys(0, 1).shape[1]
    group = heads // kv_heads
    queries = (q.astype(mx.float32) * scale).reshape(B, kv_heads, group * L, D)
    size = max(MIN_TILE, min(MAX_TILE, TILE_SCORES // (B * heads * L)))

    if sinks is None:
        top = mx.full((B, heads, L, 1), -mx.inf)
        mass = mx.zeros((B, heads, L, 1))
    else:
        top = mx.broadcast_to(sinks.astype(mx.float32).reshape(1, heads, 1, 1), (B, heads, L, 1))
        mass = mx.ones((B, heads, L, 1))
    out: mx.array | None = None
    first = 0
    for run in runs:
        rotated = run.rotate_query(queries)
        part: mx.array | None = None
        for start, stop in _tiles(run.length, size):
            scores = (rotated @ run.keys(start, stop).swapaxes(-1, -2)).reshape(B, heads, L, stop - start)
            seen = _mask_tile(mask, first, start, stop, L, total)
            if seen is not None:
                scores = mx.where(seen, scores, -mx.inf) if seen.dtype == mx.bool_ else scores + seen
            new_top = mx.maximum(top, scores.max(-1, keepdims=True))
            # A row that has seen nothing yet keeps -inf as its maximum: shift by 0, not by -inf.
            shift = mx.where(new_top == -mx.inf, 0.0, new_top)
            keep, weights = mx.exp(top - shift), mx.exp(scores - shift)
            mass = mass * keep + weights.sum(-1, keepdims=True)
            weighted = weights.reshape(B, kv_heads, group * L, stop - start) @ run.values(start, stop)
            weighted = weighted.reshape(B, heads, L, -1)
            part = weighted if part is None else part * keep + weighted
            out = None if out is None else out * keep
            top = new_top
        first += run.length
        assert part is not None
        # The basis of a run's values is undone once a run, not once a token.
        restored = run.unrotate_output(part)
        out = restored if out is None else out + restored
    assert out is not None
    return (out / mx.where(mass > 0, mass, 1.0)).astype(q.dtype)
