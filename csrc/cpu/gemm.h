// Single-threaded matrix products. C (m, n), unit column stride, becomes or is increased by A (m, k) times B (k, n).
//
// The rule of order, which makes the bits independent of how callers split m or n over threads, and of the path taken: k is cut into blocks
// of gemm_kc; in a block each element of C has one accumulator, starting at 0, to which fma(a, b, .) is applied for k ascending; blocks are
// added to C in ascending order (the first replaces C unless accumulating). Every tile shape obeys it, so gemm and gemm_packed agree to the
// bit as well. Splitting k would change the bits. A caller whose sums are long may ask for an accumulator for each `run` of k of a block, a
// multiple of 4; a block's are added in ascending order.
//
// A tile is `rows` rows by `panels` panels of gemm_nr columns, wide enough in either direction to keep the multipliers busy. B is packed
// panel by panel into a buffer of first-level-cache size just before use; rows-by-unit-stride B with few rows of A is read in place, as
// packing would cost more than the product.

template <class T>
inline constexpr int64_t gemm_nr = 2 * lanes<T>;
inline constexpr int64_t gemm_kc = 256;
inline constexpr int gemm_mr = S2S_VECTOR_BYTES == 64 ? 12 : 6;
inline constexpr int64_t gemm_mc = 192, gemm_nc = 1024;
inline constexpr int64_t gemm_row_pad = 16;  // keeps the rows of a copied block of A out of one cache set

// Panels side by side in a tile of few rows: as many sums as the multipliers' latency asks for, and for one row no more than its loads can
// feed.
constexpr int gemm_wide(int rows) {
  constexpr int sums = S2S_VECTOR_BYTES == 64 ? 24 : 12;
  return rows == 1 ? 4 : sums / (2 * rows) > 1 ? sums / (2 * rows) : 1;
}
inline constexpr int64_t gemm_group_panels = 6;  // panels that a caller's loops take at once

constexpr int64_t gemm_min(int64_t a, int64_t b) { return a < b ? a : b; }

