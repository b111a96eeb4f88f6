"""fp8: every coordinate as an 8-bit float, E4M3 without infinities, no rotation. 8 bits an element.

Values are x / s for one scale s of a whole layer, which the codec's name carries: `fp8:0.03125`; `fp8` is scale 1.
Values beyond 448 s become that. Rounding is to nearest, ties to even. The format: Micikevicius et al., "FP8 formats for
deep learning" (arXiv 2209.05433); zero has one code here, 0, and the codes of NaN are never made.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from ..kernels.packed import Packed
from ..kernels.spec import KernelSpec, Struct
from . import fields
from .base import Codec

LARGEST = 448.0
# For scales s between these, 1 / s and 448 s are normal float32 numbers, with room for the products with them.
LEAST_SCALE, MOST_SCALE = 1e-30, 1e30


def values() -> np.ndarray:
    """float32 [256]: what every code stands for."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    return np.concatenate([size, -size]).astype(np.float32)


class Fp8:
    """A codec of bare codes: 8 bits an element, no scale of a vector's own."""

    index_bits = 8
    scaled = False

    def __init__(self, name: str, dim: int, scale: float) -> None:
        if not LEAST_SCALE <= scale <= MOST_SCALE:
            raise RotorError(f"codec {name}: its scale must be from {LEAST_SCALE} to {MOST_SCALE}")
        self.name, self.dim = name, dim
        fields.units(dim, self.index_bits)
        self._divide, self._multiply = (float(np.float32(f)) for f in (1 / scale, scale))
        self._values, table = mx.array(values()), mx.zeros(8, mx.uint32)
        mx.eval(self._values, table)
        quantizer, plain = Struct("codec/e4m3.h", f"E4m3<{dim}>"), Struct("codec/plain.h", f"Plain<{dim}>")
        self.kernel: KernelSpec | None = KernelSpec(quantizer, plain, table, table, self._divide, self._multiply)

    @property
    def bits(self) -> float:
        return float(self.index_bits)

    @property
    def tile_words(self) -> int:
        return self.dim * self.index_bits

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Packed:
        if mean is not None:
            raise RotorError(f"codec {self.name} takes no means: its vectors have no scale of their own")
        y = x.astype(mx.float32) * self._divide
        size = mx.abs(y)
        code = mx.to_fp8(mx.where(size < LARGEST, size, LARGEST))
        code = mx.where((y < 0) & (code > 0), code | 0x80, code)
        return Packed(fields.pack(code, self.index_bits), None)

    def decode_rotated(self, packed: Packed) -> mx.array:
        return self._values[fields.unpack(packed.words, self.index_bits, self.dim)]

    def decode(self, packed: Packed) -> mx.array:
        return self.unrotate(self.decode_rotated(packed))

    def rotate(self, x: mx.array) -> mx.array:
        return x * self._multiply

    def unrotate(self, y: mx.array) -> mx.array:
        return y * self._multiply


def _make(name: str, dim: int, scale: float) -> Codec:
    return Fp8(name, dim, scale)


WITH_PARAMETER = {"fp8": _make}
