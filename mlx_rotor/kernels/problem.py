"""One attention as the decode and prefill kernels take it: checked, and as arrays by the names in the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..errors import RotorError
from . import metal
from .arguments import AttentionArgs
from .segments import ExactSegment, PackedSegment, Ready
from .spec import DTYPES

LOG2E = 1.4426950408889634
POSITION = "threadgroup_position_in_grid, thread_index_in_threadgroup, thread_index_in_simdgroup"
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2  # MLX_ROTOR_NO_MASK ...
CAUSAL, EXACT, KEPT, BETWEEN, BEHIND = 1, 2, 4, 8, 16  # flags, as rows.h has them
_NOTHING_MASKED = mx.array([[[[False]]]])
mx.eval(_NOTHING_MASKED)


@dataclass(frozen=True)
class Problem:
    """Everything that one launch takes, checked: shapes, types, and the arrays by the kernels' names for them.

    `rows` are the query rows of a KV head; `splits` counts the body's and, where this launch reads exact tokens,
    theirs, which is the last.
    """

    q: mx.array
    body: Ready
    rows: int
    splits: int
    mask_kind: int
    inputs: dict[str, mx.array]

    @property
    def dtype(self) -> str:
        return DTYPES[self.q.dtype]

    def partial_shapes(self) -> list[tuple[int, ...]]:
        lead = (self.q.shape[0], self.body.kv_heads, self.rows, self.splits)
        return [(*lead, self.body.v_dim), (*lead, 2)]


def arguments(names: tuple[str, ...]) -> str:
    """Arguments of the call lines of decode() and prefill(), from K's tiles on, for a launch with inputs `names`."""

    def given(name: str) -> str:
        return name if name in names else "nullptr"

    return f"""
      k_tiles, k_tiles_shape, {given("k_scale")}, v_tiles, v_tiles_shape, {given("v_scale")},
      {given("k_mean")}, {"k_mean_shape[2]" if "k_mean" in names else "0"},
      sink_k, sink_k_strides, sink_v, sink_v_strides, recent_k, recent_k_strides, recent_v, recent_v_strides,
      mask, mask_strides, lengths, sizes, out, stats"""


def problem(
    q: mx.array,
    args: AttentionArgs,
    sinks: ExactSegment | None,
    body: PackedSegment,
    recent: ExactSegment | None,
    *,
    splits: int,
    behind: int = 0,
    before: int = 0,
    after: int = 0,
) -> Problem:
    """The arguments of one launch over one packed segment, checked.

    Args:
        q: [B, Hq, L, D].
        sinks, recent: exact tokens. The launch of the last packed segment reads them.
        body: one of the packed segments; `before` packed tokens come before it, `after` behind it.
        splits: parts that the body is read in.
        behind: tokens that follow the last query's own.

    Raises:
        RotorError: what no kernel takes, by name.
    """
    if q.dtype not in DTYPES:
        raise RotorError(f"attention kernels take float16, bfloat16 or float32 queries, not {q.dtype}")
    ready = body.ready
    batch, heads, queries, dim = q.shape
    if dim != ready.k_dim or heads % ready.kv_heads:
        raise RotorError(
            f"queries {q.shape} don't go with {ready.kv_heads} KV heads of dimension {ready.k_dim}: "
            "the head dimension must be the same, and the KV heads must divide the query heads"
        )
    # An absent exact segment is the other one, with length 0; both absent: any array of the right kind.
    first = sinks or recent or _empty(q, ready)
    last = recent or first
    n_sinks, n_recent = sinks.length if sinks else 0, recent.length if recent else 0
    lengths, mask = args.lengths, args.mask
    if lengths is None:
        lengths = mx.array([[n_sinks, body.length, after + n_recent]] * batch, mx.int32)
    kind, mask_array = NO_MASK, _NOTHING_MASKED
    if isinstance(mask, mx.array):
        slots = n_sinks + before + body.length + after + n_recent
        kind = BOOL_MASK if mask.dtype == mx.bool_ else ADDED_MASK
        mask_array = mx.broadcast_to(mask, (batch, heads, queries, slots))
    exact_splits = int(after == 0 and n_sinks + n_recent > 0)
    flags = CAUSAL * args.causal + EXACT * exact_splits + KEPT * args.keep_first + BETWEEN * (before > 0)
    group = heads // ready.kv_heads
    sizes = [queries, group, splits, args.window or 0, flags + BEHIND * behind, n_sinks + before, body.length]
    inputs = {
        "q": q, "table": ready.k.table, "root": metal.constant(ready.k.back),
        "factor": metal.constant(args.scale * LOG2E),
        **ready.inputs,
        "sink_k": _row(first.k, q), "sink_v": _row(first.v, q),
        "recent_k": _row(last.k, q), "recent_v": _row(last.v, q),
        "mask": mask_array, "lengths": lengths, "sizes": mx.array(sizes, mx.int32),
    }  # fmt: skip
    return Problem(q, ready, group * queries, splits + exact_splits, kind, inputs)


def _empty(q: mx.array, body: Ready) -> ExactSegment:
    return ExactSegment(*(mx.zeros((q.shape[0], body.kv_heads, 1, d), q.dtype) for d in (body.k_dim, body.v_dim)))


def _row(x: mx.array, q: mx.array) -> mx.array:
    if x.dtype != q.dtype:
        raise RotorError(f"exact tokens are {x.dtype}, queries {q.dtype}: attention kernels take one dtype")
    return x
