"""A quantized checkpoint's states against transformers' of the unquantized one, by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.nn as nn
import mlx_side
import numpy as np
from traces import Trace, cosine


@dataclass(frozen=True)
class Bars:
    """Least cosines of every layer: the residual stream behind it; its attention alone, on the reference's own input;
    and what its router and experts add, all before them quantized too."""

    hidden: float
    attention: float
    experts: float


@dataclass(frozen=True)
class Cosines:
    """The same as measured, one number a layer."""

    hidden: tuple[float, ...]
    attention: tuple[float, ...]
    experts: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, found: Trace, truth: Trace) -> Cosines:
        """`found`: the trace of `model` on the tokens that `truth` is of."""
        pairs = list(zip(found.layers, truth.layers, strict=True))
        alone = (mlx_side.attention(model, i, layer.attention[0]) for i, layer in enumerate(truth.layers))
        return cls(
            tuple(cosine(a.left, b.left) for a, b in pairs),
            tuple(cosine(out, layer.attention[1]) for out, layer in zip(alone, truth.layers, strict=True)),
            tuple(cosine(a.experts[1], b.experts[1]) for a, b in pairs),
        )

    def below(self, bars: Bars) -> list[str]:
        """What misses its bar, by name and layer."""
        return [
            f"{what}, layer {layer}: {value:.6f} < {least}"
            for what, least in vars(bars).items()
            for layer, value in enumerate(getattr(self, what))
            if not value >= least
        ]

    def lines(self) -> Iterator[str]:
        for what, values in vars(self).items():
            yield f"  {what:9} " + " ".join(f"{value:.6f}" for value in values)


def changes(a: np.ndarray, b: np.ndarray) -> int:
    """Experts chosen in routing a [T, E] that are not in b."""
    return int(((a > 0) & ~(b > 0)).sum())
