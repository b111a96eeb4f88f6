// Encodes a chunk of vectors, all heads in one launch: rotate, subtract the mean, search codes, fit the scale, pack.
//
// A threadgroup of four simdgroups makes tiles of one head, 16 tokens at a time, eight lanes a vector. It makes two: what it
// reads of the rotation is then little beside them.

#ifndef MLX_ROTOR_ATTENTION_ENCODE_H
#define MLX_ROTOR_ATTENTION_ENCODE_H

#include "../codec/fields.h"
#include "../codec/mean.h"

#define MLX_ROTOR_ENCODE_THREADS 128
#define MLX_ROTOR_ENCODE_TILES 2

// Vectors encoded at a time, and the threadgroup memory that takes: `vector` VECTORS · DIM, `packed` 32 · WORDS,
// `over` and `fitted` 32, `codes` VECTORS · DIM, `scratch` as many words as `scratch_words` says, `centre` DIM
// where there are means.
#define MLX_ROTOR_ENCODE_VECTORS (MLX_ROTOR_ENCODE_THREADS / 8)

template <typename Quantizer>
static inline constexpr uint scratch_words() {
  return MLX_ROTOR_ENCODE_VECTORS * Quantizer::SCRATCH / 4 + (Quantizer::SCRATCH == 0 ? 1 : 0);
}

// x: [B, H, n, DIM] with strides; tiles: [B, H, ceil(n / 32), TILE_WORDS]; scale: [B, H, 32 ceil(n / 32)], null where the
// quantizer has none; vectors are then encoded as they are, times `root`. Words and scales behind token n are 0.
// The grid is (128 · ceil(tiles / 2), H, B) threads.
template <
    typename Quantizer,
    typename Rotation,
    uint DIM,
    typename T,
    typename Shape,
    typename Strides,
    typename Means>
static inline void encode(
    const device T *x,
    Shape shape,
    Strides strides,
    const device uint *table,
    float root,
    Means mean,
    device uint *tiles,
    device half *scales,
    threadgroup uint *staged,
    threadgroup float *vector,
    threadgroup uint *packed,
    threadgroup ushort *over,
    threadgroup half *fitted,
    threadgroup uchar *all_codes,
    threadgroup uint *scratch,
    threadgroup float *centre,
    uint3 group,
    uint3 groups,
    uint thread_index,
    uint lane) {
  stage_table(table, staged, Rotation::TABLE, thread_index, MLX_ROTOR_ENCODE_THREADS);
  const uint tokens = uint(shape[2]);
  const uint slot = thread_index / 8, lane8 = lane & 7;
  threadgroup float *v = vector + slot * DIM;
  const device T *head = x + long(group.z) * strides[0] + long(group.y) * strides[1];
  const uint count = (tokens + MLX_ROTOR_TILE - 1) / MLX_ROTOR_TILE;
  const uint first = group.x * MLX_ROTOR_ENCODE_TILES;
  for (uint tile = first; tile < count && tile < first + MLX_ROTOR_ENCODE_TILES; ++tile) {
    mean.template stage<DIM>(centre, tile, group, thread_index, MLX_ROTOR_ENCODE_THREADS);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint half_tile = 0; half_tile < MLX_ROTOR_TILE; half_tile += MLX_ROTOR_ENCODE_VECTORS) {
      // A simdgroup loads its four vectors, one after another, whole lines at a time.
      for (uint i = 0; i < 4; ++i) {
        const uint own = (slot & ~3u) + i;
        const uint token = tile * MLX_ROTOR_TILE + half_tile + own;
        for (uint e = lane; e < DIM; e += 32) {
          vector[own * DIM + e] =
              token < tokens ? float(head[long(token) * strides[2] + long(e) * strides[3]]) : 0.0f;
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      float y[DIM / 8], c[DIM / 8];
      Rotation::apply(v, staged, root, lane, y);
      if (Means::HELD) {
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < DIM / 8; ++i) {
          y[i] = y[i] - centre[lane8 + 8 * i];
        }
      }
      float inverse_rms = 1.0f;
      if (Quantizer::SCALED) {
        const float power = dot_of_eight(y, y) * (1.0f / float(DIM));
        inverse_rms = power > 0 ? 1.0f / precise::sqrt(power) : 0.0f;
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DIM / 8; ++i) {
        v[lane8 + 8 * i] = y[i];
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      threadgroup uchar *codes = all_codes + slot * DIM;
      Quantizer::encode(v, y, inverse_rms, codes, scratch + slot * Quantizer::SCRATCH / 4, lane, c);
      const float fit = Quantizer::SCALED ? dot_of_eight(c, y) / dot_of_eight(c, c) : 0.0f;
      simdgroup_barrier(mem_flags::mem_threadgroup);
      Quantizer::pack(codes, packed, over, half_tile + slot, lane8);
      if (Quantizer::SCALED && lane8 == 0) {
        fitted[half_tile + slot] = half(fmin(fit, 65504.0f));
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const uint made = (group.z * groups.y + group.y) * count + tile;
    // Tokens of this tile; the words of those behind them are written as 0.
    const uint held = tokens - tile * MLX_ROTOR_TILE;
    for (uint w = thread_index; w < Quantizer::TILE_WORDS; w += MLX_ROTOR_ENCODE_THREADS) {
      uint word;
      if (w < Quantizer::WORDS * MLX_ROTOR_TILE) {
        word = w % MLX_ROTOR_TILE < held ? packed[w] : 0;
      } else {
        const uint even = 2 * (w % MLX_ROTOR_TILE);
        word = (even < held ? uint(over[even]) : 0) | (even + 1 < held ? uint(over[even + 1]) << 16 : 0);
      }
      tiles[made * Quantizer::TILE_WORDS + w] = word;
    }
    if (Quantizer::SCALED && thread_index < MLX_ROTOR_TILE) {
      scales[made * MLX_ROTOR_TILE + thread_index] = thread_index < held ? fitted[thread_index] : half(0.0f);
    }
  }
}

#endif
