"""Error feedback: what it gains where inputs are correlated, and what it does with Hessians that measure little."""

from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.bench.fits import inputs
from mlx_rotor.errors import RotorError
from mlx_rotor.experts.formats import get
from mlx_rotor.experts.formats.affine import AffineGrid
from mlx_rotor.fit import feedback
from mlx_rotor.fit.feedback import DAMPINGS, OWN
from mlx_rotor.quant.fit import Hessian, decode, fit
from mlx_rotor.quant.policy import Spec

K, ROWS = 256, 48


@pytest.fixture(scope="module")
def layer():
    """(weights [ROWS, K], moments of the inputs seen, inputs held out)."""
    seen, held_out = inputs(K, 4096, 0), inputs(K, 1024, 0, first=4096)
    return mx.random.normal((ROWS, K), key=mx.random.key(0)), seen.T @ seen / seen.shape[0], held_out


def lost(w, fitted, spec, x):
    """Squared error over squared length of the outputs."""
    w, stored, x = (np.array(a, np.float64) for a in (w, decode(fitted, spec), x))
    return ((x @ (stored - w).T) ** 2).sum() / ((x @ w.T) ** 2).sum()


@pytest.mark.parametrize("spec", [Spec(2, 64), Spec(3, 128), Spec(4, 32)])
def test_what_is_known_of_the_inputs_pays_in_this_order(layer, spec):
    w, moments, x = layer
    plain = lost(w, fit(w, spec, "fast"), spec, x)
    fitted = lost(w, fit(w, spec), spec, x)
    heeding = lost(w, fit(w, spec, importance=mx.diagonal(moments)), spec, x)
    hessian = Hessian(moments)
    fed_back = lost(w, fit(w, spec, hessian=hessian), spec, x)
    descended = lost(w, fit(w, spec, "best", hessian=hessian), spec, x)
    assert fitted < 0.85 * plain
    assert heeding < 0.55 * fitted
    assert fed_back < 0.85 * heeding
    assert descended < 0.95 * fed_back


@pytest.mark.parametrize("spec", [Spec(2, 256, "lloyd"), Spec(3, 64, "lloyd"), Spec(4, 16, "iq4_nl")], ids=str)
def test_it_pays_in_modes_that_mlx_does_not_have_too(layer, spec):
    w, moments, x = layer
    hessian = Hessian(moments)
    plain, heeding = (lost(w, fit(w, spec, importance=i), spec, x) for i in (None, mx.diagonal(moments)))
    fed_back = lost(w, fit(w, spec, hessian=hessian), spec, x)
    descended = lost(w, fit(w, spec, "best", hessian=hessian), spec, x)
    assert heeding < 0.7 * plain and fed_back < 0.85 * heeding and descended < 0.97 * fed_back


def test_eight_bits_are_fed_back_too(layer):
    w, moments, x = layer
    spec = Spec(8, 32, "q8")
    assert lost(w, fit(w, spec, hessian=moments), spec, x) < 0.9 * lost(w, fit(w, spec), spec, x)


@pytest.mark.parametrize("spec", [Spec(3, 64, "lloyd"), Spec(4, 16, "iq4_nl"), Spec(8, 32, "q8")], ids=str)
def test_refitted_grids_never_cost_more_and_codebooks_stay_ordered(layer, spec):
    w, moments, _ = layer
    hessian, block = Hessian(moments), slice(0, spec.group_size)
    grid = get(spec.mode, spec.bits, spec.group_size).grid("search")
    inner = hessian.damped[block, block]
    group = mx.contiguous(w.T[block])
    stored = grid.fitted(
        group + 0.1 * mx.random.normal(group.shape, key=mx.random.key(3)), mx.ones((group.shape[0], 1))
    )
    codes = grid.nearest(group, stored)
    error = group - grid.values(codes, stored)
    new = grid.refitted(codes, inner @ error, inner, stored)
    moved = group - grid.values(codes, new)
    before, after = (np.array((e * (inner @ e)).sum(axis=0)) for e in (error, moved))
    assert np.all(after <= before * (1 + 1e-4)) and after.mean() < 0.999 * before.mean()
    assert mx.array_equal(new[0].astype(mx.float16).astype(mx.float32), new[0])
    if spec.mode == "lloyd":
        assert np.all(np.diff(np.array(new[0]), axis=0) >= 0)


