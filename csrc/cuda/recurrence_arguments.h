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
  const float* data;  // (B, T, width), from the unit 0 on
  int64_t width;
  bool before;           // of the position before, in the direction of forward
  const float* initial;  // (B, H) or null: before the first
};

struct Recurrence {
  RecurrencePlan plan;
  RecurrenceShape shape;
  int64_t batch, time;
  int hidden;
  Cell cell;
  bool reverse, training, wide_copies;
  float zoneout_h, zoneout_c;
  uint64_t threshold_h, threshold_c;
  const void* weight_hh;  // (G H, H)
  const float* mask;      // (B, H) or null
  const int64_t* lengths;
  const bool* reset;  // (B, T)
  const int64_t* seed;
  unsigned char* workspace;
  RecurrenceFeed feeds[most_feeds];
};

struct RecurrenceForward : Recurrence {
  const float *bias_hh, *h0, *c0;
  void* output;  // (B, T, H)
  float *h_n, *c_n, *gates, *extra, *exact;
};

struct RecurrenceBackward : Recurrence {
  const float *h0, *c0, *grad_h, *grad_c;
  float *grad_inputs, *grad_recurrent, *grad_h0, *grad_c0;  // grad_recurrent: null where it is grad_inputs
};

// Sizes and options of a call, as the schemas name them.
struct RecurrenceCall {
  int64_t batch, time, hidden, cell, operand, reverse, training;
  double zoneout_h, zoneout_c;
};

// Pointers to float32, but those whose type is said; null where an argument is absent.
struct RecurrenceForwardPointers {
  const void *inputs, *weight_hh, *bias_hh, *h0, *c0, *mask, *lengths, *reset, *seed;  // weight_hh: the operand's type
  void *workspace, *output, *h_n, *c_n, *gates, *extra, *exact;                        // output: weight_hh's type
};
struct RecurrenceBackwardPointers {
  const void *grad_output, *grad_h, *grad_c, *weight_hh, *h0, *c0, *mask, *lengths, *reset, *seed, *output, *gates, *extra;
  void *workspace, *grad_inputs, *grad_recurrent, *grad_h0, *grad_c0;
};

// Of a step in either direction: forward reads the input product; backward the activated gates, the cell before (LSTM), or W_hn h + b_hn
// and h before (GRU), or h itself (RNN), and grad_output.
inline int feeds_of(Cell cell, bool backward) {
  const int gates = static_cast<int>(gates_of(cell));
  return !backward ? gates : cell == Cell::lstm ? gates + 2 : cell == Cell::gru ? gates + 3 : 2;
}

inline RecurrenceShape shape_of(const RecurrenceCall& c, bool backward) {
  const Cell cell = static_cast<Cell>(c.cell);
  return {c.batch, c.hidden, static_cast<int>(gates_of(cell)), static_cast<Operand>(c.operand), backward, feeds_of(cell, backward)};
}

template <class Arguments, class Pointers>
Arguments common_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const Pointers& from, bool backward) {
  Arguments a{};
  a.plan = plan, a.shape = shape_of(c, backward);
  a.batch = c.batch, a.time = c.time, a.hidden = static_cast<int>(c.hidden);
  a.cell = static_cast<Cell>(c.cell), a.reverse = c.reverse, a.training = c.training;
  a.zoneout_h = static_cast<float>(c.zoneout_h), a.zoneout_c = static_cast<float>(c.zoneout_c);
  a.threshold_h = philox_threshold(c.zoneout_h), a.threshold_c = philox_threshold(c.zoneout_c);
  a.weight_hh = from.weight_hh, a.mask = static_cast<const float*>(from.mask);
  a.lengths = static_cast<const int64_t*>(from.lengths), a.reset = static_cast<const bool*>(from.reset);
  a.seed = static_cast<const int64_t*>(from.seed), a.workspace = static_cast<unsigned char*>(from.workspace);
  a.h0 = static_cast<const float*>(from.h0), a.c0 = static_cast<const float*>(from.c0);
  return a;
}

// Whether units can be copied four at a time.
inline void choose_copies(Recurrence& a) {
  a.wide_copies = a.hidden % 4 == 0 && a.plan.units % 4 == 0;
  for (int i = 0; i < a.shape.feeds; ++i)
    for (const float* data : {a.feeds[i].data, a.feeds[i].initial})
      a.wide_copies = a.wide_copies && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

inline RecurrenceForward forward_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const RecurrenceForwardPointers& from) {
  auto a = common_arguments<RecurrenceForward>(plan, c, from, false);
  for (int g = 0; g < a.shape.gates; ++g)
    a.feeds[g] = {static_cast<const float*>(from.inputs) + g * c.hidden, a.shape.gates * c.hidden, false, nullptr};
  a.bias_hh = static_cast<const float*>(from.bias_hh), a.output = from.output;
  a.h_n = static_cast<float*>(from.h_n), a.c_n = static_cast<float*>(from.c_n);
  a.gates = static_cast<float*>(from.gates), a.extra = static_cast<float*>(from.extra), a.exact = static_cast<float*>(from.exact);
  choose_copies(a);
  return a;
}

inline RecurrenceBackward backward_arguments(const RecurrencePlan& plan, const RecurrenceCall& c, const RecurrenceBackwardPointers& from) {
  auto a = common_arguments<RecurrenceBackward>(plan, c, from, true);
  const auto *gates = static_cast<const float*>(from.gates), *extra = static_cast<const float*>(from.extra);
  const auto* output = static_cast<const float*>(from.output);
  int count = 0;
  const auto feed = [&](const float* data, int64_t width, bool before, const float* initial) {
    a.feeds[count++] = {data, width, before, initial};
  };
  feed(static_cast<const float*>(from.grad_output), c.hidden, false, nullptr);
  if (a.cell == Cell::lstm || a.cell == Cell::gru) {
    for (int g = 0; g < a.shape.gates; ++g) feed(gates + g * c.hidden, a.shape.gates * c.hidden, false, nullptr);
    if (a.cell == Cell::gru) feed(extra, c.hidden, false, nullptr);
    feed(a.cell == Cell::lstm ? extra : output, c.hidden, true, a.cell == Cell::lstm ? a.c0 : a.h0);
  } else {
    feed(gates ? gates : output, c.hidden, false, nullptr);
  }
  a.grad_h = static_cast<const float*>(from.grad_h), a.grad_c = static_cast<const float*>(from.grad_c);
  a.grad_inputs = static_cast<float*>(from.grad_inputs), a.grad_recurrent = static_cast<float*>(from.grad_recurrent);
  a.grad_h0 = static_cast<float*>(from.grad_h0), a.grad_c0 = static_cast<float*>(from.grad_c0);
  choose_copies(a);
  return a;
}

}  // namespace s2s::persistent
