// Binding of a causal convolution step by step: of one layer, and of a stack of gated layers at once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "convolution_binding.h"
#include "pool.h"

#define S2S_KERNELS "convolution_step_kernels.h"
#include "each_isa.h"

namespace s2s {
namespace {

// A ring of one layer: slots [0, span) of rows `batch_stride` apart, of which `slot` holds the oldest input.
template <class S>
struct RingView {
  S* data;
  int64_t batch_stride, channels, span, slot;

  // The input `age` slots after the oldest, of the first row.
  const S* at(int64_t age) const { return data + (slot + age < span ? slot + age : slot + age - span) * channels; }
};

// The parameters of one convolution: as they lie, with what the one after it will read first, or packed.
template <class S>
struct Parameters {
  const S *weight = nullptr, *bias = nullptr, *packed = nullptr;
  const char* ahead = nullptr;
  int64_t ahead_bytes = 0;
};

// Sums of one step into u (batch, outputs), then the input in the place of the oldest: tap k lies k * dilation slots after it.
template <class S>
class Stepper {
  using C = compute_t<S>;

 public:
  static int64_t panel_elements(int64_t channels, int64_t taps) { return 4 * 16 * std::max<int64_t>(1, channels * taps); }

  explicit Stepper(int64_t batch) : batch_(batch) {}

  void sums(const S* x, const RingView<S>& ring, const Parameters<S>& w, int64_t channels, int64_t outputs, int64_t groups, int64_t taps,
            int64_t dilation, C* u, C* panel, int64_t panel_size) {
    tap_.resize(taps);
    tap_batch_.resize(taps);
    for (int64_t k = 0; k + 1 < taps; ++k) {
      tap_[k] = ring.at(k * dilation);
      tap_batch_[k] = ring.batch_stride;
    }
    tap_[taps - 1] = x;
    tap_batch_[taps - 1] = channels;
    const ConvolutionStep<S> p{batch_,   channels,    outputs,           taps, groups, w.weight, w.bias,
                               w.packed, tap_.data(), tap_batch_.data(), u,    panel,  w.ahead,  w.ahead_bytes};
    const int64_t per_group = outputs / groups;
    if (per_group == 1 && channels == groups && !w.packed) {
      S2S_SELECT(ConvolutionStepKernels<S>::depthwise)(p, 0, outputs, panel);
      return;
    }
    const auto rows = S2S_SELECT(ConvolutionStepKernels<S>::rows);
    constexpr int64_t block = step_block;
    const int64_t blocks = (per_group + block - 1) / block, work = batch_ * std::min(block, per_group) * channels / groups * taps + 1;
    std::atomic<int64_t> next{0};
    parallel(groups * blocks, std::max<int64_t>(1, (1 << 18) / work), [&](int64_t begin, int64_t end) {
      C* own = panel + next.fetch_add(1) * panel_size;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t at = task % blocks * block;
        rows(p, task / blocks, at, std::min(block, per_group - at), own);
      }
    });
  }

  static void push(const S* x, const RingView<S>& ring, int64_t batch) {
    if (!ring.span) return;
    for (int64_t b = 0; b < batch; ++b)
      std::copy(x + b * ring.channels, x + (b + 1) * ring.channels, ring.data + b * ring.batch_stride + ring.slot * ring.channels);
  }

