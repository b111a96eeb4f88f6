"""A spec: how one weight is stored, in config.json's words, in MLX's modes and our own formats. And a budget's size.

A budget is bytes of all weight files together, or bits a weight, as flags and policies write it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RotorError
from ..experts import formats
from ..memory.sizes import parse_size

AFFINE = formats.kind(formats.MLX)
BITS = tuple(b for b in AFFINE.all_bits if b not in AFFINE.read_only)  # of mode affine
GROUP_SIZES = tuple(sorted(AFFINE.group_sizes))
FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # modes whose bits and group size are MLX's own
OURS = tuple(formats.ours())  # what MLX doesn't have
MODES = ("affine", *FIXED, *OURS)


def sizes(mode: str) -> tuple[int, ...]:
    """Group sizes of a mode, the usual one of our own formats first."""
    if mode in OURS:
        return formats.known(mode)[1]
    return (FIXED[mode][1],) if mode in FIXED else GROUP_SIZES


def bits_of(mode: str) -> tuple[int, ...]:
    """Bits that a mode's codes may have, of those a fit makes."""
    if mode in OURS:
        return formats.known(mode)[0]
    return (FIXED[mode][0],) if mode in FIXED else BITS


@dataclass(frozen=True)
class Spec:
    """How a weight is stored: bits a code, weights a group, and the quantization mode.

    A group has one bf16 scale and bias in mode affine, one 8-bit scale in MLX's others, and in ours what the format
    says (`mlx_rotor.experts.formats`).
    """

    bits: int
    group_size: int = 64
    mode: str = "affine"

    def __post_init__(self) -> None:
        one_of("mode", self.mode, MODES)
        one_of("bits", self.bits, bits_of(self.mode))
        one_of("group_size", self.group_size, sizes(self.mode))

    @property
    def format(self) -> formats.Format | None:
        """The format, where it is one that MLX doesn't have."""
        return formats.get(self.mode, self.bits, self.group_size) if self.mode in OURS else None

    @property
    def short(self) -> str:
        """`3b g128`, and the mode where it isn't affine."""
        return f"{self.bits}b g{self.group_size}" + ("" if self.mode == "affine" else f" {self.mode}")

    def divides(self, columns: int) -> bool:
        """Whether rows of so many weights can be stored so."""
        return columns % self.group_size == 0 if self.format is None else self.format.divides(columns)

    def as_config(self) -> dict[str, int | str]:
        """The form MLX readers expect in config.json."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def one_of(what: str, value: Any, known: tuple[Any, ...]) -> None:
    """RotorError unless `value` is one of `known`, which it lists."""
    if isinstance(value, bool) or value not in known:
        raise RotorError(f"{what} = {value!r} is not supported; {what} can be {', '.join(map(str, known))}")


BUNDLED = "bundled"  # the calibration text of this package
FOLDINGS = ("norms", "downs")  # where scale folding can be done
TARGET_BITS = (1.0, 16.0)  # no plan is outside


@dataclass(frozen=True)
class Budget:
    """Exactly one of `nbytes` and `bits_per_weight` is given. Both mean whole files, headers included."""

    nbytes: int | None = None
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.nbytes is None) == (self.bits_per_weight is None):
            raise RotorError("a budget is either a size or bits a weight")
        if self.bits_per_weight is not None and not TARGET_BITS[0] <= self.bits_per_weight <= TARGET_BITS[1]:
            raise RotorError(
                f"{self.bits_per_weight:g} bits a weight is not between {TARGET_BITS[0]:g} and {TARGET_BITS[1]:g}"
            )

    def bytes_for(self, parameters: int) -> int:
        """The size it allows a model of so many weights."""
        if self.bits_per_weight is None:
            assert self.nbytes is not None
            return self.nbytes
        return int(self.bits_per_weight * parameters / 8)


def parse_table(table: Any) -> Budget:
    """A policy's [budget]: `size = "86.2 GB"` or `bits_per_weight = 3.25`. RotorError names what is wrong."""
    keys = {"size", "bits_per_weight"}
    if not isinstance(table, dict) or len(table) != 1 or not keys >= table.keys():
        raise RotorError('budget needs one of size = "86.2 GB" and bits_per_weight = 3.25')
    if "size" in table:
        if not isinstance(table["size"], str):
            raise RotorError(f'budget: size must be text such as "86.2 GB", found {table["size"]!r}')
        return Budget(nbytes=parse_size(table["size"]))
    bits = table["bits_per_weight"]
    if isinstance(bits, bool) or not isinstance(bits, (int, float)):
        raise RotorError(f"budget: bits_per_weight must be a number, found {bits!r}")
    return Budget(bits_per_weight=float(bits))