@pytest.mark.parametrize("method", ["search", "best"])
def test_outputs_of_codebooks_keep_their_length(layer, method):
    w, moments, _ = layer
    spec, hessian = Spec(2, 128, "lloyd"), Hessian(moments)
    sweep = feedback.Sweep(w.T, hessian, 128, get(spec.mode, spec.bits, spec.group_size).grid(method))
    sweep.feed_back()
    sweep.descend(feedback.SWEEPS[method])
    short = np.array(w - sweep.errors.T, np.float64)
    exact, h = np.array(w, np.float64), np.array(hessian.damped, np.float64)
    stored = np.array(decode(fit(w, spec, method, hessian=hessian), spec), np.float64)
    whole = ((exact @ h) * exact).sum(-1)
    assert ((exact @ h) * short).sum() < 0.985 * whole.sum()
    np.testing.assert_allclose(((exact @ h) * stored).sum(-1), whole, rtol=1e-3)
    np.testing.assert_allclose(stored / short, np.broadcast_to(np.array(sweep.lacking()).T, short.shape), rtol=2e-3)


def test_two_bits_lose_a_fifth_of_what_mx_quantize_loses(layer):
    w, moments, x = layer
    spec = Spec(2, 64)
    assert lost(w, fit(w, spec, "fast"), spec, x) == pytest.approx(0.16, rel=0.2)
    assert lost(w, fit(w, spec, hessian=moments), spec, x) < 0.036


def cost(w, fitted, spec, damped):
    """e H e^T of each row, float64."""
    e = np.array(decode(fitted, spec) - w, np.float64)
    return ((e @ np.array(damped, np.float64)) * e).sum(-1)


def test_each_row_is_near_the_optimum_on_a_matrix_small_enough_to_try_all_codes(layer):
    # 32 inputs of which only 4 are correlated: codes of the 4 at the fitted scale and bias, all 256 of them.
    spec = Spec(2, 32)
    rng = np.random.default_rng(0)
    h = np.eye(32) * 1e-3
    h[:4, :4] = 0.8 + 0.2 * np.eye(4)
    w = mx.array(rng.standard_normal((24, 32)).astype(np.float32))
    hessian = Hessian(mx.array(h.astype(np.float32)))
    found = fit(w, spec, "best", hessian=hessian)
    damped = np.array(hessian.damped, np.float64)
    codes = np.stack(np.meshgrid(*[np.arange(4)] * 4, indexing="ij"), -1).reshape(-1, 4)
    scale, bias = (np.array(a.astype(mx.float32), np.float64) for a in found.parts[1:])
    error = np.array(w, np.float64)[:, None, :4] - (scale[:, :, None] * codes + bias[:, :, None])
    best = ((error @ damped[:4, :4]) * error).sum(-1).min(-1)
    e = np.array(w - decode(found, spec), np.float64)[:, :4]
    ours = ((e @ damped[:4, :4]) * e).sum(-1)
    rest = cost(w, found, spec, damped) - ours
    assert np.all(ours >= best - 1e-9) and np.all(rest >= 0)
    assert ours.mean() < 1.6 * best.mean() and np.median(ours / best) < 1.2


def test_a_refit_that_rounding_spoils_is_not_taken():
    # Far from zero the bias is rounded to a multiple of many codes: the scale then has to fit the bias as it is stored.
    rng = np.random.default_rng(0)
    w, hessian = mx.array((rng.standard_normal((64, 512)) + 300).astype(np.float32)), Hessian(mx.eye(64))
    grid = AffineGrid(8, "best")
    sweep = feedback.Sweep(w, hessian, 64, grid)
    sweep.feed_back()
    codes, (good, bias), h = sweep.codes[0], sweep.stored[0], hessian.damped
    spoiled = np.arange(512) % 2 == 0
    start = good * mx.array(1 + spoiled / 64).astype(mx.float32)
    error = w - (start * codes + bias)
    scale, bias = grid.refitted(codes, h @ error, h, (start, bias))
    after = np.array(mx.square(w - (scale * codes + bias)).sum(axis=0))
    before = np.array(mx.square(error).sum(axis=0))
    assert np.all(after <= before * (1 + 1e-4)) and (after < 0.9 * before).mean() > 0.1


def test_descent_never_raises_the_cost_of_a_row(layer, monkeypatch):
    w, moments, _ = layer
    spec, hessian = Spec(2, 64), Hessian(moments)
    costs = []
    for sweeps in range(4):
        monkeypatch.setitem(feedback.SWEEPS, "best", sweeps)
        costs.append(cost(w, fit(w, spec, "best", hessian=hessian), spec, hessian.damped))
    for before, after in pairwise(costs):
        assert np.all(after <= before * (1 + 1e-4))
    assert costs[1].mean() < 0.95 * costs[0].mean() and costs[3].mean() < costs[1].mean()


def test_without_correlations_it_is_the_weighted_fit(layer):
    w, _, _ = layer
    spec, importance = Spec(3, 64), mx.exp(mx.random.normal((K,), key=mx.random.key(1)))
    found = fit(w, spec, hessian=mx.diag(importance))
    hessian = Hessian(mx.diag(importance))
    expected = fit(w, spec, importance=mx.diagonal(hessian.damped))
    assert all(mx.array_equal(a, b) for a, b in zip(found.parts, expected.parts, strict=True))


