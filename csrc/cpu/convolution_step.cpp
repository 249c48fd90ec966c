// Binding of a causal convolution step by step: of one layer, and of a stack of gated layers at once.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
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
};

// Sums of one step into u (batch, outputs), then the input in the place of the oldest: tap k lies k * dilation slots after it.
template <class S>
class Stepper {
  using C = compute_t<S>;

 public:
  static int64_t panel_elements(int64_t channels, int64_t taps) { return 4 * 16 * std::max<int64_t>(1, channels * taps); }

  Stepper(int64_t batch, int64_t taps) : taps_(taps), tap_(taps), tap_batch_(taps), batch_(batch) {}

  void sums(const S* x, const RingView<S>& ring, const S* weight, const S* bias, int64_t channels, int64_t outputs, int64_t groups,
            int64_t dilation, C* u, C* panel, int64_t panel_size, const Tensor* following = nullptr) {
    for (int64_t k = 0; k + 1 < taps_; ++k) {
      int64_t slot = ring.slot + k * dilation;
      if (slot >= ring.span) slot -= ring.span;
      tap_[k] = ring.data + slot * channels;
      tap_batch_[k] = ring.batch_stride;
    }
    tap_[taps_ - 1] = x;
    tap_batch_[taps_ - 1] = channels;
    ConvolutionStep<S> p{batch_, channels, outputs, taps_, groups, weight, bias, tap_.data(), tap_batch_.data(), u, panel, nullptr, 0};
    if (following)
      p.ahead = static_cast<const char*>(following->const_data_ptr()), p.ahead_bytes = following->numel() * static_cast<int64_t>(sizeof(S));
    const int64_t per_group = outputs / groups;
    if (per_group == 1 && channels == groups) {
      S2S_SELECT(ConvolutionStepKernels<S>::depthwise)(p, 0, outputs, panel);
      return;
    }
    const auto rows = S2S_SELECT(ConvolutionStepKernels<S>::rows);
    constexpr int64_t block = 64;  // a multiple of every instruction set's panel
    const int64_t blocks = (per_group + block - 1) / block, work = batch_ * std::min(block, per_group) * channels / groups * taps_ + 1;
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
  int64_t taps_;
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
    Stepper<S> stepper(s.batch, s.taps);
    stepper.sums(data<S>(x), view, data<S>(weight), data<S>(bias), s.channels, s.outputs, groups, dilation, u, panel, panel_size);
    Stepper<S>::push(data<S>(x), view, s.batch);
    if (s.span) *at = (*at + 1) % s.span;
    S2S_SELECT(ConvolutionStepKernels<S>::finish)
    (s.activation, u, s.batch, s.outputs, nullptr, 0, 0, data<S>(residual), residual ? residual->stride(0) : 0,
     residual ? residual->stride(1) : 0, mutable_data<S>(y));
    return y;
  });
}

// Checks that name the layer are written where they fail: 30 layers have 120 tensors.
void check_layer(const char* op, const char* name, int64_t layer, const Tensor& tensor, ScalarType type, int64_t rows, int64_t columns,
                 int64_t taps) {
  const bool good = tensor.is_cpu() && tensor.scalar_type() == type && tensor.is_contiguous() && tensor.dim() == (columns ? 3 : 1) &&
                    tensor.size(0) == rows && (!columns || (tensor.size(1) == columns && tensor.size(2) == taps));
  STD_TORCH_CHECK(good, op, ": ", name, "[", layer, "] must be contiguous, on the CPU, ", dtype_name(type), " and of ", rows, " rows, got ",
                  shape_text(tensor));
}

