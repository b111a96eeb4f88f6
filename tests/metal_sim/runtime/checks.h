// Every load and store: bounds, alignment, races, values never written. The functions that clang's instrumentation
// calls (-fsanitize=kernel-address, undefined behaviour) are defined here instead of in a sanitizer's runtime.
#pragma once
#include "traffic.h"

// One access to the element of cell c, in epoch ep: a race if another thread's is not ordered with it by a barrier and
// one of the two writes. Then c remembers it.
static void race(Cell& c, bool wr, bool atomic, u64 ep, bool dev, u32 buf, u64 off, u32 size, u64 pc, u32 pi,
                 const char* name = "") {
  u32 me = cur->gid + 1;
  auto concurrent = [&](u32 who, u64 e) {
    if (!who || who == me) return false;
    if (dev && (who - 1) / MAXT != (me - 1) / MAXT) return true;  // other threadgroup: never ordered
    if ((e >> 32) != (ep >> 32)) return false;                    // a threadgroup barrier between
    if (((who - 1) % MAXT) / 32 == ((me - 1) % MAXT) / 32 && (u32)e != (u32)ep)
      return false;  // a simdgroup barrier between
    return true;
  };
  u32 other = 0, opc = 0;
  if (!(atomic && c.atomic) && concurrent(c.w, c.we)) other = c.w, opc = c.wpc;
  if (wr && !other && !(atomic && c.ratomic)) {
    if (concurrent(c.r, c.re))
      other = c.r, opc = c.rpc;
    else if (concurrent(c.r2, c.re2))
      other = c.r2, opc = c.rpc;
  }
  if (other) {
    Finding* e = report(dev ? E_RACE_DEV : E_RACE_TG, pc);
    if (e) {
      e->write = wr;
      e->off = (long)off;
      e->buf = buf;
      e->size = size;
      e->th2 = (other - 1) % MAXT;
      e->pc2 = opc ? accesses[opc - 1].pc : 0;
      if (!dev) snprintf(e->text, sizeof e->text, "%s", name);
    }
  }
  if (wr) {
    c.w = me;
    c.we = ep;
    c.wpc = pi;
    c.atomic = atomic;
  } else {
    if (c.re != ep)
      c.ratomic = atomic;
    else
      c.ratomic &= atomic;
    if (c.r != me) {
      c.r2 = c.r;
      c.re2 = c.re;
    }
    c.r = me;
    c.re = ep;
    c.rpc = pi;
  }
}

static void device_access(u64 a, u32 size, bool wr, u64 pc, u32 align, bool atomic) {
  u32 b = (u32)((a - device_at) / SLOT);
  long off = (long)(a - device_at - b * SLOT) - (long)(SLOT / 2);
  if (b < nbuf) off -= (long)(bufs[b].base - (device_at + b * SLOT + SLOT / 2));
  if (b >= nbuf || off < 0 || (u64)off + size > bufs[b].size) {
    report_access(E_OOB, pc, b, off, size, wr);
    die();
  }
  if (wr && !bufs[b].writable) {
    report_access(E_READONLY, pc, b, off, size, true);
  }
  if (align > 1 && a % align) {
    report_access(E_ALIGN, pc, b, off, size, wr);
  }
  if (L.check && bufs[b].writable) {
    u32 g = bufs[b].gran;
    u64 ep = (u64)dev_epoch << 32 | cur_sg->epoch;
    u32 pi = pc_index(pc, b, wr) + 1;
    for (u64 o = off / g; o <= ((u64)off + size - 1) / g; o++)
      race(shadow[b][o], wr, atomic, ep, true, b, off, size, pc, pi);
    if (wr)
      memset(&written[b][off], 1, size);
    else
      for (u32 i = 0; i < size; i++)
        if (!written[b][off + i]) {
          report_access(E_DEV_UNINIT, pc, b, off, size, false);
          break;
        }
  }
  if (L.count) traffic(b, off, size, wr, pc);
}

static void threadgroup_access(u64 a, u32 size, bool wr, u64 pc, u32 align, bool atomic) {
  u64 off = a - arena_at;
  (wr ? counts.threadgroup_stored : counts.threadgroup_loaded) += size;
  if (align > 1 && a % align) {
    report_access(E_ALIGN, pc, NONE, (long)off, size, wr, "threadgroup memory");
  }
  const TgVar* v = nullptr;
  for (auto& t : tgvars)
    if (off >= t.off && off + size <= t.off + t.size) v = &t;
  if (!v) {
    const TgVar* near = nullptr;
    for (auto& t : tgvars)
      if (off + 256 >= t.off && (!near || t.off <= off)) near = &t;
    long inside = (long)off - (near ? (long)near->off : 0);
    report_access(E_OOB, pc, NONE, inside, size, wr, near ? near->name : "threadgroup memory");
    die();
  }
  if (!L.check) return;
  u64 ep = (u64)tg_epoch << 32 | cur_sg->epoch;
  bool un = false;
  u32 pi = pc_index(pc, 63, wr) + 1;
  for (u64 o = off / v->gran * v->gran; o < off + size; o += v->gran)
    race(tg_shadow[o], wr, atomic, ep, false, NONE, off - v->off, size, pc, pi, v->name);
  if (wr)
    memset(&tg_init[off], 1, size);
  else
    for (u32 i = 0; i < size; i++) un |= !tg_init[off + i];
  if (un) {
    report_access(E_UNINIT, pc, NONE, (long)(off - v->off), size, false, v->name);
  }
}

