// Codes of 1 to 6 or 8 bits in MLX's packing: a row is one little-endian bit stream in 32-bit words, 32 codes are BITS
// words, and a code of 3, 5 or 6 bits may lie in two of them.
//
// No conversion from integers: bits in the mantissa of a half or a float are a number, less what the exponent stands for.
// A pair of codes in the two halves of a word costs one operation to cut out and one each to centre.

#ifndef MLX_ROTOR_WEIGHT_CODES_H
#define MLX_ROTOR_WEIGHT_CODES_H

#include "../common/eight.h"

// A word whose two halves are floats of exponent 10, and hold the ten lowest bits of the word's halves.
static inline uint as_mantissas(uint word) {
  return (word & 0x03FF03FFu) | 0x64006400u;
}

// The codes of BITS bits at bit LOW of the low half and bit HIGH of the high half of such a word.
template <uint BITS, uint LOW, uint HIGH>
static inline float2 pair_of_codes(uint mantissas) {
  constexpr uint mask = (1u << BITS) - 1;
  constexpr float low = 1.0f / float(1u << LOW), high = 1.0f / float(1u << HIGH);
  const float2 n = float2(as_type<half2>(mantissas & (0x64006400u | mask << LOW | mask << (HIGH + 16))));
  return float2(fma(n.x, low, -1024.0f * low), fma(n.y, high, -1024.0f * high));
}

// The 64 bits `high`, `low`, shifted right by SHIFT below 32, their lowest word.
template <uint SHIFT>
static inline uint across(uint low, uint high) {
  return SHIFT == 0 ? low : (low >> SHIFT) | (high << ((32 - SHIFT) & 31));
}

// Four words, from a multiple of 16 bytes.
template <uint BITS>
static inline void load_four(const device uint *from, thread uint (&word)[BITS], uint at) {
  const uint4 four = *(const device uint4 *)from;
  word[at] = four.x;
  word[(at + 1) % BITS] = four.y;
  word[(at + 2) % BITS] = four.z;
  word[(at + 3) % BITS] = four.w;
}

// BITS words, a block's, from where such blocks lie side by side.
template <uint BITS>
static inline void load_words(const device uint *from, thread uint (&word)[BITS]) {
  if (BITS == 2) {
    const uint2 two = *(const device uint2 *)from;
    word[0] = two.x;
    word[1 % BITS] = two.y;
  } else if (BITS % 4 == 0) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < BITS; i += 4) {
      load_four(from + i, word, i);
    }
  } else {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < BITS; ++i) {
      word[i] = from[i];
    }
  }
}

// BITS words to 32 codes: n[i] is code i, a whole number, exact.
template <uint BITS>
struct Codes;

template <>
struct Codes<1> {
  static inline void read(const thread uint (&word)[1], thread float (&n)[32]) {
    const uint first = as_mantissas(word[0]), second = as_mantissas(word[0] >> 6);
    put<0, 0>(first, n);
    put<1, 1>(first, n);
    put<2, 2>(first, n);
    put<3, 3>(first, n);
    put<4, 4>(first, n);
    put<5, 5>(first, n);
    put<6, 6>(first, n);
    put<7, 7>(first, n);
    put<8, 8>(first, n);
    put<9, 9>(first, n);
    put<4, 10>(second, n);
    put<5, 11>(second, n);
    put<6, 12>(second, n);
    put<7, 13>(second, n);
    put<8, 14>(second, n);
    put<9, 15>(second, n);
  }

  template <uint AT, uint CODE>
  static inline void put(uint mantissas, thread float (&n)[32]) {
    const float2 pair = pair_of_codes<1, AT, AT>(mantissas);
    n[CODE] = pair.x;
    n[CODE + 16] = pair.y;
  }
};

template <>
struct Codes<2> {
  static inline void read(const thread uint (&word)[2], thread float (&n)[32]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 2; ++i) {
      const uint first = as_mantissas(word[i]), second = as_mantissas(word[i] >> 6);
      put<0, 0>(first, n, 16 * i);
      put<2, 1>(first, n, 16 * i);
      put<4, 2>(first, n, 16 * i);
      put<6, 3>(first, n, 16 * i);
      put<8, 4>(first, n, 16 * i);
      put<4, 5>(second, n, 16 * i);
      put<6, 6>(second, n, 16 * i);
      put<8, 7>(second, n, 16 * i);
    }
  }

  template <uint AT, uint CODE>
  static inline void put(uint mantissas, thread float (&n)[32], uint base) {
    const float2 pair = pair_of_codes<2, AT, AT>(mantissas);
    n[base + CODE] = pair.x;
    n[base + CODE + 8] = pair.y;
  }
};

