// Shared by the attention kernels: the tokens that a query row sees, the running softmax, and partial results.
//
// Scores are in base-2 logarithms: queries come multiplied by scale · log2(e). A split of the sequence leaves, for each
// row, its maximum, its sum of weights and its weighted sum of values; merge.h puts splits together.

#ifndef MLX_ROTOR_ATTENTION_ROWS_H
#define MLX_ROTOR_ATTENTION_ROWS_H

#include "../common/eight.h"

// Scores at or below this are of tokens a row does not see. Finite: infinities are not safe under fast math.
#define MLX_ROTOR_UNSEEN -1e30f
#define MLX_ROTOR_LOG2E 1.44269504f

// Kinds of mask: none, bool (true is seen), additive.
#define MLX_ROTOR_NO_MASK 0
#define MLX_ROTOR_BOOL_MASK 1
#define MLX_ROTOR_ADDED_MASK 2

// One batch row's tokens: sink tokens, then body, then recent ones. Where packed tokens are several segments, a launch's
// body is one of them, and the tokens before and behind it are only counted. Slots count the room of all, in the same
// order: they are a mask's columns.
struct Tokens {
  // before: tokens in front of the body; recent: behind it; kept: first tokens that are seen whatever the window.
  int sinks, before, body, recent, kept;
  int body_slot, recent_slot;
  int queries, window;
  // Tokens behind the last query's own: a long chunk's queries come in pieces.
  int behind;
  bool causal;

  inline int total() const thread {
    return before + body + recent;
  }
  // Query l's own position; below 0 where the batch row is shorter than its queries: it then sees nothing.
  inline int own(int l) const thread {
    return total() - behind - queries + l;
  }
  // Whether query l sees position p, of a token that is no sink token; `sees_any`: of any token.
  inline bool sees(int l, int p) const thread {
    return own(l) >= 0 && (!causal || p <= own(l)) && (window == 0 || p > own(l) - window);
  }
  inline bool sees_any(int l, int p) const thread {
    return sees(l, p) || (p < kept && own(l) >= 0 && (!causal || p <= own(l)));
  }
  // Position and slot of exact token i.
  inline int exact_position(int i) const thread {
    return i < sinks ? i : i - sinks + before + body;
  }
  inline int exact_slot(int i) const thread {
    return i < sinks ? i : i - sinks + recent_slot;
  }
  // Queries l to last see no positions but x .. y - 1, and kept ones.
  inline int2 span(int l, int last) const thread {
    return int2(window == 0 ? 0 : max(0, own(l) - window + 1), causal ? min(total(), own(last) + 1) : total());
  }
  // The first position behind kept ones that any query sees.
  inline int start() const thread {
    return span(0, 0).x;
  }
};

// lengths: [B, 3], sink tokens, body, and all behind the body; sizes: queries, heads a KV head serves, splits of the body,
// window, flags, slots before the body, slots of the body. Flags: 1 for causal, 2 where exact tokens have a split of their
// own behind the body's, 4 where sink tokens are seen whatever the window, 8 where all slots before the body hold tokens and some
// are no sink tokens, 16 times the tokens behind the queries.
template <typename Sizes>
static inline uint exact_splits(Sizes sizes) {
  return uint(sizes[4] >> 1 & 1);
}

template <typename Lengths, typename Sizes>
static inline Tokens tokens_of(Lengths lengths, Sizes sizes, uint row) {
  Tokens t;
  t.sinks = lengths[3 * row];
  t.before = (sizes[4] & 8) != 0 ? sizes[5] : t.sinks;
  t.kept = (sizes[4] & 4) != 0 ? t.sinks : 0;
  t.body = lengths[3 * row + 1];
  t.recent = lengths[3 * row + 2];
  t.queries = sizes[0];
  t.window = sizes[3];
  t.causal = (sizes[4] & 1) != 0;
  t.body_slot = sizes[5];
  t.recent_slot = sizes[5] + sizes[6];
  t.behind = sizes[4] >> 4;
  return t;
}

// The range of body tiles, [x, y), of split `split` of `splits`; tiles that no query sees are left out.
static inline int2 tiles_of(thread const Tokens &tokens, int split, int splits) {
  const int first = max(0, tokens.start() - tokens.before) / MLX_ROTOR_TILE;
  const int last = (tokens.body + MLX_ROTOR_TILE - 1) / MLX_ROTOR_TILE;
  const int each = (max(0, last - first) + splits - 1) / max(1, splits);
  return int2(first + split * each, min(last, first + (split + 1) * each));
}

// The score of a row for the token in `slot`, masked. mask: [B, Hq, L, slots] with strides.
template <int MASK, typename Mask, typename Strides>
static inline float
masked(float score, Mask mask, Strides strides, uint batch, uint head, uint query, int slot) {
  if (MASK == MLX_ROTOR_NO_MASK) {
    return score;
  }
  const auto value = mask
      [long(batch) * strides[0] + long(head) * strides[1] + long(query) * strides[2] + long(slot) * strides[3]];
  if (MASK == MLX_ROTOR_BOOL_MASK) {
    return bool(value) ? score : MLX_ROTOR_UNSEEN;
  }
  return score + float(value) * MLX_ROTOR_LOG2E;
}

// Takes 32 tokens' scores, one a lane, into a row's running maximum `top` and this lane's sum of weights. Returns the
// lane's weight; `keep` is what earlier sums are to be multiplied by. Collective.
static inline float weigh(float score, thread float &top, thread float &sum, thread float &keep) {
  const float next = fmax(top, simd_max(score));
  keep = exp2(top - next);
  top = next;
  const float weight = score > MLX_ROTOR_UNSEEN ? exp2(score - next) : 0.0f;
  sum = fma(sum, keep, weight);
  return weight;
}

#endif
