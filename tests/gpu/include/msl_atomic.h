// Atomics as the GPU's own, relaxed, seen by the whole device or by the threadgroup whose memory it is.
#pragma once
#pragma clang system_header
#include "msl_simd.h"

namespace metal {
template <class T> struct atomic {
  static_assert(is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, ulong> || is_same_v<T, float>,
                "atomic<T> is here for int, uint, ulong and float");
  T __v;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<ulong> atomic_ulong;
typedef atomic<float> atomic_float;
#define MSL_RELAXED(scope) __ATOMIC_RELAXED, __MEMORY_SCOPE_##scope
#define MSL_AT_OP(AS, scope, name)                                                                                   \
  template <class T, class U> MSL_FN T atomic_fetch_##name##_explicit(volatile AS atomic<T>* p, U v, memory_order) { \
    return __scoped_atomic_fetch_##name(&p->__v, (T)v, MSL_RELAXED(scope));                                          \
  }
#define MSL_ATOMICS(AS, scope)                                                                                     \
  template <class T> MSL_FN T atomic_load_explicit(const volatile AS atomic<T>* p, memory_order) {                 \
    static_assert(sizeof(T) == 4, "MSL's atomic_ulong has only atomic_max/min_explicit");                          \
    return as_type<T>(__scoped_atomic_load_n((const volatile AS uint*)&p->__v, MSL_RELAXED(scope)));               \
  }                                                                                                                \
  template <class T, class U> MSL_FN void atomic_store_explicit(volatile AS atomic<T>* p, U v, memory_order) {     \
    static_assert(sizeof(T) == 4, "MSL's atomic_ulong has only atomic_max/min_explicit");                          \
    __scoped_atomic_store_n((volatile AS uint*)&p->__v, as_type<uint>((T)v), MSL_RELAXED(scope));                  \
  }                                                                                                                \
  template <class T, class U> MSL_FN T atomic_exchange_explicit(volatile AS atomic<T>* p, U v, memory_order) {     \
    return as_type<T>(                                                                                             \
        __scoped_atomic_exchange_n((volatile AS uint*)&p->__v, as_type<uint>((T)v), MSL_RELAXED(scope)));          \
  }                                                                                                                \
  template <class T>                                                                                               \
  MSL_FN bool atomic_compare_exchange_weak_explicit(volatile AS atomic<T>* p, thread T* expected, T desired,       \
                                                    memory_order, memory_order) {                                  \
    uint seen = as_type<uint>(*expected);                                                                          \
    bool done = __scoped_atomic_compare_exchange_n((volatile AS uint*)&p->__v, &seen, as_type<uint>(desired), true, \
                                                   __ATOMIC_RELAXED, MSL_RELAXED(scope));                          \
    *expected = as_type<T>(seen);                                                                                  \
    return done;                                                                                                   \
  }                                                                                                                \
  MSL_AT_OP(AS, scope, add)                                                                                        \
  MSL_AT_OP(AS, scope, sub)                                                                                        \
  MSL_AT_OP(AS, scope, max)                                                                                        \
  MSL_AT_OP(AS, scope, min)                                                                                        \
  MSL_AT_OP(AS, scope, and)                                                                                        \
  MSL_AT_OP(AS, scope, or)                                                                                         \
  MSL_AT_OP(AS, scope, xor)
MSL_ATOMICS(device, DEVICE)
MSL_ATOMICS(threadgroup, WRKGRP)
}  // namespace metal
