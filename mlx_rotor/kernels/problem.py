"""What the attention kernels take: one attention, checked, as arrays in the kernels' order."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import RotorError
from .runs import ExactRun, PackedRun
from .spec import KernelSpec, spec_of

LOG2E = 1.4426950408889634
DTYPES = {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"}
INPUTS = (
    "q", "table", "root", "factor", "k_tiles", "k_scale", "v_tiles", "v_scale",
    "sink_k", "sink_v", "recent_k", "recent_v", "mask", "lengths", "sizes",
)  # fmt: skip
# The arguments of decode() and prefill() that are not inputs' own names.
ARGUMENTS = """
      q, q_strides, table, root, factor, k_tiles, k_tiles_shape, k_scale, v_tiles, v_tiles_shape, v_scale,
      sink_k, sink_k_strides, sink_v, sink_v_strides, recent_k, recent_k_strides, recent_v, recent_v_strides,
      mask, mask_strides, lengths, sizes, out, stats"""
POSITION = "threadgroup_position_in_grid, thread_index_in_threadgroup, thread_index_in_simdgroup"
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2  # MLX_ROTOR_NO_MASK ...


@dataclass(frozen=True)
class Problem:
    """Everything that one attention takes, checked: shapes, types, and the arrays of the kernels in their order.

    `rows` are the query rows of a KV head; `splits` counts the body's and, where there are any, the
    exact tokens', which is the last.
    """

    q: mx.array
    k: KernelSpec
    v: KernelSpec
    k_dim: int
    v_dim: int
    kv_heads: int
    body_splits: int
    splits: int
    mask_kind: int
    inputs: list[mx.array]

    @property
    def rows(self) -> int:
        return int(self.q.shape[1] // self.kv_heads * self.q.shape[2])

    @property
    def dtype(self) -> str:
        return DTYPES[self.q.dtype]

    def partial_shapes(self) -> list[tuple[int, ...]]:
        lead = (self.q.shape[0], self.kv_heads, self.rows, self.splits)
        return [(*lead, self.v_dim), (*lead, 2)]


def problem(
    q: mx.array,
    sink_run: ExactRun | None,
    body: PackedRun,
    recent: ExactRun | None,
    *,
    scale: float,
    mask: mx.array | str | None,
    window: int | None,
    lengths: mx.array | None,
    splits: int,
    behind: int = 0,
) -> Problem:
    """Checks and gathers; `behind` tokens follow the last query's own. Raises RotorError for what no kernel takes,
    saying what."""
    if q.dtype not in DTYPES:
        raise RotorError(f"attention kernels take float16, bfloat16 or float32 queries, not {q.dtype}")
    batch, heads, queries, _ = q.shape
    kv_heads = body.k.tiles.shape[1]
    if q.shape[3] != body.k.codec.dim or heads % kv_heads:
        raise RotorError(
            f"queries {q.shape} don't go with {kv_heads} KV heads of dimension {body.k.codec.dim}: "
            "the head dimension must be the same, and the KV heads must divide the query heads"
        )
    # An absent exact run is the other one, with length 0; both absent: any array of the right kind.
    k_dim, v_dim = body.k.codec.dim, body.v.codec.dim
    empty = ExactRun(*(mx.zeros((batch, kv_heads, 1, d), q.dtype) for d in (k_dim, v_dim)))
    first, last = sink_run or recent or empty, recent or sink_run or empty
    exact = [_rows(side, q.dtype) for run in (first, last) for side in (run.k, run.v)]
    held = [sink_run.length if sink_run else 0, body.length, recent.length if recent else 0]
    if lengths is None:
        lengths = mx.array([held] * batch, mx.int32)
    kind, mask_array = _mask(mask, (batch, heads, queries, sum(held)))
    exact_splits = int(held[0] + held[2] > 0)
    flags = int(isinstance(mask, str)) + 2 * exact_splits + 4 * behind
    sizes = [queries, heads // kv_heads, splits, window or 0, flags, held[0], held[1]]
    k, v = spec_of(body.k.codec), spec_of(body.v.codec)
    inputs = [
        q, k.table, mx.array(k.root, mx.float32), mx.array(scale * LOG2E, mx.float32),
        body.k.tiles, body.k.scale, body.v.tiles, body.v.scale, *exact, mask_array,
        lengths.astype(mx.int32), mx.array(sizes, mx.int32),
    ]  # fmt: skip
    return Problem(q, k, v, k_dim, v_dim, kv_heads, splits, splits + exact_splits, kind, inputs)


def _rows(x: mx.array, dtype: mx.Dtype) -> mx.array:
    if x.dtype != dtype:
        raise RotorError(f"exact tokens are {x.dtype}, queries {dtype}: attention kernels take one dtype")
    return x


def _mask(mask: mx.array | str | None, shape: tuple[int, ...]) -> tuple[int, mx.array]:
    """The kind of mask and an array of `shape`, broadcast without a copy; one element where there is none."""
    if mask is None or isinstance(mask, str):
        if mask not in (None, "causal"):
            raise RotorError(f"unknown mask {mask!r}: None, 'causal' or an array")
        return NO_MASK, mx.zeros((1, 1, 1, 1), mx.bool_)
    return BOOL_MASK if mask.dtype == mx.bool_ else ADDED_MASK, mx.broadcast_to(mask, shape)
