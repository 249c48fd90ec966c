// Pieces that work on one row or one matrix: conversions, packing, products of few rows, layer normalisation, zoneout, sums of columns.

// As each_vector, for sums: f also gets which of four accumulators takes this vector, so that additions needn't wait for one another.
template <class T, class F>
S2S_INLINE void each_vector_by_four(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 4 * lanes<T> <= n; j += 4 * lanes<T>) {
    f(WholeVector<T>{}, j, 0);
    f(WholeVector<T>{}, j + lanes<T>, 1);
    f(WholeVector<T>{}, j + 2 * lanes<T>, 2);
    f(WholeVector<T>{}, j + 3 * lanes<T>, 3);
  }
  for (; j + lanes<T> <= n; j += lanes<T>) f(WholeVector<T>{}, j, 0);
  if (j < n) f(PartVector<T>{n - j}, j, 1);
}

template <class T>
S2S_INLINE T total(const Vec<T> (&part)[4]) {
  return hsum((part[0] + part[1]) + (part[2] + part[3]));
}

template <class S>
struct RowKernels {
  using C = compute_t<S>;

  template <bool Add>
  static void take(const void* data, int64_t offset, int64_t stride, int64_t n, C* to) {
    const S* from = static_cast<const S*>(data) + offset;
    if (stride == 1) {
      int64_t j = 0;
      for (; j + lanes<C> <= n; j += lanes<C>) store(to + j, Add ? load(to + j) + load(from + j) : load(from + j));
      for (; j < n; ++j) to[j] = Add ? to[j] + to_compute(from[j]) : to_compute(from[j]);
    } else {
      for (int64_t j = 0; j < n; ++j) to[j] = Add ? to[j] + to_compute(from[j * stride]) : to_compute(from[j * stride]);
    }
  }
  static void read(const void* data, int64_t offset, int64_t stride, int64_t n, C* to) { take<false>(data, offset, stride, n, to); }
  static void add(const void* data, int64_t offset, int64_t stride, int64_t n, C* to) { take<true>(data, offset, stride, n, to); }

  static void write(void* data, int64_t offset, int64_t n, const C* from) {
    S* to = static_cast<S*>(data) + offset;
    int64_t j = 0;
    for (; j + lanes<C> <= n; j += lanes<C>) store(to + j, load(from + j));
    for (; j < n; ++j) to[j] = from_compute<S>(from[j]);
  }
};

template <class T>
void multiply(int64_t n, const T* factor, T* row) {
  each_vector<T>(n, S2S_LAMBDA(auto at, int64_t j) { at.put(row + j, at.get(row + j) * at.get(factor + j)); });
}

inline constexpr int64_t most_split = 128;  // rows of A, more of which make up for packing W for the tile unit
inline constexpr int64_t split_rows = 32;   // of W, whose planes the first-level cache holds

// Weights that are used but few times, read where they lie.
template <class S>
struct UnpackedProduct {
  using C = compute_t<S>;
  // Steps of one row after another that take less time so than packing takes.
  static int64_t few_steps(int64_t n, int64_t k) { return large(n, k) ? 48 : 32; }
  // Whether W, of n columns, is large, so that packing it takes time.
  static bool large(int64_t n, int64_t k) { return n * k >= 1 << 17; }
  // Whether dot products of m rows of A with W take less time than packing W.
  static bool few(int64_t m, int64_t n, int64_t k) { return m <= (large(n, k) ? 20 : 12); }
  // Whether m rows are best multiplied on the tile unit by weights that are split as they lie. dots: B is float32 and its columns are
  // contiguous.
  static bool splits(bool dots, int64_t m, int64_t n, int64_t k) {
#if defined(S2S_TILE_UNIT)
    const bool pays = large(n, k) ? m >= 64 || 5 * m >= 4 * ((m + 31) / 32 * 32) : n * k >= 1 << 15 && m >= 64;
    return dots && std::is_same_v<S, float> && m <= most_split && n >= 32 && k >= 32 && pays;
#else
    return false;
#endif
  }
  // The fastest of those below.
  static Unpacked<C> product(bool dots, int64_t m, int64_t n, int64_t k) {
#if defined(S2S_TILE_UNIT)
    if (splits(dots, m, n, k)) return run_split;
#endif
    return dots && few(m, n, k) ? run_dots : run;
  }

