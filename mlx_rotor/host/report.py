"""What a prompt cache holds and what became of its layers, for people and machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache import RotorCache
from ..kernels import backend


def _arrays(cache: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(cache.state)  # type: ignore[assignment]
    return [a for _, a in leaves if isinstance(a, mx.array)]


def kv_bytes(caches: Sequence[Any]) -> int:
    """Every byte the caches own, room not used yet included."""
    return sum(int(c.nbytes) if not c.empty() else 0 for c in caches)


def _elements(cache: Any) -> int:
    """Numbers a cache stands for, without the room it has not used."""
    if isinstance(cache, RotorCache):
        return cache.elements
    if cache.empty():
        return 0
    keys: Any = getattr(cache, "keys", None)
    values: Any = getattr(cache, "values", None)
    if isinstance(keys, mx.array):
        return (keys.size + values.size) * min(cache.offset, keys.shape[2]) // keys.shape[2]
    if isinstance(keys, (tuple, list)):  # MLX's affine quantization: one scale for group_size numbers
        scales = keys[1].size + values[1].size
        return scales * cache.group_size * cache.offset // keys[1].shape[2]
    return sum(a.size for a in _arrays(cache))


def kv_bytes_fp16(caches: Sequence[Any]) -> int:
    """Bytes of the same tokens at 16 bits an element, without spare room."""
    return 2 * sum(_elements(c) for c in caches)


@dataclass(frozen=True)
class LayerReport:
    """How a model's layers used a prompt cache. Calls are attention calls since the cache was made."""

    compressed: list[int]
    exact: list[int]
    fallen_back: list[int]
    fused_calls: int
    fallback_calls: int
    codecs: dict[tuple[str, str], list[int]]

    @property
    def total(self) -> int:
        return len(self.compressed) + len(self.exact)


def layers(caches: Sequence[Any]) -> LayerReport:
    ours = {i: c for i, c in enumerate(caches) if isinstance(c, RotorCache)}
    codecs: dict[tuple[str, str], list[int]] = {}
    for i, c in ours.items():
        codecs.setdefault((c.body_k.codec_name, c.body_v.codec_name), []).append(i)
    return LayerReport(
        compressed=list(ours),
        exact=[i for i in range(len(caches)) if i not in ours],
        fallen_back=[i for i, c in ours.items() if c.counts.fallback],
        fused_calls=sum(c.counts.fused for c in ours.values()),
        fallback_calls=sum(c.counts.fallback for c in ours.values()),
        codecs=codecs,
    )


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in out)


def describe(caches: Sequence[Any]) -> str:
    """One line: which layers use which codecs, on which backend, and which are left alone."""
    report = layers(caches)
    parts = [f"layers {spans(at)}: K {k}, V {v}" for (k, v), at in report.codecs.items()]
    if parts:
        parts[-1] += f" ({backend()} kernels)"
    if report.exact:
        kinds = sorted({type(caches[i]).__name__ for i in report.exact})
        parts.append(f"layers {spans(report.exact)}: left exact ({', '.join(kinds)})")
    return "; ".join(parts)


def packed_tokens(caches: Sequence[Any]) -> int:
    """Tokens the fullest compressed layer holds packed."""
    return max((c.body_k.length for c in caches if isinstance(c, RotorCache)), default=0)
