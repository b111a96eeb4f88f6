// The projections out of the experts that tokens chose, from packed weights, and their weighted sum: one launch, and no
// atomics.
//
// A threadgroup makes SIMDS · SETS sets of rows of one token, all its experts one after another; their inputs are staged
// once for all rows. A lane adds up its part of all experts, so that lanes are summed once.

#ifndef MLX_ROTOR_EXPERTS_DOWN_H
#define MLX_ROTOR_EXPERTS_DOWN_H

#include "walk.h"

// The shape of a launch: the format, [N, COLUMNS] of an expert.
template <typename Weights, uint N_, uint COLUMNS_, uint PANEL_, uint LANES_, uint SIMDS_, uint SETS_>
struct Down {
  typedef Walk<Weights, N_, COLUMNS_, PANEL_, LANES_> W;
  static constant constexpr const uint N = N_, COLUMNS = COLUMNS_, PANEL = PANEL_, LANES = LANES_;
  static constant constexpr const uint SIMDS = SIMDS_, SETS = SETS_, ROWS = 32 / LANES_;
  static_assert(SETS <= LANES, "a lane keeps the result of one set");
};

// h: [T, slots, COLUMNS]; codes, first, second as the format has them, of E experts' [N, COLUMNS]; bias: [E, N] where BIASED;
// indices: [T, slots]. WEIGHTED: weights [T, slots], out [T, N], the grid (32 SIMDS tiles, 1, T) threads; else out
// [T, slots, N], the grid (32 SIMDS tiles, slots, T). Threadgroup memory: staged column_room(PANEL); floats and words SIMDS
// times what W has.
template <
    typename L,
    bool WEIGHTED,
    bool BIASED,
    typename T,
    typename S,
    typename Bias,
    typename Indices,
    typename Shares,
    typename Out>
static inline void down(
    const device T *h,
    const device uint *codes,
    const device S *first,
    const device S *second,
    Bias bias,
    Indices indices,
    Shares shares,
    uint slots,
    device Out *out,
    threadgroup float *staged,
    threadgroup float *floats,
    threadgroup uint *words,
    uint3 group,
    uint simdgroup,
    uint lane) {
  typedef typename L::W W;
  constexpr uint each = L::ROWS;
  const uint first_row = (group.x * L::SIMDS + simdgroup) * L::SETS * each;
  const uint set = lane % L::LANES, kept = first_row + set * each + lane / L::LANES;
  const bool keeps = set < L::SETS && kept < L::N;
  const uint token = group.z * slots;
  threadgroup float *own_floats = floats + simdgroup * W::FLOATS;
  threadgroup uint *own_words = words + simdgroup * W::CODES_AND_TABLES;
  float sums[L::SETS], added = 0;
  MLX_ROTOR_UNROLL
  for (uint s = 0; s < L::SETS; ++s) {
    sums[s] = 0;
  }
  // Of 32 slots at a time, a lane has one's expert and share.
  uint experts = 0;
  float parts = 0;
  const uint begin = WEIGHTED ? 0 : group.y, end = WEIGHTED ? slots : begin + 1;
  for (uint slot = begin; slot < end; ++slot) {
    if ((slot - begin) % 32 == 0) {
      const bool mine = slot + lane < end;
      experts = mine ? uint(indices[token + slot + lane]) : 0;
      parts = WEIGHTED && mine ? float(shares[token + slot + lane]) : 1.0f;
    }
    const uint before = simd_broadcast(experts, ushort((slot - begin) % 32)) * L::N;
    const float share = simd_broadcast(parts, ushort((slot - begin) % 32));
    if (BIASED && keeps) {
      added = fma(share, float(bias[before + kept]), added);
    }
    W walk;
    walk.begin(codes, first, second, before + first_row, own_floats, own_words, lane);
    for (uint start = 0; start < L::COLUMNS; start += L::PANEL) {
      const uint columns = W::WHOLE ? L::COLUMNS : min(L::PANEL, L::COLUMNS - start);
      if (slot > begin || start > 0) {
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      stage_columns<W::SUMS>(h + (token + slot) * L::COLUMNS + start, columns, staged, simdgroup, L::SIMDS, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      MLX_ROTOR_UNROLL
      for (uint s = 0; s < L::SETS; ++s) {
        const uint row = first_row + s * each;
        if (row < L::N) {
          const uint rows = min(each, L::N - row);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          walk.stage(s, rows, start, columns);
          simdgroup_barrier(mem_flags::mem_threadgroup);
          float sum_of_expert = 0;
          MLX_ROTOR_UNROLL
          for (uint i = 0; i < W::BLOCKS; ++i) {
            const bool here = walk.has(i, rows, columns);
            walk.prepare(i, here);
            if (here) {
              uint word[W::BITS];
              walk.load(s, start, columns, i, word);
              float v[32], n[32];
              const float2 sum = walk.template load_columns<W::SUMS>(staged, i, columns, v);
              walk.numbers(word, i, n);
              sum_of_expert += walk.dot(n, i, columns, v, sum);
            }
          }
          sums[s] = fma(share, sum_of_expert, sums[s]);
        }
      }
    }
  }
  float mine = 0;
  MLX_ROTOR_UNROLL
  for (uint s = 0; s < L::SETS; ++s) {
    const float whole = sum_of_row<L::LANES>(sums[s]);
    mine = set == s ? whole : mine;
  }
  if (keeps) {
    out[(WEIGHTED ? group.z : token + group.y) * L::N + kept] = Out(mine + added);
  }
}

#endif
