"""What became of a model's expert layers, for people and machines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..experts.fused import Counts
from ..kernels.weights import PackedWeight
from .report import spans


@dataclass(frozen=True)
class ExpertLayer:
    """One layer's experts.

    Attributes:
        path: of the module; number: of its layer.
        formats: of its weights, for people; "" where they are left to mlx_lm.
        left: why they are, "" where they are fused.
        summed: the weighted sum, if there is one, is part of the last launch.
        own_router: why the router is mlx_lm's own, "" where it is a launch.
        slow: numbers of tokens left to mlx_lm, which is faster with them on this machine.
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
        """Of the expert kernels for a decoded token: the router's where it is ours, and two."""
        return 2 if self.own_router else 3

    @property
    def idle(self) -> bool:
        """It was to be fused, was called, and never ran fused."""
        return not self.left and self.counts.fused == 0 and self.counts.stock > 0


@dataclass(frozen=True)
class ExpertReport:
    """All of a model's expert layers. `mode`: what `--experts` said; `backend`: of the kernels, "" unused."""

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
        """The part on layers that are left to mlx_lm."""
        groups = _grouped([layer for layer in self.layers if layer.left], lambda e: e.left)
        return "; ".join(f"{_count(group)} left to mlx_lm ({why})" for why, group in groups)

    def calls(self) -> list[str]:
        """What a person reads after a run: how often they ran fused, and a warning for layers that never did."""
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
    """As in "2-bit/2-bit/3-bit affine": gate, up and down."""
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
