"""How far a configuration's next-token distributions are from the reference's: KL divergence, top-1 agreement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .stats import Estimate, clustered_mean


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