 private:
  std::vector<const S*> tap_;
  std::vector<int64_t> tap_batch_;
  int64_t batch_;
};

int64_t* checked_position(const char* op, const Tensor& position) {
  check_cpu(op, "position", position);
  check_dim(op, "position", position, 0);
  int64_t* at = mutable_data<int64_t>(position);
  STD_TORCH_CHECK(*at >= 0, op, ": position must be at least 0, got ", *at);
  return at;
}

Tensor causal_conv1d_step(const Tensor& x_in, const Tensor& ring, const Tensor& position, const Tensor& weight_in,
                          const OptionalTensor& bias_in, const OptionalTensor& residual, int64_t dilation, int64_t groups,
                          int64_t activation) {
  const char* op = "causal_conv1d_step";
  check_dim(op, "x_t", x_in, 2);
  const Shape s = checked_shape(op, x_in, weight_in, dilation, groups, activation);
  check_argument(op, "bias", bias_in, x_in.scalar_type(), {s.outputs});
  check_argument(op, "residual", residual, x_in.scalar_type(), {s.batch, s.results()});
  check_argument(op, "ring", ring, x_in.scalar_type(), {s.batch, s.span, s.channels});
  STD_TORCH_CHECK(ring.is_contiguous(), op, ": ring must be contiguous");
  int64_t* at = checked_position(op, position);
  STD_TORCH_CHECK(*at < s.span || *at == 0, op, ": position must be in [0, ", s.span, "), got ", *at);
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  Tensor y = empty_cpu({s.batch, s.results()}, x.scalar_type());
  return dispatch_floating(op, "x_t", x, [&](auto zero) {
    using S = decltype(zero);
    using C = compute_t<S>;
    const int64_t panel_size = Stepper<S>::panel_elements(s.channels / groups, s.taps), threads = thread_count();
    Workspace workspace(Workspace::bytes<C>(threads * panel_size) + Workspace::bytes<C>(s.batch * s.outputs + 16));
    C* panel = workspace.take<C>(threads * panel_size);
    C* u = workspace.take<C>(s.batch * s.outputs + 16);
    std::fill(u, u + s.batch * s.outputs + 16, C(0));  // vectors are read to their ends, where denormal numbers would cost a microsecond
    const RingView<S> view{mutable_data<S>(ring), s.span * s.channels, s.channels, s.span, *at};
    Stepper<S> stepper(s.batch);
    stepper.sums(data<S>(x), view, {data<S>(weight), data<S>(bias)}, s.channels, s.outputs, groups, s.taps, dilation, u, panel, panel_size);
    Stepper<S>::push(data<S>(x), view, s.batch);
    if (s.span) *at = (*at + 1) % s.span;
    S2S_SELECT(ConvolutionStepKernels<S>::finish)
    (s.activation, u, s.batch, s.outputs, nullptr, 0, 0, data<S>(residual), residual ? residual->stride(0) : 0,
     residual ? residual->stride(1) : 0, mutable_data<S>(y));
    return y;
  });
}

// The sizes of a convolution of a stack.
struct Sizes {
  int64_t outputs, channels, taps, dilation;
  int64_t span() const { return (taps - 1) * dilation; }
};

// The weights and biases of a stack's convolutions in the order of their use, or all of them as conv_stack_pack lays them out.
class StackParameters {
 public:
  StackParameters(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const OptionalTensor& packed,
                  ScalarType type, std::vector<Sizes> sizes)
      : sizes_(std::move(sizes)) {
    const int64_t count = packed ? 0 : this->count();
    for (const std::vector<Tensor>* list : {&weights, &biases})
      STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == count, op, ": weights and biases must hold ", count, " tensors, got ",
                      list->size());
    for (int64_t i = 0; i < count; ++i) {
      const Sizes& s = sizes_[i];
      const Tensor &w = weights[i], &b = biases[i];
      check(op, "weights", i, w, type, w.dim() == 3 && w.size(0) == s.outputs && w.size(1) == s.channels && w.size(2) == s.taps);
      check(op, "biases", i, b, type, b.dim() == 1 && b.size(0) == s.outputs);
      data_.push_back({w.const_data_ptr(), b.const_data_ptr()});
    }
    if (!packed) return;
    int64_t elements = 0;
    for (const Sizes& s : sizes_) {
      offsets_.push_back(elements);
      elements += packed_step_elements(s.outputs, s.channels, s.taps);
    }
    check_argument(op, "packed", packed, type, {elements});
    STD_TORCH_CHECK(packed->is_contiguous(), op, ": packed must be contiguous");
    packed_ = packed->const_data_ptr();
  }

  const Sizes& sizes(int64_t i) const { return sizes_[i]; }
  int64_t count() const { return static_cast<int64_t>(sizes_.size()); }

