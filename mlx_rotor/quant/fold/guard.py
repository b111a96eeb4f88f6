"""Experts whose intermediate values are more than float16 holds, by what calibration saw, and what brings them back.

Some of MiniMax-M2's are: they turn to NaN in readers that compute in float16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import mlx.core as mx

from ...errors import RotorError
from ..guide import Statistics
from ..plan import Entry
from .folds import DownFold

FLOAT16 = 65504.0
# A rescaled expert has this much room beyond what the calibration text showed.
HEADROOM = 4.0


@runtime_checkable
class Peaks(Protocol):
    """Statistics that know the largest input, too."""

    def peak(self, entry: Entry, part: int) -> float | None:
        """Largest magnitude among the inputs of an entry's part; None if it saw none."""


@dataclass(frozen=True)
class Oversized:
    """An expert whose down projection takes values of `peak`, and the power of two that brings them back."""

    module: str
    expert: int
    peak: float

    @property
    def factor(self) -> float:
        return 2.0 ** math.ceil(math.log2(self.peak * HEADROOM / FLOAT16))


def oversized(fold: DownFold, statistics: Statistics) -> list[Oversized]:
    """The experts whose down projection met values above float16's range.

    Raises:
        RotorError: statistics that don't know the largest values, such as an imatrix.
    """
    if not isinstance(statistics, Peaks):
        raise RotorError(
            "these statistics don't have the largest inputs, which finding overflows takes: use --calibration"
        )
    found = []
    for part in range(fold.down.parts):
        peak = statistics.peak(fold.down, part)
        if peak is not None and peak > FLOAT16:
            found.append(Oversized(fold.down.module, part, peak))
    return found


def rescaling(fold: DownFold, found: Sequence[Oversized]) -> dict[int, mx.array]:
    """Expert -> factors for `DownFold.scales` that bring it back into float16's range, exactly."""
    return {o.expert: mx.full((fold.down.shape[-1],), o.factor) for o in found}
