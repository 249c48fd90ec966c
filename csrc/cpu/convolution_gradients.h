// The gradients of one call of causal convolution. Included by convolution.cpp after each_isa.h, since it names kernels.
#pragma once
#include <algorithm>
#include <tuple>
#include <vector>

#include "convolution_call.h"

namespace s2s {
namespace {

// What backward is asked for.
struct Needs {
  bool x, weight, bias, state, condition;
};

template <class S>
class Backward {
  using C = compute_t<S>;

 public:
  Backward(const Shape& s, const Tensor& grad, const Tensor& x, const Tensor& weight, const OptionalTensor& saved,
           const OptionalTensor& initial_state, bool from_output, Needs needs)
      : s_(s),
        needs_(needs),
        from_output_(from_output),
        grad_(signal<S>(grad)),
        x_(signal<S>(x)),
        before_(signal<S>(initial_state)),
        weight_(view<const S, 3>(weight)),
        saved_(saved),
        type_(x.scalar_type()) {
    if (!s.span) before_ = {};
    for (int64_t b = 0; b < s.batch; ++b) high_.push_back(s.lengths ? s.lengths[b] : s.time);
    grad_x_ = empty_if(needs.x, {s.batch, s.channels, s.time});
    grad_weight_ = empty_if(needs.weight, {s.outputs, s.channels / s.groups, s.taps});
    grad_bias_ = empty_if(needs.bias, {s.outputs});
    grad_state_ = empty_if(needs.state, {s.batch, s.channels, s.span});
    grad_condition_ = empty_if(needs.condition, {s.batch, s.outputs, s.time});
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run() {
    const int64_t wide_weight = weight_.size[0] * weight_.size[1] * weight_.size[2];
    const bool direct_grad = std::is_same_v<S, C> && s_.activation == Activation::none && grad_.time == 1 && !needs_.condition;
    const bool direct_x = std::is_same_v<S, C> && x_.time == 1 && !before_.data;
    const bool weights = needs_.weight || needs_.bias, inputs = needs_.x || needs_.state;
    // A few rows of the batch at a time: what is computed of them is used while it is in the cache.
    const int64_t row_elements = std::max<int64_t>(1, (s_.outputs + s_.channels) * s_.time);
    const int64_t at_once = std::clamp<int64_t>((1 << 19) / row_elements, 1, std::max<int64_t>(1, s_.batch));
    const int64_t x_row = s_.span + s_.time;
    const int64_t grad_count = direct_grad ? 0 : at_once * s_.outputs * s_.time,
                  x_count = direct_x || !needs_.weight ? 0 : at_once * s_.channels * x_row;
    Workspace workspace(Workspace::bytes<C>(grad_count) + Workspace::bytes<C>(x_count) + 2 * Workspace::bytes<C>(wide_weight) +
                        Workspace::bytes<C>(s_.outputs));
    C* grads = workspace.take<C>(grad_count);
    C* rows = workspace.take<C>(x_count);
    C* packed = workspace.take<C>(wide_weight);
    C* weight_sum = workspace.take<C>(wide_weight);
    C* bias_sum = workspace.take<C>(s_.outputs);
    std::fill(weight_sum, weight_sum + wide_weight, C(0));
    std::fill(bias_sum, bias_sum + s_.outputs, C(0));
    const int64_t block = block_rows(s_.channels / s_.groups, 1);
    const int64_t plane_count = needs_.x && std::is_same_v<S, float> && tiled() ? planes() : 0;
    // A tile goes to the multipliers only where a tap begins or ends.
    if (inputs && !(plane_count && s_.taps == 1 && !s_.lengths)) pack_transposed_weights(weight_, s_.groups, block, packed);
    Workspace plane_space(s_.groups * Workspace::bytes<C>(plane_count));
    C* const planes = plane_count ? split_weights(plane_space, plane_count) : nullptr;

    for (int64_t first = 0; first < s_.batch; first += at_once) {
      const int64_t count = std::min(at_once, s_.batch - first);
      Signal<const C> grad = contiguous_signal<const C>(grads, s_.outputs, s_.time), x{};
      if constexpr (std::is_same_v<S, C>) {
        if (direct_grad) grad = {grad_.data + first * grad_.batch, grad_.batch, grad_.channel, 1};
        if (direct_x) x = {x_.data + first * x_.batch, x_.batch, x_.channel, 1};
      }
      if (!direct_grad) activation_gradients(first, count, grads);
      if (x_count) {
        widen_rows(first, count, rows, x_row);
        x = {rows + s_.span, s_.channels * x_row, x_row, 1};
      }
      const bool narrow = s_.channels / s_.groups < few_channels;
      if (needs_.x && weights && narrow && s_.groups >= thread_count()) {
        gradients_by_group(input_gradient(first, count, grad, packed, block), weight_gradient(first, count, grad, x, weight_sum, bias_sum));
      } else {
        if (needs_.x && planes)
          convolve_tiled(input_gradient(first, count, grad, packed, block), planes, plane_count);
        else if (needs_.x)
          convolve(input_gradient(first, count, grad, packed, block));
        if (weights) weight_gradients(weight_gradient(first, count, grad, x, weight_sum, bias_sum));
      }
      if (needs_.state) convolve(state_gradient(first, count, grad, packed, block));
    }
    const auto narrow = S2S_SELECT(ConvolutionGradientKernels<S>::narrow);
    if (needs_.weight) {
      const int64_t rows = s_.outputs * weight_.size[1];
      S* to = mutable_data<S>(grad_weight_);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t k = 0; k < s_.taps; ++k) to[row * s_.taps + k] = from_compute<S>(weight_sum[k * rows + row]);
    }
    if (needs_.bias) narrow(bias_sum, mutable_data<S>(grad_bias_), s_.outputs);
    return {grad_x_, grad_weight_, grad_bias_, grad_state_, grad_condition_};
  }

