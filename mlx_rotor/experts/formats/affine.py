"""MLX's own format: scale · code + bias, a scale and a bias a group."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .base import Format

MODE = "affine"
BITS, GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8), (128, 64, 32)


class Affine(Format):
    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(MODE, bits, group_size, ("scales", "biases"), "affine.h")

    def beside_columns(self, columns: int) -> int:
        return columns // self.group_size

    def beside_dtype(self) -> mx.Dtype:
        return mx.bfloat16

    def metal(self, element: str) -> str:
        return f"AffineWeights<{self.bits}, {self.group_size}, {element}>"

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        words, scales, biases = parts
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
        return mx.dequantize(words, scales, biases, self.group_size, self.bits)


MAKE = Affine
