// Single-threaded matrix products. C (m, n), unit column stride, becomes or is increased by A (m, k) times B (k, n).
//
// The rule of order, which makes the bits independent of how callers split m or n over threads, and of the path taken: k is cut into blocks of gemm_kc; in a
// block each element of C has one accumulator, starting at 0, to which fma(a, b, .) is applied for k ascending; blocks are added to C in ascending order (the
// first replaces C unless accumulating). Every tile shape obeys it, so gemm and gemm_packed agree to the bit as well. Splitting k would change the bits.
//
// A tile is `rows` rows by `panels` panels of gemm_nr columns, wide enough in either direction to keep the multipliers busy. B is packed panel by panel into a
// buffer of first-level-cache size just before use; rows-by-unit-stride B with few rows of A is read in place, as packing would cost more than the product.

template <class T>
inline constexpr int64_t gemm_nr = 2 * lanes<T>;
inline constexpr int64_t gemm_kc = 256;
inline constexpr int gemm_mr = S2S_VECTOR_BYTES == 64 ? 12 : 6;
inline constexpr int64_t gemm_mc = 192;
inline constexpr int64_t gemm_row_pad = 16;  // keeps the rows of a copied block of A out of one cache set

// Panels side by side in a tile of few rows.
constexpr int gemm_wide(int rows) {
  constexpr int accumulators = S2S_VECTOR_BYTES == 64 ? 24 : 12;
  return accumulators / (2 * rows) > 1 ? (accumulators / (2 * rows) < 6 ? accumulators / (2 * rows) : 6) : 1;
}

constexpr int64_t gemm_min(int64_t a, int64_t b) { return a < b ? a : b; }

