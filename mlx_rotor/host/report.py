"""What a prompt cache holds and what became of its layers, for people and machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import codec
from ..cache import RotorCache
from ..kernels import backend
from .layers import left_exact
from .slots import Path, slots


def _arrays(cache: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(cache.state)  # type: ignore[assignment]
    return [a for _, a in leaves if isinstance(a, mx.array)]


def kv_bytes(caches: Sequence[Any]) -> int:
    """Every byte the caches own, room not used yet included."""
    return sum(int(c.nbytes) if not c.empty() else 0 for c in slots(caches).values())


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
    return 2 * sum(_elements(c) for c in slots(caches).values())


@dataclass(frozen=True)
class LayerReport:
    """How a model's layers used a prompt cache. Calls are attention calls since the cache was made.

    Attributes:
        compressed, exact: layer numbers; a layer with one compressed cache among several is compressed.
        fallen_back: compressed ones that attended to expanded arrays.
        codecs: layers by (K, V) codecs; "(scaled)" stands for a scale of each layer's own.
        windows: layers by the width of their sliding window, for compressed ones that have one.
        reasons: exact layers by why they are, or by the kind of their cache.
    """

    compressed: list[int]
    exact: list[int]
    fallen_back: list[int]
    fused_calls: int
    fallback_calls: int
    codecs: dict[tuple[str, str], list[int]]
    windows: dict[int, list[int]]
    reasons: dict[str, list[int]]

    @property
    def total(self) -> int:
        return len(self.compressed) + len(self.exact)


def layers(caches: Sequence[Any]) -> LayerReport:
    every = slots(caches)
    ours = {path: c for path, c in every.items() if isinstance(c, RotorCache)}
    compressed = _layers(ours)
    codecs: dict[tuple[str, str], list[int]] = {}
    windows: dict[int, list[int]] = {}
    reasons: dict[str, list[int]] = {}
    for (i, *_), c in ours.items():
        _add(codecs, (_base(c.codecs[0]), _base(c.codecs[1])), i)
        if c.window is not None:
            _add(windows, c.window, i)
    for (i, *_), c in every.items():
        if i not in compressed:
            _add(reasons, left_exact(c), i)
    return LayerReport(
        compressed=compressed,
        exact=[i for i in range(len(caches)) if i not in compressed],
        fallen_back=_layers([path for path, c in ours.items() if c.counts.fallback > 0]),
        fused_calls=sum(c.counts.fused for c in ours.values()),
        fallback_calls=sum(c.counts.fallback for c in ours.values()),
        codecs=codecs,
        windows=windows,
        reasons=reasons,
    )


def _base(name: str) -> str:
    base, colon, _ = name.partition(":")
    return f"{base} (scaled)" if colon else base


def _layers(paths: Iterable[Path]) -> list[int]:
    return sorted({path[0] for path in paths})


def _add(groups: dict[Any, list[int]], key: Any, layer: int) -> None:
    group = groups.setdefault(key, [])
    if layer not in group:
        group.append(layer)


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    out: list[list[int]] = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in out)


def runs_as(k: str, v: str) -> str:
    """What attends to tokens packed with these codecs: kernels of a backend, or MLX operations where one has none."""
    # Whether a codec has a kernel is the same for every dimension.
    missing = any(codec.get(name.partition(" ")[0], 128).kernel is None for name in (k, v))
    return "MLX operations" if missing else f"{backend()} kernels"


def describe(caches: Sequence[Any]) -> str:
    """One line: which layers use which codecs, windows and backends, and which are left exact and why."""
    report = layers(caches)
    hows = [runs_as(k, v) for k, v in report.codecs]
    parts = []
    for nth, ((k, v), at) in enumerate(report.codecs.items()):
        # Once, behind the last of those it is true of.
        how = "" if hows[nth] in hows[nth + 1 :] else f" ({hows[nth]})"
        parts.append(f"layers {spans(at)}: K {k}, V {v}{how}")
    parts += [f"layers {spans(at)}: a window of {width} tokens" for width, at in report.windows.items()]
    parts += [f"layers {spans(at)}: left exact ({reason})" for reason, at in report.reasons.items()]
    return "; ".join(parts)


def packed_tokens(caches: Sequence[Any]) -> int:
    """Tokens the fullest compressed layer holds packed."""
    return max((c.body.length for c in slots(caches).values() if isinstance(c, RotorCache)), default=0)
