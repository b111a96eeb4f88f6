"""Eight bits, symmetric: scale · (code - 128), one float16 scale a group of 32 (llama.cpp's Q8_0, hipfire's Q8F16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import mlx.core as mx

from ...fit.scaled import Effort
from ...fit.search import WHOLE
from .base import Efforts, Errors, ScaledFormat, codes

ZERO = 128  # the code of 0


def decode(parts: Sequence[mx.array], columns: int, bits: int, group_size: int) -> mx.array:
    words, scales = parts
    levels = codes(words, bits) - ZERO
    grouped = levels.reshape(*words.shape[:-1], -1, group_size) * scales.astype(mx.float32)[..., None]
    return grouped.reshape(*words.shape[:-1], columns)


class Q8Levels:
    bits, most = 8, 127.0

    def nearest(self, x: mx.array) -> mx.array:
        return (mx.clip(x, -ZERO, ZERO - 1) + WHOLE) - WHOLE

    def codes(self, levels: mx.array) -> mx.array:
        return (levels + ZERO).astype(mx.uint32)

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        return mx.maximum(-low, high) / (ZERO - 1), mx.maximum(low / -ZERO, high / (ZERO - 1))


class Q8(ScaledFormat):
    """The fit `fast` is the largest weight over 127."""

    mode = "q8"
    all_bits, group_sizes = (8,), (32,)
    header = "q8.h"
    decoder = staticmethod(decode)
    errors: ClassVar[Errors] = {(8, 32): (2.854e-05, 2.575e-05, 2.53e-05)}
    levels = Q8Levels()
    # A weight in 32 that is clipped by a step costs what all roundings of twelve do: there is little to gain.
    efforts: ClassVar[Efforts] = {
        "fast": None,
        "search": Effort((1.0,), 1, (1.0, 1 - 2**-9)),
        "best": Effort(tuple(1 - i / 256 for i in range(8)), 2, tuple(1 + i / 1024 for i in range(-3, 4))),
    }

    def metal(self, element: str) -> str:
        return f"Q8Weights<{self.group_size}, {element}>"
