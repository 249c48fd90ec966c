// Launches the persistent recurrences on the host: what csrc/cuda/recurrence_launch.cu is on a GPU.
#pragma once
#include "../../csrc/cuda/recurrence_kernels.cuh"

namespace s2s::persistent {

// Few K-blocks are kept in registers here, so that small sizes reach shared memory too.
constexpr int held_here(Operand operand) { return operand == Operand::float32 ? 0 : 1; }

// Fills in what follows from the exchange, the units, the teams, the rows and the warps over K of a plan.
inline void complete_plan(RecurrencePlan& p, const RecurrenceShape& shape) {
  const int each = p.cluster ? 16 / shape.element_bytes() : 1, width = static_cast<int>(shape.width);
  const auto tiles = [](int rows, int of_warp) { return (rows + of_warp * tile_m - 1) / (of_warp * tile_m); };
  p.extended = shape.extended();
  p.width_units = shape.projected ? ((width + p.team - 1) / p.team + each - 1) / each * each : p.units;
  p.warps_m = tiles(shape.backward ? p.width_units : shape.gates * p.units, recurrent_tiles(shape.backward));
  p.project_m = shape.projected ? tiles(shape.backward ? p.units : p.width_units, 1) : 0;
  p.project_k = shape.projected ? p.warps_k : 0;
  p.held = held_here(shape.operand);
  p.shared_bytes = RecurrenceLayout(p, shape).bytes;
  p.workspace_bytes = workspace_bytes(p, shape);
}

template <class Arguments, class Kernel>
void run(const Arguments& a, const Kernel& kernel) {
  const RecurrencePlan& p = a.plan;
  const unsigned threads = warps_of(p) * warp;
  emulator::launch(kernel, p.team * p.teams, threads, p.cluster ? p.team : 1, !p.cluster, p.shared_bytes, a);
}

template <Operand operand, bool cluster, bool extended>
void run_as(const RecurrenceForward& a) {
  run(a, recurrence_forward<operand, cluster, held_here(operand), extended>);
}
template <Operand operand, bool cluster, bool extended>
void run_as(const RecurrenceBackward& a) {
  run(a, recurrence_backward<operand, cluster, held_here(operand), extended>);
}
template <Operand operand, class Arguments>
void run_of(const Arguments& a) {
  if (a.plan.extended)
    a.plan.cluster ? run_as<operand, true, true>(a) : run_as<operand, false, true>(a);
  else
    a.plan.cluster ? run_as<operand, true, false>(a) : run_as<operand, false, false>(a);
}

}  // namespace s2s::persistent
