// Both projections in of the experts that tokens chose, from packed weights, and the activation: one launch.
//
// A threadgroup makes SIMDS · SETS sets of rows of one token and expert; x is staged once for all of them.

#ifndef MLX_ROTOR_EXPERTS_GATE_UP_H
#define MLX_ROTOR_EXPERTS_GATE_UP_H

#include "activation.h"
#include "walk.h"

// The shape of a launch: formats of both projections, the activation, [N, COLUMNS] of an expert.
template <
    typename Gate,
    typename Up,
    typename Act,
    uint N_,
    uint COLUMNS_,
    uint PANEL_,
    uint LANES_,
    uint SIMDS_,
    uint SETS_>
struct GateUp {
  // Both take the same columns of x in a lane.
  static constant constexpr const bool SPLIT = Gate::BITS == 8 && Up::BITS == 8;
  typedef Walk<Gate, N_, COLUMNS_, PANEL_, LANES_, SPLIT> G;
  typedef Walk<Up, N_, COLUMNS_, PANEL_, LANES_, SPLIT> U;
  typedef Act Activation;
  static constant constexpr const uint N = N_, COLUMNS = COLUMNS_, PANEL = PANEL_, LANES = LANES_;
  static constant constexpr const uint SIMDS = SIMDS_, SETS = SETS_, ROWS = 32 / LANES_;
  static_assert(SETS <= LANES, "a lane keeps the result of one set");
};

// x: [T, COLUMNS]; codes, first, second of each projection as its format has them, of E experts' [N, COLUMNS]; biases
// [E, N] where BIASED; indices: [T, slots]; out: [T, slots, N]. Threadgroup memory: staged column_room(PANEL); floats and
// words SIMDS times what G and U have, G's before U's. The grid is (32 SIMDS tiles, slots, T) threads.
template <
    typename L,
    bool BIASED,
    typename T,
    typename GS,
    typename US,
    typename GBias,
    typename UBias,
    typename Indices>
static inline void gate_up(
    const device T *x,
    const device uint *gate_codes,
    const device GS *gate_first,
    const device GS *gate_second,
    const device uint *up_codes,
    const device US *up_first,
    const device US *up_second,
    GBias gate_bias,
    UBias up_bias,
    Indices indices,
    uint slots,
    device T *out,
    threadgroup float *staged,
    threadgroup float *floats,
    threadgroup uint *words,
    uint3 group,
    uint simdgroup,
    uint lane) {
  typedef typename L::G G;
  typedef typename L::U U;
  constexpr uint each = L::ROWS, sums = G::SUMS > U::SUMS ? G::SUMS : U::SUMS;
  const uint chosen = group.z * slots + group.y;
  const uint before = uint(indices[chosen]) * L::N;
  const uint first_row = (group.x * L::SIMDS + simdgroup) * L::SETS * each;
  threadgroup float *own_floats = floats + simdgroup * (G::FLOATS + U::FLOATS);
  threadgroup uint *own_words = words + simdgroup * (G::CODES_AND_TABLES + U::CODES_AND_TABLES);
  G of_gate;
  U of_up;
  of_gate.begin(gate_codes, gate_first, gate_second, before + first_row, own_floats, own_words, lane);
  of_up.begin(
      up_codes, up_first, up_second, before + first_row, own_floats + G::FLOATS, own_words + G::CODES_AND_TABLES, lane);
  float gate = 0, up = 0;
  for (uint start = 0; start < L::COLUMNS; start += L::PANEL) {
    const uint columns = G::WHOLE ? L::COLUMNS : min(L::PANEL, L::COLUMNS - start);
    if (start > 0) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    stage_columns<sums>(x + group.z * L::COLUMNS + start, columns, staged, simdgroup, L::SIMDS, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint s = 0; s < L::SETS; ++s) {
      const uint row = first_row + s * each;
      if (row < L::N) {
        const uint rows = min(each, L::N - row);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        of_gate.stage(s, rows, start, columns);
        of_up.stage(s, rows, start, columns);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        float gate_sum = 0, up_sum = 0;
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < G::BLOCKS; ++i) {
          const bool here = of_gate.has(i, rows, columns);
          of_gate.prepare(i, here);
          of_up.prepare(i, here);
          if (here) {
            uint gate_word[G::BITS], up_word[U::BITS];
            of_gate.load(s, start, columns, i, gate_word);
            of_up.load(s, start, columns, i, up_word);
            float v[32], n[32];
            const float2 sum = of_gate.template load_columns<sums>(staged, i, columns, v);
            of_gate.numbers(gate_word, i, n);
            gate_sum += of_gate.dot(n, i, columns, v, sum);
            of_up.numbers(up_word, i, n);
            up_sum += of_up.dot(n, i, columns, v, sum);
          }
        }
        gate_sum = sum_of_row<L::LANES>(gate_sum);
        up_sum = sum_of_row<L::LANES>(up_sum);
        gate += lane % L::LANES == s ? gate_sum : 0.0f;
        up += lane % L::LANES == s ? up_sum : 0.0f;
      }
    }
  }
  const uint set = lane % L::LANES, row = first_row + set * each + lane / L::LANES;
  if (set < L::SETS && row < L::N) {
    if (BIASED) {
      gate += float(gate_bias[before + row]);
      up += float(up_bias[before + row]);
    }
    out[chosen * L::N + row] = T(L::Activation::apply(gate, up));
  }
}

#endif
