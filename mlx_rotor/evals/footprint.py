"""What a configuration's KV caches weigh, measured on the caches the evaluation itself uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..cache import RotorCache
from ..host.report import kv_bytes, kv_bytes_fp16, layers
from .feed import Cache
from .subject import Subject


@dataclass(frozen=True)
class Footprint:
    """Bytes a KV cache owns at `tokens` tokens, what stock fp16 holds for as many, and how it was attended to.

    `further`: bytes each token more adds once the exact first and recent tokens are full, None if nothing was packed.
    `fallback_calls`: attention calls that read expanded keys and values instead of the packed ones.
    """

    tokens: int
    bytes: int
    fp16: int
    further: float | None
    layers_compressed: int
    layers_total: int
    fused_calls: int
    fallback_calls: int

    @classmethod
    def of(cls, cache: Cache, tokens: int) -> Footprint:
        use = layers(cache)
        return cls(
            tokens,
            kv_bytes(cache),
            kv_bytes_fp16(cache),
            bytes_per_further_token(cache),
            len(use.compressed),
            use.total,
            use.fused_calls,
            use.fallback_calls,
        )


def bytes_per_further_token(cache: Sequence[Any]) -> float | None:
    """From the buffers' own sizes. Caches of bounded size (sliding windows, states) add nothing."""
    total = 0.0
    for c in cache:
        if isinstance(c, RotorCache):
            for body in (c.body_k, c.body_v):
                if not body.room:
                    return None
                total += body.nbytes / body.room
        elif isinstance(getattr(c, "keys", None), mx.array) and not (
            hasattr(c, "max_size") or hasattr(c, "chunk_size")
        ):
            total += (c.keys.nbytes + c.values.nbytes) / c.keys.shape[2]
    return total


class Caches:
    """Makes a configuration's caches and remembers the footprint of the longest."""

    def __init__(self, subject: Subject, kv: str, protection: Mapping[str, int]) -> None:
        self._subject, self._kv, self._protection = subject, kv, protection
        self._live: Cache = []
        self._longest: Footprint | None = None

    def new(self) -> Cache:
        """An empty cache. The one made before must no longer be in use."""
        self._measure()
        self._live = self._subject.new_cache(self._kv, **self._protection)
        return self._live

    def footprint(self) -> Footprint:
        """Of the longest sequence any cache has held. Lets go of the last cache."""
        self._measure()
        self._live = []
        assert self._longest is not None, "no cache has been used"
        return self._longest

    def _measure(self) -> None:
        tokens = max((int(getattr(c, "offset", 0)) for c in self._live), default=0)
        if tokens > (self._longest.tokens if self._longest else 0):
            self._longest = Footprint.of(self._live, tokens)
