// No rotation: vectors as they are, times a factor.

#ifndef MLX_ROTOR_CODEC_PLAIN_H
#define MLX_ROTOR_CODEC_PLAIN_H

#include "../common/eight.h"

template <uint DIM>
struct Plain {
  // Words of the table, of which nothing is read: arrays have at least one element.
  static constant constexpr const uint TABLE = 1;

  // Leaves the vector in v, times `factor`, on the eight lanes, in y. Collective, as the rotations all are.
  template <typename Table>
  static inline void apply(threadgroup float *v, Table, float factor, uint lane, thread float (&y)[DIM / 8]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      y[i] = v[(lane & 7) + 8 * i] * factor;
    }
  }
};

#endif
