// The persistent recurrences on the host, for ctypes: what csrc/cuda/recurrence.cpp is on a GPU.
#include "recurrence_emulated.h"

namespace {

using namespace s2s::persistent;

bool fits(const RecurrencePlan& p, const RecurrenceShape& shape) {
  return p.extended == shape.extended() && p.held == held_here(shape.operand) && p.shared_bytes == RecurrenceLayout(p, shape).bytes;
}

template <class Arguments>
int run_any(const Arguments& a) {
  if (!fits(a.plan, a.shape)) return 0;
  if (a.shape.operand == Operand::bfloat16) run_of<Operand::bfloat16>(a);
  if (a.shape.operand == Operand::float16) run_of<Operand::float16>(a);
  if (a.shape.operand == Operand::tf32) run_of<Operand::tf32>(a);
  if (a.shape.operand == Operand::float32) run_of<Operand::float32>(a);
  return 1;
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
  return run_any(forward_arguments(read_plan(plan), *call, *pointers));
}

int backward(const RecurrenceCall* call, const int64_t* plan, const RecurrenceBackwardPointers* pointers) {
  return run_any(backward_arguments(read_plan(plan), *call, *pointers));
}

}  // extern "C"
