"""8-bit floats: every code, every tie and the limits against values built here from the format's definition."""

import math

import mlx.core as mx
import numpy as np
import pytest
from samples import gaussian, relative_error

from mlx_rotor import RotorError, codec
from mlx_rotor.codec.fields import unpack
from mlx_rotor.codec.fp8 import values


def value(code):
    """What a code stands for: sign, four bits of exponent with bias 7, three of mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = math.ldexp(mantissa / 8, -6) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)
    return -size if sign else size


SIZES = np.array([value(code) for code in range(127)])  # from 0 to 448, ascending with the code


def nearest_even(x):
    """Codes of float64 x [n]: the nearest value's, the even one of two that are equally near, and 448 for what is
    above."""
    size = np.minimum(np.abs(x), 448)
    upper = np.searchsorted(SIZES, size).clip(1)
    below, above = size - SIZES[upper - 1], SIZES[upper] - size
    code = np.where((above < below) | ((above == below) & (upper % 2 == 0)), upper, upper - 1)
    return np.where((x < 0) & (code > 0), code + 128, code)


def codes(c, x):
    """Codes [n] of x [n], through the codec's words."""
    padded = np.zeros(-(-len(x) // c.dim) * c.dim, np.float32)
    padded[: len(x)] = x
    packed = c.encode(mx.array(padded.reshape(-1, c.dim)))
    return np.array(unpack(packed.words, 8, c.dim)).reshape(-1)[: len(x)]


def test_values_are_the_formats():
    assert SIZES[-1] == 448 and SIZES[1] == 2**-9 and SIZES[8] == 2**-6 and (np.diff(SIZES) > 0).all()
    assert values().tolist() == [value(code) for code in range(256)]
    numbers = [code for code in range(256) if code & 127 != 127]  # 127 and 255 are NaN elsewhere, and never made
    assert np.array_equal(values()[numbers], np.array(mx.from_fp8(mx.array(numbers, mx.uint8), mx.float32)))


def test_every_value_has_its_code():
    assert np.array_equal(codes(codec.get("fp8", 64), SIZES), np.arange(127))
    assert np.array_equal(codes(codec.get("fp8", 64), -SIZES[1:]), np.arange(129, 255))


def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearer():
    ties = ((SIZES[1:] + SIZES[:-1]) / 2).astype(np.float32)
    assert np.array_equal(codes(codec.get("fp8", 64), ties) % 2, np.zeros(126))
    for x in (ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))):
        for sign in (1, -1):
            got = codes(codec.get("fp8", 64), sign * x)
            assert np.array_equal(got, nearest_even(sign * x.astype(np.float64)))


def test_every_half_precision_number_goes_to_the_nearest():
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)].astype(np.float32)
    assert np.array_equal(codes(codec.get("fp8", 128), x), nearest_even(x.astype(np.float64)))


def test_beyond_the_largest_is_the_largest_and_zero_has_one_code():
    x = np.array([449, 464, 480, 1e9, np.inf, -449, -np.inf, 0.0, -0.0, -1e-5, 2**-10, -(2**-10), np.nan], np.float32)
    assert codes(codec.get("fp8", 64), x).tolist() == [126] * 5 + [254] * 2 + [0] * 5 + [126]


@pytest.mark.parametrize("scale", [0.03125, 3.0, 0.017, 1e-4])
def test_a_scale_moves_the_range(scale):
    c = codec.get(f"fp8:{scale}", 80)
    assert (c.name, c.bits, c.tile_words) == (f"fp8:{scale}", 8.0, 640)
    x = gaussian(200, 80) * (64 * scale)
    assert relative_error(x, c.decode(c.encode(x))) == pytest.approx(7.1e-4, rel=0.03)
    assert np.array(c.decode(c.encode(mx.full((1, 80), 1000 * scale)))) == pytest.approx(448 * scale, rel=1e-6)
    assert c.kernel.root == pytest.approx(1 / scale, rel=1e-7) and c.kernel.back == pytest.approx(scale, rel=1e-7)
    assert c.kernel.quantizer == codec.get("fp8", 80).kernel.quantizer  # one kernel for all scales
    if math.log2(scale).is_integer():
        exact = mx.array((SIZES[:80] * scale).astype(np.float32)[None])
        assert np.array_equal(np.array(c.decode(c.encode(exact))), np.array(exact))


def test_equal_scales_have_equal_names():
    assert codec.with_parameter("fp8", 1) == "fp8" and codec.with_parameter("fp8", 0.5) == "fp8:0.5"
    for text, name in {"1.0": "fp8", "1": "fp8", "0.50": "fp8:0.5", "5e-1": "fp8:0.5", " 2": "fp8:2.0"}.items():
        with pytest.raises(RotorError, match=f"is written '{name}'"):
            codec.get(f"fp8:{text}", 64)
    assert codec.get("fp8:2.0", 64).name == "fp8:2.0"
    assert "fp8" in codec.names() and not any(":" in name for name in codec.names())


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "0", "0.0", "-1.0", "1:2"])
def test_a_scale_that_is_none_is_named(text):
    with pytest.raises(RotorError, match="must be a finite number above 0"):
        codec.get(f"fp8:{text}", 64)


@pytest.mark.parametrize("scale", ["1e-31", "1e+31"])
def test_a_scale_whose_inverse_is_no_float32_is_refused(scale):
    with pytest.raises(RotorError, match="from 1e-30 to 1e\\+30"):
        codec.get(f"fp8:{scale}", 64)


@pytest.mark.parametrize("name", ["turbo4", "affine4", "raw32"])
def test_other_codecs_take_no_parameter(name):
    with pytest.raises(RotorError, match=f"codec {name} takes no parameter .* those that do: fp8"):
        codec.get(f"{name}:0.5", 64)
