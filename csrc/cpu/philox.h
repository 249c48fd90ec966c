// Counter-based random words, Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
// The word of element (row, column) of `stream` under the seed (seed0, seed1):
//   key = (low32(seed0), high32(seed0)),  counter = ((column / 32) * 8 + column % 8, low32(row), high32(row), low32(seed1) + stream),
//   output word number (column / 8) % 4.
// Eight consecutive counters therefore give 32 consecutive columns, eight of them per output word. An element is kept iff word >=
// threshold.

static inline void philox4x32_10(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
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

static inline uint32_t random_word(int64_t seed0, int64_t seed1, uint32_t stream, int64_t row, int64_t column) {
  const uint64_t key = static_cast<uint64_t>(seed0), at = static_cast<uint64_t>(row);
  const uint32_t counter[4] = {static_cast<uint32_t>(column / 32 * 8 + column % 8), static_cast<uint32_t>(at),
                               static_cast<uint32_t>(at >> 32), static_cast<uint32_t>(seed1) + stream};
  const uint32_t keys[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  uint32_t out[4];
  philox4x32_10(counter, keys, out);
  return out[column / 8 % 4];
}

// Of the 2^32 words, how many drop the element: min(2^32, round(p * 2^32)), halves to even.
static inline uint64_t philox_threshold(double p) {
  const double words = __builtin_nearbyint(p * 4294967296.0);
  return words >= 4294967296.0 ? uint64_t{1} << 32 : words > 0 ? static_cast<uint64_t>(words) : 0;
}

// Low 32 bits of a times low 32 bits of b in each 64-bit lane.
S2S_INLINE Vec<uint64_t> multiply_low_words(Vec<uint64_t> a, Vec<uint64_t> b) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 16
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 32
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Vec<uint64_t>)S2S_OP(mul_epu32, (__m512i)a, (__m512i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The 32 words of columns [32 * block, 32 * block + 32). A counter word lives in the low half of a 64-bit lane, what is above it is never
// read: the products need no shuffles. With fewer than eight lanes the counters are dealt to the vectors so that neighbouring columns pair
// up in one 64-bit store.
static inline void philox_block(int64_t seed0, int64_t seed1, uint32_t stream, int64_t row, int64_t block, uint32_t* words) {
  constexpr int width = static_cast<int>(lanes<uint64_t>), count = 8 / width;
  const uint64_t key = static_cast<uint64_t>(seed0);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  const Vec<uint64_t> m0 = broadcast<uint64_t>(0xD2511F53u), m1 = broadcast<uint64_t>(0xCD9E8D57u);
  Vec<uint64_t> c0[count], c1[count], c2[count], c3[count];
#pragma GCC unroll 4
  for (int v = 0; v < count; ++v) {
    // Vector v holds columns v / 2 * 2 * width + v % 2, + 2, + 4, ...: evens in one, odds in the next.
    const uint64_t first = static_cast<uint64_t>(block) * 8 + (count > 1 ? v / 2 * 2 * width + v % 2 : 0);
    c0[v] = broadcast<uint64_t>(first) + iota<uint64_t>() * (count > 1 ? 2 : 1);
    c1[v] = broadcast<uint64_t>(static_cast<uint32_t>(row));
    c2[v] = broadcast<uint64_t>(static_cast<uint64_t>(row) >> 32);
    c3[v] = broadcast<uint64_t>(static_cast<uint32_t>(seed1) + stream);
  }
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const Vec<uint64_t> key0 = broadcast<uint64_t>(k0), key1 = broadcast<uint64_t>(k1);
#pragma GCC unroll 4
    for (int v = 0; v < count; ++v) {
      const Vec<uint64_t> p0 = multiply_low_words(c0[v], m0), p1 = multiply_low_words(c2[v], m1);
      c0[v] = (p1 >> 32) ^ (c1[v] ^ key0);
      c1[v] = p1;
      c2[v] = (p0 >> 32) ^ (c3[v] ^ key1);
      c3[v] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
#pragma GCC unroll 4
  for (int word = 0; word < 4; ++word) {
    const Vec<uint64_t>* c = word == 0 ? c0 : word == 1 ? c1 : word == 2 ? c2 : c3;
    if constexpr (count > 1) {
#pragma GCC unroll 4
      for (int v = 0; v < count; v += 2) {
        const Vec<uint64_t> pair = (c[v] & 0xffffffffu) | c[v + 1] << 32;
        std::memcpy(words + 8 * word + v * width, &pair, sizeof pair);
      }
    } else {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
      const __m256i low = S2S_OP(cvtepi64_epi32, (__m512i)c[0]);
      std::memcpy(words + 8 * word, &low, sizeof low);
#endif
    }
  }
}

// out[i] = scale where element (row, column_begin + i) is kept, else 0, for i in [0, n).
template <class T>
void dropout_factors(int64_t seed0, int64_t seed1, uint32_t stream, int64_t row, int64_t column_begin, int64_t n, uint64_t threshold,
                     T scale, T* out) {
  const int64_t end = column_begin + n;
  for (int64_t column = column_begin; column < end;) {
    uint32_t words[32];
    philox_block(seed0, seed1, stream, row, column / 32, words);
    const int64_t from = column % 32, block_end = column - from + 32, to = (block_end < end ? block_end : end) - column + from;
    T factors[32];
    // At 2^32 nothing is kept, and the low word of the threshold alone would say the opposite.
    const T kept = threshold >> 32 ? T(0) : scale;
    const uint32_t limit = static_cast<uint32_t>(threshold);
    if constexpr (std::is_same_v<T, float>) {
#pragma GCC unroll 8
      for (int i = 0; i < 32; i += static_cast<int>(lanes<float>))
        store(factors + i, select(load(words + i) >= broadcast<uint32_t>(limit), broadcast(kept), Vec<float>{}));
    } else {
      for (int i = 0; i < 32; ++i) factors[i] = words[i] >= limit ? kept : T(0);
    }
    if (to - from == 32)
      std::memcpy(out, factors, sizeof factors);
    else
      for (int64_t i = from; i < to; ++i) out[i - from] = factors[i];
    out += to - from;
    column += to - from;
  }
}
