"""Orthogonal maps applied to a vector before its coordinates are quantized."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import RotorError

# The sizes mx.hadamard_transform is an orthogonal map for: one of these times a power of two.
HADAMARD_FACTORS = (1, 12, 20, 28)


class Rotation(Protocol):
    """An orthogonal map on the last axis; float32 in and out."""

    def rotate(self, x: mx.array) -> mx.array: ...

    def unrotate(self, y: mx.array) -> mx.array: ...


def signs(seed: int, n: int) -> np.ndarray:
    """n signs ±1, float32, from SplitMix64 (Steele, Lea, Flood 2014): the same on every machine and version."""
    mask = (1 << 64) - 1
    out = np.empty(n, np.float32)
    for i in range(n):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out[i] = 1.0 if (z ^ (z >> 31)) & 1 else -1.0
    return out


def takes_hadamard(dim: int) -> bool:
    """Whether `dim` is m · 2^k with m a Hadamard factor and k ≥ 1."""
    return any(dim % m == 0 and (q := dim // m) >= 2 and q & (q - 1) == 0 for m in HADAMARD_FACTORS)


class TwoSignHadamard:
    """y = D₂ H D₁ x / √d: a Hadamard transform between two fixed sign vectors (a randomised Hadamard rotation).

    Spreads an outlier channel over all d coordinates; at d = 80 and 112 the factor 20 or 28 takes the odd part.
    """

    def __init__(self, dim: int, seed: int) -> None:
        if not takes_hadamard(dim):
            raise RotorError(
                f"a Hadamard rotation can't take head dimension {dim}: it needs 2^k, 12·2^k, 20·2^k or 28·2^k "
                "(64, 80, 96, 112, 128, 192, 256 …)"
            )
        self.scale = dim**-0.5
        self.first = mx.array(signs(seed, dim))
        self.second = mx.array(signs(seed + 1, dim))
        matrix = mx.hadamard_transform(mx.eye(dim), scale=self.scale)
        # H is symmetric but for the factors 20 and 28, whose inverse is the transpose.
        self.inverse = None if mx.allclose(matrix, matrix.T, atol=1e-6).item() else matrix.T
        # Evaluated here: a constant left lazy belongs to this thread's stream and fails on another thread.
        mx.eval(self.first, self.second, *([] if self.inverse is None else [self.inverse]))

    def rotate(self, x: mx.array) -> mx.array:
        return mx.hadamard_transform(x * self.first, scale=self.scale) * self.second

    def unrotate(self, y: mx.array) -> mx.array:
        y = y * self.second
        x = mx.hadamard_transform(y, scale=self.scale) if self.inverse is None else y @ self.inverse
        return x * self.first


@cache
def hadamard(dim: int, seed: int) -> TwoSignHadamard:
    return TwoSignHadamard(dim, seed)
