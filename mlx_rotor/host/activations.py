"""Which of the kernels' activations an expert layer has: found out by computing, not by its name."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..kernels.experts.reference import ACTIVATIONS, activate

# Where known forms differ: around 0 and 2.7 (forms of GELU), around 7 (gpt-oss's limit) and far out (other limits).
_POSITIVE = (1e-3, 0.3, 1.0, 1.9, 2.7, 4.0, 6.9, 7.1, 11.0, 40.0, 200.0, 2e3, 2e4)
_POINTS = (0.0, *_POSITIVE, *(-x for x in _POSITIVE))
_TOLERANCE = 3e-5


def kernel_name(activation: Any) -> str | None:
    """The name in `ACTIVATIONS` of an activation that is called with (up, gate), None if it computes none of them."""
    up, gate = (a.flatten() for a in mx.meshgrid(mx.array(_POINTS), mx.array(_POINTS)))
    try:
        out = activation(up, gate)
    except (ValueError, TypeError):  # it wants another shape
        return None
    if not isinstance(out, mx.array) or out.shape != up.shape:
        return None
    size = mx.maximum(mx.abs(up), 1) * mx.maximum(mx.abs(gate), 1)
    for name in ACTIVATIONS:
        if mx.all(mx.abs(out - activate(name, gate, up)) <= _TOLERANCE * size).item():
            return name
    return None
