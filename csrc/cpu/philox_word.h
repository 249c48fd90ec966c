// Counter-based random words, Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// The word of element (row, column) of `stream` under the seed (seed0, seed1):
//   key = (low32(seed0), high32(seed0)),  counter = ((column / 32) * 8 + column % 8, low32(row), high32(row), low32(seed1) + stream),
//   output word number (column / 8) % 4.
// Eight consecutive counters therefore give 32 consecutive columns, eight of them per output word. An element is kept iff word >=
// threshold.
// Included by every instruction set inside its namespace, and by CUDA kernels: no guard.

#if defined(__CUDACC__)
#define S2S_EVERYWHERE __host__ __device__ static inline
#else
#define S2S_EVERYWHERE static inline
#endif

S2S_EVERYWHERE void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

S2S_EVERYWHERE uint32_t random_word(int64_t seed0, int64_t seed1, uint32_t stream, int64_t row, int64_t column) {
  const uint64_t key = static_cast<uint64_t>(seed0), at = static_cast<uint64_t>(row);
  const uint32_t counter[4] = {static_cast<uint32_t>(column / 32 * 8 + column % 8), static_cast<uint32_t>(at),
                               static_cast<uint32_t>(at >> 32), static_cast<uint32_t>(seed1) + stream};
  const uint32_t keys[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  uint32_t out[4];
  philox4x32_10(counter, keys, out);
  const int64_t word = column / 8 % 4;  // chosen without an index, for which a GPU would keep the words in memory
  return word < 2 ? (word == 0 ? out[0] : out[1]) : (word == 2 ? out[2] : out[3]);
}

// Of the 2^32 words, how many drop the element: min(2^32, round(p * 2^32)), halves to even.
static inline uint64_t philox_threshold(double p) {
  const double words = __builtin_nearbyint(p * 4294967296.0);
  return words >= 4294967296.0 ? uint64_t{1} << 32 : words > 0 ? static_cast<uint64_t>(words) : 0;
}

#undef S2S_EVERYWHERE
