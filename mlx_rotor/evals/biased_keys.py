"""Keys with a large constant part, as biased projections make them: what packing does to attention's scores."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache import RotorCache

DIM, BASE = 128, 1e6


@dataclass(frozen=True)
class BiasedKeys:
    """Variance of the scores' error over tokens, by the scores' own, averaged over queries: 0 is exact.

    Attributes:
        centred, plain: with and without the means taken off.
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
    k = rng.standard_normal((1, heads, tokens, DIM))
    for head in range(heads):
        pairs = rng.choice(np.arange(DIM // 4, DIM // 2), channels, replace=False)
        k[0, head, :, pairs + DIM // 2 * rng.integers(0, 2, channels)] += (bias * rng.choice([-1, 1], channels))[
            :, None
        ]
    q = rng.standard_normal((1, heads, 32, DIM))

    def turned(x: np.ndarray, offset: int) -> mx.array:
        return mx.fast.rope(mx.array(x.astype(np.float32)), DIM, traditional=False, base=BASE, scale=1.0, offset=offset)

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


def measure(codec: str = "turbo4", bias: float = 25.0, channels: int = 4, tokens: int = 2048) -> BiasedKeys:
    q, k = keys(tokens, bias, channels)
    errors = {centre: score_error(codec, centre, q, k) for centre in (True, False)}
    return BiasedKeys(codec, bias, channels, tokens, errors[True], errors[False])
