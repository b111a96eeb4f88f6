"""The usual codec: rotate a vector, quantize its coordinates, keep one scale."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import numpy as np

from ..kernels.packed import Packed
from ..kernels.spec import Codec, KernelSpec, Struct
from . import fields
from .rotation import Rotation

__all__ = ["Codec", "Quantizer", "RotatedCodec", "dot"]

SCALE_MAX = 65504.0  # the largest finite float16


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
    """Rotates, normalises, quantizes every coordinate, keeps one least-squares float16 scale: b + 16/d bits an element.

    The scale is ⟨c, y⟩ / ⟨c, c⟩ for levels c and rotated vector y, the best for squared error, whatever the levels. A
    zero vector decodes to zero. Every sum and product is rounded in the order of the encode kernel: on a CPU, the bits
    are the same. Source of the form: TurboQuant (arXiv 2504.19874), without its QJL residual.
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
