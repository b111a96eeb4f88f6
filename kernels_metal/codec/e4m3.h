// Every coordinate as an 8-bit float of the kind E4M3 without infinities: sign, four bits of exponent, bias 7, three of
// mantissa; subnormals; 448 is the largest, and what is larger becomes it. Zero has one code, 0. Vectors have no scale.

#ifndef MLX_ROTOR_CODEC_E4M3_H
#define MLX_ROTOR_CODEC_E4M3_H

#include "fields.h"

template <uint DIM>
struct E4m3 : Fields<8, DIM> {
  typedef Fields<8, DIM> Layout;
  static constant constexpr const bool SCALED = false;
  static constant constexpr const uint SCRATCH = 0;

  template <typename Tile>
  inline void begin(Tile, uint) thread {}

  template <typename Tile>
  inline void begin_part(Tile, uint, uint) thread {}

  template <typename Tile>
  inline void part_unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    unit(tile, token, u, level);
  }

  // Values of unit u, in pairs (see Fields::position): bytes 0 and 2, then 1 and 3.
  template <typename Tile>
  inline void unit(Tile tile, uint token, uint u, thread half2 *level) thread {
    const uint word = Layout::low(tile, token, u);
    level[0] = value((word & 0x007F007Fu) << 7, (word & 0x00800080u) << 8);
    level[1] = value((word & 0x7F007F00u) >> 1, word & 0x80008000u);
  }

  // Two values from exponents and mantissas at their places in halves, and signs. Eight more in the exponent is the other
  // bias. A subnormal, exponent 0, is then a normal number, too high and half as steep: 2 v - 2^-6 puts it right, and is
  // larger than v for all others. No half on the way is subnormal: a GPU may take one for 0.
  static inline half2 value(uint magnitudes, uint signs) {
    const half2 v = as_type<half2>(magnitudes + 0x20002000u);
    const half2 low = fma(v, half2(2.0h), half2(-0.015625h));
    return as_type<half2>(as_type<uint>(min(v, low)) | signs);
  }

  // The code of the nearest value; ties go to the even code.
  static inline uint nearest(float x) {
    const float size = fabs(x) < 448.0f ? fabs(x) : 448.0f;
    uint code;
    if (size < 0.015625f) {
      // Below the normal values steps are 2^-9, as those of floats at 2^14.
      code = as_type<uint>(size + 16384.0f) - as_type<uint>(16384.0f);
    } else {
      const uint bits = as_type<uint>(size);
      code = ((bits + 0x7FFFFu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    }
    return x < 0 && code > 0 ? code | 0x80u : code;
  }

  // Codes of a vector, y its elements on the eight lanes, for a rotation that has divided it by its scale.
  static inline void encode(
      const threadgroup float *,
      thread float (&y)[DIM / 8],
      float,
      threadgroup uchar *codes,
      threadgroup uint *,
      uint lane,
      thread float (&)[DIM / 8]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      codes[(lane & 7) + 8 * i] = uchar(nearest(y[i]));
    }
  }
};

#endif
