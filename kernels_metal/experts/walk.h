// A simdgroup's way through rows of packed weights: LANES lanes share a row, so that a set of 32 / LANES rows is done at
// a time, and a lane takes every LANES-th block of 32 weights of its row.
//
// What stands beside the codes of a set is staged as floats. Codes that do not come in 1, 2, 4 or 8 bits are staged too,
// as a lane's block of them is not what one access loads. All of it is read once, in order, each access within one line.
// x is staged in blocks of 32 floats, each with its sum behind it, blocks four banks apart.
//
// A block of 8-bit codes is two loads of 16 bytes. Neighbours in memory are then neighbouring lanes' only if a lane's
// block is SPLIT: one half is from the first half of what the lanes have of a row at a time, one from the second.

#ifndef MLX_ROTOR_EXPERTS_WALK_H
#define MLX_ROTOR_EXPERTS_WALK_H

#include "../weight/codes.h"

// Floats from one staged block of x to the next, and where its sum is, or those of its halves.
#define MLX_ROTOR_BLOCK 36
#define MLX_ROTOR_BLOCK_SUM 32

// Which sums of staged x a kernel takes.
#define MLX_ROTOR_NO_SUM 0
#define MLX_ROTOR_SUM 1
#define MLX_ROTOR_SUMS_OF_HALVES 2

// The sum over the LANES lanes of a row, on all of them. Collective over a simdgroup.
template <uint LANES>
static inline float sum_of_row(float mine) {
  if (LANES == 32) {
    return simd_sum(mine);
  }
  MLX_ROTOR_UNROLL
  for (uint distance = 1; distance < LANES; distance *= 2) {
    mine += simd_shuffle_xor(mine, ushort(distance));
  }
  return mine;
}

// Floats that `columns` staged columns of x take.
static inline constexpr uint column_room(uint columns) {
  return columns / 32 * MLX_ROTOR_BLOCK;
}

// Stages `columns` of x, a multiple of 32. Collective over a simdgroup; simdgroups take turns; a barrier is the caller's.
template <uint SUMS, typename T>
static inline void
stage_columns(const device T *x, uint columns, threadgroup float *staged, uint simdgroup, uint simds, uint lane) {
  for (uint block = simdgroup; block < columns / 32; block += simds) {
    const float value = float(x[block * 32 + lane]);
    staged[block * MLX_ROTOR_BLOCK + lane] = value;
    if (SUMS == MLX_ROTOR_SUM) {
      const float sum = simd_sum(value);
      if (lane == 0) {
        staged[block * MLX_ROTOR_BLOCK + MLX_ROTOR_BLOCK_SUM] = sum;
      }
    } else if (SUMS == MLX_ROTOR_SUMS_OF_HALVES) {
      const float sum = sum_of_row<16>(value);
      if (lane % 16 == 0) {
        staged[block * MLX_ROTOR_BLOCK + MLX_ROTOR_BLOCK_SUM + lane / 16] = sum;
      }
    }
  }
}

// Copies `count` elements from `at` on, at most MOST, lane 0 from a multiple of 32: an access lies within one line.
// EVEN: `at` and `count`, which is MOST, are such multiples.
template <uint MOST, bool EVEN, typename From, typename To>
static inline void stage_run(const device From *from, uint at, uint count, threadgroup To *to, uint lane) {
  if (EVEN) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < MOST; i += 32) {
      to[i + lane] = To(from[at + i + lane]);
    }
  } else {
    const uint own = lane - (at & 31u);
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < MOST + 31; i += 32) {
      if (own + i < count) {
        to[own + i] = To(from[at + own + i]);
      }
    }
  }
}

