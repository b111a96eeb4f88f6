// Two-sign Hadamard rotation: y = D2 H D1 x / √DIM. DIM is M · 2^k, M one of 1, 12, 20, 28.
//
// `table` has signs as bits, 1 for minus: D1 and D2, bit e % 32 of word e / 32 for element e, then, where M is not 1, the
// outer factor, a word a row. The inverse is the same map with the two sign vectors exchanged and the outer factor
// transposed.

#ifndef MLX_ROTOR_CODEC_HADAMARD_H
#define MLX_ROTOR_CODEC_HADAMARD_H

#include "../common/eight.h"

template <uint DIM>
struct Hadamard {
  static constant constexpr const uint INNER_MAX = DIM & (~DIM + 1);  // the largest power of two that divides DIM
  static constant constexpr const uint ODD = DIM / INNER_MAX;
  static constant constexpr const uint OUTER = ODD == 1 ? 1 : 4 * ODD;
  static constant constexpr const uint INNER = DIM / OUTER;

  static constant constexpr const uint WORDS = (DIM + 31) / 32;
  // Words of the table.
  static constant constexpr const uint TABLE = 2 * WORDS + (OUTER > 1 ? OUTER : 0);

  static inline float flipped(float x, uint signs, uint bit) {
    return as_type<float>(as_type<uint>(x) ^ ((signs >> bit & 1) << 31));
  }

  // Rotates the vector in v. Its elements end on the eight lanes, in y; v may be overwritten. `root` is DIM^-1/2.
  // Collective.
  template <typename Table>
  static inline void apply(threadgroup float *v, Table table, float root, uint lane, thread float (&y)[DIM / 8]) {
    const uint lane8 = lane & 7;
    // A lane reads a word, for all to use.
    const uint signs = lane < 2 * WORDS ? table[lane] : 0;
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      y[i] = flipped(v[lane8 + 8 * i], simd_shuffle(signs, ushort(i / 4)), lane8 + 8 * (i % 4));
    }
    // Sums go to the lower of two elements, differences to the upper; the nearest elements first.
    MLX_ROTOR_UNROLL
    for (uint step = 1; step < INNER && step < 8; step *= 2) {
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DIM / 8; ++i) {
        const float other = simd_shuffle_xor(y[i], ushort(step));
        y[i] = lane8 & step ? other - y[i] : y[i] + other;
      }
    }
    MLX_ROTOR_UNROLL
    for (uint step = 1; 8 * step < INNER; step *= 2) {
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DIM / 8; ++i) {
        if ((i & step) == 0) {
          const float a = y[i], b = y[i + step];
          y[i] = a + b;
          y[i + step] = a - b;
        }
      }
    }
    if (OUTER > 1) {
      const uint rows = lane < OUTER ? table[2 * WORDS + lane] : 0;
      // Each lane has read its own elements only: it may write them.
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DIM / 8; ++i) {
        v[lane8 + 8 * i] = y[i];
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DIM / 8; ++i) {
        const uint e = lane8 + 8 * i;
        const uint row = simd_shuffle(rows, ushort(e / INNER));
        float sum = flipped(v[e % INNER], row, 0);
        for (uint j = 1; j < OUTER; ++j) {
          sum = sum + flipped(v[j * INNER + e % INNER], row, j);
        }
        y[i] = sum;
      }
    }
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      y[i] = flipped(y[i] * root, simd_shuffle(signs, ushort(WORDS + i / 4)), lane8 + 8 * (i % 4));
    }
  }
};

#endif
