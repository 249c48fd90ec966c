// Runs a kernel's source on the host: one operating-system thread per CUDA thread, a barrier for __syncthreads, warps and clusters.
// For tests only. Data races of the kernel are data races here, so -fsanitize=thread finds a missing barrier.
#pragma once
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/cpu/storage.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// In two halves, as a cluster's. Waits without spinning: dozens of threads share a core here.
class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}
  void wait() { wait(arrive()); }
  unsigned arrive() {
    const std::lock_guard lock(mutex_);
    const unsigned phase = phase_;
    if (++arrived_ == size_) {
      arrived_ = 0, ++phase_;
      passed_.notify_all();
    }
    return phase;
  }
  void wait(unsigned phase) {
    std::unique_lock lock(mutex_);
    passed_.wait(lock, [&] { return phase_ != phase; });
  }

 private:
  const unsigned size_;
  unsigned arrived_ = 0, phase_ = 0;
  std::mutex mutex_;
  std::condition_variable passed_;
};

struct Cluster;

struct Lane {
  uint32_t a[4], b[2];
};

struct Warp {
  Barrier barrier;
  std::vector<Lane> lanes[2];  // used in turn, so that one barrier is enough for an exchange
  explicit Warp(unsigned size) : barrier(size), lanes{std::vector<Lane>(size), std::vector<Lane>(size)} {}
};

struct Block {
  Barrier barrier;
  std::vector<device::Words> shared;  // aligned as on the device
  std::vector<std::unique_ptr<Warp>> warps;
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  Block(unsigned threads, size_t bytes) : barrier(threads), shared((bytes + 15) / 16) {
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * 16);  // NaN, so that unwritten memory shows
    for (unsigned w = 0; w < threads; w += 32) warps.push_back(std::make_unique<Warp>(threads - w < 32 ? threads - w : 32));
  }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  Cluster(unsigned size, unsigned threads, size_t bytes) : barrier(size * threads) {
    for (unsigned r = 0; r < size; ++r) {
      blocks.push_back(std::make_unique<Block>(threads, bytes));
      blocks[r]->cluster = this;
      blocks[r]->rank = r;
    }
  }
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned turn = 0, phase = 0;

}  // namespace emulator

inline thread_local emulator::Index threadIdx, blockIdx, blockDim, gridDim;

namespace device {

using s2s::bfloat16;
using s2s::float16;

inline uint16_t bits_of(bfloat16 value) { return value.bits; }
inline uint16_t bits_of(float16 value) { return value.bits; }
inline uint32_t bits_of(float value) { return s2s::detail::bits_of(value); }
inline float float_of(uint32_t bits) { return s2s::detail::float_of(bits); }

template <class T>
T rounded(float value) {
  return s2s::from_compute<T>(value);
}
inline float rounded_to_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return float_of((bits + 0x1000u) & ~0x1fffu);
}
inline float reciprocal(float value) { return 1.f / value; }

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::block->shared.data());
}
inline int in_register(int value) { return value; }
inline void block_sync() { emulator::block->barrier.wait(); }
inline void warp_sync() { emulator::block->warps[threadIdx.x / 32]->barrier.wait(); }
// By the lanes' own slots of the warp's exchange, as a matrix instruction does.
inline float half_warp_sum(float value) {
  emulator::Warp& warp = *emulator::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  for (unsigned apart = 8; apart > 0; apart /= 2) {
    std::vector<emulator::Lane>& lanes = warp.lanes[emulator::turn++ % 2];
    lanes[lane].a[0] = bits_of(value);
    warp.barrier.wait();
    value += float_of(lanes[lane ^ apart].a[0]);
  }
  return value;
}
inline void cluster_arrive() { emulator::phase = emulator::block->cluster->barrier.arrive(); }
inline void cluster_wait() { emulator::block->cluster->barrier.wait(emulator::phase); }
inline unsigned cluster_rank() { return emulator::block->rank; }
inline void store_in_block(Words* here, unsigned rank, const Words& value) {
  emulator::block->cluster->blocks[rank]->shared[here - emulator::block->shared.data()] = value;
}