// Six words of 32 bits out of the stream in which every code lies in the ten lowest bits of a half: the three there are,
// and three that begin at bits 8, 41 and 72.
template <>
struct Codes<3> {
  static inline void read(const thread uint (&word)[3], thread float (&n)[32]) {
    const uint a = as_mantissas(word[0]), b = as_mantissas(word[1]), c = as_mantissas(word[2]);
    put<0, 0, 2, 6>(a, n);
    put<3, 1, 5, 7>(a, n);
    put<6, 2, 5, 7>(a, n);
    put<1, 11, 0, 16>(b, n);
    put<4, 12, 3, 17>(b, n);
    put<7, 13, 6, 18>(b, n);
    put<2, 22, 1, 27>(c, n);
    put<5, 23, 4, 28>(c, n);
    put<5, 23, 7, 29>(c, n);
    const uint d = as_mantissas(across<8>(word[0], word[1])), e = as_mantissas(across<9>(word[1], word[2]));
    const uint f = as_mantissas(word[2] >> 8);
    put<1, 3, 0, 8>(d, n);
    put<4, 4, 3, 9>(d, n);
    put<7, 5, 6, 10>(d, n);
    put<1, 14, 0, 19>(e, n);
    put<4, 15, 3, 20>(e, n);
    put<4, 15, 6, 21>(e, n);
    put<0, 24, 2, 30>(f, n);
    put<3, 25, 5, 31>(f, n);
    put<6, 26, 5, 31>(f, n);
  }

  template <uint LOW, uint LOW_CODE, uint HIGH, uint HIGH_CODE>
  static inline void put(uint mantissas, thread float (&n)[32]) {
    const float2 pair = pair_of_codes<3, LOW, HIGH>(mantissas);
    n[LOW_CODE] = pair.x;
    n[HIGH_CODE] = pair.y;
  }
};

template <>
struct Codes<4> {
  static inline void read(const thread uint (&word)[4], thread float (&n)[32]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 4; ++i) {
      const uint first = as_mantissas(word[i]), second = as_mantissas(word[i] >> 8);
      put<0, 0>(first, n, 8 * i);
      put<4, 1>(first, n, 8 * i);
      put<0, 2>(second, n, 8 * i);
      put<4, 3>(second, n, 8 * i);
    }
  }

  template <uint AT, uint CODE>
  static inline void put(uint mantissas, thread float (&n)[32], uint base) {
    const float2 pair = pair_of_codes<4, AT, AT>(mantissas);
    n[base + CODE] = pair.x;
    n[base + CODE + 4] = pair.y;
  }
};

// 5 and 6 bits: the mantissa of a float has 23, four or three codes of them whole.
template <uint BITS, uint MANY>
struct CodesOfFloats {
  static inline void read(const thread uint (&word)[BITS], thread float (&n)[32]) {
    few<0>(word, n);
    few<MANY>(word, n);
    few<2 * MANY>(word, n);
    few<3 * MANY>(word, n);
    few<4 * MANY>(word, n);
    few<5 * MANY>(word, n);
    few<6 * MANY>(word, n);
    few<7 * MANY>(word, n);
    few<8 * MANY>(word, n);
    few<9 * MANY>(word, n);
    few<10 * MANY>(word, n);
  }

  // MANY codes from CODE on, as many as there are.
  template <uint CODE>
  static inline void few(const thread uint (&word)[BITS], thread float (&n)[32]) {
    constexpr uint at = CODE * BITS / 32 < BITS ? CODE * BITS / 32 : BITS - 1, behind = at + 1 < BITS ? at + 1 : at;
    constexpr uint mask = (1u << BITS) - 1;
    const uint bits = across<CODE * BITS % 32>(word[at], word[behind]);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < MANY; ++i) {
      if (CODE + i < 32) {
        const float unit = 1.0f / float(1u << (i * BITS));
        const float value = as_type<float>((bits & mask << (i * BITS)) | 0x4B000000u);
        n[(CODE + i) & 31] = fma(value, unit, -8388608.0f * unit);
      }
    }
  }
};

template <>
struct Codes<5> : CodesOfFloats<5, 4> {};

template <>
struct Codes<6> : CodesOfFloats<6, 3> {};

template <>
struct Codes<8> {
  static inline void read(const thread uint (&word)[8], thread float (&n)[32]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 8; ++i) {
      const float2 even = pair_of_codes<8, 0, 0>(as_mantissas(word[i]));
      const float2 odd = pair_of_codes<8, 0, 0>(as_mantissas(word[i] >> 8));
      n[4 * i] = even.x;
      n[4 * i + 1] = odd.x;
      n[4 * i + 2] = even.y;
      n[4 * i + 3] = odd.y;
    }
  }
};

#endif
