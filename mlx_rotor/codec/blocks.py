"""planar, iso, isofull, rotor at 2 to 4 bits: every block of two, four, four or three neighbours is turned by numbers
of its own, then Lloyd–Max levels. b + 16/d bits an element.

A block rotation spreads an outlier over its block only, several times worse than a Hadamard transform; it is cheap, and
published: RotorQuant, IsoQuant and PlanarQuant (scrya-com/rotorquant) are the sources of the forms. iso is IsoQuant's
fast form, q x; isofull the full one, q x r̄, which reaches every rotation of four dimensions. The rotor's trivector part
is identically zero for a rotated vector and is not stored. The numbers are our own draws.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import mlx.core as mx
import numpy as np

from ..kernels.spec import Struct
from .base import Codec, RotatedCodec
from .quantizer import Scalar
from .rotation import uniforms

SEED = 42
# Signs of unit (c ^ j) times unit j, for complex numbers and quaternions: the product is unit c.
SIGNS = {
    2: ((1, -1), (1, 1)),
    4: ((1, -1, -1, -1), (1, 1, -1, 1), (1, 1, 1, -1), (1, -1, 1, 1)),
}


def _unit_complex(n: int, seed: int) -> np.ndarray:
    """n complex numbers of length 1 and uniform angle, [n, 2]."""
    angle = 2 * np.pi * uniforms(seed, n)
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def _unit_quaternions(n: int, seed: int) -> np.ndarray:
    """n unit quaternions, uniform on the sphere (Shoemake 1992), [n, 4], scalar part first."""
    u, a, b = uniforms(seed, 3 * n).reshape(3, n)
    a, b = 2 * np.pi * a, 2 * np.pi * b
    p, q = np.sqrt(1 - u), np.sqrt(u)
    return np.stack([p * np.sin(a), p * np.cos(a), q * np.sin(b), q * np.cos(b)], -1)


def _quaternion_pairs(n: int, seed: int) -> np.ndarray:
    """n unit quaternions to multiply with from the left and n from the right, [n, 8]."""
    right = _unit_quaternions(n, seed + 2) * np.array([1, -1, -1, -1])
    return np.concatenate([_unit_quaternions(n, seed), right], -1)


def _rotors(n: int, seed: int) -> np.ndarray:
    """n rotors cos(θ/2) + sin(θ/2) B of Cl(3,0), B a random unit bivector, given as the axis it is dual to, θ uniform,
    [n, 4]."""
    t, height, around = uniforms(seed, 3 * n).reshape(3, n)
    z, phi = 2 * height - 1, 2 * np.pi * around
    flat = np.sqrt(np.maximum(1 - z * z, 0))
    axis = np.stack([flat * np.cos(phi), flat * np.sin(phi), z], -1)
    return np.concatenate([np.cos(np.pi * t)[:, None], np.sin(np.pi * t)[:, None] * axis], -1)


def _product(numbers: mx.array, x: mx.array) -> mx.array:
    """numbers [n, m] times x [..., n, m] from the left, complex numbers or quaternions, summed in order."""
    size = x.shape[-1]
    out = []
    for c in range(size):
        terms = [SIGNS[size][c][j] * numbers[:, c ^ j] * x[..., j] for j in range(size)]
        out.append(sum(terms[1:], terms[0]))
    return mx.stack(out, axis=-1)


def _right_product(x: mx.array, numbers: mx.array) -> mx.array:
    """x [..., n, 4] times quaternions numbers [n, 4] from the right, summed in the order of the numbers' parts."""
    out = []
    for c in range(4):
        terms = [SIGNS[4][c][k] * numbers[:, k] * x[..., c ^ k] for k in range(4)]
        out.append(sum(terms[1:], terms[0]))
    return mx.stack(out, axis=-1)


def _two_sided(numbers: mx.array, x: mx.array) -> mx.array:
    """q x r for numbers [n, 8], each q and r, and x [..., n, 4]."""
    return _right_product(_product(numbers[:, :4], x), numbers[:, 4:])