// Rows of format W, N in a matrix, of COLUMNS weights, PANEL of them at a time: all, or a multiple of 256.
// Offsets are 32 bits: arrays of fewer than 2^32 elements.
template <typename W, uint N, uint COLUMNS, uint PANEL, uint LANES, bool SPLIT_ = W::BITS == 8>
struct Walk {
  typedef typename W::Element S;
  static constant constexpr const uint ROWS = 32 / LANES, BITS = W::BITS;
  static constant constexpr const bool STAGED = BITS != 1 && BITS != 2 && BITS != 4 && BITS != 8;
  static constant constexpr const uint FIRST = W::first_count(PANEL), SECOND = W::second_count(PANEL);
  static constant constexpr const uint WORDS = PANEL / 32 * BITS;
  // Elements of a row.
  static constant constexpr const uint ROW_FIRST = W::first_count(COLUMNS), ROW_SECOND = W::second_count(COLUMNS);
  static constant constexpr const uint ROW_WORDS = COLUMNS / 32 * BITS;
  // Room of a simdgroup in threadgroup memory: floats, words of codes and of tables.
  static constant constexpr const uint FLOATS = ROWS * (FIRST + SECOND), CODES = STAGED ? ROWS * WORDS : 1;
  static constant constexpr const uint TABLES = 1024 / W::GROUP * W::TABLE, CODES_AND_TABLES = CODES + TABLES;
  static_assert(W::TABLE == 0 || LANES * 32 % W::GROUP == 0, "whole groups to the lanes of a row");
  static constant constexpr const bool SPLIT = SPLIT_;
  static constant constexpr const uint SUMS =
      !W::SUMMED ? MLX_ROTOR_NO_SUM : SPLIT ? MLX_ROTOR_SUMS_OF_HALVES : MLX_ROTOR_SUM;
  // Whole rows, and always as many; blocks that a lane has of them, and whether all lanes have as many.
  static constant constexpr const bool WHOLE = PANEL == COLUMNS, FULL = WHOLE && N % ROWS == 0;
  static constant constexpr const uint BLOCKS = (PANEL / 32 + LANES - 1) / LANES;
  static constant constexpr const bool ALL = WHOLE && PANEL / 32 % LANES == 0;

  const device uint *codes;
  const device S *first;
  const device S *second;
  threadgroup float *floats;
  threadgroup uint *words;
  // Elements before the first row, of a simdgroup's sets.
  uint codes_at, first_at, second_at;
  // The lane, its row in a set, its first block.
  uint lane, own, block;

  // Sets from row `row` of all experts' rows on. `floats` and `words` are all simdgroups'.
  inline void begin(
      const device uint *all_codes,
      const device S *all_first,
      const device S *all_second,
      uint row,
      threadgroup float *own_floats,
      threadgroup uint *own_words,
      uint lane_index) thread {
    codes = all_codes;
    first = all_first;
    second = all_second;
    floats = own_floats;
    words = own_words;
    codes_at = row * ROW_WORDS;
    first_at = row * ROW_FIRST;
    second_at = row * ROW_SECOND;
    lane = lane_index;
    own = lane_index / LANES;
    block = lane_index % LANES;
  }

  // Stages `rows` rows of set `set`, columns `start` to `start` + `columns`. Collective over a simdgroup.
  inline void stage(uint set, uint rows, uint start, uint columns) const thread {
    // Rows of one panel lie behind each other; parts of rows do not.
    const uint runs = WHOLE ? 1 : rows, each = FULL ? ROWS : WHOLE ? rows : 1;
    constexpr uint most = WHOLE ? ROWS : 1;
    for (uint r = 0; r < runs; ++r) {
      const uint row = set * ROWS + r;
      stage_run<most * FIRST, FULL && ROWS * ROW_FIRST % 32 == 0>(
          first, first_at + row * ROW_FIRST + W::first_count(start), each * W::first_count(columns), floats + r * FIRST,
          lane);
      if (SECOND > 0) {
        stage_run<most * SECOND, FULL && ROWS * ROW_SECOND % 32 == 0>(
            second, second_at + row * ROW_SECOND + W::second_count(start), each * W::second_count(columns),
            floats + ROWS * FIRST + r * SECOND, lane);
      }
      if (STAGED) {
        stage_run<most * WORDS, FULL && ROWS * ROW_WORDS % 32 == 0>(
            codes, codes_at + row * ROW_WORDS + start / 32 * BITS, each * (columns / 32 * BITS), words + r * WORDS,
            lane);
      }
    }
  }

  // Whether this lane has an i-th block in a set of `rows` rows and a panel of `columns`.
  inline bool has(uint i, uint rows, uint columns) const thread {
    return (N % ROWS == 0 || own < rows) && (ALL || block + i * LANES < columns / 32);
  }

  // Columns of a panel of `columns` before the first half of the lane's i-th block, and from there to the second.
  inline uint column(uint i) const thread {
    return (SPLIT ? 16 : 32) * block + i * (LANES * 32);
  }
  static inline uint apart(uint i, uint columns) {
    return !SPLIT ? 16 : 16 * (ALL ? LANES : min(LANES, columns / 32 - i * LANES));
  }

  // The words of the lane's i-th block.
  inline void load(uint set, uint start, uint columns, uint i, thread uint (&word)[BITS]) const thread {
    if (STAGED) {
      const threadgroup uint *from = words + own * WORDS + block * BITS + i * (LANES * BITS);
      MLX_ROTOR_UNROLL
      for (uint b = 0; b < BITS; ++b) {
        word[b] = from[b];
      }
    } else {
      const uint at = codes_at + own * ROW_WORDS + start / 32 * BITS + set * (ROWS * ROW_WORDS);
      const device uint *from = codes + at + (SPLIT ? 4 : BITS) * block + i * (LANES * BITS);
      if (SPLIT) {
        load_four(from, word, 0);
        load_four(from + apart(i, columns) / 4, word, BITS / 2);
      } else {
        load_words(from, word);
      }
    }
  }

