"""What a budget asks for: bytes of all weight files together, or bits a weight, as flags and policies write it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import RotorError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
BITS = (1.0, 16.0)  # no plan is outside


@dataclass(frozen=True)
class Budget:
    """Exactly one of `nbytes` and `bits_per_weight` is given. Both mean whole files, headers included."""

    nbytes: int | None = None
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        if (self.nbytes is None) == (self.bits_per_weight is None):
            raise RotorError("a budget is either a size or bits a weight")
        if self.bits_per_weight is not None and not BITS[0] <= self.bits_per_weight <= BITS[1]:
            raise RotorError(f"{self.bits_per_weight:g} bits a weight is not between {BITS[0]:g} and {BITS[1]:g}")

    def bytes_for(self, parameters: int) -> int:
        """The size it allows a model of so many weights."""
        if self.bits_per_weight is None:
            assert self.nbytes is not None
            return self.nbytes
        return int(self.bits_per_weight * parameters / 8)


def parse_size(text: str) -> int:
    """`86.2 GB` (1e9 bytes each), `80GiB` (2**30), `500MB`, a plain number -> bytes.

    Raises:
        RotorError: not a size, or less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size < 1:
        raise RotorError(f"{text!r} is not a size such as 86.2GB, 500MB or 80GiB")
    return size


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