def _cross(a: list[mx.array], b: list[mx.array]) -> list[mx.array]:
    return [a[(c + 1) % 3] * b[(c + 2) % 3] - a[(c + 2) % 3] * b[(c + 1) % 3] for c in range(3)]


def _sandwich(rotors: mx.array, x: mx.array) -> mx.array:
    """R x R̃ for rotors [n, 4], x [..., n, 3]: x + s t + u × t with t = 2 u × x for the rotor s + u."""
    s, u = rotors[:, 0], [rotors[:, 1 + c] for c in range(3)]
    v = [x[..., c] for c in range(3)]
    t = [2 * a for a in _cross(u, v)]
    return mx.stack([a + s * b + c for a, b, c in zip(v, t, _cross(u, t), strict=True)], axis=-1)


class BlockRotation:
    """Blocks of `size` neighbours, turned by `numbers` [dim // size, parts]: complex for 2, rotors for 3, quaternions
    for 4, or pairs of them, for the left and the right. The complex number `rest` turns two elements that are left at
    the end; a single one stays."""

    root = 1.0

    def __init__(self, dim: int, size: int, numbers: np.ndarray, rest: np.ndarray | None = None) -> None:
        self.dim, self.size = dim, size
        both = numbers.shape[1] == 2 * size
        self.struct = Struct("codec/block.h", f"Block<{size}, {dim}, true>" if both else f"Block<{size}, {dim}>")
        self._turn_blocks = _sandwich if size == 3 else _two_sided if both else _product
        conjugate = np.array([1, -1, -1, -1] * 2, np.float32)[: numbers.shape[1]]
        self._numbers, self._conjugates = (mx.array((numbers * s).astype(np.float32)) for s in (1, conjugate))
        self._rest = [] if rest is None else [mx.array((rest * s).astype(np.float32)) for s in (1, conjugate[:2])]
        tables = []
        for i, n in enumerate((self._numbers, self._conjugates)):
            more = [mx.pad(self._rest[i], [(0, 0), (0, numbers.shape[1] - 2)])] if self._rest else []
            tables.append(mx.view(mx.concatenate([n, *more]).reshape(-1), mx.uint32))
        self.table, self.inverse_table = tables
        mx.eval(self._numbers, self._conjugates, *self._rest, *tables)

    def rotate(self, x: mx.array) -> mx.array:
        return self._turn(x, self._numbers, 0)

    def unrotate(self, y: mx.array) -> mx.array:
        return self._turn(y, self._conjugates, 1)

    def _turn(self, x: mx.array, numbers: mx.array, which: int) -> mx.array:
        lead, whole = x.shape[:-1], self.dim // self.size * self.size
        blocks = x[..., :whole].reshape(*lead, -1, self.size)
        turned = self._turn_blocks(numbers, blocks).reshape(*lead, whole)
        if whole == self.dim:
            return turned
        last = x[..., whole:]
        if self._rest:
            last = _product(self._rest[which], last[..., None, :])[..., 0, :]
        return mx.concatenate([turned, last], axis=-1)


FAMILIES: dict[str, tuple[int, Callable[[int, int], np.ndarray]]] = {
    "planar": (2, _unit_complex),
    "iso": (4, _unit_quaternions),
    "isofull": (4, _quaternion_pairs),
    "rotor": (3, _rotors),
}


@cache
def _rotation(family: str, dim: int) -> BlockRotation:
    size, draw = FAMILIES[family]
    rest = _unit_complex(1, SEED + 1) if dim % size == 2 else None
    return BlockRotation(dim, size, draw(dim // size, SEED), rest)


def _make(family: str, bits: int, dim: int) -> Codec:
    return RotatedCodec(f"{family}{bits}", dim, _rotation(family, dim), Scalar(bits, dim))


CODECS = {
    f"{family}{bits}": (lambda dim, family=family, bits=bits: _make(family, bits, dim))
    for family in FAMILIES
    for bits in (2, 3, 4)
}
