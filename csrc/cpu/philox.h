// Random words of many elements at once, and the factors of dropout that they make.
#include "philox_word.h"

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
      typedef uint32_t Words __attribute__((vector_size(S2S_VECTOR_BYTES / 2)));
      const Words low = __builtin_convertvector(c[0], Words);
      std::memcpy(words + 8 * word, &low, sizeof low);
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
