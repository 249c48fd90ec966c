// What the attention kernels are told about a call. Nothing here depends on the instruction set.
#pragma once
#include <cstdint>

#include "storage.h"

namespace s2s {

inline constexpr int64_t attention_block = 64;           // keys handled together
inline constexpr int64_t attention_decode_chunk = 1024;  // keys of one query that one task streams through

enum class FloatType { float64, float32, bfloat16, float16 };

// One element of the batch: where its queries and keys begin, how many are present, how many rows results have for it, and the key
// at which query 0 stands.
struct AttentionSpan {
  int64_t query_begin, queries, query_rows, key_begin, keys, key_rows, diagonal;
};

template <class S>
struct AttentionCall {
  int64_t batch, heads, kv_heads, time, source, width, value_width;  // of packed sequences, time and source are the longest one's
  int64_t least_time, least_source;                                  // the least queries and keys that are present of an element
  const AttentionSpan* spans;
  bool packed;  // all sequences lie one after another: (T of all, H, D), of stride 0 over the batch
  const S *query, *key, *value;
  int64_t query_stride[4], key_stride[4], value_stride[4];
  // (B, H, T, S), of stride 0 where they are broadcast.
  const uint8_t* mask;
  int64_t mask_stride[4];
  const void* bias;
  FloatType bias_type;
  int64_t bias_stride[4];
  const S* slopes;  // (B, H)
  int64_t slope_stride[2];
  int64_t left, right;    // what a query sees beside its diagonal
  double scale, softcap;  // a softcap of 0 is none
  bool dropout;
  uint64_t threshold;
  double kept;  // what a weight that survives dropout is multiplied by
  int64_t seed0, seed1;
  S* out;                 // (B, H, T, Dv)
  int64_t out_stride[3];  // the last dimension is contiguous
  compute_t<S>* lse;      // (B, H, T), contiguous; (H, T of all) where sequences are packed
  int64_t lse_stride[2];
  // For backward, or null: the largest score and 1 / (the sum of exponentials of scores less it), which say more than lse where scores are
  // large; and out before it was rounded to 16 bits. Laid out as lse and as out.
  compute_t<S>*peaks, *shares, *wide_out;

  // Where the first query of a head stands among all rows of lse, as dropout counts them too.
  int64_t first_row(int64_t b, int64_t h) const { return b * lse_stride[0] + h * lse_stride[1] + spans[b].query_begin; }
  int64_t all_rows() const { return (packed ? 1 : batch) * heads * lse_stride[1]; }
  // How far behind a row of keys or values, in elements, is the one that is asked for when it is read: where they come from far away, the
  // processor itself looks no further than a page. 0: none, since a head's lie near.
  int64_t next(const int64_t* stride) const {
    constexpr int64_t near = 1 << 20;
    return source * (width + value_width) * static_cast<int64_t>(sizeof(S)) > near ? attention_block * stride[2] : 0;
  }
};

template <class S>
struct AttentionGradients {
  const S* grad_out;  // (B, H, T, Dv)
  int64_t grad_out_stride[4];
  const compute_t<S>* grad_lse;  // (B, H, T) or null
  int64_t grad_lse_stride[3];
  // Contiguous, with the layout of their inputs' sizes; null where they are not wanted.
  S *query, *key, *value;
  int64_t query_stride[2], key_stride[2], value_stride[2];  // of the batch and the heads
  int64_t query_row, key_row, value_row;
  // Sums, starting at 0, with bias's sizes and strides of 0 where it is broadcast. Those of many terms are doubles, since a chain of floats
  // is less exact than eager torch's pairwise sums; the other pointer is null.
  compute_t<S>* bias;
  double* long_bias;
  int64_t bias_stride[4];
  double* slopes;      // (parts, B, H)
  double* slope_rows;  // (parts, all rows of lse, 2), beside slopes: a row's sums of gradients of scores, and of weights times distances
  // The keys are dealt to parts, which share no result but the gradient of queries: of that each has sums of its own.
  int64_t parts;
  compute_t<S>* query_parts;  // (parts, all rows of lse, D rounded up to whole vectors); null if there is but one part
};

}  // namespace s2s
