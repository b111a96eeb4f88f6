"""fp8's layer scales from the largest K and V that a text gave: numbers only, whoever measured them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import codec
from ..codec.fp8 import LARGEST
from .sidecar import Sidecar

# What other texts may reach beyond this one. fp8's error is relative: room costs nothing, and too little cuts off.
HEADROOM = 1.25


def scale(largest: float) -> float:
    """The layer scale for values up to `largest`, four figures of it; 1 where all are 0."""
    return float(f"{largest * HEADROOM / LARGEST:.4g}") if largest else 1.0


def scheme(largest: Sequence[tuple[float, float]], made: Mapping[str, Any], model: str = "") -> Sidecar:
    """`largest`: magnitudes of (K, V) of each compressed layer, in order. `made`, `model`: as `Sidecar`."""
    layers = tuple((codec.with_parameter("fp8", scale(k)), codec.with_parameter("fp8", scale(v))) for k, v in largest)
    told = {**made, "headroom": HEADROOM, "largest": [list(pair) for pair in largest]}
    return Sidecar("fp8", layers, model=model, made=told)
