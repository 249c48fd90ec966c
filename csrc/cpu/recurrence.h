// What the binding of the recurrences and their kernels (one copy per instruction set) say to each other. No torch.
#pragma once
#include <cstdint>

#include "crew.h"
#include "recurrence_cell.h"
#include "storage.h"

namespace s2s {

// Rows of any storage type, read as C. Kernels are compiled for C alone; the functions know the storage type.
template <class C>
struct Source {
  const void* data = nullptr;
  int64_t batch = 0, time = 0, unit = 0;  // strides in elements
  void (*read)(const void* data, int64_t offset, int64_t stride, int64_t n, C* to) = nullptr;
  void (*add)(const void* data, int64_t offset, int64_t stride, int64_t n, C* to) = nullptr;
  const C* plain = nullptr;  // the data, where they are of this very type and of unit stride over units
};
template <class C>
struct Target {
  void* data = nullptr;
  int64_t batch = 0, time = 0;  // unit stride over units
  void (*write)(void* data, int64_t offset, int64_t n, const C* from) = nullptr;
};

// DropConnect: which elements of the recurrent weights are zeroed, and how the others are scaled.
struct WeightDropout {
  int64_t seed0, seed1;
  uint64_t threshold;
  double scale;
};

struct Position {
  int64_t row, time;
};

// Rows of a batch run side by side in lanes. A lane is one row, or several that follow each other, so that short rows fill the time of long
// ones and few lanes do the work of many. Lanes are sorted, longest first: at a step the first count[step] of them are present, and take
// the slots offset[step], offset[step] + 1, ... of a buffer that holds the present positions only, step by step. The steps go the way of
// time: reversed rows go through them from the last to the first. A packed sequence is such a buffer, each of its rows a lane, in order.
struct Schedule {
  int64_t batch, time;
  bool reverse, packed;
  int64_t lanes, steps;      // steps: of the longest lane
  const int64_t* order;      // (lanes): the row of each, whose times are the steps, unless:
  const Position* position;  // (slots): lanes hold several rows; or null
  const int64_t* lane_end;   // (lanes): steps of each
  const int64_t* length;     // (batch): of each row
  const int64_t* count;      // (steps)
  const int64_t* offset;     // (steps + 1)
  const bool* reset;         // or null
  int64_t reset_batch, reset_time;

  Position at(int64_t step, int64_t lane) const { return position ? position[offset[step] + lane] : Position{order[lane], step}; }
  // Whether the state is zeroed between the step before, in the direction of the run, and this one.
  bool starts(int64_t b, int64_t t) const {
    if (!reset) return false;
    if (!reverse) return reset[b * reset_batch + t * reset_time];
    return t + 1 < length[b] && reset[b * reset_batch + (t + 1) * reset_time];
  }
  bool is_first(int64_t b, int64_t t) const { return t == (reverse ? length[b] - 1 : 0); }
  bool is_last(int64_t b, int64_t t) const { return t == (reverse ? 0 : length[b] - 1); }
  // Where position t of row b stands in a tensor over positions.
  int64_t place(int64_t b, int64_t t, int64_t batch_stride, int64_t time_stride) const {
    return packed ? (offset[t] + b) * time_stride : b * batch_stride + t * time_stride;
  }
};

// What one thread takes through time: some lanes, or some units of all lanes. Group g of `groups` has the lanes g, g + groups,
// g + 2 groups, ...: every group gets short ones and long ones. Its own are numbered as its rows.
struct Part {
  int64_t group, groups;
  int64_t unit, units;  // the hidden units [unit, unit + units)
  int64_t rows(int64_t lanes) const { return lanes > group ? (lanes - group + groups - 1) / groups : 0; }
  int64_t lane(int64_t row) const { return group + row * groups; }
};

struct Zoneout {
  double h = 0, c = 0;
  bool training = false;
  uint64_t threshold_h = 0, threshold_c = 0;
  int64_t seed0 = 0, seed1 = 0;
};

constexpr int64_t worth_a_product = 48;  // rows that make a product of their own as fast as those of a larger one

// Elements that both products, normalised, take for a position, and their reciprocal deviations, in a cache line of their own.
constexpr int64_t normed_row(int64_t gate_units) { return 2 * gate_units + 16; }

// What both directions know. Shapes: P is `width`, G H `gate_units`.
template <class C>
struct Recurrence {
  Schedule schedule;
  Cell cell;
  int64_t inputs, hidden, width, gate_units;
  const C *h0, *c0;                              // (B, P), (B, H) or null
  const C* mask;                                 // (B, P) or null: multiplies h in the recurrent product
  const C *norm_ih, *norm_hh, *norm_c, *norm_b;  // or null
  Zoneout zoneout;
  // What forward keeps for backward, by slot; null: nothing. gates (N, G H) after their activation, if keeps_gates; extra (N, H): an LSTM's
  // cell state, a GRU's W_hn h + b_hn; normed (N, normed_row): what layer normalisation made.
  C *gates, *extra, *normed;
  C* hidden_exact;  // (B, T, P): the output before it is rounded to storage; in forward null where the output itself is as wide

