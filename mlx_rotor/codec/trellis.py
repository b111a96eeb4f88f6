"""trellis2, trellis3, trellis4: a two-sign Hadamard rotation and a trellis-coded quantizer. b + 16/d bits an element.

Ungerboeck's rate-1/2 code of 8 states (IEEE Trans. Inf. Theory 28(1), 1982) over a codebook of 2^(b+1) levels: element
t has a path bit p[t] and an amplitude A; z1 = p[t] ^ p[t-1] ^ p[t-3], z0 = p[t-2], path bits before the vector being
0, and its level has index 4 A + 2 z1 + z0. Marcellin and Fischer (IEEE Trans. Commun. 38(1), 1990) is the quantizer.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..kernels.spec import Struct
from .base import Codec, RotatedCodec
from .quantizer import TRELLIS, cuts
from .rotation import hadamard

SEED = 42
VECTORS = 4096  # searched at a time: bounds the search's scratch at about 64 MB


class TrellisQuantizer:
    """Codes are 2 A + p, or A + 4 p with 3 bits: path bits then share a word."""

    def __init__(self, bits: int, dim: int) -> None:
        self.bits = bits
        self.struct = Struct("codec/trellis.h", f"Trellis<{bits}, {dim}>")
        self._levels = mx.array(TRELLIS[bits].levels())
        self._cuts = cuts(TRELLIS[bits], 4)
        # Subsets z of the branches (p, p[t-1], p[t-2], p[t-3]).
        p, p1, p2, p3 = np.indices((2, 2, 2, 2))
        self._branches = mx.array((2 * (p ^ p1 ^ p3) + p2).reshape(-1).astype(np.uint32))
        mx.eval(self._levels, self._branches)

    def search(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        flat = unit.reshape(-1, unit.shape[-1])
        parts = [self._search(flat[i : i + VECTORS]) for i in range(0, flat.shape[0], VECTORS)]
        if not parts:
            return mx.zeros(unit.shape, mx.uint8), unit
        code, c = (mx.concatenate(list(side)).reshape(unit.shape) for side in zip(*parts, strict=True))
        return code, c

    def _search(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """Viterbi's search over unit [V, d]. Ties go to p[t-3] = 0 and to the lowest final state."""
        n, d = unit.shape
        amplitudes, squares = self._nearest(unit)
        cost = mx.array([0.0] + [1e30] * 7)
        # The survivors' path bits, 64 steps a word: [V, p, p1, p2] for the state of the last three bits.
        survivors: list[mx.array] = []
        bit = mx.array([0, 0, 0, 0, 1, 1, 1, 1], mx.uint64).reshape(2, 2, 2)
        cost = mx.broadcast_to(cost.reshape(2, 2, 2), (n, 2, 2, 2))
        for t in range(d):
            branch = mx.take(squares[:, t], self._branches, axis=-1).reshape(n, 2, 2, 2, 2)
            total = cost[:, None] + branch
            second = total[..., 1] < total[..., 0]
            cost = mx.where(second, total[..., 1], total[..., 0])
            if t % 64 == 0:
                survivors.append(mx.zeros((n, 2, 2, 2), mx.uint64))
            survivors = [mx.where(second, w[:, None, ..., 1], w[:, None, ..., 0]) for w in survivors]
            survivors[-1] = survivors[-1] | (bit << (t % 64))
        best = mx.argmin(cost.reshape(n, 8), axis=-1, keepdims=True)
        words = [mx.take_along_axis(w.reshape(n, 8), best, axis=-1) for w in survivors]
        shift = mx.arange(64, dtype=mx.uint64)
        path = mx.concatenate([(w >> shift) & 1 for w in words], axis=-1)[:, :d].astype(mx.uint8)
        subset = _subset(path)
        amplitude = mx.take_along_axis(amplitudes, subset[..., None], axis=-1)[..., 0]
        code = amplitude + 4 * path if self.bits == 3 else 2 * amplitude + path
        return code, self._levels[4 * amplitude + subset]

    def _nearest(self, unit: mx.array) -> tuple[mx.array, mx.array]:
        """For each subset: the amplitude of its level nearest to unit [V, d], and its squared distance, [V, d, 4]."""
        amplitudes, squares = [], []
        for z in range(4):
            amplitude = mx.zeros(unit.shape, mx.uint8)
            for cut in self._cuts[z::4]:
                amplitude = amplitude + (unit > cut)
            miss = unit - self._levels[4 * amplitude + z]
            amplitudes.append(amplitude)
            squares.append(miss * miss)
        return mx.stack(amplitudes, axis=-1), mx.stack(squares, axis=-1)

    def levels(self, code: mx.array) -> mx.array:
        path, amplitude = (code >> 2, code & 3) if self.bits == 3 else (code & 1, code >> 1)
        return self._levels[4 * amplitude + _subset(path)]


def _subset(path: mx.array) -> mx.array:
    """Path bits uint8 [..., d] -> subsets 2 z1 + z0."""
    zeros = mx.zeros((*path.shape[:-1], 3), mx.uint8)
    before = mx.concatenate([zeros, path], axis=-1)
    return 2 * (path ^ before[..., 2:-1] ^ before[..., :-3]) + before[..., 1:-2]


def _make(bits: int, dim: int) -> Codec:
    return RotatedCodec(f"trellis{bits}", dim, hadamard(dim, SEED), TrellisQuantizer(bits, dim))


CODECS = {f"trellis{bits}": (lambda dim, bits=bits: _make(bits, dim)) for bits in (2, 3, 4)}
