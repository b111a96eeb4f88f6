"""affine4, affine8: MLX's own group quantization (`mx.quantize`), for comparison: mlx-lm's `--kv-bits` stores the same.

A group of 64 coordinates, or 32 where 64 does not divide the dimension, has a float16 scale and bias: bits + 32 / group
bits an element. They stand behind the codes in the vector's own words. There is no kernel: it runs as MLX operations.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from ..kernels.packed import Packed
from ..kernels.spec import KernelSpec
from .base import SCALE_MAX, Codec

GROUPS = (64, 32)


class Affine:
    """Codes, scales and biases of `mx.quantize` in float16, no rotation."""

    scaled = False
    kernel: KernelSpec | None = None

    def __init__(self, bits: int, dim: int) -> None:
        group = next((g for g in GROUPS if dim % g == 0), None)
        if group is None:
            raise RotorError(f"affine{bits} can't take head dimension {dim}: it must be a multiple of {GROUPS[-1]}")
        self.name, self.dim, self.index_bits, self.group = f"affine{bits}", dim, bits, group

    @property
    def bits(self) -> float:
        return self.index_bits + 32 / self.group

    @property
    def tile_words(self) -> int:
        return self.dim * self.index_bits + 32 * (self.dim // self.group)

    def encode(self, x: mx.array, mean: mx.array | None = None) -> Packed:
        if mean is not None:
            raise RotorError(f"codec {self.name} takes no means: its vectors have no scale of their own")
        flat = mx.clip(x.astype(mx.float32), -SCALE_MAX, SCALE_MAX).astype(mx.float16).reshape(-1, self.dim)
        codes, scales, biases = mx.quantize(flat, group_size=self.group, bits=self.index_bits)
        pairs = mx.view(mx.stack([scales, biases], axis=-1), mx.uint32)[..., 0]
        return Packed(mx.concatenate([codes, pairs], axis=-1).reshape(*x.shape[:-1], -1), None)

    def decode_rotated(self, packed: Packed) -> mx.array:
        *lead, words = packed.words.shape
        flat = packed.words.reshape(-1, words)
        groups = self.dim // self.group
        pairs = mx.view(mx.contiguous(flat[:, -groups:]), mx.float16).astype(mx.float32)
        codes = mx.contiguous(flat[:, :-groups])
        x = mx.dequantize(codes, pairs[:, 0::2], pairs[:, 1::2], group_size=self.group, bits=self.index_bits)
        return x.reshape(*lead, self.dim)

    def decode(self, packed: Packed) -> mx.array:
        return self.decode_rotated(packed)

    def rotate(self, x: mx.array) -> mx.array:
        return x

    def unrotate(self, y: mx.array) -> mx.array:
        return y


def _make(bits: int, dim: int) -> Codec:
    return Affine(bits, dim)


CODECS = {f"affine{bits}": (lambda dim, bits=bits: _make(bits, dim)) for bits in (4, 8)}
