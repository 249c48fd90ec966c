// Binding of causal convolution on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "convolution.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "convolution_binding.h"
#include "pool.h"

#define S2S_TILES
#define S2S_KERNELS "convolution_kernels.h"
#include "each_isa.h"
#include "convolution_call.h"
#include "convolution_gradients.h"

namespace s2s {
namespace {

std::tuple<Tensor, Tensor> causal_conv1d_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                 const OptionalTensor& residual, const OptionalTensor& lengths_in,
                                                 const OptionalTensor& initial_state, const OptionalTensor& condition, int64_t dilation,
                                                 int64_t groups, int64_t activation, bool causal, bool save) {
  const char* op = "causal_conv1d";
  const OptionalTensor lengths = as_contiguous(lengths_in);
  const Shape s = checked_sequence(op, x, weight, lengths, initial_state, dilation, groups, activation, causal);
  check_argument(op, "bias", bias, x.scalar_type(), {s.outputs});
  check_argument(op, "residual", residual, x.scalar_type(), {s.batch, s.results(), s.time});
  check_argument(op, "condition", condition, x.scalar_type(), {s.batch, s.outputs, -1});
  STD_TORCH_CHECK(!condition || condition->size(2) == s.time || condition->size(2) == 1, op, ": condition must be (B, C_out, T or 1), got ",
                  shape_text(*condition));
  return dispatch_floating(op, "x", x, [&](auto zero) {
    using S = decltype(zero);
    using C = compute_t<S>;
    const bool gate = is_gate(s.activation), apart = gate && groups > 1;
    Tensor y = empty_cpu({s.batch, s.results(), s.time}, x.scalar_type());
    Tensor saved = save || apart ? empty_cpu({s.batch, s.outputs, s.time}, scalar_type_of<C>) : empty_cpu({0}, scalar_type_of<C>);
    const std::vector<C> start = widened<S>(bias);
    Convolution<S, S> p{};
    p.batch = s.batch, p.channels = s.channels, p.outputs = s.outputs, p.taps = s.taps, p.groups = groups;
    p.origin = -s.left, p.dilation = dilation;
    p.in = signal<S>(x), p.before = signal<S>(initial_state);
    if (!s.span) p.before = {};
    p.span = s.span, p.time = s.time;
    p.lengths = s.lengths, p.clip = s.lengths != nullptr;
    p.begin = 0, p.end = s.time;
    p.rows = block_rows(s.outputs / groups, gate && !apart ? 2 : 1);
    p.bias = bias ? start.data() : nullptr;
    p.condition = signal<S>(condition);
    if (condition && condition->size(2) == 1) p.condition.time = 0;
    p.residual = signal<S>(residual);
    p.saved = save || apart ? mutable_data<C>(saved) : nullptr;
    p.activation = apart ? Activation::none : s.activation;
    p.out = apart ? Signal<S>{} : contiguous_signal(mutable_data<S>(y), s.results(), s.time);
    Workspace packed(Workspace::bytes<C>(weight.numel()));
    C* weights = packed.take<C>(weight.numel());
    pack_weights(view<const S, 3>(weight), groups, p.rows, gate && !apart, weights);
    p.weights = weights;
    convolve(p);
    if (apart) {
      S* to = mutable_data<S>(y);
      const auto finish = S2S_SELECT(ConvolutionKernels<S, S>::finish);
      const Signal<const S> after = signal<S>(residual);
      parallel(s.batch * s.results(), 1 + (1 << 14) / (s.time + 1), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t b = row / s.results(), r = row % s.results(), kept = p.high(b);
          const C* a = p.saved + (b * s.outputs + r) * s.time;
          // Lines end where the next begins, so the last vector is finished from a copy that may be read to its end.
          const int64_t whole = kept / 16 * 16;
          const S* add = after.data ? after.data + b * after.batch + r * after.channel : nullptr;
          finish(s.activation, a, a + s.results() * s.time, add, after.time, to + row * s.time, whole);
          C last[2][16] = {};
          std::copy(a + whole, a + kept, last[0]);
          std::copy(a + s.results() * s.time + whole, a + s.results() * s.time + kept, last[1]);
          finish(s.activation, last[0], last[1], add ? add + whole * after.time : nullptr, after.time, to + row * s.time + whole,
                 kept - whole);
          std::fill(to + row * s.time + kept, to + (row + 1) * s.time, from_compute<S>(C(0)));
        }
      });
    }
    return std::make_tuple(y, save ? saved : empty_cpu({0}, scalar_type_of<C>));
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                                                          const OptionalTensor& saved_in, const OptionalTensor& lengths_in,
                                                                          const OptionalTensor& initial_state, int64_t dilation,
                                                                          int64_t groups, int64_t activation, bool causal,
                                                                          bool saved_output, bool need_x, bool need_weight, bool need_bias,
                                                                          bool need_state, bool need_condition) {
  const char* op = "causal_conv1d_backward";
  const OptionalTensor lengths = as_contiguous(lengths_in), saved = as_contiguous(saved_in);
  const Shape s = checked_sequence(op, x, weight, lengths, initial_state, dilation, groups, activation, causal);
  check_argument(op, "grad", grad, x.scalar_type(), {s.batch, s.results(), s.time});
  STD_TORCH_CHECK(saved || s.activation == Activation::none, op, ": saved must be given under an activation");
  STD_TORCH_CHECK(!need_state || initial_state, op, ": initial_state must be given where its gradient is wanted");
  return dispatch_floating(op, "x", x, [&](auto zero) {
    using S = decltype(zero);
    const bool from_output = saved && saved_output;
    check_argument(op, "saved", saved, from_output ? x.scalar_type() : scalar_type_of<compute_t<S>>, {s.batch, s.outputs, s.time});
    STD_TORCH_CHECK(!from_output || s.activation == Activation::relu || s.activation == Activation::tanh, op,
                    ": saved must be what enters the activation");
    return Backward<S>(s, grad, x, weight, saved, initial_state, from_output, {need_x, need_weight, need_bias, need_state, need_condition})
        .run();
  });
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("causal_conv1d_forward", TORCH_BOX(&s2s::causal_conv1d_forward));
  m.impl("causal_conv1d_backward", TORCH_BOX(&s2s::causal_conv1d_backward));
}
