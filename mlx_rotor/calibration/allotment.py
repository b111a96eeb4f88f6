"""The least total cost at a total size, one option from each group: a multiple-choice knapsack, solved exactly.

Numbers only: no codec, no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import RotorError


@dataclass(frozen=True)
class Option:
    """`size` in whole units, the same for every option; `cost` in any; `choice` is handed back."""

    choice: Any
    size: int
    cost: float


def allot(groups: Sequence[Sequence[Option]], room: int) -> list[Option]:
    """One option of each group, of the least summed cost among all selections whose sizes sum to `room` or less.

    Dynamic programming over sizes above each group's smallest, in units of their greatest common divisor. Of equal
    costs it gives one that is no larger than the others.

    Raises:
        RotorError: not even the smallest options fit.
    """
    least = [min(o.size for o in group) for group in groups]
    spare = room - sum(least)
    if spare < 0:
        raise RotorError(f"the smallest options take {sum(least)}, more than {room}")
    unit = math.gcd(*(o.size - low for group, low in zip(groups, least, strict=True) for o in group)) or 1
    most = sum(max(o.size for o in group) - low for group, low in zip(groups, least, strict=True))
    steps = min(spare, most) // unit
    # best[n]: the least cost of the groups so far in n units or fewer; taken[g][n]: group g's option in it.
    best = np.zeros(steps + 1)
    taken = []
    for group, low in zip(groups, least, strict=True):
        totals = np.full((len(group), steps + 1), np.inf)
        for i, option in enumerate(group):
            at = (option.size - low) // unit
            if at <= steps:
                totals[i, at:] = best[: steps + 1 - at] + option.cost
        taken.append(totals.argmin(axis=0))
        best = totals.min(axis=0)
    left = int(best.argmin())  # the first of equals, so nothing is spent for nothing
    chosen = []
    for group, low, which in zip(reversed(groups), reversed(least), reversed(taken), strict=True):
        option = group[which[left]]
        chosen.append(option)
        left -= (option.size - low) // unit
    return chosen[::-1]
