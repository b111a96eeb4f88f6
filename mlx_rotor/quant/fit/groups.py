"""Groups of weights and grids scale * code + bias, code in 0..2**bits - 1, for them: weighted least squares.

A group is a column of an array whose first axis runs over its weights: reductions then read memory in order. Knows
nothing of rows, packing and where grids come from.
"""

from __future__ import annotations

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
