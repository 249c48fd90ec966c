// Torch's own threads. Ranges must be independent and their bits must not depend on where the split falls.
#pragma once
#include <torch/csrc/stable/ops.h>

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

}  // namespace s2s
