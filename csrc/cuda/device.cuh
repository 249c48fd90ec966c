// The few device facilities that the kernels use, under one name each. nvcc gets the real ones; a host compiler gets the emulator's,
// so that the same kernel source runs, and can be checked by a thread sanitizer, on a machine without a GPU.
#pragma once
#include <cstddef>
#include <cstdint>

namespace device {

// Sixteen bytes, the unit of wide loads.
struct alignas(16) Words {
  uint32_t at[4];
};
// Eight, which are stored and loaded as one even while others do so.
struct alignas(8) Pair {
  uint32_t at[2];
};

// Four numbers that are stored and loaded as one.
struct alignas(16) Four {
  float at[4];
};

}  // namespace device

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace device {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

__device__ inline uint16_t bits_of(bfloat16 value) { return __bfloat16_as_ushort(value); }
__device__ inline uint16_t bits_of(float16 value) { return __half_as_ushort(value); }
__device__ inline uint32_t bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(uint32_t bits) { return __uint_as_float(bits); }

// Rounds to nearest, ties to even; tf32 alone rounds ties away from zero.
template <class T>
__device__ T rounded(float value);
template <>
__device__ inline bfloat16 rounded(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline float16 rounded(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline float rounded(float value) {
  return value;
}
__device__ inline float rounded_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}
__device__ inline float reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}
__device__ inline void block_sync() { __syncthreads(); }
// The value, which the compiler takes for one that it can't load again from where it came.
__device__ inline int in_register(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ inline void warp_sync() { __syncwarp(); }
// The sum over each half of the warp, the same bits for all of its lanes; by the whole warp.
__device__ inline float half_warp_sum(float value) {
#pragma unroll
  for (int apart = 8; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  return value;
}

// Clusters exist from compute capability 9.0 on; no kernel that uses them is launched below it.
__device__ inline void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#else
  __trap();
#endif
}
__device__ inline void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ inline unsigned cluster_rank() {
  unsigned rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// Stores into the shared memory of another block of the cluster, at the address that `here` has in this block's.
#if __CUDA_ARCH__ >= 900
__device__ inline unsigned address_in_block(const void* here, unsigned rank) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(here));
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
#endif
__device__ inline void store_in_block(Words* here, unsigned rank, const Words& value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address_in_block(here, rank)), "r"(value.at[0]), "r"(value.at[1]),
               "r"(value.at[2]), "r"(value.at[3])
               : "memory");
#else
  __trap();
#endif
}
__device__ inline void store_in_block(Pair* here, unsigned rank, const Pair& value) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(address_in_block(here, rank)), "r"(value.at[0]), "r"(value.at[1])
               : "memory");
#else
  __trap();
#endif
}

// Adds one to a counter in global memory, after everything that this thread, or one it has met at a barrier, has written.
__device__ inline void arrive(unsigned* counter) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory"); }
// What others wrote before they arrived is visible to this thread, and to those it meets at a barrier.
__device__ inline unsigned arrived(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// Both halves at once, in no order with other loads and stores, past this multiprocessor's own cache.
__device__ inline void store_atomically(Pair* to, const Pair& value) {
  const uint64_t both = static_cast<uint64_t>(value.at[1]) << 32 | value.at[0];
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(both) : "memory");
}
__device__ inline Pair load_atomically(const Pair* from) {
  uint64_t both;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(from) : "memory");
  return {static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)};
}
// Of what other blocks write while the kernel runs: past this multiprocessor's own cache, which isn't kept coherent. Or of shared memory:
// the address says which.
__device__ inline Words load_coherent(const void* from) {
  Words w;
  asm volatile("ld.relaxed.gpu.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
               : "l"(from)
               : "memory");
  return w;
}

// Copies from global to shared memory in the background; visible to this thread once it has waited for the commit after them.
__device__ inline void copy_word(float* to, const float* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void copy_words(float* to, const float* from) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all copies of this thread but those of its last commit.
__device__ inline void copies_wait() { asm volatile("cp.async.wait_group 1;" ::: "memory"); }

// d (16, 8) += a (16, K) b (K, 8), K = 16 of 16-bit values or 8 of tf32, by the whole warp; PTX ISA, "matrix fragments for mma". On every
// architecture: the larger instructions of later ones (wgmma, tcgen05) take 64 rows of weights or more and the other factor out of shared
// memory, to which a grid's blocks would have to copy it first, and it is not the rate of products that a step waits for.
__device__ inline void multiply(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace device
#else
#include "emulator.h"
#endif
