"""How much of a weight is worked on at a time."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

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
