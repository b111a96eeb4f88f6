"""Grids of test cases cover what they say, with few rows."""

from itertools import combinations, product

import pytest

from grids import covering, grid, pairwise, thinned

AXES = {"a": [1, 2, 3], "b": ["x", "y", "z"], "c": [True, False], "d": [None, 0.5]}


def test_every_two_values_meet_in_few_rows():
    rows = pairwise(**AXES)
    for one, other in combinations(range(4), 2):
        axes = list(AXES.values())
        assert {(row[one], row[other]) for row in rows} == set(product(axes[one], axes[other]))
    assert 9 <= len(rows) <= 11 < 36 and rows == pairwise(**AXES)


def test_each_value_once():
    rows = covering(AXES, 1)
    assert len(rows) == 3 and all({row[i] for row in rows} == set(range(len(a))) for i, a in enumerate(AXES.values()))


def test_a_grid_is_the_whole_product_and_marks_the_rest():
    mark = grid(1, **AXES)
    names, params = mark.args
    assert names == ("a", "b", "c", "d") and {p.values for p in params} == set(product(*AXES.values()))
    assert len(params) == 36 and sum(not p.marks for p in params) == 3
    assert all(p.marks in ((), pytest.mark.nightly) or p.marks[0].name == "nightly" for p in params)
    assert len({p.id for p in params}) == 36


def test_a_thinned_list_keeps_what_it_says():
    assert [p.values for p in thinned([1, 2, 3, 4, 5], 2) if not p.marks] == [(1,), (3,), (5,)]
    left_out, kept = thinned([("a", 1), ("b", 2)], [("b", 2)], spread=True)
    assert kept.values == ("b", 2) and not kept.marks
    assert left_out.values == ("a", 1) and left_out.marks[0].name == "nightly"