// C (ROWS, PANELS * gemm_nr) of which the last panel has `columns` valid columns. Element (i, k) of A is a[i * a_row + k]; row k of panel p
// of B starts at b + p * b_panel + k * b_row. A cache line of `ahead`, and of what lies ahead_step bytes after it and so on, is brought
// nearer for every other k.
template <class T, int ROWS, int PANELS>
__attribute__((noinline)) void gemm_tile(int64_t depth, const T* a, int64_t a_row, const T* b, int64_t b_panel, int64_t b_row, T* c,
                                         int64_t c_row, bool add, int64_t columns, const char* ahead, int64_t ahead_step,
                                         int64_t run = gemm_kc) {
  // A pointer for every three rows or panels, which an address reaches with its index times 0, 1 or 2: one a row would not fit the
  // registers, and their exchange with vector registers takes the multipliers' ports. The compiler must not see where they come from.
  constexpr int row_bases = (ROWS + 2) / 3, panel_bases = (PANELS + 2) / 3;
  const T *left[row_bases], *right[panel_bases];
  for (int i = 0; i < row_bases; ++i) left[i] = hidden(a + 3 * i * a_row);
  for (int p = 0; p < panel_bases; ++p) right[p] = hidden(b + 3 * p * b_panel);
  // What is added to comes from memory while the multipliers work.
  if (add)
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < 2 * PANELS; ++j) __builtin_prefetch(c + i * c_row + j * lanes<T>);
  Vec<T> sum[ROWS][2 * PANELS] = {};
  const auto multiply = S2S_LAMBDA(int64_t k) {
    Vec<T> row[2 * PANELS];
#pragma GCC unroll 16
    for (int j = 0; j < 2 * PANELS; ++j) {
      const int p = j / 2;
      row[j] = load(right[p / 3] + p % 3 * b_panel + j % 2 * lanes<T>);
      if (ROWS > 1) keep_in_register<T>(row[j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> factor = broadcast(left[i / 3][i % 3 * a_row + k]);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * PANELS; ++j) sum[i][j] = fma(factor, row[j], sum[i][j]);
    }
#pragma GCC unroll 16
    for (int p = 0; p < panel_bases; ++p) right[p] += b_row;
  };
  int64_t k = 0;
  Vec<T> total[ROWS][2 * PANELS];
  for (int64_t stop = gemm_min(run, depth);; stop = gemm_min(stop + run, depth)) {
    for (; k + 4 <= stop; k += 4) {
      multiply(0);
      multiply(1);
      if (ROWS > 3) __builtin_prefetch(ahead, 0, 2);
      multiply(2);
      multiply(3);
      if (ROWS > 3) __builtin_prefetch(ahead + ahead_step, 0, 2);
      ahead += 2 * ahead_step;
#pragma GCC unroll 16
      for (int i = 0; i < row_bases; ++i) left[i] += 4;
    }
    if (stop == depth) break;
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < 2 * PANELS; ++j) {
        total[i][j] = k > run ? total[i][j] + sum[i][j] : sum[i][j];
        sum[i][j] = Vec<T>{};
      }
  }
  for (; k < depth; ++k) {
    multiply(0);
#pragma GCC unroll 16
    for (int i = 0; i < row_bases; ++i) left[i] += 1;
  }
  if (run < depth)
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < 2 * PANELS; ++j) sum[i][j] = total[i][j] + sum[i][j];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 2 * PANELS; ++j) {
      T* to = c + i * c_row + j * lanes<T>;
      const int64_t valid = j < 2 * PANELS - 2 ? lanes<T> : columns - (j - (2 * PANELS - 2)) * lanes<T>;
      if (valid >= lanes<T>)
        store(to, add ? load(to) + sum[i][j] : sum[i][j]);
      else if (valid > 0)
        store_partial(to, add ? load_partial(to, valid) + sum[i][j] : sum[i][j], valid);
    }
  }
}

// As gemm_tile, for any number of rows up to gemm_mr, over one panel or (if `wide`) gemm_wide(rows) of them.
template <class T, int ROWS = gemm_mr>
void gemm_rows(int64_t rows, bool wide, int64_t depth, const T* a, int64_t a_row, const T* b, int64_t b_panel, int64_t b_row, T* c,
               int64_t c_row, bool add, int64_t columns, const char* ahead, int64_t ahead_step, int64_t run = gemm_kc) {
  if (rows == ROWS) {
    if (wide)
      gemm_tile<T, ROWS, gemm_wide(ROWS)>(depth, a, a_row, b, b_panel, b_row, c, c_row, add, columns, ahead, ahead_step, run);
    else
      gemm_tile<T, ROWS, 1>(depth, a, a_row, b, b_panel, b_row, c, c_row, add, columns, ahead, ahead_step, run);
  } else if constexpr (ROWS > 1) {
    gemm_rows<T, ROWS - 1>(rows, wide, depth, a, a_row, b, b_panel, b_row, c, c_row, add, columns, ahead, ahead_step, run);
  }
}

// ---- packing ----
// One block of gemm_transpose rows and columns: to[j * to_row + i] = from[i * from_row + j].
#if defined(__x86_64__) && S2S_VECTOR_BYTES >= 32
template <class T>
inline constexpr int64_t gemm_transpose = 32 / static_cast<int64_t>(sizeof(T));

S2S_INLINE __m128 load_four(const float* from) { return _mm_loadu_ps(from); }
S2S_INLINE __m128 load_four(const float16* from) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))); }
S2S_INLINE __m128 load_four(const bfloat16* from) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))), 16));
}

