// Codebooks: a group of weights has its own 2^BITS levels, and a code says which.

#ifndef MLX_ROTOR_WEIGHT_LLOYD_H
#define MLX_ROTOR_WEIGHT_LLOYD_H

#include "lookup.h"

// S: type of levels. A row has columns · BITS_ / 32 words and columns / GROUP_ · 2^BITS_ levels.
template <uint BITS_, uint GROUP_, typename S>
struct LloydWeights {
  typedef S Element;
  static constant constexpr const uint BITS = BITS_, GROUP = GROUP_, LEVELS = 1u << BITS_;
  static_assert(GROUP % 32 == 0, "whole blocks of 32 weights a group");
  // Levels as one access loads them, no better aligned than one.
  struct Four {
    S v[4];
  };
  const device uint *codes;
  const device S *books;

  // Row `row` of a matrix whose rows have `columns` weights.
  static inline LloydWeights
  at(const device uint *codes, const device S *first, const device S *, long row, uint columns) {
    LloydWeights w;
    w.codes = codes + row * (columns / 32 * BITS);
    w.books = first + row * (columns / GROUP * LEVELS);
    return w;
  }

  // Weights k to k + 31, k a multiple of 32. `room`: 32 numbers of the thread's own, for the group's levels;
  // aligned as four are.
  template <typename Number>
  inline void expand(uint k, threadgroup Number *room, thread float (&w)[32]) const thread {
    const device Four *book = (const device Four *)(books + k / GROUP * LEVELS);
    threadgroup vec<Number, 4> *levels = (threadgroup vec<Number, 4> *)room;
    MLX_ROTOR_UNROLL
    for (uint e = 0; e < LEVELS / 4; ++e) {
      Four own;
      own = book[e];
      levels[e] = vec<Number, 4>(Number(own.v[0]), Number(own.v[1]), Number(own.v[2]), Number(own.v[3]));
    }
    uint word[BITS];
    load_words(codes + k / 32 * BITS, word);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 32; ++i) {
      const uint at = i * BITS / 32, shift = i * BITS % 32;
      uint code = word[at] >> shift;
      if (shift + BITS > 32) {
        code |= word[(at + 1) % BITS] << ((32 - shift) & 31);
      }
      w[i] = float(room[code & (LEVELS - 1)]);
    }
  }

  // How many levels `columns` weights have, and no second array.
  static inline constexpr uint first_count(uint columns) {
    return columns / GROUP * LEVELS;
  }
  static inline constexpr uint second_count(uint) {
    return 0;
  }

  // Whether `finish` takes the sum of x.
  static constant constexpr const bool SUMMED = false;

  // Words of a table of all pairs of a group's levels, where two levels take one and the tables of 32 lanes 1 KiB at most.
  static constant constexpr const bool PAIRED = is_same<S, half>::value && LEVELS * LEVELS * 4 <= GROUP;
  static constant constexpr const uint TABLE = PAIRED ? LEVELS * LEVELS : 0;

  // Part `part` of `parts` of a group's table: entry e is levels e % LEVELS and e / LEVELS.
  static inline void build(const threadgroup float *book, threadgroup uint *table, uint part, uint parts) {
    for (uint e = part; e < TABLE; e += parts) {
      table[e] = as_type<uint>(half2(half(book[e % LEVELS]), half(book[e / LEVELS])));
    }
  }

  // See AffineWeights. A pair of codes is one look-up, where there is a table.
  static inline void numbers(
      const thread uint (&word)[BITS],
      const threadgroup float *book,
      const threadgroup uint *table,
      thread float (&n)[32]) {
    if (PAIRED) {
      Lookup<BITS, 2 * BITS>::read(word, table, n);
    } else {
      Lookup<BITS, BITS>::read(word, book, n);
    }
  }
  static inline float finish(const threadgroup float *, const threadgroup float *, float low, float high, float) {
    return low + high;
  }
};

#endif
