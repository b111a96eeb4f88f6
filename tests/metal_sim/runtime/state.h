// Everything one dispatch knows: what Python sees (mirrored in worker.py), memory, threads, findings.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef uint8_t u8;
typedef uint32_t u32;
typedef uint64_t u64;

// ---- what Python sees -------------------------------------------------------------
enum Kind {  // numbered as KINDS of report.py
  E_OOB = 1,
  E_WILD,
  E_RACE_TG,
  E_RACE_DEV,
  E_UNINIT,
  E_ALIGN,
  E_DIV_BARRIER,
  E_EXIT_BARRIER,
  E_DIV_SIMD,
  E_EXIT_SIMD,
  E_BADLANE,
  E_TGMEM,
  E_READONLY,
  E_STACK,
  E_UBSAN,
  E_DEV_UNINIT
};
// `pc` and `tg`, `th` say where and which thread; `pc2` and `th2` the other side of a race; `text` what else there is.
struct Finding {
  u32 kind, write;
  u64 pc, pc2;
  long off;
  u32 buf, size;
  u32 tg[3], th[3], th2, count;
  char text[96];
};
// Traffic of one instruction on one buffer.
struct Access {
  u64 pc;
  u32 buf, write;
  u64 accesses, bytes, simd_accesses, lines, ideal_lines;
};
struct BufferTraffic {
  u64 loaded, stored, unique_lines, group_lines, unwritten;
};
struct Counts {
  u64 threads, simd_operations, threadgroup_barriers, simdgroup_barriers, threadgroup_loaded, threadgroup_stored,
      atomics, threadgroup_bytes;
};
// Sizes in threads.
struct Launch {
  void (*entry)(u64*, void*);
  u64* bufs;
  u32 nbufs;
  u32 grid[3], tg[3];
  u32 order;  // 0 forward, 1 reverse, 2 random
  u32 seed;
  u32 check, count;
  u64 constants_at, constants_size;  // the kernel library's own constants
  u32 flush_denormals;               // flush float denormals to zero, as Apple GPUs may
  u32 blocks;                        // of code that the kernel counts, 0 unless in mode arithmetic
};

// ---- memory layout ----------------------------------------------------------------
// A buffer lies in the middle of 8 GiB of its own: an error in a 32-bit index ends up in nobody else's.
static const u64 SLOT = 1ull << 33, STACK = 64 << 10, TGSIZE = 1 << 20;
static const u64 SHADOW = 0x7fff8000;  // -asan-mapping-offset: shadow of the fiber stacks
static const u64 GUARD = 4 << 20;      // below the first stack, so that running over it is reported
static const u32 NSLOT = 48, MAXT = 1024, NONE = ~0u;
static u64 device_at, stacks_at, stacks_size, arena_at;
// `gran`: bytes of an element, the unit of race checks. `inited`: all of it counts as written.
struct Buf {
  char name[32];
  u64 base, size;
  u32 writable, gran, inited;
};
// Of one element: last writer and last two readers (thread + 1), the epochs of these, and the writer's and reader's
// instruction. An epoch counts threadgroup barriers in its upper half, simdgroup barriers in its lower.
struct Cell {
  u32 w = 0, r = 0, r2 = 0;
  u64 we = 0, re = 0, re2 = 0;
  u32 wpc = 0, rpc = 0;
  u8 atomic = 0, ratomic = 1;
};
static Buf bufs[NSLOT];
static u32 nbuf;
static std::vector<Cell> shadow[NSLOT];
static std::vector<u8> written[NSLOT];
static std::vector<u32> line_tg[NSLOT];
static BufferTraffic buffer_traffic[NSLOT];

// ---- threads ------------------------------------------------------------------------
struct Ids {  // in the order of INDICES of entry.py
  u32 pos_grid[3], threads_grid[3], grid_size[3], grid_origin[3], pos_tg[3], threads_tg[3], dthreads_tg[3], tg_pos[3],
      tgs_grid[3];
  u32 idx_tg, idx_sg, sg_idx, sgs, dsgs, width, width2, idx_quad, quad_idx, quads, dquads;
};
enum { READY, AT_SIMD, AT_QUAD, AT_TGBAR, AT_SGBAR, DONE };
// One simdgroup operation: the lanes that take part and the value each brings; as in include/msl_simd.h.
struct Slots {
  u32 active, done, lane, pad;
  char result[32];
  char v[32][32];
};
// A GPU thread. `site` and `where` name the collective it waits at, `lin` is its index in the threadgroup, `gid`
// identifies it in the grid.
struct Fiber {
  void* sp;
  u32 state, flags;
  u64 site;
  u32 lin, gid, where;
  Slots* slot;
  char val[32];
  Ids ids;
};
// A simdgroup: its first fiber, lanes, lanes that can run, which Slots come next, barriers passed.
struct Sg {
  Fiber* f;
  u32 n, ready, par, epoch;
};
static u64* gbufs;  // buffer addresses; like the fibers and slots, in the stack arena
static Fiber* fib;
static Sg sgs[32];
static Slots* slots;  // two of each simdgroup, taken in turn
static Fiber* cur;
static Sg* cur_sg;
static void* main_sp;
static Launch L;
static Counts counts;
static std::vector<Finding> findings;
static std::vector<Access> accesses;
static u32 tg_epoch = 1, dev_epoch = 1, tg_index, tgid[3];
static bool dead;
static std::vector<u64> lane_runs;            // [lane of the threadgroup][block]: how often it has run the block
static std::vector<u64> block_lanes, issued;  // [block]: runs of all lanes; of simdgroups, at least
// A variable in threadgroup memory.
struct TgVar {
  u32 id;
  u64 size, off;
  const char* name;
  u32 gran;
};
static std::vector<TgVar> tgvars;
static u64 tg_top;
static std::vector<Cell> tg_shadow;
static std::vector<u8> tg_init;
static u32 perm[32], lane_perm[32];  // turns of the simdgroups, of the lanes in each

// Saves the caller's registers and stack pointer in *save, goes on with the stack `to`.
extern "C" void msl_switch(void** save, void* to);
asm(R"(
.text
.globl msl_switch
.type msl_switch,@function
msl_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static const int NREG = 6;  // what msl_switch pops before it returns

// ---- errors -------------------------------------------------------------------------
// Notes a finding; one a kind and instruction, the rest are counted. Null if there was one already.
static Finding* report(u32 kind, u64 pc, const char* text = "") {
  for (auto& e : findings)
    if (e.kind == kind && e.pc == pc) {
      e.count++;
      return nullptr;
    }
  if (findings.size() >= 64) return nullptr;
  Finding e;
  memset(&e, 0, sizeof e);
  e.kind = kind;
  e.pc = pc;
  e.count = 1;
  e.buf = NONE;
  memcpy(e.tg, tgid, sizeof tgid);
  if (cur) memcpy(e.th, cur->ids.pos_tg, sizeof e.th);
  snprintf(e.text, sizeof e.text, "%s", text);
  findings.push_back(e);
  return &findings.back();
}
static void report_access(u32 kind, u64 pc, u32 buf, long off, u32 size, bool wr, const char* text = "") {
  Finding* e = report(kind, pc, text);
  if (!e) return;
  e->buf = buf;
  e->off = off;
  e->size = size;
  e->write = wr;
}
static void to_main() { msl_switch(&cur->sp, main_sp); }
static void die() {
  dead = true;
  to_main();
  abort();
}
