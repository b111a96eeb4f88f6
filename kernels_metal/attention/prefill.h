// Attention of many query rows over sink tokens, packed body and recent tokens, with 8 x 8 matrices.
//
// A threadgroup of four simdgroups serves one KV head, 32 query rows, eight a simdgroup, and one split: a range of
// the body's tiles, or, the last split, the exact tokens. It walks its tokens in steps: keys into threadgroup memory,
// scores, weights, values into the same memory, sums. Queries, scores, weights and sums stay in registers; a packed
// word is read once for the 32 rows. Steps that no row of the block sees are left out.

#ifndef MLX_ROTOR_ATTENTION_PREFILL_H
#define MLX_ROTOR_ATTENTION_PREFILL_H

#include <metal_simdgroup_matrix>

#include "steps.h"

#define MLX_ROTOR_PREFILL_ROWS 32
// SPAN: tiles that share a mean of K, 0 where K has none.
// Threadgroup memory: stage [WIDTH · ROOM] of S, scales [SCALES] floats.
template <typename T, typename S, typename KQ, typename VQ, uint DK, uint DV, int MASK, uint SPAN>
struct Prefill {
  typedef T Element;
  typedef S Staged;
  typedef KQ Keys;
  typedef VQ Values;
  typedef BodyTokens<S, KQ, VQ, SPAN> Body;
  typedef ExactTokens<T, DK, DV> Exact;
  static constant constexpr const uint WIDTH = DK > DV ? DK : DV;
  static constant constexpr const uint KEY_DIM = DK;
  static constant constexpr const uint VALUE_DIM = DV;
  static constant constexpr const uint TOKENS = Steps<S>::TOKENS;
  static constant constexpr const uint ROOM = Steps<S>::ROOM;
  static constant constexpr const uint SCALES = 2 * TOKENS + (SPAN > 0 ? DK : 0);

  simdgroup_float8x8 q[DK / 8], o[DV / 8];
  // Of this lane: its row of the matrices and the first of its two columns; the query of the row, what it summed, and its
  // product with K's mean.
  uint row, column;
  uint head, query;
  float top, sum, product;

  inline void begin(uint first_head, uint own_row, uint queries, uint lane) thread {
    row = (lane / 16) * 4 + lane / 2 % 4;
    column = lane / 8 % 2 * 4 + lane % 2 * 2;
    head = first_head + own_row / queries;
    query = own_row % queries;
    top = MLX_ROTOR_UNSEEN;
    sum = product = 0;
    MLX_ROTOR_UNROLL
    for (uint d = 0; d < DV / 8; ++d) {
      o[d] = simdgroup_float8x8(0.0f);
    }
  }

  // Takes the row's query, elements `step` apart, times `factor`.
  template <typename Q>
  inline void load_query(const device Q *source, long step, float factor) thread {
    MLX_ROTOR_UNROLL
    for (uint k = 0; k < DK / 8; ++k) {
      q[k].thread_elements()[0] = float(source[long(8 * k + column) * step]) * factor;
      q[k].thread_elements()[1] = float(source[long(8 * k + column + 1) * step]) * factor;
    }
  }

