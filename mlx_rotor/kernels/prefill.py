"""Attention of many query rows over packed tokens: the launches before `merge`, and how the work is cut.

`rotate_metal` launches `attention/rotate.h`, held against `Codec.rotate` and `Codec.unrotate`; `prefill` launches
`attention/prefill.h`, held against `reference.attend`.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import RotorError
from . import metal
from .problem import POSITION, Problem, arguments
from .segments import PackedSegment
from .spec import DTYPES, KernelSpec, Struct

ROTATE_THREADS, ROTATE_VECTORS = 128, 16  # MLX_ROTOR_ROTATE_VECTORS


def rotate_metal(
    spec: KernelSpec,
    x: mx.array,
    *,
    inverse: bool = False,
    order: Struct | None = None,
    factor: float | mx.array = 1.0,
    dtype: mx.Dtype = mx.float32,
) -> mx.array:
    """x [B, H, n, D], rotated as queries are or turned back, times `factor`, a float32, in `dtype`, the same shape.

    Args:
        order: a quantizer: elements then stand where it puts them (`position` of its Metal type). None: as they are.
    """
    b, h, n, d = x.shape
    if x.size == 0:
        return mx.zeros(x.shape, dtype)
    headers = ("attention/rotate.h", spec.rotation.header, *([order.header] if order else []))
    made = metal.kernel(
        "rotate",
        headers,
        ("x", "table", "root", "factor"),
        ("out",),
        f"""
  threadgroup float vector[MLX_ROTOR_ROTATE_VECTORS * rotate_room<{d}>()];
  rotate_vectors<{order.name if order else "PlainOrder"}, {spec.rotation.name}, {d}, {DTYPES[x.dtype]}>(
      x, x_shape, x_strides, table, root, factor, out, vector,
      threadgroup_position_in_grid, threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    (out,) = made(
        inputs=[
            x, spec.inverse if inverse else spec.table, metal.constant(spec.back),
            factor if isinstance(factor, mx.array) else metal.constant(factor),
        ],
        output_shapes=[x.shape],
        output_dtypes=[dtype],
        grid=(ROTATE_THREADS * -(-n // ROTATE_VECTORS), h, b),
        threadgroup=(ROTATE_THREADS, 1, 1),
    )  # fmt: skip
    return out


PREFILL_THREADS, PREFILL_ROWS = 128, 32  # MLX_ROTOR_PREFILL_THREADS, MLX_ROTOR_PREFILL_ROWS
MAX_DIM = 256  # a step's tokens fit 32 KiB of threadgroup memory, and a row's queries and sums the registers
THREADGROUPS = 256  # enough to fill a GPU
PARTIAL_BYTES = 64 << 20  # partial results of the queries taken at a time


def splits_for(q: mx.array, body: PackedSegment, most: int) -> int:
    """Parts that the body is read in: as many as fill a GPU along with the rows, at most `most`."""
    batch, heads, queries, _ = q.shape
    kv_heads = body.k.tiles.shape[1]
    blocks = -(-(heads // kv_heads * queries) // PREFILL_ROWS)
    return max(1, min(most, -(-THREADGROUPS // (batch * kv_heads * blocks))))


def piece_for(q: mx.array, body: PackedSegment, splits: int) -> int:
    """Queries taken at a time: partial results stay below PARTIAL_BYTES."""
    row_bytes = 4 * q.shape[0] * q.shape[1] * (splits + 1) * body.v.codec.dim
    return max(1, min(int(q.shape[2]), PARTIAL_BYTES // row_bytes))


def rotate_queries(p: Problem) -> mx.array:
    """The queries as `prefill` takes them: rotated, in the order K's levels come in, times the factor of scores."""
    return rotate_metal(p.body.k, p.q, order=p.body.k.quantizer, factor=p.inputs["factor"])


def prefill(p: Problem, rotated: mx.array) -> list[mx.array]:
    """Partial results and statistics of every split, `Problem.partial_shapes`.

    Raises:
        RotorError: for a head dimension above MAX_DIM.
    """
    body = p.body
    if max(body.k_dim, body.v_dim) > MAX_DIM:
        raise RotorError(f"the prefill kernel takes head dimensions up to {MAX_DIM}, not {max(body.k_dim, body.v_dim)}")
    # The rotation's numbers are the rotate kernel's.
    inputs = {"rotated": rotated, **{name: x for name, x in p.inputs.items() if name not in ("table", "root")}}
    blocks = -(-p.rows // PREFILL_ROWS)
    return _prefill(p.dtype, body.k, body.v, body.k_dim, body.v_dim, p.mask_kind, body.span, (*inputs,))(
        inputs=list(inputs.values()),
        output_shapes=p.partial_shapes(),
        output_dtypes=[mx.float32, mx.float32],
        grid=(PREFILL_THREADS * p.splits, body.kv_heads * blocks, p.q.shape[0]),
        threadgroup=(PREFILL_THREADS, 1, 1),
    )


@metal.kept
def _prefill(
    dtype: str, k: KernelSpec, v: KernelSpec, k_dim: int, v_dim: int, mask: int, span: int, names: tuple[str, ...]
) -> Callable[..., list[mx.array]]:
    staged = "float" if dtype == "float" else "half"
    types = f"{dtype}, {staged}, {k.quantizer.name}, {v.quantizer.name}, {k_dim}, {v_dim}"
    return metal.kernel(
        "prefill",
        ("attention/prefill.h", k.quantizer.header, v.quantizer.header),
        names,
        ("out", "stats"),
        f"""
  typedef Prefill<{types}, {mask}, {span}> P;
  threadgroup {staged} stage[P::WIDTH * P::ROOM];
  threadgroup float scales[P::SCALES];
  prefill<P>(rotated, q, q_strides, factor, {arguments(names)}, stage, scales,
      {POSITION});
""",
    )
