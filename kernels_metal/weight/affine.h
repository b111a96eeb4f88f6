// MLX's own format: scale · code + bias, both once a group.

#ifndef MLX_ROTOR_WEIGHT_AFFINE_H
#define MLX_ROTOR_WEIGHT_AFFINE_H

#include "codes.h"

// S: type of scales and biases. A row has columns · BITS_ / 32 words and columns / GROUP_ of each.
template <uint BITS_, uint GROUP_, typename S>
struct AffineWeights {
  typedef S Element;
  static constant constexpr const uint BITS = BITS_, GROUP = GROUP_;
  static_assert(GROUP % 32 == 0, "whole blocks of 32 weights a group");
  const device uint *codes;
  const device S *scales;
  const device S *biases;

  // Row `row` of a matrix whose rows have `columns` weights.
  static inline AffineWeights
  at(const device uint *codes, const device S *first, const device S *second, long row, uint columns) {
    AffineWeights w;
    w.codes = codes + row * (columns / 32 * BITS);
    w.scales = first + row * (columns / GROUP);
    w.biases = second + row * (columns / GROUP);
    return w;
  }

  // Weights k to k + 31, k a multiple of 32. `room`: 32 numbers of the thread's own, for a format that looks them up.
  template <typename Number>
  inline void expand(uint k, threadgroup Number *, thread float (&w)[32]) const thread {
    uint word[BITS];
    load_words(codes + k / 32 * BITS, word);
    const float scale = float(scales[k / GROUP]), bias = float(biases[k / GROUP]);
    Codes<BITS>::read(word, w);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 32; ++i) {
      const float product = scale * w[i];
      w[i] = product + bias;
    }
  }

  // How many scales, and biases, `columns` weights have.
  static inline constexpr uint first_count(uint columns) {
    return columns / GROUP;
  }
  static inline constexpr uint second_count(uint columns) {
    return columns / GROUP;
  }

  // Whether `finish` takes the sum of x.
  static constant constexpr const bool SUMMED = true;

  // No table.
  static constant constexpr const uint TABLE = 0;
  static inline void build(const threadgroup float *, threadgroup uint *, uint, uint) {}

  // What x is multiplied with, for 32 weights whose group's part of the arrays, as floats, begins at `first`.
  static inline void numbers(
      const thread uint (&word)[BITS], const threadgroup float *, const threadgroup uint *, thread float (&n)[32]) {
    Codes<BITS>::read(word, n);
  }

  // The sum of 32 weights times x, of the sums of numbers times x over 16 of them each, and that of x.
  static inline float
  finish(const threadgroup float *first, const threadgroup float *second, float low, float high, float sum) {
    return fma(first[0], low + high, second[0] * sum);
  }
};

#endif