// to[j] lane i = from[i * from_row + j]
template <class S>
S2S_INLINE void load_transposed(const S* from, int64_t from_row, __m256 (&to)[8]) {
#pragma GCC unroll 2
  for (int j = 0; j < 8; j += 4) {
    // Rows four apart meet as they are loaded, which leaves shuffles within halves only: those that cross are slower and fewer at a time.
    __m256 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      rows[i] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(load_four(from + i * from_row + j)), load_four(from + (i + 4) * from_row + j), 1);
    const __m256 a = _mm256_unpacklo_ps(rows[0], rows[1]), b = _mm256_unpackhi_ps(rows[0], rows[1]);
    const __m256 c = _mm256_unpacklo_ps(rows[2], rows[3]), d = _mm256_unpackhi_ps(rows[2], rows[3]);
    to[j] = _mm256_shuffle_ps(a, c, 0x44);
    to[j + 1] = _mm256_shuffle_ps(a, c, 0xee);
    to[j + 2] = _mm256_shuffle_ps(b, d, 0x44);
    to[j + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
}

template <class S>
S2S_INLINE void transpose_block(const S* from, int64_t from_row, float* to, int64_t to_row) {
  __m256 columns[8];
  load_transposed(from, from_row, columns);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) _mm256_storeu_ps(to + j * to_row, columns[j]);
}

#if S2S_VECTOR_BYTES == 64
// The same of 16 rows, four columns at a time.
template <class S>
S2S_INLINE void transpose_strips(const S* from, int64_t from_row, int64_t columns, float* to, int64_t to_row) {
  // A pointer for every four rows: one a row would not fit the registers.
  const S* four[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) four[q] = hidden(from + 4 * q * from_row);
  for (int64_t j = 0; j < columns; j += 4, to += 4 * to_row) {
    __m512 rows[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm512_castps128_ps512(load_four(four[0] + i * from_row));
      rows[i] = _mm512_maskz_insertf32x4(-1, rows[i], load_four(four[1] + i * from_row), 1);
      rows[i] = _mm512_maskz_insertf32x4(-1, rows[i], load_four(four[2] + i * from_row), 2);
      rows[i] = _mm512_maskz_insertf32x4(-1, rows[i], load_four(four[3] + i * from_row), 3);
    }
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) four[q] += 4;
    const __m512 a = _mm512_maskz_unpacklo_ps(-1, rows[0], rows[1]), b = _mm512_maskz_unpackhi_ps(-1, rows[0], rows[1]);
    const __m512 c = _mm512_maskz_unpacklo_ps(-1, rows[2], rows[3]), d = _mm512_maskz_unpackhi_ps(-1, rows[2], rows[3]);
    _mm512_storeu_ps(to, _mm512_maskz_shuffle_ps(-1, a, c, 0x44));
    _mm512_storeu_ps(to + to_row, _mm512_maskz_shuffle_ps(-1, a, c, 0xee));
    _mm512_storeu_ps(to + 2 * to_row, _mm512_maskz_shuffle_ps(-1, b, d, 0x44));
    _mm512_storeu_ps(to + 3 * to_row, _mm512_maskz_shuffle_ps(-1, b, d, 0xee));
  }
}

// The same of at most four rows.
template <class S>
S2S_INLINE void transpose_rest(int64_t rows, const S* from, int64_t from_row, int64_t columns, float* to, int64_t to_row) {
  const S* row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = from + min(int64_t{i}, rows - 1) * from_row;
  const __mmask8 some = static_cast<__mmask8>((1u << rows) - 1u);
  for (int64_t j = 0; j < columns; j += 4, to += 4 * to_row) {
    const __m128 r0 = load_four(row[0] + j), r1 = load_four(row[1] + j), r2 = load_four(row[2] + j), r3 = load_four(row[3] + j);
    const __m128 a = _mm_unpacklo_ps(r0, r1), b = _mm_unpackhi_ps(r0, r1), c = _mm_unpacklo_ps(r2, r3), d = _mm_unpackhi_ps(r2, r3);
    _mm_mask_storeu_ps(to, some, _mm_movelh_ps(a, c));
    _mm_mask_storeu_ps(to + to_row, some, _mm_movehl_ps(c, a));
    _mm_mask_storeu_ps(to + 2 * to_row, some, _mm_movelh_ps(b, d));
    _mm_mask_storeu_ps(to + 3 * to_row, some, _mm_movehl_ps(d, b));
  }
}
#endif

