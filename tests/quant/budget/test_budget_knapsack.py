"""The knapsack against a dynamic program that looks at every size, and on instances as large as real ones."""

from __future__ import annotations

import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grids import thinned
from mlx_rotor.quant.budget import knapsack
from mlx_rotor.quant.budget.knapsack import Infeasible, Option, choose

options = st.lists(st.builds(Option, st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=5)


def totals(groups, taken):
    chosen = [group[i] for group, i in zip(groups, taken, strict=True)]
    return sum(o.size for o in chosen), math.fsum(o.cost for o in chosen)


def exact(groups, room):
    """Least cost, by a dynamic program over every size up to `room` above the least."""
    least = [min(o.size for o in group) for group in groups]
    unit = math.gcd(*(o.size - low for group, low in zip(groups, least, strict=True) for o in group)) or 1
    steps = (room - sum(least)) // unit
    best = np.zeros(steps + 1)
    for group, low in zip(groups, least, strict=True):
        totals = np.full((len(group), steps + 1), np.inf)
        for i, option in enumerate(group):
            at = (option.size - low) // unit
            if at <= steps:
                totals[i, at:] = best[: steps + 1 - at] + option.cost
        best = totals.min(axis=0)
    return float(best.min())


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(options, min_size=1, max_size=8), room=st.integers(0, 500))
def test_the_best_selection_is_found(groups, room):
    least = sum(min(o.size for o in group) for group in groups)
    if least > room:
        with pytest.raises(Infeasible) as caught:
            choose(groups, room)
        assert caught.value.least == least
        return
    size, cost = totals(groups, choose(groups, room))
    assert size <= room
    assert cost == pytest.approx(exact(groups, room), rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(groups=st.lists(options, min_size=2, max_size=4), room=st.integers(10, 240))
def test_every_selection_costs_at_least_as_much(groups, room):
    fitting = [p for p in itertools.product(*(range(len(g)) for g in groups)) if totals(groups, p)[0] <= room]
    if fitting:
        best = min(totals(groups, p)[1] for p in fitting)
        assert totals(groups, choose(groups, room))[1] == pytest.approx(best, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_better_than_what_is_chosen_for_the_layers_of_a_cache(seed):
    """Few large sizes a layer, costs as uneven as measured divergences are: against every selection there is."""
    rng = random.Random(seed)
    unit, convex = rng.choice([1, 8, 272]), rng.random() < 0.5
    groups = []
    for _ in range(rng.randint(1, 5)):
        sizes = [rng.randint(1, 9) * unit + 16 for _ in range(rng.randint(1, 5))]
        groups.append([Option(s, rng.random() ** 3 / (s if convex else 1)) for s in sizes])
    low, high = (sum(end(o.size for o in g) for g in groups) for end in (min, max))
    selections = [totals(groups, p) for p in itertools.product(*(range(len(g)) for g in groups))]
    for room in (low, (low + high) // 2, high, 2 * high):
        size, cost = totals(groups, choose(groups, room))
        assert size <= room
        assert cost == pytest.approx(min(c for s, c in selections if s <= room), rel=1e-12)


def test_a_case_where_the_best_gain_a_unit_first_is_wrong():
    assert choose([[Option(0, 10.0), Option(1, 4.0)], [Option(0, 10.0), Option(2, 1.0)]], 2) == [0, 1]


def test_nothing_is_spent_for_nothing():
    group = [Option(1, 1.0), Option(5, 1.0)]
    assert choose([group, group], 10) == [0, 0]


def instance(seed, stacks, alike):
    """Stacks, and small matrices beside them, with the sizes and errors of 2 to 8 bits."""
    rng = random.Random(seed)
    groups = []
    for n in range(stacks):
        weights = rng.choice([1_207_959_552, 18_874_368, 3_145_728])
        scale = 1.0 if alike else rng.lognormvariate(0, 0.8)
        group = []
        for bits, size in itertools.product((2, 3, 4, 5, 6, 8), (128, 64)):
            cost = scale * 4.0 ** (2 - bits) * (0.11 if size == 128 else 0.1) * (1 if alike else rng.uniform(0.8, 1.2))
            group.append(Option(weights // 8 * bits + weights // size * 4 + (0 if alike else n % 7), cost))
        groups.append(group)
    return groups


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("seed", thinned(range(2), 2))
def test_near_the_relaxation_at_the_size_of_a_real_model(seed, alike):
    groups = instance(seed, 430, alike)
    least, most = (sum(f(o.size for o in g) for g in groups) for f in (min, max))
    for share in (0.02, 0.2, 0.5, 0.9):
        room = int(least + share * (most - least))
        started = time.process_time()
        size, cost = totals(groups, choose(groups, room))
        assert time.process_time() - started < 5
        assert 0.999 * room <= size <= room
        assert cost <= 1.005 * bound(groups, room)  # of which whole stacks alone explain most


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("cells", [None, 1000])
def test_within_a_thousandth_of_the_optimum(alike, cells, monkeypatch):
    """Also where the problem is taken to be too large to be solved exactly."""
    if cells:
        monkeypatch.setattr(knapsack, "CELLS", cells)
        monkeypatch.setattr(knapsack, "STEPS", 3000)
    rng = random.Random(5)
    groups = []
    for _ in range(60):
        scale = 1.0 if alike else rng.lognormvariate(0, 0.8)
        weights = rng.choice([64, 8])
        groups.append(
            [Option(weights * (32 * b + extra) // 8, scale * 4.0**-b) for b in (2, 3, 4, 6) for extra in (8, 16)]
        )
    least, most = (sum(f(o.size for o in g) for g in groups) for f in (min, max))
    for share in (0.1, 0.4, 0.8):
        room = int(least + share * (most - least))
        size, cost = totals(groups, choose(groups, room))
        assert size <= room and cost <= 1.001 * exact(groups, room)


def bound(groups, room):
    """No selection that fits costs less: the best Lagrangian relaxation, by golden section over the price of a unit."""

    def relaxed(price):
        return math.fsum(min(o.cost + price * o.size for o in group) for group in groups) - price * room

    low, high = 0.0, 1e-7
    for _ in range(120):
        a, b = low + 0.382 * (high - low), low + 0.618 * (high - low)
        low, high = (a, high) if relaxed(a) < relaxed(b) else (low, b)
    return relaxed((low + high) / 2)


def test_the_smallest_room_and_one_with_everything():
    groups = instance(0, 20, False)
    least = sum(min(o.size for o in g) for g in groups)
    assert totals(groups, choose(groups, least))[0] == least
    with pytest.raises(Infeasible):
        choose(groups, least - 1)
    assert totals(groups, choose(groups, 10**15))[1] == pytest.approx(sum(min(o.cost for o in g) for g in groups))
