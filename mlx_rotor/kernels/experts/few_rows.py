"""Products with packed weights for at most 8 rows, where a weight is decoded once a launch.

`gate_up_metal` launches `experts/gate_up.h`, held against `reference.gate_up`: the projections into experts and the
activation. `down_metal` launches `experts/down.h`, held against `reference.down`: the projections out of experts and
their weighted sum. `matvec` launches `experts/matvec.h`, held against `reference.matmul`: one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from ...errors import RotorError
from .. import metal
from ..spec import DTYPES, PackedWeight, Struct
from .prepared import Geometry, Launch, PairLaunch, check, geometry, names_of, pointer, side

GATE_UP_ROWS = 128  # of each matrix that a threadgroup makes: x is some 2 % of their bytes at 2 bits
STRUCTS = {"swiglu": "SwiGlu", "geglu": "GeGlu", "gpt_oss": "GptOss"}


def gate_up_metal(x: mx.array, gate: PackedWeight, up: PackedWeight, indices: mx.array, activation: str) -> mx.array:
    """Tokens x [.., K] through both projections of their experts [E, N, K], `indices` [.., k], and the activation:
    [.., k, N] in x's dtype. Experts that no token chose are not read; an index is below E: nothing checks it.

    Raises:
        RotorError: for shapes, a dtype or an activation that the kernel does not take.
    """
    key = (activation, x.shape, x.dtype, indices.shape)
    launch = gate.launches.get(key)
    if launch is None or launch.other is not up or launch.stale():
        gate.launches.drop(lambda known: isinstance(known, PairLaunch) and known.other is not up)  # they keep it alive
        launch = gate.launches[key] = _gate_up_planned(x, gate, up, indices, activation)
    return launch(x, indices)


def _gate_up_planned(
    x: mx.array, gate: PackedWeight, up: PackedWeight, indices: mx.array, activation: str
) -> PairLaunch:
    for w in (gate, up):
        check("gate_up", x, w, 3)
    if activation not in STRUCTS:
        raise RotorError(f"unknown activation {activation!r}; known: {', '.join(STRUCTS)}")
    if gate.rows != up.rows or indices.ndim != x.ndim or indices.shape[:-1] != x.shape[:-1]:
        raise RotorError(
            f"gate_up: x {list(x.shape)} and indices {list(indices.shape)} do not fit"
            f" {gate.rows} rows of gate and {up.rows} of up"
        )
    if (gate.bias is None) != (up.bias is None):
        raise RotorError("gate_up: of gate and up one has a bias and one has none; give the other zeros")
    slots = indices.shape[-1]
    shape = geometry(gate.rows, gate.columns, (side(gate), side(up)), 1, GATE_UP_ROWS)
    names = ("x", "indices", *names_of("gate_", gate), *names_of("up_", up))
    made = _gate_up_kernel(
        DTYPES[x.dtype], gate.struct, up.struct, activation, gate.rows, gate.columns, shape, names, slots
    )
    grid = (shape.threads * shape.tiles(gate.rows), slots, x.size // gate.columns)
    launch = PairLaunch(made, [gate, up], (*indices.shape, gate.rows), x.dtype, grid, shape.threads)
    launch.other = up
    return launch


@metal.kept
def _gate_up_kernel(
    dtype: str,
    gate: Struct,
    up: Struct,
    activation: str,
    rows: int,
    columns: int,
    shape: Geometry,
    names: tuple[str, ...],
    slots: int,
) -> Callable[..., list[mx.array]]:
    biased = "gate_bias" in names
    types = f"{gate.name}, {up.name}, {STRUCTS[activation]}"
    return metal.kernel(
        "gate_up",
        ("experts/gate_up.h", gate.header, up.header),
        names,
        ("out",),
        f"""
  typedef GateUp<{types}, {rows}, {columns}, {shape.numbers}> L;
  threadgroup float4 staged[column_room(L::PANEL) / 4];
  threadgroup float floats[L::SIMDS * (L::G::FLOATS + L::U::FLOATS)];
  threadgroup uint words[L::SIMDS * (L::G::CODES_AND_TABLES + L::U::CODES_AND_TABLES)];
  gate_up<L, {str(biased).lower()}>(x,
      gate_codes, gate_first, {pointer(names, "gate_second", "decltype(gate_first)(nullptr)")},
      up_codes, up_first, {pointer(names, "up_second", "decltype(up_first)(nullptr)")},
      {pointer(names, "gate_bias", "x")}, {pointer(names, "up_bias", "x")}, indices, {slots}, out,
      (threadgroup float *)staged, floats, words,
      threadgroup_position_in_grid, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
""",
        contiguous=True,
    )


DOWN_ROWS = (
    64  # of an expert's matrix that a threadgroup makes, of all its experts: more, and a GPU's cores have none left
)


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
        launch = w.launches[key] = _down_planned(h, w, indices, weights, dtype)
    return launch(h, indices) if weights is None else launch(h, indices, weights)


def _down_planned(
    h: mx.array, w: PackedWeight, indices: mx.array, weights: mx.array | None, dtype: mx.Dtype | None
) -> Launch:
    check("down", h, w, 3)
    fitting = (indices.shape, (*indices.shape, 1))
    if h.shape[:-1] != indices.shape or not indices.ndim or (weights is not None and weights.shape not in fitting):
        of = "" if weights is None else f" and weights {list(weights.shape)}"
        raise RotorError(f"down: h {list(h.shape)} does not fit indices {list(indices.shape)}{of}")
    *lead, slots = indices.shape
    shape = geometry(w.rows, w.columns, (side(w),), 1, DOWN_ROWS)
    names = ("h", "indices", *(() if weights is None else ("weights",)), *names_of("", w))
    made = _down_kernel(DTYPES[h.dtype], w.struct, w.rows, w.columns, shape, names, slots)
    grid = (shape.threads * shape.tiles(w.rows), slots if weights is None else 1, math.prod(lead))
    result = (*lead, slots, w.rows) if weights is None else (*lead, w.rows)
    return Launch(made, [w], result, dtype or h.dtype, grid, shape.threads)


@metal.kept
def _down_kernel(
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


MATVEC_ROWS = 64  # of the matrix that a threadgroup makes


def matvec(x: mx.array, w: PackedWeight) -> mx.array:
    """x [.., K], 1 to 8 rows, times the transpose of w [N, K], plus its bias: [.., N] in x's dtype.

    Raises:
        RotorError: for shapes or a dtype that the kernel does not take.
    """
    key = (x.shape, x.dtype)
    launch = w.launches.get(key)
    if launch is None or launch.stale():
        launch = w.launches[key] = _matvec_planned(x, w)
    return launch(x)


def _matvec_planned(x: mx.array, w: PackedWeight) -> Launch:
    check("matmul", x, w, 2)
    rows = x.size // w.columns
    shape = geometry(w.rows, w.columns, (side(w),), rows, MATVEC_ROWS)
    names = ("x", *names_of("", w))
    made = _matvec_kernel(DTYPES[x.dtype], w.struct, rows, w.rows, w.columns, shape, names)
    grid = (shape.threads * shape.tiles(w.rows), 1, 1)
    return Launch(made, [w], (*x.shape[:-1], w.rows), x.dtype, grid, shape.threads)


@metal.kept
def _matvec_kernel(
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
