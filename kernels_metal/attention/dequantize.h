// Packed tokens back in the model's basis: decode, scale, add the mean, undo the rotation, write whole lines.
//
// A threadgroup of four simdgroups makes one tile of one head, 16 tokens at a time: a thread decodes a part of one
// token's units, then eight lanes turn a vector back.

#ifndef MLX_ROTOR_ATTENTION_DEQUANTIZE_H
#define MLX_ROTOR_ATTENTION_DEQUANTIZE_H

#include "../codec/fields.h"
#include "../codec/mean.h"

#define MLX_ROTOR_DEQUANTIZE_THREADS 128
#define MLX_ROTOR_DEQUANTIZE_VECTORS 16

// A vector's room in threadgroup memory: odd, so that the same element of 16 tokens meets 16 banks.
template <uint DIM>
static inline constexpr uint dequantize_room() {
  return DIM + 1;
}

// tiles: [B, H, room / 32, TILE_WORDS], scale: [B, H, room], contiguous, null where the quantizer has none; bounds: the
// first token and the one behind the last; out: [B, H, bounds[1] - bounds[0], DIM]. `table` and `root` are the inverse
// rotation's. Threadgroup memory: vector [16 · dequantize_room], centre [DIM] where there are means. The grid is
// (128 tiles touched, H, B) threads.
template <
    typename Quantizer,
    typename Rotation,
    uint DIM,
    typename Shape,
    typename Bounds,
    typename Out,
    typename Means>
static inline void dequantize(
    const device uint *tiles,
    Shape shape,
    const device half *scale,
    const device uint *table,
    float root,
    Means mean,
    Bounds bounds,
    device Out *out,
    threadgroup float *vector,
    threadgroup float *centre,
    uint3 group,
    uint3 groups,
    uint thread_index,
    uint lane) {
  constexpr uint room = dequantize_room<DIM>();
  constexpr uint parts = MLX_ROTOR_DEQUANTIZE_THREADS / MLX_ROTOR_DEQUANTIZE_VECTORS;
  const long head = long(group.z) * groups.y + group.y;
  const uint start = uint(bounds[0]), stop = uint(bounds[1]);
  const uint at = start / MLX_ROTOR_TILE + group.x;
  const device uint *tile = tiles + (head * shape[2] + at) * Quantizer::TILE_WORDS;
  const device half *scales = scale + (head * shape[2] + at) * MLX_ROTOR_TILE;
  device Out *out_head = out + head * (stop - start) * DIM;
  const uint mine = thread_index % MLX_ROTOR_DEQUANTIZE_VECTORS, part = thread_index / MLX_ROTOR_DEQUANTIZE_VECTORS;
  const uint begin = part * Quantizer::UNITS / parts, end = (part + 1) * Quantizer::UNITS / parts;
  const uint slot = thread_index / 8, lane8 = lane & 7;
  if (Means::HELD) {
    mean.template stage<DIM>(centre, at, group, thread_index, MLX_ROTOR_DEQUANTIZE_THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (uint half_tile = 0; half_tile < MLX_ROTOR_TILE; half_tile += MLX_ROTOR_DEQUANTIZE_VECTORS) {
    if (begin < end) {
      const float own_scale = Quantizer::SCALED ? float(scales[half_tile + mine]) : 1.0f;
      Quantizer decoder;
      decoder.begin_part(tile, half_tile + mine, begin);
      half2 level[Quantizer::FIELDS / 2];
      for (uint u = begin; u < end; ++u) {
        decoder.part_unit(tile, half_tile + mine, u, level);
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < Quantizer::FIELDS / 2; ++i) {
          const uint p = u * Quantizer::FIELDS + 2 * i;
          const uint e = Quantizer::element(p), other = Quantizer::element(p + 1);
          const float x = float(level[i].x) * own_scale;
          const float y = float(level[i].y) * own_scale;
          vector[mine * room + e] = Means::HELD ? x + centre[e] : x;
          vector[mine * room + other] = Means::HELD ? y + centre[other] : y;
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float y[DIM / 8];
    Rotation::apply(vector + slot * room, table, root, lane, y);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      vector[slot * room + lane8 + 8 * i] = y[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint own = slot & ~3u; own < (slot & ~3u) + 4; ++own) {
      const uint token = at * MLX_ROTOR_TILE + half_tile + own;
      if (token >= start && token < stop) {
        for (uint e = lane; e < DIM; e += 32) {
          out_head[long(token - start) * DIM + e] = Out(vector[own * room + e]);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

#endif
