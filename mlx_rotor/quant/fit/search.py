"""The search for a group's grid: many starts, alternation of line and codes, and a choice after rounding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import mlx.core as mx

from .groups import LEAST, Groups, nearest

Grid = tuple[mx.array, mx.array]  # scale and bias, [1, *n] each


@dataclass(frozen=True)
class Effort:
    """How hard to look.

    Attributes:
        ends: grids tried first, as the fractions of the way from the group's mean to its least and greatest weight that
            their ends lie at: the fewer codes, the more it pays to clip. Few groups are symmetric.
        heeded: the same where some weights matter more, the way then being to the end of those that do.
        alternations: fits of a line to the codes of the best start.
        nudges: factors on the scale tried with rounding.
        descents: how often scale and bias are fitted again, one to the other as rounded.
    """

    ends: tuple[tuple[float, float], ...]
    heeded: tuple[tuple[float, float], ...]
    alternations: int
    nudges: tuple[float, ...]
    descents: int


def search(groups: Groups, plain: Grid, bits: int, effort: Effort) -> tuple[mx.array, mx.array, mx.array]:
    """(scale, bias, codes): [1, *n] in `groups.dtype`, as stored, and codes [g, *n] as float32.

    Never worse than `plain` = scale and bias as stored, of a grid known beforehand.
    """
    top = 2**bits - 1
    mean = groups.mean(groups.w)
    centred = groups.w - mean
    low, high = centred.min(axis=0, keepdims=True), centred.max(axis=0, keepdims=True)
    steepest = mx.maximum(high - low, LEAST)
    gain = scale = bias = mx.zeros_like(mean)
    for start in _starts(groups, centred, low, high, bits, effort):
        codes = nearest(centred - start[1], start[0], top)
        gain, scale, bias = _better(groups.line(codes, centred, steepest), (gain, scale, bias))
    scale = mx.maximum(scale, LEAST)
    for _ in range(effort.alternations):
        _, scale, bias = groups.line(nearest(centred - bias, scale, top), centred, steepest)

    best = _rounded(groups, plain[0] / groups.unit, plain[1] / groups.unit, top)
    for nudge in effort.nudges:
        fixed = groups.stored(scale * nudge)
        codes = nearest(centred - bias, fixed if len(effort.nudges) > 1 else scale, top)
        best = _lower(_rounded(groups, fixed, groups.stored(mean - fixed * groups.mean(codes)), top), best)
    for _ in range(effort.descents):
        best = _lower(_descended(groups, best, top), best)
    _, scale, bias = best
    codes = groups.error(scale, bias, top)[1]
    return (scale * groups.unit).astype(groups.dtype), (bias * groups.unit).astype(groups.dtype), codes


def _starts(
    groups: Groups, centred: mx.array, low: mx.array, high: mx.array, bits: int, effort: Effort
) -> Iterator[Grid]:
    top = 2**bits - 1
    yield from _between(low, high, effort.ends, top)
    if groups.importance is not None:
        share = groups.importance * groups.w.shape[0]  # 1 on average
        heeded = centred * mx.minimum(share ** (1 / bits), 1)
        low, high = heeded.min(axis=0, keepdims=True), heeded.max(axis=0, keepdims=True)
        yield from _between(low, high, effort.heeded, top)


def _between(low: mx.array, high: mx.array, ends: Iterable[tuple[float, float]], top: int) -> Iterator[Grid]:
    for a, b in ends:
        yield mx.maximum((high * b - low * a) * (1 / top), LEAST), low * a


def _rounded(groups: Groups, scale: mx.array, bias: mx.array, top: int) -> tuple[mx.array, mx.array, mx.array]:
    return groups.error(scale, bias, top)[0], scale, bias


def _descended(groups: Groups, best: tuple[mx.array, ...], top: int) -> tuple[mx.array, mx.array, mx.array]:
    """`best` with the scale that fits its stored bias, then the bias that fits the stored scale."""
    _, scale, bias = best
    codes = nearest(groups.w - bias, scale, top)
    square = mx.maximum(groups.mean(codes * codes), LEAST)
    scale = groups.stored(groups.mean(codes * (groups.w - bias)) / square)
    codes = nearest(groups.w - bias, scale, top)
    return _rounded(groups, scale, groups.stored(groups.mean(groups.w - scale * codes)), top)


def _better(new: tuple[mx.array, ...], old: tuple[mx.array, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """By gain, the greater."""
    wins = new[0] > old[0]
    gain, scale, bias = (mx.where(wins, x, y) for x, y in zip(new, old, strict=True))
    return gain, scale, bias


def _lower(new: tuple[mx.array, ...], old: tuple[mx.array, ...]) -> tuple[mx.array, mx.array, mx.array]:
    """By error, the lower; the new one of equals."""
    wins = new[0] <= old[0]
    error, scale, bias = (mx.where(wins, x, y) for x, y in zip(new, old, strict=True))
    return error, scale, bias


def _square(*steps: float) -> tuple[tuple[float, float], ...]:
    return tuple((a, b) for a, b in product(steps, repeat=2))


_ONE = ((1.0, 1.0),)
_EXACT = (1.0,)
_NEIGHBOURS = (1 - 2**-8, 1.0, 1 + 2**-8)
_NEAR = (1 - 2**-7, *_NEIGHBOURS, 1 + 2**-7)

# Chosen greedily from square grids of ends for the least mean error over normal, Student (5) and Laplace weights in
# groups of 32 to 128, and the heeded ones likewise with log-normal importance. From 6 bits on the scale's rounding
# decides.
SEARCH: dict[int, Effort] = {
    2: Effort(
        ((0.65, 0.65), (0.5, 0.7), (0.75, 0.55), (0.65, 0.8), (0.55, 0.5), (0.85, 0.7), (0.55, 0.9), (0.8, 0.45)),
        ((0.75, 0.75), (0.9, 0.6), (0.6, 0.9), (0.9, 0.85)),
        2,
        _EXACT,
        0,
    ),
    3: Effort(
        ((0.85, 0.85), (0.95, 0.8), (0.8, 0.95), (0.95, 0.95), (0.8, 0.75), (0.75, 0.85), (1.0, 0.9), (0.9, 1.0)),
        ((0.9, 0.9), (0.8, 1.0), (1.0, 0.85), (1.0, 1.0)),
        2,
        _EXACT,
        0,
    ),
    4: Effort(
        ((0.97, 0.97), (1.0, 0.91), (0.94, 1.0), (0.97, 0.94), (0.91, 1.0), (1.0, 0.94), (0.91, 0.94), (0.97, 1.0)),
        ((0.98, 0.98), (0.98, 0.9), (0.9, 0.98)),
        2,
        _EXACT,
        0,
    ),
    5: Effort(((1.0, 1.0), (0.96, 1.0), (1.0, 0.96), (0.98, 0.98)), _ONE, 2, _NEIGHBOURS, 0),
    6: Effort(((1.0, 1.0), (0.98, 0.98)), _ONE, 2, _NEIGHBOURS, 0),
    8: Effort(_ONE, (), 1, _NEIGHBOURS, 0),
}
BEST: dict[int, Effort] = {
    2: Effort(_square(0.35, 0.5, 0.65, 0.8, 0.95), _square(0.55, 0.7, 0.85, 1.0), 6, _NEAR, 2),
    3: Effort(_square(0.6, 0.7, 0.8, 0.9, 1.0), _square(0.7, 0.8, 0.9, 1.0), 6, _NEAR, 2),
    4: Effort(_square(0.8, 0.86, 0.91, 0.96, 1.0), _square(0.8, 0.9, 1.0), 6, _NEAR, 2),
    5: Effort(_square(0.88, 0.93, 0.97, 1.0), _square(0.9, 1.0), 6, _NEAR, 2),
    6: Effort(_square(0.94, 0.97, 1.0), _ONE, 4, _NEAR, 2),
    8: Effort(_square(0.98, 1.0), _ONE, 3, _NEAR, 2),
}
