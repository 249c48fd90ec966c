// What the bindings of causal convolution and of its steps share: the sizes of a call, checked.
#pragma once
#include "convolution.h"
#include "tensor.h"

namespace s2s {
namespace {

// Sizes of one call, checked.
struct Shape {
  int64_t batch, channels, time, outputs, taps, groups, dilation, span, left;
  Activation activation;
  const int64_t* lengths = nullptr;
  int64_t results() const { return is_gate(activation) ? outputs / 2 : outputs; }
};

Activation checked_activation(const char* op, int64_t activation) {
  STD_TORCH_CHECK(activation >= 0 && activation <= static_cast<int64_t>(Activation::gated_tanh), op, ": activation must be in [0, 6], got ",
                  activation);
  return static_cast<Activation>(activation);
}

Shape checked_shape(const char* op, const Tensor& x, const Tensor& weight, int64_t dilation, int64_t groups, int64_t activation) {
  Shape shape{};
  check_cpu(op, "x", x);
  check_cpu(op, "weight", weight);
  check_dim(op, "weight", weight, 3);
  check_dtype(op, "weight", weight, x.scalar_type());
  shape.activation = checked_activation(op, activation);
  shape.batch = x.size(0);
  shape.channels = x.size(1);
  shape.outputs = weight.size(0);
  shape.taps = weight.size(2);
  shape.groups = groups;
  shape.dilation = dilation;
  STD_TORCH_CHECK(dilation >= 1, op, ": dilation must be at least 1, got ", dilation);
  STD_TORCH_CHECK(groups >= 1 && shape.channels % groups == 0 && shape.outputs % groups == 0, op,
                  ": groups must divide C_in and C_out, got ", groups);
  STD_TORCH_CHECK(shape.taps >= 1 && weight.size(1) == shape.channels / groups, op, ": weight must be (C_out, C_in / groups, K), got ",
                  shape_text(weight));
  STD_TORCH_CHECK(!is_gate(shape.activation) || shape.outputs % 2 == 0, op, ": weight must have an even C_out under a gate, got ",
                  shape_text(weight));
  shape.span = (shape.taps - 1) * dilation;
  return shape;
}

}  // namespace
}  // namespace s2s
