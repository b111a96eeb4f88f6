// Traffic: bytes by buffer, and by instruction how many 128-byte lines a simdgroup's access touches.
#pragma once
#include "state.h"

struct Rec {
  u32 n;
  u32 bytes;
  u32 line[64];
};
static const u32 PCT = 1 << 14;
static u64 pct_key[PCT];
static u32 pct_val[PCT];
static std::vector<std::vector<Rec>> recs;
static std::vector<u32> used;
static std::vector<u32> touched;
static std::vector<uint16_t> lane_cnt;
static u32 pc_index(u64 pc, u32 buf, bool wr) {
  u64 key = pc * 64 + buf;
  u32 h = (u32)((key * 0x9E3779B97F4A7C15ull) >> 50);
  while (pct_key[h] && pct_key[h] != key) h = (h + 1) & (PCT - 1);
  if (!pct_key[h]) {
    pct_key[h] = key;
    pct_val[h] = (u32)accesses.size();
    accesses.push_back({pc, buf, wr, 0, 0, 0, 0, 0});
    recs.emplace_back();
    used.push_back(0);
    lane_cnt.resize(accesses.size() * 32, 0);
  }
  return pct_val[h];
}
static void flush_recs() {  // one simdgroup's stretch between two synchronisations
  for (u32 i : touched) {
    Access& p = accesses[i];
    for (u32 k = 0; k < used[i]; k++) {
      p.lines += recs[i][k].n;
      p.simd_accesses++;
      p.ideal_lines += std::min(recs[i][k].n, (recs[i][k].bytes + 127) / 128);
    }
    used[i] = 0;
    memset(&lane_cnt[i * 32], 0, 64);
  }
  touched.clear();
}
static void traffic(u32 b, u64 off, u32 size, bool wr, u64 pc) {
  u32 i = pc_index(pc, b, wr);
  Access& p = accesses[i];
  p.accesses++;
  p.bytes += size;
  (wr ? buffer_traffic[b].stored : buffer_traffic[b].loaded) += size;
  u32 lane = cur->lin & 31, k = lane_cnt[i * 32 + lane]++;
  auto& rv = recs[i];
  if (k >= used[i]) {
    if (used[i] == 0) touched.push_back(i);
    used[i] = k + 1;
    if (rv.size() <= k) rv.resize(k + 1);
    rv[k].n = rv[k].bytes = 0;
  }
  Rec& r = rv[k];
  r.bytes += size;
  for (u64 ln = off >> 7; ln <= (off + size - 1) >> 7; ln++) {
    u32 q = 0;
    while (q < r.n && r.line[q] != (u32)ln) q++;
    if (q == r.n && r.n < 64) r.line[r.n++] = (u32)ln;
    if (ln < line_tg[b].size()) {
      u32& t = line_tg[b][ln];
      if (t != tg_index + 1) {
        if (!t) buffer_traffic[b].unique_lines++;
        buffer_traffic[b].group_lines++;
        t = tg_index + 1;
      }
    }
  }
}