S2S_INLINE void transpose_block(const double* from, int64_t from_row, double* to, int64_t to_row) {
  const __m256d r0 = _mm256_loadu_pd(from), r1 = _mm256_loadu_pd(from + from_row);
  const __m256d r2 = _mm256_loadu_pd(from + 2 * from_row), r3 = _mm256_loadu_pd(from + 3 * from_row);
  const __m256d a = _mm256_unpacklo_pd(r0, r1), b = _mm256_unpackhi_pd(r0, r1), c = _mm256_unpacklo_pd(r2, r3),
                d = _mm256_unpackhi_pd(r2, r3);
  _mm256_storeu_pd(to, _mm256_permute2f128_pd(a, c, 0x20));
  _mm256_storeu_pd(to + to_row, _mm256_permute2f128_pd(b, d, 0x20));
  _mm256_storeu_pd(to + 2 * to_row, _mm256_permute2f128_pd(a, c, 0x31));
  _mm256_storeu_pd(to + 3 * to_row, _mm256_permute2f128_pd(b, d, 0x31));
}

// One row of A times gemm_vector_columns columns of B, each contiguous and b_col after the last: transposed in registers and not stored.
inline constexpr int64_t gemm_vector_columns = 32;
template <class TB>
__attribute__((noinline)) void gemm_vector(int64_t depth, const float* a, const TB* b, int64_t b_col, float* c, bool add) {
  __m256 sum[4] = {};
  int64_t k = 0;
  // Sixteen at a time, a whole cache line of each column: with a stride of a power of two the lines of 32 columns don't stay in the first
  // level.
  for (; k + 16 <= depth; k += 16) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      const TB* const from = b + 8 * g * b_col + k;
#pragma GCC unroll 2
      for (int h = 0; h < 16; h += 8) {
        __m256 right[8];
        load_transposed(from + h, b_col, right);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) sum[g] = _mm256_fmadd_ps(_mm256_set1_ps(a[k + h + i]), right[i], sum[g]);
      }
    }
  }
  for (; k < depth; ++k)
    for (int g = 0; g < 4; ++g) {
      float right[8];
      for (int i = 0; i < 8; ++i) right[i] = to_compute(b[(8 * g + i) * b_col + k]);
      sum[g] = _mm256_fmadd_ps(_mm256_set1_ps(a[k]), _mm256_loadu_ps(right), sum[g]);
    }
  for (int g = 0; g < 4; ++g) _mm256_storeu_ps(c + 8 * g, add ? _mm256_loadu_ps(c + 8 * g) + sum[g] : sum[g]);
}
#else
template <class T>
inline constexpr int64_t gemm_transpose = 4;

template <class T, class S>
S2S_INLINE void transpose_block(const S* from, int64_t from_row, T* to, int64_t to_row) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) to[j * to_row + i] = to_compute(from[i * from_row + j]);
}
#endif

// to[j * to_row + i] = from[i * from_row + j * from_col] for i in [0, rows), j in [0, cols).
template <class T, class S>
void copy_transposed(int64_t rows, int64_t cols, const S* from, int64_t from_row, int64_t from_col, T* to, int64_t to_row) {
#if S2S_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    while (from_col == 1 && rows >= 16 && cols % 4 == 0) {
      transpose_strips(from, from_row, cols, to, to_row);
      rows -= 16, from += 16 * from_row, to += 16;
    }
    while (from_col == 1 && rows % gemm_transpose<T> && cols % 4 == 0) {
      const int64_t some = (rows - 1) % 4 + 1;
      rows -= some;
      transpose_rest(some, from + rows * from_row, from_row, cols, to + rows, to_row);
    }
  }
