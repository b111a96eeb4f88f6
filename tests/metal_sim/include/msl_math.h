// Mathematical functions, for float, half and vectors of them, and for integers.
#pragma once
#pragma clang system_header
#include "msl_limits.h"

#define MSL_LIBM __attribute__((const)) float  // no errno on a GPU
extern "C" {
MSL_LIBM expf(float);
MSL_LIBM exp2f(float);
MSL_LIBM exp10f(float);
MSL_LIBM logf(float);
MSL_LIBM log2f(float);
MSL_LIBM log10f(float);
MSL_LIBM sinf(float);
MSL_LIBM cosf(float);
MSL_LIBM tanf(float);
MSL_LIBM asinf(float);
MSL_LIBM acosf(float);
MSL_LIBM atanf(float);
MSL_LIBM sinhf(float);
MSL_LIBM coshf(float);
MSL_LIBM tanhf(float);
MSL_LIBM asinhf(float);
MSL_LIBM acoshf(float);
MSL_LIBM atanhf(float);
MSL_LIBM powf(float, float);
MSL_LIBM fmodf(float, float);
MSL_LIBM atan2f(float, float);
MSL_LIBM nextafterf(float, float);
MSL_LIBM ldexpf(float, int);
float frexpf(float, int*);
}
// The __metal_* builtins that MLX's bf16_math.h names (last argument: math mode).
#define MSL_B1(name, e) \
  MSL_FN float __metal_##name(float x, int = 0) { return e; }
MSL_B1(fabs, __builtin_fabsf(x))
MSL_B1(exp, expf(x))
MSL_B1(exp2, exp2f(x))
MSL_B1(exp10, exp10f(x))
MSL_B1(log, logf(x))
MSL_B1(log2, log2f(x))
MSL_B1(log10, log10f(x))
MSL_B1(sqrt, __builtin_sqrtf(x))
MSL_B1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_B1(sin, sinf(x))
MSL_B1(cos, cosf(x))
MSL_B1(tan, tanf(x))
MSL_B1(asin, asinf(x))
MSL_B1(acos, acosf(x))
MSL_B1(atan, atanf(x))
MSL_B1(sinh, sinhf(x))
MSL_B1(cosh, coshf(x))
MSL_B1(tanh, tanhf(x))
MSL_B1(asinh, asinhf(x))
MSL_B1(acosh, acoshf(x))
MSL_B1(atanh, atanhf(x))
MSL_B1(sinpi, sinf(x* M_PI_F))
MSL_B1(cospi, cosf(x* M_PI_F))
MSL_B1(tanpi, tanf(x* M_PI_F))
MSL_B1(floor, __builtin_floorf(x))
MSL_B1(ceil, __builtin_ceilf(x))
MSL_B1(trunc, __builtin_truncf(x))
MSL_B1(round, __builtin_roundf(x))
MSL_B1(rint, __builtin_rintf(x))
MSL_B1(fract, __builtin_fminf(x - __builtin_floorf(x), 0x1.fffffep-1f))
#define MSL_B2(name, e) \
  MSL_FN float __metal_##name(float x, float y, int = 0) { return e; }
MSL_B2(pow, powf(x, y))
MSL_B2(powr, powf(x, y))
MSL_B2(fmod, fmodf(x, y))
MSL_B2(atan2, atan2f(x, y))
MSL_B2(fmin, __builtin_fminf(x, y))
MSL_B2(fmax, __builtin_fmaxf(x, y))
MSL_B2(divide, x / y)
MSL_B2(nextafter, nextafterf(x, y))
MSL_B2(copysign, __builtin_copysignf(x, y))
MSL_B2(fdim, x > y ? x - y : 0.0f)
MSL_B2(step, y < x ? 0.0f : 1.0f)
#define MSL_B3(name, e) \
  MSL_FN float __metal_##name(float x, float y, float z, int = 0) { return e; }