  // C (m, n) = or += A (m, k) times B (k, n).
  static void run(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const void* b, int64_t b_offset, int64_t b_row, int64_t b_col,
                  C* c, int64_t c_row, bool add, bool, C* workspace) {
    const S* const from = static_cast<const S*>(b) + b_offset;
    gemm<C, C, S>(m, n, k, a, a_row, 1, from, b_row, b_col, c, c_row, add, workspace);
  }

#if defined(S2S_TILE_UNIT)
  // The same on the tile unit, for columns that are contiguous, as those of W^T: as the transpose of W times A^T, so that W, the larger
  // one, is split as it lies and used at once.
  static void run_split(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const void* b, int64_t b_offset, int64_t, int64_t b_col,
                        C* c, int64_t c_row, bool add, bool backwards, C* workspace) {
    if constexpr (std::is_same_v<S, float>) {
      const float* const w = static_cast<const float*>(b) + b_offset;
      const auto take = [&](int64_t count) {
        float* const place = workspace;
        workspace += (count + 15) / 16 * 16;
        return place;
      };
      const int64_t row = (m + 15) / 16 * 16, blocks = (n + split_rows - 1) / split_rows;
      workspace = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
      float* const right = take(split_packed_size(m, k));
      float* const product = take(split_rows * row);
      float* const turned = take(add ? split_rows * row : 0);
      for (int64_t j = 0; j < split_columns(m); ++j)
        split_pack_column(j, k, m - 16 * j, S2S_LAMBDA(int64_t i) { return a + (16 * j + i) * a_row; }, right);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t j = (backwards ? blocks - 1 - block : block) * split_rows, columns = gemm_min(split_rows, n - j);
        split_product(columns, m, k, w + j * b_col, b_col, right, product, row, false, false, workspace);
        copy_transposed(columns, m, product, row, int64_t{1}, add ? turned : c + j, add ? split_rows : c_row);
        for (int64_t i = 0; add && i < m; ++i)
          each_vector<float>(
              columns, S2S_LAMBDA(auto at, int64_t l) {
                float* const to = c + i * c_row + j + l;
                at.put(to, at.get(to) + at.get(turned + i * split_rows + l));
              });
      }
    }
  }
#endif

  // The same for few rows and for columns that are contiguous, as those of W^T: dot products. Each has one vector of sums, whatever others
  // are made beside it. Walked `backwards` if asked, a caller finds in the cache what it used last the time before.
  static void run_dots(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const void* b, int64_t b_offset, int64_t, int64_t b_col,
                       C* c, int64_t c_row, bool add, bool backwards, C*) {
    const S* const from = static_cast<const S*>(b) + b_offset;
    constexpr int64_t sums = S2S_VECTOR_BYTES == 64 && sizeof(C) == 4 ? 16 : 0;
    const int64_t at_once = !sums || m > 2 ? 4 : sums / m, parts = (n + at_once - 1) / at_once;
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t j = (backwards ? parts - 1 - p : p) * at_once, count = gemm_min(at_once, n - j);
      const S* const w = from + j * b_col;
      int64_t i = 0;
      const auto dots_of = [&](auto rows, auto columns) {
        for (; i + decltype(rows)::value <= m; i += decltype(rows)::value)
          dots<decltype(rows)::value, decltype(columns)::value>(count, k, a + i * a_row, a_row, w, b_col, c + i * c_row + j, c_row, add);
      };
      if (at_once == 16) dots_of(std::integral_constant<int, 1>{}, std::integral_constant<int, 16>{});
      if (at_once == 8) dots_of(std::integral_constant<int, 2>{}, std::integral_constant<int, 8>{});
      if (at_once == 4) {
        dots_of(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
        dots_of(std::integral_constant<int, 1>{}, std::integral_constant<int, 4>{});
      }
    }
  }

  // M rows of A by N of W, of which `count` are there.
  template <int M, int N>
  static void dots(int64_t count, int64_t k, const C* a, int64_t a_row, const S* w, int64_t w_row, C* c, int64_t c_row, bool add) {
    constexpr bool together = S2S_VECTOR_BYTES == 64 && sizeof(C) == 4;
    Vec<C> sum[together ? 16 : M * N] = {};
    const S* row[N];
    for (int j = 0; j < N; ++j) row[j] = w + (j < count ? j : 0) * w_row;  // a row that isn't there is one that is, and left out
    int64_t at = 0;
    for (; at + lanes<C> <= k; at += lanes<C>) {
      Vec<C> left[M];
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) left[i] = load(a + i * a_row + at);
#pragma GCC unroll 16
      for (int j = 0; j < N; ++j) {
        const Vec<C> weights = load(row[j] + at);
        if (M > 1) __builtin_prefetch(row[j] + at + N * w_row);  // the next rows, while the multipliers work
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) sum[i * N + j] = fma(left[i], weights, sum[i * N + j]);
      }
    }
    if (at < k)
      for (int j = 0; j < N; ++j) {
        const Vec<C> weights = load_partial(row[j] + at, k - at);
        for (int i = 0; i < M; ++i) sum[i * N + j] = fma(load_partial(a + i * a_row + at, k - at), weights, sum[i * N + j]);
      }
    alignas(64) C dot[M * N + lanes<C>];
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
    if constexpr (together) store(dot, sums_of(sum));
