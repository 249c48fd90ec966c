// What the caches can be counted on to hold.
#pragma once
#include <algorithm>
#include <cstdint>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace s2s {

// Bytes of the last cache that a core sees, 0 where the processor doesn't tell.
inline int64_t last_cache() {
  int64_t size = 0;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  for (const unsigned leaf : {4u, 0x8000001Du})  // Intel's, AMD's
    for (unsigned i = 0; i < 8; ++i) {
      if (!__get_cpuid_count(leaf, i, &a, &b, &c, &d) || (a & 31) == 0) break;
      if ((a & 31) == 2) continue;  // instructions
      const int64_t ways = (b >> 22) + 1, parts = (b >> 12 & 1023) + 1, line = (b & 4095) + 1, sets = int64_t{c} + 1;
      size = std::max(size, ways * parts * line * sets);
    }
#endif
  return size;
}

// Bytes that caches aren't counted on to hold: a result of more is written past them. Less is not: memory that was in use a moment ago
// still lies in the caches, and to write past them what they hold takes twice the time. What the result is made of has its share.
inline int64_t beyond_caches() {
  static const int64_t bytes = [] {
    const int64_t most = int64_t{32} << 20, size = last_cache();
    return size ? std::min(most, size / 8 * 3) : most;
  }();
  return bytes;
}

}  // namespace s2s
