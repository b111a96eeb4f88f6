// Codes of 2, 3, 4 or 8 bits in the words of a tile: 32 tokens of one head, DIM · BITS words.
//
// Word w of token t of the tile stands at tile[32 w + t]: a simdgroup that walks its 32 tokens reads a whole line at a
// time. A vector of DIM elements is UNITS units of FIELDS codes; element e is field e / UNITS of unit e % UNITS, so that
// the neighbours of an element stand in the units before and behind it, at the same place. BITS 8: a unit is a word of
// bytes. BITS 4: of nibbles. BITS 2: of pairs. BITS 3: a word of pairs, the low bits, and the high bits of two units in a
// third word behind them, the even unit's at even places. Where UNITS is odd, the last unit's high bits are 16 bits, and
// those of two tokens share a word at the end of the tile.

#ifndef MLX_ROTOR_CODEC_FIELDS_H
#define MLX_ROTOR_CODEC_FIELDS_H

#include "../common/eight.h"

template <uint BITS, uint DIM>
struct Fields {
  static_assert((BITS >= 2 && BITS <= 4) || BITS == 8, "codes of 2 to 4 or 8 bits");
  static_assert(DIM % 16 == 0, "a multiple of 16 codes");
  static constant constexpr const uint STRIDE = BITS == 3 ? 2 : BITS;
  static constant constexpr const uint FIELDS = 32 / STRIDE;
  static constant constexpr const uint UNITS = DIM / FIELDS;
  static constant constexpr const uint WORDS = DIM * BITS / 32;
  static constant constexpr const uint TILE_WORDS = DIM * BITS;
  static constant constexpr const bool HALF_WORD = BITS == 3 && UNITS % 2 == 1;

  // The word of unit u's fields, its low bits where BITS is 3.
  template <typename Tile>
  static inline uint low(Tile tile, uint token, uint u) {
    return tile[(BITS == 3 ? u + u / 2 : u) * MLX_ROTOR_TILE + token];
  }

  // The high bits of units 2 p and 2 p + 1, BITS 3: bit 2 f for field f of the first, bit 2 f + 1 of the second.
  template <typename Tile>
  static inline uint high(Tile tile, uint token, uint p) {
    if (HALF_WORD && p == UNITS / 2) {
      uint x = (tile[WORDS * MLX_ROTOR_TILE + token / 2] >> (16 * (token & 1))) & 0xFFFFu;
      x = (x | x << 8) & 0x00FF00FFu;
      x = (x | x << 4) & 0x0F0F0F0Fu;
      x = (x | x << 2) & 0x33333333u;
      return (x | x << 1) & 0x55555555u;
    }
    return tile[(3 * p + 2) * MLX_ROTOR_TILE + token];
  }

  // Writes a vector's codes as token `token` of `tile`, and its 16 bits over, if any, as over[token]; the eight lanes
  // of the vector share the words.
  static inline void
  pack(const threadgroup uchar *codes, threadgroup uint *tile, threadgroup ushort *over, uint token, uint lane8) {
    for (uint u = lane8; u < UNITS; u += 8) {
      uint word = 0;
      for (uint f = 0; f < FIELDS; ++f) {
        word |= (uint(codes[f * UNITS + u]) & ((1u << STRIDE) - 1)) << (STRIDE * f);
      }
      tile[(BITS == 3 ? u + u / 2 : u) * MLX_ROTOR_TILE + token] = word;
    }
    if (BITS == 3) {
      for (uint p = lane8; p < UNITS / 2; p += 8) {
        uint word = 0;
        for (uint f = 0; f < FIELDS; ++f) {
          word |= (uint(codes[f * UNITS + 2 * p]) >> 2) << (2 * f);
          word |= (uint(codes[f * UNITS + 2 * p + 1]) >> 2) << (2 * f + 1);
        }
        tile[(3 * p + 2) * MLX_ROTOR_TILE + token] = word;
      }
      if (HALF_WORD && lane8 == 0) {
        uint word = 0;
        for (uint f = 0; f < FIELDS; ++f) {
          word |= (uint(codes[f * UNITS + UNITS - 1]) >> 2) << f;
        }
        over[token] = ushort(word);
      }
    }
  }

  // Decoders hand out a unit's levels in pairs, fields i and i + FIELDS / 2 together: where element e comes in that order.
  static inline uint position(uint e) {
    const uint f = e / UNITS;
    return (e % UNITS) * FIELDS + 2 * (f % (FIELDS / 2)) + f / (FIELDS / 2);
  }

  // The inverse of position.
  static inline uint element(uint p) {
    const uint within = p % FIELDS;
    return (within / 2 + (within % 2) * (FIELDS / 2)) * UNITS + p / FIELDS;
  }
};

// Integers n in bits `at` .. of both halves of a word, as floats u = n - middle: 1024 + n 2^at is a half whose
// mantissa they are.
static inline float2 centred(uint halves, uint at, float middle) {
  const float2 n = float2(as_type<half2>(halves | 0x64006400u));
  const float unit = 1.0f / float(1u << at);
  const float zero = -(1024.0f * unit + middle);
  return float2(fma(n.x, unit, zero), fma(n.y, unit, zero));
}

#endif
