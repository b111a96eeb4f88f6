"""The solver against every selection there is."""

import itertools
import random

import pytest

from mlx_rotor.calibration.allotment import Option, allot
from mlx_rotor.errors import RotorError


def brute(groups, room):
    fits = [s for s in itertools.product(*groups) if sum(o.size for o in s) <= room]
    return min(sum(o.cost for o in s) for s in fits)


@pytest.mark.parametrize("seed", range(60))
def test_nothing_is_better(seed):
    rng = random.Random(seed)
    unit, convex = rng.choice([1, 8, 272]), rng.random() < 0.5
    groups = []
    for g in range(rng.randint(1, 5)):
        sizes = [rng.randint(1, 9) * unit + 16 for _ in range(rng.randint(1, 5))]
        costs = [rng.random() ** 3 / (s if convex else 1) for s in sizes]
        groups.append([Option((g, i), s, c) for i, (s, c) in enumerate(zip(sizes, costs, strict=True))])
    low = sum(min(o.size for o in g) for g in groups)
    high = sum(max(o.size for o in g) for g in groups)
    for room in (low, (low + high) // 2, high, 2 * high):
        found = allot(groups, room)
        assert [o.choice[0] for o in found] == list(range(len(groups)))
        assert sum(o.size for o in found) <= room
        assert sum(o.cost for o in found) == pytest.approx(brute(groups, room), rel=1e-12)


def test_a_case_where_the_best_gain_a_bit_first_is_wrong():
    a = [Option("a0", 0, 10.0), Option("a1", 1, 4.0)]
    b = [Option("b0", 0, 10.0), Option("b2", 2, 1.0)]
    assert [o.choice for o in allot([a, b], 2)] == ["a0", "b2"]


def test_nothing_is_spent_for_nothing():
    group = [Option("small", 1, 1.0), Option("large", 5, 1.0)]
    assert [o.choice for o in allot([group, group], 10)] == ["small", "small"]


def test_too_little_room():
    with pytest.raises(RotorError, match="the smallest options take 6, more than 5"):
        allot([[Option("x", 3, 1.0)], [Option("y", 3, 1.0)]], 5)
