// Runs a kernel's source on the host: one operating-system thread per CUDA thread, a barrier for __syncthreads, warps and clusters.
// For tests only. Data races of the kernel are data races here, so -fsanitize=thread finds a missing barrier: what orders nothing on a
// device must order nothing here either.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Synchronisation that kernels may leave out, for tests of whether that is found.
enum class Forgotten { nothing, block, cluster, grid, copies };
inline Forgotten forgotten = Forgotten::nothing;

// Sleeps until the word isn't `value`: dozens of threads share a core here. The system's own call, where there is one, since a mutex, and
// std::atomic's queue of those who wait, would order what came before them.
inline void sleep_while(const std::atomic<unsigned>& word, unsigned value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}
inline void wake_all(std::atomic<unsigned>& word) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
#else
  word.notify_all();
#endif
}

// In two halves, as a cluster's. What comes after a wait comes after what preceded each arrival, and after nothing else: not after what
// others did between their two halves.
class Barrier {
 public:
  explicit Barrier(unsigned size) : size_(size) {}
  void wait() { wait(arrive()); }
  unsigned arrive() {
    const unsigned phase = phase_.load(std::memory_order_relaxed);
    if (arrived_[phase % 2].fetch_add(1, std::memory_order_release) + 1 == size_) {
      arrived_[(phase + 1) % 2].store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      wake_all(phase_);
    }
    return phase;
  }
  void wait(unsigned phase) {
    while (phase_.load(std::memory_order_acquire) == phase) sleep_while(phase_, phase);
    arrived_[phase % 2].load(std::memory_order_acquire);
  }

 private:
  const unsigned size_;
  std::atomic<unsigned> arrived_[2] = {0, 0}, phase_ = 0;  // arrivals of a phase and of the next: some are there before others have left
};

#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
// While one lives, the thread sanitizer sees nothing of what its thread does.
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
  }
#endif
};

struct Cluster;

struct Lane {
  uint32_t a[4], b[2];
};

// What lanes give each other, by a shuffle or a matrix instruction, orders nothing else: it goes by a barrier of its own, unseen.
struct Warp {
  Barrier barrier, exchange;
  std::vector<Lane> lanes[2];  // used in turn, so that one barrier is enough for an exchange
  explicit Warp(unsigned size) : barrier(size), exchange(size), lanes{std::vector<Lane>(size), std::vector<Lane>(size)} {}
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

// Copies of a thread that are under way. They may land at any time until they have been waited for, so that what they overwrite is lost at
// once, and what they bring is there at the end.
class Copies {
 public:
  void start(float* to, const float* from, int count) {
    for (int i = 0; i < count; ++i) to[i] = std::numeric_limits<float>::quiet_NaN();
    copies_.push_back({to, from, count});
  }
  void commit() { older_ = committed_, committed_ = copies_.size(); }
  void wait_for_older() {
    finish(older_);
    committed_ -= older_, older_ = 0;
  }
  void finish() { finish(copies_.size()); }

 private:
  struct Copy {
    float* to;
    const float* from;
    int count;
  };
  void finish(size_t count) {
    for (size_t i = 0; i < count; ++i) std::copy_n(copies_[i].from, copies_[i].count, copies_[i].to);
    copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(count));
  }
  std::vector<Copy> copies_;
  size_t older_ = 0, committed_ = 0;  // how many came before the last commit's, and with it
};

inline thread_local Block* block = nullptr;
inline thread_local unsigned turn = 0, phase = 0;
inline thread_local Copies copies;

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
inline void block_sync() {
  if (emulator::forgotten != emulator::Forgotten::block) emulator::block->barrier.wait();
}
inline void warp_sync() { emulator::block->warps[threadIdx.x / 32]->barrier.wait(); }
// By the lanes' own slots of the warp's exchange, as a matrix instruction does.
inline float half_warp_sum(float value) {
  const emulator::Unseen unseen;
  emulator::Warp& warp = *emulator::block->warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  for (unsigned apart = 8; apart > 0; apart /= 2) {
    std::vector<emulator::Lane>& lanes = warp.lanes[emulator::turn++ % 2];
    lanes[lane].a[0] = bits_of(value);
    warp.exchange.wait();
    value += float_of(lanes[lane ^ apart].a[0]);
  }
  return value;
}
inline void cluster_arrive() {
  if (emulator::forgotten != emulator::Forgotten::cluster) emulator::phase = emulator::block->cluster->barrier.arrive();
}
inline void cluster_wait() {
  if (emulator::forgotten != emulator::Forgotten::cluster) emulator::block->cluster->barrier.wait(emulator::phase);
}
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
  if (emulator::forgotten == emulator::Forgotten::grid) return std::numeric_limits<int>::max();  // more than anyone waits for
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

inline void copy_word(float* to, const float* from) { emulator::copies.start(to, from, 1); }
inline void copy_words(float* to, const float* from) { emulator::copies.start(to, from, 4); }
inline void copies_commit() { emulator::copies.commit(); }
inline void copies_wait() {
  if (emulator::forgotten != emulator::Forgotten::copies) emulator::copies.wait_for_older();
}

// d (16, 8) += a (16, K) b (K, 8): value(word, place) is one of the Each values that a register holds.
template <int Each, class Value>
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Value& value) {
  const emulator::Unseen unseen;
  emulator::Warp& warp = *emulator::block->warps[threadIdx.x / 32];
  std::vector<emulator::Lane>& lanes = warp.lanes[emulator::turn++ % 2];
  const unsigned lane = threadIdx.x % 32;
  std::memcpy(lanes[lane].a, a, sizeof a);
  std::memcpy(lanes[lane].b, b, sizeof b);
  warp.exchange.wait();
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
          copies.finish();
        });
    if (!cooperative) finish();
  }
  finish();
}

}  // namespace emulator
