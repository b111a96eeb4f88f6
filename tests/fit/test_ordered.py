"""Cuts of ordered groups: against one-dimensional k-means by dynamic programming over every cut, in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_rotor.experts.formats.lloyd import BEST, EFFORTS, SEARCH
from mlx_rotor.fit.ordered import Ordered

KINDS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "tails": lambda rng, shape: rng.standard_t(5, shape),
    "outliers": lambda rng, shape: np.where(rng.random(shape) < 0.02, 30, 1) * rng.standard_normal(shape),
    "offset": lambda rng, shape: rng.standard_normal(shape) + 40,
    "few values": lambda rng, shape: rng.integers(0, 9, shape) / 4.0,
}


def optimum(w: np.ndarray, counts: np.ndarray, k: int) -> float:
    """Least weighted squared error of one group on k levels, whatever they are."""
    order = np.argsort(w)
    w, counts = w[order].astype(np.float64) - np.median(w), counts[order].astype(np.float64)
    sums = [np.concatenate([[0], np.cumsum(counts * w**p)]) for p in range(3)]
    count, first, second = (s[None, :] - s[:, None] for s in sums)
    with np.errstate(divide="ignore", invalid="ignore"):
        cost = np.where(count > 0, second - first**2 / np.where(count > 0, count, 1), 0)
    cost[np.tril_indices(len(w) + 1, -1)] = np.inf
    least = cost[0]
    for _ in range(k - 1):
        least = (least[:, None] + cost).min(axis=0)
    return float(max(least[-1], 0))


def groups(kind, size, weighed, seed=0, count=12):
    """(weights [size, count], counts alike), float32."""
    rng = np.random.default_rng((seed, size))
    w = KINDS[kind](rng, (size, count)).astype(np.float32)
    counts = np.exp(rng.standard_normal((size, count))) if weighed else np.ones((size, count))
    return w, (counts / counts.sum(axis=0)).astype(np.float32)


def lost(w, counts, levels):
    """Of the nearest levels [k, count], float64 [count]."""
    distance = np.abs(w[None].astype(np.float64) - np.array(levels, np.float64)[:, None]).min(axis=0)
    return (counts * distance**2).sum(axis=0)


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(("bits", "size"), [(2, 64), (2, 256), (3, 128), (4, 64)])
def test_levels_are_within_a_few_percent_of_the_global_optimum(bits, size, kind, weighed):
    w, counts = groups(kind, size, weighed)
    ordered = Ordered.of(mx.array(w), mx.array(counts) if weighed else None)
    optima = np.array([optimum(w[:, i], counts[:, i], 2**bits) for i in range(w.shape[1])])
    rounding = 1e-6 * (np.ptp(w, axis=0) ** 2)
    means = {}
    for name, efforts in EFFORTS.items():
        e = efforts[bits]
        parts = min(e.parts, size)
        found = ordered.iterated(ordered.best(ordered.spread(parts), 2**bits, min(e.widest, parts)), e.iterations)
        error = lost(w, counts, found + ordered.centre)
        assert np.all(error >= optima * (1 - 1e-4) - rounding)
        means[name] = error.mean() / max(optima.mean(), rounding.mean())
    assert means["search"] < {2: 1.02, 3: 1.025, 4: 1.06}[bits]
    assert means["best"] < {2: 1.01, 3: 1.01, 4: 1.02}[bits]


def test_all_cuts_give_the_optimum():
    w, counts = groups("tails", 64, True)
    ordered = Ordered.of(mx.array(w), mx.array(counts))
    every = mx.broadcast_to(mx.arange(65).astype(mx.uint32)[:, None], (65, w.shape[1]))
    for k in (2, 4, 8):
        error = lost(w, counts, ordered.best(every, k, 64) + ordered.centre)
        optima = [optimum(w[:, i], counts[:, i], k) for i in range(w.shape[1])]
        np.testing.assert_allclose(error, optima, rtol=1e-4)


def test_iterations_never_lose_and_stop_at_a_local_optimum():
    w, counts = groups("outliers", 128, True)
    ordered = Ordered.of(mx.array(w), mx.array(counts))
    levels = mx.take_along_axis(
        ordered.w, mx.broadcast_to(mx.array([8, 40, 70, 120])[:, None], (4, w.shape[1])), axis=0
    )
    before = lost(w, counts, levels + ordered.centre)
    for _ in range(40):
        levels = ordered.iterated(levels, 1)
        after = lost(w, counts, levels + ordered.centre)
        assert np.all(after <= before * (1 + 1e-4)) and np.all(np.diff(np.array(levels), axis=0) >= 0)
        before = after
    codes = np.abs(w[None] - np.array(levels + ordered.centre)[:, None]).argmin(axis=0)
    for k in range(4):
        here = counts * (codes == k)
        mean = (here * w).sum(axis=0) / np.maximum(here.sum(axis=0), 1e-30)
        np.testing.assert_allclose(mean, np.array(levels + ordered.centre)[k], rtol=0.02, atol=0.02)


def test_positions_and_errors_are_those_of_the_weights():
    w, counts = groups("normal", 64, True)
    ordered = Ordered.of(mx.array(w), mx.array(counts))
    x = mx.array(np.random.default_rng(1).standard_normal((5, w.shape[1])).astype(np.float32))
    centre = np.array(ordered.centre)
    expected = (np.sort(w, axis=0)[None] - centre <= np.array(x)[:, None]).sum(axis=1)
    np.testing.assert_array_equal(np.array(ordered.below(x)), expected)
    assert np.array(ordered.below(mx.full((1, w.shape[1]), 99.0))).tolist() == [[64] * w.shape[1]]
    levels = mx.sort(x, axis=0)
    np.testing.assert_allclose(np.array(ordered.error(levels))[0], lost(w, counts, levels + ordered.centre), rtol=1e-4)
    alike = lost(w, np.full_like(w, 1 / 64), levels + ordered.centre)
    np.testing.assert_allclose(np.array(ordered.alike().error(levels))[0], alike, rtol=1e-4)


def test_a_far_weight_does_not_spoil_the_others():
    w, counts = groups("normal", 256, False)
    far = w.copy()
    far[0], far[1] = 3e4, -3e4
    ordered = Ordered.of(mx.array(far), None)
    found = ordered.iterated(ordered.best(ordered.spread(24), 8, 9), 4)
    near = lost(far[2:], counts[2:], found + ordered.centre)
    assert near.mean() < 1.03 * np.mean([optimum(w[2:, i], counts[2:, i], 6) for i in range(w.shape[1])])


def test_best_looks_harder_than_search():
    assert all(BEST[b].parts > SEARCH[b].parts and BEST[b].widest > SEARCH[b].widest for b in (2, 3, 4))