inline void store_in_block(Pair* here, unsigned rank, const Pair& value) {
  const auto own = reinterpret_cast<Pair*>(emulator::block->shared.data());
  reinterpret_cast<Pair*>(emulator::block->cluster->blocks[rank]->shared.data())[here - own] = value;
}

inline void arrive(unsigned* counter) { std::atomic_ref<unsigned>(*counter).fetch_add(1, std::memory_order_release); }
inline unsigned arrived(const unsigned* counter) {
  std::this_thread::yield();
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(counter)).load(std::memory_order_acquire);
}
inline void store_atomically(Pair* to, const Pair& value) {
  const uint64_t both = static_cast<uint64_t>(value.at[1]) << 32 | value.at[0];
  std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(to)).store(both, std::memory_order_relaxed);
}
inline Pair load_atomically(const Pair* from) {
  std::this_thread::yield();
  const auto at = const_cast<uint64_t*>(reinterpret_cast<const uint64_t*>(from));
  const uint64_t both = std::atomic_ref<uint64_t>(*at).load(std::memory_order_relaxed);
  return {static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)};
}
inline Words load_coherent(const void* from) { return *static_cast<const Words*>(from); }

inline void copy_word(float* to, const float* from) { *to = *from; }
inline void copy_words(float* to, const float* from) { *reinterpret_cast<Words*>(to) = *reinterpret_cast<const Words*>(from); }
inline void copies_commit() {}
inline void copies_wait() {}

// d (16, 8) += a (16, K) b (K, 8): value(word, place) is one of the Each values that a register holds.
template <int Each, class Value>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Value& value) {
  emulator::Warp& warp = *emulator::block->warps[threadIdx.x / 32];
  std::vector<emulator::Lane>& lanes = warp.lanes[emulator::turn++ % 2];
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(lanes[lane].a, a, sizeof a);
  std::memcpy(lanes[lane].b, b, sizeof b);
  warp.barrier.wait();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2;
    for (unsigned half = 0; half < 2; ++half)
      for (unsigned quarter = 0; quarter < 4; ++quarter)
        for (unsigned e = 0; e < Each; ++e)
          d[i] += value(lanes[row * 4 + quarter].a[half * 2 + i / 2], e) * value(lanes[column * 4 + quarter].b[half], e);
  }
}
inline void multiply(bfloat16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<2>(d, a, b, [](uint32_t word, unsigned e) { return s2s::to_float(bfloat16{static_cast<uint16_t>(word >> 16 * e)}); });
}
inline void multiply(float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<2>(d, a, b, [](uint32_t word, unsigned e) { return s2s::to_float(float16{static_cast<uint16_t>(word >> 16 * e)}); });
}
// The low bits of a tf32 operand aren't read.
inline void multiply(float, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_fragments<1>(d, a, b, [](uint32_t word, unsigned) { return float_of(word & ~0x1fffu); });
}

}  // namespace device

namespace emulator {

// Launches kernel(arguments...) on `grid` blocks of `threads` threads, `cluster` blocks to a cluster. All of them at once if `cooperative`,
// else cluster after cluster.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned grid, unsigned threads, unsigned cluster, bool cooperative, size_t shared_bytes,
            const Arguments&... arguments) {
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::thread> running;
  const auto finish = [&] {
    for (auto& thread : running) thread.join();
    running.clear(), clusters.clear();
  };
  for (unsigned first = 0; first < grid; first += cluster) {
    clusters.push_back(std::make_unique<Cluster>(cluster, threads, shared_bytes));
    for (unsigned b = 0; b < cluster; ++b)
      for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([&, own = clusters.back()->blocks[b].get(), b, t, first] {
          block = own;
          threadIdx.x = t, blockIdx.x = first + b, blockDim.x = threads, gridDim.x = grid;
          kernel(arguments...);
        });
    if (!cooperative) finish();
  }
  finish();
}

}  // namespace emulator
