"""Reports on a prompt cache and its layers, and on a model's expert layers, for people and machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import codec
from ..cache import RotorCache
from ..experts.fused import Counts
from ..kernels import backend
from ..kernels.spec import PackedWeight
from .layers import left_exact
from .slots import Path, slots


def _arrays(cache: Any) -> list[mx.array]:
    leaves: list[tuple[str, Any]] = tree_flatten(cache.state)  # type: ignore[assignment]
    return [a for _, a in leaves if isinstance(a, mx.array)]


def kv_bytes(caches: Sequence[Any]) -> int:
    """Every byte the caches own, room not used yet included."""
    return sum(int(c.nbytes) if not c.empty() else 0 for c in slots(caches).values())


def _elements(cache: Any) -> int:
    """Numbers that the tokens of a cache stand for, without unused room."""
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
    """The name of what attends to tokens of these codecs: kernels, or MLX operations where a codec has none."""
    # Whether a codec has a kernel is the same for every dimension.
    missing = any(codec.get(name.partition(" ")[0], 128).kernel is None for name in (k, v))
    return "MLX operations" if missing else f"{backend()} kernels"


def describe(caches: Sequence[Any]) -> str:
    """One line: the codecs, windows and backends of the compressed layers, and the reasons of those left exact."""
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


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts.

    Attributes:
        path: of the module; number: of its layer.
        formats: of its weights, for people; "" where mlx_lm runs the experts.
        left: the reason why mlx_lm runs them; "" where they are fused.
        summed: the weighted sum, if there is one, is part of the last launch.
        own_router: the reason why the router is mlx_lm's own; "" where it is a launch of ours.
        slow: numbers of tokens for which mlx_lm runs the experts, as it is faster with them on this machine.
        counts: its calls.
    """

    path: str
    formats: str = ""
    left: str = ""
    summed: bool = False
    own_router: str = ""
    slow: tuple[int, ...] = ()
    counts: Counts = field(default_factory=Counts, compare=False)

    @property
    def number(self) -> int:
        return next((int(part) for part in self.path.split(".") if part.isdigit()), 0)

    @property
    def launches(self) -> int:
        """Launches of expert kernels for a decoded token: the router's where it is ours, and two."""
        return 2 if self.own_router else 3

    @property
    def idle(self) -> bool:
        """Whether it was to be fused, was called, and never ran fused."""
        return not self.left and self.counts.fused == 0 and self.counts.stock > 0


@dataclass(frozen=True)
class ExpertReport:
    """All of a model's expert layers. `mode`: the value of `--experts`; `backend`: of the kernels, "" if unused."""

    mode: str
    backend: str
    layers: tuple[ExpertLayer, ...] = ()

    @property
    def fused(self) -> list[ExpertLayer]:
        return [layer for layer in self.layers if not layer.left]

    def describe(self) -> str:
        """One line; "" for a model without expert layers."""
        parts = []
        for (formats, launches), group in _grouped(self.fused, lambda e: (e.formats, e.launches)):
            how = f"{launches} launches a layer" if self.backend == "metal" else f"{self.backend} kernels"
            parts.append(f"{_count(group)} fused ({formats}, {how})")
        for why, group in _grouped(self.fused, lambda e: e.own_router):
            parts += [f"{_which(group)}: mlx_lm's router ({why})"] if why else []
        unsummed = [layer for layer in self.fused if not layer.summed]
        parts += [f"{_which(unsummed)}: the model's own weighted sum"] if unsummed else []
        for slow, group in _grouped(self.fused, lambda e: e.slow):
            parts += [f"{_which(group)}: stock for {_rows(slow)} at once, faster here"] if slow else []
        left = self.describe_left()
        return "; ".join([*parts, left] if left else parts)

    def describe_left(self) -> str:
        """The part on layers whose experts mlx_lm runs."""
        groups = _grouped([layer for layer in self.layers if layer.left], lambda e: e.left)
        return "; ".join(f"{_count(group)} left to mlx_lm ({why})" for why, group in groups)

    def calls(self) -> list[str]:
        """Lines for people after a run: calls that ran fused, and a warning for layers that never did."""
        d, idle = self.to_dict(), [layer for layer in self.layers if layer.idle]
        lines = [f"Experts: {d['fused_calls']} calls fused, {d['stock_calls']} in mlx_lm's own way"]
        return lines + ([f"Warning: experts of {_which(idle)} were to be fused and never were"] if idle else [])

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "backend": self.backend,
            "fused": [
                {"layers": [e.number for e in group], "formats": formats, "launches": launches, "summed": summed}
                for (formats, launches, summed), group in _grouped(
                    self.fused, lambda e: (e.formats, e.launches, e.summed)
                )
            ],
            "own_router": [
                {"layers": [e.number for e in group], "why": why}
                for why, group in _grouped(self.fused, lambda e: e.own_router)
                if why
            ],
            "left": [
                {"layers": [e.number for e in group], "why": why}
                for why, group in _grouped([e for e in self.layers if e.left], lambda e: e.left)
            ],
            "fused_calls": sum(e.counts.fused + e.counts.tiled for e in self.layers),
            "stock_calls": sum(e.counts.stock for e in self.layers),
            "never_fused": [e.number for e in self.layers if e.idle],
        }


def formats(packed: Sequence[PackedWeight]) -> str:
    """The formats of gate, up and down, as in "2-bit/2-bit/3-bit affine"."""
    kinds = [(w.format.bits, w.format.mode) for w in packed]
    if len(set(kinds)) == 1:
        return f"{kinds[0][0]}-bit {kinds[0][1]}"
    if len({mode for _, mode in kinds}) == 1:
        return "/".join(f"{bits}-bit" for bits, _ in kinds) + f" {kinds[0][1]}"
    return "/".join(f"{bits}-bit {mode}" for bits, mode in kinds)


def _grouped(layers: Iterable[ExpertLayer], key: Any) -> list[tuple[Any, list[ExpertLayer]]]:
    groups: dict[Any, list[ExpertLayer]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return list(groups.items())


def _count(group: Sequence[ExpertLayer]) -> str:
    return f"{len(group)} layer{'' if len(group) == 1 else 's'}"


def _which(group: Sequence[ExpertLayer]) -> str:
    return f"layers {spans(sorted({layer.number for layer in group}))}"


def _rows(numbers: Sequence[int]) -> str:
    return f"{spans(numbers)} token{'' if list(numbers) == [1] else 's'}"