  template <class S>
  Parameters<S> at(int64_t i) const {
    if (packed_) return {nullptr, nullptr, static_cast<const S*>(packed_) + offsets_[i], nullptr, 0};
    const int64_t next = (i + 1) % count();
    const Sizes& s = sizes_[next];
    constexpr int64_t rows = 16;  // as many as are read side by side
    return {static_cast<const S*>(data_[i].weight), static_cast<const S*>(data_[i].bias), nullptr,
            static_cast<const char*>(data_[next].weight),
            std::min(rows, s.outputs) * s.channels * s.taps * static_cast<int64_t>(sizeof(S))};
  }

 private:
  // Written out where it fails only: 30 layers have 120 tensors.
  static void check(const char* op, const char* name, int64_t i, const Tensor& tensor, ScalarType type, bool shape) {
    STD_TORCH_CHECK(shape && tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous(), op, ": ", name, "[", i,
                    "] must be contiguous, on the CPU, ", dtype_name(type), " and of the shape that its place asks for, got ",
                    shape_text(tensor));
  }

  struct Data {
    const void *weight, *bias;
  };
  std::vector<Sizes> sizes_;
  std::vector<Data> data_;
  const void* packed_ = nullptr;
  std::vector<int64_t> offsets_;
};

// The parameters of a stack's convolutions in the layout and the order in which its steps read them.
Tensor conv_stack_pack(const std::vector<Tensor>& weights, const std::vector<Tensor>& biases) {
  const char* op = "conv_stack_pack";
  STD_TORCH_CHECK(!weights.empty(), op, ": weights must hold a tensor");
  std::vector<Sizes> sizes;
  int64_t elements = 0;
  for (const Tensor& weight : weights) {
    check_dim(op, "weights", weight, 3);
    sizes.push_back({weight.size(0), weight.size(1), weight.size(2), 1});
    elements += packed_step_elements(weight.size(0), weight.size(1), weight.size(2));
  }
  const ScalarType type = weights[0].scalar_type();
  const StackParameters parameters(op, weights, biases, std::nullopt, type, sizes);
  Tensor packed = empty_cpu({elements}, type);
  return dispatch_floating(op, "weights", type, [&](auto zero) {
    using S = decltype(zero);
    S* to = mutable_data<S>(packed);
    for (size_t i = 0; i < sizes.size(); ++i) {
      const Sizes& s = sizes[i];
      pack_step(data<S>(weights[i]), data<S>(biases[i]), s.outputs, s.channels, s.taps, to);
      to += packed_step_elements(s.outputs, s.channels, s.taps);
    }
    return packed;
  });
}

// What the steps of a stack share: the scratch of a call and the rings, which lie one after the other in each row of `ring`.
template <class S>
class StackStep {
  using C = compute_t<S>;

 public:
  StackStep(const StackParameters& parameters, int64_t batch, const Tensor& ring, int64_t position)
      : parameters_(parameters),
        stepper_(batch),
        batch_(batch),
        ring_(mutable_data<S>(ring)),
        ring_row_(ring.size(1)),
        position_(position) {
    int64_t panel = 1, widest = 1;
    for (int64_t i = 0; i < parameters.count(); ++i) {
      const Sizes& s = parameters.sizes(i);
      panel = std::max(panel, Stepper<S>::panel_elements(s.channels, s.taps));
      widest = std::max({widest, s.outputs, s.channels});
      want(next_ring(s), s);
    }
    ring_ = mutable_data<S>(ring);
    panel_size_ = panel, u_size_ = batch * widest + 16;
    const int64_t threads = thread_count();
    workspace_.emplace(Workspace::bytes<C>(threads * panel) + Workspace::bytes<C>(u_size_) + 4 * Workspace::bytes<S>(u_size_));
    panel_ = workspace_->template take<C>(threads * panel);
    u_ = workspace_->template take<C>(u_size_);
    std::fill(u_, u_ + u_size_, C(0));  // vectors are read to their ends, where denormal numbers would cost a microsecond
  }

  // A buffer for what a convolution reads or gives; there are four.
  S* buffer() { return workspace_->template take<S>(u_size_); }

  // The next convolution of the stack, over the next ring where it has taps before x; x then enters the ring. The sums are in u().
  void convolve(const S* x) {
    const Sizes& s = parameters_.sizes(index_);
    const RingView<S> view = next_ring(s);
    stepper_.sums(x, view, parameters_.at<S>(index_++), s.channels, s.outputs, 1, s.taps, s.dilation, u_, panel_, panel_size_);
    Stepper<S>::push(x, view, batch_);
    outputs_ = s.outputs;
  }

