// <metal_stdlib> for clang's "C++ for OpenCL" on a CPU: words, types, traits, vectors. Metal's address spaces map onto
// OpenCL's, which clang checks; on x86 every one of them is the flat one, so that the code runs as it is.
#pragma once
#pragma clang system_header
#pragma clang diagnostic ignored "-Wduplicate-decl-specifier"
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define constant const __constant
#define threadgroup __local
#define thread __private
#undef kernel
#define kernel
// OpenCL keywords that are plain identifiers in MSL
#define local msl_id_local
#define global msl_id_global
#define generic msl_id_generic
#define pipe msl_id_pipe

#ifndef __METAL__
#define __METAL__ 1
#endif
#define __METAL_VERSION__ 320
#define METAL_FUNC inline __attribute__((always_inline))
#define __METAL_FAST_MATH__ 0
#define __METAL_PRECISE_MATH__ 1
#define __METAL_MAYBE_FAST_MATH__ 1
#define MSL_FN inline __attribute__((always_inline))
#ifdef MSL_COUNTED  // mode arithmetic: what is one instruction on a GPU stays a call, told from arithmetic by its name
#define MSL_OP inline __attribute__((noinline))
#define MSL_LANES MSL_OP __attribute__((const))  // exchanges values between lanes, touches no memory of the kernel's
#else
#define MSL_OP MSL_FN
#define MSL_LANES MSL_FN
#endif
#define INFINITY __builtin_inff()
#define HUGE_VALF __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f
#define M_PI_H 3.140625h
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
#define M_SQRT2_F 1.41421356237309504880f
#define FLT_MAX 3.402823466e+38f
#define FLT_MIN 1.175494351e-38f
#define FLT_EPSILON 1.192092896e-07f
#define INT_MAX 2147483647
#define INT_MIN (-2147483647 - 1)
#define UINT_MAX 4294967295u

// ---- types ------------------------------------------------------------------
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef uchar uint8_t;
typedef ushort uint16_t;
typedef uint uint32_t;
typedef ulong uint64_t;
typedef ulong size_t;
typedef long ptrdiff_t;
typedef ulong uintptr_t;
typedef __bf16 bfloat;

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
}
using metal::vec;
#define MSL_VEC_TYPES(T)         \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VEC_TYPES(char)
MSL_VEC_TYPES(uchar)
MSL_VEC_TYPES(short)
MSL_VEC_TYPES(ushort)
MSL_VEC_TYPES(int)
MSL_VEC_TYPES(uint)
MSL_VEC_TYPES(long)
MSL_VEC_TYPES(ulong)
MSL_VEC_TYPES(half)
MSL_VEC_TYPES(bfloat)
MSL_VEC_TYPES(float)
typedef float packed_float2 __attribute__((ext_vector_type(2), aligned(4)));
typedef float packed_float4 __attribute__((ext_vector_type(4), aligned(4)));
typedef half packed_half2 __attribute__((ext_vector_type(2), aligned(2)));
typedef half packed_half4 __attribute__((ext_vector_type(4), aligned(2)));
typedef uchar packed_uchar4 __attribute__((ext_vector_type(4), aligned(1)));
typedef ushort packed_ushort4 __attribute__((ext_vector_type(4), aligned(2)));
typedef uint packed_uint2 __attribute__((ext_vector_type(2), aligned(4)));
typedef uint packed_uint4 __attribute__((ext_vector_type(4), aligned(4)));

