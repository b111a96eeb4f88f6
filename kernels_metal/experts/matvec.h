// A packed matrix times up to eight rows of x: a weight is decoded once for all of them.
//
// A threadgroup makes SIMDS · SETS sets of rows of the matrix; x is staged once for all of them.

#ifndef MLX_ROTOR_EXPERTS_MATVEC_H
#define MLX_ROTOR_EXPERTS_MATVEC_H

#include "walk.h"

// The shape of a launch: the format, [N, COLUMNS] of the matrix, rows of x.
template <typename Weights, uint COUNT_, uint N_, uint COLUMNS_, uint PANEL_, uint LANES_, uint SIMDS_, uint SETS_>
struct Matvec {
  typedef Walk<Weights, N_, COLUMNS_, PANEL_, LANES_> W;
  static constant constexpr const uint COUNT = COUNT_, N = N_, COLUMNS = COLUMNS_, PANEL = PANEL_, LANES = LANES_;
  static constant constexpr const uint SIMDS = SIMDS_, SETS = SETS_, ROWS = 32 / LANES_;
  static_assert(SETS <= LANES, "a lane keeps the result of one set");
};

// x: [COUNT, COLUMNS]; codes, first, second as the format has them; bias: [N] where BIASED; out: [COUNT, N]. Threadgroup
// memory: staged COUNT times column_room(PANEL); floats and words SIMDS times what W has. The grid is 32 SIMDS tiles threads.
template <typename L, bool BIASED, typename T, typename S, typename Bias>
static inline void matvec(
    const device T *x,
    const device uint *codes,
    const device S *first,
    const device S *second,
    Bias bias,
    device T *out,
    threadgroup float *staged,
    threadgroup float *floats,
    threadgroup uint *words,
    uint tile,
    uint simdgroup,
    uint lane) {
  typedef typename L::W W;
  constexpr uint each = L::ROWS, room = column_room(L::PANEL);
  const uint first_row = (tile * L::SIMDS + simdgroup) * L::SETS * each;
  threadgroup float *own_floats = floats + simdgroup * W::FLOATS;
  threadgroup uint *own_words = words + simdgroup * W::CODES_AND_TABLES;
  W walk;
  walk.begin(codes, first, second, first_row, own_floats, own_words, lane);
  const uint set = lane % L::LANES, kept = first_row + set * each + lane / L::LANES;
  float mine[L::COUNT];
  MLX_ROTOR_UNROLL
  for (uint t = 0; t < L::COUNT; ++t) {
    mine[t] = 0;
  }
  for (uint start = 0; start < L::COLUMNS; start += L::PANEL) {
    const uint columns = W::WHOLE ? L::COLUMNS : min(L::PANEL, L::COLUMNS - start);
    if (start > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint t = 0; t < L::COUNT; ++t) {
      stage_columns<W::SUMS>(x + t * L::COLUMNS + start, columns, staged + t * room, simdgroup, L::SIMDS, lane);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 0; s < L::SETS; ++s) {
      const uint row = first_row + s * each;
      if (row < L::N) {
        const uint rows = min(each, L::N - row);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        walk.stage(s, rows, start, columns);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        float sums[L::COUNT];
        MLX_ROTOR_UNROLL
        for (uint t = 0; t < L::COUNT; ++t) {
          sums[t] = 0;
        }
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < W::BLOCKS; ++i) {
          const bool here = walk.has(i, rows, columns);
          walk.prepare(i, here);
          if (here) {
            uint word[W::BITS];
            walk.load(s, start, columns, i, word);
            float n[32];
            walk.numbers(word, i, n);
            MLX_ROTOR_UNROLL
            for (uint t = 0; t < L::COUNT; ++t) {
              float v[32];
              const float2 sum = walk.template load_columns<W::SUMS>(staged + t * room, i, columns, v);
              sums[t] += walk.dot(n, i, columns, v, sum);
            }
          }
        }
        MLX_ROTOR_UNROLL
        for (uint t = 0; t < L::COUNT; ++t) {
          const float whole = sum_of_row<L::LANES>(sums[t]);
          mine[t] += set == s ? whole : 0.0f;
        }
      }
    }
  }
  MLX_ROTOR_UNROLL
  for (uint t = 0; t < L::COUNT; ++t) {
    if (set < L::SETS && kept < L::N) {
      out[t * L::N + kept] = T(mine[t] + (BIASED ? float(bias[kept]) : 0.0f));
    }
  }
}

#endif
