// Threads that work on one call together: they meet at barriers and share lists of tasks. No torch.
#pragma once
#include <atomic>
#include <cstdint>
#include <thread>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace s2s {

// The pool may start fewer threads than it has, so they are counted by the range that each of them gets: ranges are equally long but for
// the last, and the one that starts at 0 says how long.
class Crew {
 public:
  // One thread of the crew, for as long as its range.
  class Member {
   public:
    // Of `ranges` ranges this thread has [begin, end).
    Member(Crew& crew, int64_t begin, int64_t end, int64_t ranges) : crew_(crew) {
      if (begin == 0) crew_.share_.store(end, std::memory_order_release);
      int64_t share;
      crew_.spin([&] { return (share = crew_.share_.load(std::memory_order_acquire)) != 0; });
      count_ = (ranges + share - 1) / share;
    }
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;

    // Waits for all of the crew, and sees what they wrote before.
    void wait() {
      if (count_ == 1) return;
      const int64_t expected = ++round_ * count_;
      crew_.arrived_.fetch_add(1, std::memory_order_acq_rel);
      crew_.spin([&] { return crew_.arrived_.load(std::memory_order_acquire) >= expected; });
    }

    // Calls f(i) for each i in [0, n), whichever thread is free, and waits for the last.
    template <class F>
    void tasks(int64_t n, const F& f) {
      if (count_ == 1) {
        for (int64_t i = 0; i < n; ++i) f(i);
        return;
      }
      for (int64_t i; (i = crew_.next_.fetch_add(1, std::memory_order_relaxed) - base_) < n;) f(i);
      base_ += n + count_;
      wait();
    }

   private:
    Crew& crew_;
    int64_t count_, round_ = 0, base_ = 0;
  };

 private:
  // Another thread may need this one's processor.
  template <class F>
  static void spin(const F& done) {
    for (int64_t tries = 0; !done(); ++tries) {
      if (tries >= 4096) {
        std::this_thread::yield();
        continue;
      }
#if defined(__x86_64__)
      _mm_pause();
#endif
    }
  }

  alignas(64) std::atomic<int64_t> share_{0};
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> next_{0};
};

}  // namespace s2s
