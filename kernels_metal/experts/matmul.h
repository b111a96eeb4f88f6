// The product of many rows with one packed matrix.

#ifndef MLX_ROTOR_EXPERTS_MATMUL_H
#define MLX_ROTOR_EXPERTS_MATMUL_H

#include "tile.h"

// x: [rows, columns]; codes, first, second: the weights [width, columns]; out: [rows, width]; bias: [width], read where
// BIASED. The grid is (128 · column blocks, row blocks, 1) threads.
template <typename P, bool BIASED, typename S, typename Bias>
static inline void matmul_tiled(
    const device typename P::Element *x,
    uint rows,
    uint columns,
    const device uint *codes,
    const device S *first,
    const device S *second,
    uint width,
    Bias bias,
    device typename P::Element *out,
    threadgroup typename P::Staged *stage,
    uint3 group,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  const uint begin = group.y * P::ROWS, end = min(begin + P::ROWS, rows);
  const uint n = group.x * MLX_ROTOR_TILE_COLUMNS;
  P tile;
  tile.begin(simdgroup, lane);
  // Threads behind the last row of weights expand it, for nobody.
  const typename P::Weights own =
      P::Weights::at(codes, first, second, long(min(P::expanded(n, thread_index), width - 1)), columns);
  tile.multiply(x, InOrder(), columns, begin, end, own, stage, thread_index);
  tile.template write<BIASED>(out, InOrder(), width, n, begin, end, bias, 0);
}

#endif