  // Takes in TOKENS tokens from `first` on. Collective over the threadgroup.
  template <typename Source, typename Mask, typename MaskStrides>
  inline void take(
      thread const Source &source,
      thread const Tokens &tokens,
      int first,
      Mask mask,
      MaskStrides mask_strides,
      uint batch,
      threadgroup typename Source::Staged *stage,
      threadgroup float *scales,
      uint thread_index) thread {
    source.stage_keys(first, stage, scales, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (source.fresh(first)) {
      const threadgroup float *mean = source.mean(scales);
      product = 0;
      MLX_ROTOR_UNROLL
      for (uint k = 0; k < DK / 8; ++k) {
        product = fma(q[k].thread_elements()[0], mean[8 * k + column], product);
        product = fma(q[k].thread_elements()[1], mean[8 * k + column + 1], product);
      }
      product += simd_shuffle_xor(product, ushort(1));
      product += simd_shuffle_xor(product, ushort(8));
    }
    simdgroup_float8x8 s[TOKENS / 8];
    MLX_ROTOR_UNROLL
    for (uint n = 0; n < TOKENS / 8; ++n) {
      s[n] = simdgroup_float8x8(0.0f);
    }
    MLX_ROTOR_UNROLL
    for (uint k = 0; k < DK / 8; ++k) {
      MLX_ROTOR_UNROLL
      for (uint n = 0; n < TOKENS / 8; ++n) {
        simdgroup_float8x8 key;
        const threadgroup typename Source::Staged *at = stage + (8 * k + row) * ROOM + 8 * n + column;
        key.thread_elements()[0] = float(at[0]);
        key.thread_elements()[1] = float(at[1]);
        simdgroup_multiply_accumulate(s[n], q[k], key, s[n]);
      }
    }
    float highest = top;
    MLX_ROTOR_UNROLL
    for (uint n = 0; n < TOKENS / 8; ++n) {
      MLX_ROTOR_UNROLL
      for (uint e = 0; e < 2; ++e) {
        const uint i = 8 * n + column + e;
        const int token = first + int(i);
        float score = MLX_ROTOR_UNSEEN;
        if (token < source.count && source.seen(tokens, int(query), token)) {
          score = masked<MASK>(
              source.score(s[n].thread_elements()[e], product, scales, i), mask, mask_strides, batch, head, query,
              source.slot(token));
        }
        s[n].thread_elements()[e] = score;
        highest = fmax(highest, score);
      }
    }
    highest = fmax(highest, simd_shuffle_xor(highest, ushort(1)));
    highest = fmax(highest, simd_shuffle_xor(highest, ushort(8)));
    const float keep = exp2(top - highest);
    top = highest;
    sum *= keep;
    MLX_ROTOR_UNROLL
    for (uint n = 0; n < TOKENS / 8; ++n) {
      MLX_ROTOR_UNROLL
      for (uint e = 0; e < 2; ++e) {
        const float score = s[n].thread_elements()[e];
        const float weight = score > MLX_ROTOR_UNSEEN ? exp2(score - top) : 0.0f;
        sum += weight;
        s[n].thread_elements()[e] = weight * source.value_scale(scales, 8 * n + column + e);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    source.stage_values(first, stage, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MLX_ROTOR_UNROLL
    for (uint d = 0; d < DV / 8; ++d) {
      o[d].thread_elements()[0] *= keep;
      o[d].thread_elements()[1] *= keep;
      MLX_ROTOR_UNROLL
      for (uint n = 0; n < TOKENS / 8; ++n) {
        simdgroup_float8x8 value;
        const threadgroup typename Source::Staged *at = stage + (8 * d + column) * ROOM + 8 * n + row;
        value.thread_elements()[0] = float(at[0]);
        value.thread_elements()[1] = float(at[ROOM]);
        simdgroup_multiply_accumulate(o[d], s[n], value, o[d]);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }

  // Writes the row's sums to out and its statistics. Collective, though only lanes of `real` rows write.
  inline void finish(device float *out, device float *stats, bool real) thread {
    sum += simd_shuffle_xor(sum, ushort(1));
    sum += simd_shuffle_xor(sum, ushort(8));
    if (real) {
      MLX_ROTOR_UNROLL
      for (uint d = 0; d < DV / 8; ++d) {
        out[8 * d + column] = o[d].thread_elements()[0];
        out[8 * d + column + 1] = o[d].thread_elements()[1];
      }
      if (column == 0) {
        stats[0] = top;
        stats[1] = sum;
      }
    }
  }
};

// rotated: [B, Hq, L, DK] float, the queries in the order K's levels come in, times `factor`; q: the same as they are,
// with strides. The rest, and out: [B, Hkv, rows, splits, DV], stats: [..., 2], as in decode.h, rows of a KV head head-
// major. The grid is (128 splits, Hkv · row blocks, B) threads.
template <
    typename P,
    typename QStrides,
    typename Shape,
    typename Strides,
    typename Mask,
    typename MaskStrides,
    typename Lengths,
    typename Sizes>
static inline void prefill(
    const device float *rotated,
    const device typename P::Element *q,
    QStrides q_strides,
    float factor,
    const device uint *k_tiles,
    Shape k_shape,
    const device half *k_scale,
    const device uint *v_tiles,
    Shape v_shape,
    const device half *v_scale,
    const device half *k_mean,
    int groups,
    const device typename P::Element *sink_k,
    Strides sink_k_strides,
    const device typename P::Element *sink_v,
    Strides sink_v_strides,
    const device typename P::Element *recent_k,
    Strides recent_k_strides,
    const device typename P::Element *recent_v,
    Strides recent_v_strides,
    Mask mask,
    MaskStrides mask_strides,
    Lengths lengths,
    Sizes sizes,
    device float *out,
    device float *stats,
    threadgroup typename P::Staged *stage,
    threadgroup float *scales,
    uint3 group,
    uint thread_index,
    uint lane) {
  const Tokens tokens = tokens_of(lengths, sizes, group.z);
  const uint queries = uint(sizes[0]), heads = uint(sizes[1]), rows = queries * heads;
  const uint blocks = (rows + MLX_ROTOR_PREFILL_ROWS - 1) / MLX_ROTOR_PREFILL_ROWS;
  const uint kv_head = group.y / blocks, first_row = group.y % blocks * MLX_ROTOR_PREFILL_ROWS;
  const uint last_row = min(first_row + MLX_ROTOR_PREFILL_ROWS, rows) - 1;
  const uint kv_heads = uint(k_shape[1]), body_splits = uint(sizes[2]), splits = body_splits + exact_splits(sizes);
  const long head = long(group.z) * kv_heads + kv_head;
  const bool one_head = first_row / queries == last_row / queries;
  const int2 span =
      tokens.span(one_head ? int(first_row % queries) : 0, one_head ? int(last_row % queries) : int(queries) - 1);

  P work;
  // Rows behind the last compute its, and write nothing.
  const uint wanted = first_row + thread_index / 32 * 8 + (lane / 16) * 4 + lane / 2 % 4;
  const uint row = min(wanted, last_row);
  work.begin(kv_head * heads, row, queries, lane);
  if (group.x == body_splits) {
    work.load_query(
        q + long(group.z) * q_strides[0] + long(work.head) * q_strides[1] + long(work.query) * q_strides[2],
        long(q_strides[3]), factor);
    typename P::Exact exact;
    exact.keys = exact_rows(sink_k, sink_k_strides, recent_k, recent_k_strides, group.z, kv_head);
    exact.values = exact_rows(sink_v, sink_v_strides, recent_v, recent_v_strides, group.z, kv_head);
    exact.tokens = tokens;
    exact.count = tokens.sinks + tokens.recent;
    for (int first = 0; first < exact.count; first += int(P::TOKENS)) {
      const int last = min(first + int(P::TOKENS), exact.count) - 1;
      if ((exact.position(last) >= span.x || first < tokens.kept) && exact.position(first) < span.y) {
        work.take(
            exact, tokens, first, mask, mask_strides, group.z, (threadgroup typename P::Element *)stage, scales,
            thread_index);
      }
    }
  } else {
    work.load_query(rotated + (head * rows + row) * P::KEY_DIM, 1, 1.0f);
    typename P::Body body;
    body.k_tiles = k_tiles + head * k_shape[2] * P::Keys::TILE_WORDS;
    body.v_tiles = v_tiles + head * v_shape[2] * P::Values::TILE_WORDS;
    body.k_scale = k_scale + head * k_shape[2] * MLX_ROTOR_TILE;
    body.v_scale = v_scale + head * v_shape[2] * MLX_ROTOR_TILE;
    body.count = tokens.body;
    body.k_mean = k_mean + head * groups * P::KEY_DIM;
    body.first_position = tokens.before;
    body.first_slot = tokens.body_slot;
    // The block's tiles, in equal parts.
    const int stop = min(tokens.body, span.y - tokens.before);
    const int first_tile = max(0, span.x - tokens.before) / MLX_ROTOR_TILE;
    const int tiles = max(0, (stop + MLX_ROTOR_TILE - 1) / MLX_ROTOR_TILE - first_tile);
    const int each = (tiles + int(body_splits) - 1) / int(body_splits);
    body.first_token = (first_tile + int(group.x) * each) * MLX_ROTOR_TILE;
    const int end = min(stop, body.first_token + each * MLX_ROTOR_TILE);
    for (int first = body.first_token; first < end; first += int(P::TOKENS)) {
      work.take(body, tokens, first, mask, mask_strides, group.z, stage, scales, thread_index);
    }
  }
  const long at = (head * rows + row) * splits + group.x;
  work.finish(out + at * P::VALUE_DIM, stats + 2 * at, wanted == row);
}

#endif