#endif
    if constexpr (!together)
      for (int i = 0; i < M * N; ++i) dot[i] = hsum(sum[i]);
    for (int i = 0; i < M; ++i)
      for (int64_t j = 0; j < count; j += lanes<C>) {
        const int64_t here = gemm_min(count - j, lanes<C>);
        C* const to = c + i * c_row + j;
        const Vec<C> value = load_partial(dot + i * N + j, here);
        store_partial(to, add ? load_partial(to, here) + value : value, here);
      }
  }
};

template <class C>
struct RecurrenceProducts {
  // Terms whose sum has one accumulator: eager code, whose gradients are sums of one step each, loses little by rounding, and nor must
  // this.
  static constexpr int64_t run = 64;

  static int64_t unpacked_workspace(int64_t m, int64_t n, int64_t k) {
    int64_t size = gemm_workspace<C>(m, n, k);
#if defined(S2S_TILE_UNIT)
    const int64_t rows = gemm_min(m, most_split);
    if (std::is_same_v<C, float>)
      size = std::max(size, split_packed_size(rows, k) + split_workspace(split_rows, k) + 2 * split_rows * (rows + 16) + 64);
#endif
    return size;
  }
  static int64_t panels(int64_t columns) { return (columns + gemm_nr<C> - 1) / gemm_nr<C>; }
  // Scratch for packing.
  static int64_t pack_workspace(int64_t columns) { return (gemm_nr<C> + 1) * (columns + lanes<C>); }

  // Whether products with a right factor (k, n) and so many rows at a time are faster from planes, on the tile unit. They are packed
  // otherwise than panels, and round otherwise: who decides must not ask how the rows are split.
  static bool tiled(int64_t rows, int64_t n, int64_t k) {
#if defined(S2S_TILE_UNIT)
    // Sixteen rows take the time of ten on the multipliers.
    return std::is_same_v<C, float> && rows >= 11 && 3 * rows >= 2 * ((rows + 15) / 16 * 16) && n >= 32 && k >= 32;
#else
    return false;
#endif
  }
  static int64_t packed_size(int64_t n, int64_t k, bool tiled) {
#if defined(S2S_TILE_UNIT)
    if (tiled) return split_packed_size(n, k);
#endif
    return packed_b_size<C>(n, k);
  }
  // Scratch for a product of m rows.
  static int64_t workspace(int64_t m, int64_t k, bool tiled) {
#if defined(S2S_TILE_UNIT)
    if (tiled) return split_workspace(m, k);
#endif
    return 0;
  }

