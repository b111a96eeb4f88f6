"""affine4 and affine8 hold what mx.quantize makes, and nothing more."""

import mlx.core as mx
import numpy as np
import pytest
from samples import gaussian

from mlx_rotor import codec


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
@pytest.mark.parametrize("dim", (64, 96, 128, 192, 256))
@pytest.mark.parametrize("bits", (4, 8))
def test_words_are_mlxs_codes_then_its_scales_and_biases(bits, dim, dtype):
    c, group = codec.get(f"affine{bits}", dim), 64 if dim % 64 == 0 else 32
    x = gaussian(30, dim).reshape(2, 5, 3, dim).astype(dtype).swapaxes(1, 2)
    packed = c.encode(x)
    codes, scales, biases = mx.quantize(mx.contiguous(x).astype(mx.float16), group_size=group, bits=bits)
    groups = dim // group
    assert packed.words.shape == (2, 3, 5, codes.shape[-1] + groups) and packed.words.dtype == mx.uint32
    assert np.array_equal(np.array(packed.words[..., :-groups]), np.array(codes))
    pairs = np.array(packed.words[..., -groups:]).view(np.float16).reshape(2, 3, 5, groups, 2)
    assert np.array_equal(pairs[..., 0], np.array(scales)) and np.array_equal(pairs[..., 1], np.array(biases))
    want = mx.dequantize(codes, *(a.astype(mx.float32) for a in (scales, biases)), group_size=group, bits=bits)
    assert np.array_equal(np.array(c.decode(packed)), np.array(want))
    stored = sum(a.nbytes for a in (codes, scales, biases))
    assert packed.nbytes == stored and c.bits == 8 * stored / x.size


def test_values_no_half_holds_become_the_largest():
    x = mx.array(np.linspace(-1e6, 1e6, 64, dtype=np.float32)[None])
    got = np.array(codec.get("affine4", 64).decode(codec.get("affine4", 64).encode(x)))
    assert np.isfinite(got).all() and got.max() == pytest.approx(65504, rel=1e-3)
