"""Between vectors and tiles: the launches that encode a chunk of tokens and that give packed tokens back.

`encode_metal` launches `attention/encode.h`, held against `encode_reference` bit for bit; `dequantize_metal` launches
`attention/dequantize.h`, held against `reference.dequantize`.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import RotorError
from . import metal, segments
from .packed import TILE, to_tiles
from .segments import PackedSide, spread
from .spec import Codec, spec_of

ENCODE_THREADS, ENCODE_TILES = 128, 2  # MLX_ROTOR_ENCODE_THREADS, MLX_ROTOR_ENCODE_TILES


def encode_metal(
    codec: Codec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """x [B, H, n, d] -> (tiles uint32 [B, H, ceil(n / 32), words a tile], scale float16 [B, H, 32 ceil(n / 32)] or
    None).

    `mean`, `first`, `span`: as `kernels.encode` has them.

    Raises:
        RotorError: if the codec has no kernel, or means it can't take.
    """
    spec = spec_of(codec)
    segments.check_means(codec, x.shape, mean, first, span)
    b, h, n, d = x.shape
    count = -(-n // TILE)
    quantizer, rotation = spec.quantizer.name, spec.rotation.name
    made = metal.kernel(
        f"encode_{codec.name.partition(':')[0]}_{d}",
        ("attention/encode.h", spec.quantizer.header, spec.rotation.header),
        ("x", "table", "root", *segments.mean_names(mean)),
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
      x, x_shape, x_strides, table, root, {segments.mean_argument(mean)},
      tiles, {"scale" if codec.scaled else "nullptr"},
      staged, vector, packed, over, fitted, codes, scratch, centre, threadgroup_position_in_grid, threadgroups_per_grid,
      thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    arrays = made(
        inputs=[x, spec.table, metal.constant(spec.root), *segments.mean_inputs(mean, first, span)],
        output_shapes=[(b, h, count, codec.tile_words), *([(b, h, count * TILE)] if codec.scaled else [])],
        output_dtypes=[mx.uint32, *([mx.float16] if codec.scaled else [])],
        grid=(ENCODE_THREADS * -(-count // ENCODE_TILES), h, b),
        threadgroup=(ENCODE_THREADS, 1, 1),
    )
    return arrays[0], arrays[1] if codec.scaled else None


def encode_reference(
    codec: Codec, x: mx.array, mean: mx.array | None = None, *, first: int = 0, span: int = 0
) -> tuple[mx.array, mx.array | None]:
    """As `encode_metal` by the codec's own operations: the same shapes and errors, and on a CPU the same bits."""
    segments.check_means(codec, x.shape, mean, first, span)
    packed = codec.encode(x, None if mean is None else spread(mean, first, first + x.shape[2], span))
    if packed.scale is None:
        return to_tiles(packed.words), None
    pad = -x.shape[2] % TILE
    return to_tiles(packed.words), mx.pad(packed.scale, [(0, 0), (0, 0), (0, pad)]) if pad else packed.scale


DEQUANTIZE_THREADS = 128  # MLX_ROTOR_DEQUANTIZE_THREADS


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
    segments.check_means(side.codec, (b, h, stop, d), side.mean, 0, side.span)
    scale = [] if side.scale is None else [side.scale]
    made = metal.kernel(
        "dequantize",
        ("attention/dequantize.h", spec.quantizer.header, spec.rotation.header),
        ("tiles", *("scale" for _ in scale), "table", "root", "bounds", *segments.mean_names(side.mean)),
        ("out",),
        f"""
  threadgroup float vector[MLX_ROTOR_DEQUANTIZE_VECTORS * dequantize_room<{d}>()];
  threadgroup float centre[{1 if side.mean is None else d}];
  dequantize<{spec.quantizer.name}, {spec.rotation.name}, {d}>(
      tiles, tiles_shape, {"scale" if scale else "nullptr"}, table, root, {segments.mean_argument(side.mean)},
      bounds, out,
      vector, centre,
      threadgroup_position_in_grid, threadgroups_per_grid, thread_index_in_threadgroup, thread_index_in_simdgroup);
""",
    )
    (out,) = made(
        inputs=[
            side.tiles, *scale, spec.inverse, metal.constant(spec.back), mx.array([start, stop], mx.int32),
            *segments.mean_inputs(side.mean, 0, side.span),
        ],
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=(DEQUANTIZE_THREADS * (-(-stop // TILE) - start // TILE), h, b),
        threadgroup=(DEQUANTIZE_THREADS, 1, 1),
    )  # fmt: skip
    return out
