"""Weights to eight bits, symmetric: whole numbers from -128 to 127 times one float16 scale a group."""

from __future__ import annotations

import mlx.core as mx

from ...experts.formats.q8 import ZERO
from .scaled import Effort, fit_scaled
from .search import WHOLE


class Q8Levels:
    mode, bits, most = "q8", 8, 127.0

    def nearest(self, x: mx.array) -> mx.array:
        return (mx.clip(x, -ZERO, ZERO - 1) + WHOLE) - WHOLE

    def codes(self, levels: mx.array) -> mx.array:
        return (levels + ZERO).astype(mx.uint32)

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        return mx.maximum(-low, high) / (ZERO - 1), mx.maximum(low / -ZERO, high / (ZERO - 1))


# A weight in 32 that is clipped by a step costs what all roundings of twelve do: there is little to gain.
SEARCH = Effort((1.0,), 1, (1.0, 1 - 2**-9))
BEST = Effort(tuple(1 - i / 256 for i in range(8)), 2, tuple(1 + i / 1024 for i in range(-3, 4)))
EFFORTS: dict[str, Effort | None] = {"fast": None, "search": SEARCH, "best": BEST}


def fit_q8(
    w: mx.array, *, group_size: int = 32, fit: str = "search", importance: mx.array | None = None
) -> tuple[mx.array, ...]:
    """Weights [.., K] as (codes, scales), see `fit_scaled`. `fast` is the largest weight over 127, and ignores
    `importance`."""
    return fit_scaled(w, Q8Levels(), group_size, EFFORTS[fit], importance)
