// Binding of the plan and its model of time: host code that every build has, with CUDA or without.
#include <torch/csrc/stable/library.h>

#include "recurrence_binding.h"

namespace s2s::persistent {
namespace {

RecurrenceMachine checked_machine(const std::vector<int64_t>& machine) {
  STD_TORCH_CHECK(machine.size() == 3, op, ": machine must have 3 entries, got ", machine.size());
  return {static_cast<int>(machine[0]), static_cast<int>(machine[1]), machine[2] != 0};
}

RecurrenceShape checked_shape(const std::vector<int64_t>& size, bool backward) {
  const RecurrenceCall call = checked_call(size, 0, 0);
  STD_TORCH_CHECK(call.cell >= 0 && call.cell <= static_cast<int64_t>(Cell::rnn_relu), op, ": unknown cell ", call.cell);
  STD_TORCH_CHECK(call.operand >= 0 && call.operand <= static_cast<int64_t>(Operand::float32), op, ": unknown operand ", call.operand);
  return shape_of(call, backward);
}

std::vector<int64_t> plan(std::vector<int64_t> size, bool backward, std::vector<int64_t> machine) {
  RecurrencePlan found{};
  if (!plan_recurrence(checked_shape(size, backward), checked_machine(machine), found)) return {};
  std::vector<int64_t> fields(plan_fields);
  write_plan(found, fields.data());
  return fields;
}

double step(std::vector<int64_t> size, bool backward, std::vector<int64_t> machine, std::vector<int64_t> plan) {
  const RecurrenceShape shape = checked_shape(size, backward);
  const RecurrencePlan laid = checked_plan(plan);
  STD_TORCH_CHECK(laid.rows > 0 && laid.teams > 0 && laid.warps_m > 0 && laid.warps_k > 0, op, ": plan must be positive");
  return planned_time(laid, shape, checked_machine(machine).clusters);
}

}  // namespace
}  // namespace s2s::persistent

STABLE_TORCH_LIBRARY_IMPL(s2s, CompositeExplicitAutograd, m) {
  m.impl("recurrence_persistent_plan", TORCH_BOX(&s2s::persistent::plan));
  m.impl("recurrence_persistent_step", TORCH_BOX(&s2s::persistent::step));
}
