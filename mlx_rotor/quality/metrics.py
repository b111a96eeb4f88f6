"""Perplexity, KL divergence, top-1 agreement and rates, each with its standard error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured value and its standard error; `se` is None where one observation leaves it unknown."""

    value: float
    se: float | None

    def map(self, value: float, slope: float) -> Estimate:
        """The estimate of f(x), given f at this value and f's slope there (delta method)."""
        return Estimate(value, None if self.se is None else abs(slope) * self.se)


def clustered_mean(per_token: np.ndarray) -> Estimate:
    """Mean of `per_token` [windows, tokens] with the standard error between windows.

    Neighbouring tokens share their text, so that tokens are not independent draws; windows nearly are. The error is
    the standard deviation of the window means (n - 1) over the square root of their number.
    """
    means = np.asarray(per_token, dtype=np.float64).mean(axis=1)
    n = len(means)
    return Estimate(float(means.mean()), float(means.std(ddof=1) / math.sqrt(n)) if n > 1 else None)


@dataclass(frozen=True)
class Tally:
    """`right` of `of` trials of one kind, e.g. needles of one length and depth."""

    right: int
    of: int

    @property
    def rate(self) -> Estimate:
        """Share right. The error is the posterior's under a flat prior, so that 20 of 20 is not ± 0."""
        a, b = self.right + 1, self.of - self.right + 1
        return Estimate(self.right / self.of, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))

    def __str__(self) -> str:
        return f"{self.right}/{self.of}"


def total(tallies: Sequence[Tally]) -> Tally | None:
    """All trials together, None if there was none."""
    of = sum(t.of for t in tallies)
    return Tally(sum(t.right for t in tallies), of) if of else None


def normalised(logp: np.ndarray) -> np.ndarray:
    """logp: [n, vocab], log-probabilities up to rounding -> float64, each row's probabilities summing to 1."""
    x = logp.astype(np.float64)
    top = x.max(axis=1, keepdims=True)
    return x - (top + np.log(np.exp(x - top).sum(axis=1, keepdims=True)))


def token_kl(reference: np.ndarray, logp: np.ndarray) -> np.ndarray:
    """KL(reference || configuration) in nats, both [n, vocab] log-probabilities -> float64 [n], never negative.

    Both sides are renormalised in float64 first, so that rounding in storage can't make a distribution sum to
    something else than 1 and the divergence negative.
    """
    p, q = normalised(reference), normalised(logp)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=1), 0.0)


@dataclass(frozen=True)
class Divergence:
    """KL(reference || configuration) in nats over all tokens, and how often both choose the same token."""

    mean: Estimate
    p99: float
    max: float
    quarters: tuple[float, ...]
    agreement: Estimate

    @classmethod
    def from_dict(cls, x: Mapping[str, Any]) -> Divergence:
        """Of what `dataclasses.asdict` made, also through JSON. KeyError or TypeError for anything else."""
        mean, agreement = Estimate(**x["mean"]), Estimate(**x["agreement"])
        return cls(mean, x["p99"], x["max"], tuple(x["quarters"]), agreement)


def summarise(kl: np.ndarray, agrees: np.ndarray) -> Divergence:
    """kl: [windows, tokens] nats; agrees: [windows, tokens] bool. `quarters`: mean KL of each quarter of a window."""
    quarters = tuple(float(q.mean()) for q in np.array_split(kl, 4, axis=1) if q.size)
    return Divergence(
        clustered_mean(kl), float(np.quantile(kl, 0.99)), float(kl.max()), quarters, clustered_mean(agrees)
    )


def token_nll(logp: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target) in nats. logp: [n, vocab] log-probabilities, targets: [n] token ids -> float64 [n]."""
    return -np.take_along_axis(logp, np.asarray(targets)[:, None], axis=1)[:, 0].astype(np.float64)


def perplexity(nll: np.ndarray) -> Estimate:
    """exp of the mean of `nll` [windows, tokens] (nats). Error: that of the mean × perplexity (delta method)."""
    mean = clustered_mean(nll)
    value = math.exp(mean.value)
    return mean.map(value, value)


def change(nll: np.ndarray, reference: np.ndarray) -> Estimate:
    """Perplexity over the reference's, less 1, on the same tokens; both [windows, tokens].

    Paired: the error is that of the per-window *difference*, far smaller than either perplexity's own.
    """
    mean = clustered_mean(nll - reference)
    ratio = math.exp(mean.value)
    return mean.map(ratio - 1, ratio)
