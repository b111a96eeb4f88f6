// Eight bits, symmetric: scale · (code - 128), one scale a group.

#ifndef MLX_ROTOR_WEIGHT_Q8_H
#define MLX_ROTOR_WEIGHT_Q8_H

#include "codes.h"

// S: type of scales. A row has columns / 4 words and columns / GROUP_ scales.
template <uint GROUP_, typename S>
struct Q8Weights {
  typedef S Element;
  static constant constexpr const uint BITS = 8, GROUP = GROUP_;
  static_assert(GROUP % 32 == 0, "whole blocks of 32 weights a group");
  const device uint *codes;
  const device S *scales;

  // Row `row` of a matrix whose rows have `columns` weights.
  static inline Q8Weights
  at(const device uint *codes, const device S *first, const device S *, long row, uint columns) {
    Q8Weights w;
    w.codes = codes + row * (columns / 4);
    w.scales = first + row * (columns / GROUP);
    return w;
  }

  // Weights k to k + 31, k a multiple of 32. `room`: 32 numbers of the thread's own, for a format that looks them up.
  template <typename Number>
  inline void expand(uint k, threadgroup Number *, thread float (&w)[32]) const thread {
    uint word[BITS];
    load_words(codes + k / 32 * BITS, word);
    const float scale = float(scales[k / GROUP]);
    Codes<8>::read(word, w);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 32; ++i) {
      w[i] = scale * (w[i] - 128.0f);
    }
  }

  // How many scales `columns` weights have, and no second array.
  static inline constexpr uint first_count(uint columns) {
    return columns / GROUP;
  }
  static inline constexpr uint second_count(uint) {
    return 0;
  }

  // Whether `finish` takes the sum of x.
  static constant constexpr const bool SUMMED = true;

  // No table.
  static constant constexpr const uint TABLE = 0;
  static inline void build(const threadgroup float *, threadgroup uint *, uint, uint) {}

  // See AffineWeights.
  static inline void numbers(
      const thread uint (&word)[BITS], const threadgroup float *, const threadgroup uint *, thread float (&n)[32]) {
    Codes<8>::read(word, n);
  }
  static inline float
  finish(const threadgroup float *first, const threadgroup float *, float low, float high, float sum) {
    return first[0] * fma(-128.0f, sum, low + high);
  }
};

#endif