 private:
  Tensor empty_if(bool need, std::initializer_list<int64_t> sizes) const { return need ? empty_cpu(sizes, type_) : empty_cpu({0}, type_); }

  void activation_gradients(int64_t first, int64_t count, C* grads) {
    const int64_t results = s_.results(), time = s_.time, half = results * time;
    const auto line = S2S_SELECT(ConvolutionGradientKernels<S>::activation);
    const auto line_from_output = S2S_SELECT(ConvolutionGradientKernels<S>::activation_from_output);
    const auto narrow = S2S_SELECT(ConvolutionGradientKernels<S>::narrow);
    S* condition = needs_.condition ? mutable_data<S>(grad_condition_) : nullptr;
    const bool gate = is_gate(s_.activation);
    parallel(count * results, 1 + (1 << 14) / (time + 1), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / results, r = task % results, n = high_[first + b];
        const S* from = grad_.data + (first + b) * grad_.batch + r * grad_.channel;
        C* a = grads + (b * s_.outputs + r) * time;
        const int64_t place = ((first + b) * s_.outputs + r) * time;
        if (from_output_)
          line_from_output(s_.activation, from, grad_.time, data<S>(*saved_) + place, a, n);
        else
          line(s_.activation, from, grad_.time, saved_ ? data<C>(*saved_) + place : nullptr,
               saved_ ? data<C>(*saved_) + place + half : nullptr, a, a + half, n);
        if (!condition) continue;
        for (int part = 0; part < (gate ? 2 : 1); ++part) {
          narrow(a + part * half, condition + place + part * half, n);
          std::fill(condition + place + part * half + n, condition + place + part * half + time, from_compute<S>(C(0)));
        }
      }
    });
  }

