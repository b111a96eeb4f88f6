"""What a codec is: one vector of the KV cache to packed bits and back. Knows no cache, no model, no files."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import mlx.core as mx

from .levels import lloyd_max
from .packing import pack, unpack, word_bits
from .rotation import Rotation

SCALE_MAX = 65504.0  # the largest finite float16


@dataclass(frozen=True)
class Packed:
    """Encoded vectors. planes: [..., bits, words] of uint32 or uint16; scale: [...] of float16, one a vector."""

    planes: mx.array
    scale: mx.array

    @property
    def nbytes(self) -> int:
        return int(self.planes.nbytes + self.scale.nbytes)


class Codec(Protocol):
    """Encodes vectors of one dimension. Stateless: constants only, evaluated when made."""

    name: str
    dim: int
    index_bits: int

    @property
    def bits(self) -> float:
        """Stored bits per element, the scale included."""

    def encode(self, x: mx.array) -> Packed:
        """x: [..., d], any float dtype."""

    def decode(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the basis of x."""

    def decode_rotated(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the codec's own basis: `unrotate` of it is `decode`."""

    def rotate(self, x: mx.array) -> mx.array:
        """x: float32 [..., d] into the codec's basis; ⟨rotate(q), decode_rotated(p)⟩ = ⟨q, decode(p)⟩."""

    def unrotate(self, y: mx.array) -> mx.array: ...


class ScalarCodec:
    """Rotate, take the nearest Lloyd–Max level of every coordinate, keep one least-squares float16 scale.

    The scale is ⟨c, y⟩ / ⟨c, c⟩ for levels c and rotated vector y: the best for squared error, whatever the table.
    A zero vector decodes to zero. Source of the form: TurboQuant (arXiv 2504.19874), without its QJL residual.
    """

    def __init__(self, name: str, index_bits: int, dim: int, rotation: Rotation) -> None:
        self.name, self.dim, self.index_bits = name, dim, index_bits
        word_bits(dim)
        self.rotation = rotation
        levels = lloyd_max(index_bits, dim)
        half = levels[len(levels) // 2 :]
        self.levels = mx.array(levels, mx.float32)
        self.cuts = tuple((a + b) / 2 for a, b in pairwise(half))
        mx.eval(self.levels)

    @property
    def bits(self) -> float:
        return self.index_bits + 16 / self.dim

    def encode(self, x: mx.array) -> Packed:
        y = self.rotate(x.astype(mx.float32))
        power = (y * y).mean(-1, keepdims=True)
        unit = mx.abs(y) * mx.where(power > 0, mx.rsqrt(power), 0.0)
        above = mx.zeros(y.shape, mx.uint32)
        for cut in self.cuts:
            above = above + (unit > cut)
        half = 1 << (self.index_bits - 1)
        index = mx.where(y >= 0, half + above, half - 1 - above)
        c = self.levels[index]
        scale = (c * y).sum(-1) / (c * c).sum(-1)
        return Packed(pack(index, self.index_bits), mx.minimum(scale, SCALE_MAX).astype(mx.float16))

    def decode_rotated(self, packed: Packed) -> mx.array:
        return self.levels[unpack(packed.planes)] * packed.scale[..., None].astype(mx.float32)

    def decode(self, packed: Packed) -> mx.array:
        return self.unrotate(self.decode_rotated(packed))

    def rotate(self, x: mx.array) -> mx.array:
        return self.rotation.rotate(x)

    def unrotate(self, y: mx.array) -> mx.array:
        return self.rotation.unrotate(y)
