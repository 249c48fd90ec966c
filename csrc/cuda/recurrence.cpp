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
  const int rows = (backward ? 1 : shape.gates) * p.units;
  STD_TORCH_CHECK(p.units > 0 && p.team > 0 && p.teams > 0 && p.rows > 0 && p.warps_m > 0 && p.warps_k > 0, op, ": plan must be positive");
  STD_TORCH_CHECK(p.units * p.team >= call.hidden && p.warps_m * shape.tiles() * tile_m >= rows, op, ": plan doesn't hold all units");
  STD_TORCH_CHECK(!p.cluster || p.units * shape.element_bytes() % 16 == 0, op, ": plan must share out whole vectors in a cluster");
  STD_TORCH_CHECK(p.warps_m * p.warps_k * warp <= most_threads, op, ": plan has too many threads");
  STD_TORCH_CHECK(p.held == (shape.operand == Operand::float32 ? 0
                             : backward                        ? held_backward
                                                               : held_forward),
                  op, ": plan of another build");
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

void forward(Tensor inputs, Tensor weight_hh, OptionalTensor bias_hh, OptionalTensor h0, OptionalTensor c0, OptionalTensor mask,
             OptionalTensor lengths, OptionalTensor reset, OptionalTensor seed, Tensor workspace, Tensor output, Tensor h_n,
             OptionalTensor c_n, OptionalTensor gates, OptionalTensor extra, OptionalTensor hidden, std::vector<int64_t> size,
             double zoneout_h, double zoneout_c, std::vector<int64_t> plan) {
  const RecurrenceCall call = checked_call(size, zoneout_h, zoneout_c);
  const RecurrencePlan laid = checked_plan(plan);
  check_plan(laid, call, false, workspace);
  const Unpack unpack(inputs);
  const int64_t B = call.batch, T = call.time, H = call.hidden, G = gates_of(static_cast<Cell>(call.cell)) * H;
  const ScalarType type = type_of(call.operand), wide = ScalarType::Float;
  const RecurrenceForwardPointers pointers{unpack("inputs", inputs, wide, {B, T, G}),
                                           unpack("weight_hh", weight_hh, type, {G, H}),
                                           unpack("bias_hh", bias_hh, wide, {G}),
                                           unpack("h0", h0, wide, {B, H}),
                                           unpack("c0", c0, wide, {B, H}),
                                           unpack("recurrent_mask", mask, wide, {B, H}),
                                           unpack("lengths", lengths, ScalarType::Long, {B}),
                                           unpack("reset", reset, ScalarType::Bool, {B, T}),
                                           unpack("seed", seed, ScalarType::Long, {2}),
                                           unpack("workspace", workspace, ScalarType::Byte, {-1}),
                                           unpack("output", output, type, {B, T, H}),
                                           unpack("h_n", h_n, wide, {B, H}),
                                           unpack("c_n", c_n, wide, {B, H}),
                                           unpack("gates", gates, wide, {B, T, G}),
                                           unpack("extra", extra, wide, {B, T, H}),
                                           unpack("hidden", hidden, wide, {B, T, H})};
  const torch::stable::accelerator::DeviceGuard guard(unpack.device());
  check_launch(launch_recurrence(forward_arguments(laid, call, pointers), unpack.stream()));
}

void backward(Tensor grad_output, OptionalTensor grad_h, OptionalTensor grad_c, Tensor weight_hh, OptionalTensor h0, OptionalTensor c0,
              OptionalTensor mask, OptionalTensor lengths, OptionalTensor reset, OptionalTensor seed, Tensor states, OptionalTensor gates,
              OptionalTensor extra, Tensor workspace, Tensor grad_inputs, OptionalTensor grad_recurrent, Tensor grad_h0,
              OptionalTensor grad_c0, std::vector<int64_t> size, double zoneout_h, double zoneout_c, std::vector<int64_t> plan) {
  const RecurrenceCall call = checked_call(size, zoneout_h, zoneout_c);
  const RecurrencePlan laid = checked_plan(plan);
  check_plan(laid, call, true, workspace);
  const Unpack unpack(grad_output);
  const int64_t B = call.batch, T = call.time, H = call.hidden, G = gates_of(static_cast<Cell>(call.cell)) * H;
  const ScalarType type = type_of(call.operand), wide = ScalarType::Float;
  const RecurrenceBackwardPointers pointers{unpack("grad_output", grad_output, wide, {B, T, H}),
                                            unpack("grad_h", grad_h, wide, {B, H}),
                                            unpack("grad_c", grad_c, wide, {B, H}),
                                            unpack("weight_hh", weight_hh, type, {G, H}),
                                            unpack("h0", h0, wide, {B, H}),
                                            unpack("c0", c0, wide, {B, H}),
                                            unpack("recurrent_mask", mask, wide, {B, H}),
                                            unpack("lengths", lengths, ScalarType::Long, {B}),
                                            unpack("reset", reset, ScalarType::Bool, {B, T}),
                                            unpack("seed", seed, ScalarType::Long, {2}),
                                            unpack("states", states, wide, {B, T, H}),
                                            unpack("gates", gates, wide, {B, T, G}),
                                            unpack("extra", extra, wide, {B, T, H}),
                                            unpack("workspace", workspace, ScalarType::Byte, {-1}),
                                            unpack("grad_inputs", grad_inputs, wide, {B, T, G}),
                                            unpack("grad_recurrent", grad_recurrent, wide, {B, T, G}),
                                            unpack("grad_h0", grad_h0, wide, {B, H}),
                                            unpack("grad_c0", grad_c0, wide, {B, H})};
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
