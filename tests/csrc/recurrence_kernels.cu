// The persistent recurrences of one operand, as csrc/cuda/recurrence_launch.cu compiles them: both directions, both exchanges, plain and
// extended.
#include "../../csrc/cuda/recurrence_kernels.cuh"

namespace s2s::persistent {

constexpr Operand operand = Operand::OPERAND;
#define KERNELS(cluster, extended)                                                                                \
  template __global__ void recurrence_forward<operand, cluster, held_blocks(operand, false, extended), extended>( \
      const __grid_constant__ RecurrenceForward);                                                                 \
  template __global__ void recurrence_backward<operand, cluster, held_blocks(operand, true, extended), extended>( \
      const __grid_constant__ RecurrenceBackward);
KERNELS(false, false)
KERNELS(true, false)
KERNELS(false, true)
KERNELS(true, true)

}  // namespace s2s::persistent
