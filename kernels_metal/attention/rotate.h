// Rotates vectors, as they are or back, and puts them into the order a quantizer's levels come in.
//
// A threadgroup of four simdgroups takes 16 vectors of one head, eight lanes a vector.

#ifndef MLX_ROTOR_ATTENTION_ROTATE_H
#define MLX_ROTOR_ATTENTION_ROTATE_H

#include "../common/eight.h"

#define MLX_ROTOR_ROTATE_VECTORS 16

// Elements in their own order; a quantizer is the other kind of order.
struct PlainOrder {
  static inline uint position(uint e) {
    return e;
  }
};

// A vector's room in threadgroup memory: the four of a simdgroup lie eight banks apart.
template <uint DIM>
static inline constexpr uint rotate_room() {
  return DIM + 8;
}

// x: [B, H, n, DIM] with strides; out: the same shape, contiguous, element e times `factor` at Order::position(e).
// `table` and `root` are the rotation's. Threadgroup memory: vector [16 · rotate_room]. The grid is
// (128 ceil(n / 16), H, B) threads.
template <typename Order, typename Rotation, uint DIM, typename T, typename Shape, typename Strides, typename Out>
static inline void rotate_vectors(
    const device T *x,
    Shape shape,
    Strides strides,
    const device uint *table,
    float root,
    float factor,
    device Out *out,
    threadgroup float *vector,
    uint3 group,
    uint3 groups,
    uint thread_index,
    uint lane) {
  constexpr uint room = rotate_room<DIM>();
  const uint count = uint(shape[2]), slot = thread_index / 8, lane8 = lane & 7;
  const uint first = group.x * MLX_ROTOR_ROTATE_VECTORS;
  const device T *head = x + long(group.z) * strides[0] + long(group.y) * strides[1];
  device Out *out_head = out + (long(group.z) * groups.y + group.y) * count * DIM;
  // A simdgroup reads and writes its four vectors one after another, whole lines at a time.
  for (uint own = slot & ~3u; own < (slot & ~3u) + 4; ++own) {
    for (uint e = lane; e < DIM; e += 32) {
      vector[own * room + e] =
          first + own < count ? float(head[long(first + own) * strides[2] + long(e) * strides[3]]) : 0.0f;
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  float y[DIM / 8];
  Rotation::apply(vector + slot * room, table, root, lane, y);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < DIM / 8; ++i) {
    vector[slot * room + Order::position(lane8 + 8 * i)] = y[i] * factor;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (uint own = slot & ~3u; own < (slot & ~3u) + 4 && first + own < count; ++own) {
    for (uint e = lane; e < DIM; e += 32) {
      out_head[long(first + own) * DIM + e] = Out(vector[own * room + e]);
    }
  }
}

#endif
