"""One option of each group, at the least total cost that fits a room: a multiple-choice knapsack for hundreds of groups
with sizes of gigabytes.

The linear relaxation gives a price for a byte and a bound. At that price all but a few options of most groups are worse
than any solution already known, so what is left is small enough to be solved exactly, or nearly so in coarser units.
See Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (1995).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

# Sums that the exact pass may compute, and steps of a coarse one: a second at most, and 50 MB.
CELLS = 60_000_000
STEPS = 50_000
ROUNDS = 3
# Of equal groups, how many are left open where all are too many: moves that better a solution need only a few.
OPEN = (32, 16, 8)


@dataclass(frozen=True)
class Option:
    """`size` in whole units, `cost` in any; both of one group's options only matter by comparison."""

    size: int
    cost: float


class Infeasible(Exception):
    """Not even the smallest options fit. `least`: what they take."""

    def __init__(self, least: int) -> None:
        super().__init__(f"the smallest options take {least}")
        self.least = least


@dataclass(frozen=True)
class _Step:
    """An edge of a group's lower convex hull, from one option to the next larger one. `rate`: cost saved a unit."""

    group: int
    option: int
    size: int
    saved: float

    @property
    def rate(self) -> float:
        return self.saved / self.size


def choose(groups: Sequence[Sequence[Option]], room: int) -> list[int]:
    """The number of the option taken of each group: sizes sum to `room` or less, costs to the least, or so near it that
    the difference is within rounding of sizes to 1 / STEPS of the room that the undecided groups share.

    Raises:
        Infeasible: the smallest options don't fit.
    """
    kept = [_worthwhile(group) for group in groups]
    least = sum(group[options[0]].size for group, options in zip(groups, kept, strict=True))
    if least > room:
        raise Infeasible(least)
    solver = _Solver(groups, kept, room)
    return solver.solve()


def _worthwhile(group: Sequence[Option]) -> list[int]:
    """Numbers of the options that no other one beats in both size and cost, by size."""
    out: list[int] = []
    for i in sorted(range(len(group)), key=lambda i: (group[i].size, group[i].cost)):
        if not out or group[i].cost < group[out[-1]].cost:
            out.append(i)
    return out


def _hull(group: Sequence[Option], options: Sequence[int]) -> list[int]:
    """Of options by size and falling cost, those on the lower convex hull."""
    out: list[int] = []
    for i in options:
        while len(out) > 1:
            a, b = group[out[-2]], group[out[-1]]
            rate = (a.cost - b.cost) * (group[i].size - a.size)
            if rate > (a.cost - group[i].cost) * (b.size - a.size):
                break
            out.pop()
        out.append(i)
    return out


