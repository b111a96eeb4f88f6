"""Attention of few query rows over packed tokens, and the launch that puts the parts of any attention together.

`decode` launches `attention/decode.h`, `merge` launches `attention/merge.h`. Both are held against `reference.attend`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import mlx.core as mx

from . import metal
from .packed import TILE
from .problem import POSITION, Problem, arguments
from .spec import KernelSpec

DECODE_ROWS = 8  # query rows of a KV head that the decode kernel takes at a time
_NO_LOGITS = mx.array([0.0])
mx.eval(_NO_LOGITS)


def simds_for(dtype: str) -> int:
    """Simdgroups of a threadgroup: as many as their staged tiles fit 32 KiB, which a float takes twice of."""
    return 2 if dtype == "float" else 4


def decode(p: Problem) -> list[mx.array]:
    """Partial results and statistics of every split, `Problem.partial_shapes`, for up to DECODE_ROWS query rows."""
    made = _decode(
        p.dtype, p.body.k, p.body.v, p.body.k_dim, p.body.v_dim, p.rows, p.mask_kind, p.body.span, (*p.inputs,)
    )
    threads = 32 * simds_for(p.dtype)
    return made(
        inputs=list(p.inputs.values()),
        output_shapes=p.partial_shapes(),
        output_dtypes=[mx.float32, mx.float32],
        grid=(threads * p.splits, p.body.kv_heads, p.q.shape[0]),
        threadgroup=(threads, 1, 1),
    )


@metal.kept
def _decode(
    dtype: str,
    k: KernelSpec,
    v: KernelSpec,
    k_dim: int,
    v_dim: int,
    rows: int,
    mask: int,
    span: int,
    names: tuple[str, ...],
) -> Callable[..., list[mx.array]]:
    simds = simds_for(dtype)
    types = f"{dtype}, {k.quantizer.name}, {v.quantizer.name}, {k.rotation.name}, {k_dim}, {v_dim}"
    return metal.kernel(
        "decode",
        ("attention/decode.h", k.quantizer.header, v.quantizer.header, k.rotation.header),
        names,
        ("out", "stats"),
        f"""
  typedef Decode<{types}, {rows}, {simds}, {mask}, {span}> D;
  threadgroup uint staged[D::Turn::TABLE];
  threadgroup float4 query[(D::QUERY + 3) / 4];
  threadgroup float weight[{simds * TILE * rows}];
  threadgroup D::S stage[{simds} * MLX_ROTOR_TILE * MLX_ROTOR_STAGE];
  threadgroup float products[D::PRODUCTS];
  decode<D>(q, q_strides, table, root, factor, {arguments(names)},
      staged, (threadgroup float *)query, weight, stage, products,
      {POSITION});
""",
    )


def merge(
    p: Problem,
    partial: mx.array,
    stats: mx.array,
    logits: mx.array | None,
    splits: Sequence[int],
    means: Sequence[mx.array | None],
) -> mx.array:
    """Splits put together: [B, Hq, L, Dv] in the queries' dtype.

    Args:
        partial, stats: of all splits, `splits` of each packed segment, then what there is of exact tokens.
        logits: [Hq], attention-sink logits.
        means: of each packed segment's values.
    """
    batch, heads, queries, _ = p.q.shape
    v, v_dim = p.body.v, p.body.v_dim
    inputs = [
        partial, stats, v.inverse, metal.constant(v.back), _NO_LOGITS if logits is None else logits,
        mx.array([heads, queries, sum(splits), partial.shape[3], p.rows], mx.int32),
    ]  # fmt: skip
    mean = next((mean for mean in means if mean is not None), None)
    with_means = mean is not None
    if mean is not None:
        ends = list(accumulate(splits))
        if all(other is mean for other in means):
            ends = ends[-1:]  # as of one segment: the segments of a layer have one mean
        else:
            no_mean = mx.zeros((batch, p.body.kv_heads, 1, v_dim), mx.float16)
            mean = mx.concatenate([no_mean if other is None else other for other in means], axis=2)
        inputs += [mx.contiguous(mean), mx.array(ends, mx.int32)]
    (out,) = _merge(v, v_dim, logits is not None, with_means)(
        inputs=inputs,
        output_shapes=[(batch, heads, queries, v_dim)],
        output_dtypes=[p.q.dtype],
        grid=(32 * batch * heads * queries, 1, 1),
        threadgroup=(32, 1, 1),
    )
    return out


@metal.kept
def _merge(v: KernelSpec, dim: int, logits: bool, with_means: bool) -> Callable[..., list[mx.array]]:
    return metal.kernel(
        "merge",
        ("attention/merge.h", v.quantizer.header, v.rotation.header),
        ("partial", "stats", "table", "root", "logits", "sizes", *(("mean", "ends") if with_means else ())),
        ("out",),
        f"""
  typedef {v.rotation.name} Turn;
  threadgroup uint staged[Turn::TABLE];
  threadgroup float vector[4 * {dim}];
  merge<{v.quantizer.name}, Turn, {dim}, {"true" if with_means else "false"}>(
      partial, stats, table, root, logits, {"true" if logits else "false"},
      {"mean, ends, uint(mean_shape[2])" if with_means else "nullptr, sizes, 0"}, uint(sizes[4]),
      uint(sizes[0]), uint(sizes[1]), uint(sizes[2]), uint(sizes[3]), out, staged, vector,
      threadgroup_position_in_grid.x, thread_index_in_simdgroup);
""",
    )
