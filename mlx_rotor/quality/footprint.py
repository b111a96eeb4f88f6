"""The size of a configuration's KV caches, measured on the caches that the evaluation itself uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..cache import RotorCache
from ..host.report import kv_bytes, kv_bytes_fp16, layers
from .model import Cache, EvaluatedModel


@dataclass(frozen=True)
class Footprint:
    """The size of a KV cache, and the ways it was attended to.

    Attributes:
        tokens: in the cache when it was measured.
        bytes: that the cache owns; fp16: that mlx_lm's own cache holds in fp16 for as many tokens.
        further: bytes that each further token adds once the exact tokens' room is full; None if nothing was packed.
        bits: stored bits of a packed element, scales and means included, averaged over layers; None likewise.
        codecs: "K codec/V codec" of every compressed layer, in order.
        fallback_calls: attention calls that read expanded keys and values instead of the packed ones.
    """

    tokens: int
    bytes: int
    fp16: int
    further: float | None
    bits: float | None
    codecs: tuple[str, ...]
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
            bits_per_element(cache),
            codecs(cache),
            len(use.compressed),
            use.total,
            use.fused_calls,
            use.fallback_calls,
        )


def codecs(cache: Sequence[Any]) -> tuple[str, ...]:
    return tuple("/".join(c.codecs) for c in cache if isinstance(c, RotorCache))


def _packed(cache: RotorCache) -> tuple[float, int] | None:
    """(bytes, elements) of a packed token of one layer, from its newest buffers' own sizes; None if none is packed."""
    if not cache.body.segments:
        return None
    sides = [packed_side(side) for side in (cache.body.segments[-1].k, cache.body.segments[-1].v)]
    return sum(stored for stored, _ in sides), sum(elements for _, elements in sides)


def packed_side(side: Any) -> tuple[float, int]:
    """(bytes, elements) of one packed token of one side, a `cache.body.Side` that holds any."""
    rows, heads = side.tiles.shape[:2]
    stored = (side.tiles.nbytes + (0 if side.scale is None else side.scale.nbytes)) / side.room
    if side.mean is not None and side.span:
        stored += side.mean.nbytes / side.mean.shape[2] / side.span
    return stored / rows, heads * side.codec.dim


def bytes_per_further_token(cache: Sequence[Any]) -> float | None:
    """From the buffers' own sizes. MeasuredCaches of bounded size (sliding windows, states) add nothing."""
    total = 0.0
    for c in cache:
        if isinstance(c, RotorCache):
            packed = _packed(c)
            if c.window is not None:
                continue
            if packed is None:
                return None
            total += packed[0]
        elif isinstance(getattr(c, "keys", None), mx.array) and not (
            hasattr(c, "max_size") or hasattr(c, "chunk_size")
        ):
            total += (c.keys.nbytes + c.values.nbytes) / c.keys.shape[2]
    return total


def bits_per_element(cache: Sequence[Any]) -> float | None:
    packed = [p for c in cache if isinstance(c, RotorCache) and (p := _packed(c)) is not None]
    return 8 * sum(b for b, _ in packed) / sum(n for _, n in packed) if packed else None


class MeasuredCaches:
    """Makes a configuration's caches and keeps the footprint of the longest sequence."""

    def __init__(self, evaluated: EvaluatedModel, kv: str, protection: Mapping[str, int]) -> None:
        self._evaluated, self._kv, self._protection = evaluated, kv, protection
        self._live: Cache = []
        self._longest: Footprint | None = None

    def new(self) -> Cache:
        """An empty cache. The one made before must no longer be in use."""
        self._measure()
        self._live = self._evaluated.new_cache(self._kv, **self._protection)
        return self._live

    def new_rows(self) -> Cache:
        """An empty cache for a batch, which is not measured: its size is not that of a sequence."""
        self._measure()
        self._live = []
        return self._evaluated.new_cache(self._kv, **self._protection)

    def footprint(self) -> Footprint:
        """The footprint of the longest sequence that any cache has held. The last cache is dropped."""
        self._measure()
        self._live = []
        assert self._longest is not None, "no cache has been used"
        return self._longest

    def _measure(self) -> None:
        tokens = max((int(getattr(c, "offset", 0)) for c in self._live), default=0)
        if tokens > (self._longest.tokens if self._longest else 0):
            self._longest = Footprint.of(self._live, tokens)
