"""What a codec is: one vector of the KV cache to packed bits and back. Knows no cache, no model, no files."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np

from ..kernels.packed import Packed
from ..kernels.spec import KernelSpec, Struct
from . import fields
from .rotation import Rotation

SCALE_MAX = 65504.0  # the largest finite float16


class Codec(Protocol):
    """Encodes vectors of one dimension. Stateless: constants only, evaluated when made.

    Attributes:
        index_bits: bits of a code.
        scaled: whether a vector has a float16 scale beside its words.
    """

    name: str
    dim: int
    index_bits: int
    scaled: bool

    @property
    def tile_words(self) -> int:
        """32-bit words of a tile, 32 vectors' without their scales."""

    @property
    def bits(self) -> float:
        """Stored bits per element, the scale included."""

    @property
    def kernel(self) -> KernelSpec | None:
        """The codec in Metal, or None: it then runs as MLX operations on every backend."""

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Packed:
        """x: [..., d], any float dtype; mean: float32, broadcastable to x, subtracted in the codec's basis. Only a
        scaled codec takes one."""

    def decode(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the basis of x."""

    def decode_rotated(self, packed: Packed) -> mx.array:
        """float32 [..., d] in the codec's own basis: `unrotate` of it is `decode`."""

    def rotate(self, x: mx.array) -> mx.array:
        """x: float32 [..., d] into the codec's basis; ⟨rotate(q), decode_rotated(p)⟩ = ⟨q, decode(p)⟩."""

    def unrotate(self, y: mx.array) -> mx.array: ...


class Quantizer(Protocol):
    """Unit-variance coordinates to integer codes and the levels they stand for."""

    bits: int

    @property
    def struct(self) -> Struct: ...

    def search(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """unit: float32 [..., d], root mean square 1 -> (codes below 2^bits, float32 levels), both [..., d]."""

    def levels(self, code: mx.array) -> mx.array:
        """uint8 codes [..., d] -> float32 levels."""


def dot(a: mx.array, b: mx.array) -> mx.array:
    """⟨a, b⟩ over the last axis, d a multiple of 8, [..., d] -> [..., 1], in the kernels' order of sums: eight partial
    sums of every eighth product, then neighbours among the eight."""
    product = (a * b).reshape(*a.shape[:-1], -1, 8)
    part = product[..., 0, :]
    for i in range(1, product.shape[-2]):
        part = part + product[..., i, :]
    while part.shape[-1] > 1:
        part = part[..., 0::2] + part[..., 1::2]
    return part


class RotatedCodec:
    """Rotate, normalise, quantize every coordinate, keep one least-squares float16 scale.

    The scale is ⟨c, y⟩ / ⟨c, c⟩ for levels c and rotated vector y: the best for squared error, whatever the levels.
    A zero vector decodes to zero. Every sum and product is rounded in the order the encode kernel has: on a CPU, the
    bits are the same. Source of the form: TurboQuant (arXiv 2504.19874), without its QJL residual.
    """

    scaled = True

    def __init__(self, name: str, dim: int, rotation: Rotation, quantizer: Quantizer) -> None:
        self.name, self.dim, self.index_bits = name, dim, quantizer.bits
        fields.units(dim, quantizer.bits)
        self.rotation, self.quantizer = rotation, quantizer
        struct, tables = rotation.struct, (rotation.table, rotation.inverse_table)
        self.kernel: KernelSpec | None = KernelSpec(quantizer.struct, struct, *tables, rotation.root, rotation.root)

    @property
    def bits(self) -> float:
        return self.index_bits + 16 / self.dim

    @property
    def tile_words(self) -> int:
        return self.dim * self.index_bits

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Packed:
        y = self.rotate(x.astype(mx.float32))
        if mean is not None:
            y = y - mean
        power = dot(y, y) * float(np.float32(1) / np.float32(self.dim))
        unit = y * mx.where(power > 0, 1 / mx.sqrt(power), 0.0)
        code, c = self.quantizer.search(unit)
        scale = (dot(c, y) / dot(c, c))[..., 0]
        return Packed(fields.pack(code, self.index_bits), mx.minimum(scale, SCALE_MAX).astype(mx.float16))

    def decode_rotated(self, packed: Packed) -> mx.array:
        code = fields.unpack(packed.words, self.index_bits, self.dim)
        assert packed.scale is not None
        return self.quantizer.levels(code) * packed.scale[..., None].astype(mx.float32)

    def decode(self, packed: Packed) -> mx.array:
        return self.unrotate(self.decode_rotated(packed))

    def rotate(self, x: mx.array) -> mx.array:
        return self.rotation.rotate(x)

    def unrotate(self, y: mx.array) -> mx.array:
        return self.rotation.unrotate(y)
