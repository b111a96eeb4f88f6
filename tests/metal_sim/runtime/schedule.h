// The order of things: a threadgroup's lanes run until they wait, then whoever may go on is released.
#pragma once
#include "collectives.h"

// What a fiber runs: the kernel, then the next lane that can.
static void fiber_main() {
  L.entry(gbufs, &cur->ids);
  cur->state = DONE;
  cur_sg->ready--;
  if (cur_sg->ready) {
    void* dummy;
    for (u32 k = 0; k < 32; k++) {
      Fiber* f = &cur_sg->f[lane_perm[k]];
      if (lane_perm[k] < cur_sg->n && f->state == READY) {
        cur = f;
        msl_switch(&dummy, f->sp);
      }
    }
  }
  to_main();
  abort();
}

// Runs the lanes of s until all are blocked or done.
static void run_sg(Sg* s) {
  cur_sg = s;
  while (s->ready && !dead)
    for (u32 k = 0; k < 32; k++) {
      Fiber* f = &s->f[lane_perm[k]];
      if (lane_perm[k] < s->n && f->state == READY) {
        cur = f;
        msl_switch(&main_sp, f->sp);
        break;
      }
    }
}
// All lanes of s are blocked or done; release one group of lanes at a simd op. False if none is at one.
static bool resolve(Sg* s) {
  u64 site = ~0ull;
  u32 state = 0, live = 0, doneN = 0, where = 0;
  for (u32 i = 0; i < s->n; i++) {
    Fiber& f = s->f[i];
    if (f.state == DONE) {
      doneN++;
      continue;
    }
    live++;
    if ((f.state == AT_SIMD || f.state == AT_QUAD || f.state == AT_SGBAR) &&
        (f.site < site || (f.site == site && f.where < where))) {
      site = f.site;
      state = f.state;
      where = f.where;
    }
  }
  if (site == ~0ull) return false;
  u32 act = 0, n = 0;
  Fiber* first = nullptr;
  for (u32 i = 0; i < s->n; i++)
    if (s->f[i].state == state && s->f[i].site == site && s->f[i].where == where) {
      act |= 1u << i;
      n++;
      if (!first) first = &s->f[i];
    }
  cur = first;
  cur_sg = s;
  if (n < live) {
    char t[64];
    snprintf(t, sizeof t, "%u of %u live lanes (mask %08x)", n, live, act);
    bool whole_quads = state == AT_QUAD;
    if (whole_quads)
      for (u32 q = 0; q < 8; q++) {
        u32 m = act >> (4 * q) & 15;
        if (m && m != 15) whole_quads = false;
      }
    if (!whole_quads) report(E_DIV_SIMD, site, t);
  } else if (doneN) {
    char t[64];
    snprintf(t, sizeof t, "%u of %u lanes have returned", doneN, s->n);
    report(E_EXIT_SIMD, site, t);
  }
  release(s, act, state, first->flags);
  return true;
}

extern "C" u64* __msl_counters() { return &lane_runs[(u64)cur->lin * L.blocks]; }

static u64 rng;
static u32 rnd(u32 n) {
  rng = rng * 6364136223846793005ull + 1442695040888963407ull;
  return (u32)((rng >> 33) % n);
}
// Turns of n in the order of the launch.
static void make_perm(u32* p, u32 n) {
  for (u32 i = 0; i < n; i++) p[i] = L.order == 1 ? n - 1 - i : i;
  if (L.order == 2)
    for (u32 i = n - 1; i; i--) std::swap(p[i], p[rnd(i + 1)]);
}

