"""Fixed levels times a scale a group: IQ4_NL and eight bits."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import unpack
from test_fit_affine import IMPORTANCES, KINDS

from mlx_rotor.errors import RotorError
from mlx_rotor.experts.formats import get
from mlx_rotor.experts.formats.iq4_nl import LEVELS, Iq4NlLevels
from mlx_rotor.fit import rows
from mlx_rotor.quant.fit import FITS, decode, fit
from mlx_rotor.quant.policy import Spec

SPECS = [Spec(4, 16, "iq4_nl"), Spec(4, 32, "iq4_nl"), Spec(8, 32, "q8")]
TABLES = {"iq4_nl": np.array(LEVELS, np.float64), "q8": np.arange(-128.0, 128)}
by_spec = pytest.mark.parametrize("spec", SPECS, ids=str)


def error_by_group(w, found, spec, counts=1.0):
    squares = counts * (np.array(decode(found, spec), np.float64) - np.array(w, np.float64)) ** 2
    return squares.reshape(*squares.shape[:-1], -1, spec.group_size).sum(-1)


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(SPECS),
    st.sampled_from(("search", "best")),
    st.lists(st.sampled_from(sorted(KINDS)), min_size=4, max_size=4),
    st.sampled_from((1e-40, 1e-7, 1e-3, 1.0, 1e3)),
    st.sampled_from(sorted(IMPORTANCES)),
    st.integers(0, 2**32 - 1),
)
def test_no_group_is_worse_than_with_fast_and_codes_are_the_nearest(spec, method, kinds, magnitude, counted, seed):
    rng = np.random.default_rng(seed)
    k = 64
    w = np.clip(np.stack([KINDS[kind](rng, k) for kind in kinds]) * magnitude, -6e6, 6e6).astype(np.float32)
    drawn = IMPORTANCES[counted](rng, k)
    found = fit(mx.array(w), spec, method, None if drawn is None else mx.array(drawn.astype(np.float32)))
    plain = fit(mx.array(w), spec, "fast")
    codes, scales = np.array(found.parts[0]), np.array(found.parts[1], np.float64)
    assert np.isfinite(scales).all()
    scale = np.repeat(scales, spec.group_size, -1)[..., None]
    distance = np.abs(scale * TABLES[spec.mode] - w[..., None])
    chosen = np.take_along_axis(distance, unpack(codes, spec.bits)[..., None], -1)[..., 0]
    assert np.all(chosen <= distance.min(-1) + 1e-6 * np.abs(w).max(-1, keepdims=True))
    counts = np.ones(k) if drawn is None else drawn
    counts = np.broadcast_to(counts, w.shape)
    grouped = counts.reshape(4, -1, spec.group_size)
    counts = np.where(grouped.sum(-1, keepdims=True) == 0, 1.0, grouped).reshape(w.shape)
    mine, theirs = (error_by_group(w, f, spec, counts) for f in (found, plain))
    largest = np.abs(w).reshape(4, -1, spec.group_size).max(-1).astype(np.float64)
    noise = counts.reshape(4, -1, spec.group_size).sum(-1) * largest**2 * 1e-12
    assert np.all(mine <= theirs * (1 + 1e-4) + noise)


def test_the_nearest_of_uneven_levels_is_found_also_half_way():
    levels = Iq4NlLevels()
    rng = np.random.default_rng(0)
    halves = (np.array(LEVELS[1:]) + np.array(LEVELS[:-1])) / 2
    x = np.concatenate([rng.uniform(-400, 400, 4000), halves, np.array(LEVELS), halves + 0.001, halves - 0.001])
    found = np.array(levels.nearest(mx.array(x.astype(np.float32))))
    np.testing.assert_allclose(np.abs(x - found), np.abs(x[:, None] - np.array(LEVELS)).min(-1), atol=1e-4)
    np.testing.assert_array_equal(np.array(LEVELS)[np.array(levels.codes(mx.array(found)))], found)


@pytest.mark.parametrize(
    ("spec", "fast", "search", "best"),
    [(SPECS[0], 0.0052, 0.00415, 0.00411), (SPECS[1], 0.0064, 0.00548, 0.00544), (SPECS[2], 2.9e-5, 2.61e-5, 2.56e-5)],
    ids=str,
)
def test_what_gaussian_weights_lose(spec, fast, search, best):
    w = mx.random.normal((128, 512), key=mx.random.key(1))
    norm = mx.square(w).sum().item()
    lost = [error_by_group(w, fit(w, spec, m), spec).sum() / norm for m in FITS]
    assert lost[0] == pytest.approx(fast, rel=0.03)
    assert lost[1] < search and lost[2] < best < search


def test_no_scale_out_of_many_thousands_is_much_better():
    spec, size = SPECS[0], 16
    w = np.random.default_rng(2).standard_normal((8, size)).astype(np.float32)
    largest = np.abs(w).max(-1, keepdims=True)
    scales = np.concatenate([s * np.linspace(0.5, 1.4, 1500) for s in (-1, 1)]) * largest / 113
    distance = np.abs(scales[:, :, None, None] * TABLES["iq4_nl"] - w[:, None, :, None]).min(-1)
    optimum = (distance**2).sum(-1).min(-1)
    ours = {m: error_by_group(mx.array(w.reshape(4, -1)), fit(mx.array(w.reshape(4, -1)), spec, m), spec) for m in FITS}
    assert ours["best"].sum() < 1.01 * optimum.sum() and ours["search"].sum() < 1.03 * optimum.sum()


@by_spec
@pytest.mark.parametrize("method", FITS)
def test_what_the_format_holds_is_stored_exactly(spec, method):
    rng = np.random.default_rng(3)
    table, size = TABLES[spec.mode], spec.group_size
    scale = (2.0 ** rng.integers(-8, 3, (4, 4, 1))).astype(np.float32)
    picked = rng.integers(1, len(table), (4, 4, size))
    picked[:, :, 0] = 0 if spec.mode == "iq4_nl" else 255  # what `fast` takes its scale from
    w = (scale * table[picked]).reshape(4, -1).astype(np.float32)
    w[0] = 0
    found = fit(mx.array(w), spec, method)
    np.testing.assert_array_equal(np.array(decode(found, spec)), w)
    for part, tensor in zip(found.parts, get(spec.mode, spec.bits, size).tensors((4,), 4 * size), strict=True):
        assert part.dtype == tensor.dtype and part.shape == tensor.shape


@by_spec
def test_importance_is_heeded_and_chunks_are_not(monkeypatch, spec):
    w = mx.random.normal((2, 20, 64), key=mx.random.key(4))
    importance = mx.exp(2 * mx.random.normal((2, 1, 64), key=mx.random.key(5)))
    found, plain = fit(w, spec, "best", importance), fit(w, spec, "best")
    assert error_by_group(w, found, spec, np.array(importance)).sum() < 0.97 * (
        error_by_group(w, plain, spec, np.array(importance)).sum()
    )
    monkeypatch.setattr(rows, "CPU_WEIGHTS", 500)
    monkeypatch.setattr(rows, "GPU_WEIGHTS", 500)
    again = fit(w, spec, "best", importance)
    assert all(mx.array_equal(a, b) for a, b in zip(found.parts, again.parts, strict=True))


def test_what_scales_do_not_reach_is_an_error():
    with pytest.raises(RotorError, match=r"iq4_nl holds 7.40195e\+06 at most, a weight is 8e\+06"):
        fit(mx.full((2, 32), -8e6), SPECS[0])
    with pytest.raises(RotorError, match=r"q8 holds 8.31901e\+06 at most"):
        fit(mx.full((2, 32), 9e6), SPECS[2])
    with pytest.raises(RotorError, match="q8 in groups of 32 does not divide rows of 48"):
        fit(mx.zeros((2, 48)), SPECS[2])
    with pytest.raises(RotorError, match="iq4_nl packs rows in blocks of 32, of which 48 weights are no multiple"):
        fit(mx.zeros((2, 48)), SPECS[0])
    for spec, top in ((SPECS[0], 7.4e6), (SPECS[2], -8.3e6)):
        assert np.isfinite(np.array(decode(fit(mx.full((2, 32), top), spec), spec))).all()
