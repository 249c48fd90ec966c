// What a launch of the persistent recurrences gets: raw pointers in the order of the operators' schemas, and what the kernels make of them.
// Host code. No torch, no CUDA headers.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "recurrence_plan.h"

namespace s2s::persistent {

#include "../cpu/philox_word.h"

// A row of values over time that each unit reads one of at every step, ahead of it.
struct RecurrenceFeed {
  const float* data;  // (B, T, stride), from the unit 0 on
  int64_t stride;
  bool of_width;         // a value for each unit of P, else of H
  bool before;           // of the position before, in the direction of forward
  const float* initial;  // (B, units) or null: before the first
};

// The reciprocal deviation of W_hh h, the mean of an LSTM's new cell and its reciprocal deviation.
enum Scale { scale_hh, mean_c, scale_c, scales_of_row };

struct Recurrence {
  RecurrencePlan plan;
  RecurrenceShape shape;
  int64_t batch, time;
  int hidden, width;  // H and P
  Cell cell;
  bool reverse, training, wide_copies;
  float zoneout_h, zoneout_c;
  uint64_t threshold_h, threshold_c;
  const void* weight_hh;  // (G H, P)
  const void* weight_hr;  // (P, H) or null
  const float* mask;      // (B, P) or null
  const float *norm_hh, *norm_c, *norm_b;
  const int64_t* lengths;
  const bool* reset;  // (B, T)
  const int64_t* seed;
  unsigned char* workspace;
  int64_t normed_row;   // what layer normalisation keeps of a position: the normalised product, gate by gate, then `Scale`s
  const float* scales;  // null, or of the first position, to read ahead
  int normed_feed;      // the first of its feeds
  RecurrenceFeed feeds[most_feeds];
};

struct RecurrenceForward : Recurrence {
  const float *bias_hh, *h0, *c0;
  void *output, *h_n, *c_n;  // (B, T, P), (B, P), (B, H)
  float *gates, *extra, *exact;
  float* normed;  // (B, T, normed_row)
};

struct RecurrenceBackward : Recurrence {
  const float *h0, *c0, *grad_h, *grad_c;
  const float* weight_sums;                                 // (P,) of W_hh over its rows
  const float* normed;                                      // (B, T, normed_row)
  float *grad_inputs, *grad_recurrent, *grad_h0, *grad_c0;  // grad_recurrent: null where it is grad_inputs or made of it afterwards
  float *grad_projected, *grad_norm_c, *grad_norm_b;        // (B, T, P), (B, H), (B, H)
};

// Sizes and options of a call, as the schemas name them.
struct RecurrenceCall {
  int64_t batch, time, hidden, width, cell, operand, reverse, training, normed, projected;
  double zoneout_h, zoneout_c;
};
constexpr int call_sizes = 10;

// Pointers to float32, but those whose type is said; null where an argument is absent.
struct RecurrenceForwardPointers {
  const void *inputs, *weight_hh, *bias_hh, *h0, *c0, *weight_hr, *mask;  // weights: the operand's type
  const void *norm_hh, *norm_c, *norm_b, *lengths, *reset, *seed;
  void *workspace, *output, *h_n, *c_n, *gates, *extra, *exact, *normed;  // output, h_n, c_n: the weights' type
};
struct RecurrenceBackwardPointers {
  const void *grad_output, *grad_h, *grad_c, *weight_hh, *h0, *c0, *weight_hr, *mask, *norm_hh, *norm_c, *norm_b, *lengths, *reset, *seed;
  const void *output, *gates, *extra, *normed, *normed_product, *weight_sums;
  void *workspace, *grad_inputs, *grad_recurrent, *grad_h0, *grad_c0, *grad_projected, *grad_norm_c, *grad_norm_b;
};

// Of a step in either direction: forward reads the input product; backward grad_output, the activated gates, and the cell before (LSTM), or
// W_hn h + b_hn and h before (GRU), or h itself (RNN); after these, under layer normalisation, the normalised product and its own product
// with W_hh.
inline int first_normed_feed(Cell cell) {
  const int gates = static_cast<int>(gates_of(cell));
  return cell == Cell::lstm ? gates + 2 : cell == Cell::gru ? gates + 3 : 2;
}

inline RecurrenceShape shape_of(const RecurrenceCall& c, bool backward) {
  const Cell cell = static_cast<Cell>(c.cell);
  const int gates = static_cast<int>(gates_of(cell)), feeds = first_normed_feed(cell) + (c.normed ? gates + 1 : 0);
  const auto operand = static_cast<Operand>(c.operand);
  return {c.batch, c.hidden, c.width, cell, gates, operand, backward, c.normed != 0, c.projected != 0, backward ? feeds : gates};
}

template <class Arguments, class Pointers>
Arguments common_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const Pointers& from, bool backward) {
  Arguments a{};
  a.plan = plan, a.shape = shape_of(c, backward);
  a.batch = c.batch, a.time = c.time, a.hidden = static_cast<int>(c.hidden), a.width = static_cast<int>(c.width);
  a.cell = static_cast<Cell>(c.cell), a.reverse = c.reverse, a.training = c.training;
  a.zoneout_h = static_cast<float>(c.zoneout_h), a.zoneout_c = static_cast<float>(c.zoneout_c);
  a.threshold_h = philox_threshold(c.zoneout_h), a.threshold_c = philox_threshold(c.zoneout_c);
  a.normed_row = 2 * a.shape.gates * c.hidden + 16, a.normed_feed = first_normed_feed(a.cell);
  a.weight_hh = from.weight_hh, a.weight_hr = from.weight_hr, a.mask = static_cast<const float*>(from.mask);
  a.norm_hh = static_cast<const float*>(from.norm_hh), a.norm_c = static_cast<const float*>(from.norm_c);
  a.norm_b = static_cast<const float*>(from.norm_b);
  a.lengths = static_cast<const int64_t*>(from.lengths), a.reset = static_cast<const bool*>(from.reset);
  a.seed = static_cast<const int64_t*>(from.seed), a.workspace = static_cast<unsigned char*>(from.workspace);
  a.h0 = static_cast<const float*>(from.h0), a.c0 = static_cast<const float*>(from.c0);
  return a;
}

