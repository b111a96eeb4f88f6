// Tokens kept as they came, in two arrays, sink tokens and recent tokens: [B, H, n, D] with strides, the elements of a
// token together.

#ifndef MLX_ROTOR_ATTENTION_EXACT_H
#define MLX_ROTOR_ATTENTION_EXACT_H

#include "rows.h"

// One KV head's exact tokens of K or V: token i is a sink token below `sinks`, a recent one from there.
template <typename T>
struct ExactRows {
  const device T *sink;
  const device T *recent;
  long sink_step, recent_step;

  // Copies `width` coordinates from `first` of 32 tokens from `index` to stage, `room` apart; zeros behind the last.
  inline void stage_rows(
      thread const Tokens &tokens, int index, uint first, uint width, threadgroup T *stage, uint room, uint lane) const thread {
    for (int t = 0; t < MLX_ROTOR_TILE; ++t) {
      const int own = index + t;
      const bool is_sink = own < tokens.sinks;
      const device T *row = is_sink ? sink + own * sink_step : recent + (own - tokens.sinks) * recent_step;
      for (uint e = lane; e < width; e += 32) {
        stage[uint(t) * room + e] = own < tokens.sinks + tokens.recent ? row[first + e] : T(0.0f);
      }
    }
  }
};

// The rows of head `head` of batch row `batch`.
template <typename T, typename SinkStrides, typename RecentStrides>
static inline ExactRows<T> exact_rows(
    const device T *sink,
    SinkStrides sink_strides,
    const device T *recent,
    RecentStrides recent_strides,
    uint batch,
    uint head) {
  ExactRows<T> rows;
  rows.sink = sink + long(batch) * sink_strides[0] + long(head) * sink_strides[1];
  rows.recent = recent + long(batch) * recent_strides[0] + long(head) * recent_strides[1];
  rows.sink_step = sink_strides[2];
  rows.recent_step = recent_strides[2];
  return rows;
}

#endif
