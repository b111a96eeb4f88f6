// A trellis-coded quantizer: Ungerboeck's rate-1/2 code of 8 states over a codebook of 2^(BITS + 1) levels.
//
// Element t carries a path bit p[t] and an amplitude A of BITS - 1 bits. With z1 = p[t] ^ p[t-1] ^ p[t-3] and
// z0 = p[t-2], path bits before the vector being 0, its level has index 4 A + 2 z1 + z0. The code is 2 A + p, or
// A + 4 p for 3 bits: the path bits of a unit lie in one word, a word of z takes a few XORs with the words of the units
// before, and no table or serial walk is needed to decode.

#ifndef MLX_ROTOR_CODEC_TRELLIS_H
#define MLX_ROTOR_CODEC_TRELLIS_H

#include "curve.h"
#include "fields.h"

template <uint BITS, uint DIM>
struct Trellis : Fields<BITS, DIM> {
  typedef Fields<BITS, DIM> Layout;
  typedef Curve<(2u << BITS), true> Levels;
  // Whether every vector has a scale of its own.
  static constant constexpr const bool SCALED = true;
  static constant constexpr const uint AMPLITUDES = 1u << (BITS - 1);
  static constant constexpr const uint DECISION_WORDS = (DIM + 31) / 32;
  static constant constexpr const uint SCRATCH = 8 * DECISION_WORDS * 4;
  static constant constexpr const uint PLACE = BITS == 4 ? 0x11111111u : 0x55555555u;
  // The words that hold the last three units' path bits, read at the start and kept until their turn comes.
  uint kept[3];
  uint before1, before2, before3, high_word;

  // Starts the walk over the units of one token: the unit "before" the first is the last, one field down.
  template <typename Tile>
  inline void begin(Tile tile, uint token) thread {
    if (BITS == 3) {
      kept[1] = Layout::high(tile, token, (Layout::UNITS - 1) / 2);
      kept[0] = Layout::high(tile, token, (Layout::UNITS - 1) / 2 - 1);
      const uint last = Layout::UNITS % 2 == 0 ? kept[1] >> 1 : kept[1];
      const uint second = Layout::UNITS % 2 == 0 ? kept[1] : kept[0] >> 1;
      const uint third = Layout::UNITS % 2 == 0 ? kept[0] >> 1 : kept[0];
      before1 = (last & PLACE) << 2;
      before2 = (second & PLACE) << 2;
      before3 = (third & PLACE) << 2;
      high_word = 0;
    } else {
      for (uint i = 0; i < 3; ++i) {
        kept[i] = Layout::low(tile, token, Layout::UNITS - 3 + i);
      }
      before1 = (kept[2] & PLACE) << Layout::STRIDE;
      before2 = (kept[1] & PLACE) << Layout::STRIDE;
      before3 = (kept[0] & PLACE) << Layout::STRIDE;
    }
  }

  // The path bits of unit u, at the places of its fields.
  template <typename Tile>
  static inline uint path_of(Tile tile, uint token, uint u) {
    return (BITS == 3 ? Layout::high(tile, token, u / 2) >> (u % 2) : Layout::low(tile, token, u)) & PLACE;
  }

  // The path bits of the unit `back` before u.
  template <typename Tile>
  static inline uint path_before(Tile tile, uint token, uint u, uint back) {
    return u >= back ? path_of(tile, token, u - back)
                     : path_of(tile, token, Layout::UNITS + u - back) << Layout::STRIDE;
  }

  // Starts a walk over a part of the units, from unit `first`; nothing is kept.
  template <typename Tile>
  inline void begin_part(Tile tile, uint token, uint first) thread {
    before1 = path_before(tile, token, first, 1);
    before2 = path_before(tile, token, first, 2);
    before3 = path_before(tile, token, first, 3);
    high_word = BITS == 3 && first % 2 == 1 ? Layout::high(tile, token, first / 2) : 0;
  }

