"""The projections into experts and the activation, for few tokens: the Metal launch. Its twin: `reference.gate_up`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ...errors import RotorError
from .. import metal
from ..spec import DTYPES, Struct
from ..weights import PackedWeight
from .geometry import Geometry, check, geometry, side
from .prepared import PairLaunch, names_of, pointer

ROWS = 128  # of each matrix that a threadgroup makes: x is some 2 % of their bytes at 2 bits
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
        launch = gate.launches[key] = _planned(x, gate, up, indices, activation)
    return launch(x, indices)


def _planned(x: mx.array, gate: PackedWeight, up: PackedWeight, indices: mx.array, activation: str) -> PairLaunch:
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
    shape = geometry(gate.rows, gate.columns, (side(gate), side(up)), 1, ROWS)
    names = ("x", "indices", *names_of("gate_", gate), *names_of("up_", up))
    made = _kernel(DTYPES[x.dtype], gate.struct, up.struct, activation, gate.rows, gate.columns, shape, names, slots)
    grid = (shape.threads * shape.tiles(gate.rows), slots, x.size // gate.columns)
    launch = PairLaunch(made, [gate, up], (*indices.shape, gate.rows), x.dtype, grid, shape.threads)
    launch.other = up
    return launch


@metal.kept
def _kernel(
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
