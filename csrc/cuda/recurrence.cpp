// Binding of the persistent recurrences: checks, unpacks tensors, launches on the current stream. Who calls it has allocated everything.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "recurrence_binding.h"
#include "recurrence_launch.h"

namespace s2s::persistent {
namespace {

// The address of a contiguous tensor on the device of the others; null where it is absent.
class Unpack {
 public:
  explicit Unpack(const Tensor& first) : device_(first.get_device_index()) {}

  void* operator()(const char* name, const OptionalTensor& tensor, ScalarType type, std::initializer_list<int64_t> shape) const {
    if (!tensor) return nullptr;
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == device_, op, ": ", name,
                    " must be on the CUDA device of the others");
    STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
    check_dtype(op, name, *tensor, type);
    check_shape(op, name, *tensor, shape);
    return tensor->mutable_data_ptr();
  }
  int32_t device() const { return device_; }
  void* stream() const {
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == AOTI_TORCH_SUCCESS, op, ": no current stream");
    return stream;
  }

 private:
  int32_t device_;
};

ScalarType type_of(int64_t operand) {
  STD_TORCH_CHECK(operand >= 0 && operand <= static_cast<int64_t>(Operand::float32), op, ": unknown operand ", operand);
  return operand == 0 ? ScalarType::BFloat16 : operand == 1 ? ScalarType::Half : ScalarType::Float;
}

// A plan is another's word: what of it could make a kernel hang or leave its memory is checked again.
void check_plan(const RecurrencePlan& p, const RecurrenceCall& call, bool backward, const OptionalTensor& workspace) {
  const RecurrenceShape shape = shape_of(call, backward);
  const int rows = backward ? p.width_units : shape.gates * p.units, projected = backward ? p.units : p.width_units;
  STD_TORCH_CHECK(p.units > 0 && p.width_units > 0 && p.team > 0 && p.teams > 0 && p.rows > 0 && p.warps_m > 0 && p.warps_k > 0, op,
                  ": plan must be positive");
  STD_TORCH_CHECK(
      p.units * p.team >= call.hidden && p.width_units * p.team >= call.width && p.warps_m * recurrent_tiles(backward) * tile_m >= rows, op,
      ": plan doesn't hold all units");
  STD_TORCH_CHECK(shape.projected ? p.project_k > 0 && p.project_m * tile_m >= projected
                                  : p.project_m == 0 && p.project_k == 0 && call.width == call.hidden && p.width_units == p.units,
                  op, ": plan doesn't fit the projection");
  STD_TORCH_CHECK(!p.cluster || (p.units | p.width_units) * shape.element_bytes() % 16 == 0, op,
                  ": plan must share out whole vectors in a cluster");
  STD_TORCH_CHECK(!p.cluster || !p.staged, op, ": plan must not stage a cluster's exchange");
  STD_TORCH_CHECK(warps_of(p) * warp <= most_threads, op, ": plan has too many threads");
  STD_TORCH_CHECK(p.extended == shape.extended() && p.held == held_blocks(shape.operand, backward, shape.extended()), op,
                  ": plan of another kernel");
  STD_TORCH_CHECK(p.shared_bytes == RecurrenceLayout(p, shape).bytes && p.workspace_bytes == workspace_bytes(p, shape) &&
                      workspace->numel() == p.workspace_bytes,
                  op, ": plan of another size");
}

void check_launch(const char* error) { STD_TORCH_CHECK(error == nullptr, op, ": ", error); }

int64_t resident(std::vector<int64_t> plan, int64_t operand, bool backward, int64_t device) {
  type_of(operand);
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  int teams = 0;
  check_launch(resident_teams(checked_plan(plan), static_cast<Operand>(operand), backward, &teams));
  return teams;
}

