"""Packed tokens back in the model's basis: the kernel. Its twin is `reference.dequantize`."""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from . import means, metal
from .runs import PackedSide
from .spec import spec_of
from .tiles import TILE

THREADS = 128  # MLX_ROTOR_DEQUANTIZE_THREADS


def dequantize_metal(side: PackedSide, start: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """Tokens start .. stop of a packed side, [B, H, stop - start, D] of dtype.

    Raises:
        RotorError: if the codec has no kernel, or the side has no such tokens or means it can't have.
    """
    spec, d = spec_of(side.codec), side.codec.dim
    b, h, count, _ = side.tiles.shape
    if not 0 <= start <= stop <= count * TILE:
        raise RotorError(f"tokens {start} to {stop} of a packed side that has room for {count * TILE}")
    shape = (b, h, stop - start, d)
    if start == stop:
        return mx.zeros(shape, dtype)
    means.check_means(side.codec, (b, h, stop, d), side.mean, 0, side.span)
    scale = [] if side.scale is None else [side.scale]
    made = metal.kernel(
        "dequantize",
        ("attention/dequantize.h", spec.quantizer.header, spec.rotation.header),
        ("tiles", *("scale" for _ in scale), "table", "root", "bounds", *means.names(side.mean)),
        ("out",),
        f"""
  threadgroup float vector[MLX_ROTOR_DEQUANTIZE_VECTORS * dequantize_room<{d}>()];
  threadgroup float centre[{1 if side.mean is None else d}];
  dequantize<{spec.quantizer.name}, {spec.rotation.name}, {d}>(
      tiles, tiles_shape, {"scale" if scale else "nullptr"}, table, root, {means.argument(side.mean)}, bounds, out,
      vector, centre,
      threadgroup_position_in_grid, threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    (out,) = made(
        inputs=[
            side.tiles, *scale, spec.inverse, metal.constant(spec.back), mx.array([start, stop], mx.int32),
            *means.inputs(side.mean, 0, side.span),
        ],
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=(THREADS * (-(-stop // TILE) - start // TILE), h, b),
        threadgroup=(THREADS, 1, 1),
    )  # fmt: skip
    return out
