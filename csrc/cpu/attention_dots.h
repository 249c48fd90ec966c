// Products of a few queries with keys as they lie in memory, a vector of each at a time: what nothing is packed or transposed for.

template <class S>
struct AttentionDots {
  using T = compute_t<S>;
#if defined(S2S_BFLOAT16_PRODUCTS)
  static constexpr bool pairs = std::is_same_v<S, bfloat16>;
#else
  static constexpr bool pairs = false;
#endif
  static constexpr int64_t whole_pairs(int64_t n) { return (n + 31) / 32 * 32; }
  // As many as there are sums at once.
  static constexpr bool folds = std::is_same_v<T, float> && lanes<T> >= 8;
  static constexpr int64_t sums_at_once = folds ? lanes<T> : 8;
  template <int HEADS>
  static constexpr int64_t keys_at_once = sums_at_once / HEADS;

  // Products of HEADS queries, `width` whole vectors apart, with `n` <= keys_at_once keys; `next` is called
  // for each key.
  template <int HEADS, class Next>
  static void products(int64_t width, const T* queries, const S* words, int64_t n, const S* keys, int64_t row, T* scores,
                       const Next& next) {
    constexpr int64_t keys_at_once = AttentionDots::keys_at_once<HEADS>;
    constexpr int together = HEADS == 1 ? 4 : 2;
    const int64_t padded = whole_vectors<T>(width);
    Vec<T> sums[sums_at_once];
    if (HEADS * keys_at_once < sums_at_once || n < keys_at_once) std::memset(sums, 0, sizeof sums);
    // A few keys after another, as they lie in memory: the processor fetches ahead by itself what is read in order.
    for (int64_t j = 0; j < n; j += together) {
      const S* from[together];
      for (int i = 0; i < together; ++i) next(), from[i] = keys + min(j + i, n - 1) * row;
      Vec<T> sum[HEADS][together] = {};
#if defined(S2S_BFLOAT16_PRODUCTS)
      if constexpr (pairs) {
        // Queries are bfloat16 as keys are, so that their products, which are added in float32, are exact.
        for (int64_t c = 0; c < width; c += 32) {
          const __mmask32 some = c + 32 <= width ? ~__mmask32{0} : (__mmask32{1} << (width - c)) - 1;
          __m512i k[together];
#pragma GCC unroll 4
          for (int i = 0; i < together; ++i) k[i] = _mm512_maskz_loadu_epi16(some, from[i] + c);
#pragma GCC unroll 4
          for (int h = 0; h < HEADS; ++h) {
            const __m512i q = _mm512_load_si512(words + h * whole_pairs(width) + c);
#pragma GCC unroll 4
            for (int i = 0; i < together; ++i) sum[h][i] = _mm512_dpbf16_ps(sum[h][i], (__m512bh)q, (__m512bh)k[i]);
          }
        }
      } else
#endif
        each_vector<T>(
            width, S2S_LAMBDA(auto at, int64_t c) {
              Vec<T> k[together];
#pragma GCC unroll 4
              for (int i = 0; i < together; ++i) k[i] = at.get(from[i] + c);
#pragma GCC unroll 4
              for (int h = 0; h < HEADS; ++h) {
                const Vec<T> q = load(queries + h * padded + c);
#pragma GCC unroll 4
                for (int i = 0; i < together; ++i) sum[h][i] = fma(q, k[i], sum[h][i]);
              }
            });
#pragma GCC unroll 4
      for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < together; ++i)
          if (j + i < keys_at_once) sums[h * keys_at_once + j + i] = sum[h][i];
    }
    alignas(64) T folded[sums_at_once];
    if constexpr (folds)
      store(folded, sums_of(sums));
    else
      for (int64_t i = 0; i < HEADS * keys_at_once; ++i) folded[i] = hsum(sums[i]);
    // Where heads share the sums evenly, those past n fit in too.
    const int64_t count = sums_at_once % HEADS ? n : keys_at_once;
    for (int h = 0; h < HEADS; ++h)
      std::memcpy(scores + h * attention_block, folded + h * keys_at_once, static_cast<size_t>(count) * sizeof(T));
  }
};

// How many rows are multiplied with each key that is loaded.
inline constexpr int64_t few_queries = 3;

// to (rows, attention_block) = rows by n rows of keys; zeros up to a whole vector.
template <class T, int ROWS = few_queries>
void few_products(int64_t rows, int64_t width, const Rows<T>& queries, int64_t first, int64_t n, const Rows<T>& keys, int64_t begin,
                  T* to) {
  for (; rows > ROWS; rows -= ROWS, first += ROWS, to += ROWS * attention_block)
    few_products<T, ROWS>(ROWS, width, queries, first, n, keys, begin, to);
  if constexpr (ROWS > 1)
    if (rows < ROWS) return few_products<T, ROWS - 1>(rows, width, queries, first, n, keys, begin, to);
  constexpr int64_t at_once = AttentionDots<T>::template keys_at_once<ROWS>;
  for (int64_t j = 0; j < n; j += at_once)
    AttentionDots<T>::template products<ROWS>(width, queries.data + first * queries.row, nullptr, min(at_once, n - j),
                                              keys.data + (begin + j) * keys.row, keys.row, to + j, [] {});
  for (int64_t r = 0; r < ROWS; ++r)
    for (int64_t j = n; j < whole_vectors<T>(n); ++j) to[r * attention_block + j] = T(0);
}
