// Limits of the number types.
#pragma once
#pragma clang system_header
#include "msl_core.h"

namespace metal {
template <class T> struct numeric_limits;
#define MSL_ILIM(T, lo, hi, d)                           \
  template <> struct numeric_limits<T> {                 \
    static constexpr T min() { return lo; }              \
    static constexpr T max() { return hi; }              \
    static constexpr T lowest() { return lo; }           \
    static constexpr constant int digits = d;            \
    static constexpr constant bool is_integer = true;    \
    static constexpr constant bool is_signed = (lo) < 0; \
  };
MSL_ILIM(char, -128, 127, 7)
MSL_ILIM(uchar, 0, 255, 8)
MSL_ILIM(short, -32768, 32767, 15)
MSL_ILIM(ushort, 0, 65535, 16)
MSL_ILIM(int, INT_MIN, INT_MAX, 31)
MSL_ILIM(uint, 0, UINT_MAX, 32)
MSL_ILIM(long, -0x7fffffffffffffffL - 1, 0x7fffffffffffffffL, 63)
MSL_ILIM(ulong, 0, ~0ul, 64)
MSL_ILIM(bool, false, true, 1)
#define MSL_FLIM(T, mn, mx, eps)                                     \
  template <> struct numeric_limits<T> {                             \
    static constexpr T min() { return (T)mn; }                       \
    static constexpr T max() { return (T)mx; }                       \
    static constexpr T lowest() { return (T) - mx; }                 \
    static constexpr T epsilon() { return (T)eps; }                  \
    static constexpr T infinity() { return (T)__builtin_inff(); }    \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr constant bool is_integer = false;               \
    static constexpr constant bool is_signed = true;                 \
  };
MSL_FLIM(float, 1.17549435e-38f, 3.40282347e+38f, 1.1920929e-7f)
MSL_FLIM(half, 6.103515625e-5f, 65504.0f, 9.765625e-4f)
MSL_FLIM(bfloat, 1.17549435e-38f, 3.38953139e+38f, 7.8125e-3f)
}  // namespace metal
