// Barriers, simdgroup and quadgroup operations for clang's NVPTX target: a simdgroup is a warp.
#pragma once
#pragma clang system_header
#include "msl_math.h"

// ptx.py declares the variables that these comments speak of, in the order id, bytes, alignment.
template <uint id, uint size, uint align> MSL_FN ulong __msl_tg() {
  ulong at;
  __asm__("mov.u64 %0, msl_tg_%1; // msl_tg %1 %2 %3" : "=l"(at) : "n"(id), "n"(size), "n"(align));
  return at;
}
#define MSL_TG(id, T, name)       \
  typedef T;                      \
  threadgroup name##__tgt& name = \
      *(threadgroup name##__tgt*)__msl_tg<id, sizeof(name##__tgt), alignof(name##__tgt)>()

// ---- where a thread is --------------------------------------------------------
#define MSL_SREG(name, axis) ((uint)__nvvm_read_ptx_sreg_##name##_##axis())
// Threads along an axis, and of them those that the grid has: Metal cuts what stands out of it off the last groups.
#ifdef MSL_GRID_x
#define MSL_GRID(axis) ((uint)MSL_GRID_##axis)
#define MSL_GROUP(axis) \
  metal::min(MSL_SREG(ntid, axis), MSL_GRID(axis) - MSL_SREG(ctaid, axis) * MSL_SREG(ntid, axis))
#else
#define MSL_GRID(axis) (MSL_SREG(nctaid, axis) * MSL_SREG(ntid, axis))
#define MSL_GROUP(axis) MSL_SREG(ntid, axis)
#endif
MSL_FN uint __msl_index() {
  uint row = MSL_SREG(tid, z) * MSL_SREG(ntid, y) + MSL_SREG(tid, y);
  return row * MSL_SREG(ntid, x) + MSL_SREG(tid, x);
}
MSL_FN uint __msl_threads() { return MSL_GROUP(x) * MSL_GROUP(y) * MSL_GROUP(z); }
MSL_FN uint __msl_lane() { return __nvvm_read_ptx_sreg_laneid(); }
// The lanes of this simdgroup. All of them take part in every operation: kernels keep them out of divergent flow.
MSL_FN uint __msl_lanes() {
#ifdef MSL_PARTIAL
  uint n = __msl_threads() - (__msl_index() & ~31u);
  return n < 32 ? (1u << n) - 1 : ~0u;
#else
  return ~0u;
#endif
}
MSL_FN ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)__msl_lane(); }
MSL_FN ushort __metal_get_simdgroup_size(ushort) { return 32; }

namespace msl {
template <class T> struct simd_ok {
  static constexpr constant bool v = false;
};
#define MSL_OK(T)                            \
  template <> struct simd_ok<T> {            \
    static constexpr constant bool v = true; \
  };
MSL_OK(char)
MSL_OK(uchar)
MSL_OK(short)
MSL_OK(ushort)
MSL_OK(int)
MSL_OK(uint)
MSL_OK(half)
MSL_OK(float)
template <class T, int N> struct simd_ok<vec<T, N>> {
  static constexpr constant bool v = simd_ok<T>::v;
};
template <class T> using ok_t = metal::enable_if_t<simd_ok<T>::v, T>;

// Ways of a 32-bit word between lanes; `a` is a lane, a mask or a distance.
struct index {
  static MSL_FN int f(int w, uint a) { return __nvvm_shfl_sync_idx_i32(__msl_lanes(), w, (int)a, 31); }
};
struct cross {
  static MSL_FN int f(int w, uint a) { return __nvvm_shfl_sync_bfly_i32(__msl_lanes(), w, (int)a, 31); }
};
struct up {
  static MSL_FN int f(int w, uint a) { return __nvvm_shfl_sync_up_i32(__msl_lanes(), w, (int)a, 0); }
};
struct down {
  static MSL_FN int f(int w, uint a) { return __nvvm_shfl_sync_down_i32(__msl_lanes(), w, (int)a, 31); }
};
template <class W, class T> MSL_FN T get(T x, uint a) {
  int words[(sizeof(T) + 3) / 4] = {0};
  __builtin_memcpy(words, &x, sizeof(T));
#pragma unroll
  for (uint i = 0; i < sizeof(words) / 4; i++) words[i] = W::f(words[i], a);
  __builtin_memcpy(&x, words, sizeof(T));
  return x;
}

struct sum {
  template <class T> static MSL_FN T f(T a, T b) { return a + b; }
};
struct prod {
  template <class T> static MSL_FN T f(T a, T b) { return a * b; }
};
struct mn {
  template <class T> static MSL_FN T f(T a, T b) { return metal::min(a, b); }
};
struct mx {
  template <class T> static MSL_FN T f(T a, T b) { return metal::max(a, b); }
};
struct and_ {
  template <class T> static MSL_FN T f(T a, T b) { return a & b; }
};
struct or_ {
  template <class T> static MSL_FN T f(T a, T b) { return a | b; }
};
struct xor_ {
  template <class T> static MSL_FN T f(T a, T b) { return a ^ b; }
};
// Over each aligned run of `n` lanes. Lane 0 of the run adds in the order of a tree; so do the others where all exist.
template <class O, class T> MSL_FN T reduce(T x, uint n) {
#pragma unroll
  for (uint o = n / 2; o; o /= 2) {
    T y = get<cross>(x, o);
    if (__msl_lanes() >> (__msl_lane() ^ o) & 1) x = O::f(x, y);
  }
#ifdef MSL_PARTIAL
  x = get<index>(x, __msl_lane() & ~(n - 1));
#endif
  return x;
}
template <class O, class T> MSL_FN T scan(T x, bool inclusive, T id) {
#pragma unroll
  for (uint o = 1; o < 32; o *= 2) {
    T y = get<up>(x, o);
    if (__msl_lane() >= o) x = O::f(y, x);
  }
  T before = get<up>(x, 1);
  return inclusive ? x : __msl_lane() ? before : id;
}
}  // namespace msl

