"""Rotating vectors on the GPU, and bringing them into the order that a quantizer's levels come in."""

from __future__ import annotations

import mlx.core as mx

from . import metal
from .spec import DTYPES, KernelSpec, Struct

THREADS, VECTORS = 128, 16  # MLX_ROTOR_ROTATE_VECTORS


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
        grid=(THREADS * -(-n // VECTORS), h, b),
        threadgroup=(THREADS, 1, 1),
    )  # fmt: skip
    return out