class _Solver:
    def __init__(self, groups: Sequence[Sequence[Option]], kept: list[list[int]], room: int) -> None:
        self.groups, self.kept, self.room = groups, kept, room
        self.chosen = [options[0] for options in kept]
        self.price = self._greedy()
        self._fill()

    def solve(self) -> list[int]:
        for _ in range(ROUNDS):
            before = self.cost(self.chosen)
            every = _Open(self.groups, self._undecided(), self.room)
            if not every.numbers:
                break
            exact = every.cells <= CELLS
            if exact:
                self._take(every, every.unit)
            else:
                self._take(every, max(every.unit, -(-every.spare // STEPS)))
                self._polish()
            if exact or self.cost(self.chosen) >= before:
                break
        return self.chosen

    def _polish(self) -> None:
        """Solves exactly for a few groups of each kind, all others as they are: what rounding of sizes has missed."""
        for count in OPEN:
            undecided, seen = self._undecided(), Counter[tuple[Any, ...]]()
            for g, group in enumerate(self.groups):
                kind = (tuple(group), self.chosen[g])
                seen[kind] += 1
                if seen[kind] > count:
                    undecided[g] = [self.chosen[g]]
            few = _Open(self.groups, undecided, self.room)
            if few.numbers and few.cells <= CELLS:
                self._take(few, few.unit)
                return

    def size(self, chosen: Sequence[int]) -> int:
        return sum(group[i].size for group, i in zip(self.groups, chosen, strict=True))

    def cost(self, chosen: Sequence[int]) -> float:
        return math.fsum(group[i].cost for group, i in zip(self.groups, chosen, strict=True))

    def _greedy(self) -> float:
        """Takes hull edges by rate while they fit. Returns the rate of the first that didn't: the price of a unit."""
        steps: list[_Step] = []
        for g, (group, options) in enumerate(zip(self.groups, self.kept, strict=True)):
            hull = _hull(group, options)
            for a, b in pairwise(hull):
                steps.append(_Step(g, b, group[b].size - group[a].size, group[a].cost - group[b].cost))
        # Rates fall along a hull, so a group's edges come in order; sorting is stable where they are equal.
        steps.sort(key=lambda step: -step.rate)
        left, price, stopped = self.room - self.size(self.chosen), 0.0, set[int]()
        for step in steps:
            if step.group in stopped:
                continue
            if step.size <= left:
                left -= step.size
                self.chosen[step.group] = step.option
            else:
                price = price or step.rate
                stopped.add(step.group)
        return price

    def _fill(self) -> None:
        """Spends what is left on the single change that saves most, until none fits."""
        left = self.room - self.size(self.chosen)
        while True:
            best: tuple[float, int, int] | None = None
            for g, (group, options) in enumerate(zip(self.groups, self.kept, strict=True)):
                now = group[self.chosen[g]]
                for i in options:
                    saved = now.cost - group[i].cost
                    if group[i].size - now.size <= left and saved > 0 and (best is None or saved > best[0]):
                        best = (saved, g, i)
            if best is None:
                return
            _, g, i = best
            left -= self.groups[g][i].size - self.groups[g][self.chosen[g]].size
            self.chosen[g] = i

    def _undecided(self) -> list[list[int]]:
        """For each group the options that a better solution than the one known could have.

        With every unit priced, the total of the groups' best is a bound; an option that costs so much more than its
        group's best that the bound with it exceeds the known solution is in no better one.
        """
        priced = [
            [group[i].cost + self.price * group[i].size for i in options]
            for group, options in zip(self.groups, self.kept, strict=True)
        ]
        bound = math.fsum(min(costs) for costs in priced) - self.price * self.room
        known = self.cost(self.chosen)
        slack = known - bound + 1e-12 * abs(known)
        return [
            [i for i, c in zip(options, costs, strict=True) if c - min(costs) <= slack or i == taken]
            for options, costs, taken in zip(self.kept, priced, self.chosen, strict=True)
        ]

    def _take(self, undecided: _Open, unit: int) -> None:
        """Dynamic programming over the undecided groups, sizes rounded up to `unit`; takes what is better."""
        before, self.chosen = self.chosen, undecided.best(unit)
        self._fill()
        if self.cost(self.chosen) > self.cost(before):
            self.chosen = before


class _Open:
    """Groups by the options they are left with, and what the dynamic program over those with several is to do.

    `spare`: room beside everyone's smallest option, as far as it can be used. `unit`: what all sizes are multiples of.
    `cells`: sums it takes to solve exactly.
    """

    def __init__(self, groups: Sequence[Sequence[Option]], left: list[list[int]], room: int) -> None:
        self.left = left
        self.numbers = [g for g, options in enumerate(left) if len(options) > 1]
        fixed = sum(group[options[0]].size for group, options in zip(groups, left, strict=True))
        self.sizes = [[groups[g][i].size - groups[g][left[g][0]].size for i in left[g]] for g in self.numbers]
        self.costs = [[groups[g][i].cost for i in left[g]] for g in self.numbers]
        self.spare = min(room - fixed, sum(sizes[-1] for sizes in self.sizes))
        self.unit = math.gcd(*(size for sizes in self.sizes for size in sizes)) or 1
        self.cells = self.spare // self.unit * sum(len(sizes) for sizes in self.sizes)

    def best(self, unit: int) -> list[int]:
        """The option of every group."""
        taken = _fewest([[-(-size // unit) for size in sizes] for sizes in self.sizes], self.costs, self.spare // unit)
        found = [options[0] for options in self.left]
        for g, which in zip(self.numbers, taken, strict=True):
            found[g] = self.left[g][which]
        return found


def _fewest(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], steps: int) -> list[int]:
    """The option of each group (sizes from 0, in whole steps) of the least total cost in `steps` steps."""
    best = np.zeros(steps + 1)
    taken: list[np.ndarray] = []
    for group, prices in zip(sizes, costs, strict=True):
        now = np.full(steps + 1, np.inf)
        which = np.zeros(steps + 1, np.uint8)
        for i, (size, price) in enumerate(zip(group, prices, strict=True)):
            if size > steps:
                continue
            total = best[: steps + 1 - size] + price
            better = total < now[size:]
            now[size:][better] = total[better]
            which[size:][better] = i
        best = now
        taken.append(which)
    left = int(best.argmin())
    out = []
    for group, which in zip(reversed(sizes), reversed(taken), strict=True):
        i = int(which[left])
        out.append(i)
        left -= group[i]
    return out[::-1]