  // Levels of the next unit of such a walk, as `unit` gives them.
  template <typename Tile>
  inline void part_unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    const uint word = Layout::low(tile, token, u);
    if (BITS == 3 && u % 2 == 0) {
      high_word = Layout::high(tile, token, u / 2);
    }
    levels(word, BITS == 3 ? high_word >> (u % 2) : word, level);
  }

  // Levels of unit u, in pairs (see Fields::position). Units are asked for in order, from 0.
  template <typename Tile>
  inline void unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    uint word, with_path;
    if (BITS == 3) {
      word = Layout::low(tile, token, u);
      if (u % 2 == 0) {
        const uint last = (Layout::UNITS - 1) / 2;
        high_word = u / 2 + 1 < last ? Layout::high(tile, token, u / 2) : u / 2 == last ? kept[1] : kept[0];
      }
      with_path = high_word >> (u % 2);
    } else {
      const uint from_end = Layout::UNITS - u;
      word = from_end > 3 ? Layout::low(tile, token, u)
           : from_end == 3 ? kept[0]
           : from_end == 2 ? kept[1]
                           : kept[2];
      with_path = word;
    }
    levels(word, with_path, level);
  }

  // Levels of a unit behind those before it: its word, and one with its path bits in their places among others.
  inline void levels(uint word, uint with_path, thread half2 *level) thread {
    const uint path = with_path & PLACE;
    const uint z1 = path ^ before1 ^ before3, z0 = before2;
    before3 = before2;
    before2 = before1;
    before1 = path;

    // upper | lower is the index of a field and the ones beside it; masks keep one in each half of a word.
    constexpr uint direct = BITS == 4 ? 2 : 4;
    constexpr uint upper_mask = BITS == 4 ? 0x001E001Eu : BITS == 3 ? 0x000C000Cu : 0x00060006u;
    constexpr uint lower_mask = BITS == 3 ? 0x00030003u : 0x00010001u;
    constexpr float middle = 0.5f * float((2u << BITS) - 1);
    uint upper, upper_down, lower;
    if (BITS == 3) {
      upper = word << 2;
      upper_down = word >> 6;
      lower = (z1 << 1) | z0;
    } else {
      const uint even = (word & ~PLACE) | z1;
      upper = even << 1;
      upper_down = even >> 7;
      lower = z0;
    }
    const uint lower_down = lower >> 8;
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < Layout::FIELDS / 2; ++i) {
      const uint at = Layout::STRIDE * (i % direct);
      const uint halves = ((i < direct ? upper : upper_down) & (upper_mask << at)) |
          ((i < direct ? lower : lower_down) & (lower_mask << at));
      const float2 n = centred(halves, at, middle);
      level[i] = half2(Levels::level(n.x), Levels::level(n.y));
    }
  }

  // The amplitude whose level in subset z = 2 z1 + z0 is nearest to `size`.
  static inline uint nearest(float size, uint z) {
    uint amplitude = 0;
    MLX_ROTOR_UNROLL
    for (uint n = 0; n + 1 < AMPLITUDES; ++n) {
      amplitude += size > Levels::template cut<4>(4 * n + z) ? 1u : 0u;
    }
    return amplitude;
  }

  // Codes of a rotated vector by Viterbi's search, a lane a state, states being (p[t-1], p[t-2], p[t-3]). `v` has the
  // vector, y its elements on the eight lanes, `inverse_rms` is one over their root mean square; `decisions` is
  // SCRATCH bytes. Ties go to p[t-3] = 0 and to the lowest final state. Leaves the levels taken in c. Collective.
  static inline void encode(
      const threadgroup float *v,
      thread float (&y)[DIM / 8],
      float inverse_rms,
      threadgroup uchar *codes,
      threadgroup uint *decisions,
      uint lane,
      thread float (&c)[DIM / 8]) {
    const uint lane8 = lane & 7;
    // This lane's state after a step is (p, p1, p2): it comes from (p1, p2, 0) or (p1, p2, 1), lanes 2 q and 2 q + 1.
    const uint p = lane8 >> 2, p1 = (lane8 >> 1) & 1, p2 = lane8 & 1;
    const ushort from = ushort((lane & ~7u) + 4 * p1 + 2 * p2);
    float cost = lane8 == 0 ? 0.0f : 1e30f;
    uint decided = 0;
    for (uint t = 0; t < DIM; ++t) {
      const float size = v[t] * inverse_rms;
      const uint z = 2 * (p ^ p1) + p2;
      const float miss0 = size - Levels::of(4 * nearest(size, z) + z);
      const float miss1 = size - Levels::of(4 * nearest(size, z ^ 2) + (z ^ 2));
      const float square0 = miss0 * miss0;
      const float square1 = miss1 * miss1;
      const float cost0 = simd_shuffle(cost, from) + square0;
      const float cost1 = simd_shuffle(cost, ushort(from + 1)) + square1;
      decided |= (cost1 < cost0 ? 1u : 0u) << (t % 32);
      cost = cost1 < cost0 ? cost1 : cost0;
      if (t % 32 == 31 || t + 1 == DIM) {
        decisions[lane8 * DECISION_WORDS + t / 32] = decided;
        decided = 0;
      }
    }
    uint best = lane8;
    for (ushort step = 1; step < 8; step *= 2) {
      const float other_cost = simd_shuffle_xor(cost, step);
      const uint other = simd_shuffle_xor(best, step);
      const bool take = other_cost < cost || (other_cost == cost && other < best);
      cost = take ? other_cost : cost;
      best = take ? other : best;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (lane8 == 0) {
      uint state = best;
      for (uint t = DIM; t-- > 0;) {
        const uint bit = (decisions[state * DECISION_WORDS + t / 32] >> (t % 32)) & 1;
        codes[t] = uchar(state >> 2);
        state = (state & 3) * 2 + bit;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    uint code[DIM / 8];
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      const uint t = lane8 + 8 * i;
      const uint bit = codes[t];
      const uint bit1 = t >= 1 ? codes[t - 1] : 0;
      const uint bit2 = t >= 2 ? codes[t - 2] : 0;
      const uint bit3 = t >= 3 ? codes[t - 3] : 0;
      const uint z = 2 * (bit ^ bit1 ^ bit3) + bit2;
      const uint amplitude = nearest(y[i] * inverse_rms, z);
      code[i] = BITS == 3 ? amplitude + 4 * bit : 2 * amplitude + bit;
      c[i] = Levels::of(4 * amplitude + z);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      codes[lane8 + 8 * i] = uchar(code[i]);
    }
  }
};

#endif
