"""A weight's rows, a chunk at a time, each chunk with the importance that belongs to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import cast

import mlx.core as mx

from ..errors import RotorError

# About sixteen float32 arrays of a chunk's size exist at once, in a search for codebooks up to forty. A CPU is fastest
# while they stay in its cache; a GPU wants enough work in each launch.
CPU_WEIGHTS = 1 << 17
GPU_WEIGHTS = 1 << 22


def weights() -> int:
    """Weights of a chunk on the default device."""
    return CPU_WEIGHTS if mx.default_device() == mx.Device(mx.cpu) else GPU_WEIGHTS


def chunks(rows: int, columns: int, share: int = 1) -> Iterator[slice]:
    """Slices that cut `rows` of `columns` weights each into chunks: whole rows, at least one.

    `share`: how many times smaller than usual.
    """
    step = max(1, weights() // (columns * share))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


HALF_MAX = 65504.0  # float16's largest

# Rows [R, K] of the weights' dtype and an importance float32 [R or 1, K], or None -> what is stored of them, [R, ..].
Work = Callable[[mx.array, mx.array | None], tuple[mx.array, ...]]


def by_chunks(w: mx.array, importance: mx.array | None, work: Work, share: int = 1) -> tuple[mx.array, ...]:
    """What `work` makes of weights [.., K], put together to [.., n] each; evaluated. RotorError as `aligned`.

    `share`: how many times smaller than usual chunks are, for work that takes more memory.
    """
    blocks, seen = aligned(w, importance)
    parts: list[tuple[mx.array, ...]] = []
    for block in range(blocks.shape[0]):
        for rows in chunks(blocks.shape[1], w.shape[-1], share):
            heeded = None if seen is None else seen[block, rows if seen.shape[1] > 1 else slice(None)]
            parts.append(work(blocks[block, rows], heeded))
            mx.eval(parts[-1])
    stored = tuple(mx.concatenate(list(part)).reshape(*w.shape[:-1], -1) for part in zip(*parts, strict=True))
    mx.eval(stored)
    return stored


def check_not_empty(w: mx.array) -> None:
    """RotorError where there is nothing to fit."""
    if w.ndim == 0 or w.size == 0:
        raise RotorError(f"no weights to fit: shape {w.shape}")


def largest_of(w: mx.array) -> float:
    """The largest magnitude, without a copy of the weights."""
    return cast(float, mx.maximum(w.max(), -w.min()).item())


def aligned(w: mx.array, importance: mx.array | None) -> tuple[mx.array, mx.array | None]:
    """Weights [B, R, K] and importance [B, R or 1, K]: rows of a block share one wherever the caller's do.

    RotorError for an importance that does not broadcast to the weights.
    """
    k = w.shape[-1]
    lead = w.shape[:-1]
    if importance is None:
        return w.reshape(1, -1, k), None
    shape = importance.shape
    padded = (1,) * (w.ndim - importance.ndim) + shape
    if (
        len(padded) != w.ndim
        or shape[-1:] != (k,)
        or any(n not in (1, m) for n, m in zip(padded, w.shape, strict=True))
    ):
        raise RotorError(f"importance {shape} does not broadcast to weights {w.shape}")
    shared = len(lead)  # trailing axes of `lead` that one importance serves
    while shared and padded[shared - 1] == 1:
        shared -= 1
    importance = importance.astype(mx.float32)
    if shared == len(lead) and lead:  # every row has its own
        return w.reshape(1, -1, k), mx.broadcast_to(importance, w.shape).reshape(1, -1, k)
    outer = prod(lead[:shared])
    seen = mx.broadcast_to(importance.reshape(*padded[:shared], k), (*lead[:shared], k)).reshape(outer, 1, k)
    return w.reshape(outer, -1, k), seen
