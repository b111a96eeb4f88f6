// Codes as places in a table of four-byte entries. A word's halves are registers of their own, so one shift and one mask
// cut two codes out of it. An entry is a level, or two as halves, which two codes side by side say.

#ifndef MLX_ROTOR_WEIGHT_LOOKUP_H
#define MLX_ROTOR_WEIGHT_LOOKUP_H

#include "codes.h"

static inline void put_levels(float entry, thread float (&n)[32], uint code) {
  n[code] = entry;
}
static inline void put_levels(uint entry, thread float (&n)[32], uint code) {
  const float2 pair = float2(as_type<half2>(entry));
  n[code] = pair.x;
  n[(code + 1) % 32] = pair.y;
}

// BITS words of codes to 32 levels; WIDTH: BITS, or twice as many where an entry is two levels.
template <uint BITS, uint WIDTH>
struct Lookup {
  static_assert(16 % WIDTH == 0, "whole fields in a half");

  template <typename Table>
  static inline void read(const thread uint (&word)[BITS], Table table, thread float (&n)[32]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < BITS; ++i) {
      MLX_ROTOR_UNROLL
      for (uint at = 0; at < 16; at += WIDTH) {
        const ushort2 place = as_type<ushort2>((word[i] >> at) & (((1u << WIDTH) - 1) * 0x00010001u));
        put_levels(table[place.x], n, (32 * i + at) / BITS);
        put_levels(table[place.y], n, (32 * i + 16 + at) / BITS);
      }
    }
  }
};

// Of 3 bits the field 18 bits behind another is two bits higher in its half: its place times four, what an entry takes.
template <uint WIDTH>
struct Lookup<3, WIDTH> {
  template <typename Entry>
  static inline void read(const thread uint (&word)[3], const threadgroup Entry *table, thread float (&n)[32]) {
    const uint a = word[0], b = across<12>(a, word[1]), c = word[1];
    const uint d = across<WIDTH == 6 ? 10 : 13>(c, word[2]), e = word[2];
    two<0>(a, table, n);
    two<4>(b, table, n);
    two<12>(c >> 4, table, n);
    two<24>(e >> 8, table, n);
    if (WIDTH == 6) {
      two<2>(a >> 6, table, n);
      two<14>(d, table, n);
      two<22>(e >> 2, table, n);
      put_levels(table[(c >> 16) & 63u], n, 16);
      put_levels(table[(e >> 14) & 63u], n, 26);
    } else {
      two<1>(a >> 3, table, n);
      two<2>(a >> 6, table, n);
      two<3>(a >> 9, table, n);
      two<5>(b >> 3, table, n);
      two<13>(c >> 7, table, n);
      two<14>(c >> 10, table, n);
      two<15>(d, table, n);
      two<16>(d >> 3, table, n);
      two<17>(d >> 6, table, n);
      two<25>(e >> 11, table, n);
      put_levels(table[(e >> 14) & 7u], n, 26);
      put_levels(table[(e >> 17) & 7u], n, 27);
      put_levels(table[(e >> 20) & 7u], n, 28);
      put_levels(table[(e >> 23) & 7u], n, 29);
    }
  }

  // Codes CODE and CODE + 6, the first in the lowest bits.
  template <uint CODE, typename Entry>
  static inline void two(uint bits, const threadgroup Entry *table, thread float (&n)[32]) {
    constexpr uint mask = (1u << WIDTH) - 1;
    const ushort2 place = as_type<ushort2>(bits & (mask | mask << 18));
    put_levels(table[place.x], n, CODE);
    put_levels(*(const threadgroup Entry *)((const threadgroup uchar *)table + place.y), n, CODE + 6);
  }
};

#endif