// What has to be there for the kernels that a call asks for.
void check_norms(const RecurrenceCall& call, const OptionalTensor& norm_hh, const OptionalTensor& norm_c, const OptionalTensor& norm_b,
                 const OptionalTensor& weight_hr) {
  const bool lstm = static_cast<Cell>(call.cell) == Cell::lstm, cell = call.normed && lstm;
  STD_TORCH_CHECK(norm_hh.has_value() == (call.normed != 0) && norm_c.has_value() == cell && norm_b.has_value() == cell, op,
                  ": norms must be given as size says");
  STD_TORCH_CHECK(weight_hr.has_value() == (call.projected != 0) && (lstm || !call.projected), op,
                  ": weight_hr must be given as size says");
}

void forward(Tensor inputs, Tensor weight_hh, OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, OptionalTensor weight_hr,
             OptionalTensor mask, OptionalTensor norm_hh, OptionalTensor norm_c, OptionalTensor norm_b, OptionalTensor lengths,
             OptionalTensor reset, OptionalTensor seed, Tensor workspace, Tensor output, Tensor h_n, OptionalTensor c_n,
             OptionalTensor gates, OptionalTensor extra, OptionalTensor hidden, OptionalTensor normed, std::vector<int64_t> size,
             double zoneout_h, double zoneout_c, std::vector<int64_t> plan) {
  const RecurrenceCall call = checked_call(size, zoneout_h, zoneout_c);
  const RecurrencePlan laid = checked_plan(plan);
  check_plan(laid, call, false, workspace);
  check_norms(call, norm_hh, norm_c, norm_b, weight_hr);
  const Unpack unpack(inputs);
  const int64_t B = call.batch, T = call.time, H = call.hidden, P = call.width, G = gates_of(static_cast<Cell>(call.cell)) * H;
  const ScalarType type = type_of(call.operand), wide = ScalarType::Float;
  const RecurrenceForwardPointers pointers{unpack("inputs", inputs, wide, {B, T, G}),
                                           unpack("weight_hh", weight_hh, type, {G, P}),
                                           unpack("bias_hh", bias_hh, wide, {G}),
                                           unpack("h0", h0, wide, {B, P}),
                                           unpack("c0", c0, wide, {B, H}),
                                           unpack("weight_hr", weight_hr, type, {P, H}),
                                           unpack("recurrent_mask", mask, wide, {B, P}),
                                           unpack("norm_hh", norm_hh, wide, {G}),
                                           unpack("norm_c", norm_c, wide, {H}),
                                           unpack("norm_b", norm_b, wide, {H}),
                                           unpack("lengths", lengths, ScalarType::Long, {B}),
                                           unpack("reset", reset, ScalarType::Bool, {B, T}),
                                           unpack("seed", seed, ScalarType::Long, {2}),
                                           unpack("workspace", workspace, ScalarType::Byte, {-1}),
                                           unpack("output", output, type, {B, T, P}),
                                           unpack("h_n", h_n, type, {B, P}),
                                           unpack("c_n", c_n, type, {B, H}),
                                           unpack("gates", gates, wide, {B, T, G}),
                                           unpack("extra", extra, wide, {B, T, H}),
                                           unpack("hidden", hidden, wide, {B, T, P}),
                                           unpack("normed", normed, wide, {B, T, 2 * G + 16})};
  const torch::stable::accelerator::DeviceGuard guard(unpack.device());
  check_launch(launch_recurrence(forward_arguments(laid, call, pointers), unpack.stream()));
}