  // Panels [first, last) of the weights of a part's units, as the right factors of x W_ih^T and h W_hh^T.
  static void pack_units(const RecurrenceForward<C>& p, const Part& part, int64_t first, int64_t last, C* ih, C* hh, C* workspace) {
    const int64_t rows = p.gate_units / p.hidden * part.units;
    if (ih) pack_transposed(first, last, rows, p.inputs, part.units, p.hidden, part.unit, p.weight_ih, nullptr, p.tiled_ih, ih, workspace);
    if (hh) pack_transposed(first, last, rows, p.width, part.units, p.hidden, part.unit, p.weight_hh, p.dropout, p.tiled_hh, hh, workspace);
  }

  // Panels [first, last) of W (rows, columns) as the right factor of v W^T. Of every `all` rows in memory these are the `units` from `unit`
  // on.
  static void pack_transposed(int64_t first, int64_t last, int64_t rows, int64_t columns, int64_t units, int64_t all, int64_t unit,
                              const Source<C>& w, const WeightDropout* dropout, bool tiled, C* packed, C* workspace) {
    constexpr int64_t nr = gemm_nr<C>;
    C* const factor = workspace + nr * columns;
    for (int64_t panel = first; panel < last; ++panel) {
      C* const place = packed + panel * nr * columns;
      const int64_t begin = panel * nr, in_gate = begin % units;
      const bool in_place = w.plain && !dropout;
      if (in_place && !tiled && begin + nr <= rows && (units == all || in_gate + nr <= units)) {
        const int64_t row = begin / units * all + unit + in_gate;
        copy_transposed(nr, columns, w.plain + row * w.batch, w.batch, int64_t{1}, place, nr);
        continue;
      }
      const C* row_of[nr];
      for (int64_t i = 0; i < nr; ++i) {
        const int64_t local = begin + i, row = local / units * all + unit + local % units;
        C* const to = workspace + i * columns;
        row_of[i] = in_place && local < rows ? w.plain + row * w.batch : to;
        if (local >= rows)
          std::memset(to, 0, static_cast<size_t>(columns) * sizeof(C));
        else if (!in_place || !tiled)
          w.read(w.data, row * w.batch, w.unit, columns, to);
        if (local < rows && dropout) drop(*dropout, row, 0, columns, factor, to);
      }
#if defined(S2S_TILE_UNIT)
      if constexpr (std::is_same_v<C, float>) {
        for (int64_t half = 0; tiled && half < nr; half += 16)
          split_pack_column((begin + half) / 16, columns, 16, [&](int64_t i) { return row_of[half + i]; }, packed);
        if (tiled) continue;
      }
#endif
      copy_transposed(nr, columns, workspace, columns, int64_t{1}, place, nr);
    }
  }

  // Rows [first, last) of W (rows, columns) from column `begin` on, as the right factor of v W: rows are summed over. Tiled: after
  // start_rows, and `first` is even.
  static void pack(int64_t first, int64_t last, int64_t rows, int64_t begin, int64_t columns, const Source<C>& w,
                   const WeightDropout* dropout, bool tiled, C* packed, C* workspace) {
    C* const factor = workspace + 2 * (columns + lanes<C>);
    const auto row = [&](int64_t i, C* scratch) {
      if (w.plain && !dropout) return w.plain + i * w.batch + begin;
      w.read(w.data, i * w.batch + begin * w.unit, w.unit, columns, scratch);
      if (dropout) drop(*dropout, i, begin, columns, factor, scratch);
      return const_cast<const C*>(scratch);
    };
    for (int64_t i = first; i < last; ++i) {
      const C* const even = row(i, workspace);
      if (!tiled) {
        pack_row(i, rows, columns, even, packed);
        continue;
      }
      const C* const odd = i + 1 < last ? row(i + 1, workspace + columns + lanes<C>) : nullptr;
      pack_pair(i++, rows, columns, even, odd, packed);
    }
    if (tiled && last == rows) pack_rest(last, rows, columns, packed);
  }