namespace metal {
enum class mem_flags {
  mem_none = 0,
  mem_device = 1,
  mem_threadgroup = 2,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
MSL_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
enum memory_order { memory_order_relaxed = 0 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
MSL_FN void threadgroup_barrier(mem_flags) { __syncthreads(); }
MSL_FN void threadgroup_barrier(mem_flags, thread_scope) { __syncthreads(); }
MSL_FN void simdgroup_barrier(mem_flags) { __nvvm_bar_warp_sync(__msl_lanes()); }

#define MSL_RED(name, op)                                                                      \
  template <class T> MSL_FN msl::ok_t<T> simd_##name(T x) { return msl::reduce<msl::op>(x, 32); } \
  template <class T> MSL_FN msl::ok_t<T> quad_##name(T x) { return msl::reduce<msl::op>(x, 4); }
MSL_RED(sum, sum)
MSL_RED(product, prod)
MSL_RED(min, mn)
MSL_RED(max, mx)
MSL_RED(and, and_)
MSL_RED(or, or_)
MSL_RED(xor, xor_)
template <class T> MSL_FN msl::ok_t<T> simd_prefix_inclusive_sum(T x) { return msl::scan<msl::sum>(x, true, (T)0); }
template <class T> MSL_FN msl::ok_t<T> simd_prefix_exclusive_sum(T x) { return msl::scan<msl::sum>(x, false, (T)0); }
template <class T> MSL_FN msl::ok_t<T> simd_prefix_inclusive_product(T x) {
  return msl::scan<msl::prod>(x, true, (T)1);
}
template <class T> MSL_FN msl::ok_t<T> simd_prefix_exclusive_product(T x) {
  return msl::scan<msl::prod>(x, false, (T)1);
}

#define MSL_SHUF(name, way, a) \
  template <class T> MSL_FN msl::ok_t<T> name(T x, ushort n) { return msl::get<msl::way>(x, a); }
MSL_SHUF(simd_shuffle, index, n)
MSL_SHUF(simd_broadcast, index, n)
MSL_SHUF(simd_shuffle_xor, cross, n)
MSL_SHUF(simd_shuffle_up, up, n)
MSL_SHUF(simd_shuffle_down, down, n)
MSL_SHUF(simd_shuffle_rotate_up, index, (__msl_lane() - n) & 31)
MSL_SHUF(simd_shuffle_rotate_down, index, (__msl_lane() + n) & 31)
MSL_SHUF(quad_shuffle, index, (__msl_lane() & ~3u) + (n & 3))
MSL_SHUF(quad_broadcast, index, (__msl_lane() & ~3u) + (n & 3))
MSL_SHUF(quad_shuffle_xor, cross, n & 3)
MSL_SHUF(quad_shuffle_up, index, __msl_lane() - ((__msl_lane() & 3) < n ? 0 : n))
MSL_SHUF(quad_shuffle_down, index, __msl_lane() + ((__msl_lane() & 3) + n > 3 ? 0 : n))
template <class T> MSL_FN msl::ok_t<T> simd_broadcast_first(T x) { return msl::get<msl::index>(x, 0); }
template <class T> MSL_FN msl::ok_t<T> simd_shuffle_and_fill_down(T x, T fill, ushort d, ushort m = 32) {
  T inside = msl::get<msl::index>(x, (__msl_lane() + d) & 31);
  T outside = msl::get<msl::index>(fill, (__msl_lane() + d - m) & 31);
  return __msl_lane() % m + d < m ? inside : outside;
}
template <class T> MSL_FN msl::ok_t<T> simd_shuffle_and_fill_up(T x, T fill, ushort d, ushort m = 32) {
  T inside = msl::get<msl::index>(x, (__msl_lane() - d) & 31);
  T outside = msl::get<msl::index>(fill, (__msl_lane() + m - d) & 31);
  return __msl_lane() % m >= d ? inside : outside;
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit constexpr simd_vote(vote_t b) : bits(b) {}
  explicit constexpr operator vote_t() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};
MSL_FN uint __msl_ballot(bool p) { return (uint)__nvvm_vote_ballot_sync(__msl_lanes(), p); }
MSL_FN simd_vote simd_ballot(bool p) { return simd_vote(__msl_ballot(p)); }
MSL_FN simd_vote simd_active_threads_mask() { return simd_vote(__msl_lanes()); }
MSL_FN bool simd_any(bool p) { return __msl_ballot(p) != 0; }
MSL_FN bool simd_all(bool p) { return __msl_ballot(!p) == 0; }
MSL_FN bool simd_is_first() { return __msl_lane() == 0; }
}  // namespace metal

// what bf16_math.h names
MSL_FN int __metal_simd_xor(int x) { return metal::simd_xor(x); }
#define MSL_BI(n) \
  template <class T, class... A> MSL_FN T __metal_simd_##n(T x, A... a) { return metal::simd_##n(x, a...); }
MSL_BI(sum)
MSL_BI(product)
MSL_BI(min)
MSL_BI(max)
MSL_BI(prefix_inclusive_sum)
MSL_BI(prefix_exclusive_sum)
MSL_BI(prefix_inclusive_product)
MSL_BI(prefix_exclusive_product)
MSL_BI(broadcast)
MSL_BI(shuffle)
MSL_BI(shuffle_up)
MSL_BI(shuffle_down)
MSL_BI(shuffle_xor)
MSL_BI(shuffle_rotate_up)
MSL_BI(shuffle_rotate_down)
MSL_BI(shuffle_and_fill_up)
MSL_BI(shuffle_and_fill_down)