#endif
  constexpr int64_t block = gemm_transpose<T>;
  const int64_t whole_rows = from_col == 1 ? rows / block * block : 0, whole_cols = whole_rows ? cols / block * block : 0;
  // Along the longer side; few rows by cache lines of each, which are read but once and whose columns are written together.
  const int64_t line = 2 * block, lines = rows <= 4 * block ? whole_cols / line * line : 0;
  for (int64_t j = 0; j < lines; j += line)
    for (int64_t i = 0; i < whole_rows; i += block)
      for (int64_t half = 0; half < line; half += block)
        transpose_block(from + i * from_row + j + half, from_row, to + (j + half) * to_row + i, to_row);
  for (int64_t i = 0; i < whole_rows; i += block)
    for (int64_t j = lines; j < whole_cols; j += block) transpose_block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_cols : 0; j < cols; ++j) to[j * to_row + i] = to_compute(from[i * from_row + j * from_col]);
}

// to[i * to_row + j] = from[i * from_row + j]
template <class T, class S>
void copy_rows(int64_t rows, int64_t cols, const S* from, int64_t from_row, T* to, int64_t to_row) {
  for (int64_t i = 0; i < rows; ++i) {
    const S* const source = from + i * from_row;
    T* const target = to + i * to_row;
    for (int64_t j = 0; j < cols; j += lanes<T>) {
      if (j + lanes<T> <= cols)
        store(target + j, load(source + j));
      else
        store_partial(target + j, load_partial(source + j, cols - j), cols - j);
    }
  }
}

// The panels that cover `columns` columns: packed[p * panel + k * gemm_nr + j] = B[k, p * gemm_nr + j]; columns past the last are 0.
template <class T, class TB>
void pack_panels(int64_t depth, int64_t columns, const TB* b, int64_t b_row, int64_t b_col, T* packed, int64_t panel) {
  constexpr int64_t nr = gemm_nr<T>;
  const int64_t whole = columns / nr, rest = columns - whole * nr;
  if (b_col == 1) {
    // Row by row over all panels, the order in which memory is fetched best.
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t p = 0; p < whole; ++p) {
        const TB* const from = b + k * b_row + p * nr;
        __builtin_prefetch(from + 8 * b_row);
        store(packed + p * panel + k * nr, load(from));
        store(packed + p * panel + k * nr + lanes<T>, load(from + lanes<T>));
      }
    }
  } else {
    for (int64_t p = 0; p < whole; ++p) copy_transposed(nr, depth, b + p * nr * b_col, b_col, b_row, packed + p * panel, nr);
  }
  if (rest) {
    T* const last = packed + whole * panel;
    const TB* const from = b + whole * nr * b_col;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = rest; j < nr; ++j) last[k * nr + j] = T(0);
    if (b_col == 1)
      copy_rows(depth, rest, from, b_row, last, nr);
    else
      copy_transposed(rest, depth, from, b_col, b_row, last, nr);
  }
}

// ---- the general product ----
// Columns of B packed together: few where one block of rows uses them at once, many where they are kept for the blocks of rows that follow.
template <class T>
int64_t gemm_packed_columns(int64_t m, int64_t n) {
  const int64_t most = m > gemm_mc ? gemm_nc : gemm_group_panels * gemm_nr<T>;
  return gemm_min(most, (n + gemm_nr<T> - 1) / gemm_nr<T> * gemm_nr<T>);
}

// Elements of T that gemm needs as scratch, for any strides and storage types: enough for smaller m, n and k too.
template <class T>
int64_t gemm_workspace(int64_t m, int64_t n, int64_t k) {
  const int64_t depth = gemm_min(k, gemm_kc);
  return gemm_packed_columns<T>(m, n) * depth + gemm_min(m, gemm_mc) * (depth + gemm_row_pad) + 64 / static_cast<int64_t>(sizeof(T));
}

