// The persistent recurrences of one operand, as csrc/cuda/recurrence.cu compiles them: both directions, both exchanges.
#include "../../csrc/cuda/recurrence_kernels.cuh"

namespace s2s::persistent {

constexpr int forwards = Operand::OPERAND == Operand::float32 ? 0 : held_forward;
constexpr int backwards = Operand::OPERAND == Operand::float32 ? 0 : held_backward;
template __global__ void recurrence_forward<Operand::OPERAND, false, forwards>(const __grid_constant__ RecurrenceForward);
template __global__ void recurrence_forward<Operand::OPERAND, true, forwards>(const __grid_constant__ RecurrenceForward);
template __global__ void recurrence_backward<Operand::OPERAND, false, backwards>(const __grid_constant__ RecurrenceBackward);
template __global__ void recurrence_backward<Operand::OPERAND, true, backwards>(const __grid_constant__ RecurrenceBackward);

}  // namespace s2s::persistent
