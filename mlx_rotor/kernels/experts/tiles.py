"""Products of many rows with packed weights, in tiles: with one matrix, or each row with its expert's matrix.

`matmul_tiled` launches `experts/matmul.h`, held against `reference.matmul`; `gather_tiled` launches `experts/gather.h`,
held against `reference.gather`. A launch expands a row of weights once for the 16 to 64 rows of x of a threadgroup.
Expanded weights are float16, exact for codebooks, or float32 where x is; x, products and sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx

from ...errors import RotorError
from .. import metal
from ..spec import DTYPES, PackedWeight, Struct

THREADS, COLUMNS = 128, 32  # MLX_ROTOR_TILE_COLUMNS
THREADGROUPS = 256  # enough to fill a GPU
# Rows that a threadgroup takes -> simdgroups side by side in them, and bands of eight rows that each has.
SHAPES = {16: (2, 1), 32: (4, 1), 64: (4, 2)}


def matmul_tiled(x: mx.array, w: PackedWeight) -> mx.array:
    """x [R, K] times the transpose of w [N, K], plus its bias: [R, N] in x's dtype.

    Raises:
        RotorError: for shapes or a dtype that the kernel does not take.
    """
    _check(x, w, 2)
    return _launch(x, w, {}, x.shape[0], block_for(x.shape[0], w.rows, 32))


def gather_tiled(
    x: mx.array,
    w: PackedWeight,
    indices: mx.array,
    *,
    rows: mx.array | None = None,
    places: mx.array | None = None,
) -> mx.array:
    """Rows of x [T, K], each times its own expert of w [E, N, K], plus its bias: [R, N] in x's dtype.

    Args:
        indices: [R] uint32, below E; ascending, or an expert's weights are read again wherever its rows start anew.
        rows: [R] uint32, below T: the row of x that each product takes; None: x has R rows, in the order of `indices`.
        places: [R] uint32, a permutation: the row of the result of each product; None: in the order of `indices`.

    The values in these lists are not checked.

    Raises:
        RotorError: for shapes or a dtype that the kernel does not take.
    """
    _check(x, w, 3)
    lists = {"indices": indices, "rows": rows, "places": places}
    given = {name: a.astype(mx.uint32) for name, a in lists.items() if a is not None}
    count = len(indices) if rows is not None else x.shape[0]
    for name, a in given.items():
        if a.shape != (count,):
            raise RotorError(f"{name} of shape {list(a.shape)} for {count} rows; one a row")
    # Few rows of many experts: one threadgroup would take these one after the other.
    return _launch(x, w, given, count, block_for(count, w.rows, 16))


def gather_unsorted(x: mx.array, w: PackedWeight, indices: mx.array) -> mx.array:
    """Tokens x [T, K], each times its experts `indices` [T, k] of w [E, N, K], in any order: [T, k, N] in x's dtype.

    Neither x nor the result is copied to sort them. Raises as `gather_tiled`.
    """
    flat = indices.flatten()
    order = mx.argsort(flat)
    out = gather_tiled(x, w, flat[order], rows=order // indices.shape[1], places=order)
    return out.reshape(*indices.shape, w.rows)


def block_for(rows: int, width: int, least: int) -> int:
    """Rows that a threadgroup takes. More rows expand weights less often; fewer, at least `least`, fill a GPU."""
    block = next((block for block in SHAPES if rows <= block), max(SHAPES))
    while block > least and -(-rows // block) * -(-width // COLUMNS) < THREADGROUPS:
        block //= 2
    return block


def _check(x: mx.array, w: PackedWeight, dims: int) -> None:
    if w.parts[0].ndim != dims:
        raise RotorError(f"packed weights of shape {list(w.parts[0].shape)} need {dims} dimensions here")
    if x.ndim != 2 or x.shape[1] != w.columns:
        raise RotorError(f"rows of shape {list(x.shape)} do not fit weights of {w.columns} columns")
    if x.dtype not in DTYPES:
        raise RotorError(f"the tiled kernels take float16, bfloat16 and float32, not {x.dtype}")
    if w.columns % 32:
        raise RotorError(f"the tiled kernels take rows of a multiple of 32 weights, not {w.columns}")


def _launch(x: mx.array, w: PackedWeight, lists: dict[str, mx.array], count: int, block: int) -> mx.array:
    """[count, N]; `lists`: of `gather_tiled`, none for one matrix."""
    width = w.rows
    if not count:
        return mx.zeros((0, width), x.dtype)
    w = _roomy(w)
    inputs = {"x": x, "codes": w.parts[0], **dict(zip(("first", "second"), w.parts[1:], strict=False)), **lists}
    if w.bias is not None:
        inputs["bias"] = w.bias
    (out,) = _kernel(DTYPES[x.dtype], w.struct, block, (*inputs,))(
        inputs=[mx.contiguous(a) for a in inputs.values()],
        output_shapes=[(count, w.rows)],
        output_dtypes=[x.dtype],
        grid=(THREADS * -(-w.rows // COLUMNS), -(-count // block), 1),
        threadgroup=(THREADS, 1, 1),
    )
    return out[:, :width] if w.rows > width else out


def _roomy(w: PackedWeight) -> PackedWeight:
    """With more rows where an array has fewer than eight elements, which MLX would pass in constant memory."""
    if min(part.size for part in w.parts) >= 8:
        return w

    def longer(array: mx.array, axis: int) -> mx.array:
        return mx.pad(array, [(0, 8 if i == axis else 0) for i in range(array.ndim)])

    bias = None if w.bias is None else longer(w.bias, w.bias.ndim - 1)
    return replace(w, parts=tuple(longer(part, part.ndim - 2) for part in w.parts), bias=bias)


@metal.kept
def _kernel(dtype: str, weights: Struct, block: int, names: tuple[str, ...]) -> Callable[..., list[mx.array]]:
    staged = "float" if dtype == "float" else "half"
    wide, bands = SHAPES[block]
    gathered = "indices" in names
    operation, file = ("gather_tiled", "gather.h") if gathered else ("matmul_tiled", "matmul.h")

    def given(name: str, otherwise: str) -> str:
        return name if name in names else otherwise

    lists = f"indices, {given('rows', 'InOrder()')}, {given('places', 'InOrder()')}," if gathered else ""
    count = "indices_shape[0]" if gathered else "x_shape[0]"
    return metal.kernel(
        operation,
        (f"experts/{file}", weights.header),
        names,
        ("out",),
        f"""
  typedef Tile<{weights.name}, {dtype}, {staged}, {wide}, {bands}> P;
  threadgroup P::Staged stage[MLX_ROTOR_TILE_COLUMNS * MLX_ROTOR_TILE_ROOM];
  {operation}<P, {"true" if "bias" in names else "false"}>(
      x, uint({count}), uint(x_shape[1]), codes, first, {given("second", "decltype(first)(nullptr)")},
      uint(codes_shape[{1 if gathered else 0}]), {given("bias", "x")}, {lists} out, stage,
      threadgroup_position_in_grid, thread_index_in_threadgroup, simdgroup_index_in_threadgroup,
      thread_index_in_simdgroup);
""",
    )
