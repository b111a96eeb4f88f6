"""Attention where nothing is packed yet: MLX's own, over the exact runs in one piece."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from .runs import ExactRun
from .sight import Sight, held_by, kept_in_front

# Taken when this module is imported: the host puts a wrapper in its place later, and that one calls us.
_stock = mx.fast.scaled_dot_product_attention


def attend_exact(
    q: mx.array,
    runs: Sequence[ExactRun],
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    window: int | None = None,
    kept: bool = False,
    lengths: mx.array | None = None,
) -> mx.array:
    """As `reference.attend`, without a packed run."""
    held = None if lengths is None else held_by([False] * len(runs), lengths)
    sight = Sight(q.shape[2], [run.length for run in runs], mask, window, held, kept_in_front(runs) if kept else 0)
    if window is not None or held is not None:
        mask = _whole(sight, q.shape[2])
    k, v = (runs[0].k, runs[0].v) if len(runs) == 1 else (mx.concatenate(side, axis=2) for side in _sides(runs))
    out = _stock(q, k, v, scale=scale, mask=mask, sinks=sinks)
    if held is not None:
        # A query of a row shorter than the batch's queries sees nothing, and its softmax is no number.
        padding = mx.stack(held).sum(0)[:, None] < mx.arange(q.shape[2], 0, -1)
        out = mx.where(padding[:, None, :, None], 0.0, out)
    return out.astype(q.dtype)


def _sides(runs: Sequence[ExactRun]) -> tuple[list[mx.array], list[mx.array]]:
    return [run.k for run in runs], [run.v for run in runs]


def _whole(sight: Sight, rows: int) -> mx.array | None:
    """The mask over all slots as one array; None where every slot is seen."""
    parts = [sight.part(run, 0, size) for run, size in enumerate(sight.sizes)]
    if all(part is None for part in parts):
        return None
    # Parts where all is seen, or that a mask of one column gave, become as wide as their runs.
    dtype = next(part.dtype for part in parts if part is not None)
    seen = mx.array(True) if dtype == mx.bool_ else mx.array(0, dtype)
    lead = mx.broadcast_shapes(*[part.shape[:-1] for part in parts if part is not None])
    return mx.concatenate(
        [
            mx.broadcast_to(seen if part is None else part, (*lead, size))
            for part, size in zip(parts, sight.sizes, strict=True)
        ],
        axis=-1,
    )