  // to = activation(sums + condition) + residual, row by row.
  void finish(Activation activation, const S* condition, int64_t condition_batch, int64_t condition_stride, const S* residual, S* to) {
    S2S_SELECT(ConvolutionStepKernels<S>::finish)
    (activation, u_, batch_, outputs_, condition, condition_batch, condition_stride, residual, outputs_, 1, to);
  }

 private:
  RingView<S> next_ring(const Sizes& s) {
    const RingView<S> view{ring_, ring_row_, s.channels, s.span(), s.span() ? position_ % s.span() : 0};
    ring_ += s.span() * s.channels;
    return view;
  }

  // Asks for the inputs that a step reads: they are as old as the dilation is large, and in no near cache.
  static void want(const RingView<S>& ring, const Sizes& s) {
    for (int64_t k = 0; k + 1 < s.taps; ++k) {
      const char* row = reinterpret_cast<const char*>(ring.at(k * s.dilation));
      for (int64_t i = 0; i < s.channels * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(row + i, 1, 2);
    }
  }

  const StackParameters& parameters_;
  Stepper<S> stepper_;
  int64_t batch_;
  S* ring_;
  int64_t ring_row_, position_, panel_size_, u_size_, outputs_ = 0, index_ = 0;
  std::optional<Workspace> workspace_;
  C *panel_, *u_;
};

int64_t* checked_ring(const char* op, const Tensor& ring, const Tensor& position, ScalarType type, int64_t batch, int64_t elements) {
  check_argument(op, "ring", ring, type, {batch, elements});
  STD_TORCH_CHECK(ring.is_contiguous(), op, ": ring must be contiguous");
  return checked_position(op, position);
}

void check_dilations(const char* op, const std::vector<int64_t>& dilations, int64_t taps) {
  STD_TORCH_CHECK(!dilations.empty(), op, ": dilations must name a layer");
  STD_TORCH_CHECK(taps >= 1, op, ": taps must be at least 1, got ", taps);
  for (const int64_t dilation : dilations) STD_TORCH_CHECK(dilation >= 1, op, ": dilations must be at least 1, got ", dilation);
}

Tensor wavenet_step(const Tensor& x_in, const Tensor& ring, const Tensor& position, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& biases, const OptionalTensor& packed, const OptionalTensor& condition,
                    const std::vector<int64_t>& dilations, int64_t taps, int64_t skips) {
  const char* op = "wavenet_step";
  check_cpu(op, "x_t", x_in);
  check_dim(op, "x_t", x_in, 2);
  check_dilations(op, dilations, taps);
  STD_TORCH_CHECK(skips >= 0, op, ": skips must be at least 0, got ", skips);
  const int64_t layers = static_cast<int64_t>(dilations.size()), batch = x_in.size(0), channels = x_in.size(1);
  const ScalarType type = x_in.scalar_type();
  std::vector<Sizes> sizes;
  int64_t slots = 0;
  for (const int64_t dilation : dilations) {
    slots += (taps - 1) * dilation;
    sizes.push_back({2 * channels, channels, taps, dilation});
    sizes.push_back({channels + skips, channels, 1, 1});
  }
  const StackParameters parameters(op, weights, biases, packed, type, std::move(sizes));
  check_argument(op, "condition", condition, type, {batch, layers * 2 * channels});
  int64_t* at = checked_ring(op, ring, position, type, batch, slots * channels);
  const Tensor x_t = as_contiguous(x_in);
  Tensor skip = empty_cpu({batch, skips}, type);
  return dispatch_floating(op, "x_t", type, [&](auto zero) {
    using S = decltype(zero);
    StackStep<S> stack(parameters, batch, ring, *at);
    S *x = stack.buffer(), *z = stack.buffer(), *both = stack.buffer();
    std::copy(data<S>(x_t), data<S>(x_t) + batch * channels, x);
    S* sum = mutable_data<S>(skip);
    const auto add = S2S_SELECT(ConvolutionStepKernels<S>::add);
    const int64_t condition_batch = condition ? condition->stride(0) : 0, condition_stride = condition ? condition->stride(1) : 0;
    for (int64_t l = 0; l < layers; ++l) {
      const S* extra = condition ? data<S>(*condition) + l * 2 * channels * condition_stride : nullptr;
      stack.convolve(x);
      stack.finish(Activation::gated_tanh, extra, condition_batch, condition_stride, nullptr, z);
      stack.convolve(z);
      stack.finish(Activation::none, nullptr, 0, 0, nullptr, both);
      for (int64_t b = 0; b < batch; ++b) {
        const S* row = both + b * (channels + skips);
        add(x + b * channels, row, channels);
        if (l)
          add(sum + b * skips, row + channels, skips);
        else
          std::copy(row + channels, row + channels + skips, sum + b * skips);
      }
    }
    ++*at;
    return skip;
  });
}

// y = max(y, 0), a NaN staying.
template <class S>
void rectify(S* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (to_compute(y[i]) <= 0) y[i] = S{};
}

Tensor tcn_step(const Tensor& x_in, const Tensor& ring, const Tensor& position, const std::vector<Tensor>& weights,
                const std::vector<Tensor>& biases, const OptionalTensor& packed, const std::vector<int64_t>& dilations, int64_t taps,
                const std::vector<int64_t>& channels) {
  const char* op = "tcn_step";
  check_cpu(op, "x_t", x_in);
  check_dim(op, "x_t", x_in, 2);
  check_dilations(op, dilations, taps);
  const int64_t layers = static_cast<int64_t>(dilations.size()), batch = x_in.size(0);
  STD_TORCH_CHECK(static_cast<int64_t>(channels.size()) == layers + 1 && channels[0] == x_in.size(1), op,
                  ": channels must hold those of x_t and of each layer, got ", channels.size(), " sizes");
  const ScalarType type = x_in.scalar_type();
  std::vector<Sizes> sizes;
  int64_t elements = 0;
  for (int64_t l = 0; l < layers; ++l) {
    const int64_t in = channels[l], out = channels[l + 1];
    STD_TORCH_CHECK(out >= 1, op, ": channels must be at least 1, got ", out);
    sizes.push_back({out, in, taps, dilations[l]});
    if (in != out) sizes.push_back({out, in, 1, 1});
    sizes.push_back({out, out, taps, dilations[l]});
    elements += (taps - 1) * dilations[l] * (in + out);
  }
  const StackParameters parameters(op, weights, biases, packed, type, std::move(sizes));
  int64_t* at = checked_ring(op, ring, position, type, batch, elements);
  const Tensor x_t = as_contiguous(x_in);
  Tensor result = empty_cpu({batch, channels[layers]}, type);
  return dispatch_floating(op, "x_t", type, [&](auto zero) {
    using S = decltype(zero);
    StackStep<S> stack(parameters, batch, ring, *at);
    S *x = stack.buffer(), *y = stack.buffer(), *hidden = stack.buffer(), *matched = stack.buffer();
    std::copy(data<S>(x_t), data<S>(x_t) + batch * channels[0], x);
    for (int64_t l = 0; l < layers; ++l) {
      const S* skip = x;
      stack.convolve(x);
      stack.finish(Activation::relu, nullptr, 0, 0, nullptr, hidden);
      if (channels[l] != channels[l + 1]) {
        stack.convolve(x);
        stack.finish(Activation::none, nullptr, 0, 0, nullptr, matched);
        skip = matched;
      }
      stack.convolve(hidden);
      stack.finish(Activation::relu, nullptr, 0, 0, skip, y);
      rectify(y, batch * channels[l + 1]);
      std::swap(x, y);
    }
    std::copy(x, x + batch * channels[layers], mutable_data<S>(result));
    ++*at;
    return result;
  });
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("causal_conv1d_step", TORCH_BOX(&s2s::causal_conv1d_step));
  m.impl("conv_stack_pack", TORCH_BOX(&s2s::conv_stack_pack));
  m.impl("wavenet_step", TORCH_BOX(&s2s::wavenet_step));
  m.impl("tcn_step", TORCH_BOX(&s2s::tcn_step));
}
