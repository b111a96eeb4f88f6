"""A packed matrix times few rows of x: the Metal launch. Its twin: `reference.matmul`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .. import metal
from ..spec import DTYPES, Struct
from ..weights import PackedWeight
from .geometry import Geometry, check, geometry, side
from .prepared import Launch, names_of, pointer

ROWS = 64  # of the matrix that a threadgroup makes


def matvec(x: mx.array, w: PackedWeight) -> mx.array:
    """x [.., K], 1 to 8 rows, times the transpose of w [N, K], plus its bias: [.., N] in x's dtype.

    Raises:
        RotorError: for shapes or a dtype that the kernel does not take.
    """
    key = (x.shape, x.dtype)
    launch = w.launches.get(key)
    if launch is None or launch.stale():
        launch = w.launches[key] = _planned(x, w)
    return launch(x)


def _planned(x: mx.array, w: PackedWeight) -> Launch:
    check("matmul", x, w, 2)
    rows = x.size // w.columns
    shape = geometry(w.rows, w.columns, (side(w),), rows, ROWS)
    names = ("x", *names_of("", w))
    made = _kernel(DTYPES[x.dtype], w.struct, rows, w.rows, w.columns, shape, names)
    grid = (shape.threads * shape.tiles(w.rows), 1, 1)
    return Launch(made, [w], (*x.shape[:-1], w.rows), x.dtype, grid, shape.threads)


@metal.kept
def _kernel(
    dtype: str, weights: Struct, count: int, rows: int, columns: int, shape: Geometry, names: tuple[str, ...]
) -> Callable[..., list[mx.array]]:
    biased = "bias" in names
    return metal.kernel(
        "matvec",
        ("experts/matvec.h", weights.header),
        names,
        ("out",),
        f"""
  typedef Matvec<{weights.name}, {count}, {rows}, {columns}, {shape.numbers}> L;
  threadgroup float4 staged[L::COUNT * column_room(L::PANEL) / 4];
  threadgroup float floats[L::SIMDS * L::W::FLOATS];
  threadgroup uint words[L::SIMDS * L::W::CODES_AND_TABLES];
  matvec<L, {str(biased).lower()}>(x, codes, first, {pointer(names, "second", "decltype(first)(nullptr)")},
      {pointer(names, "bias", "x")}, out, (threadgroup float *)staged, floats, words,
      threadgroup_position_in_grid.x, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        contiguous=True,
    )
