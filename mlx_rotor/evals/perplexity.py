"""Perplexity and its change against a reference, with standard errors between windows."""

from __future__ import annotations

import math

import numpy as np

from .stats import Estimate, clustered_mean


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
