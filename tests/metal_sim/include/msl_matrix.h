// Matrices of 8 x 8 spread over a simdgroup.
#pragma once
#pragma clang system_header
#include "msl_atomic.h"

namespace metal {
// Lane l holds elements (r, c) and (r, c + 1), the layout Apple GPUs use (and MLX's steel relies on).
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
MSL_FN uint __msl_mrow(uint l) { return (l >> 4 & 1) * 4 + (l >> 1 & 3); }
MSL_FN uint __msl_mcol(uint l) { return (l >> 3 & 1) * 4 + (l & 1) * 2; }
MSL_FN uint __msl_mlane(uint r, uint c) { return (r >> 2) << 4 | (c >> 2) << 3 | (r & 3) << 1 | (c >> 1 & 1); }
template <class T, int R = 8, int C = 8> MSL_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  return simdgroup_matrix<T, R, C>(v);
}
#define MSL_SGM(AS)                                                                                                   \
  template <class T> MSL_OP vec<T, 2> __msl_mload(const AS T* p, ulong ld, ulong2 o, bool tr, uint where) {           \
    char z = 0;                                                                                                       \
    uint l = __msl_simd(&z, 1, MSL_MMA, where)->lane;                                                                 \
    uint r = __msl_mrow(l), c = __msl_mcol(l);                                                                        \
    vec<T, 2> v;                                                                                                      \
    for (uint e = 0; e < 2; e++) v[e] = tr ? p[(o.y + c + e) * ld + o.x + r] : p[(o.y + r) * ld + o.x + c + e];       \
    return v;                                                                                                         \
  }                                                                                                                   \
  template <class T> MSL_OP void __msl_mstore(vec<T, 2> v, AS T* p, ulong ld, ulong2 o, bool tr, uint where) {        \
    char z = 0;                                                                                                       \
    uint l = __msl_simd(&z, 1, MSL_MMA, where)->lane;                                                                 \
    uint r = __msl_mrow(l), c = __msl_mcol(l);                                                                        \
    for (uint e = 0; e < 2; e++)                                                                                      \
      if (tr)                                                                                                         \
        p[(o.y + c + e) * ld + o.x + r] = v[e];                                                                       \
      else                                                                                                            \
        p[(o.y + r) * ld + o.x + c + e] = v[e];                                                                       \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  MSL_FN void simdgroup_load(thread simdgroup_matrix<T, 8, 8>& d, const AS T* p, ulong ld = 8,                        \
                             ulong2 o = (ulong2)(0ul), bool tr = false, MSL_AT) {                                     \
    d.__e = __msl_mload<T>(p, ld, o, tr, where);                                                                      \
  }                                                                                                                   \
  template <class T>                                                                                                  \
  MSL_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> d, AS T* p, ulong ld = 8, ulong2 o = (ulong2)(0ul),           \
                              bool tr = false, MSL_AT) {                                                              \
    __msl_mstore<T>(d.__e, p, ld, o, tr, where);                                                                      \
  }
MSL_SGM(device)
MSL_SGM(threadgroup)
template <class D, class A, class B, class C>
MSL_LANES vec<D, 2> __msl_mma(vec<A, 2> a, vec<B, 2> b, vec<C, 2> c, uint where) {
  struct {
    vec<A, 2> a;
    vec<B, 2> b;
  } x;
  x.a = a;
  x.b = b;
  __msl_slots* s = __msl_simd(&x, sizeof(x), MSL_MMA, where);
  uint r = __msl_mrow(s->lane), cc = __msl_mcol(s->lane);
  float acc[2] = {(float)c[0], (float)c[1]};
  for (uint k = 0; k < 8; k++) {
    uint la = __msl_mlane(r, k);
    float av = (float)(*(vec<A, 2>*)s->v[la])[k & 1];
    for (uint e = 0; e < 2; e++) {
      uint lb = __msl_mlane(k, cc + e);
      acc[e] = __builtin_fmaf(av, (float)(*(vec<B, 2>*)(s->v[lb] + sizeof(vec<A, 2>)))[(cc + e) & 1], acc[e]);
    }
  }
  vec<D, 2> d;
  d[0] = (D)acc[0];
  d[1] = (D)acc[1];
  return d;
}
template <class D, class A, class B, class C>
MSL_FN void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b, simdgroup_matrix<C, 8, 8> c, MSL_AT) {
  d.__e = __msl_mma<D, A, B, C>(a.__e, b.__e, c.__e, where);
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
