"""The interface of a weight format: codes of `bits` bits in MLX's packing, arrays beside them, and a fit.

Weights are [.., K]; everything is by rows, so that what shards rows or whole groups of columns shards all arrays alike.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import ClassVar

import mlx.core as mx

from ...errors import RotorError
from ...fit import FITS
from ...fit.feedback import Grid
from ...fit.rows import HALF_MAX, check_not_empty, largest_of
from ...fit.scaled import Effort, Levels, ScaledGrid, fit_scaled
from ...kernels.spec import DTYPES, Struct

BLOCK = 32  # weights, whose codes fill whole words at any bits
DTYPE_NAMES = {mx.uint32: "U32", mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32"}

# (codes, *beside), columns K, bits, group size -> float32 [.., K]
Decoder = Callable[[Sequence[mx.array], int, int, int], mx.array]
Errors = Mapping[tuple[int, int], tuple[float, float, float]]  # (bits, group size) -> of each of FITS
Efforts = Mapping[str, Effort | None]  # of each of FITS; None: no search


@dataclass(frozen=True)
class Tensor:
    """One stored tensor of a weight: `kind` is its name behind the module's path."""

    kind: str
    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Format(ABC):
    """A weight format with its parameters. Codes are a little-endian bit stream along K, in uint32 words.

    A subclass states the class attributes and implements `metal`, `fitted` and `grid`. Its `decoder` is a function of
    its file that uses nothing but mx, `codes` and plain constants of that file: its source goes into the file that
    checkpoints carry for mlx_lm alone (`experts.standalone`).

    Attributes:
        bits: of a code.
        group_size: weights that share what stands beside the codes.
        mode: the format's name in config.json.
        all_bits: bits that a code may have.
        group_sizes: possible group sizes, the usual one first.
        beside: names of the arrays beside the codes, in the order kernels take them.
        beside_dtype: what those arrays are stored in.
        header: the file below kernels_metal/weight that defines the format's Metal type.
        decoder: the decoding function.
        errors: (bits, group size) -> squared error over squared length of normal weights under each of FITS, as
            `python -c "from mlx_rotor.quant.fit import print_errors; print_errors()"` prints them.
        read_only: bits without a fit, which only checkpoints of others have.
        note: what a reader of the errors must know; empty for most.
    """

    bits: int
    group_size: int

    mode: ClassVar[str]
    all_bits: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...]]
    beside: ClassVar[tuple[str, ...]]
    beside_dtype: ClassVar[mx.Dtype]
    header: ClassVar[str]
    decoder: ClassVar[staticmethod[[Sequence[mx.array], int, int, int], mx.array]]
    errors: ClassVar[Errors]
    read_only: ClassVar[tuple[int, ...]] = ()
    note: ClassVar[str] = ""

    @abstractmethod
    def metal(self, element: str) -> str:
        """The Metal type's name, with arrays beside the codes of Metal type `element`."""

    @abstractmethod
    def fitted(self, w: mx.array, method: str, importance: mx.array | None) -> tuple[mx.array, ...]:
        """What is stored of weights [.., K] that `check_weights` lets pass; see `fit`."""

    @abstractmethod
    def grid(self, method: str) -> Grid:
        """The grid of a group for error feedback. `method`: `search` or `best`."""

    @property
    def per_group(self) -> int:
        """Numbers of each array beside the codes that a group has."""
        return 1

    @property
    def most(self) -> float:
        """The largest weight, of either sign, that the format holds."""
        return HALF_MAX

    def fit(self, w: mx.array, method: str = "search", importance: mx.array | None = None) -> tuple[mx.array, ...]:
        """Weights [.., K] of any floating dtype, finite, as (codes uint32 [.., K*bits/32], *beside). Evaluates them.

        `fast` looks at the weights alone; `search` and `best` minimise sum(importance * (w - decoded)**2) of each
        group. `importance` >= 0 broadcasts to w: [K], or [E, 1, K] for experts.

        Raises:
            RotorError: an unknown method; weights or an importance of shapes that don't go with the format; a weight
                beyond `most`.
        """
        if method not in FITS:
            raise RotorError(f"unknown fit {method!r}; fits: {', '.join(FITS)}")
        self.check_weights(w)
        return self.fitted(w, method, None if method == "fast" else importance)

    def error(self, method: str = "search") -> float:
        """Squared error over squared length of normal weights under a fit; RotorError where there is no such fit."""
        if method not in FITS:
            raise RotorError(f"unknown fit {method!r}; fits: {', '.join(FITS)}")
        return self.errors[self.bits, self.group_size][FITS.index(method)]

    def decode(self, parts: Sequence[mx.array], columns: int) -> mx.array:
        """float32 [.., N, columns] of (codes, *beside) of any float dtype; lazy."""
        return type(self).decoder(parts, columns, self.bits, self.group_size)

    def divides(self, columns: int) -> bool:
        """Whether rows of `columns` weights are whole groups and whole blocks."""
        return columns % self.group_size == 0 and columns % BLOCK == 0

    def check(self, columns: int) -> None:
        """Raises RotorError where rows of `columns` weights can't be stored in this format."""
        if columns % self.group_size:
            raise RotorError(f"{self.mode} in groups of {self.group_size} does not divide rows of {columns} weights")
        if not self.divides(columns):
            raise RotorError(f"{self.mode} packs rows in blocks of {BLOCK}, of which {columns} weights are no multiple")

    def check_weights(self, w: mx.array) -> None:
        """Raises RotorError where weights [.., K] can't be stored in this format: none, rows that are no whole groups,
        or a weight beyond `most`."""
        check_not_empty(w)
        self.check(w.shape[-1])
        largest = largest_of(w)
        if largest > self.most:
            raise RotorError(f"{self.mode} holds {self.most:g} at most, a weight is {largest:.4g}: use another mode")

    def beside_columns(self, columns: int) -> int:
        """Numbers of each array beside the codes that a row of `columns` weights has."""
        return columns // self.group_size * self.per_group

    def tensors(self, lead: tuple[int, ...], columns: int) -> tuple[Tensor, ...]:
        """The stored tensors of weights [*lead, columns]. Raises as `check`."""
        self.check(columns)
        codes = Tensor("weight", mx.uint32, (*lead, columns * self.bits // 32))
        shape = (*lead, self.beside_columns(columns))
        return codes, *(Tensor(name, self.beside_dtype, shape) for name in self.beside)

    def struct(self, dtype: mx.Dtype) -> Struct:
        """The Metal type with arrays beside the codes of `dtype`."""
        if dtype not in DTYPES:
            raise RotorError(f"{self.mode}: kernels read float16, bfloat16 or float32 beside codes, not {dtype}")
        return Struct(f"weight/{self.header}", self.metal(DTYPES[dtype]))

    @property
    def bits_per_weight(self) -> float:
        """Bits of the codes and of what stands beside them."""
        return self.bits + len(self.beside) * self.per_group * 8 * self.beside_dtype.size / self.group_size


class ScaledFormat(Format):
    """A format of one float16 scale a group times fixed levels; a subclass names the levels and the efforts."""

    levels: ClassVar[Levels]
    efforts: ClassVar[Efforts]

    beside = ("scales",)
    beside_dtype = mx.float16

    @property
    def most(self) -> float:
        return HALF_MAX * self.levels.most

    def fitted(self, w: mx.array, method: str, importance: mx.array | None) -> tuple[mx.array, ...]:
        return fit_scaled(w, self.levels, self.group_size, self.efforts[method], importance)

    def grid(self, method: str) -> Grid:
        return ScaledGrid(self.levels, self.efforts[method])


def codes(words: mx.array, bits: int) -> mx.array:
    """Whole numbers, float32 [.., n * 32 / bits], of codes uint32 [.., n] in MLX's packing."""
    columns = words.shape[-1] * 32 // bits
    group = next(g for g in (128, 64, 32) if columns % g == 0)
    ones = mx.ones((*words.shape[:-1], columns // group), mx.float32)
    return mx.dequantize(words, ones, mx.zeros_like(ones), group, bits)


SHARED = {"mx", "codes", "Sequence"}  # names that a decoder finds wherever its source is put


def constants(decoder: Decoder) -> dict[str, float | tuple[float, ...]]:
    """The constants of its file that a decoder uses, by name.

    Raises:
        RotorError: it uses a name of its file that is no number or tuple of numbers.
    """
    outside = inspect.unwrap(decoder).__globals__
    found = {}
    for name in sorted(_names(decoder.__code__) & outside.keys() - SHARED):
        value = outside[name]
        if not all(isinstance(v, int | float) for v in (value if isinstance(value, tuple) else (value,))):
            raise RotorError(
                f"{decoder.__module__}: its decoder uses {name}, which is no plain number or tuple of numbers: the"
                " file that checkpoints carry can't hold it"
            )
        found[name] = value
    return found


def source(decoder: Decoder, mode: str) -> str:
    """A decoder as Python text that needs mx, `codes` and Sequence alone; it is called `decode_<mode>` there."""
    text = inspect.getsource(decoder)
    head = ""
    for name, value in constants(decoder).items():
        own = f"{mode.upper()}_{name.lstrip('_')}"
        head += f"{own} = {value!r}\n"
        text = re.sub(rf"\b{name}\b", own, text)
    text = re.sub(rf"\bdef {decoder.__name__}\b", f"def decode_{mode}", text)
    return f"{head}\n\n{text}" if head else text


def _names(code: CodeType) -> set[str]:
    """Names that a function looks up outside itself, in the functions inside it too."""
    inner = (_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)