  // Row k of a right factor of `depth` rows.
  static void pack_row(int64_t k, int64_t depth, int64_t columns, const C* row, C* packed) {
    constexpr int64_t nr = gemm_nr<C>;
    C* to = packed + k * nr;
    int64_t j = 0;
    for (; j + nr <= columns; j += nr, to += depth * nr) {
      store(to, load(row + j));
      store(to + lanes<C>, load(row + j + lanes<C>));
    }
    if (j == columns) return;
    for (int64_t l = 0; l < nr; ++l) to[l] = j + l < columns ? row[j + l] : C(0);
  }

  // The same for the tile unit, two rows at a time, the second null where there is none: first start_rows, after the last row pack_rest.
  static void start_rows(int64_t depth, int64_t columns, C* packed) {
#if defined(S2S_TILE_UNIT)
    if constexpr (std::is_same_v<C, float>) split_unmark(columns, depth, packed);
#endif
  }
  static void pack_pair(int64_t k, int64_t depth, int64_t columns, const C* even, const C* odd, C* packed) {
#if defined(S2S_TILE_UNIT)
    if constexpr (std::is_same_v<C, float>) split_pack_pair(k, depth, columns, even, odd, packed);
#endif
  }
  static void pack_rest(int64_t k, int64_t depth, int64_t columns, C* packed) {
#if defined(S2S_TILE_UNIT)
    if constexpr (std::is_same_v<C, float>) split_pack_rest(k, depth, columns, packed);
#endif
  }

  static void drop(const WeightDropout& dropout, int64_t row, int64_t begin, int64_t columns, C* factor, C* values) {
    dropout_factors(dropout.seed0, dropout.seed1, stream_weight, row, begin, columns, dropout.threshold, static_cast<C>(dropout.scale),
                    factor);
    multiply(columns, factor, values);
  }