// The first row of group g of `groups` groups into which `rows` rows are dealt evenly.
constexpr int64_t gemm_group(int64_t rows, int64_t groups, int64_t g) { return rows / groups * g + gemm_min(g, rows % groups); }

// What the caller needs next, and comes from memory while the multipliers work: [at, end), and after that the panels of B themselves, one
// panel ahead, where they don't fit the caches.
struct GemmAhead {
  const char *at, *end;
  bool panels;
};

// The columns [0, n) of one block of rows and of k, from panels: those of B itself (rows `right_row` apart) or packed ones.
template <class T>
void gemm_block(int64_t rows, int64_t n, int64_t depth, const T* left, int64_t left_row, const T* right, int64_t right_panel,
                int64_t right_row, T* c, int64_t c_row, bool add, GemmAhead* ahead = nullptr, int64_t run = gemm_kc) {
  constexpr int64_t nr = gemm_nr<T>;
  const int64_t groups = (rows + gemm_mr - 1) / gemm_mr, wide = groups == 1 ? gemm_wide(static_cast<int>(rows)) : 1;
  for (int64_t j = 0; j < n;) {
    const bool is_wide = j + wide * nr <= n;
    const int64_t panels = is_wide ? wide : 1, last = gemm_min(n - j, panels * nr) - (panels - 1) * nr;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t begin = gemm_group(rows, groups, g), count = gemm_group(rows, groups, g + 1) - begin;
      const T* const a = left + begin * left_row;
      const char* fetched = reinterpret_cast<const char*>(a);
      int64_t step = 0;
      if (ahead) {
        const int64_t bytes = depth / 2 * 64, panel = panels * depth * nr * static_cast<int64_t>(sizeof(T));
        if (ahead->at < ahead->end) {
          fetched = ahead->at, step = 64;
          ahead->at += bytes;
        } else if (ahead->panels && j + panels * nr < n && g * bytes < panel) {
          fetched = reinterpret_cast<const char*>(right + (j / nr + panels) * right_panel) + g * bytes, step = 64;
        }
      }
      gemm_rows<T>(count, is_wide && wide > 1, depth, a, left_row, right + j / nr * right_panel, right_panel, right_row,
                   c + begin * c_row + j, c_row, add, last, fetched, step, run);
    }
    j += panels * nr;
  }
}

