// The persistent recurrences on the host, for ctypes: what csrc/cuda/recurrence.cpp is on a GPU.
#include "recurrence_emulated.h"

namespace {

using namespace s2s::persistent;

bool fits(const RecurrencePlan& p, const RecurrenceShape& shape) {
  return p.held == (shape.operand == Operand::float32 ? 0 : held_here) && p.shared_bytes == RecurrenceLayout(p, shape).bytes;
}

}  // namespace

extern "C" {

// plan_recurrence, of a machine of so many multiprocessors, so much shared memory for a block, and clusters or none. 0: nothing fits.
int plan(const RecurrenceCall* call, int backward, const int64_t* machine, int64_t* to) {
  RecurrencePlan p{};
  if (!plan_recurrence(shape_of(*call, backward), {static_cast<int>(machine[0]), static_cast<int>(machine[1]), machine[2] != 0}, p))
    return 0;
  write_plan(p, to);
  return 1;
}

// Fills in what follows from the rest of a plan.
void complete(const RecurrenceCall* call, int backward, int64_t* plan) {
  RecurrencePlan p = read_plan(plan);
  complete_plan(p, shape_of(*call, backward));
  write_plan(p, plan);
}

double modelled_step(const RecurrenceCall* call, int backward, const int64_t* plan, int hopper) {
  return step_time(read_plan(plan), shape_of(*call, backward), hopper);
}

int forward(const RecurrenceCall* call, const int64_t* plan, const RecurrenceForwardPointers* pointers) {
  const RecurrenceForward a = forward_arguments(read_plan(plan), *call, *pointers);
  if (!fits(a.plan, a.shape)) return 0;
  if (a.shape.operand == Operand::bfloat16) run_forward<Operand::bfloat16, held_here>(a);
  if (a.shape.operand == Operand::float16) run_forward<Operand::float16, held_here>(a);
  if (a.shape.operand == Operand::tf32) run_forward<Operand::tf32, held_here>(a);
  if (a.shape.operand == Operand::float32) run_forward<Operand::float32, 0>(a);
  return 1;
}

int backward(const RecurrenceCall* call, const int64_t* plan, const RecurrenceBackwardPointers* pointers) {
  const RecurrenceBackward a = backward_arguments(read_plan(plan), *call, *pointers);
  if (!fits(a.plan, a.shape)) return 0;
  if (a.shape.operand == Operand::bfloat16) run_backward<Operand::bfloat16, held_here>(a);
  if (a.shape.operand == Operand::float16) run_backward<Operand::float16, held_here>(a);
  if (a.shape.operand == Operand::tf32) run_backward<Operand::tf32, held_here>(a);
  if (a.shape.operand == Operand::float32) run_backward<Operand::float32, 0>(a);
  return 1;
}

}  // extern "C"