  // C (m, n) = or += A (m, k) times packed B. A recurrence passes `backwards` on every second step: walking the panels to and fro, it finds
  // those of the turning point still in the second-level cache where the whole does not fit.
  // [next, next_end): what is wanted after the product. workspace: as large as that says, for a tiled B.
  static void packed(int64_t m, int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, bool tiled, C* c, int64_t c_row, bool add,
                     bool backwards, C* workspace, const C* next = nullptr, const C* next_end = nullptr) {
#if defined(S2S_TILE_UNIT)
    if constexpr (std::is_same_v<C, float>)
      if (tiled) return split_product(m, n, k, a, a_row, b, c, c_row, add, backwards, workspace);
#endif
    if (m == 1) return few<1>(n, k, a, a_row, b, c, c_row, add, backwards);
    if (m == 2) return few<2>(n, k, a, a_row, b, c, c_row, add, backwards);
    if (m == 3) return few<3>(n, k, a, a_row, b, c, c_row, add, backwards);
    constexpr int64_t at_once = gemm_group_panels;
    const int64_t panels = (n + gemm_nr<C> - 1) / gemm_nr<C>, parts = (panels + at_once - 1) / at_once;
    const bool large = n * k * static_cast<int64_t>(sizeof(C)) > (3 << 19);
    GemmAhead ahead{reinterpret_cast<const char*>(next), reinterpret_cast<const char*>(next_end), large};
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t part = backwards ? parts - 1 - i : i;
      gemm_packed_panels(m, n, k, a, a_row, b, c, c_row, add, part * at_once, gemm_min(panels, (part + 1) * at_once), &ahead, run);
    }
  }

  // `count` products of m rows with the same right factor, left(i) times packed B = to(i). Each panel serves all of them.
  template <class Left, class To>
  static void packed_each(int64_t count, int64_t m, int64_t n, int64_t k, const Left& left, int64_t a_row, const C* b, bool tiled,
                          const To& to, int64_t c_row, C* workspace) {
    if (tiled) {
      for (int64_t i = 0; i < count; ++i) packed(m, n, k, left(i), a_row, b, true, to(i), c_row, false, i % 2, workspace);
      return;
    }
    for (int64_t j = 0; j < panels(n); j += gemm_group_panels)
      for (int64_t i = 0; i < count; ++i)
        gemm_packed_panels(m, n, k, left(i), a_row, b, to(i), c_row, false, j, gemm_min(panels(n), j + gemm_group_panels), nullptr, run);
  }
  static void packed_several(int64_t count, int64_t m, int64_t n, int64_t k, const C* const* a, int64_t a_row, const C* b, bool tiled,
                             C* const* c, int64_t c_row, C* workspace) {
    packed_each(
        count, m, n, k, S2S_LAMBDA(int64_t i) { return a[i]; }, a_row, b, tiled, S2S_LAMBDA(int64_t i) { return c[i]; }, c_row, workspace);
  }

  // Few rows of A. The panels are dealt evenly to tiles: a tile of one panel would wait for its multiply-adds.
  template <int Rows>
  static void few(int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, C* c, int64_t c_row, bool add, bool backwards) {
    few_of<Rows>(n, k, a, a_row, b, k * gemm_nr<C>, gemm_nr<C>, c, c_row, add, backwards);
  }
  // One row of A times B where it lies, its rows b_row apart and of whole panels.
  static void in_place(int64_t n, int64_t k, const C* a, const C* b, int64_t b_row, C* c, bool add, bool backwards) {
    few_of<1>(n, k, a, 0, b, gemm_nr<C>, b_row, c, 0, add, backwards);
  }

  template <int Rows>
  static void few_of(int64_t n, int64_t k, const C* a, int64_t a_row, const C* b, int64_t b_panel, int64_t b_row, C* c, int64_t c_row,
                     bool add, bool backwards) {
    constexpr int64_t nr = gemm_nr<C>, most = gemm_wide(Rows);
    const int64_t panels = (n + nr - 1) / nr, tiles = (panels + most - 1) / most;
    for (int64_t i = 0; k <= 0 && !add && i < Rows; ++i)
      for (int64_t j = 0; j < n; ++j) c[i * c_row + j] = C(0);
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t tile = backwards ? tiles - 1 - i : i;
      const int64_t begin = gemm_group(panels, tiles, tile), count = gemm_group(panels, tiles, tile + 1) - begin;
      const int64_t last = gemm_min(n - begin * nr, count * nr) - (count - 1) * nr;
      for (int64_t k0 = 0; k0 < k; k0 += gemm_kc)
        tile_of<Rows, most>(count, gemm_min(k - k0, gemm_kc), a + k0, a_row, b + begin * b_panel + k0 * b_row, b_panel, b_row,
                            c + begin * nr, c_row, add || k0 > 0, last);
    }
  }

  template <int Rows, int Panels>
  static void tile_of(int64_t count, int64_t depth, const C* a, int64_t a_row, const C* b, int64_t b_panel, int64_t b_row, C* c,
                      int64_t c_row, bool add, int64_t last) {
    if (count == Panels)
      gemm_tile<C, Rows, Panels>(depth, a, a_row, b, b_panel, b_row, c, c_row, add, last, reinterpret_cast<const char*>(a), 0, run);
    else if constexpr (Panels > 1)
      tile_of<Rows, Panels - 1>(count, depth, a, a_row, b, b_panel, b_row, c, c_row, add, last);
  }

  static int64_t gradient_workspace(bool tiled) {
#if defined(S2S_TILE_UNIT)
    if (tiled) return split_workspace(split_mc, split_kc);
#endif
    return gemm_mc * (gemm_kc + gemm_row_pad);
  }
  // The rows of a weight's gradient that one task makes, and the positions whose values are packed together.
  static constexpr int64_t gradient_rows = gemm_mc, gradient_depth = gemm_kc;

  // Rows [first, last) of grad^T (gates, N), at most gradient_rows of them, times each of the factors (N, columns), which are packed by
  // pack_row, gradient_depth positions at a time, or by pack_pair as the first of `capacity` positions.
  static void weight_gradients(int64_t first, int64_t last, int64_t positions, int64_t capacity, const C* grad, int64_t grad_row, bool add,
                               const GradientFactor<C>* factors, int count, bool tiled, C* workspace) {
#if defined(S2S_TILE_UNIT)
    if constexpr (std::is_same_v<C, float>) {
      SplitLeft left = split_left_in(workspace);
      for (int64_t i = first; tiled && i < last; i += split_mc)
        for (int64_t k = 0; k < positions; k += split_kc) {
          split_left_transposed(gemm_min(split_mc, last - i), gemm_min(split_kc, positions - k), grad + k * grad_row + i, grad_row, left);
          for (const GradientFactor<C>* f = factors; f < factors + count; ++f)
            split_block(left, f->columns, f->packed, split_steps(capacity), k / 32, f->to + i * f->columns, f->columns, add || k > 0,
                        false);
        }
      if (tiled) return;
    }
#endif
    for (int64_t k = 0; k < positions; k += gemm_kc) {
      const int64_t depth = gemm_min(positions - k, gemm_kc), row = depth + gemm_row_pad;
      copy_transposed(depth, last - first, grad + k * grad_row + first, grad_row, int64_t{1}, workspace, row);
      for (const GradientFactor<C>* f = factors; f < factors + count; ++f)
        gemm_block<C>(last - first, f->columns, depth, workspace, row, f->packed + k * panels(f->columns) * gemm_nr<C>, depth * gemm_nr<C>,
                      gemm_nr<C>, f->to + first * f->columns, f->columns, add || k > 0, nullptr, run);
    }
  }

  static constexpr int64_t sum_run = 16;
  // to[j] += sum over rows of a[row][j] b[row][j] c[row][j] for j in [begin, end), b and c optional; sum_run rows at a time, so that many
  // rows lose no more than few.
  static void sum_columns(int64_t rows, int64_t begin, int64_t end, const C* a, int64_t a_row, const C* b, int64_t b_row, const C* c,
                          int64_t c_row, C* to) {
    // Several vectors of a row together, so that memory is read by the line.
    int64_t j = begin;
    for (; j + 8 * lanes<C> <= end; j += 8 * lanes<C>)
      sum_vectors<8>(WholeVector<C>{}, rows, a + j, a_row, b ? b + j : nullptr, b_row, c ? c + j : nullptr, c_row, to + j);
    for (; j + lanes<C> <= end; j += lanes<C>)
      sum_vectors<1>(WholeVector<C>{}, rows, a + j, a_row, b ? b + j : nullptr, b_row, c ? c + j : nullptr, c_row, to + j);
    if (j < end) sum_vectors<1>(PartVector<C>{end - j}, rows, a + j, a_row, b ? b + j : nullptr, b_row, c ? c + j : nullptr, c_row, to + j);
  }

  template <int Count, class At>
  static void sum_vectors(At at, int64_t rows, const C* a, int64_t a_row, const C* b, int64_t b_row, const C* c, int64_t c_row, C* to) {
    Vec<C> total[Count] = {};
    for (int64_t first = 0; first < rows; first += sum_run) {
      Vec<C> sum[Count] = {};
      for (int64_t i = first; i < gemm_min(first + sum_run, rows); ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < Count; ++v) {
          Vec<C> value = at.get(a + i * a_row + v * lanes<C>);
          if (b) value = value * at.get(b + i * b_row + v * lanes<C>);
          if (c) value = value * at.get(c + i * c_row + v * lanes<C>);
          sum[v] = sum[v] + value;
        }
      }
#pragma GCC unroll 8
      for (int v = 0; v < Count; ++v) total[v] = total[v] + sum[v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < Count; ++v) at.put(to + v * lanes<C>, at.get(to + v * lanes<C>) + total[v]);
  }

  // to = (from - mean) / deviation * weight, or is increased by it, and the same without weight goes to `normed`, past the caches if it
  // streams; returns 1 / deviation. No weight: 1; normed may be null, to may be from. The mean is corrected by the mean of what is left:
  // equal elements have their own value as mean, not one next to it, whose difference a small deviation would blow up.
  static C normalise(int64_t n, const C* from, const C* weight, C* normed, bool streams, C* to, bool add) {
    const C size = static_cast<C>(n);
    Vec<C> sum[4] = {}, left[4] = {}, squares[4] = {};
    each_vector_by_four<C>(n, S2S_LAMBDA(auto at, int64_t j, int v) { sum[v] = sum[v] + at.get(from + j); });
    const C about = total<C>(sum) / size;
    each_vector_by_four<C>(
        n, S2S_LAMBDA(auto at, int64_t j, int v) {
          const Vec<C> d = at.get(from + j) - at.only(broadcast(about));
          left[v] = left[v] + d;
          squares[v] = fma(d, d, squares[v]);
        });
    const C correction = total<C>(left) / size, mean = about + correction;
    const C variance = max(C(0), total<C>(squares) / size - correction * correction);
    const C scale = C(1) / vsqrt(broadcast(variance + static_cast<C>(1e-5)))[0];
    each_vector<C>(
        n, S2S_LAMBDA(auto at, int64_t j) {
          const Vec<C> value = (at.get(from + j) - mean) * scale;
          if (normed) at.keep(normed + j, value, streams);
          const Vec<C> weighted = weight ? value * at.get(weight + j) : value;
          at.put(to + j, add ? at.get(to + j) + weighted : weighted);
        });
    return scale;
  }

  // The gradient of the row before normalise from that of normed * weight: scale (g - mean(g) - normed mean(g normed)), g = grad weight.
  static void normalise_gradient(int64_t n, const C* grad, const C* weight, const C* normed, C scale, C* to) {
    const C size = static_cast<C>(n);
    Vec<C> sum[4] = {}, left[4] = {}, product[4] = {};
    each_vector_by_four<C>(n, S2S_LAMBDA(auto at, int64_t j, int v) { sum[v] = fma(at.get(grad + j), at.get(weight + j), sum[v]); });
    const C about = total<C>(sum) / size;
    each_vector_by_four<C>(
        n, S2S_LAMBDA(auto at, int64_t j, int v) {
          const Vec<C> g = at.get(grad + j) * at.get(weight + j);
          left[v] = left[v] + (g - at.only(broadcast(about)));
          product[v] = fma(g, at.get(normed + j), product[v]);
        });
    const C mean = about + total<C>(left) / size, slope = total<C>(product) / size;
    each_vector<C>(
        n, S2S_LAMBDA(auto at, int64_t j) {
          const Vec<C> g = at.get(grad + j) * at.get(weight + j);
          at.put(to + j, (g - mean - at.get(normed + j) * slope) * scale);
        });
  }
};

