"""NumPy's products in place of MLX's on the CPU: the same numbers, masks and heads; nothing else is touched."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_rotor.host import streamed

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="NumPy computes on the CPU only")


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize(("heads", "shared", "length", "keys", "values"), [(6, 2, 9, 9, 16), (4, 4, 3, 7, 8)])
def test_attention_is_mlxs(kind, heads, shared, length, keys, values):
    mx.random.seed(3)
    q = mx.random.normal((2, length, heads, 16)).swapaxes(1, 2)  # not contiguous, as models give them
    k, v = mx.random.normal((2, shared, keys, 16)), mx.random.normal((2, shared, keys, values))
    lower = mx.array(np.tri(length, keys, keys - length, dtype=bool))
    mask = {"none": None, "causal": "causal", "bool": lower, "added": mx.random.normal((heads, length, keys))}[kind]
    stock = mx.fast.scaled_dot_product_attention
    expected = stock(q, k, v, scale=0.3, mask=mask)
    with streamed.attention():
        assert mx.fast.scaled_dot_product_attention is not stock
        got = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    assert mx.fast.scaled_dot_product_attention is stock
    assert got.shape == expected.shape and mx.abs(got - expected).max().item() < 2e-6


def test_attention_with_sinks_or_other_types_is_mlxs_own():
    q = mx.random.normal((1, 2, 4, 8))
    for x, more in ((q, {"sinks": mx.array([0.5, -1.0])}), (q.astype(mx.float16), {})):
        expected = mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, **more)
        with streamed.attention():
            got = mx.fast.scaled_dot_product_attention(x, x, x, scale=1.0, **more)
        assert got.dtype == expected.dtype and mx.array_equal(got, expected)


@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_are_stood_in_for(bias):
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.packed = nn.Linear(32, 24, bias=bias), nn.QuantizedLinear(64, 8)

    part, x = Part(), mx.random.normal((2, 5, 32))
    found = streamed.linears("model.layers.0", part)
    assert list(found) == ["model.layers.0.proj"]
    stand_in = found["model.layers.0.proj"]
    assert isinstance(stand_in, nn.Linear) and stand_in.weight is part.proj.weight
    assert mx.allclose(stand_in(x), part.proj(x), atol=1e-5)


def test_half_precision_products_are_mlxs():
    x, weight = mx.random.normal((3, 8)).astype(mx.bfloat16), mx.random.normal((4, 8)).astype(mx.bfloat16)
    assert mx.array_equal(streamed.product(x, weight), x @ weight.T)
