"""What every codec loses on vectors whose coordinates are Gaussian, as rotated ones nearly are, against the bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .. import codec
from ..errors import RotorError

# Channels made STRONG times larger in the second measurement: what a rotation is for.
FEW, STRONG = 4, 6.0
DIM, VECTORS, SEED = 128, 4096, 0


@dataclass(frozen=True)
class Distortion:
    """One codec.

    Attributes:
        bits: stored bits an element, counted from an encoded vector's bytes.
        error: squared error over squared length, all vectors together.
        scores: variance of a score's error over the variance of scores, for Gaussian queries, where FEW channels of the
            vectors are STRONG times larger; equal to `error` for a rotation that spreads them evenly.
    """

    codec: str
    bits: float
    error: float
    scores: float

    @property
    def bound(self) -> float:
        """The least error of any code of as many bits for Gaussian numbers: 4^-bits (Shannon)."""
        return 4.0**-self.bits

    @property
    def decibels(self) -> float:
        """How far the error is above the bound; -inf without an error."""
        return 10 * math.log10(self.error / self.bound) if self.error else -math.inf

    def to_dict(self) -> dict[str, Any]:
        decibels = self.decibels if self.error else None
        return asdict(self) | {"bound": self.bound, "decibels_above_bound": decibels}


def vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """float32 [count, dim], independent normal numbers."""
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def measure(name: str, dim: int = DIM, count: int = VECTORS, seed: int = SEED) -> Distortion:
    """Encodes and decodes `count` vectors. Raises RotorError for a codec that doesn't exist or take the dimension."""
    chosen, plain, queries = codec.get(name, dim), vectors(count, dim, seed), vectors(64, dim, seed + 1)
    packed = chosen.encode(mx.array(plain))
    decoded = np.array(chosen.decode(packed))
    strong = plain.copy()
    strong[:, :: max(1, dim // FEW)] *= STRONG
    lost = strong - np.array(chosen.decode(chosen.encode(mx.array(strong))))
    scores = (np.square(lost @ queries.T)).mean() / np.square(strong @ queries.T).mean()
    error = np.square(plain - decoded, dtype=np.float64).sum() / np.square(plain, dtype=np.float64).sum()
    return Distortion(name, 8 * packed.nbytes / plain.size, float(error), float(scores))


def measure_all(
    names: Iterable[str], dim: int = DIM, count: int = VECTORS, seed: int = SEED
) -> Iterator[Distortion | tuple[str, str]]:
    """Every codec's distortion, or (its name, why it takes no vectors of `dim`)."""
    for name in names:
        try:
            yield measure(name, dim, count, seed)
        except RotorError as e:
            yield name, str(e)
