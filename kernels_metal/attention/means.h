// Means that were subtracted from keys before they were encoded, put back without touching the tokens: a mean adds the
// same to all scores of its group of tokens, which is whole tiles. merge.h adds the means of values.

#ifndef MLX_ROTOR_ATTENTION_MEANS_H
#define MLX_ROTOR_ATTENTION_MEANS_H

#include "../common/eight.h"

// Groups whose products a threadgroup of the decode kernel has at hand.
#define MLX_ROTOR_GROUPS 8

// The sums that means add to the rows' scores: products[group · ROWS + row] for groups 0 to `last`. means: [groups, DIM] in the codec's
// basis; query: [ROWS, DIM] in the order Q's levels come in. A simdgroup makes every SIMDS-th group's. Collective over the
// threadgroup, which may have read products before and may read them now.
template <typename Q, uint DIM, uint ROWS, uint SIMDS>
static inline void mean_products(
    const device half *means,
    uint last,
    const threadgroup float *query,
    threadgroup float *products,
    uint simdgroup,
    uint lane) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  // Element 32 i + lane of the order lies 32 / FIELDS behind the one before it.
  for (uint group = simdgroup; group <= last; group += SIMDS) {
    float mean[(DIM + 31) / 32];
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < (DIM + 31) / 32; ++i) {
      const uint p = lane + 32 * i;
      mean[i] = p < DIM ? float(means[group * DIM + Q::element(lane) + 32 / Q::FIELDS * i]) : 0.0f;
    }
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      float sum = 0;
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < (DIM + 31) / 32; ++i) {
        const uint p = lane + 32 * i;
        sum = p < DIM ? fma(query[r * DIM + p], mean[i], sum) : sum;
      }
      sum = simd_sum(sum);
      if (lane == 0) {
        products[group * ROWS + r] = sum;
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

#endif
