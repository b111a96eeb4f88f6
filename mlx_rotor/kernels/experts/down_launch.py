"""The projections out of experts and their sum, for few tokens: the Metal launch. Its twin: `reference.down`."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from ...errors import RotorError
from .. import metal
from ..spec import DTYPES, Struct
from ..weights import PackedWeight
from .geometry import Geometry, check, geometry, side
from .prepared import Launch, names_of, pointer

ROWS = 64  # of an expert's matrix that a threadgroup makes, of all its experts: more, and a GPU's cores have none left


def down_metal(
    h: mx.array, w: PackedWeight, indices: mx.array, weights: mx.array | None = None, dtype: mx.Dtype | None = None
) -> mx.array:
    """h [.., k, K] through its experts' w [E, N, K]: [.., N], the sum over k times `weights` [.., k] or [.., k, 1], in
    `dtype` (h's); without weights [.., k, N]. An index is below E: nothing checks it.

    Raises:
        RotorError: for shapes or a dtype that the kernel does not take.
    """
    key = (h.shape, h.dtype, indices.shape, None if weights is None else weights.shape, dtype)
    launch = w.launches.get(key)
    if launch is None or launch.stale():
        launch = w.launches[key] = _planned(h, w, indices, weights, dtype)
    return launch(h, indices) if weights is None else launch(h, indices, weights)


def _planned(
    h: mx.array, w: PackedWeight, indices: mx.array, weights: mx.array | None, dtype: mx.Dtype | None
) -> Launch:
    check("down", h, w, 3)
    fitting = (indices.shape, (*indices.shape, 1))
    if h.shape[:-1] != indices.shape or not indices.ndim or (weights is not None and weights.shape not in fitting):
        of = "" if weights is None else f" and weights {list(weights.shape)}"
        raise RotorError(f"down: h {list(h.shape)} does not fit indices {list(indices.shape)}{of}")
    *lead, slots = indices.shape
    shape = geometry(w.rows, w.columns, (side(w),), 1, ROWS)
    names = ("h", "indices", *(() if weights is None else ("weights",)), *names_of("", w))
    made = _kernel(DTYPES[h.dtype], w.struct, w.rows, w.columns, shape, names, slots)
    grid = (shape.threads * shape.tiles(w.rows), slots if weights is None else 1, math.prod(lead))
    result = (*lead, slots, w.rows) if weights is None else (*lead, w.rows)
    return Launch(made, [w], result, dtype or h.dtype, grid, shape.threads)


@metal.kept
def _kernel(
    dtype: str, weights: Struct, rows: int, columns: int, shape: Geometry, names: tuple[str, ...], slots: int
) -> Callable[..., list[mx.array]]:
    weighted, biased = (str(name in names).lower() for name in ("weights", "bias"))
    return metal.kernel(
        "down",
        ("experts/down.h", weights.header),
        names,
        ("out",),
        f"""
  typedef Down<{weights.name}, {rows}, {columns}, {shape.numbers}> L;
  threadgroup float4 staged[column_room(L::PANEL) / 4];
  threadgroup float floats[L::SIMDS * L::W::FLOATS];
  threadgroup uint words[L::SIMDS * L::W::CODES_AND_TABLES];
  down<L, {weighted}, {biased}>(h, codes, first, {pointer(names, "second", "decltype(first)(nullptr)")},
      {pointer(names, "bias", "h")}, indices, {pointer(names, "weights", "indices")}, {slots}, out,
      (threadgroup float *)staged, floats, words,
      threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        contiguous=True,
    )
