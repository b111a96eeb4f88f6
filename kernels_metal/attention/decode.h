// Attention of a few query rows over sink tokens, packed body and recent tokens, straight from the packed words.
//
// A threadgroup serves one KV head with all its query rows, at most eight, and one split: a range of the body's tiles or,
// the last one,
// the exact tokens. Its simdgroups take tiles in turn and know nothing of each other until the end. In a tile a lane is a
// token for K: it walks its token's words against queries that all lanes read alike, and no lane has to be summed.
// For V a lane is two coordinates: the tile's levels pass through threadgroup memory, 64 coordinates at a time. K and V
// are decoded once for all rows.

#ifndef MLX_ROTOR_ATTENTION_DECODE_H
#define MLX_ROTOR_ATTENTION_DECODE_H

#include "exact.h"
#include "means.h"

// Coordinates that pass through threadgroup memory at a time, two a lane, and the room of a token's: odd in words, so
// that 32 tokens' stores meet 32 banks.
#define MLX_ROTOR_PASS 64
#define MLX_ROTOR_STAGE 66

// The float or half that fits T; levels are exact in either.
template <typename T>
struct Staged {
  typedef half type;
};
template <>
struct Staged<float> {
  typedef float type;
};

// SPAN: tiles that share a mean of K, 0 where K has none.
// Threadgroup memory: query [QUERY] floats, weight [SIMDS · 32 · ROWS] floats, stage [SIMDS · 32 · 66] of S,
// staged [Turn::TABLE] words, products [PRODUCTS] floats.
// out: [B, Hkv, ROWS, splits, DV] float, stats: the same but [2], maximum and sum.
// Rows of a KV head are (head, query) pairs, head-major. The grid is (32 SIMDS · splits, Hkv, B) threads.
template <
    typename T,
    typename KQ,
    typename VQ,
    typename Rotation,
    uint DK,
    uint DV,
    uint ROWS,
    uint SIMDS,
    int MASK,
    uint SPAN>
struct Decode {
  typedef T Element;
  typedef typename Staged<T>::type S;
  typedef KQ Keys;
  typedef VQ Values;
  typedef Rotation Turn;
  static constant constexpr const uint PASSES = (DV + MLX_ROTOR_PASS - 1) / MLX_ROTOR_PASS;
  static constant constexpr const uint KEY_DIM = DK;
  static constant constexpr const uint VALUE_DIM = DV;
  static constant constexpr const uint SIMDGROUPS = SIMDS;
  static constant constexpr const uint BLOCK = ROWS;
  static constant constexpr const uint PADDED_ROWS = (ROWS + 3) / 4 * 4;
  static constant constexpr const uint QUERY = PADDED_ROWS * (DK > DV ? DK : DV);
  static constant constexpr const uint GROUP_TILES = SPAN;
  // Tiles between products with means, which lie in one group more than that many at most.
  static constant constexpr const int STRETCH = SPAN > 0 ? int(SPAN * MLX_ROTOR_GROUPS) : 1 << 28;
  static constant constexpr const uint PRODUCTS = SPAN > 0 ? (MLX_ROTOR_GROUPS + 1) * ROWS : 1;

  float top[ROWS], sum[ROWS];
  float2 o[PASSES][ROWS];

