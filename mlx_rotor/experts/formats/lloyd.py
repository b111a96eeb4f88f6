"""Codebooks (hipfire's MQ-Lloyd): a group of weights has its own 2**bits levels, ascending, and a code says which.

A row's codebooks stand behind each other in one axis, so that what shards rows or columns of weights shards them alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .base import Format, codes

MODE = "lloyd"
BITS, GROUP_SIZES = (2, 3, 4), (256, 128, 64)


class Lloyd(Format):
    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(MODE, bits, group_size, ("codebooks",), "lloyd.h")

    def beside_columns(self, columns: int) -> int:
        return columns // self.group_size * 2**self.bits

    def beside_dtype(self) -> mx.Dtype:
        return mx.float16

    def metal(self, element: str) -> str:
        return f"LloydWeights<{self.bits}, {self.group_size}, {element}>"

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        words, books = parts
        lead, groups = words.shape[:-1], columns // self.group_size
        chosen = codes(words, self.bits, columns).astype(mx.uint32).reshape(*lead, groups, self.group_size)
        levels = books.astype(mx.float32).reshape(*lead, groups, 2**self.bits)
        return mx.take_along_axis(levels, chosen, axis=-1).reshape(*lead, columns)


MAKE = Lloyd
