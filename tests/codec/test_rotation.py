"""Rotations against NumPy's matrices and quaternion products."""

import mlx.core as mx
import numpy as np
import pytest
from samples import DIMS, gaussian

from mlx_rotor import RotorError, codec
from mlx_rotor.codec.blocks import SEED
from mlx_rotor.codec.rotation import TwoSignHadamard, signs, takes_hadamard, uniforms

FAMILIES = ("turbo", "trellis", "planar", "iso", "isofull", "rotor")
BLOCKS = {"planar": 2, "iso": 4, "isofull": 4, "rotor": 3}


def rotation(family, dim):
    return codec.get(f"{family}4", dim).rotation


def matrix(family, dim):
    """The rotation as a float64 matrix: y = M x."""
    return np.array(rotation(family, dim).rotate(mx.eye(dim)), np.float64).T


def split_mix(seed):
    """The first outputs of SplitMix64 for seed 0, from its reference implementation."""
    assert seed == 0
    return (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)


def test_signs_and_uniforms_are_splitmix64():
    assert signs(0, 4).tolist() == [1.0 if x & 1 else -1.0 for x in split_mix(0)]
    assert uniforms(0, 4).tolist() == [(x >> 11) / 2**53 for x in split_mix(0)]


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_hadamard_is_sylvesters_between_its_signs(dim):
    x = np.random.default_rng(0).standard_normal((7, dim)).astype(np.float32)
    expected = (x * signs(42, dim)) @ sylvester(dim) / np.sqrt(dim) * signs(43, dim)
    assert np.allclose(np.array(TwoSignHadamard(dim, 42).rotate(mx.array(x))), expected, atol=2e-5)


@pytest.mark.parametrize("dim", (80, 96, 112, 192))
def test_hadamard_of_other_sizes_spreads_a_channel_evenly(dim):
    assert np.allclose(np.abs(matrix("turbo", dim)), dim**-0.5, atol=1e-6)


