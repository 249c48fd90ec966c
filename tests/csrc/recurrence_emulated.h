// Launches the persistent recurrences on the host: what csrc/cuda/recurrence.cu is on a GPU.
#pragma once
#include "../../csrc/cuda/recurrence_kernels.cuh"

namespace s2s::persistent {

// Few K-blocks are kept in registers here, so that small sizes reach shared memory too.
constexpr int held_here = 1;

// Fills in what follows from the rest of a plan.
inline void complete_plan(RecurrencePlan& p, const RecurrenceShape& shape) {
  p.held = shape.operand == Operand::float32 ? 0 : held_here;
  p.shared_bytes = RecurrenceLayout(p, shape).bytes;
  p.workspace_bytes = workspace_bytes(p, shape);
}

template <class Arguments, class F, class B>
void run(const Arguments& a, const F& grid_kernel, const B& cluster_kernel) {
  const RecurrencePlan& p = a.plan;
  const unsigned threads = p.warps_m * p.warps_k * warp;
  if (p.cluster)
    emulator::launch(cluster_kernel, p.team * p.teams, threads, p.team, false, p.shared_bytes, a);
  else
    emulator::launch(grid_kernel, p.team * p.teams, threads, 1, true, p.shared_bytes, a);
}

template <Operand operand, int held>
void run_forward(const RecurrenceForward& a) {
  run(a, recurrence_forward<operand, false, held>, recurrence_forward<operand, true, held>);
}
template <Operand operand, int held>
void run_backward(const RecurrenceBackward& a) {
  run(a, recurrence_backward<operand, false, held>, recurrence_backward<operand, true, held>);
}

}  // namespace s2s::persistent