MSL_B3(fma, __builtin_fmaf(x, y, z))
MSL_B3(fmin3, __builtin_fminf(x, __builtin_fminf(y, z)))
MSL_B3(fmax3, __builtin_fmaxf(x, __builtin_fmaxf(y, z)))
MSL_B3(fmedian3, __builtin_fmaxf(__builtin_fminf(x, y), __builtin_fminf(__builtin_fmaxf(x, y), z)))
MSL_B3(mix, x + (y - x) * z)
MSL_FN float __metal_ldexp(float x, int k, int = 0) { return ldexpf(x, k); }
MSL_FN float __metal_frexp(float x, thread int* k, int = 0) { return frexpf(x, k); }

namespace metal {
#define MSL_V1(f, T)                                 \
  template <int N> MSL_FN vec<T, N> f(vec<T, N> x) { \
    vec<T, N> r;                                     \
    for (int i = 0; i < N; i++) r[i] = f((T)x[i]);   \
    return r;                                        \
  }
#define MSL_V2(f, T)                                              \
  template <int N> MSL_FN vec<T, N> f(vec<T, N> x, vec<T, N> y) { \
    vec<T, N> r;                                                  \
    for (int i = 0; i < N; i++) r[i] = f((T)x[i], (T)y[i]);       \
    return r;                                                     \
  }                                                               \
  template <int N> MSL_FN vec<T, N> f(vec<T, N> x, T y) {         \
    vec<T, N> r;                                                  \
    for (int i = 0; i < N; i++) r[i] = f((T)x[i], y);             \
    return r;                                                     \
  }
#define MSL_V3(f, T)                                                           \
  template <int N> MSL_FN vec<T, N> f(vec<T, N> x, vec<T, N> y, vec<T, N> z) { \
    vec<T, N> r;                                                               \
    for (int i = 0; i < N; i++) r[i] = f((T)x[i], (T)y[i], (T)z[i]);           \
    return r;                                                                  \
  }
#define MSL_F1(f, b)                                            \
  MSL_FN float f(float x) { return __metal_##b(x); }            \
  MSL_FN half f(half x) { return (half)__metal_##b((float)x); } \
  MSL_V1(f, float)                                              \
  MSL_V1(f, half)
#define MSL_F2(f, b)                                                              \
  MSL_FN float f(float x, float y) { return __metal_##b(x, y); }                  \
  MSL_FN half f(half x, half y) { return (half)__metal_##b((float)x, (float)y); } \
  MSL_V2(f, float)                                                                \
  MSL_V2(f, half)
#define MSL_F3(f, b)                                                                                \
  MSL_FN float f(float x, float y, float z) { return __metal_##b(x, y, z); }                        \
  MSL_FN half f(half x, half y, half z) { return (half)__metal_##b((float)x, (float)y, (float)z); } \
  MSL_V3(f, float)                                                                                  \
  MSL_V3(f, half)
#define MSL_MATH                                                                                                       \
  MSL_F1(abs, fabs)                                                                                                    \
  MSL_F1(fabs, fabs)                                                                                                   \
  MSL_F1(exp, exp)                                                                                                     \
  MSL_F1(exp2, exp2)                                                                                                   \
  MSL_F1(exp10, exp10)                                                                                                 \
  MSL_F1(log, log)                                                                                                     \
  MSL_F1(log2, log2)                                                                                                   \
  MSL_F1(log10, log10)                                                                                                 \
  MSL_F1(sqrt, sqrt)                                                                                                   \
  MSL_F1(rsqrt, rsqrt)                                                                                                 \
  MSL_F1(sin, sin)                                                                                                     \
  MSL_F1(cos, cos)                                                                                                     \
  MSL_F1(tan, tan)                                                                                                     \
  MSL_F1(asin, asin)                                                                                                   \
  MSL_F1(acos, acos)                                                                                                   \
  MSL_F1(atan, atan)                                                                                                   \
  MSL_F1(sinh, sinh)                                                                                                   \
  MSL_F1(cosh, cosh)                                                                                                   \
  MSL_F1(tanh, tanh)                                                                                                   \
  MSL_F1(asinh, asinh)                                                                                                 \
  MSL_F1(acosh, acosh)                                                                                                 \
  MSL_F1(atanh, atanh)                                                                                                 \
  MSL_F1(sinpi, sinpi)                                                                                                 \
  MSL_F1(cospi, cospi)                                                                                                 \
  MSL_F1(tanpi, tanpi)                                                                                                 \
  MSL_F1(floor, floor)                                                                                                 \
  MSL_F1(ceil, ceil)                                                                                                   \
  MSL_F1(trunc, trunc)                                                                                                 \
  MSL_F1(round, round)                                                                                                 \
  MSL_F1(rint, rint)                                                                                                   \
  MSL_F1(fract, fract)                                                                                                 \
  MSL_F2(pow, pow)                                                                                                     \
  MSL_F2(powr, powr)                                                                                                   \
  MSL_F2(fmod, fmod)                                                                                                   \
  MSL_F2(atan2, atan2)                                                                                                 \
  MSL_F2(fmin, fmin)                                                                                                   \
  MSL_F2(fmax, fmax)                                                                                                   \
  MSL_F2(min, fmin)                                                                                                    \
  MSL_F2(max, fmax)                                                                                                    \
  MSL_F2(divide, divide)                                                                                               \
  MSL_F2(nextafter, nextafter)                                                                                         \
  MSL_F2(copysign, copysign)                                                                                           \
  MSL_F2(fdim, fdim)                                                                                                   \
  MSL_F2(step, step)                                                                                                   \
  MSL_F3(fma, fma)                                                                                                     \
  MSL_F3(fmin3, fmin3)                                                                                                 \
  MSL_F3(fmax3, fmax3)                                                                                                 \
  MSL_F3(min3, fmin3)                                                                                                  \
  MSL_F3(max3, fmax3)                                                                                                  \
  MSL_F3(fmedian3, fmedian3)                                                                                           \
  MSL_F3(mix, mix)                                                                                                     \
  MSL_FN float ldexp(float x, int k) { return __metal_ldexp(x, k); }                                                   \
  MSL_FN half ldexp(half x, int k) { return (half)__metal_ldexp((float)x, k); }                                        \
  MSL_FN float clamp(float x, float a, float b) { return __metal_fmin(__metal_fmax(x, a), b); }                        \
  MSL_FN half clamp(half x, half a, half b) { return (half)__metal_fmin(__metal_fmax((float)x, (float)a), (float)b); } \
  MSL_V3(clamp, float)                                                                                                 \
  MSL_V3(clamp, half)                                                                                                  \
  MSL_FN float saturate(float x) { return clamp(x, 0.0f, 1.0f); }                                                      \
  MSL_FN float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x; }                                              \
  MSL_V1(sign, float)
MSL_MATH
namespace fast {
MSL_MATH
}
namespace precise {
MSL_MATH
}
#define MSL_PRED(f, e)                 \
  MSL_FN bool f(float x) { return e; } \
  MSL_FN bool f(half h) {              \
    float x = (float)h;                \
    return e;                          \
  }                                    \
  MSL_FN bool f(bfloat h) {            \
    float x = (float)h;                \
    return e;                          \
  }
MSL_PRED(isnan, __builtin_isnan(x))
MSL_PRED(isinf, __builtin_isinf(x))
MSL_PRED(isfinite, __builtin_isfinite(x))
MSL_PRED(signbit, __builtin_signbit(x))

#define MSL_INT(T, bits)                                                                      \
  MSL_FN T max(T a, T b) { return a > b ? a : b; }                                            \
  MSL_V2(max, T)                                                                              \
  MSL_FN T min(T a, T b) { return a < b ? a : b; }                                            \
  MSL_V2(min, T)                                                                              \
  MSL_FN T clamp(T x, T a, T b) { return x < a ? a : x > b ? b : x; }                         \
  MSL_V3(clamp, T)                                                                            \
  MSL_FN T abs(T x) { return x < 0 ? (T) - x : x; }                                           \
  MSL_V1(abs, T)                                                                              \
  MSL_FN T popcount(T x) { return (T)__builtin_popcountl((ulong)x & (~0ul >> (64 - bits))); } \
  MSL_V1(popcount, T)                                                                         \
  MSL_FN T clz(T x) {                                                                         \
    ulong u = (ulong)x & (~0ul >> (64 - bits));                                               \
    return u ? (T)(__builtin_clzl(u) - (64 - bits)) : (T)bits;                                \
  }                                                                                           \
  MSL_V1(clz, T)                                                                              \
  MSL_FN T ctz(T x) {                                                                         \
    ulong u = (ulong)x & (~0ul >> (64 - bits));                                               \
    return u ? (T)__builtin_ctzl(u) : (T)bits;                                                \
  }                                                                                           \
  MSL_V1(ctz, T)                                                                              \
  MSL_FN T extract_bits(T x, uint o, uint n) {                                                \
    if (n == 0) return 0;                                                                     \
    return (T)((T)((ulong)x << (64 - n - o) >> (64 - bits)) >> (bits - n));                   \
  }                                                                                           \
  MSL_FN T insert_bits(T b, T i, uint o, uint n) {                                            \
    ulong m = (n >= 64 ? ~0ul : (1ul << n) - 1) << o;                                         \
    return (T)(((ulong)b & ~m) | (((ulong)i << o) & m));                                      \
  }                                                                                           \
  MSL_FN T rotate(T x, T k) {                                                                 \
    uint s = (uint)k & (bits - 1);                                                            \
    ulong u = (ulong)x & (~0ul >> (64 - bits));                                               \
    return s ? (T)((u << s) | (u >> (bits - s))) : x;                                         \
  }                                                                                           \
  MSL_FN T reverse_bits(T x) { return (T)(__builtin_bitreverse64((ulong)x) >> (64 - bits)); } \
  MSL_FN T madd(T a, T b, T c) { return a * b + c; }
MSL_INT(char, 8)
MSL_INT(uchar, 8)
MSL_INT(short, 16)
MSL_INT(ushort, 16)
MSL_INT(int, 32)
MSL_INT(uint, 32)
MSL_INT(long, 64)
MSL_INT(ulong, 64)
MSL_FN int mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
MSL_FN uint mul24(uint a, uint b) { return (a & 0xffffff) * (b & 0xffffff); }
MSL_FN int mad24(int a, int b, int c) { return mul24(a, b) + c; }
MSL_FN uint mad24(uint a, uint b, uint c) { return mul24(a, b) + c; }
MSL_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
MSL_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
MSL_FN ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }

template <int N> MSL_FN float dot(vec<float, N> a, vec<float, N> b) {
  float r = 0;
  for (int i = 0; i < N; i++) r += a[i] * b[i];
  return r;
}
template <int N> MSL_FN half dot(vec<half, N> a, vec<half, N> b) {
  half r = 0;
  for (int i = 0; i < N; i++) r += a[i] * b[i];
  return r;
}
template <int N> MSL_FN float length(vec<float, N> a) { return __builtin_sqrtf(dot(a, a)); }
MSL_FN float select(float a, float b, bool c) { return c ? b : a; }
MSL_FN half select(half a, half b, bool c) { return c ? b : a; }
MSL_FN int select(int a, int b, bool c) { return c ? b : a; }
MSL_FN uint select(uint a, uint b, bool c) { return c ? b : a; }
template <class T, class C, int N> MSL_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<C, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class C, int N> MSL_FN bool any(vec<C, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r |= c[i] != 0;
  return r;
}
template <class C, int N> MSL_FN bool all(vec<C, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r &= c[i] != 0;
  return r;
}

// pack/unpack
MSL_FN float4 unpack_unorm4x8_to_float(uint x) {
  return float4{(x & 255) / 255.f, (x >> 8 & 255) / 255.f, (x >> 16 & 255) / 255.f, (x >> 24) / 255.f};
}
MSL_FN float4 unpack_snorm4x8_to_float(uint x) {
  float4 r;
  for (int i = 0; i < 4; i++) r[i] = max((float)(char)(x >> 8 * i) / 127.f, -1.f);
  return r;
}
MSL_FN uint pack_float_to_unorm4x8(float4 v) {
  uint r = 0;
  for (int i = 0; i < 4; i++) r |= (uint)rint(clamp((float)v[i], 0.f, 1.f) * 255.f) << 8 * i;
  return r;
}
MSL_FN half4 unpack_unorm4x8_to_half(uint x) { return __builtin_convertvector(unpack_unorm4x8_to_float(x), half4); }
}  // namespace metal