// Gives every thread of the threadgroup its indices and a stack on which it starts in fiber_main.
static void start_threads(const u32 size[3]) {
  u32 n = size[0] * size[1] * size[2], nsg = (n + 31) / 32;
  u32 k = 0;
  for (u32 z = 0; z < size[2]; z++)
    for (u32 y = 0; y < size[1]; y++)
      for (u32 x = 0; x < size[0]; x++, k++) {
        Fiber& f = fib[k];
        f.lin = k;
        f.gid = tg_index * MAXT + k;
        f.state = READY;
        f.flags = 0;
        Ids& d = f.ids;
        u32 p[3] = {x, y, z};
        for (int i = 0; i < 3; i++) {
          d.pos_grid[i] = tgid[i] * L.tg[i] + p[i];
          d.threads_grid[i] = d.grid_size[i] = L.grid[i];
          d.grid_origin[i] = 0;
          d.pos_tg[i] = p[i];
          d.threads_tg[i] = size[i];
          d.dthreads_tg[i] = L.tg[i];
          d.tg_pos[i] = tgid[i];
          d.tgs_grid[i] = (L.grid[i] + L.tg[i] - 1) / L.tg[i];
        }
        d.idx_tg = k;
        d.idx_sg = k & 31;
        d.sg_idx = k >> 5;
        d.sgs = nsg;
        d.dsgs = (L.tg[0] * L.tg[1] * L.tg[2] + 31) / 32;
        d.width = d.width2 = 32;
        d.idx_quad = k & 3;
        d.quad_idx = k >> 2;
        d.quads = (n + 3) / 4;
        d.dquads = (L.tg[0] * L.tg[1] * L.tg[2] + 3) / 4;
        u64* top = (u64*)(stacks_at + (u64)(k + 1) * STACK - 64);
        *--top = 0;
        *--top = (u64)(void*)fiber_main;
        for (int i = 0; i < NREG; i++) *--top = 0;
        f.sp = top;
      }
  for (u32 i = 0; i < nsg; i++) sgs[i] = {fib + i * 32, std::min(32u, n - i * 32), std::min(32u, n - i * 32), 0, 0};
}

// Every thread waits at a threadgroup barrier or is done: lets those that wait go on. False if all are done.
static bool pass_barrier(u32 n) {
  u32 bar = 0, done = 0;
  Fiber* one = nullptr;
  bool same = true;
  u32 flags = ~0u;
  for (u32 i = 0; i < n; i++) {
    if (fib[i].state == DONE) {
      done++;
      continue;
    }
    bar++;
    if (!one)
      one = &fib[i];
    else if (one->site != fib[i].site || one->where != fib[i].where)
      same = false;
    flags &= fib[i].flags;
  }
  if (!bar) return false;
  cur = one;
  cur_sg = &sgs[one->lin >> 5];
  if (done) {
    char t[64];
    snprintf(t, sizeof t, "%u threads wait, %u have returned", bar, done);
    report(E_EXIT_BARRIER, one->site, t);
  }
  if (!same) report(E_DIV_BARRIER, one->site, "threads wait at different barriers");
  counts.threadgroup_barriers++;
  if (flags & 2) tg_epoch++;
  if (flags & 1) dev_epoch++;
  for (u32 i = 0; i < n; i++)
    if (fib[i].state != DONE) {
      fib[i].state = READY;
      sgs[i >> 5].ready++;
    }
  return true;
}

// Counts of a threadgroup's lanes to those of the launch. A simdgroup runs a block as often as the lane that does most.
static void count_blocks(u32 n) {
  for (u32 b = 0; b < L.blocks; b++)
    for (u32 first = 0; first < n; first += 32) {
      u64 most = 0;
      for (u32 i = first; i < std::min(first + 32, n); i++) {
        u64& runs = lane_runs[(u64)i * L.blocks + b];
        block_lanes[b] += runs;
        most = std::max(most, runs);
        runs = 0;
      }
      issued[b] += most;
    }
}

static void run_group(const u32 size[3]) {
  u32 n = size[0] * size[1] * size[2], nsg = (n + 31) / 32;
  tg_epoch++;
  dev_epoch++;
  if (L.check)
    for (auto& t : tgvars) {
      std::fill(tg_shadow.begin() + t.off, tg_shadow.begin() + t.off + t.size, Cell{});
      memset(&tg_init[t.off], 0, t.size);
    }
  for (auto& t : tgvars) memset((void*)(arena_at + t.off), 0xff, t.size);
  start_threads(size);
  if (L.order) {
    make_perm(perm, nsg);
    make_perm(lane_perm, 32);
  } else
    for (u32 i = 0; i < 32; i++) perm[i] = lane_perm[i] = i;
  do {
    for (u32 q = 0; q < nsg; q++) {
      Sg* s = &sgs[perm[q]];
      do {
        if (s->ready) run_sg(s);
        if (dead) return;
      } while (resolve(s));
      if (L.count) flush_recs();
    }
  } while (pass_barrier(n));
  count_blocks(n);
}
