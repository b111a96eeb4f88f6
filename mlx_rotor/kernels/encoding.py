"""Encoding a chunk of vectors into tiles: the kernel and its twin."""

from __future__ import annotations

import mlx.core as mx

from . import means, metal
from .runs import spread
from .spec import KernelCodec, spec_of
from .tiles import TILE, to_tiles

THREADS, TILES = 128, 2  # MLX_ROTOR_ENCODE_THREADS, MLX_ROTOR_ENCODE_TILES


def encode_metal(
    codec: KernelCodec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """x: [B, H, n, d] -> (tiles [B, H, ceil(n / 32), 32 words] uint32, scale [B, H, 32 ceil(n / 32)] float16 or None).

    Raises:
        RotorError: if the codec has no kernel, or means it can't take.
    """
    spec = spec_of(codec)
    means.check_means(codec, x.shape, mean, first, span)
    b, h, n, d = x.shape
    count = -(-n // TILE)
    quantizer, rotation = spec.quantizer.name, spec.rotation.name
    made = metal.kernel(
        f"encode_{codec.name.partition(':')[0]}_{d}",
        ("attention/encode.h", spec.quantizer.header, spec.rotation.header),
        ("x", "table", "root", *means.names(mean)),
        ("tiles", *(("scale",) if codec.scaled else ())),
        f"""
  typedef {quantizer} Q;
  typedef {rotation} Turn;
  threadgroup uint staged[Turn::TABLE];
  threadgroup float vector[MLX_ROTOR_ENCODE_VECTORS * {d}];
  threadgroup uint packed[Q::WORDS * MLX_ROTOR_TILE];
  threadgroup ushort over[MLX_ROTOR_TILE];
  threadgroup half fitted[MLX_ROTOR_TILE];
  threadgroup uchar codes[MLX_ROTOR_ENCODE_VECTORS * {d}];
  threadgroup uint scratch[scratch_words<Q>()];
  threadgroup float centre[{1 if mean is None else d}];
  encode<Q, Turn, {d}>(
      x, x_shape, x_strides, table, root, {means.argument(mean)}, tiles, {"scale" if codec.scaled else "nullptr"},
      staged, vector, packed, over, fitted, codes, scratch, centre, threadgroup_position_in_grid, threadgroups_per_grid,
      thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    arrays = made(
        inputs=[x, spec.table, metal.constant(spec.root), *means.inputs(mean, first, span)],
        output_shapes=[(b, h, count, codec.tile_words), *([(b, h, count * TILE)] if codec.scaled else [])],
        output_dtypes=[mx.uint32, *([mx.float16] if codec.scaled else [])],
        grid=(THREADS * -(-count // TILES), h, b),
        threadgroup=(THREADS, 1, 1),
    )
    return arrays[0], arrays[1] if codec.scaled else None


def encode_reference(
    codec: KernelCodec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """The twin: the same shapes and errors, and on a CPU the same bits."""
    means.check_means(codec, x.shape, mean, first, span)
    packed = codec.encode(x, None if mean is None else spread(mean, first, first + x.shape[2], span))
    if packed.scale is None:
        return to_tiles(packed.words), None
    pad = -x.shape[2] % TILE
    return to_tiles(packed.words), mx.pad(packed.scale, [(0, 0), (0, 0), (0, pad)]) if pad else packed.scale