// An access to anything but a stack.
static __attribute__((noinline)) void slow_access(u64 a, u32 size, bool wr, u64 pc, u32 align, bool atomic) {
  if (a - device_at < SLOT * NSLOT) return device_access(a, size, wr, pc, align, atomic);
  if (a - arena_at < TGSIZE) return threadgroup_access(a, size, wr, pc, align, atomic);
  if (a - L.constants_at < L.constants_size) return;
  report_access(E_WILD, pc, NONE, (long)a, size, wr, "no memory of this kernel");
  die();
}

static inline void access(u64 a, u32 size, bool wr, u64 pc, u32 align) {
  if (L.check && (u64)__builtin_frame_address(0) - (stacks_at + cur->lin * STACK) >= STACK) {
    report(E_STACK, pc, "a thread uses more than 64 KiB of stack");
    die();
  }
  if (a - stacks_at < stacks_size) {
    if (a - stacks_at < STACK * MAXT && L.check) {  // clang poisons the gaps between a thread's local arrays
      for (u64 g = a >> 3; g <= (a + size - 1) >> 3; g++) {
        int8_t s = *(int8_t*)(g + SHADOW);
        u64 last = g == (a + size - 1) >> 3 ? (a + size - 1) & 7 : 7;
        if (s && (s < 0 || (int8_t)last >= s)) {
          report_access(E_OOB, pc, NONE, 0, size, wr, "thread memory (a local array)");
          break;
        }
      }
    }
    return;
  }
  slow_access(a, size, wr, pc, align, false);
}
#define RA ((u64)__builtin_return_address(0))
extern "C" {
#define CB(n)                                                          \
  void __asan_load##n##_noabort(u64 a) { access(a, n, false, RA, n); } \
  void __asan_store##n##_noabort(u64 a) { access(a, n, true, RA, n); }
CB(1)
CB(2)
CB(4)
CB(8)
CB(16)
void __asan_loadN_noabort(u64 a, u64 n) { access(a, (u32)n, false, RA, 1); }
void __asan_storeN_noabort(u64 a, u64 n) { access(a, (u32)n, true, RA, 1); }
void* __asan_memcpy(void* d, const void* s, u64 n) {
  if (n) {
    access((u64)s, (u32)n, false, RA, 1);
    access((u64)d, (u32)n, true, RA, 1);
  }
  return memcpy(d, s, n);
}
void* __asan_memmove(void* d, const void* s, u64 n) {
  if (n) {
    access((u64)s, (u32)n, false, RA, 1);
    access((u64)d, (u32)n, true, RA, 1);
  }
  return memmove(d, s, n);
}
void* __asan_memset(void* d, int c, u64 n) {
  if (n) access((u64)d, (u32)n, true, RA, 1);
  return memset(d, c, n);
}
void __asan_handle_no_return() {}

// UBSan handlers: every data record starts with its source location
struct Loc {
  const char* file;
  u32 line, col;
};
static void ub(Loc* l, const char* what, u64 pc) {
  char t[96];
  const char* f = l->file ? strrchr(l->file, '/') : 0;
  snprintf(t, sizeof t, "%s at %s:%u:%u", what, f ? f + 1 : l->file ? l->file : "?", l->line, l->col);
  report(E_UBSAN, pc, t);
}
void __ubsan_handle_out_of_bounds(Loc* l, u64) { ub(l, "array index out of range", RA); }
void __ubsan_handle_shift_out_of_bounds(Loc* l, u64, u64) { ub(l, "shift amount out of range", RA); }
void __ubsan_handle_divrem_overflow(Loc* l, u64, u64) {
  ub(l, "integer division by zero or overflow", RA);
  die();  // the processor would trap
}
void __ubsan_handle_add_overflow(Loc* l, u64, u64) { ub(l, "signed integer overflow (+)", RA); }
void __ubsan_handle_sub_overflow(Loc* l, u64, u64) { ub(l, "signed integer overflow (-)", RA); }
void __ubsan_handle_mul_overflow(Loc* l, u64, u64) { ub(l, "signed integer overflow (*)", RA); }
void __ubsan_handle_negate_overflow(Loc* l, u64) { ub(l, "signed integer overflow (negation)", RA); }
void __ubsan_handle_float_cast_overflow(Loc* l, u64) { ub(l, "float to integer out of range", RA); }
void __ubsan_handle_load_invalid_value(Loc* l, u64) { ub(l, "bool or enum with an invalid value", RA); }
void __ubsan_handle_builtin_unreachable(Loc* l) { ub(l, "unreachable code reached", RA); }
void __ubsan_handle_vla_bound_not_positive(Loc* l, u64) { ub(l, "array size not positive", RA); }
}  // extern "C"