def test_the_factors_give_the_damped_matrix_back(layer):
    _, moments, _ = layer
    hessian = Hessian(moments)
    feedback = np.array(hessian.feedback, np.float64)
    assert np.array_equal(np.tril(feedback, -1), np.zeros((K, K))) and np.allclose(np.diag(feedback), 1)
    # U D U^T = H; D follows from H and U alone.
    inner = np.linalg.solve(feedback, np.array(hessian.damped, np.float64))
    pivots = np.linalg.solve(feedback, inner.T)
    scale = np.abs(np.diag(pivots)).max()
    assert np.abs(pivots - np.diag(np.diag(pivots))).max() < 1e-4 * scale and np.diag(pivots).min() > 0
    diagonal = np.diag(np.array(moments, np.float64))
    expected = np.array(moments, np.float64) + np.diag(OWN * diagonal + DAMPINGS[0] * diagonal.mean())
    np.testing.assert_allclose(np.array(hessian.damped), expected, rtol=1e-4, atol=1e-4)


def test_a_hessian_made_once_gives_what_its_matrix_gives(layer):
    w, moments, _ = layer
    hessian, spec = Hessian(moments), Spec(2, 128)
    for method in ("search", "best"):
        first, again = fit(w, spec, method, hessian=hessian), fit(w, spec, method, hessian=moments)
        for a, b in zip(first.parts, again.parts, strict=True):
            assert mx.array_equal(a, b)


def test_inputs_that_are_always_zero_disturb_nobody(layer):
    w, moments, x = layer
    alive = np.arange(K) % 8 != 3
    mask = mx.array(alive.astype(np.float32))
    spec = Spec(2, 64)
    found = fit(w, spec, "best", hessian=moments * mask * mask[:, None])
    assert lost(w, found, spec, x * mask) < lost(
        w, fit(w, spec, importance=mx.diagonal(moments) * mask), spec, x * mask
    )
    assert mx.isfinite(decode(found, spec)).all().item()


def test_a_group_of_inputs_nobody_saw_is_stored_as_well_as_any():
    seen = np.arange(128) >= 64
    w = mx.random.normal((32, 128), key=mx.random.key(0))
    x = mx.array(np.random.default_rng(0).standard_normal((512, 128)).astype(np.float32) * seen)
    found = decode(fit(w, Spec(4, 64), hessian=x.T @ x / 512), Spec(4, 64))
    first = mx.square(found - w)[:, :64].sum() / mx.square(w[:, :64]).sum()
    assert first.item() < 0.0075


def test_few_inputs_are_enough_to_do_no_harm(layer):
    w, _, x = layer
    spec, few = Spec(2, 64), inputs(K, K // 2, 0)
    moments = few.T @ few / few.shape[0]  # of rank K / 2: damping alone makes it positive definite
    assert lost(w, fit(w, spec, hessian=moments), spec, x) < lost(w, fit(w, spec), spec, x)


def test_a_matrix_that_is_not_positive_definite_is_damped_until_it_is():
    h = np.eye(64, dtype=np.float32)
    h[0, 1] = h[1, 0] = 1.3
    damped = np.array(Hessian(mx.array(h)).damped)
    assert damped[0, 0] == pytest.approx(1 + OWN + 0.5) and 0.5 in DAMPINGS


def test_hopeless_hessians_are_errors():
    w, spec = mx.zeros((4, 64)), Spec(4, 64)
    eye = np.eye(64, dtype=np.float32)
    far = eye.copy()
    far[0, 1] = far[1, 0] = 50
    for matrix, text in (
        (far, r"the Hessian \[64, 64\] is not positive definite even with 2 times"),
        (np.full((64, 64), np.nan), "not finite"),
        (np.where(eye > 0, np.inf, 0), "not finite"),
        (-eye, "negative or all zero"),
        (np.zeros((64, 64)), "negative or all zero"),
        (np.ones((64, 32)), "is square"),
        (np.eye(128), r"a Hessian of 128 inputs fits weights \[rows, 128\], not \(4, 64\)"),
    ):
        with pytest.raises(RotorError, match=text):
            fit(w, spec, hessian=mx.array(matrix.astype(np.float32)))
    with pytest.raises(RotorError, match=r"not \(2, 4, 64\)"):
        fit(mx.zeros((2, 4, 64)), spec, hessian=mx.array(eye))


def test_fast_ignores_what_is_known(layer):
    w, moments, _ = layer
    plain = fit(w, Spec(2, 64), "fast")
    for known in ({"hessian": moments}, {"importance": mx.diagonal(moments)}):
        assert mx.array_equal(fit(w, Spec(2, 64), "fast", **known).parts[0], plain.parts[0])
