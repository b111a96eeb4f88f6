"""Codebooks a group: least squares whatever the group and what counts, then as long as what was there."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit_affine import IMPORTANCES, KINDS

from mlx_rotor.errors import RotorError
from mlx_rotor.experts.formats import get
from mlx_rotor.fit import rows as chunks
from mlx_rotor.quant.fit import FITS, decode, fit, squared_error
from mlx_rotor.quant.policy import Spec

SPECS = [Spec(bits, size, "lloyd") for bits in (2, 3, 4) for size in (64, 256)]
cases = st.fixed_dictionaries(
    {
        "bits": st.sampled_from((2, 3, 4)),
        "group_size": st.sampled_from((64, 128, 256)),
        "fit": st.sampled_from(("search", "best")),
        "whole": st.booleans(),
        "kinds": st.lists(st.sampled_from(sorted(KINDS)), min_size=4, max_size=4),
        "magnitude": st.sampled_from((1e-40, 1e-7, 1e-3, 1.0, 40.0)),
        "importance": st.sampled_from(sorted(IMPORTANCES)),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def levels_and_codes(parts, bits, group_size):
    """(float64 [rows, groups, 2**bits], float64 decoded [rows, groups, group_size])."""
    codes, books = parts
    columns = codes.shape[-1] * 32 // bits
    decoded = np.array(get("lloyd", bits, group_size).decode(parts, columns), np.float64)
    rows = codes.shape[0]
    return np.array(books, np.float64).reshape(rows, -1, 2**bits), decoded.reshape(rows, -1, group_size)


@settings(max_examples=80, deadline=None)
@given(cases)
def test_no_group_is_worse_than_with_fast_and_every_weight_has_its_nearest_level(case):
    bits, size, rng = case["bits"], case["group_size"], np.random.default_rng(case["seed"])
    k = 2 * size
    w = np.clip(np.stack([KINDS[kind](rng, k) for kind in case["kinds"]]) * case["magnitude"], -6e4, 6e4)
    w = mx.array(w.astype(np.float32))
    drawn = IMPORTANCES[case["importance"]](rng, k)
    importance = None if drawn is None else mx.array(drawn.astype(np.float32))
    form = get("lloyd", bits, size)
    parts = form.fitted(w, case["fit"], importance, whole=case["whole"])
    levels, decoded = levels_and_codes(parts, bits, size)
    assert np.isfinite(levels).all() and np.all(np.diff(levels, axis=-1) >= 0)
    wide = np.array(w, np.float64).reshape(4, 2, size)
    unit = np.abs(wide).max(-1, keepdims=True)
    distance = np.abs(wide[..., None] - levels[:, :, None]).min(-1)
    assert np.all(np.abs(decoded - wide) <= distance + 1e-6 * unit)
    if not case["whole"]:
        counts = np.ones(k) if drawn is None or not drawn.any() else drawn
        counts = np.broadcast_to(counts, (4, k)).reshape(4, 2, size)
        unread = counts.sum(-1, keepdims=True) == 0
        counts = np.where(unread, 1.0, counts)
        plain = levels_and_codes(form.fitted(w, "fast", None, whole=False), bits, size)[1]
        mine, theirs = ((counts * (x - wide) ** 2).sum(-1) for x in (decoded, plain))
        noise = (counts.sum(-1, keepdims=True) * unit**2 * 1e-9)[..., 0]
        assert np.all(mine <= theirs * (1 + 1e-3) + noise)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_least_squares_where_lengths_may_shrink_and_whole_lengths_where_not(bits):
    w = mx.random.normal((64, 512), key=mx.random.key(bits))
    importance = mx.exp(mx.random.normal((512,), key=mx.random.key(9)))
    counts = np.array(importance).reshape(2, 256)
    x = np.array(w, np.float64).reshape(64, 2, 256)
    form = get("lloyd", bits, 256)
    along = {}
    for whole in (False, True):
        decoded = levels_and_codes(form.fitted(w, "search", importance, whole=whole), bits, 256)[1]
        along[whole] = ((counts * x * decoded).sum(-1) / (counts * x * x).sum(-1)).mean()
        if not whole:
            assert (counts * decoded**2).sum() == pytest.approx((counts * x * decoded).sum(), rel=2e-3)
    # Weights that cross to another level as levels grow take a part back.
    assert along[False] == pytest.approx({2: 0.895, 3: 0.974, 4: 0.9945}[bits], abs=0.006)
    assert 1 - along[True] < 0.55 * (1 - along[False])


@pytest.mark.parametrize("method", FITS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_groups_of_few_values_are_stored_exactly(spec, method):
    rng = np.random.default_rng(0)
    values = np.cumsum(rng.uniform(0.05, 1, (8, 1, 2**spec.bits)), axis=-1) - 3
    values = values.astype(np.float16).astype(np.float32)
    picked = rng.integers(0, 2**spec.bits, (8, 2, spec.group_size))
    picked[:, :, : 2**spec.bits] = np.arange(2**spec.bits)
    w = np.take_along_axis(np.broadcast_to(values, (8, 2, 2**spec.bits)), picked, axis=-1).reshape(8, -1)
    w = mx.array(np.concatenate([w, np.zeros_like(w[:1]), np.full_like(w[:1], -0.75)]))
    if method == "fast":  # may merge two values
        w = mx.concatenate([mx.where(w > 0, 0.5, -0.25), w[-2:]])
    found = fit(w, spec, method)
    np.testing.assert_array_equal(np.array(decode(found, spec)), np.array(w))


def test_weights_nobody_reads_do_not_count():
    w = mx.random.normal((16, 256), key=mx.random.key(0))
    seen = mx.array((np.arange(256) % 4 == 0).astype(np.float32))
    spec = Spec(4, 256, "lloyd")
    heeding, plain = (decode(fit(w, spec, importance=i), spec) for i in (seen, None))
    error, other = ((seen * mx.square(d - w)).sum().item() for d in (heeding, plain))
    assert error < 0.6 * other
    assert all(
        mx.array_equal(a, b)
        for a, b in zip(fit(w, spec, importance=mx.zeros((256,))).parts, fit(w, spec).parts, strict=True)
    )


def test_importance_comes_in_every_shape_that_affine_takes():
    w = mx.random.normal((2, 6, 128), key=mx.random.key(1))
    spec, rows = Spec(3, 64, "lloyd"), mx.exp(mx.random.normal((2, 6, 128), key=mx.random.key(2)))
    shared, experts = rows[0, 0], rows[:, :1]
    for given_, full in ((shared, mx.broadcast_to(shared, w.shape)), (experts, mx.broadcast_to(experts, w.shape))):
        a, b = fit(w, spec, importance=given_), fit(w, spec, importance=full)
        assert all(mx.array_equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))
    one = fit(w[1], spec, importance=rows[1])
    assert mx.array_equal(fit(w, spec, importance=rows).parts[1][1], one.parts[1])
    with pytest.raises(RotorError, match="does not broadcast"):
        fit(w, spec, importance=mx.ones((3, 1, 128)))


@pytest.mark.parametrize("method", FITS)
def test_the_result_is_what_the_format_says_and_does_not_depend_on_the_chunk(monkeypatch, method):
    w = mx.random.normal((50, 256), key=mx.random.key(6))
    spec = Spec(3, 128, "lloyd")
    whole = fit(w, spec, method)
    for part, tensor in zip(whole.parts, get("lloyd", 3, 128).tensors((50,), 256), strict=True):
        assert part.dtype == tensor.dtype and part.shape == tensor.shape
    monkeypatch.setattr(chunks, "CPU_WEIGHTS", 1000)
    monkeypatch.setattr(chunks, "GPU_WEIGHTS", 1000)
    for a, b in zip(whole.parts, fit(w, spec, method).parts, strict=True):
        assert mx.array_equal(a, b)
    e, _ = squared_error(w, whole, spec)
    assert e == pytest.approx(mx.square(decode(whole, spec) - w).sum().item(), rel=1e-4)


@pytest.mark.parametrize(("bits", "size", "method"), [(2, 256, "search"), (4, 256, "search"), (4, 64, "best")])
def test_work_is_bounded_by_the_chunk(monkeypatch, bits, size, method):
    monkeypatch.setattr(chunks, "CPU_WEIGHTS", 1 << 13)
    monkeypatch.setattr(chunks, "GPU_WEIGHTS", 1 << 13)
    w, importance = mx.random.normal((512, 256), key=mx.random.key(7)), mx.ones((256,))
    mx.eval(w, importance)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fit(w, Spec(bits, size, "lloyd"), method, importance)
    packed = w.size * bits // 8 + w.size // size * 2**bits * 2
    assert mx.get_peak_memory() - before < 3 * packed + 32 * 4 * (1 << 13)


def test_what_float16_does_not_hold_is_an_error():
    spec = Spec(2, 64, "lloyd")
    with pytest.raises(RotorError, match="lloyd holds 65504 at most, a weight is 7e"):
        fit(mx.full((2, 64), -7e4), spec)
    with pytest.raises(RotorError, match="no weights to fit"):
        fit(mx.zeros((0, 64)), spec)
    with pytest.raises(RotorError, match="lloyd in groups of 64 does not divide rows of 96"):
        fit(mx.zeros((2, 96)), spec)
    top = mx.array(np.where(np.arange(64) % 2, 65504.0, -65504.0).astype(np.float32))[None]
    np.testing.assert_array_equal(np.array(decode(fit(top, spec), spec)), np.array(top))
