"""Means, proportions and their standard errors. Numbers only: no model, no text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; `se` is None where one observation leaves it unknown."""

    value: float
    se: float | None

    def map(self, value: float, slope: float) -> Estimate:
        """The estimate of f(x), given f at this value and f's slope there (delta method)."""
        return Estimate(value, None if self.se is None else abs(slope) * self.se)


def clustered_mean(per_token: np.ndarray) -> Estimate:
    """Mean of `per_token` [windows, tokens] with the standard error between windows.

    Neighbouring tokens share their text, so that tokens are not independent draws; windows nearly are. The error is
    the standard deviation of the window means (n - 1) over the square root of their number.
    """
    means = np.asarray(per_token, dtype=np.float64).mean(axis=1)
    n = len(means)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else None)


@dataclass(frozen=True)
class Tally:
    """`right` of `of` trials of one kind, e.g. needles of one length and depth."""

    right: int
    of: int

    @property
    def rate(self) -> Estimate:
        """Share right. The error is the posterior's under a flat prior, so that 20 of 20 is not ± 0."""
        a, b = self.right + 1, self.of - self.right + 1
        return Estimate(self.right / self.of, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))

    def __str__(self) -> str:
        return f"{self.right}/{self.of}"


def total(tallies: Sequence[Tally]) -> Tally | None:
    """All trials together, None if there was none."""
    of = sum(t.of for t in tallies)
    return Tally(sum(t.right for t in tallies), of) if of else None
