"""Codecs against independent truths: published tables, NumPy's Hadamard matrix, the storage formula."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor import RotorError, codec
from mlx_rotor.codec.levels import TABLES, lloyd_max, solve
from mlx_rotor.codec.packing import pack, unpack
from mlx_rotor.codec.rotation import TwoSignHadamard, signs

NAMES = [name for name in codec.names() if name.startswith("turbo")]
DIMS = (64, 80, 96, 112, 128, 192, 256)
# Lloyd–Max for the d = 128 Beta density and, in the limit, for N(0, 1) (Max 1960, table I).
PUBLISHED_128 = {
    2: (0.45245, 1.50519),
    3: (0.24442, 0.75333, 1.3366, 2.13147),
    4: (0.12787, 0.38638, 0.65362, 0.9371, 1.24777, 1.60434, 2.04593, 2.68886),
}
GAUSSIAN = {2: (0.4528, 1.510), 3: (0.2451, 0.7560, 1.344, 2.152)}


def gaussian(n, dim, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def relative_error(x, y):
    x, y = np.array(x, np.float64), np.array(y, np.float64)
    return ((x - y) ** 2).sum() / (x**2).sum()


@pytest.mark.parametrize("bits", PUBLISHED_128)
def test_levels_are_the_published_ones(bits):
    assert lloyd_max(bits, 128)[2 ** (bits - 1) :] == pytest.approx(PUBLISHED_128[bits], abs=2e-5)


@pytest.mark.parametrize("bits", GAUSSIAN)
def test_levels_tend_to_the_gaussian_ones(bits):
    assert solve(bits, 100_000) == pytest.approx(GAUSSIAN[bits], abs=2e-3)


@pytest.mark.parametrize("dim", TABLES)
def test_frozen_tables_are_what_the_solver_finds(dim):
    for bits, half in TABLES[dim].items():
        assert solve(bits, dim) == pytest.approx(half, abs=1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dim", (16, 80, 128))
def test_packing_is_lossless_and_as_documented(bits, dim):
    index = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, dim))
    planes = pack(mx.array(index), bits)
    assert planes.nbytes * 8 == index.size * bits
    assert np.array_equal(np.array(unpack(planes)), index)
    words, width = np.array(planes), 8 * planes.dtype.size
    for plane, t in ((0, 0), (bits - 1, dim - 1), (bits // 2, dim // 2)):
        assert (words[1, 2, plane, t // width] >> (t % width)) & 1 == (index[1, 2, t] >> plane) & 1


def test_signs_are_splitmix64():
    # First outputs of SplitMix64 for seed 0, from its reference implementation; the sign is the lowest bit.
    first = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC)
    assert signs(0, 4).tolist() == [1.0 if x & 1 else -1.0 for x in first]


def sylvester(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_hadamard_is_sylvesters_between_its_signs(dim):
    rotation = TwoSignHadamard(dim, 42)
    x = np.random.default_rng(0).standard_normal((7, dim)).astype(np.float32)
    expected = (x * signs(42, dim)) @ sylvester(dim) / np.sqrt(dim) * signs(43, dim)
    assert np.allclose(np.array(rotation.rotate(mx.array(x))), expected, atol=2e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_rotation_is_orthogonal_and_inverted(dim):
    rotation = TwoSignHadamard(dim, 42)
    matrix = np.array(rotation.rotate(mx.eye(dim)))
    assert np.allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)
    x = gaussian(9, dim)
    assert mx.allclose(rotation.unrotate(rotation.rotate(x)), x, atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_storage_is_what_bits_says(name, dim):
    c = codec.get(name, dim)
    packed = c.encode(gaussian(40, dim))
    assert packed.nbytes * 8 == pytest.approx(40 * dim * c.bits)
    assert c.bits == pytest.approx(c.index_bits + 16 / dim)


@pytest.mark.parametrize(("name", "published"), [("turbo2", 0.1155), ("turbo3", 0.0337), ("turbo4", 0.0092)])
def test_distortion_at_128(name, published):
    x = gaussian(4000, 128)
    c = codec.get(name, 128)
    assert relative_error(x, c.decode(c.encode(x))) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("name", NAMES)
def test_scores_in_the_codecs_basis_are_scores_of_the_decoded(name, dim):
    c, x, q = codec.get(name, dim), gaussian(50, dim), gaussian(3, dim, 1)
    packed = c.encode(x)
    inside = c.rotate(q) @ c.decode_rotated(packed).T
    assert mx.allclose(inside, q @ c.decode(packed).T, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_scale_is_least_squares(name):
    c, x = codec.get(name, 128), gaussian(20, 128) * 3
    packed = c.encode(x)
    best = relative_error(x, c.decode(packed))
    for factor in (0.97, 1.03):
        off = codec.Packed(packed.planes, packed.scale * factor)
        assert relative_error(x, c.decode(off)) > best


@pytest.mark.parametrize("name", NAMES)
def test_outlier_channels_cost_nothing(name):
    c = codec.get(name, 128)
    x = np.random.default_rng(0).standard_normal((500, 128)).astype(np.float32)
    plain = relative_error(x, c.decode(c.encode(mx.array(x))))
    x[:, [3, 40, 77, 101]] *= 6
    assert relative_error(x, c.decode(c.encode(mx.array(x)))) < 1.15 * plain


@pytest.mark.parametrize("name", NAMES)
def test_zero_and_tiny_and_huge_vectors(name):
    c = codec.get(name, 64)
    assert not np.array(c.decode(c.encode(mx.zeros((2, 64))))).any()
    for size in (1e-3, 1e4):
        x = gaussian(20, 64) * size
        assert relative_error(x, c.decode(c.encode(x))) < 0.2


def test_half_precision_input_is_taken():
    x = gaussian(10, 128)
    for dtype in (mx.float16, mx.bfloat16):
        y = codec.get("turbo4", 128).decode(codec.get("turbo4", 128).encode(x.astype(dtype)))
        assert y.dtype == mx.float32 and relative_error(x, y) < 0.012


@pytest.mark.parametrize("dim", (100, 72, 40, 130))
def test_a_dimension_no_rotation_takes_is_named(dim):
    with pytest.raises(RotorError, match=str(dim)):
        codec.get("turbo4", dim)


def test_unknown_codec_lists_the_known():
    with pytest.raises(RotorError, match="turbo2, turbo3, turbo4"):
        codec.get("turbo5", 128)
