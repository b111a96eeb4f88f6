"""Eight bits, symmetric: scale · (code - 128), one float16 scale a group of 32 (llama.cpp's Q8_0, hipfire's Q8F16)."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .base import Format, codes

MODE = "q8"
BITS, GROUP_SIZES = (8,), (32,)
ZERO = 128  # the code of 0


class Q8(Format):
    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(MODE, bits, group_size, ("scales",), "q8.h")

    def beside_columns(self, columns: int) -> int:
        return columns // self.group_size

    def beside_dtype(self) -> mx.Dtype:
        return mx.float16

    def metal(self, element: str) -> str:
        return f"Q8Weights<{self.group_size}, {element}>"

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        words, scales = parts
        levels = codes(words, 8, columns) - ZERO
        grouped = levels.reshape(*words.shape[:-1], -1, self.group_size) * scales.astype(mx.float32)[..., None]
        return grouped.reshape(*words.shape[:-1], columns)


MAKE = Q8
