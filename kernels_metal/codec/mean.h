// The means that were subtracted from vectors before they were encoded: float16 rows of DIM in the codec's basis, or nothing.
//
// A row is the mean of `span` consecutive tokens, a multiple of the tile's 32: all tokens of a tile have the same one.
// A span of 0 is one row for all.

#ifndef MLX_ROTOR_CODEC_MEAN_H
#define MLX_ROTOR_CODEC_MEAN_H

#include "../common/eight.h"

struct NoMean {
  static constant constexpr const bool HELD = false;

  template <uint DIM>
  inline void stage(threadgroup float *, uint, uint3, uint, uint) const thread {}
};

// rows: [B, H, groups, DIM] with strides; spans: the first token's place, a multiple of 32, and the span.
template <typename Strides, typename Spans>
struct Mean {
  static constant constexpr const bool HELD = true;
  const device half *rows;
  Strides strides;
  Spans spans;

  // Copies the mean of `tile`, counted from the first token, to threadgroup memory, every thread a part; barriers are the
  // caller's. `group` is (any, head, batch).
  template <uint DIM>
  inline void stage(threadgroup float *staged, uint tile, uint3 group, uint thread_index, uint threads) const thread {
    const uint span = uint(spans[1]);
    const uint row = span > 0 ? (uint(spans[0]) + tile * MLX_ROTOR_TILE) / span : 0;
    const device half *mine =
        rows + long(group.z) * strides[0] + long(group.y) * strides[1] + long(row) * strides[2];
    for (uint e = thread_index; e < DIM; e += threads) {
      staged[e] = float(mine[long(e) * strides[3]]);
    }
  }
};

template <typename Strides, typename Spans>
static inline Mean<Strides, Spans> mean_of(const device half *rows, Strides strides, Spans spans) {
  Mean<Strides, Spans> mean;
  mean.rows = rows;
  mean.strides = strides;
  mean.spans = spans;
  return mean;
}

#endif