  // Rows of span + T positions: the initial state, then x.
  void widen_rows(int64_t first, int64_t count, C* rows, int64_t row) {
    const auto widen = S2S_SELECT(ConvolutionGradientKernels<S>::widen);
    parallel(count * s_.channels, 1 + (1 << 14) / (row + 1), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = first + task / s_.channels, c = task % s_.channels;
        C* to = rows + task * row;
        if (before_.data) widen(before_.data + b * before_.batch + c * before_.channel, before_.time, to, s_.span);
        widen(x_.data + b * x_.batch + c * x_.channel, x_.time, to + s_.span, high_[b]);
      }
    });
  }

  // The gradient with respect to x as a convolution of the output's.
  Convolution<C, S> input_gradient(int64_t first, int64_t count, const Signal<const C>& grad, const C* packed, int64_t block) {
    Convolution<C, S> p{};
    p.batch = count, p.channels = s_.outputs, p.outputs = s_.channels, p.taps = s_.taps, p.groups = s_.groups;
    p.origin = s_.left, p.dilation = -s_.dilation;
    p.in = grad, p.time = s_.time;
    p.lengths = s_.lengths ? s_.lengths + first : nullptr;
    p.weights = packed, p.rows = block;
    p.clip = p.lengths != nullptr, p.begin = 0, p.end = s_.time;
    if (needs_.x) p.out = contiguous_signal(mutable_data<S>(grad_x_) + first * s_.channels * s_.time, s_.channels, s_.time);
    return p;
  }
  Convolution<C, S> state_gradient(int64_t first, int64_t count, const Signal<const C>& grad, const C* packed, int64_t block) {
    Convolution<C, S> p = input_gradient(first, count, grad, packed, block);
    p.clip = false, p.begin = -s_.span, p.end = 0;
    p.out = contiguous_signal(mutable_data<S>(grad_state_) + first * s_.channels * s_.span, s_.channels, s_.span);
    return p;
  }

  WeightGradient<C> weight_gradient(int64_t first, int64_t count, const Signal<const C>& grad, const Signal<const C>& x, C* weight_sum,
                                    C* bias_sum) {
    WeightGradient<C> p{};
    p.batch = count, p.channels = s_.channels, p.outputs = s_.outputs, p.taps = needs_.weight ? s_.taps : 0, p.groups = s_.groups;
    p.origin = -s_.left, p.dilation = s_.dilation, p.low = before_.data ? -s_.span : 0;
    p.high = high_.data() + first;
    p.grad = grad, p.x = x;
    p.grad_weight = weight_sum, p.grad_bias = needs_.bias ? bias_sum : nullptr;
    return p;
  }

  void weight_gradients(const WeightGradient<C>& p) {
    if (!needs_.weight || s_.channels / s_.groups < few_channels)
      weight_rows(p);
    else if (tiled())
      weight_tiles(p);
    else if (S2S_SELECT(ConvolutionGradientKernels<S>::blocks_pay)(s_.outputs / s_.groups, s_.channels / s_.groups, s_.batch * s_.time))
      weight_blocks(p);
    else
      weight_products(p);
  }

  // Both gradients of a group while its part of the output's is in the cache: what few channels ask of the multipliers takes less time than
  // memory.
  void gradients_by_group(const Convolution<C, S>& input, const WeightGradient<C>& weight) {
    const Tiles<C, S> tiles(input);
    const int64_t threads = std::min(thread_count(), s_.groups), outputs = s_.outputs / s_.groups;
    Workspace workspace(threads * tiles.scratch());
    uint8_t* scratch = workspace.take<uint8_t>(threads * tiles.scratch());
    std::atomic<int64_t> next{0};
    const auto rows = S2S_SELECT(ConvolutionGradientKernels<S>::weight_rows);
    const int64_t work = 2 * input.batch * tiles.each() * tiles.work() + 1;
    parallel(s_.groups, std::max<int64_t>(1, (1 << 17) / work), [&](int64_t begin, int64_t end) {
      uint8_t* own = scratch + next.fetch_add(1) * tiles.scratch();
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t b = 0; b < input.batch; ++b)
          for (int64_t tile = 0; tile < tiles.each(); ++tile) tiles.run(b, group, tile, own);
        for (int64_t at = 0; at < outputs; at += 4) rows(weight, group, at, std::min<int64_t>(4, outputs - at));
      }
      tiles.end();
    });
  }

  // Whether products are made on the tile unit.
  bool tiled() const { return S2S_SELECT(TiledGradients<C>::pays)(s_.outputs / s_.groups, s_.channels / s_.groups, s_.time); }
  int64_t planes() const { return S2S_SELECT(TiledGradients<C>::planes)(s_.channels / s_.groups, s_.outputs / s_.groups, s_.taps); }
  // Those of the weights for the gradient with respect to x, group by group.
  C* split_weights(Workspace& space, int64_t size) {
    const int64_t outputs = s_.outputs / s_.groups, channels = s_.channels / s_.groups, plane = outputs * channels;
    Workspace apart(Workspace::bytes<C>(s_.taps * plane));
    C* const taps = apart.take<C>(s_.taps * plane);
    C* const all = space.take<C>(s_.groups * size);
    for (int64_t g = 0; g < s_.groups; ++g) {
      for (int64_t o = 0; o < outputs; ++o) {
        const S* from = weight_.data + (g * outputs + o) * weight_.stride[0];
        for (int64_t k = 0; k < s_.taps; ++k)
          for (int64_t c = 0; c < channels; ++c)
            taps[k * plane + o * channels + c] = to_compute(from[c * weight_.stride[1] + k * weight_.stride[2]]);
      }
      S2S_SELECT(TiledGradients<C>::split_weights)(channels, outputs, s_.taps, taps, all + g * size);
    }
    return all;
  }

  // The convolution on the tile unit. Tiles in which a tap begins or ends go to the multipliers.
  void convolve_tiled(const Convolution<C, S>& p, const C* planes, int64_t planes_size) {
    const Tiles<C, S> tiles(p);
    const int64_t stretch = S2S_SELECT(TiledGradients<C>::stretch), length = p.end - p.begin;
    const int64_t each = (length + stretch - 1) / stretch, tasks = p.batch * p.groups * each, threads = std::min(thread_count(), tasks);
    const int64_t own_elements = S2S_SELECT(TiledGradients<C>::input_scratch)();
    const auto serves = S2S_SELECT(TiledGradients<C>::template serves<S>);
    const auto run = S2S_SELECT(TiledGradients<C>::template inputs<S>);
    Workspace workspace(threads * (tiles.scratch() + Workspace::bytes<C>(own_elements)));
    uint8_t* scratch = workspace.take<uint8_t>(threads * tiles.scratch());
    C* planes_scratch = workspace.take<C>(threads * own_elements);
    std::atomic<int64_t> next{0};
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      const int64_t thread = next.fetch_add(1);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t bg = task / each, b = bg / p.groups, group = bg % p.groups, t0 = task % each * stretch;
        const int64_t width = std::min(stretch, length - t0);
        if (serves(p, b, p.begin + t0, width)) {
          run(p, b, group, p.begin + t0, width, planes + group * planes_size, planes_scratch + thread * own_elements);
          continue;
        }
        for (int64_t tile = t0 / tiles.width(); tile * tiles.width() < t0 + width; ++tile)
          tiles.run(b, group, tile, scratch + thread * tiles.scratch());
      }
      tiles.end();
    });
  }

  // Many channels on the tile unit: a task makes its own planes of the inputs, so that tasks are few.
  void weight_tiles(const WeightGradient<C>& p) {
    const int64_t outputs = s_.outputs / s_.groups, channels = s_.channels / s_.groups;
    const int64_t wanted = std::max<int64_t>(1, (thread_count() + s_.groups - 1) / s_.groups);
    const int64_t most = S2S_SELECT(TiledGradients<C>::most_rows);
    const int64_t rows = std::min(most, ((outputs + wanted - 1) / wanted + 31) / 32 * 32), blocks = (outputs + rows - 1) / rows;
    const int64_t tasks = s_.groups * blocks, threads = std::min(thread_count(), tasks);
    const int64_t elements = S2S_SELECT(TiledGradients<C>::weight_scratch)(rows, channels);
    const auto run = S2S_SELECT(TiledGradients<C>::weights);
    Workspace workspace(threads * Workspace::bytes<C>(elements));
    C* const scratch = workspace.take<C>(threads * elements);
    std::atomic<int64_t> next{0};
    parallel(tasks, 1, [&](int64_t begin, int64_t end) {
      C* const own = scratch + next.fetch_add(1) * elements;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks * rows;
        run(p, task / blocks, at, std::min(rows, outputs - at), own);
      }
    });
  }

  // Channels fill vectors: a matrix product for each tap.
  void weight_products(const WeightGradient<C>& p) {
    const int64_t columns = S2S_SELECT(ConvolutionGradientKernels<S>::panel_columns);
    const int64_t left_row = S2S_SELECT(ConvolutionGradientKernels<S>::left_row);
    const auto pack = S2S_SELECT(ConvolutionGradientKernels<S>::pack_input);
    const auto products = S2S_SELECT(ConvolutionGradientKernels<S>::weight_products);
    const int64_t channels = s_.channels / s_.groups, outputs = s_.outputs / s_.groups;
    const int64_t panels = (channels + columns - 1) / columns, panel_stride = (s_.time - p.low) * columns;
    // Rows of a task: as many as share a panel well, and dealt evenly to the threads. They don't show in the bits.
    const int64_t workers = std::max<int64_t>(1, std::min(thread_count(), outputs / 8));
    const int64_t blocks = (outputs + 48 * workers - 1) / (48 * workers) * workers, rows = (outputs + blocks - 1) / blocks,
                  tasks = s_.groups * blocks, threads = std::min(thread_count(), tasks);
    const int64_t left_elements = (rows * left_row + 15) / 16 * 16;
    // Threads meet after each packing: several rows of the batch at once. One thread uses a row's panels while they are in the cache.
    const int64_t together = threads > 1 ? p.batch : 1, row_panels = s_.groups * panels;
    Workspace workspace(Workspace::bytes<C>(together * row_panels * panel_stride) + Workspace::bytes<C>(threads * left_elements));
    C* packed = workspace.take<C>(together * row_panels * panel_stride);
    C* lefts = workspace.take<C>(threads * left_elements);
    for (int64_t first = 0; first < p.batch; first += together) {
      parallel(together * row_panels, 1 + (1 << 15) / (panel_stride + 1), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          pack(p, first + task / row_panels, task % row_panels / panels, task % panels, packed + task * panel_stride);
      });
      const int64_t work = together * rows * s_.time * channels * s_.taps + 1;
      std::atomic<int64_t> next{0};
      parallel(tasks, std::max<int64_t>(1, (1 << 17) / work), [&](int64_t begin, int64_t end) {
        C* left = lefts + next.fetch_add(1) * left_elements;
        for (int64_t task = begin; task < end; ++task)
          for (int64_t b = 0; b < together; ++b) {
            const int64_t group = task / blocks, at = task % blocks * rows;
            products(p, first + b, group, at, std::min(rows, outputs - at), packed + (b * s_.groups + group) * panels * panel_stride,
                     panel_stride, left);
          }
      });
    }
  }

  // Channels that would leave much of a product's vectors empty.
  void weight_blocks(const WeightGradient<C>& p) {
    const int64_t outputs = s_.outputs / s_.groups, channels = s_.channels / s_.groups;
    const int64_t rows = S2S_SELECT(ConvolutionGradientKernels<S>::block_rows), blocks = (outputs + rows - 1) / rows,
                  tasks = s_.groups * blocks, threads = std::min(thread_count(), tasks);
    const int64_t scratch = S2S_SELECT(ConvolutionGradientKernels<S>::block_scratch)(channels, s_.taps);
    Workspace workspace(threads * Workspace::bytes<C>(scratch));
    C* const totals = workspace.take<C>(threads * scratch);
    std::atomic<int64_t> next{0};
    const auto kernel = S2S_SELECT(ConvolutionGradientKernels<S>::weight_blocks);
    parallel(tasks, std::max<int64_t>(1, (1 << 17) / (rows * p.batch * s_.time * channels * s_.taps + 1)), [&](int64_t begin, int64_t end) {
      C* const own = totals + next.fetch_add(1) * scratch;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks * rows;
        kernel(p, task / blocks, at, std::min(rows, outputs - at), own);
      }
    });
  }

  // Few channels: outputs by channels, over positions.
  void weight_rows(const WeightGradient<C>& p) {
    const int64_t outputs = s_.outputs / s_.groups, blocks = (outputs + 3) / 4;
    const int64_t work = 4 * p.batch * s_.time * (s_.channels / s_.groups) * s_.taps + 1;
    const auto rows = S2S_SELECT(ConvolutionGradientKernels<S>::weight_rows);
    parallel(s_.groups * blocks, std::max<int64_t>(1, (1 << 17) / work), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks * 4;
        rows(p, task / blocks, at, std::min<int64_t>(4, outputs - at));
      }
    });
  }

  static constexpr int64_t few_channels = 16;  // of a group, which don't fill vectors

  const Shape s_;
  const Needs needs_;
  const bool from_output_;
  Signal<const S> grad_, x_, before_;
  View<const S, 3> weight_;
  const OptionalTensor saved_;
  const ScalarType type_;
  std::vector<int64_t> high_;
  Tensor grad_x_, grad_weight_, grad_bias_, grad_state_, grad_condition_;
};

}  // namespace
}  // namespace s2s
