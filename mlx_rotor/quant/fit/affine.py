"""Weights to MLX's affine format: packed codes, and a scale and a bias a group of them, w ~ scale * code + bias.

The format is MLX's; which of its points a weight goes to is ours to choose. `mx.quantize` spans the range of the
group on a grid with a zero on it; `search` minimises the squared error, after scale and bias are rounded.
"""

from __future__ import annotations

import mlx.core as mx

from ...errors import RotorError
from ..policy import BITS, GROUP_SIZES
from .packing import pack_groups
from .rows import by_chunks, check_not_empty
from .search import BEST, SEARCH, Effort, Groups, by_groups, search

EFFORTS = {"search": SEARCH, "best": BEST}
Parts = tuple[mx.array, mx.array, mx.array]


def fit_affine(
    w: mx.array,
    *,
    bits: int,
    group_size: int = 64,
    fit: str = "search",
    importance: mx.array | None = None,
    dtype: mx.Dtype = mx.bfloat16,
) -> Parts:
    """Weights [.., K] of any floating dtype, finite, as (codes, scales, biases) that `mx.dequantize` takes.

    Codes are uint32 [.., K*bits/32]; scales and biases [.., K/group_size] in `dtype`. The fit `fast` is mx.quantize of
    the weights in `dtype`; `search` and `best` minimise sum(importance * (w - decoded)**2) in every group, and never
    leave more than mx.quantize. `importance` >= 0 broadcasts to w: [K], or [E, 1, K] for experts; `fast` ignores it.
    Worked on in float32, a chunk at a time. Evaluates what it returns.

    Raises:
        RotorError: bits, a group size or an importance that don't go with w; an unknown fit.
    """
    check(w, bits, group_size)
    if fit != "fast" and fit not in EFFORTS:
        raise RotorError(f"unknown fit {fit!r}; fits: {', '.join(('fast', *EFFORTS))}")

    def work(rows: mx.array, heeded: mx.array | None) -> tuple[mx.array, ...]:
        if fit == "fast":
            return tuple(mx.quantize(rows.astype(dtype), group_size, bits))
        return _fitted(rows, bits, group_size, EFFORTS[fit][bits], heeded, dtype)

    codes, scales, biases = by_chunks(w, importance, work)
    return codes, scales, biases


def check(w: mx.array, bits: int, group_size: int) -> None:
    """RotorError where weights of this shape have no affine form of these bits and groups."""
    if bits not in BITS or group_size not in GROUP_SIZES:
        known = f"bits: {', '.join(map(str, BITS))}; group sizes: {', '.join(map(str, GROUP_SIZES))}"
        raise RotorError(f"no affine format of {bits} bits in groups of {group_size}; {known}")
    check_not_empty(w)
    if w.shape[-1] % group_size:
        raise RotorError(f"group_size {group_size} does not divide {w.shape[-1]}, the last dimension of {w.shape}")


def _fitted(
    rows: mx.array, bits: int, group_size: int, effort: Effort, importance: mx.array | None, dtype: mx.Dtype
) -> Parts:
    """Of rows [R, K] with an importance [R or 1, K]."""
    _, scale, bias = mx.quantize(rows.astype(dtype), group_size, bits)
    groups = Groups.of(
        by_groups(rows.astype(mx.float32), group_size),
        None if importance is None else by_groups(importance, group_size),
        dtype,
    )
    scale, bias, codes = search(groups, (scale[None].astype(mx.float32), bias[None].astype(mx.float32)), bits, effort)
    return pack_groups(codes, bits), scale[0], bias[0]
