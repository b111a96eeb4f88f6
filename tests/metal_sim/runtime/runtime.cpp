// Runs one dispatch of a Metal kernel on the CPU: every GPU thread is a fiber, switched at barriers and simdgroup
// operations. One process runs one dispatch.
#include "schedule.h"

extern "C" {
// Float to bfloat, which clang calls on processors that can't, and libgcc has from 13 on. The result is the low half of
// the register a float comes back in.
float __truncsfbf2(float x) {
  u32 b;
  memcpy(&b, &x, 4);
  b = x != x ? b >> 16 | 0x40 : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  memcpy(&x, &b, 4);
  return x;
}
void msl_init() {
  if (device_at) return;
  device_at = (u64)mmap(0, SLOT * NSLOT, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks_size = STACK * MAXT + sizeof(Slots) * 64 + MAXT * sizeof(Fiber) + 65536;
  u64 arena =
      (u64)mmap(0, GUARD + stacks_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  stacks_at = arena + GUARD;
  u64 sh = ((arena >> 3) + SHADOW) & ~4095ull;
  if ((u64)mmap((void*)sh, ((GUARD + STACK * MAXT) >> 3) + 8192, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) != sh) {
    perror("msl shadow");
    abort();
  }
  slots = (Slots*)(stacks_at + STACK * MAXT);
  arena_at = (u64)mmap(0, TGSIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  fib = (Fiber*)(slots + 64);
  gbufs = (u64*)(fib + MAXT);
}
// misalign: bytes after a 256-byte boundary at which the buffer starts (an MLX array may start at any element)
u64 msl_buffer(const char* name, u64 size, u32 writable, u32 gran, u32 misalign) {
  if (nbuf >= NSLOT) return 0;
  u32 b = nbuf++;
  u64 base = device_at + b * SLOT + SLOT / 2;
  u64 len = (size + misalign + 4096 + 4095) & ~4095ull;
  mprotect((void*)base, len, PROT_READ | PROT_WRITE);
  Buf& x = bufs[b];
  snprintf(x.name, sizeof x.name, "%s", name);
  x.base = base + misalign;
  x.size = size;
  x.writable = writable;
  x.gran = gran ? gran : 1;
  x.inited = !writable;
  if (writable) memset((void*)x.base, 0xff, size);
  return x.base;
}
void msl_mark_init(u32 b) { bufs[b].inited = 1; }
int msl_launch(const Launch* l) {
  if (!l->grid[0] || !l->grid[1] || !l->grid[2]) return 0;
  L = *l;
  memcpy(gbufs, L.bufs, L.nbufs * 8);
  rng = L.seed * 2654435761u + 12345;
  lane_runs.assign((u64)MAXT * L.blocks, 0);
  block_lanes.assign(L.blocks, 0);
  issued.assign(L.blocks, 0);
  for (u32 b = 0; b < nbuf; b++) {
    if (L.check && bufs[b].writable) {
      shadow[b].assign(bufs[b].size / bufs[b].gran + 1, Cell{});
      written[b].assign(bufs[b].size, bufs[b].inited);
    }
    if (L.count) line_tg[b].assign(bufs[b].size / 128 + 1, 0);
  }
  u32 csr = __builtin_ia32_stmxcsr();
  if (L.flush_denormals) __builtin_ia32_ldmxcsr(csr | 0x8040);
  u32 ng[3];
  for (int i = 0; i < 3; i++) ng[i] = (L.grid[i] + L.tg[i] - 1) / L.tg[i];
  tg_index = 0;
  u64 total = (u64)ng[0] * ng[1] * ng[2];
  std::vector<u32> order;
  if (L.order) {
    order.resize(total);
    for (u64 i = 0; i < total; i++) order[i] = L.order == 1 ? (u32)(total - 1 - i) : (u32)i;
    if (L.order == 2)
      for (u32 i = (u32)total - 1; i; i--) std::swap(order[i], order[rnd(i + 1)]);
  }
  for (u64 t = 0; t < total && !dead; t++) {
    u32 g = L.order ? order[t] : (u32)t;
    tg_index = g;
    tgid[0] = g % ng[0];
    tgid[1] = g / ng[0] % ng[1];
    tgid[2] = g / ng[0] / ng[1];
    u32 size[3];
    for (int i = 0; i < 3; i++) size[i] = std::min(L.tg[i], L.grid[i] - tgid[i] * L.tg[i]);
    counts.threads += (u64)size[0] * size[1] * size[2];
    run_group(size);
  }
  cur = nullptr;
  __builtin_ia32_ldmxcsr(csr);
  if (L.check)
    for (u32 b = 0; b < nbuf; b++)
      if (bufs[b].writable)
        for (u64 i = 0; i < bufs[b].size; i++) buffer_traffic[b].unwritten += !written[b][i];
  return dead ? -1 : 0;
}
u32 msl_errors(Finding* out, u32 n) {
  u32 k = std::min<u32>(n, findings.size());
  memcpy(out, findings.data(), k * sizeof(Finding));
  return k;
}
u32 msl_pcs(Access* out, u32 n) {
  u32 k = std::min<u32>(n, accesses.size());
  if (out) memcpy(out, accesses.data(), k * sizeof(Access));
  return (u32)accesses.size();
}
void msl_blocks(u64* lanes, u64* simdgroups) {
  std::copy(block_lanes.begin(), block_lanes.end(), lanes);
  std::copy(issued.begin(), issued.end(), simdgroups);
}
void msl_stats(Counts* s, BufferTraffic* b) {
  *s = counts;
  memcpy(b, buffer_traffic, sizeof(BufferTraffic) * nbuf);
}
}
