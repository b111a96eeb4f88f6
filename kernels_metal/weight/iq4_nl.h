// IQ4_NL: scale · level, sixteen levels that are the same everywhere, one scale a group of 16 or 32.

#ifndef MLX_ROTOR_WEIGHT_IQ4_NL_H
#define MLX_ROTOR_WEIGHT_IQ4_NL_H

#include "lookup.h"

constant const float MLX_ROTOR_IQ4_NL[16] = {
    -127.0f, -104.0f, -83.0f, -65.0f, -49.0f, -35.0f, -22.0f, -10.0f,
    1.0f, 13.0f, 25.0f, 38.0f, 53.0f, 69.0f, 89.0f, 113.0f};

// S: type of scales. A row has columns / 8 words and columns / GROUP_ scales.
template <uint GROUP_, typename S>
struct Iq4NlWeights {
  typedef S Element;
  static constant constexpr const uint BITS = 4, GROUP = GROUP_;
  static_assert(GROUP == 16 || GROUP == 32, "one or two groups a block of 32 weights");
  const device uint *codes;
  const device S *scales;

  // Row `row` of a matrix whose rows have `columns` weights.
  static inline Iq4NlWeights
  at(const device uint *codes, const device S *first, const device S *, long row, uint columns) {
    Iq4NlWeights w;
    w.codes = codes + row * (columns / 8);
    w.scales = first + row * (columns / GROUP);
    return w;
  }

  // Weights k to k + 31, k a multiple of 32. `room`: 32 numbers of the thread's own, for a format that looks them up.
  template <typename Number>
  inline void expand(uint k, threadgroup Number *, thread float (&w)[32]) const thread {
    const float low = float(scales[k / GROUP]), high = float(scales[(k + 16) / GROUP]);
    uint word[BITS];
    load_words(codes + k / 32 * BITS, word);
    Lookup<4, 4>::read(word, MLX_ROTOR_IQ4_NL, w);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 32; ++i) {
      w[i] *= i < 16 ? low : high;
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
  static constant constexpr const bool SUMMED = false;

  // No table.
  static constant constexpr const uint TABLE = 0;
  static inline void build(const threadgroup float *, threadgroup uint *, uint, uint) {}

  // See AffineWeights.
  static inline void numbers(
      const thread uint (&word)[BITS], const threadgroup float *, const threadgroup uint *, thread float (&n)[32]) {
    Lookup<4, 4>::read(word, MLX_ROTOR_IQ4_NL, n);
  }
  static inline float
  finish(const threadgroup float *first, const threadgroup float *, float low, float high, float) {
    return fma(first[0], low, first[16 / GROUP] * high);
  }
};

#endif
