// A tile of a product of many rows with packed weights: 32 rows of the weights, up to 64 of x, with 8 x 8 matrices.
//
// A threadgroup of four simdgroups expands 32 rows of weights, 128 columns at a time, into threadgroup memory, once for
// all its rows of x, which stay where they are: a simdgroup has its own, and a lane takes eight neighbours of one row.
// That is a lane's part of four matrices, if column 2p + e of matrix j is column 8p + 2j + e of 32. The weights are
// staged in that order too, so that a lane's part of four matrices is one vector. Rows of the weights are dealt so that
// a lane's results are neighbours.

#ifndef MLX_ROTOR_EXPERTS_TILE_H
#define MLX_ROTOR_EXPERTS_TILE_H

#include <metal_simdgroup_matrix>
#include "../common/eight.h"

#define MLX_ROTOR_TILE_COLUMNS 32
#define MLX_ROTOR_TILE_STEP 128
// A staged row in vectors of four: its 128 columns and 8 more, so that a matrix's loads meet different banks.
#define MLX_ROTOR_TILE_ROOM 34

// Neighbours in memory, no better aligned than one.
template <typename T, uint COUNT>
struct Neighbours {
  T v[COUNT];
};

// Rows in the order they come in, as a list of them.
struct InOrder {
  inline uint operator[](uint row) const thread {
    return row;
  }
};

// W: a weight format; T: of x and the results; S: of staged weights. WIDE of the four simdgroups stand side by side in
// the rows of x and 4 / WIDE in the columns; each has BANDS bands of 8 rows and WIDE of 8 columns.
// Threadgroup memory: stage [MLX_ROTOR_TILE_COLUMNS · MLX_ROTOR_TILE_ROOM] vectors of four S.
template <typename W, typename T, typename S, uint WIDE, uint BANDS>
struct Tile {
  typedef T Element;
  typedef W Weights;
  typedef vec<S, 4> Staged;
  typedef const device T *Row;
  static constant constexpr const uint ROWS = 8 * WIDE * BANDS;
  static constant constexpr const uint EACH = 2 * WIDE;

  simdgroup_float8x8 sum[BANDS * WIDE];
  // This lane's row of the matrices, the first of its two columns, and the simdgroup's place in rows and columns.
  uint row, column, down, across;

  inline void begin(uint simdgroup, uint lane) thread {
    row = (lane / 16) * 4 + lane / 2 % 4;
    column = lane / 8 % 2 * 4 + lane % 2 * 2;
    down = simdgroup % WIDE;
    across = simdgroup / WIDE;
  }

  // Of 32 rows of weights from `first` on, the one that thread expands.
  static inline uint expanded(uint first, uint thread_index) {
    const uint slot = thread_index / 4;
    return first + 8 * (slot % 8 / 2) + 2 * (slot / 8) + slot % 2;
  }

  static inline void expand(thread const W &weights, uint k, threadgroup Staged *stage, uint thread_index) {
    float w[32];
    threadgroup Staged *to = stage + thread_index / 4 * MLX_ROTOR_TILE_ROOM + thread_index % 4 * 8;
    weights.expand(k, (threadgroup S *)to, w);
    MLX_ROTOR_UNROLL
    for (uint r = 0; r < 8; ++r) {
      const uint i = 8 * (r / 2) + r % 2;
      to[r] = vec<S, 4>(S(w[i]), S(w[i + 2]), S(w[i + 4]), S(w[i + 6]));
    }
  }

