// Picks a token's experts: scores, the k best of them, and their weights, as the model's own operations give them.
//
// A simdgroup takes a token. Experts lie in blocks of 128, four neighbours a lane, as in MLX's softmax, so that sums
// have its order. The k best come one after another, ties in the order of a stable sort.

#ifndef MLX_ROTOR_EXPERTS_ROUTE_H
#define MLX_ROTOR_EXPERTS_ROUTE_H

#include "../common/eight.h"

#define MLX_ROTOR_SIGMOID 0
#define MLX_ROTOR_SOFTMAX 1
#define MLX_ROTOR_SOFTMAX_OF_CHOSEN 2

// What is the same for all tokens. E experts, K of them chosen; S: type of scores and weights, R: of what is compared,
// A: of a softmax's sums. ASCENDING: the last of a sort are taken, in its order; else the first of a sort of what
// is negated. GROUPS of experts, of which the KEPT best by the sum of their BEST_OF best are taken from.
template <
    uint E_,
    uint K_,
    uint SCORES_,
    bool ASCENDING_,
    bool NORMALIZE_,
    typename S_,
    typename R_,
    typename A_,
    uint GROUPS_ = 1,
    uint KEPT_ = 1,
    uint BEST_OF_ = 1>
struct Routing {
  using S = S_;
  using R = R_;
  using A = A_;
  enum : uint {
    E = E_,
    K = K_,
    SCORES = SCORES_,
    ASCENDING = ASCENDING_,
    NORMALIZE = NORMALIZE_,
    GROUPS = GROUPS_,
    KEPT = KEPT_,
    BEST_OF = BEST_OF_,
    SLOTS = 4 * ((E_ + 127) / 128),
  };

  // Which expert a lane's slot is.
  static inline uint expert(uint slot, uint lane) {
    return 128 * (slot / 4) + 4 * lane + slot % 4;
  }
};

// Whole numbers in the order of values, all above 0; both zeros are one, and what is no number is `nan`.
static inline uint route_rank(float x, uint nan) {
  const uint bits = as_type<uint>(x), size = bits & 0x7fffffffu;
  const uint place = (bits >> 31) ? ~bits : bits | 0x80000000u;
  return size > 0x7f800000u ? nan : size == 0 ? 0x80000000u : place;
}

// Stands for a bias where there is none.
struct NoBias {
  inline float operator[](uint) const thread {
    return 0.0f;
  }
};

template <typename S>
static inline S route_sigmoid(S x) {
  auto y = 1 / (1 + metal::precise::exp(metal::abs(x)));
  return S((x < 0) ? y : 1 - y);
}

// score[] becomes the softmax over all experts.
template <typename How>
static inline void route_softmax(thread typename How::S (&score)[How::SLOTS], uint lane) {
  using S = typename How::S;
  using A = typename How::A;
  A value[How::SLOTS];
  A largest = A(-metal::numeric_limits<A>::max());
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    value[i] = A(score[i]);
    largest = How::expert(i, lane) < How::E && largest < value[i] ? value[i] : largest;
  }
  largest = simd_max(largest);
  A mine = A(0);
  MLX_ROTOR_UNROLL
  for (uint block = 0; block < How::SLOTS / 4; ++block) {
    A sum = A(0);
    MLX_ROTOR_UNROLL
    for (uint i = 4 * block; i < 4 * block + 4; ++i) {
      value[i] = How::expert(i, lane) < How::E ? A(metal::fast::exp(A(value[i] - largest))) : A(0);
      sum = A(sum + value[i]);
    }
    sum = simd_sum(sum);
    mine = lane == block ? sum : mine;
  }
  const A factor = A(1 / simd_sum(mine));
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    score[i] = S(value[i] * factor);
  }
}

// Compared values of the groups that are not taken from become 0. `compared` is room for E in threadgroup memory.
template <typename How>
static inline void route_groups(
    thread typename How::R (&value)[How::SLOTS], threadgroup typename How::R *compared, uint lane) {
  using R = typename How::R;
  enum : uint { SIZE = How::E / How::GROUPS };
  static_assert(How::GROUPS <= 32 && SIZE * How::GROUPS == How::E, "a lane takes a group");
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    if (How::expert(i, lane) < How::E) {
      compared[How::expert(i, lane)] = value[i];
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  uint first = 0, second = 0;
  R best = R(0), next = R(0);
  for (uint e = 0; lane < How::GROUPS && e < SIZE; ++e) {
    const R one = compared[lane * SIZE + e];
    const uint place = route_rank(float(one), 0xffffffffu);
    if (place > first) {
      second = first;
      next = best;
      first = place;
      best = one;
    } else if (place > second) {
      second = place;
      next = one;
    }
  }
  const uint place = route_rank(float(How::BEST_OF == 1 ? best : R(best + next)), 0xffffffffu);
  uint before = 0;
  MLX_ROTOR_UNROLL
  for (uint group = 0; group < How::GROUPS; ++group) {
    const uint other = simd_broadcast(place, ushort(group));
    before += uint(other < place || (other == place && group < lane));
  }
  const uint kept = simd_sum(lane < How::GROUPS && before >= How::GROUPS - How::KEPT ? 1u << lane : 0u);
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    const uint group = How::expert(i, lane) / SIZE;
    value[i] = group < How::GROUPS && (kept >> group & 1) ? value[i] : R(0);
  }
}