// C (ROWS, PANELS * gemm_nr) of which the last panel has `columns` valid columns. Element (i, k) of A is a[i * a_row + k * a_col]; row k of panel p of B starts at
// b + p * b_panel + k * b_row.
template <class T, int ROWS, int PANELS>
__attribute__((noinline)) void gemm_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_panel, int64_t b_row, T* c,
                                         int64_t c_row, bool add, int64_t columns) {
  Vec<T> sum[ROWS][2 * PANELS] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[2 * PANELS];
#pragma GCC unroll 8
    for (int p = 0; p < PANELS; ++p) {
      right[2 * p] = load(b + p * b_panel);
      right[2 * p + 1] = load(b + p * b_panel + lanes<T>);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const Vec<T> left = broadcast(a[i * a_row]);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * PANELS; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
    a += a_col;
    b += b_row;
  }
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
void gemm_rows(int64_t rows, bool wide, int64_t depth, const T* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_panel, int64_t b_row, T* c, int64_t c_row,
               bool add, int64_t columns) {
  if (rows == ROWS) {
    if (wide)
      gemm_tile<T, ROWS, gemm_wide(ROWS)>(depth, a, a_row, a_col, b, b_panel, b_row, c, c_row, add, columns);
    else
      gemm_tile<T, ROWS, 1>(depth, a, a_row, a_col, b, b_panel, b_row, c, c_row, add, columns);
  } else if constexpr (ROWS > 1) {
    gemm_rows<T, ROWS - 1>(rows, wide, depth, a, a_row, a_col, b, b_panel, b_row, c, c_row, add, columns);
  }
}

// ---- packing ----
// One panel, k-major: packed[k * gemm_nr + j] = B[k, j], columns past `columns` are 0.
template <class T, class TB>
void pack_panel(int64_t depth, int64_t columns, const TB* b, int64_t b_row, int64_t b_col, T* packed) {
  constexpr int64_t nr = gemm_nr<T>;
  if (b_col == 1 && columns == nr) {
    for (int64_t k = 0; k < depth; ++k) {
      store(packed + k * nr, load(b + k * b_row));
      store(packed + k * nr + lanes<T>, load(b + k * b_row + lanes<T>));
    }
    return;
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t k = 0; k < depth; ++k) packed[k * nr + j] = to_compute(b[k * b_row + j * b_col]);
  for (int64_t k = 0; k < depth && columns < nr; ++k)
    for (int64_t j = columns; j < nr; ++j) packed[k * nr + j] = T(0);
}

// ---- the general product ----
// Elements of T that gemm needs as scratch, for any strides and storage types.
template <class T>
int64_t gemm_workspace(int64_t m, int64_t n, int64_t k) {
  const int64_t depth = gemm_min(k, gemm_kc), panels = gemm_min((n + gemm_nr<T> - 1) / gemm_nr<T>, m <= gemm_mr ? gemm_wide(1) : 1);
  return gemm_min(m, gemm_mc) * (depth + gemm_row_pad) + panels * depth * gemm_nr<T> + 64 / static_cast<int64_t>(sizeof(T));
}

// The first row of group g of `groups` groups into which `rows` rows are dealt evenly.
constexpr int64_t gemm_group(int64_t rows, int64_t groups, int64_t g) { return rows / groups * g + gemm_min(g, rows % groups); }

template <class T, class TA, class TB>
void gemm(int64_t m, int64_t n, int64_t k, const TA* a, int64_t a_row_stride, int64_t a_col_stride, const TB* b, int64_t b_row_stride, int64_t b_col_stride,
          T* c, int64_t c_row_stride, bool accumulate, T* workspace) {
  constexpr int64_t nr = gemm_nr<T>;
  if (m <= 0 || n <= 0) return;
  if (k <= 0) {
    for (int64_t i = 0; i < m && !accumulate; ++i) std::memset(c + i * c_row_stride, 0, static_cast<size_t>(n) * sizeof(T));
    return;
  }
  T* const panel_buffer = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  T* const row_buffer = panel_buffer + gemm_min(k, gemm_kc) * nr * gemm_min((n + nr - 1) / nr, m <= gemm_mr ? gemm_wide(1) : 1);
  for (int64_t i0 = 0; i0 < m; i0 += gemm_mc) {
    const int64_t rows = gemm_min(m - i0, gemm_mc), groups = (rows + gemm_mr - 1) / gemm_mr;
    for (int64_t k0 = 0; k0 < k; k0 += gemm_kc) {
      const int64_t depth = gemm_min(k - k0, gemm_kc);
      const TA* const from = a + i0 * a_row_stride + k0 * a_col_stride;
      const bool add = accumulate || k0 > 0;
      const T* left = row_buffer;
      int64_t left_row = depth + gemm_row_pad, left_col = 1;
      bool grouped = false;  // A is copied group by group, each k-major
      if (a_col_stride == 1) {
        if constexpr (std::is_same_v<T, TA>) {
          left = from;
          left_row = a_row_stride;
        } else {
          for (int64_t i = 0; i < rows; ++i) {
            int64_t j = 0;
            for (; j + lanes<T> <= depth; j += lanes<T>) store(row_buffer + i * left_row + j, load(from + i * a_row_stride + j));
            for (; j < depth; ++j) row_buffer[i * left_row + j] = to_compute(from[i * a_row_stride + j]);
          }
        }
      } else {
        grouped = true;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = gemm_group(rows, groups, g), count = gemm_group(rows, groups, g + 1) - begin;
          T* to = row_buffer + begin * depth;
          for (int64_t j = 0; j < depth; ++j)
            for (int64_t i = 0; i < count; ++i) *to++ = to_compute(from[(begin + i) * a_row_stride + j * a_col_stride]);
        }
      }
      const int64_t wide = groups == 1 ? gemm_wide(static_cast<int>(rows)) : 1;
      for (int64_t j = 0; j < n;) {
        const bool is_wide = wide > 1 && j + wide * nr <= n;
        const int64_t panels = is_wide ? wide : 1, columns = gemm_min(n - j, panels * nr), last = columns - (panels - 1) * nr;
        const TB* const source = b + k0 * b_row_stride + j * b_col_stride;
        const T* right = panel_buffer;
        int64_t right_panel = depth * nr, right_row = nr;
        bool in_place = false;
        if constexpr (std::is_same_v<T, TB>) {
          if (b_col_stride == 1 && groups == 1 && last == nr) {
            in_place = true;
            right = source;
            right_panel = nr;
            right_row = b_row_stride;
          }
        }
        if (!in_place)
          for (int64_t p = 0; p < panels; ++p)
            pack_panel(depth, p + 1 < panels ? nr : last, source + p * nr * b_col_stride, b_row_stride, b_col_stride, panel_buffer + p * depth * nr);
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t begin = gemm_group(rows, groups, g), count = gemm_group(rows, groups, g + 1) - begin;
          const T* const tile = grouped ? row_buffer + begin * depth : left + begin * left_row;
          gemm_rows<T>(count, is_wide, depth, tile, grouped ? 1 : left_row, grouped ? count : left_col, right, right_panel, right_row,
                       c + (i0 + begin) * c_row_stride + j, c_row_stride, add, last);
        }
        j += panels * nr;
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
  for (int64_t j = 0; j < n; j += gemm_nr<T>)
    pack_panel(k, gemm_min(n - j, gemm_nr<T>), b + j * b_col_stride, b_row_stride, b_col_stride, packed + j * k);
}

// The columns of panels [panel_begin, panel_end) only; a, packed and c are those of the whole product. A has unit column stride.
template <class T>
void gemm_packed_panels(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row_stride, const T* packed, T* c, int64_t c_row_stride, bool accumulate,
                        int64_t panel_begin, int64_t panel_end) {
  constexpr int64_t nr = gemm_nr<T>;
  const int64_t end = gemm_min(panel_end * nr, n), groups = (m + gemm_mr - 1) / gemm_mr;
  const int64_t wide = groups == 1 ? gemm_wide(static_cast<int>(m)) : 1;
  for (int64_t j = panel_begin * nr; j < end && m > 0;) {
    const bool is_wide = wide > 1 && j + wide * nr <= end;
    const int64_t panels = is_wide ? wide : 1, last = gemm_min(end - j, panels * nr) - (panels - 1) * nr;
    for (int64_t k0 = 0; k0 < k; k0 += gemm_kc)
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = gemm_group(m, groups, g), count = gemm_group(m, groups, g + 1) - begin;
        gemm_rows<T>(count, is_wide, gemm_min(k - k0, gemm_kc), a + begin * a_row_stride + k0, a_row_stride, 1, packed + j * k + k0 * nr, k * nr, nr,
                     c + begin * c_row_stride + j, c_row_stride, accumulate || k0 > 0, last);
      }
    if (k <= 0 && !accumulate)
      for (int64_t i = 0; i < m; ++i) std::memset(c + i * c_row_stride + j, 0, static_cast<size_t>(last) * sizeof(T));
    j += panels * nr;
  }
}

template <class T>
void gemm_packed(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row_stride, const T* packed, T* c, int64_t c_row_stride, bool accumulate) {
  gemm_packed_panels<T>(m, n, k, a, a_row_stride, packed, c, c_row_stride, accumulate, 0, (n + gemm_nr<T> - 1) / gemm_nr<T>);
}
