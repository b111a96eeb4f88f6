"""What a weight format is: codes of `bits` bits in MLX's packing, and arrays beside them, by rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ...errors import RotorError
from ...kernels.spec import DTYPES, Struct

BLOCK = 32  # weights, whose codes fill whole words at any bits
DTYPE_NAMES = {mx.uint32: "U32", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32"}


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a weight: `kind` is its name behind the module's path."""

    kind: str
    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Format(ABC):
    """A format with its parameters. Codes are MLX's packing: a little-endian bit stream along K, in uint32 words.

    Attributes:
        mode: the name config.json says it by, beside bits and group_size.
        bits: of a code; group_size: weights that share what stands beside the codes.
        beside: names of the arrays beside the codes, in the order kernels take them.
        header: the file below kernels_metal/weight that defines its Metal type.
    """

    mode: str
    bits: int
    group_size: int
    beside: tuple[str, ...]
    header: str

    @abstractmethod
    def beside_columns(self, columns: int) -> int:
        """How many numbers of each array beside the codes a row of `columns` weights has."""

    @abstractmethod
    def beside_dtype(self) -> mx.Dtype:
        """What the arrays beside the codes are stored in."""

    @abstractmethod
    def metal(self, element: str) -> str:
        """The Metal type's name, with arrays beside the codes of Metal type `element`."""

    @abstractmethod
    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        """float32 [.., N, columns] of (codes, *beside) of any float dtype; lazy."""

    def divides(self, columns: int) -> bool:
        """Whether rows of `columns` weights have such a form: whole groups, and whole blocks."""
        return columns % self.group_size == 0 and columns % BLOCK == 0

    def check(self, columns: int) -> None:
        """Raises RotorError where rows of `columns` weights have no such form."""
        if columns % self.group_size:
            raise RotorError(f"{self.mode} in groups of {self.group_size} does not divide rows of {columns} weights")
        if not self.divides(columns):
            raise RotorError(f"{self.mode} packs rows in blocks of {BLOCK}, of which {columns} weights are no multiple")

    def tensors(self, lead: tuple[int, ...], columns: int) -> tuple[Tensor, ...]:
        """The stored tensors of weights [*lead, columns]. Raises as `check`."""
        self.check(columns)
        codes = Tensor("weight", mx.uint32, (*lead, columns * self.bits // 32))
        shape = (*lead, self.beside_columns(columns))
        return codes, *(Tensor(name, self.beside_dtype(), shape) for name in self.beside)

    def struct(self, dtype: mx.Dtype) -> Struct:
        if dtype not in DTYPES:
            raise RotorError(f"{self.mode}: kernels read float16, bfloat16 or float32 beside codes, not {dtype}")
        return Struct(f"weight/{self.header}", self.metal(DTYPES[dtype]))

    @property
    def bits_per_weight(self) -> float:
        """With what stands beside the codes."""
        of = self.beside_columns(self.group_size) * 8 * self.beside_dtype().size
        return self.bits + len(self.beside) * of / self.group_size


def codes(words: mx.array, bits: int, columns: int) -> mx.array:
    """Whole numbers, float32 [.., columns], of codes [.., columns · bits / 32] in MLX's packing."""
    group = next(g for g in (128, 64, 32) if columns % g == 0)
    ones = mx.ones((*words.shape[:-1], columns // group), mx.float32)
    return mx.dequantize(words, ones, mx.zeros_like(ones), group, bits)