// Position `lane` of the chosen: its weight, from what stands in `chosen`.
template <typename How>
static inline typename How::S route_weight(
    threadgroup const typename How::S *chosen, float floor, float epsilon, float scaling, uint lane) {
  using S = typename How::S;
  using A = typename How::A;
  S weight = chosen[lane < How::K ? lane : 0];
  if (How::SCORES == MLX_ROTOR_SOFTMAX_OF_CHOSEN) {
    A largest = A(-metal::numeric_limits<A>::max());
    A sum = A(0);
    for (uint i = 0; i < How::K; ++i) {
      const A x = A(chosen[i]);
      largest = largest < x ? x : largest;
    }
    for (uint i = 4 * lane; i < 4 * lane + 4; ++i) {
      sum = A(sum + (i < How::K ? A(metal::fast::exp(A(A(chosen[i]) - largest))) : A(0)));
    }
    const A factor = A(1 / simd_sum(sum));
    weight = S(A(metal::fast::exp(A(A(weight) - largest))) * factor);
  }
  if (How::NORMALIZE) {
    S sum = S(0);
    for (uint i = 0; i < How::K; ++i) {
      sum = S(chosen[i] + sum);
    }
    // A sum that is no number stays one.
    sum = sum < S(floor) ? S(floor) : sum;
    weight = S(weight / S(sum + S(epsilon)));
  }
  return S(weight * S(scaling));
}

// logits: [T, E] with strides; bias: [E] or NoBias, added to what is compared only. indices: [T, K]; weights: [T, K].
// Weights are divided by their sum, at least `floor`, plus `epsilon`, where the routing says so, then times `scaling`.
// Threadgroup memory: compared [E] where there are groups, chosen [K]. The grid is (32 T) threads in groups of 32.
template <typename How, typename Logits, typename Strides, typename Bias, typename Out>
static inline void route(
    Logits logits,
    Strides strides,
    Bias bias,
    float floor,
    float epsilon,
    float scaling,
    device uint *indices,
    device Out *weights,
    threadgroup typename How::R *compared,
    threadgroup typename How::S *chosen,
    uint token,
    uint lane) {
  using S = typename How::S;
  using R = typename How::R;
  S score[How::SLOTS];
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    const uint e = How::expert(i, lane);
    score[i] = e < How::E ? S(logits[long(token) * strides[0] + long(e) * strides[1]]) : S(0);
    score[i] = How::SCORES == MLX_ROTOR_SIGMOID ? route_sigmoid<S>(score[i]) : score[i];
  }
  if (How::SCORES == MLX_ROTOR_SOFTMAX) {
    route_softmax<How>(score, lane);
  }
  R value[How::SLOTS];
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    const uint e = How::expert(i, lane);
    value[i] = e < How::E ? R(R(score[i]) + R(bias[e])) : R(0);
  }
  if (How::GROUPS > 1) {
    route_groups<How>(value, compared, lane);
  }
  uint rank[How::SLOTS];
  MLX_ROTOR_UNROLL
  for (uint i = 0; i < How::SLOTS; ++i) {
    // Sorts put what is no number last: the last are taken where they ascend, the first where they descend.
    const uint place = route_rank(float(value[i]), How::ASCENDING ? 0xffffffffu : 1u);
    rank[i] = How::expert(i, lane) < How::E ? place : 0;
  }
  for (uint taken = 0; taken < How::K; ++taken) {
    uint best = 0, which = 0;
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < How::SLOTS; ++i) {
      const bool better = How::ASCENDING ? rank[i] >= best : rank[i] > best;
      best = better ? rank[i] : best;
      which = better ? How::expert(i, lane) : which;
    }
    const uint top = simd_max(best);
    which = How::ASCENDING ? simd_max(best == top ? which : 0u) : simd_min(best == top ? which : 0xffffffffu);
    const uint position = How::ASCENDING ? How::K - 1 - taken : taken;
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < How::SLOTS; ++i) {
      if (How::expert(i, lane) == which) {
        rank[i] = 0;
        chosen[position] = score[i];
        indices[long(token) * How::K + position] = which;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  const S weight = route_weight<How>(chosen, floor, epsilon, scaling, lane);
  if (lane < How::K) {
    weights[long(token) * How::K + lane] = Out(weight);
  }
}

#endif
