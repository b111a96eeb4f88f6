"""Orthogonal maps applied to a vector before its coordinates are quantized."""

from __future__ import annotations

from functools import cache
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import RotorError
from ..kernels.spec import Struct

# mx.hadamard_transform is an orthogonal map for sizes of one of these times a power of two.
HADAMARD_FACTORS = (1, 12, 20, 28)


class Rotation(Protocol):
    """An orthogonal map on the last axis; float32 in and out. `struct`, `table`, `inverse_table` and `root` describe it
    to kernels, see `kernels.spec.KernelSpec`."""

    struct: Struct
    table: mx.array
    inverse_table: mx.array
    root: float

    def rotate(self, x: mx.array) -> mx.array: ...

    def unrotate(self, y: mx.array) -> mx.array: ...


def _split_mix(seed: int, n: int) -> list[int]:
    """n 64-bit outputs of SplitMix64 (Steele, Lea, Flood 2014): the same on every machine and version."""
    mask = (1 << 64) - 1
    out = []
    for i in range(n):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def signs(seed: int, n: int) -> np.ndarray:
    """n signs ±1, float32."""
    return np.array([1.0 if z & 1 else -1.0 for z in _split_mix(seed, n)], np.float32)


def uniforms(seed: int, n: int) -> np.ndarray:
    """n numbers in [0, 1), float64."""
    return np.array([(z >> 11) * 2.0**-53 for z in _split_mix(seed, n)])


def _sign_words(rows: np.ndarray) -> np.ndarray:
    """Each row's signs as bits, 1 for minus, in uint32 words, the last filled with 0: [n, m] -> [n · ceil(m / 32)]."""
    padded = np.zeros((len(rows), -(-rows.shape[1] // 32) * 32), np.uint8)
    padded[:, : rows.shape[1]] = rows < 0
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").reshape(-1)


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
        self.root = float(np.float32(dim**-0.5))
        self.first = mx.array(signs(seed, dim))
        self.second = mx.array(signs(seed + 1, dim))
        with mx.stream(mx.cpu):
            matrix = mx.hadamard_transform(mx.eye(dim), scale=1.0)
        # H = outer ⊗ Sylvester's; it is symmetric but for the factors 20 and 28, whose inverse is the transpose.
        odd = dim // (dim & -dim)
        outer = np.array(matrix).T[:: dim // (4 * odd), :: dim // (4 * odd)] if odd > 1 else np.zeros((0, 0))
        self.inverse = None if np.array_equal(outer, outer.T) else (matrix * self.root).T
        self.struct = Struct("codec/hadamard.h", f"Hadamard<{dim}>")
        first, second = _sign_words(np.array(self.first)[None]), _sign_words(np.array(self.second)[None])
        # MLX hands a kernel fewer than 8 elements in another kind of memory: fill up.
        fill = np.zeros(max(0, 8 - 2 * len(first)), np.uint32)
        self.table = mx.array(np.concatenate([first, second, _sign_words(outer), fill]))
        self.inverse_table = mx.array(np.concatenate([second, first, _sign_words(outer.T), fill]))
        # Evaluated here: a constant left lazy belongs to this thread's stream and fails on another thread.
        made = [self.first, self.second, self.table, self.inverse_table]
        mx.eval(*made, *([] if self.inverse is None else [self.inverse]))

    def rotate(self, x: mx.array) -> mx.array:
        return mx.hadamard_transform(x * self.first, scale=self.root) * self.second

    def unrotate(self, y: mx.array) -> mx.array:
        y = y * self.second
        x = mx.hadamard_transform(y, scale=self.root) if self.inverse is None else y @ self.inverse
        return x * self.first


@cache
def hadamard(dim: int, seed: int) -> TwoSignHadamard:
    return TwoSignHadamard(dim, seed)
