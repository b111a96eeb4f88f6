// A rotation that turns blocks of SIZE neighbours, each by numbers of its own: 2, complex numbers (planar); 4, quaternions
// from the left (iso), or from both sides, BOTH (isofull); 3, rotors of Cl(3,0) from both sides (rotor). Of a last block of
// rotors that is smaller, two elements are turned by a complex number and one is left alone.
//
// `table`: for each block its numbers' parts as the bits of floats: two for a complex number, four for a quaternion or a
// rotor (scalar part first, then the axis), the left quaternion before the right. The inverse is the same map with all
// conjugated.

#ifndef MLX_ROTOR_CODEC_BLOCK_H
#define MLX_ROTOR_CODEC_BLOCK_H

#include "../common/eight.h"

template <uint SIZE, uint DIM, bool BOTH = false>
struct Block {
  static_assert(SIZE == 4 || !BOTH, "only quaternions come in pairs");
  static constant constexpr const uint PARTS = SIZE == 2 ? 2 : BOTH ? 8 : 4;
  static constant constexpr const uint REST = DIM % SIZE;
  // Words of the table.
  static constant constexpr const uint TABLE = (DIM / SIZE + (REST == 2 ? 1 : 0)) * PARTS;

  // The product of units c ^ j and j is unit c, but for the sign: bit N c + j.
  static constant constexpr const uint MINUS_COMPLEX = 0x2u, MINUS_QUATERNION = 0x284Eu;

  // Element c of (parts of a complex number or quaternion) times the N elements at v.
  template <uint N, typename Numbers>
  static inline float product(Numbers parts, const threadgroup float *v, uint c) {
    constexpr uint minus = N == 2 ? MINUS_COMPLEX : MINUS_QUATERNION;
    float sum = 0;
    for (uint j = 0; j < N; ++j) {
      const float part = as_type<float>(parts[c ^ j]);
      const float term = (minus >> (N * c + j) & 1 ? -part : part) * v[j];
      sum = j == 0 ? term : sum + term;
    }
    return sum;
  }

  // Element c of a quaternion times (parts of a quaternion), the first on four neighbouring lanes. Collective.
  template <typename Numbers>
  static inline float right_product(float mine, Numbers parts, uint c) {
    float sum = 0;
    MLX_ROTOR_UNROLL
    for (uint k = 0; k < 4; ++k) {
      const float part = as_type<float>(parts[k]);
      const float other = k == 0 ? mine : simd_shuffle_xor(mine, ushort(k));
      const float term = (MINUS_QUATERNION >> (4 * c + k) & 1 ? -part : part) * other;
      sum = k == 0 ? term : sum + term;
    }
    return sum;
  }

  // Element c of the cross product of an axis and w.
  static inline float cross(float x, float y, float wx, float wy) {
    const float a = x * wy;
    const float b = y * wx;
    return a - b;
  }

  // Element c of R v R̃, as v + s t + u × t with t = 2 u × v for the rotor s + u.
  template <typename Numbers>
  static inline float sandwich(Numbers rotor, const threadgroup float *v, uint c) {
    const float s = as_type<float>(rotor[0]);
    float u[3], w[3];
    for (uint i = 0; i < 3; ++i) {
      // The axes in the order that begins with c.
      const uint at = (c + i) % 3;
      u[i] = as_type<float>(rotor[1 + at]);
      w[i] = v[at];
    }
    const float t0 = 2.0f * cross(u[1], u[2], w[1], w[2]);
    const float t1 = 2.0f * cross(u[2], u[0], w[2], w[0]);
    const float t2 = 2.0f * cross(u[0], u[1], w[0], w[1]);
    const float along = s * t0;
    const float sum = w[0] + along;
    return sum + cross(u[1], u[2], t1, t2);
  }

  // Rotates the vector in v. Its elements end on the eight lanes, in y. Collective, as the rotations all are.
  template <typename Table>
  static inline void apply(threadgroup float *v, Table table, float, uint lane, thread float (&y)[DIM / 8]) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < DIM / 8; ++i) {
      const uint e = (lane & 7) + 8 * i;
      const uint first = e - e % SIZE;
      Table parts = table + e / SIZE * PARTS;
      if (SIZE != 3) {
        y[i] = product<SIZE == 3 ? 2 : SIZE>(parts, v + first, e - first);
        if (BOTH) {
          y[i] = right_product(y[i], parts + 4, e - first);
        }
      } else if (first + 3 <= DIM) {
        y[i] = sandwich(parts, v + first, e - first);
      } else {
        y[i] = REST == 2 ? product<2>(parts, v + first, e - first) : v[e];
      }
    }
  }
};

#endif
