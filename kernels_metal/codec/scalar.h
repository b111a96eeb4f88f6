// A scalar quantizer: every coordinate takes its nearest level, 2^BITS of them; the code is the level's index.

#ifndef MLX_ROTOR_CODEC_SCALAR_H
#define MLX_ROTOR_CODEC_SCALAR_H

#include "curve.h"
#include "fields.h"

template <uint BITS, uint DIM>
struct Scalar : Fields<BITS, DIM> {
  typedef Fields<BITS, DIM> Layout;
  typedef Curve<(1u << BITS), false> Levels;
  // Whether every vector has a scale of its own.
  static constant constexpr const bool SCALED = true;
  // Bytes a vector needs while it is encoded, beside its codes.
  static constant constexpr const uint SCRATCH = 0;
  uint high_word;

  // Starts the walk over the units of one token.
  template <typename Tile>
  inline void begin(Tile, uint) thread {
    high_word = 0;
  }

  // Starts a walk over a part of them, from unit `first`.
  template <typename Tile>
  inline void begin_part(Tile tile, uint token, uint first) thread {
    high_word = BITS == 3 && first % 2 == 1 ? Layout::high(tile, token, first / 2) : 0;
  }

  // The next unit of such a walk, as `unit` gives it.
  template <typename Tile>
  inline void part_unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    unit(tile, token, u, level);
  }

  // Levels of unit u, in pairs (see Fields::position). Units are asked for in order, from where the walk starts.
  template <typename Tile>
  inline void unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    // A number must stay within the ten mantissa bits of a half: past them, the word is shifted down once.
    constexpr uint direct = BITS == 4 ? 2 : BITS == 3 ? 4 : 5;
    constexpr uint down = Layout::STRIDE * direct;
    constexpr float middle = 0.5f * float((1u << BITS) - 1);
    const uint word = Layout::low(tile, token, u);
    const uint lower = word >> down;
    uint top = 0, top_lower = 0;
    if (BITS == 3) {
      if (u % 2 == 0) {
        high_word = Layout::high(tile, token, u / 2);
      }
      const uint mine = u % 2 == 0 ? high_word : high_word >> 1;
      top = mine << 2;
      top_lower = mine >> (down - 2);
    }
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < Layout::FIELDS / 2; ++i) {
      const uint at = Layout::STRIDE * (i % direct);
      uint halves = (i < direct ? word : lower) & (((1u << Layout::STRIDE) - 1) * 0x00010001u << at);
      if (BITS == 3) {
        halves |= (i < direct ? top : top_lower) & (0x00040004u << at);
      }
      const float2 n = centred(halves, at, middle);
      level[i] = half2(Levels::level(n.x), Levels::level(n.y));
    }
  }

  // Codes of a rotated vector, y its elements on the eight lanes and `inverse_rms` one over their root mean square.
  // Leaves the levels taken in c. Collective.
  static inline void encode(
      const threadgroup float *,
      thread float (&y)[DIM / 8],
      float inverse_rms,
      threadgroup uchar *codes,
      threadgroup uint *,
      uint lane,
      thread float (&c)[DIM / 8]) {
    constexpr uint half_count = 1u << (BITS - 1);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      const float unit = y[i] * inverse_rms;
      const float size = fabs(unit);
      uint above = 0;
      MLX_ROTOR_UNROLL
      for (uint n = 0; n + 1 < half_count; ++n) {
        above += size > Levels::template cut<1>(half_count + n) ? 1u : 0u;
      }
      const uint code = unit >= 0 ? half_count + above : half_count - 1 - above;
      codes[(lane & 7) + 8 * i] = uchar(code);
      c[i] = Levels::of(code);
    }
  }
};

#endif