  int64_t normed_row() const { return s2s::normed_row(gate_units); }
  // Rows that are the left factor of a product lie this far apart: a power of two would crowd them into few sets of the caches.
  static int64_t padded(int64_t columns) { return (columns + 15) / 16 * 16 + 16; }
};

// What is summed over positions with the same gradients: packed, and where the products go, (gates, columns).
template <class C>
struct GradientFactor {
  const C* packed;
  int64_t columns;
  C* to;
};

// C (m, n) = or += A (m, k) times B (k, n), of any storage type, its strides in elements; in either direction through B.
template <class C>
using Unpacked = void (*)(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const void* b, int64_t b_offset, int64_t b_row,
                          int64_t b_col, C* c, int64_t c_row, bool add, bool backwards, C* workspace);

template <class C>
struct RecurrenceForward : Recurrence<C> {
  Source<C> weight_ih, weight_hh;  // (G H, I), (G H, P)
  const C* weight_hr;              // packed: (H, P), or null
  const WeightDropout* dropout;    // of weight_hh, or null
  const C *bias, *bias_hn;         // (G H): all that is added to the gates; (H): a GRU's b_hn, which r multiplies
  Source<C> x;
  const C* x_rows;  // x as rows of unit stride in the order of the slots, x_row apart; null: they are gathered
  int64_t x_row;
  int64_t block_rows;  // rows of the input product made at once, and used while they are in the cache
  Target<C> output, h_n, c_n;
  C* left[2];  // (rows of all groups, padded(P)) each: what the recurrent product of this step and of the next multiplies
  // Weights that are used but once are read where they lie; backwards: in the opposite direction, W_hh first, for one step of few rows.
  bool unpacked_ih, unpacked_hh, backwards;
  bool tiled_ih, tiled_hh;  // packed for the tile unit
  Unpacked<C> product_ih, product_hh;
  bool streams;  // what is kept goes past the caches, whose lines it fills wholly
};

template <class C>
struct RecurrenceBackward : Recurrence<C> {
  const C* weight_hh;  // (G H, P) where it lies, for parts of one row; null: each part has its units' columns packed
  int64_t weight_hh_row;
  bool tiled_hh;       // packed for the tile unit
  const C* weight_hr;  // packed: (P, H), or null
  Source<C> grad_output, grad_h, grad_c;
  // The gradients of some times, by slot from the first of them on: of the gates before their activation (N, grad_row apart), as the input
  // part and the recurrent part see them (one buffer where they are equal).
  int64_t first_slot, grad_row;
  C *grad_in, *grad_rec;
  C *grad_projected, *unprojected;  // (N, padded(P)), (N, H) or null
  C *grad_norm_c, *normed_c;        // (N, H) or null
  Target<C> grad_h0, grad_c0, grad_mask;
};

}  // namespace s2s
