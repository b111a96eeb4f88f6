"""The attention twin against NumPy's softmax over concatenated keys, and against MLX's own attention."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor import RotorError, kernels
from mlx_rotor.cache.rows import ExactRun
from mlx_rotor.kernels import reference


def runs(lengths, kv_heads, d, dv, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda n, w: mx.array(rng.standard_normal((2, kv_heads, n, w)).astype(np.float32))  # noqa: E731
    return [ExactRun(make(n, d), make(n, dv)) for n in lengths]


def expected(q, parts, scale, seen=None, add=None, sinks=None):
    """Float64 NumPy attention; seen: bool or None, add: additive mask or None, both [.., L, S]."""
    q = np.array(q, np.float64)
    k, v = (np.concatenate([np.array(getattr(p, s), np.float64) for p in parts], 2) for s in ("k", "v"))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if seen is not None:
        scores = np.where(seen, scores, -np.inf)
    if add is not None:
        scores = scores + add
    if sinks is not None:
        column = np.broadcast_to(np.array(sinks, np.float64)[None, :, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, column], -1)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e30))
        weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return weights[..., : k.shape[2]] @ v


@pytest.fixture(params=[None, 7], ids=["one tile", "tiles of 7"])
def tile(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(reference, "MIN_TILE", request.param)
        monkeypatch.setattr(reference, "MAX_TILE", request.param)


@pytest.mark.parametrize("lengths", [[1], [4, 33, 9], [20, 20], [0, 5, 0]])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("rows", [1, 5])
def test_causal(tile, lengths, heads, kv_heads, rows):
    parts, total = runs(lengths, kv_heads, 32, 16), sum(lengths)
    rows = min(rows, total)
    q = mx.array(np.random.default_rng(1).standard_normal((2, heads, rows, 32)).astype(np.float32))
    seen = np.arange(total - rows, total)[:, None] >= np.arange(total)[None]
    out = reference.attend(q, parts, scale=0.2, mask="causal" if rows > 1 else None)
    assert out.shape == (2, heads, rows, 16)
    assert np.allclose(np.array(out), expected(q, parts, 0.2, seen), atol=2e-5)


def test_array_masks_and_sinks(tile):
    parts = runs([3, 30, 11], 2, 32, 32)
    rng = np.random.default_rng(2)
    q = mx.array(rng.standard_normal((2, 6, 4, 32)).astype(np.float32))
    seen = rng.random((2, 1, 4, 44)) < 0.6
    add = rng.standard_normal((4, 44)).astype(np.float32)
    sinks = mx.array(rng.standard_normal(6).astype(np.float32))
    for kwargs, truth in (
        ({"mask": mx.array(seen)}, {"seen": seen}),
        ({"mask": mx.array(add)}, {"add": add}),
        ({"sinks": sinks}, {"sinks": sinks}),
        ({"mask": mx.array(seen), "sinks": sinks}, {"seen": seen, "sinks": sinks}),
    ):
        out = reference.attend(q, parts, scale=0.3, **kwargs)
        assert np.allclose(np.array(out), expected(q, parts, 0.3, **truth), atol=2e-5), truth.keys()


def test_agrees_with_mlx():
    parts = runs([4, 60, 36], 2, 64, 64)
    q = mx.random.normal((2, 8, 5, 64))
    k, v = (mx.concatenate([getattr(p, s) for p in parts], 2) for s in ("k", "v"))
    sinks = mx.random.normal((8,))
    for kwargs in ({"mask": "causal"}, {"mask": None}, {"mask": "causal", "sinks": sinks}):
        theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.1, **kwargs)
        assert mx.allclose(reference.attend(q, parts, scale=0.1, **kwargs), theirs, atol=1e-5)


def test_rows_and_tiles_that_see_nothing(tile):
    parts = runs([40], 2, 32, 32)
    q = mx.random.normal((2, 2, 3, 32))
    seen = np.zeros((3, 40), bool)
    seen[1, 30:] = True
    out = np.array(reference.attend(q, parts, scale=1.0, mask=mx.array(seen)))
    assert np.array_equal(out[:, :, [0, 2]], np.zeros_like(out[:, :, [0, 2]]))
    assert np.allclose(out[:, :, 1], expected(q, parts, 1.0, seen)[:, :, 1], atol=2e-5)


def test_dtype_is_the_queries():
    parts = runs([10], 2, 32, 32)
    assert reference.attend(mx.ones((2, 2, 1, 32), mx.bfloat16), parts, scale=1.0).dtype == mx.bfloat16


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("MLX_ROTOR_BACKEND", "vulkan")
    with pytest.raises(RotorError, match="vulkan"):
        kernels.attend(mx.ones((2, 2, 1, 32)), runs([3], 2, 32, 32), scale=1.0)
