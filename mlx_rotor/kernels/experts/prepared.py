"""Launches for few rows, planned once for inputs of one shape and dtype: later calls only hand over arrays.

A layer makes the same launches for every token, and Python must finish all layers while the GPU does one token. A plan
also says how a launch shares out packed weights: lanes to a row, rows to a simdgroup, simdgroups to a threadgroup.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ...errors import RotorError
from .. import metal
from ..spec import DTYPES, PackedWeight

BLOCK, BLOCK_FLOATS = 32, 36  # weights that a lane takes at a time; MLX_ROTOR_BLOCK
ROOM = 32 * 1024  # bytes of a threadgroup
DIRECT = (1, 2, 4, 8)  # bits of codes that are not staged
MOST_SETS = 16


@dataclass(frozen=True)
class Side:
    """Threadgroup memory that a format's weights take: bits of a code, floats staged for 1024 weights, bytes of a
    simdgroup's tables."""

    bits: int
    beside: int
    tables: int

    def bytes(self, rows: int, columns: int) -> int:
        """Bytes of a simdgroup, at most."""
        words = 0 if self.bits in DIRECT else columns * self.bits // 32
        return 4 * rows * (words + columns * self.beside // 1024) + self.tables


@dataclass(frozen=True)
class Geometry:
    """So many lanes share a row; a simdgroup does `sets` sets of 32 / lanes rows, one after another, `panel` columns at
    a time; `simds` simdgroups are a threadgroup."""

    lanes: int
    panel: int
    simds: int
    sets: int

    @property
    def numbers(self) -> str:
        """The template arguments PANEL, LANES, SIMDS, SETS."""
        return f"{self.panel}, {self.lanes}, {self.simds}, {self.sets}"

    @property
    def threads(self) -> int:
        return 32 * self.simds

    def tiles(self, rows: int) -> int:
        """Threadgroups for so many rows."""
        return -(-rows // (self.simds * self.sets * (32 // self.lanes)))


def side(w: PackedWeight) -> Side:
    beside = sum(part.shape[-1] for part in w.parts[1:]) * 1024 // w.columns
    bits, group, tables = w.format.bits, w.format.group_size, 0
    if w.format.mode == "lloyd" and w.parts[1].dtype == mx.float16 and 4 * 4**bits <= group:
        tables = 1024 // group * 4 * 4**bits  # LloydWeights::PAIRED
    return Side(bits, beside, tables)


@cache
def geometry(rows: int, columns: int, sides: Sequence[Side], staged_rows: int, together: int) -> Geometry:
    """For matrices of [rows, columns], all `sides` at once.

    Args:
        staged_rows: rows of x that are staged at a time.
        together: rows of the matrices that a threadgroup should make: x is read once for all of them.

    Raises:
        RotorError: where not even a small panel of columns fits a threadgroup's memory.
    """
    panels = [columns, *(panel for panel in (4096, 3072, 2048, 1024, 512, 256) if panel < columns)]
    for panel in panels:
        lanes = _lanes(panel)
        for simds in (16, 8, 4):
            each = sum(one.bytes(32 // lanes, panel) for one in sides)
            spare = 8 * simds  # a word of each array that is not staged
            if 4 * panel // BLOCK * BLOCK_FLOATS * staged_rows + simds * each + spare > ROOM:
                continue
            if simds < 8 and panel > 1024:
                break  # rather fewer columns at a time
            per_set = simds * (32 // lanes)
            sets = max(1, min(MOST_SETS, lanes, together // per_set, -(-rows // per_set)))
            return Geometry(lanes, panel, simds, sets)
    raise RotorError(f"{staged_rows} rows of {columns} columns do not fit the memory of a threadgroup in any piece")


def _lanes(columns: int) -> int:
    """Lanes to a row: the most that leave no more than an eighth of them idle, or else the fewest."""
    blocks = columns // BLOCK
    return next((n for n in (32, 16, 8) if -(-blocks // n) * n * 7 <= blocks * 8), 4)


def check(name: str, x: mx.array, w: PackedWeight, dims: int) -> None:
    """Raises RotorError where kernels for few rows do not take x [.., K] with w, a stack (dims 3) or a matrix (2)."""
    if w.parts[0].ndim != dims:
        raise RotorError(f"{name}: packed weights of shape {list(w.parts[0].shape)} need {dims} dimensions here")
    if x.shape[-1] != w.columns:
        raise RotorError(f"{name}: x of shape {list(x.shape)} does not fit weights of {w.columns} columns")
    if x.dtype not in DTYPES:
        raise RotorError(f"{name}: kernels take float16, bfloat16 and float32, not {x.dtype}; cast x")
    if max(part.size for part in w.parts) >= 2**32:
        raise RotorError(
            f"{name}: kernels count elements in 32 bits, and {w.parts[0].size} codes are too many; split them"
        )
    if w.columns % BLOCK:
        raise RotorError(f"{name}: kernels take rows of a multiple of {BLOCK} weights, not {w.columns}")


Made = Callable[..., list[mx.array]]


class Launch:
    """A kernel with its weights, grid and result. Call it with the arrays that come before the weights."""

    __slots__ = ("_era", "_how", "_made", "_short", "_weights")

    def __init__(
        self,
        made: Made,
        weights: Sequence[PackedWeight],
        shape: tuple[int, ...],
        dtype: mx.Dtype,
        grid: tuple[int, int, int],
        threads: int,
    ) -> None:
        """`shape` and `dtype`: of the result; `grid`: in threads, as MLX has it; `threads`: of a threadgroup."""
        self._era = _era()
        self._made = made
        self._weights = [array for w in weights for array in arrays_of(w)]
        self._short = any(array.size < 8 for array in self._weights)
        self._how = {
            "output_shapes": [shape],
            "output_dtypes": [dtype],
            "grid": grid,
            "threadgroup": (threads, 1, 1),
        }

    def __call__(self, *arrays: mx.array) -> mx.array:
        weights = [roomy(array) for array in self._weights] if self._short else self._weights
        (out,) = self._made(inputs=[*arrays, *weights], **self._how)
        return out

    def stale(self) -> bool:
        """Whether something else makes the kernels by now than when this was planned."""
        return self._era is not _era()


class PairLaunch(Launch):
    """A launch with two packed weights. The first one keeps it, and it is good as long as the second is `other`."""

    __slots__ = ("other",)
    other: PackedWeight


def arrays_of(w: PackedWeight) -> list[mx.array]:
    return [*w.parts] if w.bias is None else [*w.parts, w.bias]


def names_of(prefix: str, w: PackedWeight) -> list[str]:
    """The kernel's names of `arrays_of`."""
    names = [f"{prefix}{name}" for name in ("codes", "first", "second")[: len(w.parts)]]
    return names if w.bias is None else [*names, f"{prefix}bias"]


def roomy(array: mx.array) -> mx.array:
    """Longer where it has fewer than eight elements, which MLX would pass in constant memory."""
    return array if array.size >= 8 else mx.pad(array.flatten(), (0, 8 - array.size))


def pointer(names: Sequence[str], name: str, instead: str) -> str:
    """An argument of the call line: the input, or something to stand for it where there is none."""
    return name if name in names else instead


@metal.kept
def _era() -> object:
    """An object that is another one once something else makes the kernels."""
    return object()
