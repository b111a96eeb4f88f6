// Many rows, each times its own expert's packed matrix, in the order of the experts.

#ifndef MLX_ROTOR_EXPERTS_GATHER_H
#define MLX_ROTOR_EXPERTS_GATHER_H

#include "tile.h"

// As matmul_tiled, with weights [experts, width, columns], bias [experts, width], and indices [rows]: the expert of
// each row, ascending. from [rows] and places [rows]: which row of x it is, and which of out; or InOrder. A
// threadgroup takes the experts that its rows have one after the other; those that none has are not read.
template <typename P, bool BIASED, typename S, typename Bias, typename Indices, typename From, typename To>
static inline void gather_tiled(
    const device typename P::Element *x,
    uint rows,
    uint columns,
    const device uint *codes,
    const device S *first,
    const device S *second,
    uint width,
    Bias bias,
    Indices indices,
    From from,
    To places,
    device typename P::Element *out,
    threadgroup typename P::Staged *stage,
    uint3 group,
    uint thread_index,
    uint simdgroup,
    uint lane) {
  const uint last = min((group.y + 1) * P::ROWS, rows);
  const uint n = group.x * MLX_ROTOR_TILE_COLUMNS;
  P tile;
  tile.begin(simdgroup, lane);
  for (uint begin = group.y * P::ROWS; begin < last;) {
    const uint expert = indices[begin];
    uint end = last;
    for (uint r = begin + lane; r < last; r += 32) {
      end = indices[r] != expert ? min(end, r) : end;
    }
    end = simd_min(end);
    const long base = long(expert) * width;
    const typename P::Weights own =
        P::Weights::at(codes, first, second, base + min(P::expanded(n, thread_index), width - 1), columns);
    tile.multiply(x, from, columns, begin, end, own, stage, thread_index);
    tile.template write<BIASED>(out, places, width, n, begin, end, bias, base);
    begin = end;
  }
}

#endif
