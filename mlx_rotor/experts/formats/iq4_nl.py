"""IQ4_NL, in groups of 16 what is called MXFP4-16: scale · level, llama.cpp's 16 levels, one float16 scale a group."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .base import Format, codes

MODE = "iq4_nl"
BITS, GROUP_SIZES = (4,), (16, 32)
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_LEVELS = mx.array(LEVELS, mx.float32)
mx.eval(_LEVELS)


class Iq4Nl(Format):
    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(MODE, bits, group_size, ("scales",), "iq4_nl.h")

    def beside_columns(self, columns: int) -> int:
        return columns // self.group_size

    def beside_dtype(self) -> mx.Dtype:
        return mx.float16

    def metal(self, element: str) -> str:
        return f"Iq4NlWeights<{self.group_size}, {element}>"

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        words, scales = parts
        levels = mx.take(_LEVELS, codes(words, 4, columns).astype(mx.uint32))
        grouped = levels.reshape(*words.shape[:-1], -1, self.group_size) * scales.astype(mx.float32)[..., None]
        return grouped.reshape(*words.shape[:-1], columns)


MAKE = Iq4Nl
