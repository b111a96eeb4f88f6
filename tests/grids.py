"""Grids of test cases: a few that cover all values or all pairs of them run always, the full product every night.

@grid(1, name=NAMES, dim=DIMS)      # each name and each dimension at least once
@grid(2, a=..., b=..., c=...)       # each pair of values of two axes at least once
@pytest.mark.parametrize("pair", thinned(PAIRS, 5))     # every fifth
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = tuple[int, ...]


def pairwise(**axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few rows, a value of each axis, in which every two values of different axes meet. The same on every call."""
    return [tuple(axis[i] for axis, i in zip(axes.values(), row, strict=True)) for row in covering(axes, 2)]


def covering(axes: dict[str, Sequence[Any]], strength: int) -> list[Row]:
    """Rows of indices in which every combination of `strength` values of different axes occurs.

    Each row is the one of the product that has most combinations still missing, the first of equal ones.
    """
    strength = min(strength, len(axes))
    rows = list(product(*(range(len(axis)) for axis in axes.values())))

    def combined(row: Row) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(row), strength))

    missing, found = {c for row in rows for c in combined(row)}, []
    while missing:
        found.append(max(rows, key=lambda row: len(combined(row) & missing)))
        missing -= combined(found[-1])
    return found


def grid(strength: int, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test with the product of `axes`: rows that aren't needed to cover `strength` axes are nightly."""
    usual = set(covering(axes, strength))
    params = []
    for row in product(*(range(len(axis)) for axis in axes.values())):
        values = [axis[i] for axis, i in zip(axes.values(), row, strict=True)]
        params.append(_param(values, row in usual, "-".join(map(_label, values))))
    return pytest.mark.parametrize(tuple(axes), params)


def thinned(values: Sequence[Any], usual: int | Collection[Any], *, spread: bool = False) -> list[Any]:
    """Parameters of one name, or tuples for several (`spread`): every `usual`-th, or those in `usual`, run always."""
    chosen = values[::usual] if isinstance(usual, int) else usual
    return [
        pytest.param(*(value if spread else [value]), marks=() if value in chosen else pytest.mark.nightly)
        for value in values
    ]


def _param(values: Sequence[Any], usual: bool, name: str) -> Any:
    return pytest.param(*values, id=name, marks=() if usual else pytest.mark.nightly)


def _label(value: Any) -> str:
    if isinstance(value, tuple):
        return "-".join(map(_label, value))
    return str(getattr(value, "order", value)).removeprefix("mlx.core.")