Tensor wavenet_step(const Tensor& x_in, const Tensor& ring, const Tensor& position, const std::vector<Tensor>& conv_weight,
                    const std::vector<Tensor>& conv_bias, const std::vector<Tensor>& out_weight, const std::vector<Tensor>& out_bias,
                    const OptionalTensor& condition, const std::vector<int64_t>& dilations) {
  const char* op = "wavenet_step";
  check_cpu(op, "x_t", x_in);
  check_dim(op, "x_t", x_in, 2);
  const int64_t layers = static_cast<int64_t>(dilations.size()), batch = x_in.size(0), channels = x_in.size(1);
  STD_TORCH_CHECK(layers > 0, op, ": dilations must name a layer");
  for (const std::vector<Tensor>* list : {&conv_weight, &conv_bias, &out_weight, &out_bias})
    STD_TORCH_CHECK(static_cast<int64_t>(list->size()) == layers, op, ": every list must have one tensor a layer, got ", list->size());
  check_dim(op, "conv_weight", conv_weight[0], 3);
  check_dim(op, "out_weight", out_weight[0], 3);
  const int64_t taps = conv_weight[0].size(2), skips = out_weight[0].size(0) - channels;
  STD_TORCH_CHECK(taps >= 1 && skips >= 0, op, ": conv_weight must have a tap and out_weight at least C rows");
  const ScalarType type = x_in.scalar_type();
  int64_t slots = 0;
  for (int64_t l = 0; l < layers; ++l) {
    STD_TORCH_CHECK(dilations[l] >= 1, op, ": dilations must be at least 1, got ", dilations[l]);
    slots += (taps - 1) * dilations[l];
    check_layer(op, "conv_weight", l, conv_weight[l], type, 2 * channels, channels, taps);
    check_layer(op, "conv_bias", l, conv_bias[l], type, 2 * channels, 0, 0);
    check_layer(op, "out_weight", l, out_weight[l], type, channels + skips, channels, 1);
    check_layer(op, "out_bias", l, out_bias[l], type, channels + skips, 0, 0);
  }
  check_argument(op, "ring", ring, type, {batch, slots, channels});
  STD_TORCH_CHECK(ring.is_contiguous(), op, ": ring must be contiguous");
  check_argument(op, "condition", condition, type, {batch, layers * 2 * channels});
  int64_t* at = checked_position(op, position);
  const Tensor x_t = as_contiguous(x_in);
  Tensor skip = empty_cpu({batch, skips}, type);
  return dispatch_floating(op, "x_t", type, [&](auto zero) {
    using S = decltype(zero);
    using C = compute_t<S>;
    const int64_t panel_size = Stepper<S>::panel_elements(channels, taps), threads = thread_count();
    const int64_t u_size = batch * std::max(2 * channels, channels + skips) + 16;
    Workspace workspace(Workspace::bytes<C>(threads * panel_size) + Workspace::bytes<C>(u_size) +
                        3 * Workspace::bytes<S>(batch * (channels + skips) + 16));
    C* panel = workspace.take<C>(threads * panel_size);
    C* u = workspace.take<C>(u_size);
    std::fill(u, u + u_size, C(0));  // vectors are read to their ends, where denormal numbers would cost a microsecond
    S* x = workspace.take<S>(batch * channels);
    S* z = workspace.take<S>(batch * channels);
    S* both = workspace.take<S>(batch * (channels + skips));
    std::copy(data<S>(x_t), data<S>(x_t) + batch * channels, x);
    S* sum = mutable_data<S>(skip);
    S* rings = mutable_data<S>(ring);
    const auto finish = S2S_SELECT(ConvolutionStepKernels<S>::finish);
    const auto add = S2S_SELECT(ConvolutionStepKernels<S>::add);
    Stepper<S> conv(batch, taps), out(batch, 1);
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t span = (taps - 1) * dilations[l];
      const RingView<S> view{rings, slots * channels, channels, span, span ? *at % span : 0};
      rings += span * channels;
      conv.sums(x, view, data<S>(conv_weight[l]), data<S>(conv_bias[l]), channels, 2 * channels, 1, dilations[l], u, panel, panel_size,
                &out_weight[l]);
      Stepper<S>::push(x, view, batch);
      const S* extra = condition ? data<S>(*condition) + l * 2 * channels * condition->stride(1) : nullptr;
      finish(Activation::gated_tanh, u, batch, 2 * channels, extra, condition ? condition->stride(0) : 0,
             condition ? condition->stride(1) : 0, nullptr, 0, 0, z);
      out.sums(z, RingView<S>{}, data<S>(out_weight[l]), data<S>(out_bias[l]), channels, channels + skips, 1, 1, u, panel, panel_size,
               &conv_weight[(l + 1) % layers]);
      finish(Activation::none, u, batch, channels + skips, nullptr, 0, 0, nullptr, 0, 0, both);
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

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("causal_conv1d_step", TORCH_BOX(&s2s::causal_conv1d_step));
  m.impl("wavenet_step", TORCH_BOX(&s2s::wavenet_step));
}
