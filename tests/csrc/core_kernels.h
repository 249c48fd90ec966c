// What core_test.cpp calls of the shared core, once per instruction set.
template <class T>
struct CoreProbe {
  using Unary = void (*)(const T*, T*, int64_t);

#define S2S_PROBE(name)                                                          \
  static void name(const T* x, T* y, int64_t n) {                                \
    int64_t i = 0;                                                               \
    for (; i + lanes<T> <= n; i += lanes<T>) store(y + i, v##name(load(x + i))); \
    if (i < n) store_partial(y + i, v##name(load_partial(x + i, n - i)), n - i); \
  }
  S2S_PROBE(exp)
  S2S_PROBE(exp_fast)
  S2S_PROBE(log)
  S2S_PROBE(tanh)
  S2S_PROBE(sigmoid)
  S2S_PROBE(erf)
  S2S_PROBE(sqrt)
#undef S2S_PROBE

  static void scalars(T x, T* y) {
    y[0] = vexp(x), y[1] = vexp_fast(x), y[2] = vlog(x), y[3] = vtanh(x), y[4] = vsigmoid(x), y[5] = verf(x);
  }

  // sum, max, then |x|, copy_sign(x, y), min, max and select(x < y) of one vector each; returns the lanes
  static int64_t basics(const T* x, const T* y, T* out) {
    const Vec<T> a = load(x), b = load(y);
    out[0] = hsum(a);
    out[1] = hmax(a);
    store(out + 2, vabs(a));
    store(out + 2 + lanes<T>, copy_sign(a, b));
    store(out + 2 + 2 * lanes<T>, min(a, b));
    store(out + 2 + 3 * lanes<T>, max(a, b));
    store(out + 2 + 4 * lanes<T>, select(a < b, a, b));
    store(out + 2 + 5 * lanes<T>, fma(a, b, a));
    return lanes<T>;
  }

  static int64_t panel_columns() { return gemm_nr<T>; }
  static int64_t workspace(int64_t m, int64_t n, int64_t k) { return gemm_workspace<T>(m, n, k); }
  static int64_t packed_size(int64_t n, int64_t k) { return packed_b_size<T>(n, k); }
  static void product_packed(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, const T* packed, T* c, int64_t c_row,
                             bool accumulate, int64_t begin, int64_t end) {
    if (begin < 0)
      gemm_packed<T>(m, n, k, a, a_row, packed, c, c_row, accumulate);
    else
      gemm_packed_panels<T>(m, n, k, a, a_row, packed, c, c_row, accumulate, begin, end);
  }
  static void factors(int64_t seed0, int64_t seed1, uint32_t stream, int64_t row, int64_t column, int64_t n, uint64_t threshold, T scale,
                      T* out) {
    dropout_factors<T>(seed0, seed1, stream, row, column, n, threshold, scale, out);
  }
};

// Products on the tile unit, of instruction sets that have one.
struct TileProbe {
#if defined(S2S_TILE_UNIT)
  static int64_t packed_size(int64_t n, int64_t k) { return split_packed_size(n, k); }
  static int64_t workspace(int64_t m, int64_t k) { return split_workspace(m, k); }
  // b (k, n), rows contiguous; or (n, k) as columns
  static void pack_rows(int64_t n, int64_t k, const float* b, float* packed) {
    split_unmark(n, k, packed);
    for (int64_t i = 0; i < k; i += 2) split_pack_pair(i, k, n, b + i * n, i + 1 < k ? b + (i + 1) * n : nullptr, packed);
    split_pack_rest(k, k, n, packed);
  }
  static void pack_columns(int64_t n, int64_t k, const float* b, float* packed) {
    for (int64_t j = 0; j < split_columns(n); ++j)
      split_pack_column(j, k, n - 16 * j, [&](int64_t i) { return b + (16 * j + i) * k; }, packed);
  }
  static void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, const float* packed, float* c, int64_t c_row,
                      bool add, bool backwards, float* workspace) {
    split_product(m, n, k, a, a_row, packed, c, c_row, add, backwards, workspace);
  }
  // a (k, m); m and k no more than a block
  static void product_transposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, const float* packed, float* c,
                                 int64_t c_row, bool add, float* workspace) {
    SplitLeft left = split_left_in(workspace);
    split_left_transposed(m, k, a, a_row, left);
    split_block(left, n, packed, split_steps(k), 0, c, c_row, add, false);
  }
#else
  static int64_t packed_size(int64_t, int64_t) { return 0; }
  static int64_t workspace(int64_t, int64_t) { return 0; }
  static void pack_rows(int64_t, int64_t, const float*, float*) {}
  static void pack_columns(int64_t, int64_t, const float*, float*) {}
  static void product(int64_t, int64_t, int64_t, const float*, int64_t, const float*, float*, int64_t, bool, bool, float*) {}
  static void product_transposed(int64_t, int64_t, int64_t, const float*, int64_t, const float*, float*, int64_t, bool, float*) {}
#endif
};

template <class T, class TA, class TB>
void core_product(int64_t m, int64_t n, int64_t k, const TA* a, int64_t a_row, int64_t a_col, const TB* b, int64_t b_row, int64_t b_col,
                  T* c, int64_t c_row, bool accumulate, T* workspace) {
  gemm<T>(m, n, k, a, a_row, a_col, b, b_row, b_col, c, c_row, accumulate, workspace);
}

template <class T, class TB>
void core_pack(int64_t n, int64_t k, const TB* b, int64_t b_row, int64_t b_col, T* packed) {
  pack_b<T>(n, k, b, b_row, b_col, packed);
}

// n may be no multiple of the lanes
template <class S>
void core_widen(const S* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<S> <= n; i += lanes<S>) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}
template <class S>
void core_narrow(const float* x, S* y, int64_t n) {
  int64_t i = 0;
  for (; i + lanes<S> <= n; i += lanes<S>) store(y + i, load(x + i));
  if (i < n) store_partial(y + i, load_partial(x + i, n - i), n - i);
}
