"""Encoding a chunk of vectors into tiles: the kernel and its twin."""

from __future__ import annotations

import mlx.core as mx

from . import metal
from .spec import KernelCodec, spec_of
from .tiles import TILE, to_tiles

THREADS, TILES = 128, 2  # MLX_ROTOR_ENCODE_THREADS, MLX_ROTOR_ENCODE_TILES


def encode_metal(codec: KernelCodec, x: mx.array) -> tuple[mx.array, mx.array]:
    """x: [B, H, n, d] -> (tiles [B, H, ceil(n / 32), d · bits] uint32, scale [B, H, 32 ceil(n / 32)] float16).

    Raises:
        RotorError: if the codec has no kernel.
    """
    spec = spec_of(codec)
    b, h, n, d = x.shape
    count = -(-n // TILE)
    quantizer, rotation = spec.quantizer.name, spec.rotation.name
    made = metal.kernel(
        f"encode_{codec.name}_{d}",
        ("attention/encode.h", spec.quantizer.header, spec.rotation.header),
        ("x", "table", "root"),
        ("tiles", "scale"),
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
  encode<Q, Turn, {d}>(
      x, x_shape, x_strides, table, root, tiles, scale, staged, vector, packed, over, fitted, codes, scratch,
      threadgroup_position_in_grid, threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    tiles, scale = made(
        inputs=[x, spec.table, mx.array(spec.root, mx.float32)],
        output_shapes=[(b, h, count, d * codec.index_bits), (b, h, count * TILE)],
        output_dtypes=[mx.uint32, mx.float16],
        grid=(THREADS * -(-count // TILES), h, b),
        threadgroup=(THREADS, 1, 1),
    )
    return tiles, scale


def encode_reference(codec: KernelCodec, x: mx.array) -> tuple[mx.array, mx.array]:
    """The twin: the same shapes, and on a CPU the same bits."""
    packed = codec.encode(x)
    pad = -x.shape[2] % TILE
    scale = mx.pad(packed.scale, [(0, 0), (0, 0), (0, pad)]) if pad else packed.scale
    return to_tiles(packed.words), scale