  inline void clear() thread {
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      top[r] = MLX_ROTOR_UNSEEN;
      sum[r] = 0;
      MLX_ROTOR_UNROLL
      for (uint p = 0; p < PASSES; ++p) {
        o[p][r] = float2(0.0f, 0.0f);
      }
    }
  }

  // Loads the rows' queries, times `factor`, in the order K's levels come in; unrotated for the exact tokens.
  template <typename Strides>
  static inline void load_queries(
      const device T *q,
      Strides strides,
      const threadgroup uint *table,
      float root,
      float factor,
      bool exact,
      uint batch,
      uint first_head,
      uint queries,
      threadgroup float *query,
      uint thread_index,
      uint lane) {
    const uint slot = thread_index / 8, lane8 = lane & 7;
    if (thread_index / 32 < PADDED_ROWS / 4) {
      // A simdgroup loads its four rows, one after another, whole lines at a time.
      for (uint i = 0; i < 4; ++i) {
        const uint at = (slot & ~3u) + i;
        const bool real = at < ROWS;
        const device T *source = q + long(batch) * strides[0] +
            long(first_head + (real ? at / queries : 0)) * strides[1] + long(real ? at % queries : 0) * strides[2];
        for (uint e = lane; e < DK; e += 32) {
          query[at * DK + e] = real ? float(source[long(e) * strides[3]]) : 0.0f;
        }
      }
      threadgroup float *v = query + slot * DK;
      float y[DK / 8];
      simdgroup_barrier(mem_flags::mem_threadgroup);
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DK / 8; ++i) {
        y[i] = v[lane8 + 8 * i];
      }
      if (!exact) {
        Rotation::apply(v, table, root, lane, y);
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      MLX_ROTOR_UNROLL
      for (uint i = 0; i < DK / 8; ++i) {
        const uint e = lane8 + 8 * i;
        v[exact ? e : KQ::position(e)] = y[i] * factor;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Turns scores into weights, for the lane's own token, and rescales what was summed before.
  inline void take(thread float *score, float value_scale, threadgroup float *weight, uint lane) thread {
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      float keep;
      weight[lane * ROWS + r] = weigh(score[r], top[r], sum[r], keep) * value_scale;
      MLX_ROTOR_UNROLL
      for (uint p = 0; p < PASSES; ++p) {
        o[p][r] *= keep;
      }
    }
  }

  // Adds 32 tokens' staged coordinates of pass p, `width` of them, by their weights.
  template <typename Stage>
  inline void add(uint p, uint width, Stage stage, const threadgroup float *weight, uint lane) thread {
    if (2 * lane < width) {
      for (uint t = 0; t < MLX_ROTOR_TILE; ++t) {
        const float x = float(stage[t * MLX_ROTOR_STAGE + 2 * lane]);
        const float y = float(stage[t * MLX_ROTOR_STAGE + 2 * lane + 1]);
        MLX_ROTOR_UNROLL
        for (uint r = 0; r < ROWS; ++r) {
          const float w = weight[t * ROWS + r];
          o[p][r].x = fma(w, x, o[p][r].x);
          o[p][r].y = fma(w, y, o[p][r].y);
        }
      }
    }
  }

  // One tile of the body. `token` is this lane's, counted in the body; `products` are the tile's with its mean.
  template <typename Mask, typename MaskStrides>
  inline void body_tile(
      const device uint *k_tile,
      const device half *k_scale,
      const device uint *v_tile,
      const device half *v_scale,
      thread const Tokens &tokens,
      int token,
      Mask mask,
      MaskStrides mask_strides,
      uint batch,
      uint first_head,
      const threadgroup float *query,
      const threadgroup float *products,
      threadgroup float *weight,
      threadgroup S *stage,
      uint lane) thread {
    float score[ROWS];
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      score[r] = 0;
    }
    KQ k;
    k.begin(k_tile, lane);
    half2 level[KQ::FIELDS / 2];
    for (uint u = 0; u < KQ::UNITS; ++u) {
      k.unit(k_tile, lane, u, level);
      MLX_ROTOR_UNROLL
      for (uint r = 0; r < ROWS; ++r) {
        const threadgroup float4 *mine = (const threadgroup float4 *)(query + r * DK + u * KQ::FIELDS);
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < KQ::FIELDS / 4; ++i) {
          const float4 x = mine[i];
          score[r] = fma(x.x, float(level[2 * i].x), score[r]);
          score[r] = fma(x.y, float(level[2 * i].y), score[r]);
          score[r] = fma(x.z, float(level[2 * i + 1].x), score[r]);
          score[r] = fma(x.w, float(level[2 * i + 1].y), score[r]);
        }
      }
    }
    const bool held = token < tokens.body;
    const float key_scale = KQ::SCALED && held ? float(k_scale[lane]) : 1.0f;
    uint l = 0, head = first_head;
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      float s = MLX_ROTOR_UNSEEN;
      if (held && tokens.sees(int(l), tokens.before + token)) {
        s = masked<MASK>(
            SPAN > 0 ? fma(score[r], key_scale, products[r]) : score[r] * key_scale, mask, mask_strides, batch, head, l,
            tokens.body_slot + token);
      }
      score[r] = s;
      l = l + 1 < uint(tokens.queries) ? l + 1 : 0;
      head += l == 0 ? 1 : 0;
    }
    take(score, !held ? 0.0f : VQ::SCALED ? float(v_scale[lane]) : 1.0f, weight, lane);
    VQ v;
    v.begin(v_tile, lane);
    half2 value[VQ::FIELDS / 2];
    MLX_ROTOR_UNROLL
    for (uint p = 0; p < PASSES; ++p) {
      const uint width = p + 1 < PASSES ? MLX_ROTOR_PASS : DV - p * MLX_ROTOR_PASS;
      for (uint u = 0; u < width / VQ::FIELDS; ++u) {
        v.unit(v_tile, lane, p * (MLX_ROTOR_PASS / VQ::FIELDS) + u, value);
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < VQ::FIELDS / 2; ++i) {
          const uint at = lane * MLX_ROTOR_STAGE + u * VQ::FIELDS + 2 * i;
          stage[at] = S(value[i].x);
          stage[at + 1] = S(value[i].y);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
      add(p, width, stage, weight, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // 32 exact tokens from `index` on.
  template <typename Mask, typename MaskStrides>
  inline void exact_tile(
      thread const ExactRows<T> &keys,
      thread const ExactRows<T> &values,
      thread const Tokens &tokens,
      int index,
      Mask mask,
      MaskStrides mask_strides,
      uint batch,
      uint first_head,
      const threadgroup float *query,
      threadgroup float *weight,
      threadgroup T *stage,
      uint lane) thread {
    float score[ROWS];
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      score[r] = 0;
    }
    for (uint first = 0; first < DK; first += MLX_ROTOR_PASS) {
      const uint width = DK - first < MLX_ROTOR_PASS ? DK - first : MLX_ROTOR_PASS;
      keys.stage_rows(tokens, index, first, width, stage, MLX_ROTOR_STAGE, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      for (uint i = 0; i < width; ++i) {
        const float x = float(stage[lane * MLX_ROTOR_STAGE + i]);
        MLX_ROTOR_UNROLL
        for (uint r = 0; r < ROWS; ++r) {
          score[r] = fma(query[r * DK + first + i], x, score[r]);
        }
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
    const int own = index + int(lane);
    const bool held = own < tokens.sinks + tokens.recent;
    uint l = 0, head = first_head;
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      float s = MLX_ROTOR_UNSEEN;
      if (held && tokens.sees_any(int(l), tokens.exact_position(own))) {
        s = masked<MASK>(score[r], mask, mask_strides, batch, head, l, tokens.exact_slot(own));
      }
      score[r] = s;
      l = l + 1 < uint(tokens.queries) ? l + 1 : 0;
      head += l == 0 ? 1 : 0;
    }
    take(score, 1.0f, weight, lane);
    MLX_ROTOR_UNROLL
    for (uint p = 0; p < PASSES; ++p) {
      const uint first = p * MLX_ROTOR_PASS;
      const uint width = p + 1 < PASSES ? MLX_ROTOR_PASS : DV - first;
      values.stage_rows(tokens, index, first, width, stage, MLX_ROTOR_STAGE, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      add(p, width, stage, weight, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // Sums the simdgroups' results and writes the split's.
  inline void finish(
      device float *out,
      device float *stats,
      uint split,
      uint splits,
      threadgroup float *gathered,
      threadgroup float *weight,
      uint thread_index,
      uint lane) thread {
    const uint own = thread_index / 32;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      const float whole = simd_sum(sum[r]);
      if (lane == 0) {
        weight[(own * ROWS + r) * 2] = top[r];
        weight[(own * ROWS + r) * 2 + 1] = whole;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float highest[ROWS];
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      highest[r] = weight[r * 2];
      for (uint i = 1; i < SIMDS; ++i) {
        highest[r] = fmax(highest[r], weight[(i * ROWS + r) * 2]);
      }
    }
    for (uint i = 0; i < SIMDS; ++i) {
      if (own == i) {
        MLX_ROTOR_UNROLL
        for (uint p = 0; p < PASSES; ++p) {
          const uint at = p * MLX_ROTOR_PASS + 2 * lane;
          if (at < DV) {
            MLX_ROTOR_UNROLL
            for (uint r = 0; r < ROWS; ++r) {
              const float2 mine = o[p][r] * exp2(top[r] - highest[r]);
              gathered[r * DV + at] = (i == 0 ? 0.0f : gathered[r * DV + at]) + mine.x;
              gathered[r * DV + at + 1] = (i == 0 ? 0.0f : gathered[r * DV + at + 1]) + mine.y;
            }
          }
        }
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      const uint at = r * splits + split;
      for (uint e = thread_index; e < DV; e += 32 * SIMDS) {
        out[at * DV + e] = gathered[r * DV + e];
      }
      if (thread_index == 0) {
        float whole = 0;
        for (uint i = 0; i < SIMDS; ++i) {
          whole = fma(weight[(i * ROWS + r) * 2 + 1], exp2(weight[(i * ROWS + r) * 2] - highest[r]), whole);
        }
        stats[2 * at] = highest[r];
        stats[2 * at + 1] = whole;
      }
    }
  }
};

// q: [B, Hq, L, DK]; k_tiles, v_tiles: [B, Hkv, tiles, words], k_scale, v_scale: [B, Hkv, 32 tiles], contiguous, whole
// buffers whatever they hold, scales null where the quantizer has none; k_mean: [B, Hkv, groups, DK], contiguous, null where
// there are none; sink tokens and recent tokens as in exact.h; mask as in `masked`, lengths and sizes as in `tokens_of`. The last
// split is of the exact tokens where `exact_splits` is 1. `factor` is scale · log2(e).
template <
    typename D,
    typename QStrides,
    typename Shape,
    typename Strides,
    typename Mask,
    typename MaskStrides,
    typename Lengths,
    typename Sizes>
static inline void decode(
    const device typename D::Element *q,
    QStrides q_strides,
    const device uint *table,
    float root,
    float factor,
    const device uint *k_tiles,
    Shape k_shape,
    const device half *k_scale,
    const device uint *v_tiles,
    Shape v_shape,
    const device half *v_scale,
    const device half *k_mean,
    int groups,
    const device typename D::Element *sink_k,
    Strides sink_k_strides,
    const device typename D::Element *sink_v,
    Strides sink_v_strides,
    const device typename D::Element *recent_k,
    Strides recent_k_strides,
    const device typename D::Element *recent_v,
    Strides recent_v_strides,
    Mask mask,
    MaskStrides mask_strides,
    Lengths lengths,
    Sizes sizes,
    device float *out,
    device float *stats,
    threadgroup uint *staged,
    threadgroup float *query,
    threadgroup float *weight,
    threadgroup typename D::S *stage,
    threadgroup float *products,
    uint3 group,
    uint thread_index,
    uint lane) {
  const Tokens tokens = tokens_of(lengths, sizes, group.z);
  const uint queries = uint(sizes[0]), heads = uint(sizes[1]), kv_head = group.y;
  const uint kv_heads = uint(k_shape[1]);
  const uint body_splits = uint(sizes[2]), splits = body_splits + exact_splits(sizes);
  const bool exact = group.x == body_splits;
  const uint own = thread_index / 32;
  threadgroup float *own_weight = weight + own * MLX_ROTOR_TILE * D::BLOCK;
  threadgroup typename D::S *own_stage = stage + own * MLX_ROTOR_TILE * MLX_ROTOR_STAGE;
  if (!exact) {
    stage_table(table, staged, D::Turn::TABLE, thread_index, 32 * D::SIMDGROUPS);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  D::load_queries(
      q, q_strides, staged, root, factor, exact, group.z, kv_head * heads, queries, query, thread_index,
      lane);
  D work;
  work.clear();
  if (exact) {
    const ExactRows<typename D::Element> keys =
        exact_rows(sink_k, sink_k_strides, recent_k, recent_k_strides, group.z, kv_head);
    const ExactRows<typename D::Element> values =
        exact_rows(sink_v, sink_v_strides, recent_v, recent_v_strides, group.z, kv_head);
    const int count = tokens.sinks + tokens.recent;
    for (int at = int(own) * MLX_ROTOR_TILE; at < count; at += int(D::SIMDGROUPS) * MLX_ROTOR_TILE) {
      work.template exact_tile<Mask, MaskStrides>(
          keys, values, tokens, at, mask, mask_strides, group.z, kv_head * heads, query, own_weight,
          (threadgroup typename D::Element *)own_stage, lane);
    }
  } else {
    const int2 range = tiles_of(tokens, int(group.x), int(body_splits));
    const long head = long(group.z) * kv_heads + kv_head;
    constexpr uint group_tiles = D::GROUP_TILES > 0 ? D::GROUP_TILES : 1;
    for (int first = range.x; first < range.y; first += D::STRETCH) {
      const int last = min(range.y, first + D::STRETCH);
      const uint first_group = uint(first) / group_tiles;
      if (D::GROUP_TILES > 0) {
        mean_products<typename D::Keys, D::KEY_DIM, D::BLOCK, D::SIMDGROUPS>(
            k_mean + (head * groups + first_group) * D::KEY_DIM, uint(last - 1) / group_tiles - first_group, query,
            products, own, lane);
      }
      for (int tile = first + int(own); tile < last; tile += int(D::SIMDGROUPS)) {
        const long k_at = head * k_shape[2] + tile, v_at = head * v_shape[2] + tile;
        work.template body_tile<Mask, MaskStrides>(
            k_tiles + k_at * D::Keys::TILE_WORDS, k_scale + k_at * MLX_ROTOR_TILE,
            v_tiles + v_at * D::Values::TILE_WORDS, v_scale + v_at * MLX_ROTOR_TILE, tokens,
            tile * MLX_ROTOR_TILE + int(lane), mask, mask_strides, group.z, kv_head * heads, query,
            products + (uint(tile) / group_tiles - first_group) * D::BLOCK, own_weight, own_stage, lane);
      }
    }
  }
  const long first = (long(group.z) * kv_heads + kv_head) * D::BLOCK * splits;
  work.finish(
      out + first * D::VALUE_DIM, stats + first * 2, group.x, splits, query, weight, thread_index, lane);
}

#endif
