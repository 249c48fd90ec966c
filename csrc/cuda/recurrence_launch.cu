// Every kernel of the persistent recurrences that is compiled, and their launches.
#include <cuda_runtime.h>

#include "recurrence_kernels.cuh"
#include "recurrence_launch.h"

namespace s2s::persistent {
namespace {

template <class Arguments>
using Kernel = void (*)(const Arguments);

template <Operand operand, bool cluster, bool extended>
Kernel<RecurrenceForward> kernel_for(const RecurrenceForward*) {
  return recurrence_forward<operand, cluster, held_blocks(operand, false, extended), extended>;
}
template <Operand operand, bool cluster, bool extended>
Kernel<RecurrenceBackward> kernel_for(const RecurrenceBackward*) {
  return recurrence_backward<operand, cluster, held_blocks(operand, true, extended), extended>;
}
template <class Arguments, bool cluster, bool extended>
Kernel<Arguments> kernel_of(Operand operand) {
  constexpr const Arguments* direction = nullptr;
  switch (operand) {
    case Operand::bfloat16:
      return kernel_for<Operand::bfloat16, cluster, extended>(direction);
    case Operand::float16:
      return kernel_for<Operand::float16, cluster, extended>(direction);
    case Operand::tf32:
      return kernel_for<Operand::tf32, cluster, extended>(direction);
    default:
      return kernel_for<Operand::float32, cluster, extended>(direction);
  }
}
template <class Arguments>
Kernel<Arguments> kernel_of(const RecurrencePlan& plan, Operand operand) {
  if (plan.extended) return plan.cluster ? kernel_of<Arguments, true, true>(operand) : kernel_of<Arguments, false, true>(operand);
  return plan.cluster ? kernel_of<Arguments, true, false>(operand) : kernel_of<Arguments, false, false>(operand);
}

// How a plan is launched; both attributes outlive it.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(const RecurrencePlan& p, cudaStream_t stream) {
    config.gridDim = dim3(p.team * p.teams);
    config.blockDim = dim3(warps_of(p) * warp);
    config.dynamicSmemBytes = p.shared_bytes;
    config.stream = stream;
    config.attrs = &attribute, config.numAttrs = 1;
    if (p.cluster) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(p.team), 1, 1};
    } else {
      attribute.id = cudaLaunchAttributeCooperative;  // all blocks resident, or an error: never a barrier that waits for ever
      attribute.val.cooperative = 1;
    }
  }
  Launch(const Launch&) = delete;
};

template <class K>
cudaError_t prepare(K kernel, const RecurrencePlan& p) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes);
  if (error == cudaSuccess && p.cluster && p.team > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

template <class K>
cudaError_t resident(K kernel, const RecurrencePlan& p, int* teams) {
  *teams = 0;
  if (const cudaError_t error = prepare(kernel, p)) return error;
  if (p.cluster) {
    Launch launch(p, nullptr);
    return cudaOccupancyMaxActiveClusters(teams, kernel, &launch.config);
  }
  int device = 0, processors = 0, blocks = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  const int threads = warps_of(p) * warp;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, p.shared_bytes);
  *teams = blocks * processors / p.team;
  return error;
}

// Null where there is none. What was returned is forgotten: the next launch, anyone's, would report it again.
const char* text_of(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class Arguments>
const char* launch(Arguments a, void* stream) {
  const auto kernel = kernel_of<Arguments>(a.plan, a.shape.operand);
  cudaError_t error = prepare(kernel, a.plan);
  if (error == cudaSuccess) {
    Launch launch(a.plan, static_cast<cudaStream_t>(stream));
    error = cudaLaunchKernelEx(&launch.config, kernel, a);
  }
  return text_of(error);
}

}  // namespace

const char* launch_recurrence(const RecurrenceForward& a, void* stream) { return launch(a, stream); }
const char* launch_recurrence(const RecurrenceBackward& a, void* stream) { return launch(a, stream); }

const char* resident_teams(const RecurrencePlan& plan, Operand operand, bool backward, int* teams) {
  const cudaError_t error = backward ? resident(kernel_of<RecurrenceBackward>(plan, operand), plan, teams)
                                     : resident(kernel_of<RecurrenceForward>(plan, operand), plan, teams);
  return text_of(error);
}

}  // namespace s2s::persistent