// The share of its new value that each unit takes under zoneout: 0 or 1 in training.
template <class T>
struct Zones {
  const Zoneout& zoneout;
  T* share;  // scratch (n)

  // Of the n units from `begin` on.
  const T* h(int64_t row, int64_t begin, int64_t n) const { return draw(zoneout.h, zoneout.threshold_h, stream_h, row, begin, n); }
  const T* c(int64_t row, int64_t begin, int64_t n) const { return draw(zoneout.c, zoneout.threshold_c, stream_c, row, begin, n); }
  const T* draw(double p, uint64_t threshold, uint32_t stream, int64_t row, int64_t begin, int64_t n) const {
    if (zoneout.training)
      dropout_factors(zoneout.seed0, zoneout.seed1, stream, row, begin, n, threshold, T(1), share);
    else
      for (int64_t j = 0; j < n; ++j) share[j] = static_cast<T>(1 - p);
    return share;
  }
};

// now becomes its share of itself and the rest of before. A share of 0 or 1 hides the other value, infinite ones too.
template <class T>
void blend(int64_t n, const T* share, const T* before, T* now) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> u = at.get(share + j), a = at.get(now + j), b = at.get(before + j), one = broadcast(T(1));
        at.put(now + j, select(u == one, a, select(u == Vec<T>{}, b, fma(one - u, b, u * a))));
      });
}

// taken becomes share * grad, left the rest of it; left may be grad.
template <class T>
void part(int64_t n, const T* share, const T* grad, T* taken, T* left) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> u = at.get(share + j), g = at.get(grad + j);
        at.put(taken + j, u * g);
        at.put(left + j, (T(1) - u) * g);
      });
}
