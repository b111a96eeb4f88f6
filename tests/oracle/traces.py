"""Intermediate values of a model from tokens to logits, layer by layer, and the distance between two models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LayerTrace:
    """One layer on T tokens, float32. The norms before attention and experts are part of neither.

    Attributes:
        attention: what goes into and comes out of attention, [T, D] each.
        experts: the same of the router with its experts.
        left: the residual stream behind the layer, [T, D].
    """

    attention: tuple[np.ndarray, np.ndarray]
    experts: tuple[np.ndarray, np.ndarray]
    left: np.ndarray


@dataclass(frozen=True)
class Trace:
    """`logits`: [T, vocabulary]."""

    layers: tuple[LayerTrace, ...]
    logits: np.ndarray


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of all their numbers, in float64. Raises ValueError for other than numbers, which no bar would notice."""
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("not finite")
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def rms(a: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a, dtype=np.float64))))


def largest_error(a: np.ndarray, b: np.ndarray) -> float:
    """Of any number of a, against the rms of b."""
    return float(np.abs(a.astype(np.float64) - b).max()) / rms(b)
