"""The operations everything above calls: each picks the backend and runs its kernel, or its reference twin."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import reference
from .launch import backend
from .reference import Run

__all__ = ["Run", "attend", "backend"]


def attend(
    q: mx.array,
    runs: Sequence[Run],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention over runs of packed and exact tokens; see `reference.attend` for shapes."""
    backend()
    return reference.attend(q, runs, scale=scale, mask=mask, sinks=sinks)
