"""IQ4_NL: scale · level, llama.cpp's 16 uneven levels, one float16 scale a group, which may be negative.

In groups of 16 hipfire calls it MXFP4-16.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx
import numpy as np

from ...fit.scaled import Effort
from .base import Efforts, Errors, ScaledFormat, codes

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode(parts: Sequence[mx.array], columns: int, bits: int, group_size: int) -> mx.array:
    words, scales = parts
    levels = mx.take(mx.array(LEVELS, mx.float32), codes(words, bits).astype(mx.uint32))
    grouped = levels.reshape(*words.shape[:-1], -1, group_size) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(*words.shape[:-1], columns)


# Midpoints of levels are multiples of a half, so halves tell which level is nearest: entry i is that of numbers from
# i/2 + LEVELS[0] to half a unit above.
_HALVES = 2 * (LEVELS[-1] - LEVELS[0]) + 1
_CODES = np.searchsorted([a + b for a, b in pairwise(LEVELS)], np.arange(_HALVES) + 2 * LEVELS[0], side="right")
_NEAREST = mx.array(np.array(LEVELS, np.float32)[_CODES])
_CODE_OF = mx.array(np.searchsorted(LEVELS, np.arange(LEVELS[0], LEVELS[-1] + 1)).astype(np.uint32))
mx.eval(_NEAREST, _CODE_OF)


class Iq4NlLevels:
    bits, most = 4, float(LEVELS[-1])

    def nearest(self, x: mx.array) -> mx.array:
        return _take(_NEAREST, mx.clip(2 * x - 2 * LEVELS[0], 0, _HALVES - 1))

    def codes(self, levels: mx.array) -> mx.array:
        return _take(_CODE_OF, levels - LEVELS[0])

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        first, last = LEVELS[0], LEVELS[-1]
        up, down = mx.maximum(low / first, high / last), mx.minimum(high / first, low / last)
        # llama.cpp's without search: the largest weight, of either sign, is the longer end.
        plain = mx.where(-low > high, low, high) / first
        return plain, up, down


class Iq4Nl(ScaledFormat):
    """The fit `fast` is llama.cpp's scale without a search."""

    mode = "iq4_nl"
    all_bits, group_sizes = (4,), (16, 32)
    header = "iq4_nl.h"
    decoder = staticmethod(decode)
    errors: ClassVar[Errors] = {
        (4, 16): (0.005193, 0.004135, 0.004097),
        (4, 32): (0.006385, 0.005435, 0.005391),
    }
    levels = Iq4NlLevels()
    # Chosen for the least mean error over normal, Student (5) and Laplace weights.
    efforts: ClassVar[Efforts] = {
        "fast": None,
        "search": Effort((1.0, 0.93, 0.86, 0.79, 0.72), 2, (1.0,)),
        "best": Effort(tuple(1.04 - 0.02 * i for i in range(24)), 3, (1 - 2**-10, 1.0, 1 + 2**-10)),
    }

    def metal(self, element: str) -> str:
        return f"Iq4NlWeights<{self.group_size}, {element}>"


def _take(table: mx.array, at: mx.array) -> mx.array:
    """Entries at positions >= 0, float32 of any shape, rounded down. On a CPU several times faster than mx.take."""
    return mx.take_along_axis(table, at.astype(mx.uint32).reshape(-1), axis=0).reshape(at.shape)
