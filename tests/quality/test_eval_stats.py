"""Standard errors against the bootstrap, divergences and perplexities against sums done by hand."""

import math

import numpy as np
import pytest

from mlx_rotor.quality.metrics import (
    Estimate,
    Tally,
    change,
    clustered_mean,
    normalised,
    perplexity,
    summarise,
    token_kl,
    token_nll,
    total,
)


@pytest.fixture
def losses():
    """[windows, tokens] with a level of its own in every window, as text has."""
    rng = np.random.default_rng(0)
    return rng.gamma(2.0, 1.2, (40, 50)) + rng.normal(0, 0.4, (40, 1))


def bootstrap(rows, statistic, draws=4000):
    rng = np.random.default_rng(1)
    return np.std([statistic(rows[rng.integers(len(rows), size=len(rows))]) for _ in range(draws)])


def test_clustered_error_is_the_bootstrap_over_windows(losses):
    found = clustered_mean(losses)
    assert found.value == pytest.approx(losses.mean())
    assert found.se == pytest.approx(bootstrap(losses, np.mean), rel=0.06)
    # Tokens taken as independent would promise far more than 40 windows hold.
    assert found.se > 1.5 * losses.std() / math.sqrt(losses.size)


def test_perplexity_error_is_the_bootstrap(losses):
    found = perplexity(losses)
    assert found.value == pytest.approx(math.exp(losses.mean()))
    assert found.se == pytest.approx(bootstrap(losses, lambda r: math.exp(r.mean())), rel=0.08)


def test_change_is_paired(losses):
    other = losses + np.random.default_rng(2).normal(0.05, 0.1, losses.shape)
    found = change(other, losses)
    both = np.stack([other, losses], axis=1)
    ratio = lambda r: math.exp(r[:, 0].mean() - r[:, 1].mean()) - 1  # noqa: E731
    assert found.value == pytest.approx(perplexity(other).value / perplexity(losses).value - 1)
    assert found.se == pytest.approx(bootstrap(both, ratio), rel=0.08)
    assert found.se < perplexity(losses).se / perplexity(losses).value / 10


def test_one_window_has_no_error():
    assert clustered_mean(np.ones((1, 5))) == Estimate(1.0, None)
    assert perplexity(np.zeros((1, 5))) == Estimate(1.0, None)


def test_share_and_its_error():
    rng = np.random.default_rng(3)
    trials = np.repeat([1, 0], [130, 70])
    found = Tally(130, 200).rate
    assert found.value == 0.65
    boot = np.std([rng.choice(trials, 200).mean() for _ in range(4000)])
    assert found.se == pytest.approx(boot, rel=0.05)
    assert 0.03 < Tally(20, 20).rate.se < 0.06
    assert total([Tally(1, 2), Tally(3, 3)]) == Tally(4, 5)
    assert total([]) is None


def test_kl_by_hand():
    p, q = np.array([[0.5, 0.25, 0.25], [1 - 1e-6, 5e-7, 5e-7]]), np.array([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    by_hand = [
        0.5 * math.log(2) - 0.25 * math.log(2),
        (1 - 1e-6) * math.log((1 - 1e-6) / 0.5) + 1e-6 * math.log(5e-7 / 0.25),
    ]
    np.testing.assert_allclose(token_kl(np.log(p), np.log(q)), by_hand, rtol=1e-12)


def test_kl_direction_and_self():
    rng = np.random.default_rng(4)
    a, b = (normalised(rng.normal(0, 3, (50, 300))).astype(np.float32) for _ in range(2))
    assert token_kl(a, a).max() == 0.0
    assert (token_kl(a, b) > 0).all()
    assert abs(token_kl(a, b) - token_kl(b, a)).max() > 0.1
    # A distribution that came back from a float16 file is near itself, and never at a negative distance.
    stored = token_kl(a.astype(np.float16), a)
    assert (stored >= 0).all() and stored.max() < 1e-5


def test_normalised_sums_to_one():
    rng = np.random.default_rng(5)
    x = rng.normal(0, 30, (20, 1000)).astype(np.float16)
    np.testing.assert_allclose(np.exp(normalised(x)).sum(axis=1), 1, rtol=1e-12)


def test_summary_of_divergence():
    kl = np.arange(400, dtype=np.float64).reshape(4, 100)
    agrees = np.zeros((4, 100), dtype=bool)
    agrees[:, :90] = True
    found = summarise(kl, agrees)
    assert found.mean.value == 199.5
    assert found.max == 399
    assert found.p99 == pytest.approx(np.quantile(kl.reshape(-1), 0.99))
    assert found.quarters == (162.0, 187.0, 212.0, 237.0)
    assert found.agreement == Estimate(0.9, 0.0)


def test_token_loss_picks_the_token_that_came():
    logp = np.log(np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]))
    np.testing.assert_allclose(token_nll(logp, np.array([2, 1])), [-math.log(0.7), -math.log(0.3)])