void backward(Tensor grad_output, OptionalTensor grad_h, OptionalTensor grad_c, Tensor weight_hh, OptionalTensor h0, OptionalTensor c0,
              OptionalTensor weight_hr, OptionalTensor mask, OptionalTensor norm_hh, OptionalTensor norm_c, OptionalTensor norm_b,
              OptionalTensor lengths, OptionalTensor reset, OptionalTensor seed, Tensor states, OptionalTensor gates, OptionalTensor extra,
              OptionalTensor normed, OptionalTensor normed_product, OptionalTensor weight_sums, Tensor workspace, Tensor grad_inputs,
              OptionalTensor grad_recurrent, Tensor grad_h0, OptionalTensor grad_c0, OptionalTensor grad_projected,
              OptionalTensor grad_norm_c, OptionalTensor grad_norm_b, std::vector<int64_t> size, double zoneout_h, double zoneout_c,
              std::vector<int64_t> plan) {
  const RecurrenceCall call = checked_call(size, zoneout_h, zoneout_c);
  const RecurrencePlan laid = checked_plan(plan);
  check_plan(laid, call, true, workspace);
  check_norms(call, norm_hh, norm_c, norm_b, weight_hr);
  STD_TORCH_CHECK(!call.normed || (normed && normed_product && weight_sums), op, ": what forward has normalised must be given");
  STD_TORCH_CHECK(grad_norm_c.has_value() == norm_c.has_value() && grad_norm_b.has_value() == norm_b.has_value() &&
                      grad_projected.has_value() == weight_hr.has_value(),
                  op, ": gradients must be given as their tensors are");
  const Unpack unpack(grad_output);
  const int64_t B = call.batch, T = call.time, H = call.hidden, P = call.width, G = gates_of(static_cast<Cell>(call.cell)) * H;
  const ScalarType type = type_of(call.operand), wide = ScalarType::Float;
  const RecurrenceBackwardPointers pointers{unpack("grad_output", grad_output, wide, {B, T, P}),
                                            unpack("grad_h", grad_h, wide, {B, P}),
                                            unpack("grad_c", grad_c, wide, {B, H}),
                                            unpack("weight_hh", weight_hh, type, {G, P}),
                                            unpack("h0", h0, wide, {B, P}),
                                            unpack("c0", c0, wide, {B, H}),
                                            unpack("weight_hr", weight_hr, type, {P, H}),
                                            unpack("recurrent_mask", mask, wide, {B, P}),
                                            unpack("norm_hh", norm_hh, wide, {G}),
                                            unpack("norm_c", norm_c, wide, {H}),
                                            unpack("norm_b", norm_b, wide, {H}),
                                            unpack("lengths", lengths, ScalarType::Long, {B}),
                                            unpack("reset", reset, ScalarType::Bool, {B, T}),
                                            unpack("seed", seed, ScalarType::Long, {2}),
                                            unpack("states", states, wide, {B, T, P}),
                                            unpack("gates", gates, wide, {B, T, G}),
                                            unpack("extra", extra, wide, {B, T, H}),
                                            unpack("normed", normed, wide, {B, T, 2 * G + 16}),
                                            unpack("normed_product", normed_product, wide, {B * T, P}),
                                            unpack("weight_sums", weight_sums, wide, {P}),
                                            unpack("workspace", workspace, ScalarType::Byte, {-1}),
                                            unpack("grad_inputs", grad_inputs, wide, {B, T, G}),
                                            unpack("grad_recurrent", grad_recurrent, wide, {B, T, G}),
                                            unpack("grad_h0", grad_h0, wide, {B, P}),
                                            unpack("grad_c0", grad_c0, wide, {B, H}),
                                            unpack("grad_projected", grad_projected, wide, {B, T, P}),
                                            unpack("grad_norm_c", grad_norm_c, wide, {B, H}),
                                            unpack("grad_norm_b", grad_norm_b, wide, {B, H})};
  const torch::stable::accelerator::DeviceGuard guard(unpack.device());
  check_launch(launch_recurrence(backward_arguments(laid, call, pointers), unpack.stream()));
}

}  // namespace
}  // namespace s2s::persistent

STABLE_TORCH_LIBRARY_IMPL(s2s, CompositeExplicitAutograd, m) {
  m.impl("recurrence_persistent_resident", TORCH_BOX(&s2s::persistent::resident));
}
STABLE_TORCH_LIBRARY_IMPL(s2s, CUDA, m) {
  m.impl("recurrence_persistent_forward", TORCH_BOX(&s2s::persistent::forward));
  m.impl("recurrence_persistent_backward", TORCH_BOX(&s2s::persistent::backward));
}