// Whether units can be copied four at a time.
inline void choose_copies(Recurrence& a) {
  a.wide_copies = (a.hidden | a.width | a.plan.units | a.plan.width_units) % 4 == 0;
  for (int i = 0; i < a.shape.feeds; ++i)
    for (const float* data : {a.feeds[i].data, a.feeds[i].initial})
      a.wide_copies = a.wide_copies && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline RecurrenceForward forward_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const RecurrenceForwardPointers& from) {
  auto a = common_arguments<RecurrenceForward>(plan, c, from, false);
  for (int g = 0; g < a.shape.gates; ++g)
    a.feeds[g] = {static_cast<const float*>(from.inputs) + g * c.hidden, a.shape.gates * c.hidden, false, false, nullptr};
  a.bias_hh = static_cast<const float*>(from.bias_hh), a.output = from.output, a.h_n = from.h_n, a.c_n = from.c_n;
  a.gates = static_cast<float*>(from.gates), a.extra = static_cast<float*>(from.extra), a.exact = static_cast<float*>(from.exact);
  a.normed = static_cast<float*>(from.normed);
  choose_copies(a);
  return a;
}

inline RecurrenceBackward backward_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const RecurrenceBackwardPointers& from) {
  auto a = common_arguments<RecurrenceBackward>(plan, c, from, true);
  const auto *gates = static_cast<const float*>(from.gates), *extra = static_cast<const float*>(from.extra);
  const auto* output = static_cast<const float*>(from.output);
  a.normed = static_cast<const float*>(from.normed);
  int count = 0;
  const auto feed = [&](const float* data, int64_t stride, bool of_width = false, bool before = false, const float* initial = nullptr) {
    a.feeds[count++] = {data, stride, of_width, before, initial};
  };
  feed(static_cast<const float*>(from.grad_output), c.width, true);
  if (a.cell == Cell::lstm || a.cell == Cell::gru) {
    for (int g = 0; g < a.shape.gates; ++g) feed(gates + g * c.hidden, a.shape.gates * c.hidden);
    if (a.cell == Cell::gru) feed(extra, c.hidden);
    feed(a.cell == Cell::lstm ? extra : output, c.hidden, false, true, a.cell == Cell::lstm ? a.c0 : a.h0);
  } else {
    feed(gates ? gates : output, c.hidden);
  }
  if (a.shape.normed) {
    for (int g = 0; g < a.shape.gates; ++g) feed(a.normed + g * c.hidden, a.normed_row);
    feed(static_cast<const float*>(from.normed_product), c.width, true);
    a.scales = a.normed + a.shape.gates * c.hidden;
  }
  a.grad_h = static_cast<const float*>(from.grad_h), a.grad_c = static_cast<const float*>(from.grad_c);
  a.weight_sums = static_cast<const float*>(from.weight_sums);
  a.grad_inputs = static_cast<float*>(from.grad_inputs), a.grad_recurrent = static_cast<float*>(from.grad_recurrent);
  a.grad_h0 = static_cast<float*>(from.grad_h0), a.grad_c0 = static_cast<float*>(from.grad_c0);
  a.grad_projected = static_cast<float*>(from.grad_projected);
  a.grad_norm_c = static_cast<float*>(from.grad_norm_c), a.grad_norm_b = static_cast<float*>(from.grad_norm_b);
  choose_copies(a);
  return a;
}

}  // namespace s2s::persistent
