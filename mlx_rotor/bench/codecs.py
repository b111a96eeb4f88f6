"""The loss of every codec: on Gaussian coordinates, as rotated vectors nearly have, against the rate-distortion bound.

The second measurement has keys with a large constant part, as biased projections make them, and looks at scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .. import codec
from ..cache import RotorCache
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
        """The error's distance above the bound; -inf without an error."""
        return 10 * math.log10(self.error / self.bound) if self.error else -math.inf

    def to_dict(self) -> dict[str, Any]:
        decibels = self.decibels if self.error else None
        return asdict(self) | {"bound": self.bound, "decibels_above_bound": decibels}


def vectors(count: int, dim: int, seed: int) -> np.ndarray:
    """float32 [count, dim], independent normal numbers."""
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def measure_distortion(name: str, dim: int = DIM, count: int = VECTORS, seed: int = SEED) -> Distortion:
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
            yield measure_distortion(name, dim, count, seed)
        except RotorError as e:
            yield name, str(e)


BIASED_DIM, BASE = 128, 1e6


@dataclass(frozen=True)
class BiasedKeys:
    """Variance of the scores' error over tokens, by the scores' own, averaged over queries: 0 is exact.

    Attributes:
        centred, plain: with and without the means subtracted.
    """

    codec: str
    bias: float
    channels: int
    tokens: int
    centred: float
    plain: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def keys(tokens: int, bias: float, channels: int, heads: int = 2, seed: int = 0) -> tuple[mx.array, mx.array]:
    """(queries [1, heads, 32, DIM] at the last positions, keys [1, heads, tokens, DIM]), after rotary positions.

    Keys are standard normal, plus `bias` on `channels` channels of the rotary pairs that turn slowest, where trained
    models have it.
    """
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((1, heads, tokens, BIASED_DIM))
    for head in range(heads):
        pairs = rng.choice(np.arange(BIASED_DIM // 4, BIASED_DIM // 2), channels, replace=False)
        k[0, head, :, pairs + BIASED_DIM // 2 * rng.integers(0, 2, channels)] += (bias * rng.choice([-1, 1], channels))[
            :, None
        ]
    q = rng.standard_normal((1, heads, 32, BIASED_DIM))

    def turned(x: np.ndarray, offset: int) -> mx.array:
        return mx.fast.rope(
            mx.array(x.astype(np.float32)), BIASED_DIM, traditional=False, base=BASE, scale=1.0, offset=offset
        )

    return turned(q, tokens - 32), turned(k, 0)


def score_error(codec: str, centre: bool, q: mx.array, k: mx.array, chunk: int = 512) -> float:
    """The error of scores against keys that went through a cache in chunks, nothing kept exact."""
    cache = RotorCache(codec, codec, 0, 0, 1, centre=centre)
    for at in range(0, k.shape[2], chunk):
        part = k[:, :, at : at + chunk]
        cache.append(part, part)
    got, _ = cache.keys_and_values()
    exact, packed = (np.array(q @ x.swapaxes(-1, -2)) for x in (k, got))
    return float(((packed - exact).var(-1) / exact.var(-1)).mean())


def measure_biased_keys(codec: str = "turbo4", bias: float = 25.0, channels: int = 4, tokens: int = 2048) -> BiasedKeys:
    q, k = keys(tokens, bias, channels)
    errors = {centre: score_error(codec, centre, q, k) for centre in (True, False)}
    return BiasedKeys(codec, bias, channels, tokens, errors[True], errors[False])
