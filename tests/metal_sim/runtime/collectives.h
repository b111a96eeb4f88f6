// Barriers, simdgroup operations, atomics, threadgroup variables: what include/msl_simd.h calls.
#pragma once
#include "checks.h"

extern "C" {
// Let the lanes in `act` of simdgroup g go on; they all wait in state `state`.
static void release(Sg* g, u32 act, u32 state, u32 flags) {
  if (state == AT_SGBAR) {
    if (flags) g->epoch++;
    counts.simdgroup_barriers++;
  } else {
    Slots* s = &slots[(g - sgs) * 2 + (g->par ^= 1)];
    s->active = act;
    s->done = 0;
    for (u32 i = 0; i < g->n; i++)
      if (act >> i & 1) {
        memcpy(s->v[i], g->f[i].val, 32);
        g->f[i].slot = s;
      }
    counts.simd_operations++;
  }
  for (u32 i = 0; i < g->n; i++)
    if (act >> i & 1) g->f[i].state = READY;
  g->ready += __builtin_popcount(act);
  if (L.count) flush_recs();
}
static void block(u32 state, u64 site, u32 flags, u32 where) {
  cur->state = state;
  cur->site = site;
  cur->flags = flags;
  cur->where = where;
  cur_sg->ready--;
  if (cur_sg->ready == 0 && state != AT_TGBAR) {  // fast path: I am the last lane and all agree
    bool same = true;
    for (u32 i = 0; i < cur_sg->n; i++)
      if (cur_sg->f[i].state != state || cur_sg->f[i].site != site || cur_sg->f[i].where != where) {
        same = false;
        break;
      }
    if (same) {
      release(cur_sg, cur_sg->n == 32 ? ~0u : (1u << cur_sg->n) - 1, state, flags);
      return;
    }
  }
  if (cur_sg->ready) {  // next lane of this simdgroup
    Fiber* me = cur;
    for (u32 k = 0; k < 32; k++) {
      Fiber* f = &cur_sg->f[lane_perm[k]];
      if (lane_perm[k] < cur_sg->n && f->state == READY) {
        cur = f;
        msl_switch(&me->sp, f->sp);
        return;
      }
    }
  }
  to_main();
}
Slots* __msl_simd(const void* v, u32 size, u32 kind, u32 where) {
  memcpy(cur->val, v, size);
  block(kind == 3 ? AT_QUAD : AT_SIMD, RA, kind, where);
  cur->slot->lane = cur->lin & 31;
  return cur->slot;
}
void __msl_sgbar(u32 flags, u32 where) { block(AT_SGBAR, RA, flags, where); }
void __msl_tgbar(u32 flags, u32 where) { block(AT_TGBAR, RA, flags, where); }
void* __msl_tg(u32 id, u64 size, u32 align, const char* name) {
  for (auto& t : tgvars)
    if (t.id == id && t.size == size) return (void*)(arena_at + t.off);
  u32 align0 = align;
  if (align < 16) align = 16;
  u64 off = (tg_top + 64 + align - 1) & ~(u64)(align - 1);  // 64 bytes of red zone
  if (off + size > TGSIZE) {
    report(E_TGMEM, RA, name);
    die();
  }
  tgvars.push_back({id, size, off, name, std::min(align0, 4u)});
  tg_top = off + size;
  counts.threadgroup_bytes += size;
  memset((void*)(arena_at + off), 0xff, size);
  if (L.check) {
    if (tg_shadow.size() < TGSIZE) {
      tg_shadow.assign(TGSIZE, Cell{});
      tg_init.assign(TGSIZE, 0);
    }
  }
  if (counts.threadgroup_bytes > 32768) report(E_TGMEM, RA, name);
  return (void*)(arena_at + off);
}
void __msl_atomic(u64 p, void* v, u32 size, u32 mode) {  // 0 load, 1 store, 2 store of a read-modify-write
  if (mode < 2) counts.atomics++;
  if (L.check || L.count) slow_access(p, size, mode != 0, RA, size, true);
  if (mode)
    memcpy((void*)p, v, size);
  else
    memcpy(v, (void*)p, size);
}
void __msl_badlane(u32 lane) {
  char t[64];
  snprintf(t, sizeof t, "lane %u", lane);
  report(E_BADLANE, RA, t);
}
u32 __msl_lane() { return cur->lin & 31; }
u32 __msl_sgsize() { return 32; }
}