  // Adds the products of 32 columns, x from `k` on, for the first COUNT bands.
  template <uint COUNT>
  inline void add(const thread Row (&x)[BANDS], uint k, const threadgroup Staged *stage) thread {
    simdgroup_float8x8 a[4 * COUNT];
    MLX_ROTOR_UNROLL
    for (uint m = 0; m < COUNT; ++m) {
      Neighbours<T, 8> own;
      own = *(const device Neighbours<T, 8> *)(x[m] + k);
      MLX_ROTOR_UNROLL
      for (uint j = 0; j < 4; ++j) {
        a[4 * m + j].thread_elements()[0] = float(own.v[2 * j]);
        a[4 * m + j].thread_elements()[1] = float(own.v[2 * j + 1]);
      }
    }
    MLX_ROTOR_UNROLL
    for (uint f = 0; f < WIDE; ++f) {
      const threadgroup Staged *at = stage + (8 * (across * WIDE + f) + column) * MLX_ROTOR_TILE_ROOM + row;
      const Staged left = at[0], right = at[MLX_ROTOR_TILE_ROOM];
      MLX_ROTOR_UNROLL
      for (uint j = 0; j < 4; ++j) {
        simdgroup_float8x8 b;
        b.thread_elements()[0] = float(left[j]);
        b.thread_elements()[1] = float(right[j]);
        MLX_ROTOR_UNROLL
        for (uint m = 0; m < COUNT; ++m) {
          simdgroup_multiply_accumulate(sum[m * WIDE + f], a[4 * m + j], b, sum[m * WIDE + f]);
        }
      }
    }
  }

  // Rows begin .. end of the list `from`, at most ROWS, of x [.., columns], times 32 rows of weights, of which
  // `weights` is this thread's. Collective over the threadgroup.
  template <typename From>
  inline void multiply(
      const device T *x,
      From from,
      uint columns,
      uint begin,
      uint end,
      thread const W &weights,
      threadgroup Staged *stage,
      uint thread_index) thread {
    Row own[BANDS];
    uint bands = 0;
    MLX_ROTOR_UNROLL
    for (uint m = 0; m < BANDS; ++m) {
      const uint first = begin + 8 * (down + m * WIDE);
      bands += first < end ? 1 : 0;
      // Lanes behind the last row compute its, and write nothing.
      own[m] = x + long(from[min(first + row, end - 1)]) * columns + 4 * column;
      MLX_ROTOR_UNROLL
      for (uint f = 0; f < WIDE; ++f) {
        sum[m * WIDE + f] = simdgroup_float8x8(0.0f);
      }
    }
    for (uint k = 0; k < columns; k += MLX_ROTOR_TILE_STEP) {
      const uint mine = k + thread_index % 4 * 32;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (mine < columns) {
        expand(weights, mine, stage, thread_index);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      const uint parts = min(columns - k, uint(MLX_ROTOR_TILE_STEP)) / 32;
      if (bands == BANDS) {
        for (uint part = 0; part < parts; ++part) {
          add<BANDS>(own, k + 32 * part, stage + 8 * part);
        }
      } else if (bands > 0) {
        for (uint part = 0; part < parts; ++part) {
          add<1>(own, k + 32 * part, stage + 8 * part);
        }
      }
    }
  }

  // Writes the sums to rows begin .. end of the list `places`, to columns from `first` on, of `width`, plus the bias
  // from bias[base] on where BIASED.
  template <bool BIASED, typename To, typename Bias>
  inline void write(
      device T *out, To places, uint width, uint first, uint begin, uint end, Bias bias, long base) thread {
    const uint n = first + 4 * column + across * EACH;
    MLX_ROTOR_UNROLL
    for (uint m = 0; m < BANDS; ++m) {
      const uint r = begin + 8 * (down + m * WIDE) + row;
      if (r < end) {
        device T *to = out + long(places[r]) * width + n;
        Neighbours<T, EACH> own;
        MLX_ROTOR_UNROLL
        for (uint i = 0; i < EACH; ++i) {
          float value = sum[m * WIDE + i / 2].thread_elements()[i % 2];
          if (BIASED) {
            value += n + i < width ? float(bias[base + n + i]) : 0.0f;
          }
          own.v[i] = T(value);
        }
        if (n + EACH <= width) {
          *(device Neighbours<T, EACH> *)to = own;
        } else {
          MLX_ROTOR_UNROLL
          for (uint i = 0; i < EACH; ++i) {
            if (n + i < width) {
              to[i] = own.v[i];
            }
          }
        }
      }
    }
  }
};

#endif
