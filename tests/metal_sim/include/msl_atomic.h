// Atomics; the access itself happens in the runtime, which knows that it is atomic.
#pragma once
#pragma clang system_header
#include "msl_simd.h"

namespace metal {
template <class T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, bool> || is_same_v<T, ulong> ||
                    is_same_v<T, float>,
                "MSL has atomic<T> for int, uint, bool, ulong and float only");
  T __v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<bool> atomic_bool;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
template <class T> MSL_OP T __msl_ld(ulong p) {
  T v;
  __msl_atomic(p, &v, sizeof(T), 0);
  return v;
}
template <class T> MSL_OP void __msl_st(ulong p, T v, uint rmw) {
  static_assert(!is_same_v<T, ulong>, "MSL's atomic_ulong has only atomic_max/min_explicit");
  __msl_atomic(p, &v, sizeof(T), 1 + rmw);
}
#define MSL_AT_AS(AS)                                                                                          \
  template <class T> MSL_FN T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order) {             \
    return __msl_ld<T>((ulong)p);                                                                              \
  }                                                                                                            \
  template <class T, class U> MSL_FN void atomic_store_explicit(volatile AS atomic<T>* p, U v, memory_order) { \
    __msl_st<T>((ulong)p, (T)v, 0);                                                                            \
  }                                                                                                            \
  template <class T, class U> MSL_FN T atomic_exchange_explicit(volatile AS atomic<T>* p, U v, memory_order) { \
    T o = __msl_ld<T>((ulong)p);                                                                               \
    __msl_st<T>((ulong)p, (T)v, 1);                                                                            \
    return o;                                                                                                  \
  }                                                                                                            \
  template <class T>                                                                                           \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, thread T* e, T d, memory_order,  \
                                                    memory_order) {                                            \
    T o = __msl_ld<T>((ulong)p);                                                                               \
    if (__builtin_memcmp(&o, e, sizeof(T)) == 0) {                                                             \
      __msl_st<T>((ulong)p, d, 1);                                                                             \
      return true;                                                                                             \
    }                                                                                                          \
    *e = o;                                                                                                    \
    return false;                                                                                              \
  }
#define MSL_AT_OP(AS, name, expr)                                                                                    \
  template <class T, class U> MSL_FN T atomic_fetch_##name##_explicit(volatile AS atomic<T>* p, U u, memory_order) { \
    T o = __msl_ld<T>((ulong)p), v = (T)u;                                                                           \
    __msl_st<T>((ulong)p, (T)(expr), 1);                                                                             \
    return o;                                                                                                        \
  }
#define MSL_AT_OPS(AS)              \
  MSL_AT_AS(AS)                     \
  MSL_AT_OP(AS, add, o + v)         \
  MSL_AT_OP(AS, sub, o - v)         \
  MSL_AT_OP(AS, max, o > v ? o : v) \
  MSL_AT_OP(AS, min, o < v ? o : v) \
  MSL_AT_OP(AS, and, o& v)          \
  MSL_AT_OP(AS, or, o | v)          \
  MSL_AT_OP(AS, xor, o ^ v)
MSL_AT_OPS(device)
MSL_AT_OPS(threadgroup)

}  // namespace metal
