// Products of bfloat16 on vectors, where they have such and there is no tile unit: of pairs of numbers, at twice the rate of float32's.

#if defined(S2S_BFLOAT16_PRODUCTS) && !defined(S2S_TILE_UNIT)
// C (rows, whole vectors) = A B, added to C, or to C times a factor a row.
struct PairProduct {
  int64_t lines;  // pairs in depth
  // A row by row, its lines whole tiles; or turned: the lines of a right factor, whose columns are A's rows, read four at a time.
  const char* left;
  int64_t left_row;      // bytes; turned: from 16 rows to the next
  const char* right;     // tile columns of lines, from the first one on
  int64_t right_column;  // bytes from one to the next
  float* to;
  int64_t to_row;
  bool add;
  const float* factors = nullptr;
};

template <int ROWS, int VECTORS, bool TURNED>
S2S_INLINE void pair_tile(const PairProduct& p, const char* left, const char* right, float* to, const float* factors) {
  // A pointer for every three rows, as in gemm_tile.
  constexpr int bases = TURNED ? 1 : (ROWS + 2) / 3, lines = TURNED ? 4 : 16;
  const int64_t row = TURNED ? 4 : p.left_row, column = p.right_column;
  const char* base[bases];
  for (int i = 0; i < bases; ++i) base[i] = hidden(left + 3 * i * row);
  // Sums go on from what is there: it is read while the tile before is still being multiplied.
  __m512 sum[ROWS][VECTORS] = {};
  if (p.add) {
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) {
        sum[i][j] = load(to + i * p.to_row + 16 * j);
        if (factors) sum[i][j] *= factors[i];
      }
  }
  for (int64_t line = 0; line < p.lines; line += lines, right += lines * 64) {
#pragma GCC unroll 16
    for (int pair = 0; pair < lines; ++pair) {
      __m512bh factor[VECTORS];
#pragma GCC unroll 2
      for (int j = 0; j < VECTORS; ++j) factor[j] = (__m512bh)_mm512_load_si512(right + j * column + pair * 64);
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        int32_t words;
        std::memcpy(&words, TURNED ? base[0] + i * 4 + pair * 64 : base[i / 3] + i % 3 * row + pair * 4, 4);
        const __m512bh both = (__m512bh)_mm512_set1_epi32(words);
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], factor[j], both);
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < bases; ++i) base[i] += TURNED ? lines * 64 : lines * 4;
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < VECTORS; ++j) store(to + i * p.to_row + 16 * j, sum[i][j]);
}

// Rows [first, rows), as many as ROWS at a time, of VECTORS vectors.
template <bool TURNED, int VECTORS, int ROWS = 8>
__attribute__((noinline)) void pair_rows(int64_t first, int64_t rows, const PairProduct& p, const char* right, float* to) {
  for (; first + ROWS <= rows; first += ROWS) {
    const char* const left = p.left + (TURNED ? first / 16 * p.left_row + first % 16 * 4 : first * p.left_row);
    pair_tile<ROWS, VECTORS, TURNED>(p, left, right, to + first * p.to_row, p.factors ? p.factors + first : nullptr);
  }
  if constexpr (ROWS > 1)
    if (first < rows) pair_rows<TURNED, VECTORS, ROWS / 2>(first, rows, p, right, to);
}

template <bool TURNED>
void pair_product(int64_t rows, int64_t vectors, const PairProduct& p) {
  const char* right = p.right;
  int64_t v = 0;
  for (; v + 1 < vectors; v += 2, right += 2 * p.right_column) pair_rows<TURNED, 2>(0, rows, p, right, p.to + 16 * v);
  if (v < vectors) pair_rows<TURNED, 1>(0, rows, p, right, p.to + 16 * v);
}

// Queries, tiled_rows at a time, that see one and the same hull of a block of keys.
struct PairGroup {
  int64_t begin, end;
  Hull hull;
  // Those from `begin` on of n, the first of which is `first`; at most `most`.
  static PairGroup of(const AttentionCall<bfloat16>& p, int64_t b, int64_t h, int64_t first, int64_t begin, int64_t n, int64_t at,
                      int64_t most) {
    const auto hull = [&](int64_t i) { return seen_of(p, b, h, first + i, first + min(n, i + tiled_rows) - 1, at, 32); };
    PairGroup group{begin, min(n, begin + tiled_rows), hull(begin)};
    while (group.end < n && group.end - begin < most) {
      const Hull next = hull(group.end);
      if (next.begin != group.hull.begin || next.end != group.hull.end) break;
      group.end = min(n, group.end + tiled_rows);
    }
    return group;
  }
  // Wide heads are read from the second-level cache, by as many queries at once as there are.
  static int64_t most(int64_t width, int64_t rows) { return width < 128 ? tiled_rows : rows; }
};

// Numbers of 16 bits row by row: those of a left factor whole steps of 32 long, zeros after the last element.
struct PairRows {
  static constexpr int64_t padded(int64_t width) { return split_steps(width) * 32; }
  // In place where that can be, else copied to `buffer` (n, padded(width)).
  static Rows<bfloat16> right(int64_t n, int64_t width, const bfloat16* from, int64_t row_stride, int64_t column_stride, bfloat16* buffer) {
    const int64_t row = padded(width);
    if (column_stride == 1) return {from, row_stride, false};
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < row; ++c) buffer[i * row + c] = c < width ? from[i * row_stride + c * column_stride] : bfloat16{};
    return {buffer, row, false};
  }
  static Rows<bfloat16> left(int64_t n, int64_t width, const bfloat16* from, int64_t row_stride, int64_t column_stride, bfloat16* buffer) {
    const Rows<bfloat16> rows = right(n, width, from, row_stride, column_stride, buffer);
    return rows.data == buffer || width % 32 == 0 ? rows : of(n, width, rows, buffer);
  }
  template <class R>
  static Rows<bfloat16> of(int64_t n, int64_t width, const Rows<R>& rows, bfloat16* buffer) {
    const int64_t row = padded(width);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t c = 0; c < row; c += 32) _mm512_storeu_si512(buffer + i * row + c, in_order(rows.data + i * rows.row + c, width - c));
    return {buffer, row, rows.bad};
  }
};
#endif
