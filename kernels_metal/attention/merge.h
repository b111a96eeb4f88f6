// Puts the splits of attention together: adds the values' means by their tokens' weights, undoes the rotation of the body's
// values once a row, adds the exact tokens' part and the attention-sink logit, divides by the sum of weights.

#ifndef MLX_ROTOR_ATTENTION_MERGE_H
#define MLX_ROTOR_ATTENTION_MERGE_H

#include "rows.h"

// partial: [B, Hkv, G · L, splits, DV], `body_splits` of them in the order VQ's levels come in, then, if there is one
// more, the exact tokens' in plain order; stats: [B, Hkv, G · L, splits, 2]; at most 32 splits; out: [B, Hq, L, DV].
// `logits`: [Hq] where `sunk`. CENTRED: V has means, [B, Hkv, segments, DV] in the codec's basis, contiguous; those splits of
// the body below ends[g] and of no segment before are segment g's. `group_rows` is G · L. A simdgroup makes a row; the grid
// is (32 Hq · L · B) threads. `vector`: 4 · DV floats, as a rotation turns four vectors at once; three are zeros. A row that
// sees nothing is 0.
template <
    typename VQ,
    typename Rotation,
    uint DV,
    bool CENTRED,
    typename Stats,
    typename Logits,
    typename Ends,
    typename T>
static inline void merge(
    const device float *partial,
    Stats stats,
    const device uint *table,
    float root,
    Logits logits,
    bool sunk,
    const device half *mean,
    Ends ends,
    uint segments,
    uint group_rows,
    uint heads,
    uint queries,
    uint body_splits,
    uint splits,
    device T *out,
    threadgroup uint *staged,
    threadgroup float *vector,
    uint row,
    uint lane) {
  stage_table(table, staged, Rotation::TABLE, lane, 32);
  // A lane is a split.
  const float own_top = lane < splits ? stats[(long(row) * splits + lane) * 2] : MLX_ROTOR_UNSEEN;
  const float own_sum = lane < splits ? stats[(long(row) * splits + lane) * 2 + 1] : 0.0f;
  const float logit = sunk ? float(logits[row / queries % heads]) * MLX_ROTOR_LOG2E : MLX_ROTOR_UNSEEN;
  const float top = fmax(simd_max(own_top), logit);
  const float own_part = exp2(own_top - top);
  const float whole = simd_sum(own_sum * own_part) + (sunk ? exp2(logit - top) : 0.0f);
  const float share = whole > 0 ? 1.0f / whole : 0.0f;
  const device float *from = partial + long(row) * splits * DV;
  float sum[(DV + 31) / 32];
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < (DV + 31) / 32; ++i) {
    sum[i] = 0;
  }
  for (uint s = 0; s < body_splits; ++s) {
    const float part = simd_shuffle(own_part, ushort(s));
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < (DV + 31) / 32; ++i) {
      if (lane + 32 * i < DV) {
        sum[i] = fma(from[s * DV + lane + 32 * i], part, sum[i]);
      }
    }
  }
  if (CENTRED) {
    const device half *own_mean = mean + long(row / group_rows) * segments * DV;
    uint begin = 0;
    for (uint g = 0; g < segments; ++g) {
      const uint end = uint(ends[g]);
      const float mass = simd_sum(lane >= begin && lane < end ? own_sum * own_part : 0.0f);
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < (DV + 31) / 32; ++i) {
        const uint p = lane + 32 * i;
        if (p < DV) {
          sum[i] = fma(float(own_mean[g * DV + VQ::element(lane) + 32 / VQ::FIELDS * i]), mass, sum[i]);
        }
      }
      begin = end;
    }
  }
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < (DV + 31) / 32; ++i) {
    const uint p = lane + 32 * i;
    if (p < DV) {
      vector[VQ::element(p)] = sum[i];
      vector[DV + p] = vector[2 * DV + p] = vector[3 * DV + p] = 0.0f;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float y[DV / 8];
  Rotation::apply(vector + lane / 8 * DV, staged, root, lane, y);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (lane < 8) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DV / 8; ++i) {
      vector[lane + 8 * i] = y[i];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const float exact = simd_shuffle(own_part, ushort(splits - 1));
  for (uint e = lane; e < DV; e += 32) {
    const float part = splits > body_splits ? from[body_splits * DV + e] * exact : 0.0f;
    out[long(row) * DV + e] = T((vector[e] + part) * share);
  }
}

#endif