  // Where what stands beside the codes of the lane's i-th block begins in a staged row of `count` such floats.
  inline uint beside(uint i, uint count) const thread {
    const uint each = count * W::GROUP / PANEL;
    if (LANES * 32 % W::GROUP == 0) {
      return column(0) / W::GROUP * each + i * (LANES * 32 / W::GROUP * each);
    }
    return column(i) / W::GROUP * each;
  }

  // The table of the group that the lane's block is in, of all lanes' groups.
  inline threadgroup uint *table() const thread {
    return words + CODES + lane * 32 / W::GROUP * W::TABLE;
  }

  // Makes the tables for all lanes' i-th blocks; `here`: the lane has one. Collective over a simdgroup.
  inline void prepare(uint i, bool here) const thread {
    if (W::TABLE > 0) {
      simdgroup_barrier(mem_flags::mem_threadgroup);
      if (here) {
        W::build(floats + own * FIRST + beside(i, FIRST), table(), lane % (W::GROUP / 32), W::GROUP / 32);
      }
      simdgroup_barrier(mem_flags::mem_threadgroup);
    }
  }

  // What the weights of the lane's i-th block are multiplied with.
  inline void numbers(const thread uint (&word)[BITS], uint i, thread float (&n)[32]) const thread {
    W::numbers(word, floats + own * FIRST + beside(i, FIRST), table(), n);
  }

  // What they are multiplied with, of the panel of x at `staged`; its sum, or those of its halves, where they are taken.
  template <uint TAKEN>
  inline float2
  load_columns(const threadgroup float *staged, uint i, uint columns, thread float (&x)[32]) const thread {
    if (!SPLIT) {
      const threadgroup float *from = staged + block * MLX_ROTOR_BLOCK + i * (LANES * MLX_ROTOR_BLOCK);
      load_half(from, x, 0);
      load_half(from + 16, x, 16);
      return float2(TAKEN == MLX_ROTOR_NO_SUM ? 0.0f : from[MLX_ROTOR_BLOCK_SUM], 0.0f);
    }
    const uint low = column(i), high = low + apart(i, columns);
    const threadgroup float *first_block = staged + low / 32 * MLX_ROTOR_BLOCK;
    const threadgroup float *second_block = staged + high / 32 * MLX_ROTOR_BLOCK;
    load_half(first_block + low % 32, x, 0);
    load_half(second_block + high % 32, x, 16);
    if (TAKEN == MLX_ROTOR_NO_SUM) {
      return float2(0.0f);
    }
    return float2(
        first_block[MLX_ROTOR_BLOCK_SUM + low / 16 % 2], second_block[MLX_ROTOR_BLOCK_SUM + high / 16 % 2]);
  }

  static inline void load_half(const threadgroup float *staged, thread float (&x)[32], uint at) {
    MLX_ROTOR_UNROLL
    for (uint i = 0; i < 16; i += 4) {
      const float4 four = *(const threadgroup float4 *)(staged + i);
      x[at + i] = four.x;
      x[at + i + 1] = four.y;
      x[at + i + 2] = four.z;
      x[at + i + 3] = four.w;
    }
  }

  // The product of both.
  inline float dot(const thread float (&n)[32], uint i, uint columns, const thread float (&x)[32], float2 sum)
      const thread {
    float low = n[0] * x[0], high = n[16] * x[16];
    MLX_ROTOR_UNROLL
    for (uint e = 1; e < 16; ++e) {
      low = fma(n[e], x[e], low);
      high = fma(n[16 + e], x[16 + e], high);
    }
    const threadgroup float *own_first = floats + own * FIRST;
    const threadgroup float *own_second = floats + ROWS * FIRST + own * SECOND;
    if (!SPLIT) {
      return W::finish(own_first + beside(i, FIRST), own_second + beside(i, SECOND), low, high, sum.x);
    }
    const uint one = column(i) / W::GROUP, other = (column(i) + apart(i, columns)) / W::GROUP;
    const uint first_each = FIRST * W::GROUP / PANEL, second_each = SECOND * W::GROUP / PANEL;
    return W::finish(own_first + one * first_each, own_second + one * second_each, low, 0.0f, sum.x) +
           W::finish(own_first + other * first_each, own_second + other * second_each, 0.0f, high, sum.y);
  }
};

#endif
