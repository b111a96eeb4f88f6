"""Groups of weights stored as one float16 scale times fixed levels: the search for the scale by weighted least squares.

A format says which levels those are (`Levels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from .feedback import NO_CURVATURE, Stored, rounded
from .packing import pack
from .rows import by_chunks
from .search import LEAST, Groups, by_groups


class Levels(Protocol):
    """The fixed numbers around 0 that a format multiplies by a scale.

    Attributes:
        bits: of a code.
        most: the largest weight, of either sign, that a scale of 1 can hold.
    """

    bits: int
    most: float

    def nearest(self, x: mx.array) -> mx.array:
        """The level, float32, that is closest to each x, float32 of any shape."""

    def codes(self, levels: mx.array) -> mx.array:
        """uint32 codes of levels as `nearest` returns them."""

    def covering(self, low: mx.array, high: mx.array) -> tuple[mx.array, ...]:
        """Scales that reach from low <= 0 to high >= 0; the first is the one that needs no search."""


@dataclass(frozen=True)
class Effort:
    """How hard to look: factors on the scales that cover the group, and alternations of scale and codes from the
    best of them; `nudges`: factors on the scale tried with rounding."""

    factors: tuple[float, ...]
    alternations: int
    nudges: tuple[float, ...]


def fit_scaled(
    w: mx.array, levels: Levels, group_size: int, effort: Effort | None, importance: mx.array | None
) -> tuple[mx.array, ...]:
    """Weights [.., K], finite, as (codes uint32 [.., K*bits/32], scales float16 [.., K/group_size]).

    Without an effort the scale covers the group. With one, sum(importance * (w - decoded)**2) of a group is never more
    than without. Evaluates what it returns.

    Raises:
        RotorError: an importance that doesn't go with w.
    """

    def work(rows: mx.array, heeded: mx.array | None) -> tuple[mx.array, ...]:
        x = by_groups(rows.astype(mx.float32), group_size)
        seen = None if heeded is None or effort is None else by_groups(heeded, group_size)
        groups = Groups.of(x, seen, mx.float16)
        scale = scale_of(groups, levels, effort)
        codes = levels.codes(on_grid(groups.w, scale, levels))
        packed = pack(codes.transpose(1, 2, 0).reshape(rows.shape), levels.bits)
        return packed, (scale * groups.unit).astype(mx.float16)[0]

    return by_chunks(w, importance, work)


def scale_of(groups: Groups, levels: Levels, effort: Effort | None) -> mx.array:
    """Scales [1, *n] of groups, in their units, as they are stored."""
    low = mx.minimum(groups.w.min(axis=0, keepdims=True), 0)
    high = mx.maximum(groups.w.max(axis=0, keepdims=True), 0)
    covering = levels.covering(low, high)
    if effort is None:
        return groups.stored(covering[0])
    gain = scale = mx.zeros_like(low)
    for start in covering:
        for factor in effort.factors:
            new_gain, new = _fitted(groups, levels, start * factor)
            wins = new_gain > gain
            gain, scale = mx.where(wins, new_gain, gain), mx.where(wins, new, scale)
    for _ in range(effort.alternations):
        scale = _fitted(groups, levels, scale)[1]
    best = groups.stored(covering[0])
    error = _error(groups, levels, best)
    for nudge in effort.nudges:
        new = groups.stored(scale * nudge)
        new_error = _error(groups, levels, new)
        wins = new_error < error
        error, best = mx.where(wins, new_error, error), mx.where(wins, new, best)
    return best


def on_grid(w: mx.array, scale: mx.array, levels: Levels) -> mx.array:
    """The levels, float32, that times scale [1, *n] are closest to w [g, *n]."""
    return levels.nearest(w * (1 / mx.where(mx.abs(scale) < LEAST, LEAST, scale)))


def _fitted(groups: Groups, levels: Levels, scale: mx.array) -> tuple[mx.array, mx.array]:
    """(by how much the squared error is below that of nothing, the least-squares scale) of the levels at `scale`."""
    found = on_grid(groups.w, scale, levels)
    along = groups.mean(groups.w * found)
    fitted = along / mx.maximum(groups.mean(found * found), LEAST)
    return along * fitted, fitted


def _error(groups: Groups, levels: Levels, scale: mx.array) -> mx.array:
    return groups.mean(mx.square(groups.w - scale * on_grid(groups.w, scale, levels)))


class ScaledGrid:
    """A group's grid for error feedback: a float16 scale times fixed levels. A code is the level itself."""

    def __init__(self, levels: Levels, effort: Effort | None) -> None:
        self.levels, self.effort = levels, effort

    def fitted(self, wanted: mx.array, importance: mx.array) -> Stored:
        groups = Groups.of(wanted, importance, mx.float16)
        return (scale_of(groups, self.levels, self.effort) * groups.unit,)

    def nearest(self, x: mx.array, stored: Stored) -> mx.array:
        return on_grid(x, stored[0], self.levels)

    def values(self, codes: mx.array, stored: Stored) -> mx.array:
        return stored[0] * codes

    def refitted(self, codes: mx.array, slope: mx.array, inner: mx.array, stored: Stored) -> Stored:
        curvature, pull = ((codes * x).sum(axis=0, keepdims=True) for x in (inner @ codes, slope))
        step = rounded(stored[0] + pull / mx.maximum(curvature, NO_CURVATURE), mx.float16) - stored[0]
        return (mx.where(step * (step * curvature - 2 * pull) < 0, stored[0] + step, stored[0]),)

    def lengthened(self, stored: Stored, factor: mx.array) -> Stored:
        return stored

    def packed(self, codes: Sequence[mx.array], stored: Sequence[Stored]) -> tuple[mx.array, ...]:
        words = pack(self.levels.codes(mx.concatenate(list(codes))).T, self.levels.bits)
        return words, mx.concatenate([scale for (scale,) in stored]).astype(mx.float16).T
