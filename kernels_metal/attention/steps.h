// The tokens of prefill, a step at a time: packed tokens and exact ones, brought into threadgroup memory.
//
// Both have the same face: how many tokens, which of them a query sees, a token's slot in a mask, keys and values staged by
// the whole threadgroup, its score, and a scale for its value.

#ifndef MLX_ROTOR_ATTENTION_STEPS_H
#define MLX_ROTOR_ATTENTION_STEPS_H

#include "exact.h"

#define MLX_ROTOR_PREFILL_THREADS 128

// A step's tokens and how they are staged: coordinate p of token t at stage[p ROOM + t], so that decoding lanes, which
// are tokens, store side by side. ROOM is 20 words: a matrix's loads, by rows or by columns, meet 32 different banks.
// S, the staged type, is float where exact tokens are, else half: the levels of codecs are exact in both.
template <typename S>
struct Steps {
  static constant constexpr const uint TOKENS = 64 / sizeof(S);
  static constant constexpr const uint ROOM = 80 / sizeof(S);
};

// The packed tokens of one KV head. SPAN: tiles that share a mean of K, 0 where K has none.
template <typename S, typename KQ, typename VQ, uint SPAN>
struct BodyTokens {
  typedef S Staged;
  static constant constexpr const uint KEY_DIM = KQ::UNITS * KQ::FIELDS;
  const device uint *k_tiles;
  const device uint *v_tiles;
  const device half *k_scale;
  const device half *v_scale;
  const device half *k_mean;
  // The first token that is taken; how many there are, and where.
  int first_token, count, first_position, first_slot;

  inline bool seen(thread const Tokens &tokens, int query, int token) const thread {
    return tokens.sees(query, first_position + token);
  }
  inline int slot(int token) const thread {
    return first_slot + token;
  }

  // Whether another mean is K's than in the step before.
  inline bool fresh(int first) const thread {
    return SPAN > 0 && (first == first_token || uint(first) % (SPAN * MLX_ROTOR_TILE) == 0);
  }
  static inline const threadgroup float *mean(const threadgroup float *scales) {
    return scales + 2 * Steps<S>::TOKENS;
  }

  // Spreads the levels of tokens from `first` on; a thread decodes a part of one token's units.
  template <typename Q>
  static inline void spread(const device uint *tiles, int first, threadgroup S *stage, uint thread_index) {
    constexpr uint parts = MLX_ROTOR_PREFILL_THREADS / Steps<S>::TOKENS;
    const uint mine = thread_index % Steps<S>::TOKENS, part = thread_index / Steps<S>::TOKENS;
    const uint token = uint(first) % MLX_ROTOR_TILE + mine;
    const device uint *tile = tiles + long(first / MLX_ROTOR_TILE) * Q::TILE_WORDS;
    const uint begin = part * Q::UNITS / parts, end = (part + 1) * Q::UNITS / parts;
    if (begin < end) {
      Q q;
      q.begin_part(tile, token, begin);
      half2 level[Q::FIELDS / 2];
      for (uint u = begin; u < end; ++u) {
        q.part_unit(tile, token, u, level);
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < Q::FIELDS / 2; ++i) {
          threadgroup S *at = stage + (u * Q::FIELDS + 2 * i) * Steps<S>::ROOM + mine;
          at[0] = S(level[i].x);
          at[Steps<S>::ROOM] = S(level[i].y);
        }
      }
    }
  }

  // scales: the step's scales of K, then of V, then K's mean. Behind the last token the buffers hold anything: V's is 0 there,
  // as is the weight that it multiplies.
  inline void stage_keys(int first, threadgroup S *stage, threadgroup float *scales, uint thread_index) const thread {
    spread<KQ>(k_tiles, first, stage, thread_index);
    if (thread_index < Steps<S>::TOKENS) {
      const int token = first + int(thread_index);
      if (KQ::SCALED) {
        scales[thread_index] = float(k_scale[token]);
      }
      if (VQ::SCALED) {
        scales[Steps<S>::TOKENS + thread_index] = token < count ? float(v_scale[token]) : 0.0f;
      }
    }
    if (fresh(first)) {
      const device half *own = k_mean + (uint(first) / (MLX_ROTOR_TILE * (SPAN > 0 ? SPAN : 1))) * KEY_DIM;
      for (uint p = thread_index; p < KEY_DIM; p += MLX_ROTOR_PREFILL_THREADS) {
        scales[2 * Steps<S>::TOKENS + p] = float(own[KQ::element(p)]);
      }
    }
  }
  inline void stage_values(int first, threadgroup S *stage, uint thread_index) const thread {
    spread<VQ>(v_tiles, first, stage, thread_index);
  }
  // The score of token i of the step: `product` is of its levels, `added` of its mean.
  inline float score(float product, float added, const threadgroup float *scales, uint i) const thread {
    const float own = KQ::SCALED ? product * scales[i] : product;
    return SPAN > 0 ? own + added : own;
  }
  inline float value_scale(const threadgroup float *scales, uint i) const thread {
    return VQ::SCALED ? scales[Steps<S>::TOKENS + i] : 1.0f;
  }
};

// The exact tokens of one KV head, sink tokens and recent ones.
template <typename T, uint DK, uint DV>
struct ExactTokens {
  typedef T Staged;
  ExactRows<T> keys;
  ExactRows<T> values;
  Tokens tokens;
  int count;

  inline int position(int token) const thread {
    return tokens.exact_position(token);
  }
  inline bool seen(thread const Tokens &, int query, int token) const thread {
    return tokens.sees_any(query, position(token));
  }
  inline int slot(int token) const thread {
    return tokens.exact_slot(token);
  }
  inline bool fresh(int) const thread {
    return false;
  }
  static inline const threadgroup float *mean(const threadgroup float *scales) {
    return scales;
  }

  // A simdgroup reads a token's coordinates side by side.
  template <uint DIM>
  inline void spread(thread const ExactRows<T> &rows, int first, threadgroup T *stage, uint thread_index) const thread {
    for (uint t = thread_index / 32; t < Steps<T>::TOKENS; t += MLX_ROTOR_PREFILL_THREADS / 32) {
      const int token = first + int(t);
      const device T *row =
          token < tokens.sinks ? rows.sink + token * rows.sink_step : rows.recent + (token - tokens.sinks) * rows.recent_step;
      for (uint e = thread_index % 32; e < DIM; e += 32) {
        stage[e * Steps<T>::ROOM + t] = token < count ? row[e] : T(0.0f);
      }
    }
  }

  inline void stage_keys(int first, threadgroup T *stage, threadgroup float *, uint thread_index) const thread {
    spread<DK>(keys, first, stage, thread_index);
  }
  inline void stage_values(int first, threadgroup T *stage, uint thread_index) const thread {
    spread<DV>(values, first, stage, thread_index);
  }
  inline float score(float product, float, const threadgroup float *, uint) const thread {
    return product;
  }
  inline float value_scale(const threadgroup float *, uint) const thread {
    return 1.0f;
  }
};

#endif
