"""Every codec against what a codec promises, and against published distortions."""

import mlx.core as mx
import numpy as np
import pytest
from samples import DIMS, gaussian, relative_error

from mlx_rotor import RotorError, codec
from mlx_rotor.kernels.packed import to_tiles

NAMES = [name for name in codec.names() if name != "raw32"]
SCALED = [name for name in NAMES if codec.get(name, 128).scaled]
SPREADING = [name for name in NAMES if name.startswith(("turbo", "trellis"))]
TURBO = {2: 0.1155, 3: 0.0337, 4: 0.0092}
TRELLIS = {2: 0.0860, 3: 0.0236, 4: 0.0063}
BARE = {"fp8": 7.1e-4, "affine4": 8.3e-3, "affine8": 2.9e-5}


def takes(name, dim):
    """MLX's groups need a multiple of 32."""
    return not name.startswith("affine") or dim % 32 == 0


EVERY = [(name, dim) for name in NAMES for dim in DIMS if takes(name, dim)]


def test_all_families_are_there():
    families = {"turbo", "trellis", "planar", "iso", "isofull", "rotor"}
    assert set(NAMES) == {f"{family}{bits}" for family in families for bits in (2, 3, 4)} | set(BARE)
    assert set(SCALED) == set(NAMES) - set(BARE)


@pytest.mark.parametrize("name", NAMES)
def test_distortion_at_128(name):
    c, x = codec.get(name, 128), gaussian(4000, 128)
    error = relative_error(x, c.decode(c.encode(x)))
    if name in BARE:
        assert error == pytest.approx(BARE[name], rel=0.02)
    elif name.startswith("trellis"):
        assert error <= TRELLIS[c.index_bits]
    else:
        assert error == pytest.approx(TURBO[c.index_bits], rel=0.01 if name.startswith("turbo") else 0.02)


@pytest.mark.parametrize(("name", "dim"), EVERY)
def test_storage_is_what_bits_says(name, dim):
    c = codec.get(name, dim)
    assert codec.get(name, dim) is c and (c.name, c.dim) == (name, dim)
    packed = c.encode(gaussian(16, dim).reshape(2, 8, dim))
    assert packed.words.shape[:2] == (2, 8)
    if c.scaled:
        assert packed.scale.shape == (2, 8) and packed.scale.dtype == mx.float16
        more = 16
    else:
        assert packed.scale is None
        more = 0 if name == "fp8" else 32 * dim // (64 if dim % 64 == 0 else 32)
    assert c.bits == c.index_bits + more / dim
    assert packed.nbytes * 8 == 16 * (dim * c.index_bits + more)
    assert to_tiles(packed.words).shape == (2, 1, c.tile_words)


@pytest.mark.parametrize("name", SCALED)
def test_a_mean_is_taken_off_in_the_codecs_basis(name):
    c, x = codec.get(name, 80), gaussian(40, 80)
    mean = c.rotate(gaussian(1, 80, 1) * 20)
    packed = c.encode(c.unrotate(c.rotate(x) + mean), mean)
    assert relative_error(x, c.decode(packed)) == pytest.approx(relative_error(x, c.decode(c.encode(x))), rel=0.02)


@pytest.mark.parametrize("name", BARE)
def test_codecs_without_a_scale_take_no_mean(name):
    with pytest.raises(RotorError, match=f"{name} takes no means"):
        codec.get(name, 128).encode(gaussian(2, 128), mx.zeros((1, 128)))


@pytest.mark.parametrize(("name", "dim"), EVERY)
def test_scores_in_the_codecs_basis_are_scores_of_the_decoded(name, dim):
    c, x, q = codec.get(name, dim), gaussian(20, dim), gaussian(3, dim, 1)
    packed = c.encode(x)
    inside = c.rotate(q) @ c.decode_rotated(packed).T
    assert mx.allclose(inside, q @ c.decode(packed).T, atol=1e-3)
    assert mx.allclose(c.unrotate(c.decode_rotated(packed)), c.decode(packed), atol=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_scale_is_least_squares(name):
    c, x = codec.get(name, 128), gaussian(20, 128) * 3
    packed = c.encode(x)
    best = relative_error(x, c.decode(packed))
    for factor in (0.97, 1.03):
        off = codec.Packed(packed.words, packed.scale * factor)
        assert relative_error(x, c.decode(off)) > best


@pytest.mark.parametrize("name", SPREADING)
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
        c = codec.get(codec.with_parameter(name, size) if name == "fp8" else name, 64)
        x = gaussian(20, 64) * size
        assert relative_error(x, c.decode(c.encode(x))) < 0.2
    beyond = c.encode(gaussian(3, 64) * 1e8)
    assert mx.isfinite(c.decode(beyond)).all()
    assert not c.scaled or (mx.isfinite(beyond.scale).all() and beyond.scale.max() == 65504)


@pytest.mark.parametrize("name", ["turbo4", "trellis4", "rotor4", "isofull4", "affine4", "fp8"])
def test_half_precision_input_is_taken(name):
    c, x = codec.get(name, 128), gaussian(10, 128)
    for dtype in (mx.float16, mx.bfloat16):
        y = c.decode(c.encode(x.astype(dtype)))
        assert y.dtype == mx.float32 and relative_error(x, y) < 0.012


@pytest.mark.parametrize("dim", (100, 72, 40, 130))
@pytest.mark.parametrize("name", NAMES)
def test_a_dimension_no_codec_takes_is_named(name, dim):
    with pytest.raises(RotorError, match=str(dim)):
        codec.get(name, dim)


def test_dimensions_that_mlx_has_no_groups_for_are_named():
    for dim in (80, 112):
        with pytest.raises(RotorError, match=f"affine4 can't take head dimension {dim}"):
            codec.get("affine4", dim)


@pytest.mark.parametrize("name", [name for name in NAMES if codec.get(name, 128).kernel])
def test_kernels_are_told_the_same_numbers(name):
    """The Metal types name the codec's own bits and dimension."""
    c = codec.get(name, 80)
    assert c.kernel.quantizer.name.endswith("E4m3<80>" if name == "fp8" else f"<{c.index_bits}, 80>")
    assert "80" in c.kernel.rotation.name
    assert (c.kernel.table.dtype, c.kernel.inverse.dtype) == (mx.uint32, mx.uint32)
    assert c.kernel.root == pytest.approx(80**-0.5 if name in SPREADING else 1.0, rel=1e-6)
    assert c.kernel.back == c.kernel.root


def test_what_runs_as_mlx_operations():
    assert [name for name in NAMES if codec.get(name, 128).kernel is None] == ["affine4", "affine8"]


def test_unknown_codec_lists_the_known():
    with pytest.raises(RotorError, match="trellis4, turbo2, turbo3, turbo4"):
        codec.get("turbo5", 128)
