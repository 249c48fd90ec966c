// Every kernel of the persistent recurrences that is compiled, and their launches.
#include <cuda_runtime.h>

#include "recurrence_kernels.cuh"
#include "recurrence_launch.h"

namespace s2s::persistent {
namespace {

template <class Arguments>
using Kernel = void (*)(Arguments);

template <bool cluster>
Kernel<const RecurrenceForward> forward_kernel(Operand operand) {
  switch (operand) {
    case Operand::bfloat16:
      return recurrence_forward<Operand::bfloat16, cluster, held_forward>;
    case Operand::float16:
      return recurrence_forward<Operand::float16, cluster, held_forward>;
    case Operand::tf32:
      return recurrence_forward<Operand::tf32, cluster, held_forward>;
    default:
      return recurrence_forward<Operand::float32, cluster, 0>;
  }
}
template <bool cluster>
Kernel<const RecurrenceBackward> backward_kernel(Operand operand) {
  switch (operand) {
    case Operand::bfloat16:
      return recurrence_backward<Operand::bfloat16, cluster, held_backward>;
    case Operand::float16:
      return recurrence_backward<Operand::float16, cluster, held_backward>;
    case Operand::tf32:
      return recurrence_backward<Operand::tf32, cluster, held_backward>;
    default:
      return recurrence_backward<Operand::float32, cluster, 0>;
  }
}
Kernel<const RecurrenceForward> kernel_of(const RecurrenceForward& a) {
  return a.plan.cluster ? forward_kernel<true>(a.shape.operand) : forward_kernel<false>(a.shape.operand);
}
Kernel<const RecurrenceBackward> kernel_of(const RecurrenceBackward& a) {
  return a.plan.cluster ? backward_kernel<true>(a.shape.operand) : backward_kernel<false>(a.shape.operand);
}

// How a plan is launched; both attributes outlive it.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(const RecurrencePlan& p, cudaStream_t stream) {
    config.gridDim = dim3(p.team * p.teams);
    config.blockDim = dim3(p.warps_m * p.warps_k * warp);
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
  const int threads = p.warps_m * p.warps_k * warp;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, p.shared_bytes);
  *teams = blocks * processors / p.team;
  return error;
}

template <class Arguments>
const char* launch(Arguments a, void* stream) {
  const auto kernel = kernel_of(a);
  cudaError_t error = prepare(kernel, a.plan);
  if (error == cudaSuccess) {
    Launch launch(a.plan, static_cast<cudaStream_t>(stream));
    error = cudaLaunchKernelEx(&launch.config, kernel, a);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_recurrence(const RecurrenceForward& a, void* stream) { return launch(a, stream); }
const char* launch_recurrence(const RecurrenceBackward& a, void* stream) { return launch(a, stream); }

const char* resident_teams(const RecurrencePlan& plan, Operand operand, bool backward, int* teams) {
  const bool cluster = plan.cluster;
  cudaError_t error;
  if (backward)
    error = resident(cluster ? backward_kernel<true>(operand) : backward_kernel<false>(operand), plan, teams);
  else
    error = resident(cluster ? forward_kernel<true>(operand) : forward_kernel<false>(operand), plan, teams);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace s2s::persistent
