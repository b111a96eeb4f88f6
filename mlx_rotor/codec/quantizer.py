"""Scalar quantizers, and the levels of all codebooks: odd polynomials in the index, which a kernel computes without a
table.

`level(u) = u (a + b u² + c u⁴)`, u the index counted from the middle of the codebook, rounded to float16. Levels are in
units of the coordinates' root mean square. The coefficients minimise the squared error of N(0, 1) coordinates after the
least-squares scale; against free levels (Lloyd–Max 1960 for `SCALAR`, the same iteration under the trellis for
`TRELLIS`) they cost at most 0.5 %. `kernels_metal/codec/curve.h` has the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from ..kernels.spec import Struct


@dataclass(frozen=True)
class Curve:
    """Coefficients of a codebook of `count` levels."""

    count: int
    a: float
    b: float
    c: float = 0.0

    def levels(self) -> np.ndarray:
        """float32 [count], ascending, each a float16: the levels of the kernels, rounding for rounding."""
        u = np.arange(self.count) - (self.count - 1) / 2
        square = u * u  # exact in float32, as u and the products of a fused multiply-add are in float64
        slope = np.full(self.count, np.float32(self.b), np.float64)
        if self.c:
            slope = (square * np.float32(self.c) + slope).astype(np.float32).astype(np.float64)
        slope = (square * slope + np.float32(self.a)).astype(np.float32)
        return (u.astype(np.float32) * slope).astype(np.float16).astype(np.float32)


SCALAR = {
    2: Curve(4, 0.890583, 0.0509718),
    3: Curve(8, 0.468304, 0.0114955),
    4: Curve(16, 0.258427, 7.0183e-05, 2.9542e-05),
}
TRELLIS = {
    2: Curve(8, 0.356082, 0.0139539),
    3: Curve(16, 0.213251, -2.4621e-04, 3.98011e-05),
    4: Curve(32, 0.117567, -1.21843e-04, 1.773e-06),
}


@cache
def cuts(curve: Curve, step: int = 1) -> tuple[float, ...]:
    """The points at which level n and level n + step are equally near, for every n; exact in float32."""
    levels = curve.levels()
    return tuple(float(x) for x in (levels[:-step] + levels[step:]) * np.float32(0.5))


class Scalar:
    """Takes the nearest of 2^bits levels for every coordinate; the code is the level's index."""

    def __init__(self, bits: int, dim: int) -> None:
        self.bits = bits
        self.struct = Struct("codec/scalar.h", f"Scalar<{bits}, {dim}>")
        self._levels = mx.array(SCALAR[bits].levels())
        # Levels are symmetric: the cuts above zero are enough.
        self._cuts = cuts(SCALAR[bits])[1 << (bits - 1) :]
        mx.eval(self._levels)

    def search(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        size = mx.abs(unit)
        above = mx.zeros(unit.shape, mx.uint8)
        for cut in self._cuts:
            above = above + (size > cut)
        half = 1 << (self.bits - 1)
        code = mx.where(unit >= 0, half + above, half - 1 - above)
        return code, self._levels[code]

    def levels(self, code: mx.array) -> mx.array:
        return self._levels[code]
