// The GPU's own header on the simulator, whose runtime does what the instructions it names do.
#pragma once
#pragma clang system_header
#include "msl_math.h"

struct __msl_slots {  // Slots of metal_sim/runtime/state.h
  uint active, done, lane, pad;
  char result[32];
  char v[32][32];
};
extern "C" {
__attribute__((convergent)) __msl_slots* __msl_simd(const void* v, uint size, uint kind, uint where);
__attribute__((convergent)) void __msl_tgbar(uint flags, uint where);
__attribute__((convergent)) void __msl_sgbar(uint flags, uint where);
void* __msl_tg(uint id, ulong size, uint align, const constant char* name);
uint __msl_lane(void);
}
MSL_FN __msl_slots* __msl_exchange(int w, uint kind) { return __msl_simd(&w, 4, kind, 0); }
// What a lane that is not in `mask` gives is not defined: here a number that would be noticed.
MSL_FN int __msl_given(__msl_slots* s, uint mask, uint lane) {
  return mask >> lane & 1 ? *(int*)s->v[lane] : 0x7fc0dead;
}
MSL_FN int __nvvm_shfl_sync_idx_i32(uint mask, int w, int a, int) {
  return __msl_given(__msl_exchange(w, 1), mask, a & 31);
}
MSL_FN int __nvvm_shfl_sync_bfly_i32(uint mask, int w, int a, int) {
  __msl_slots* s = __msl_exchange(w, 1);
  return __msl_given(s, mask, (s->lane ^ a) & 31);
}
MSL_FN int __nvvm_shfl_sync_up_i32(uint mask, int w, int a, int) {
  __msl_slots* s = __msl_exchange(w, 1);
  return __msl_given(s, mask, s->lane < (uint)a ? s->lane : s->lane - a);
}
MSL_FN int __nvvm_shfl_sync_down_i32(uint mask, int w, int a, int) {
  __msl_slots* s = __msl_exchange(w, 1);
  return __msl_given(s, mask, s->lane + a > 31 ? s->lane : s->lane + a);
}
MSL_FN int __nvvm_vote_ballot_sync(uint mask, bool p) {
  __msl_slots* s = __msl_exchange(p, 4);
  int votes = 0;
  for (uint i = 0; i < 32; i++) votes |= (mask >> i & 1 && __msl_given(s, mask, i)) << i;
  return votes;
}
MSL_FN void __syncthreads() { __msl_tgbar(3, 0); }
MSL_FN void __nvvm_bar_warp_sync(uint) { __msl_sgbar(3, 0); }
// A simdgroup is all there is of a threadgroup: enough to tell which lanes exist.
MSL_FN int __nvvm_read_ptx_sreg_laneid() { return (int)__msl_lane(); }
MSL_FN int __nvvm_read_ptx_sreg_tid_x() { return (int)__msl_lane(); }
MSL_FN int __nvvm_read_ptx_sreg_tid_y() { return 0; }
MSL_FN int __nvvm_read_ptx_sreg_tid_z() { return 0; }
MSL_FN int __nvvm_read_ptx_sreg_ntid_x() { return __builtin_popcount(__msl_exchange(0, 4)->active); }
MSL_FN int __nvvm_read_ptx_sreg_ntid_y() { return 1; }
MSL_FN int __nvvm_read_ptx_sreg_ntid_z() { return 1; }

#define __msl_lane __msl_gpu_lane
#define __msl_tg __msl_gpu_tg
#include "msl_gpu.h"
#undef __msl_tg
#undef MSL_TG
#define MSL_TG(id, T, name)       \
  typedef T;                      \
  threadgroup name##__tgt& name = \
      *(threadgroup name##__tgt*)(ulong)__msl_tg(id, sizeof(name##__tgt), alignof(name##__tgt), #name)
