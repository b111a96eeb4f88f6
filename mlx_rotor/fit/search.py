"""Groups of weights, and the search for the grid scale * code + bias of each group by weighted least squares.

A group is a column of an array whose first axis runs over the group's weights, so that reductions read memory in
order. The search tries many starts, alternates between the line and the codes, and chooses after rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx

LEAST = 1e-20  # a scale, in units of the group's largest weight: keeps divisions finite
NO_SPREAD = 1e-12
SMALLEST, LARGEST = 2.0**-126, 2.0**126  # powers of two whose inverse is a normal float32, too
EXPONENT = 0x7F800000
WHOLE = 1.5 * 2.0**23  # float32 has no fractions from there on: adding it rounds to the nearest, ties to even


@dataclass(frozen=True)
class Groups:
    """`w`: [g, *n] float32, in units of `unit` [1, *n], a power of two about as large as the group's largest weight.

    `importance`: [g, *m], *m broadcast to *n, what each squared error counts, sums to 1 over a group; None: all alike.
    `dtype`: what scales and biases are stored in.
    """

    w: mx.array
    unit: mx.array
    importance: mx.array | None
    dtype: mx.Dtype

    @classmethod
    def of(cls, w: mx.array, importance: mx.array | None = None, dtype: mx.Dtype = mx.bfloat16) -> Groups:
        """From weights [g, *n] in float32, finite, and an importance >= 0 on any scale."""
        largest = mx.maximum(w.max(axis=0, keepdims=True), -w.min(axis=0, keepdims=True))
        unit = mx.clip((largest.view(mx.uint32) & EXPONENT).view(mx.float32), SMALLEST, LARGEST)
        return cls(w * (1 / unit), unit, None if importance is None else _normalized(importance), dtype)

    def mean(self, x: mx.array) -> mx.array:
        """Weighted mean over each group, [1, *n]."""
        if self.importance is None:
            return x.mean(axis=0, keepdims=True)
        return (self.importance * x).sum(axis=0, keepdims=True)

    def stored(self, x: mx.array) -> mx.array:
        """The value nearest `x` [1, *n], both in units of the group, that `dtype` has."""
        return (x * self.unit).astype(self.dtype).astype(mx.float32) * (1 / self.unit)

    def line(self, codes: mx.array, centred: mx.array, steepest: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(gain, scale, bias), each [1, *n], of the least-squares line through (code, weight).

        `centred`: the weights less their mean. `steepest`: their range, which no such line exceeds, but where all codes
        are equal what rounding makes of it does. Gain: by how much its squared error is below the constant's.
        """
        counted = codes if self.importance is None else self.importance * codes
        share = 1 / codes.shape[0] if self.importance is None else 1.0
        mean = counted.sum(axis=0, keepdims=True) * share
        spread = (counted * codes).sum(axis=0, keepdims=True) * share - mean * mean
        slope = (counted * centred).sum(axis=0, keepdims=True) * share / mx.maximum(spread, NO_SPREAD)
        slope = mx.clip(slope, LEAST, steepest)
        return slope * slope * mx.maximum(spread, 0), slope, -slope * mean

    def error(self, scale: mx.array, bias: mx.array, top: int) -> tuple[mx.array, mx.array]:
        """(weighted mean squared error [1, *n], nearest codes [g, *n]) of a grid, all in units of the group."""
        codes = nearest(self.w - bias, scale, top)
        error = self.mean(mx.square(scale * codes + (bias - self.w)))
        return mx.where(mx.isnan(error), mx.inf, error), codes


def by_groups(rows: mx.array, group_size: int) -> mx.array:
    """[R, K] as [group_size, R, K/group_size]."""
    return mx.contiguous(rows.reshape(rows.shape[0], -1, group_size).transpose(2, 0, 1))


def nearest(x: mx.array, scale: mx.array, top: int) -> mx.array:
    """Codes [g, *n], as float32, that bring scale * code closest to x. Some scales of mx.quantize are negative."""
    divisor = mx.where(mx.abs(scale) < LEAST, LEAST, scale)
    return (mx.clip(x * (1 / divisor), 0, top) + WHOLE) - WHOLE


def _normalized(importance: mx.array) -> mx.array:
    """Sums to 1 over each group; a group nobody reads counts all its weights alike."""
    importance = importance * (1 / mx.maximum(importance.max(axis=0, keepdims=True), SMALLEST))
    total = importance.sum(axis=0, keepdims=True)
    unread = total == 0
    return (importance + unread) / (total + unread * importance.shape[0])


Line = tuple[mx.array, mx.array]  # scale and bias, [1, *n] each


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


def search(groups: Groups, plain: Line, bits: int, effort: Effort) -> tuple[mx.array, mx.array, mx.array]:
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
) -> Iterator[Line]:
    top = 2**bits - 1
    yield from _between(low, high, effort.ends, top)
    if groups.importance is not None:
        share = groups.importance * groups.w.shape[0]  # 1 on average
        heeded = centred * mx.minimum(share ** (1 / bits), 1)
        low, high = heeded.min(axis=0, keepdims=True), heeded.max(axis=0, keepdims=True)
        yield from _between(low, high, effort.heeded, top)


def _between(low: mx.array, high: mx.array, ends: Iterable[tuple[float, float]], top: int) -> Iterator[Line]:
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
