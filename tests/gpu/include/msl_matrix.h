// Matrices of 8 x 8 spread over a simdgroup; products go through shuffles: right, not fast.
#pragma once
#pragma clang system_header
#include "msl_atomic.h"

namespace metal {
// Lane l holds elements (r, c) and (r, c + 1) in the layout of Apple's GPUs, which MLX's steel relies on.
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8x8");
  static_assert(is_floating_point_v<T>, "simdgroup_matrix element: half, bfloat or float");
  typedef vec<T, 2> storage_type;
  storage_type __e;
  simdgroup_matrix() {}
  explicit simdgroup_matrix(T v) { __e = (storage_type)v; }
  thread storage_type& thread_elements() { return *addrspace_cast<thread storage_type*>(&__e); }
  const thread storage_type& thread_elements() const { return *addrspace_cast<const thread storage_type*>(&__e); }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;
MSL_FN uint __msl_mrow() { return (__msl_lane() >> 4) * 4 + (__msl_lane() >> 1 & 3); }
MSL_FN uint __msl_mcol() { return (__msl_lane() >> 3 & 1) * 4 + (__msl_lane() & 1) * 2; }
MSL_FN uint __msl_mlane(uint r, uint c) { return (r >> 2) << 4 | (c >> 2) << 3 | (r & 3) << 1 | (c >> 1 & 1); }
template <class T, int R = 8, int C = 8> MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, R, C>(v);
}
// Index of this lane's element `e` in memory.
MSL_FN ulong __msl_mplace(uint e, ulong stride, ulong2 origin, bool transposed) {
  ulong r = __msl_mrow(), c = __msl_mcol() + e;
  return transposed ? (origin.y + c) * stride + origin.x + r : (origin.y + r) * stride + origin.x + c;
}
#define MSL_SGM(AS)                                                                                                \
  template <class T>                                                                                               \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const AS T* p, ulong ld = 8,                     \
                             ulong2 o = (ulong2)(0ul), bool tr = false) {                                          \
    d.__e = vec<T, 2>{p[__msl_mplace(0, ld, o, tr)], p[__msl_mplace(1, ld, o, tr)]};                               \
  }                                                                                                                \
  template <class T>                                                                                               \
  MSL_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> d, AS T* p, ulong ld = 8, ulong2 o = (ulong2)(0ul),        \
                              bool tr = false) {                                                                   \
    p[__msl_mplace(0, ld, o, tr)] = d.__e[0];                                                                      \
    p[__msl_mplace(1, ld, o, tr)] = d.__e[1];                                                                      \
  }
MSL_SGM(device)
MSL_SGM(threadgroup)
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c) {
  uint row = __msl_mrow(), column = __msl_mcol();
  float sum[2] = {(float)c.__e[0], (float)c.__e[1]};
#pragma unroll
  for (uint k = 0; k < 8; k += 2) {
    vec<A, 2> left = msl::get<msl::index>(a.__e, __msl_mlane(row, k));
#pragma unroll
    for (uint i = 0; i < 2; i++) {
      vec<B, 2> right = msl::get<msl::index>(b.__e, __msl_mlane(k + i, column));
      for (uint e = 0; e < 2; e++) sum[e] = __builtin_fmaf((float)left[i], (float)right[e], sum[e]);
    }
  }
  d.__e = vec<D, 2>{(D)sum[0], (D)sum[1]};
}
template <class D, class A, class B>
MSL_FN void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                               simdgroup_matrix<B, 8, 8> b) {
  simdgroup_multiply_accumulate(d, a, b, simdgroup_matrix<D, 8, 8>((D)0));
}
template <class T>
MSL_FN simdgroup_matrix<T, 8, 8> operator*(simdgroup_matrix<T, 8, 8> a, simdgroup_matrix<T, 8, 8> b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
