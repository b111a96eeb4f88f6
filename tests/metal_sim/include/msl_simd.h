// Barriers, simdgroup and quadgroup operations; they call the runtime (collectives.h).
#pragma once
#pragma clang system_header
#include "msl_math.h"

struct __msl_slots {  // Slots of runtime/state.h
  uint active;        // lanes that take part in this operation
  uint done;          // a reduction's result has been computed
  uint lane, pad;
  char result[32];
  char v[32][32];
};
enum { MSL_REDUCE = 0, MSL_SHUFFLE = 1, MSL_MMA = 2, MSL_QUAD = 3, MSL_VOTE = 4 };
extern "C" {
__attribute__((convergent)) __msl_slots* __msl_simd(const void* v, uint size, uint kind, uint where);
__attribute__((convergent)) void __msl_tgbar(uint flags, uint where);
__attribute__((convergent)) void __msl_sgbar(uint flags, uint where);
void* __msl_tg(uint id, ulong size, uint align, const constant char* name);
void __msl_atomic(ulong p, void* v, uint size, uint mode);
void __msl_badlane(uint lane);
uint __msl_lane(void);
uint __msl_sgsize(void);
}
#define MSL_TG(id, T, name)       \
  typedef T;                      \
  threadgroup name##__tgt& name = \
      *(threadgroup name##__tgt*)(ulong)__msl_tg(id, sizeof(name##__tgt), alignof(name##__tgt), #name)

MSL_FN ushort __metal_get_thread_index_in_simdgroup(ushort) { return (ushort)__msl_lane(); }
MSL_FN ushort __metal_get_simdgroup_size(ushort) { return 32; }

// where a collective was called: clang may merge calls from two branches, so the return address is not enough
#define MSL_AT uint where = __builtin_LINE() * 1024 + __builtin_COLUMN()
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

template <class T> MSL_FN T at(__msl_slots* s, uint lane) { return *(T*)s->v[lane]; }
template <class T> MSL_FN T from(__msl_slots* s, uint lane) {  // a shuffle's read of another lane
  if (lane > 31 || !(s->active >> lane & 1)) {
    __msl_badlane(lane);
    T p;
    __builtin_memset(&p, 0xff, sizeof p);
    return p;
  }
  return at<T>(s, lane);
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
// tree reduction over the active lanes of [base, base + n)
template <class O, class T> MSL_FN T tree(__msl_slots* s, uint base, uint n) {
  T t[32];
  bool has[32];
  for (uint i = 0; i < n; i++) {
    has[i] = s->active >> (base + i) & 1;
    if (has[i]) t[i] = at<T>(s, base + i);
  }
  for (uint o = n / 2; o; o /= 2)
    for (uint i = 0; i < o; i++)
      if (has[i + o]) {
        t[i] = has[i] ? O::f(t[i], t[i + o]) : t[i + o];
        has[i] = true;
      }
  return t[0];
}
template <class O, class T> MSL_FN T reduce(T x, uint where) {
  __msl_slots* s = __msl_simd(&x, sizeof(T), MSL_REDUCE, where);
  if (!s->done) {
    s->done = 1;
    *(T*)s->result = tree<O, T>(s, 0, 32);
  }
  return *(T*)s->result;
}
template <class O, class T> MSL_FN T scan(T x, bool inclusive, T id, uint where) {
  __msl_slots* s = __msl_simd(&x, sizeof(T), MSL_REDUCE, where);
  T r = id;
  for (uint i = 0; i < s->lane + inclusive; i++)
    if (s->active >> i & 1) r = O::f(r, at<T>(s, i));
  return r;
}
template <class O, class T> MSL_FN T qreduce(T x, uint where) {
  __msl_slots* s = __msl_simd(&x, sizeof(T), MSL_QUAD, where);
  return tree<O, T>(s, s->lane & ~3u, 4);
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
MSL_FN void threadgroup_barrier(mem_flags f, MSL_AT) { __msl_tgbar((uint)f, where); }
MSL_FN void simdgroup_barrier(mem_flags f, MSL_AT) { __msl_sgbar((uint)f, where); }
MSL_FN void threadgroup_barrier(mem_flags f, thread_scope, MSL_AT) { __msl_tgbar((uint)f, where); }

#define MSL_RED(name, op)                                                                                    \
  template <class T> MSL_LANES msl::ok_t<T> simd_##name(T x, MSL_AT) { return msl::reduce<msl::op>(x, where); } \
  template <class T> MSL_LANES msl::ok_t<T> quad_##name(T x, MSL_AT) { return msl::qreduce<msl::op>(x, where); }
MSL_RED(sum, sum)
MSL_RED(product, prod)
MSL_RED(min, mn)
MSL_RED(max, mx)
MSL_RED(and, and_)
MSL_RED(or, or_)
MSL_RED(xor, xor_)
template <class T> MSL_LANES msl::ok_t<T> simd_prefix_inclusive_sum(T x, MSL_AT) {
  return msl::scan<msl::sum>(x, true, (T)0, where);
}
template <class T> MSL_LANES msl::ok_t<T> simd_prefix_exclusive_sum(T x, MSL_AT) {
  return msl::scan<msl::sum>(x, false, (T)0, where);
}
template <class T> MSL_LANES msl::ok_t<T> simd_prefix_inclusive_product(T x, MSL_AT) {
  return msl::scan<msl::prod>(x, true, (T)1, where);
}
template <class T> MSL_LANES msl::ok_t<T> simd_prefix_exclusive_product(T x, MSL_AT) {
  return msl::scan<msl::prod>(x, false, (T)1, where);
}

#define MSL_SHUF(name, args, lane_expr)                             \
  template <class T> MSL_LANES msl::ok_t<T> name args {                \
    __msl_slots* s = __msl_simd(&x, sizeof(T), MSL_SHUFFLE, where); \
    uint l = s->lane;                                               \
    (void)l;                                                        \
    return lane_expr;                                               \
  }
MSL_SHUF(simd_shuffle, (T x, ushort i, MSL_AT), msl::from<T>(s, i))
MSL_SHUF(simd_broadcast, (T x, ushort i, MSL_AT), msl::from<T>(s, i))
MSL_SHUF(simd_broadcast_first, (T x, MSL_AT), msl::from<T>(s, __builtin_ctz(s->active)))
MSL_SHUF(simd_shuffle_xor, (T x, ushort m, MSL_AT), msl::from<T>(s, l ^ m))
MSL_SHUF(simd_shuffle_down, (T x, ushort d, MSL_AT), l + d > 31 ? x : msl::from<T>(s, l + d))
MSL_SHUF(simd_shuffle_up, (T x, ushort d, MSL_AT), l < d ? x : msl::from<T>(s, l - d))
MSL_SHUF(simd_shuffle_rotate_down, (T x, ushort d, MSL_AT), msl::from<T>(s, (l + d) & 31))
MSL_SHUF(simd_shuffle_rotate_up, (T x, ushort d, MSL_AT), msl::from<T>(s, (l - d) & 31))
#define MSL_QSHUF(name, args, lane_expr)                         \
  template <class T> MSL_LANES msl::ok_t<T> name args {             \
    __msl_slots* s = __msl_simd(&x, sizeof(T), MSL_QUAD, where); \
    uint l = s->lane & 3, b = s->lane & ~3u;                     \
    return msl::from<T>(s, b + (lane_expr));                     \
  }
MSL_QSHUF(quad_shuffle, (T x, ushort i, MSL_AT), i & 3)
MSL_QSHUF(quad_broadcast, (T x, ushort i, MSL_AT), i & 3)
MSL_QSHUF(quad_shuffle_xor, (T x, ushort m, MSL_AT), (l ^ m) & 3)
MSL_QSHUF(quad_shuffle_down, (T x, ushort d, MSL_AT), l + d > 3 ? l : l + d)
MSL_QSHUF(quad_shuffle_up, (T x, ushort d, MSL_AT), l < d ? l : l - d)
// fill variants: two exchanges
template <class T> MSL_LANES msl::ok_t<T> simd_shuffle_and_fill_down(T x, T f, ushort d, ushort m = 32, MSL_AT) {
  T a = x;
  __msl_slots* s = __msl_simd(&a, sizeof(T), MSL_SHUFFLE, where);
  uint l = s->lane;
  T own = l % m + d < m ? msl::from<T>(s, l + d) : x;
  __msl_slots* q = __msl_simd(&f, sizeof(T), MSL_SHUFFLE, where);
  return l % m + d < m ? own : msl::from<T>(q, l + d - m);
}
template <class T> MSL_LANES msl::ok_t<T> simd_shuffle_and_fill_up(T x, T f, ushort d, ushort m = 32, MSL_AT) {
  T a = x;
  __msl_slots* s = __msl_simd(&a, sizeof(T), MSL_SHUFFLE, where);
  uint l = s->lane;
  T own = l % m >= d ? msl::from<T>(s, l - d) : x;
  __msl_slots* q = __msl_simd(&f, sizeof(T), MSL_SHUFFLE, where);
  return l % m >= d ? own : msl::from<T>(q, l + m - d);
}

struct simd_vote {
  typedef ulong vote_t;
  vote_t bits;
  explicit constexpr simd_vote(vote_t b) : bits(b) {}
  explicit constexpr operator vote_t() const { return bits; }
  bool all() const { return bits == 0xffffffffu; }
  bool any() const { return bits != 0; }
};
MSL_LANES uint __msl_ballot(bool p, uint where) {
  __msl_slots* s = __msl_simd(&p, 1, MSL_VOTE, where);
  uint r = 0;
  for (uint i = 0; i < 32; i++)
    if (s->active >> i & 1 && *(bool*)s->v[i]) r |= 1u << i;
  return r;
}
MSL_LANES simd_vote simd_ballot(bool p, MSL_AT) { return simd_vote(__msl_ballot(p, where)); }
MSL_LANES simd_vote simd_active_threads_mask(MSL_AT) {
  bool p = true;
  return simd_vote(__msl_ballot(p, where));
}
MSL_LANES bool simd_any(bool p, MSL_AT) { return __msl_ballot(p, where) != 0; }
MSL_LANES bool simd_all(bool p, MSL_AT) {
  bool q = !p;
  return __msl_ballot(q, where) == 0;
}
MSL_LANES bool simd_is_first(MSL_AT) {
  bool p = true;
  __msl_slots* s = __msl_simd(&p, 1, MSL_VOTE, where);
  return s->lane == (uint)__builtin_ctz(s->active);
}

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
