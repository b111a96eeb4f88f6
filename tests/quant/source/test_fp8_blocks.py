import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.errors import RotorError
from mlx_rotor.quant.source.checkpoint import dequantize

FINITE = np.array([c for c in range(256) if c & 127 != 127], np.uint8)


def test_every_finite_code_has_its_value(fp8_table):
    codes = mx.array(FINITE[None])
    values = dequantize(codes, mx.ones((1, 2)), (128, 128))
    assert values.dtype == mx.float32
    np.testing.assert_array_equal(np.array(values)[0], fp8_table[FINITE])


@pytest.mark.parametrize("shape", [(256, 128), (1, 1), (130, 257), (127, 128), (128, 129), (300, 64)])
@pytest.mark.parametrize("block", [(128, 128), (64, 32)])
def test_each_block_has_its_factor_up_to_ragged_edges(shape, block, fp8_table):
    rng = np.random.default_rng(0)
    codes = rng.choice(FINITE, shape)
    factors = rng.uniform(1e-4, 2.0, [-(-n // b) for n, b in zip(shape, block, strict=True)]).astype(np.float32)
    expected = np.empty(shape, np.float32)
    for i in range(shape[0]):
        for j in range(shape[1]):
            expected[i, j] = fp8_table[codes[i, j]] * factors[i // block[0], j // block[1]]
    np.testing.assert_array_equal(np.array(dequantize(mx.array(codes), mx.array(factors), block)), expected)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_is_an_error_that_names_the_tensor(code):
    codes = np.zeros((4, 4), np.uint8)
    codes[3, 2] = code
    with pytest.raises(RotorError, match=r"layers\.5\.w1.*NaN"):
        dequantize(mx.array(codes), mx.ones((1, 1)), (128, 128), "layers.5.w1")


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_an_error(factor):
    with pytest.raises(RotorError, match=r"weight.*infinite"):
        dequantize(mx.zeros((4, 4), mx.uint8), mx.array([[factor]]), (128, 128))


def test_factors_of_the_wrong_shape_are_an_error():
    with pytest.raises(RotorError, match=r"\(1, 1\).*128x128.*\(2, 1\)"):
        dequantize(mx.zeros((129, 4), mx.uint8), mx.ones((1, 1)), (128, 128))