// ---- type traits --------------------------------------------------------------
namespace metal {
template <class T, T v> struct integral_constant {
  static constexpr constant T value = v;
  typedef T value_type;
  typedef integral_constant type;
  constexpr operator T() const { return v; }
};
typedef integral_constant<bool, true> true_type;
typedef integral_constant<bool, false> false_type;
template <bool B> using bool_constant = integral_constant<bool, B>;
template <class A, class B> struct is_same : false_type {};
template <class A> struct is_same<A, A> : true_type {};
template <class A, class B> constexpr constant bool is_same_v = __is_same(A, B);
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> {
  typedef T type;
};
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class A, class C> struct conditional {
  typedef A type;
};
template <class A, class C> struct conditional<false, A, C> {
  typedef C type;
};
template <bool B, class A, class C> using conditional_t = typename conditional<B, A, C>::type;
template <class A, class B> struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class A, class B> constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class... B> struct _disjunction : false_type {};
template <class B1, class... Bn>
struct _disjunction<B1, Bn...> : conditional_t<bool(B1::value), true_type, _disjunction<Bn...>> {};
template <class T> struct remove_cv {
  typedef T type;
};
template <class T> struct remove_cv<const T> {
  typedef T type;
};
template <class T> struct remove_cv<volatile T> {
  typedef T type;
};
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> struct remove_reference {
  typedef T type;
};
template <class T> struct remove_reference<T&> {
  typedef T type;
};
template <class T> struct remove_reference<T&&> {
  typedef T type;
};
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> struct remove_addrspace {
  typedef T type;
};
template <class T> struct remove_addrspace<thread T> {
  typedef T type;
};
template <class T> struct remove_addrspace<device T> {
  typedef T type;
};
template <class T> struct remove_addrspace<constant T> {
  typedef T type;
};
template <class T> struct remove_addrspace<threadgroup T> {
  typedef T type;
};
template <class T> using remove_addrspace_t = typename remove_addrspace<T>::type;
template <class T> struct remove_pointer {
  typedef T type;
};
template <class T> struct remove_pointer<T*> {
  typedef T type;
};
template <class T> T&& declval();
template <class T> constexpr constant bool is_integral_v = __is_integral(T);
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T>
constexpr constant bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> constexpr constant bool is_unsigned_v = __is_integral(T) && T(-1) > T(0);
template <class T> constexpr constant bool is_signed_v = __is_integral(T) && T(-1) < T(0);
template <class T> constexpr constant bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> struct is_unsigned : bool_constant<is_unsigned_v<T>> {};
template <class T> constexpr constant bool is_pointer_v = __is_pointer(T);
template <class T> struct make_unsigned {
  typedef __make_unsigned(T) type;
};
template <class T> using make_unsigned_t = __make_unsigned(T);

template <class T> using uniform = T;
template <class T> MSL_FN constexpr T make_uniform(T x) { return x; }
struct os_log {
  template <class A, class B> constexpr os_log(A, B) {}
  template <class A, class B> constexpr os_log(A, B) __constant {}
  template <class... A> void log_debug(const constant char*, A...) const {}
  template <class... A> void log_debug(const constant char*, A...) const constant {}
};
template <class T, size_t N> struct array {
  T __e[N];
  thread T& operator[](size_t i) { return *addrspace_cast<thread T*>(&__e[i]); }
  const thread T& operator[](size_t i) const { return *addrspace_cast<const thread T*>(&__e[i]); }
  threadgroup T& operator[](size_t i) threadgroup { return __e[i]; }
  device T& operator[](size_t i) device { return __e[i]; }
  const constant T& operator[](size_t i) const constant { return __e[i]; }
  static constexpr size_t size() { return N; }
};
}  // namespace metal

// ---- vector construction: float4(a, b.xy, c) -----------------------------------
namespace msl {
using metal::vec;
template <class V> struct vt {
  typedef V elem;
  static constexpr constant int n = 1;
};
template <class T, int N> struct vt<vec<T, N>> {
  typedef T elem;
  static constexpr constant int n = N;
};
template <class V, class A> MSL_FN constexpr void put(thread V& r, thread int& i, A a) {
  typedef typename vt<V>::elem E;
  if constexpr (vt<A>::n == 1)
    r[i++] = (E)a;
  else
    for (int k = 0; k < vt<A>::n; k++) r[i++] = (E)a[k];
}
template <class V, class... A> MSL_FN V make(A... a) {
  typedef typename vt<V>::elem E;
  if constexpr (sizeof...(A) == 0) {
    return (V)(E)0;
  } else if constexpr (sizeof...(A) == 1) {
    V r;
    int i = 0;
    if constexpr (((vt<A>::n == 1) && ...)) {
      E e = ((E)a, ...);
      for (int k = 0; k < vt<V>::n; k++) r[k] = e;
    } else {
      static_assert(((vt<A>::n == vt<V>::n) && ...), "vector sizes differ");
      (put(r, i, a), ...);
    }
    return r;
  } else {
    static_assert((vt<A>::n + ...) == vt<V>::n, "wrong number of components in a vector constructor");
    V r;
    int i = 0;
    (put(r, i, a), ...);
    return r;
  }
}
}  // namespace msl
#include "msl_ctor.h"

template <class D, class S> MSL_FN constexpr D as_type(S s) {
  static_assert(sizeof(D) == sizeof(S), "as_type: sizes differ");
  return __builtin_bit_cast(D, s);
}