def from_signs(table, dim):
    """The matrix that a kernel's table stands for: outer ⊗ Sylvester's between two signs, all of them as bits."""
    order = 4 * (dim // (dim & -dim)) if dim & (dim - 1) else 0

    def rows(words, m):
        bits = words.reshape(-1, -(-m // 32))[:, :, None] >> np.arange(32, dtype=np.uint32) & 1
        return 1.0 - 2.0 * bits.reshape(len(bits), -1)[:, :m]

    n = -(-dim // 32)
    first, second = rows(table[: 2 * n], dim)
    outer = rows(table[2 * n : 2 * n + order], order) if order else np.ones((1, 1))
    assert len(table) >= 8
    return second[:, None] * np.kron(outer, sylvester(dim // max(order, 1))) * first / np.sqrt(dim)


@pytest.mark.parametrize("dim", DIMS)
def test_hadamards_tables_for_kernels_are_the_same_matrices(dim):
    r = rotation("turbo", dim)
    assert np.allclose(from_signs(np.array(r.table), dim), matrix("turbo", dim), atol=1e-5)
    assert np.allclose(from_signs(np.array(r.inverse_table), dim), matrix("turbo", dim).T, atol=1e-5)


@pytest.mark.parametrize("dim", (36, 72, 100, 130))
def test_a_size_hadamard_has_not_is_named(dim):
    assert not takes_hadamard(dim)
    with pytest.raises(RotorError, match=str(dim)):
        TwoSignHadamard(dim, 42)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rotations_are_orthogonal_and_inverted(family, dim):
    m = matrix(family, dim)
    assert np.allclose(m @ m.T, np.eye(dim), atol=1e-5)
    x, r = gaussian(9, dim), rotation(family, dim)
    assert mx.allclose(r.unrotate(r.rotate(x)), x, atol=1e-5)
    assert mx.allclose(r.rotate(r.unrotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("family", BLOCKS)
def test_block_rotations_turn_each_block_by_itself(family, dim):
    m, size = matrix(family, dim), BLOCKS[family]
    blocks = [m[i : i + size, i : i + size] for i in range(0, dim, size)]
    outside = m.copy()
    for i in range(0, dim, size):
        outside[i : i + size, i : i + size] = 0
    assert not outside.any()
    assert [len(b) for b in blocks] == [size] * (dim // size) + [dim % size] * (dim % size > 0)
    assert np.allclose([np.linalg.det(b) for b in blocks], 1, atol=1e-5)
    assert len({tuple(b.round(4).ravel()) for b in blocks}) == len(blocks)


@pytest.mark.parametrize("family", BLOCKS)
def test_block_tables_for_kernels_are_numbers_of_length_one_and_their_conjugates(family):
    for dim in (64, 80, 96):
        tables = (rotation(family, dim).table, rotation(family, dim).inverse_table)
        parts, sides, rest = 2 if family == "planar" else 4, 1 + (family == "isofull"), dim % BLOCKS[family] == 2
        numbers, inverse = (np.array(mx.view(t, mx.float32)).reshape(-1, parts) for t in tables)
        assert np.allclose((numbers**2).sum(-1), 1, atol=1e-6) and len(numbers) == dim // BLOCKS[family] * sides + rest
        assert np.array_equal(inverse, numbers * np.array([1, -1, -1, -1], np.float32)[:parts])


def quaternion_product(a, b):
    """Hamilton's product of (w, x, y, z), from i² = j² = k² = ijk = -1 by scalar and vector parts."""
    w = a[..., 0] * b[..., 0] - (a[..., 1:] * b[..., 1:]).sum(-1)
    v = a[..., :1] * b[..., 1:] + b[..., :1] * a[..., 1:] + np.cross(a[..., 1:], b[..., 1:])
    return np.concatenate([w[..., None], v], -1)


def test_planar_is_a_product_of_complex_numbers():
    x = np.array(gaussian(5, 128), np.float64)
    turned = np.array(rotation("planar", 128).rotate(mx.array(x.astype(np.float32))), np.float64)
    unit = np.exp(2j * np.pi * uniforms(SEED, 64))
    expected = unit * (x[:, 0::2] + 1j * x[:, 1::2])
    assert np.allclose(turned[:, 0::2] + 1j * turned[:, 1::2], expected, atol=1e-5)


def test_iso_is_a_left_product_of_unit_quaternions():
    r = rotation("iso", 128)
    x = np.array(gaussian(5, 128), np.float64).reshape(5, 32, 4)
    one = np.tile(np.float32([1, 0, 0, 0]), 32)
    q = np.array(r.rotate(mx.array(one)), np.float64).reshape(32, 4)
    assert np.allclose((q**2).sum(-1), 1, atol=1e-6) and abs(q.mean()) < 0.15
    turned = np.array(r.rotate(mx.array(x.reshape(5, 128).astype(np.float32)))).reshape(5, 32, 4)
    assert np.allclose(turned, quaternion_product(q, x), atol=1e-5)


def test_isofull_is_a_product_with_unit_quaternions_from_both_sides():
    r = rotation("isofull", 80)
    numbers = np.array(mx.view(r.table, mx.float32), np.float64).reshape(20, 2, 4)
    left, right = numbers[:, 0], numbers[:, 1]
    x = np.array(gaussian(5, 80), np.float64).reshape(5, 20, 4)
    turned = np.array(r.rotate(mx.array(x.reshape(5, 80).astype(np.float32)))).reshape(5, 20, 4)
    assert np.allclose(turned, quaternion_product(quaternion_product(left, x), right), atol=1e-5)
    # The left one alone is the fast form; the right ones are others.
    alone = np.array(rotation("iso", 80).rotate(mx.array(x.reshape(5, 80).astype(np.float32)))).reshape(5, 20, 4)
    assert np.allclose(alone, quaternion_product(left, x), atol=1e-5)
    assert len({tuple(q.round(4)) for q in numbers.reshape(40, 4)}) == 40


def test_rotor_is_a_sandwich_about_random_axes():
    r = rotation("rotor", 192)
    t, height, around = uniforms(SEED, 3 * 64).reshape(3, 64)
    axis = np.stack(
        [
            np.sqrt(1 - (2 * height - 1) ** 2) * np.cos(2 * np.pi * around),
            np.sqrt(1 - (2 * height - 1) ** 2) * np.sin(2 * np.pi * around),
            2 * height - 1,
        ],
        -1,
    )
    q = np.concatenate([np.cos(np.pi * t)[:, None], np.sin(np.pi * t)[:, None] * axis], -1)
    conjugate = q * [1, -1, -1, -1]
    x = np.array(gaussian(5, 192), np.float64).reshape(5, 64, 3)
    pure = np.concatenate([np.zeros((5, 64, 1)), x], -1)
    expected = quaternion_product(quaternion_product(q, pure), conjugate)
    turned = np.array(r.rotate(mx.array(x.reshape(5, 192).astype(np.float32)))).reshape(5, 64, 3)
    assert np.allclose(expected[..., 0], 0, atol=1e-9)
    assert np.allclose(turned, expected[..., 1:], atol=1e-5)
