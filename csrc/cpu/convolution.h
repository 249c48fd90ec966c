// What the binding of causal convolution and its kernels (one copy per instruction set) say to each other. No torch.
#pragma once
#include <cstdint>

#include "storage.h"

namespace s2s {

enum class Activation : int64_t { none, relu, silu, gelu, tanh, glu, gated_tanh };

constexpr bool is_gate(Activation activation) { return activation == Activation::glu || activation == Activation::gated_tanh; }

// Data of storage type S as (B, C, T) with strides in elements.
template <class S>
struct Signal {
  S* data = nullptr;
  int64_t batch = 0, channel = 0, time = 0;
};

// out[b][o][t] = activation(bias[o] + sum_k sum_c weight[o][c][k] in[b][c][t + origin + k * dilation] + condition) + residual, over the
// positions of `in` within [low, high_b), for t in [begin, end). The gradient with respect to the input has this form too: its dilation is
// negative.
template <class In, class Out>
struct Convolution {
  using C = compute_t<In>;
  int64_t batch, channels, outputs, taps, groups;  // channels and outputs: of the whole, not of a group
  int64_t origin, dilation;
  Signal<const In> in;
  Signal<const In> before;  // positions [-span, 0), stored from position -span; none: low is 0
  int64_t span, time;       // of `before`; of `in`
  const int64_t* lengths;   // (B) or null: high_b = lengths[b], else time
  int64_t begin, end;       // of t
  bool clip;                // positions at or past lengths[b] are 0 in the result
  const C* weights;         // packed: [group][block of `rows` outputs][k][c][row]
  int64_t rows;
  const C* bias;  // (outputs), or null
  Signal<const Out> condition, residual;
  C* saved;               // (B, outputs, end - begin): what enters the activation, or null
  Activation activation;  // a gate needs groups = 1, unless there is no `out`
  Signal<Out> out;        // from t = begin, unit stride over time; null: only `saved` is wanted

  bool stream;  // the result is too large to stay in a cache

  int64_t high(int64_t b) const { return lengths ? lengths[b] : time; }
  int64_t low() const { return before.data ? -span : 0; }
};

// grad_weight[k][o][c] = sum_b sum_t grad[b][o][t] x[b][c][t + origin + k * dilation], over the positions of x within [low, lengths[b]) and
// t < lengths[b]; added to what is there.
template <class C>
struct WeightGradient {
  int64_t batch, channels, outputs, taps, groups;
  int64_t origin, dilation, low;
  const int64_t* high;      // (batch)
  Signal<const C> grad, x;  // unit stride over time
  C* grad_weight;           // (taps, outputs, channels / groups)
  C* grad_bias;             // (outputs), or null
};

// One position of all rows of a batch: out[b][o] = activation(bias[o] + sum_k sum_c weight[o][c][k] tap[k][b][c] + condition) + residual.
template <class S>
struct ConvolutionStep {
  using C = compute_t<S>;
  int64_t batch, channels, outputs, taps, groups;
  const S* weight;      // (outputs, channels / groups, taps), contiguous
  const S* bias;        // (outputs), or null
  const S* packed;      // both of them as pack_step writes them, groups being 1; or null
  const S* const* tap;  // K pointers: tap[k][b * tap_batch[k] + c]
  const int64_t* tap_batch;
  C* u;               // (batch, outputs): what enters the activation
  C* panel;           // scratch of step_panel() elements for each thread
  const char* ahead;  // what the convolution after this one reads first, or null
  int64_t ahead_bytes;
};

// Weights and bias packed for steps: panels of step_block outputs, of which the last is as wide as what is left in steps of step_unit. A
// panel holds the bias, then the weights of each column k * channels + c, one output beside the other; what isn't there is 0.
inline constexpr int64_t step_block = 64, step_unit = 16;  // multiples of every instruction set's vector

inline int64_t packed_step_width(int64_t outputs) { return (outputs + step_unit - 1) / step_unit * step_unit; }
inline int64_t packed_step_elements(int64_t outputs, int64_t channels, int64_t taps) {
  return packed_step_width(outputs) * (channels * taps + 1);
}

template <class S>
void pack_step(const S* weight, const S* bias, int64_t outputs, int64_t channels, int64_t taps, S* to) {
  for (int64_t first = 0; first < outputs; first += step_block) {
    const int64_t rows = outputs - first < step_block ? outputs - first : step_block, width = packed_step_width(rows);
    const int64_t columns = channels * taps;
    for (int64_t i = 0; i < (columns + 1) * width; ++i) to[i] = S{};
    for (int64_t row = 0; row < rows; ++row) {
      if (bias) to[row] = bias[first + row];
      const S* from = weight + (first + row) * columns;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t k = 0; k < taps; ++k) to[(1 + k * channels + c) * width + row] = *from++;
    }
    to += (columns + 1) * width;
  }
}

// The positions of a tile: a multiple of every instruction set's vector, with the inputs of a tap in the first-level cache.
inline int64_t tile_width(int64_t channels) {
  const int64_t width = 4096 / (channels < 1 ? 1 : channels) / 64 * 64;
  return width < 64 ? 64 : width > 1024 ? 1024 : width;
}

// Where the inputs of a tile exceed the first-level cache, many outputs pass over them in stages, of as many lines (channels of a tap) as
// it holds beside the weights: the sums wait in memory meanwhile.
inline constexpr int64_t stage_bytes = 32 << 10, stage_blocks = 8, stage_width = 64, piece_size = 48;  // of a Piece, in bytes

// Terms that are summed one upon the other: rounding grows with their number, and hardly with that of such chains. A stage is of whole
// chains, wherever it is no wider than stage_width.
inline constexpr int64_t chain_terms = 64;
static_assert(stage_bytes >= chain_terms * stage_width * 8);

template <class C>
constexpr int64_t stage_rows(int64_t width) {
  const int64_t rows = stage_bytes / static_cast<int64_t>(sizeof(C)) / (width < 1 ? 1 : width);
  return rows < 1 ? 1 : rows;
}
template <class C>
constexpr bool needs_stages(int64_t rows, int64_t width, int64_t outputs, int64_t block) {
  return rows > stage_rows<C>(width) && outputs >= stage_blocks * block;
}

}  // namespace s2s
