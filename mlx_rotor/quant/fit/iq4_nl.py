"""Weights to IQ4_NL: 16 uneven levels, denser around 0, times one float16 scale a group, which may be negative."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import numpy as np

from ...experts.formats.iq4_nl import LEVELS
from .scaled import Effort, fit_scaled

# Midpoints of levels are multiples of a half, so halves tell which level is nearest: entry i is that of numbers from
# i/2 + LEVELS[0] to half a unit above.
_HALVES = 2 * (LEVELS[-1] - LEVELS[0]) + 1
_CODES = np.searchsorted([a + b for a, b in pairwise(LEVELS)], np.arange(_HALVES) + 2 * LEVELS[0], side="right")
_LEVELS = mx.array(np.array(LEVELS, np.float32)[_CODES])
_CODE_OF = mx.array(np.searchsorted(LEVELS, np.arange(LEVELS[0], LEVELS[-1] + 1)).astype(np.uint32))
mx.eval(_LEVELS, _CODE_OF)


class Iq4NlLevels:
    mode, bits, most = "iq4_nl", 4, float(LEVELS[-1])

    def nearest(self, x: mx.array) -> mx.array:
        return _take(_LEVELS, mx.clip(2 * x - 2 * LEVELS[0], 0, _HALVES - 1))

    def codes(self, levels: mx.array) -> mx.array:
        return _take(_CODE_OF, levels - LEVELS[0])

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        first, last = LEVELS[0], LEVELS[-1]
        up, down = mx.maximum(low / first, high / last), mx.minimum(high / first, low / last)
        # llama.cpp's without search: the largest weight, of either sign, is the longer end.
        plain = mx.where(-low > high, low, high) / first
        return plain, up, down


# Chosen for the least mean error over normal, Student (5) and Laplace weights.
SEARCH = Effort((1.0, 0.93, 0.86, 0.79, 0.72), 2, (1.0,))
BEST = Effort(tuple(1.04 - 0.02 * i for i in range(24)), 3, (1 - 2**-10, 1.0, 1 + 2**-10))
EFFORTS: dict[str, Effort | None] = {"fast": None, "search": SEARCH, "best": BEST}


def fit_iq4_nl(
    w: mx.array, *, group_size: int = 16, fit: str = "search", importance: mx.array | None = None
) -> tuple[mx.array, ...]:
    """Weights [.., K] as (codes, scales), see `fit_scaled`. `fast` is llama.cpp's scale without a search, and ignores
    `importance`."""
    return fit_scaled(w, Iq4NlLevels(), group_size, EFFORTS[fit], importance)


def _take(table: mx.array, at: mx.array) -> mx.array:
    """Entries at positions >= 0, float32 of any shape, rounded down. On a CPU several times faster than mx.take."""
    return mx.take_along_axis(table, at.astype(mx.uint32).reshape(-1), axis=0).reshape(at.shape)
