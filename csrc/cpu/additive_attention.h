// What the binding of additive attention and its kernels (one copy per instruction set) say to each other. No torch.
#pragma once
#include <cstdint>

#include "storage.h"

namespace s2s {

inline constexpr int64_t key_block = 128;  // keys side by side in a table: a multiple of every instruction set's vector
inline constexpr int64_t query_rows = 24;  // rows of queries that share a pass over the keys
inline constexpr int64_t unit_pad = 16;    // keeps the rows of a table out of one cache set

constexpr int64_t even(int64_t n) { return n + n % 2; }

// Rows of C with unit stride within a row.
template <class C>
struct Rows {
  C* data = nullptr;
  int64_t batch = 0, row = 0;
  C* at(int64_t b, int64_t i) const { return data + b * batch + i * row; }
};

// What is the same for all tasks of a call. C is the type computed in.
template <class C>
struct AdditiveAttention {
  int64_t batch, rows, keys, width, values;  // B, T, S, A, Dv
  Rows<const C> query, key, value;
  const C* weight;         // (A)
  const int64_t* lengths;  // (B) or null
  const C* table;          // (B, blocks, even(A), 2, key_block): expm1(2k), then expm1(-2k); null where every key is an outlier
  const uint8_t* outlier;  // (B, S): the key isn't in the table; its scores take tanh itself
  int64_t table_batch, outlier_batch;
  const uint8_t* mask;  // (B, T, S) in bytes, or null
  int64_t mask_batch, mask_row, mask_key;
  const uint8_t* hidden_value;  // (B, S): the value isn't finite, and a mask is given; null: none is
  bool dropout;
  int64_t seed[2];
  uint64_t threshold;
  C keep_scale;

  int64_t length(int64_t b) const { return lengths ? lengths[b] : keys; }
  int64_t blocks() const { return (keys + key_block - 1) / key_block; }
  const C* block(int64_t b, int64_t at) const { return table + b * table_batch + at * block_size(); }
  int64_t block_size() const { return even(width) * 2 * key_block; }
};

// The gradient of one task: rows [begin, end) of batch entry b, added in ascending order.
template <class C>
struct AdditiveAttentionGradient {
  Rows<const C> grad_context;      // null where only the weights have a gradient
  Rows<const C> grad_weights;      // null where only the context has one
  const uint8_t* hidden_gradient;  // (B, T): the row of grad_context isn't finite, and a mask is given; null: none is
  const C* statistics;             // (B, T, 2)
  bool need_scores, need_value;    // gradients of query, key or weight; of value
};

// A tile of queries, prepared: rows of `stride` elements, a unit of padding where the width is odd.
template <class C>
struct QueryTable {
  int64_t stride;
  C *factor, *slope, *offset, *weighted_slope, *weighted_offset;  // A, s A, s expm1(2q), and the last two times the weight
  int32_t* side;                                                  // 0, or key_block where q > 0: which half of the table
  C scale;                                                        // a power of two by which the weights were divided
};

// What one thread works in.
template <class C>
struct AdditiveScratch {
  QueryTable<C> queries;
  int64_t scores_row;    // of the tiles (query_rows, scores_row): at least S, in whole blocks of keys
  C *scores, *gradient;  // the second for backward, and scratch while scores are made
  C* factors;            // (scores_row) of dropout
  C* rows;               // (query_rows, max(A, Dv))
  C* line;               // (3 A), for backward only
  C* product;            // the workspace of gemm
};

}  // namespace s2s
