// Eight lanes hold one vector: lane l of the eight has the elements l, l + 8, l + 16 ... in registers, so that a
// simdgroup works on four vectors. All functions are collective: every lane of the simdgroup calls them together.
//
// Products are kept apart from the sums that take them (contraction off): the order of roundings is part of the
// codec, whose reference in mlx_rotor/codec makes the same ones.

#ifndef MLX_ROTOR_COMMON_EIGHT_H
#define MLX_ROTOR_COMMON_EIGHT_H

#pragma STDC FP_CONTRACT OFF

// Tokens of a tile, the unit of packed storage, and lanes of a simdgroup.
#define MLX_ROTOR_TILE 32

// Arrays stay in registers only where the loops over them are unrolled. A CPU, for which tests compile this, has none to
// keep them in.
#if defined(__OPENCL_CPP_VERSION__) && !defined(__NVPTX__)
#define MLX_ROTOR_UNROLL
#else
#define MLX_ROTOR_UNROLL _Pragma("clang loop unroll(full)")
#endif

// Sum of `mine` over the eight lanes of the vector, the same on all of them.
static inline float sum_of_eight(float mine) {
  mine += simd_shuffle_xor(mine, ushort(1));
  mine += simd_shuffle_xor(mine, ushort(2));
  mine += simd_shuffle_xor(mine, ushort(4));
  return mine;
}

// ⟨a, b⟩ of two vectors: each lane sums its own products in order, then the lanes are summed.
template <uint PART>
static inline float dot_of_eight(const thread float (&a)[PART], const thread float (&b)[PART]) {
  float sum = a[0] * b[0];
  MLX_ROTOR_UNROLL
  for (uint i = 1; i < PART; ++i) {
    const float product = a[i] * b[i];
    sum = sum + product;
  }
  return sum_of_eight(sum);
}

// Copies a rotation's table to threadgroup memory, every thread a part; a barrier is the caller's.
static inline void
stage_table(const device uint *table, threadgroup uint *staged, uint words, uint thread_index, uint threads) {
  for (uint i = thread_index; i < words; i += threads) {
    staged[i] = table[i];
  }
}

#endif
