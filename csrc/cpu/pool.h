// Torch's own threads. Ranges must be independent and their bits must not depend on where the split falls.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace s2s {

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// Calls f(begin, end) on disjoint ranges that cover [0, n), each of at least `grain` elements save the last; in this thread if there is but
// one. Nothing may throw inside f: the pool loses the message.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= 0) return;
  if (n <= grain || thread_count() == 1) {
    f(int64_t{0}, n);
    return;
  }
  torch::stable::parallel_for(0, n, grain > 0 ? grain : 1, f);
}

// Calls f(next) in several threads, for which there are at least `grain` of n tasks each: next() is the number of a task that no thread has
// begun, in ascending order, and n when there are none. For tasks of unequal lengths, the longest of them first.
template <class F>
void deal(int64_t n, int64_t grain, const F& f) {
  std::atomic<int64_t> begun{0};
  const auto next = [&] { return std::min(n, begun.fetch_add(1)); };
  const int64_t threads = std::clamp(n / std::max<int64_t>(1, grain), int64_t{1}, thread_count());
  parallel(std::min(n, threads), 1, [&](int64_t, int64_t) { f(next); });
}

}  // namespace s2s
