"""Least squares in MLX's affine format: never above mx.quantize in any group, whatever the group and what counts."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_rotor.errors import RotorError
from mlx_rotor.fit import rows as chunks
from mlx_rotor.quant import fit_affine
from mlx_rotor.quant.fit import pack
from mlx_rotor.quant.policy import BITS, GROUP_SIZES

KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "tails": lambda rng, n: rng.standard_t(2, n),
    "zero": lambda rng, n: np.zeros(n),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "two values": lambda rng, n: rng.choice(rng.standard_normal(2), n),
    "one": lambda rng, n: np.eye(1, n, rng.integers(n))[0] * rng.standard_normal(),
    "outlier": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 1e3, 1) * rng.standard_normal(n),
    "offset": lambda rng, n: rng.standard_normal(n) + 300,
    "positive": lambda rng, n: rng.exponential(size=n),
}
IMPORTANCES = {
    "alike": lambda rng, n: None,
    "log-normal": lambda rng, n: np.exp(rng.standard_normal(n)),
    "wild": lambda rng, n: 10.0 ** rng.uniform(-20, 20, n),
    "few": lambda rng, n: (rng.random(n) < 0.05).astype(float),
    "none": lambda rng, n: np.zeros(n),
}
cases = st.fixed_dictionaries(
    {
        "bits": st.sampled_from(BITS),
        "group_size": st.sampled_from(GROUP_SIZES),
        "fit": st.sampled_from(("search", "best")),
        "kinds": st.lists(st.sampled_from(sorted(KINDS)), min_size=4, max_size=4),
        "magnitude": st.sampled_from((1e-40, 1e-30, 1e-6, 1.0, 1e4, 1e36)),
        "importance": st.sampled_from(sorted(IMPORTANCES)),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def decoded(parts, bits, group_size):
    """What is stored, float64."""
    codes, scales, biases = parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32)
    return np.array(mx.dequantize(codes, scales, biases, group_size=group_size, bits=bits)).astype(np.float64)


def errors(w, parts, bits, group_size, importance=1.0):
    """[.., groups], float64."""
    squares = importance * (decoded(parts, bits, group_size) - np.array(w, np.float64)) ** 2
    return squares.reshape(*squares.shape[:-1], -1, group_size).sum(-1)


@settings(max_examples=120, deadline=None)
@given(cases)
def test_no_group_is_worse_than_with_mx_quantize(case):
    bits, size, rng = case["bits"], case["group_size"], np.random.default_rng(case["seed"])
    k = 2 * size
    w = np.stack([KINDS[kind](rng, k) for kind in case["kinds"]]) * case["magnitude"]
    w = mx.array(np.clip(w, -3e38, 3e38).astype(np.float32))
    importance = IMPORTANCES[case["importance"]](rng, k)
    ours = fit_affine(
        w,
        bits=bits,
        group_size=size,
        fit=case["fit"],
        importance=None if importance is None else mx.array(importance.astype(np.float32)),
    )
    counts = 1.0 if importance is None else importance
    mine = errors(w, ours, bits, size, counts)
    theirs = errors(w, mx.quantize(w.astype(mx.bfloat16), size, bits), bits, size, counts)
    # Decoding rounds to float32 once more: what is below that of the largest weight is not looked at.
    noise = np.abs(np.array(w, np.float64)).reshape(4, 2, size).max(-1) * 3e-7
    noise = noise**2 * np.broadcast_to(counts, (4, k)).reshape(4, 2, size).sum(-1)
    assert np.all(mine <= theirs * (1 + 1e-5) + noise)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fit", ("search", "best"))
def test_groups_without_spread_lose_what_rounding_the_bias_loses(bits, fit):
    w = np.random.default_rng(0).standard_normal((512, 1)) * 10.0 ** np.arange(-8, 8).repeat(32)[:, None]
    w = mx.array(np.repeat(w, 32, axis=1).astype(np.float32))
    found = decoded(fit_affine(w, bits=bits, group_size=32, fit=fit), bits, 32)
    np.testing.assert_allclose(found, np.array(w), rtol=2**-8)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_packing_is_mx_quantizes_own(bits, rows, groups, seed):
    # On a grid of whole numbers from 0 to 2**bits - 1, mx.quantize finds the codes themselves.
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, groups * 32)).astype(np.uint32)
    codes[:, ::32], codes[:, 1::32] = 0, 2**bits - 1
    words, scales, _ = mx.quantize(mx.array(codes.astype(np.float32)), 32, bits)
    downwards = np.repeat(np.array(scales) < 0, 32, -1)
    expected = np.where(downwards, 2**bits - 1 - codes, codes).astype(np.uint32)
    assert mx.array_equal(pack(mx.array(expected), bits), words)
    ours = fit_affine(mx.array(codes.astype(np.float32)), bits=bits, group_size=32)[0]
    assert mx.array_equal(ours, pack(mx.array(codes), bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_stacks_are_fitted_as_their_matrices_are(bits, group_size):
    w = mx.random.normal((3, 5, 256), key=mx.random.key(bits))
    importance = mx.exp(mx.random.normal((3, 1, 256), key=mx.random.key(1)))
    together = fit_affine(w, bits=bits, group_size=group_size, importance=importance)
    assert together[0].shape == (3, 5, 256 * bits // 32) and together[0].dtype == mx.uint32
    for part in together[1:]:
        assert part.shape == (3, 5, 256 // group_size) and part.dtype == mx.bfloat16
    for expert in range(3):
        alone = fit_affine(w[expert], bits=bits, group_size=group_size, importance=importance[expert, 0])
        assert all(mx.array_equal(a[expert], b) for a, b in zip(together, alone, strict=True))


def test_importance_broadcasts_as_arrays_do(monkeypatch):
    monkeypatch.setattr(chunks, "CPU_WEIGHTS", 300)
    w = mx.random.normal((2, 3, 4, 64), key=mx.random.key(0))
    for shape in ((64,), (1, 64), (4, 64), (3, 1, 64), (2, 1, 1, 64), (1, 3, 1, 64), (2, 1, 4, 64), (2, 3, 4, 64)):
        importance = mx.exp(2 * mx.random.normal(shape, key=mx.random.key(1)))
        full = mx.broadcast_to(importance, w.shape)
        short, long = (fit_affine(w, bits=2, importance=i) for i in (importance, mx.contiguous(full)))
        assert all(mx.array_equal(a, b) for a, b in zip(short, long, strict=True)), shape


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_what_counts_more_loses_less(bits):
    w = mx.random.normal((64, 256), key=mx.random.key(0))
    importance = np.exp(1.5 * np.random.default_rng(0).standard_normal(256))
    plain, heeded = (
        errors(w, fit_affine(w, bits=bits, importance=i), bits, 64, importance).sum()
        for i in (None, mx.array(importance.astype(np.float32)))
    )
    assert heeded < 0.75 * plain


def test_weights_that_do_not_count_are_free():
    # The first half lies on four values that the second half's range would make impossible to hit.
    rng = np.random.default_rng(0)
    w = np.where(np.arange(64) < 32, rng.choice([0.0, 0.25, 0.5, 0.75], (8, 64)), 100 * rng.standard_normal((8, 64)))
    importance = mx.array((np.arange(64) < 32).astype(np.float32))
    found = decoded(fit_affine(mx.array(w.astype(np.float32)), bits=2, importance=importance), 2, 64)
    np.testing.assert_array_equal(found[:, :32], w[:, :32])


def test_the_dtype_of_scales_is_the_callers():
    w = mx.random.normal((32, 128), key=mx.random.key(0))
    lost = []
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        parts = fit_affine(w, bits=8, dtype=dtype)
        assert parts[1].dtype == parts[2].dtype == dtype
        lost.append(errors(w, parts, 8, 64).sum())
    assert lost[2] <= lost[1] * 1.001 and lost[1] < lost[0] * 0.99


@pytest.mark.parametrize("dtype", (mx.bfloat16, mx.float16))
def test_weights_may_have_any_dtype(dtype):
    w = mx.random.normal((4, 64), key=mx.random.key(0)).astype(dtype)
    for a, b in zip(fit_affine(w, bits=3), fit_affine(w.astype(mx.float32), bits=3), strict=True):
        assert mx.array_equal(a, b)


def test_one_row_needs_no_leading_axis():
    w = mx.random.normal((64,), key=mx.random.key(0))
    codes, scales, _ = fit_affine(w, bits=4, importance=mx.ones((64,)))
    assert codes.shape == (8,) and scales.shape == (1,)


@pytest.mark.parametrize(
    ("shape", "options", "text"),
    [
        ((4, 64), {"bits": 7}, "no affine format of 7 bits in groups of 64"),
        ((4, 64), {"bits": 4, "group_size": 16}, "no affine format of 4 bits in groups of 16"),
        ((4, 96), {"bits": 4}, "group_size 64 does not divide 96"),
        ((0, 64), {"bits": 4}, "no weights to fit"),
        ((4, 64), {"bits": 4, "fit": "slow"}, "unknown fit 'slow'; fits: fast, search, best"),
        ((4, 64), {"bits": 4, "importance": mx.ones((32,))}, r"importance \(32,\) does not broadcast to"),
        ((4, 64), {"bits": 4, "importance": mx.ones((3, 64))}, r"importance \(3, 64\) does not broadcast to"),
        ((4, 64), {"bits": 4, "importance": mx.ones((1, 4, 64))}, r"importance \(1, 4, 64\) does not broadcast to"),
    ],
)
def test_bad_calls_say_what_is_wrong(shape, options, text):
    with pytest.raises(RotorError, match=text):
        fit_affine(mx.zeros(shape), **options)