template <class T, class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, const TA* a, int64_t a_row_stride, int64_t a_col_stride, const TB* b, int64_t b_row_stride,
          int64_t b_col_stride, T* c, int64_t c_row_stride, bool accumulate, T* workspace) {
  constexpr int64_t nr = gemm_nr<T>;
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    for (int64_t i = 0; i < m && !accumulate; ++i) std::memset(c + i * c_row_stride, 0, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  const bool keep = m > gemm_mc;
  const int64_t width = gemm_packed_columns<T>(m, n), step = gemm_group_panels * nr;
  T* const panel_buffer = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  T* const row_buffer = panel_buffer + width * gemm_min(k, gemm_kc);
  for (int64_t k0 = 0; k0 < k; k0 += gemm_kc) {
    const int64_t depth = gemm_min(k - k0, gemm_kc);
    const bool add = accumulate || k0 > 0;
    for (int64_t j0 = 0, j1; j0 < n; j0 = j1) {
      j1 = keep ? gemm_min(n, j0 + width) : n;
      for (int64_t i0 = 0; i0 < m; i0 += gemm_mc) {
        const int64_t rows = gemm_min(m - i0, gemm_mc);
        const TA* const from = a + i0 * a_row_stride + k0 * a_col_stride;
        const T* left = row_buffer;
        int64_t left_row = depth + gemm_row_pad;
        if (a_col_stride != 1) {
          copy_transposed(depth, rows, from, a_col_stride, a_row_stride, row_buffer, left_row);
        } else if constexpr (std::is_same_v<T, TA>) {
          left = from;
          left_row = a_row_stride;
        } else {
          copy_rows(rows, depth, from, a_row_stride, row_buffer, left_row);
        }
        for (int64_t j = j0; j < j1; j += step) {
          const int64_t columns = gemm_min(j1 - j, step);
          const TB* const source = b + k0 * b_row_stride + j * b_col_stride;
          T* const to = c + i0 * c_row_stride + j;
          int64_t in_place = 0;
          if constexpr (std::is_same_v<T, TB>) {
            if (b_col_stride == 1 && m <= gemm_mr) {
              in_place = columns / nr * nr;
              gemm_block<T>(rows, in_place, depth, left, left_row, source, nr, b_row_stride, to, c_row_stride, add);
            }
          }
#if defined(__x86_64__) && S2S_VECTOR_BYTES >= 32
          if constexpr (std::is_same_v<T, float>) {
            if (b_row_stride == 1 && b_col_stride != 1 && m == 1)
              for (; in_place + gemm_vector_columns <= columns; in_place += gemm_vector_columns)
                gemm_vector(depth, left, source + in_place * b_col_stride, b_col_stride, to + in_place, add);
          }
#endif
          if (in_place == columns) continue;
          T* const packed = panel_buffer + (keep ? (j - j0) * depth : 0);
          if (i0 == 0)
            pack_panels(depth, columns - in_place, source + in_place * b_col_stride, b_row_stride, b_col_stride, packed, depth * nr);
          gemm_block<T>(rows, columns - in_place, depth, left, left_row, packed, depth * nr, nr, to + in_place, c_row_stride, add);
        }
      }
    }
  }
}

// ---- B packed once, for recurrences ----
// Panels of gemm_nr columns, one after another, each (k, gemm_nr).
template <class T>
int64_t packed_b_size(int64_t n, int64_t k) {
  return (n + gemm_nr<T> - 1) / gemm_nr<T> * gemm_nr<T> * k;
}

template <class T, class TB>
void pack_b(int64_t n, int64_t k, const TB* b, int64_t b_row_stride, int64_t b_col_stride, T* packed) {
  const int64_t step = gemm_group_panels * gemm_nr<T>;
  for (int64_t j = 0; j < n; j += step)
    pack_panels(k, gemm_min(n - j, step), b + j * b_col_stride, b_row_stride, b_col_stride, packed + j * k, k * gemm_nr<T>);
}

// The columns of panels [panel_begin, panel_end) only; a, packed and c are those of the whole product. A has unit column stride.
template <class T>
void gemm_packed_panels(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row_stride, const T* packed, T* c, int64_t c_row_stride,
                        bool accumulate, int64_t panel_begin, int64_t panel_end, GemmAhead* ahead = nullptr, int64_t run = gemm_kc) {
  constexpr int64_t nr = gemm_nr<T>;
  const int64_t begin = panel_begin * nr, end = gemm_min(panel_end * nr, n), step = gemm_group_panels * nr;
  if (m <= 0) return;
  for (int64_t j = begin; j < end; j += step) {
    const int64_t columns = gemm_min(end - j, step);
    for (int64_t k0 = 0; k0 < k; k0 += gemm_kc)
      gemm_block<T>(m, columns, gemm_min(k - k0, gemm_kc), a + k0, a_row_stride, packed + j * k + k0 * nr, k * nr, nr, c + j, c_row_stride,
                    accumulate || k0 > 0, ahead, run);
    for (int64_t i = 0; i < m && k <= 0 && !accumulate; ++i)
      std::memset(c + i * c_row_stride + j, 0, static_cast<size_t>(columns) * sizeof(T));
  }
}

template <class T>
void gemm_packed(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row_stride, const T* packed, T* c, int64_t c_row_stride,
                 bool accumulate) {
  gemm_packed_panels<T>(m, n, k, a, a_row_stride, packed, c, c_row_stride, accumulate, 0, (n + gemm_nr<T> - 1) / gemm_nr<T>);
}
