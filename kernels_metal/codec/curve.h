// Levels as an odd polynomial: level(u) = u (a + b u² + c u⁴), rounded to half, for the index u counted from the
// middle of the codebook. No table: a look-up with a different index on every lane costs more than these few
// multiply-adds. mlx_rotor/codec/quantizer.py has the same coefficients, rounds the same way, and says how they are found.

#ifndef MLX_ROTOR_CODEC_CURVE_H
#define MLX_ROTOR_CODEC_CURVE_H

#pragma STDC FP_CONTRACT OFF

// COUNT levels of the trellis (true) or scalar (false) codebooks.
template <uint COUNT, bool TRELLIS>
struct Curve {
  static inline half level(float u) {
    const float square = u * u;  // exact: u is a half-integer below 16
    float slope;
    if (COUNT == 4) {
      slope = fma(square, 0.0509718f, 0.890583f);
    } else if (COUNT == 8 && !TRELLIS) {
      slope = fma(square, 0.0114955f, 0.468304f);
    } else if (COUNT == 16 && !TRELLIS) {
      slope = fma(square, fma(square, 2.9542e-05f, 7.0183e-05f), 0.258427f);
    } else if (COUNT == 8) {
      slope = fma(square, 0.0139539f, 0.356082f);
    } else if (COUNT == 16) {
      slope = fma(square, fma(square, 3.98011e-05f, -2.4621e-04f), 0.213251f);
    } else {
      slope = fma(square, fma(square, 1.773e-06f, -1.21843e-04f), 0.117567f);
    }
    return half(u * slope);
  }

  // The level of index n, 0 the lowest.
  static inline float of(uint n) {
    return float(level(float(n) - 0.5f * float(COUNT - 1)));
  }

  // Where two levels are equally near: between index n and index n + STEP.
  template <uint STEP>
  static inline float cut(uint n) {
    const float both = of(n) + of(n + STEP);
    return 0.5f * both;
  }
};

#endif
