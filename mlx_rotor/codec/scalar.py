"""The scalar quantizer: every coordinate takes its nearest level."""

from __future__ import annotations

import mlx.core as mx

from ..kernels.spec import Struct
from .levels import SCALAR, cuts


class Scalar:
    """2^bits levels, the code being the level's index."""

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
