// Backward attention of blocks that are turned (attention_turned.h).

template <class S>
struct TurnedBackward {
  using T = compute_t<S>;

  // Columns of all queries and gradients, block by block.
  template <class M>
  static void turn(const AttentionCall<S>& p, const M& m, const Rows<T>& queries, const Rows<T>& grads, int64_t n) {
    for (int64_t i = 0; i < n; i += attention_block) {
      const int64_t rows = min(attention_block, n - i);
      transpose_rows(rows, p.width, {queries.data + i * queries.row, queries.row, false}, m.queries_turned + i * p.width);
      transpose_rows(rows, p.value_width, {grads.data + i * grads.row, grads.row, false}, m.grads_turned + i * p.value_width);
    }
  }

  // One block of n queries from `first` on with the n_keys keys from `at` on, turned. SOLE: there are no others, and with `fresh` nothing
  // is in the sums of keys and values. Whether the gradients of scores show that all of the block is finite.
  template <bool SOLE, class M>
  static bool block(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t at, int64_t n_keys,
                    int64_t first, int64_t n, const Rows<T>& queries, const Rows<T>& grads, const Rows<T>& keys, const Rows<T>& values,
                    ScoreRow<T>& row, T* query_sums, T* key_sums, T* value_sums, bool fresh, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    const Hull seen = turned_keys(span, p.left, p.right, first, n, at);
    if (seen.empty() && !SOLE) return true;
    turned_product(span, p.left, p.right, first, n, at, seen, p.width, keys, m.queries_turned + first * p.width, m.weights, ahead);
    turned_product(span, p.left, p.right, first, n, at, seen, p.value_width, values, m.grads_turned + first * p.value_width, m.grads,
                   ahead);
    const bool open = turned_open(span, p.left, p.right, first, n, at, n_keys);
    const auto run = open ? &differentiate<SOLE, true, M> : &differentiate<SOLE, false, M>;
    const bool finite = run(p, g, m, b, h, at, first, n, n_keys, row);
    if (g.query)
      turned_rows(span, p.left, p.right, first, n, at, m.grads, width, keys, query_sums + first * width, width, !SOLE, attention_block,
                  ahead);
    if (g.value) turned_key_rows(span, p.left, p.right, first, n, at, n_keys, m.weights, value_width, grads, value_sums, !fresh, ahead);
    if (g.key) turned_key_rows(span, p.left, p.right, first, n, at, n_keys, m.grads, width, queries, key_sums, !fresh, ahead);
    return open && finite;
  }

  // Products become weights, and the gradient of the weights that of the products. OPEN: every query sees every key, and of a SOLE block
  // the result says whether all that went into it was finite.
  template <bool SOLE, bool OPEN, class M>
  static bool differentiate(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t at,
                            int64_t first, int64_t n, int64_t n_keys, ScoreRow<T>& row) {
    Vec<T> zero = {};
    for (int64_t lane = 0; lane < n; lane += lanes<T>)
      zero = zero + T(0) * differentiate_lanes<SOLE, OPEN>(p, g, m, b, h, at, first, n, n_keys, lane, row);
    return hsum(zero) == T(0);
  }
  // A vector of queries; their delta.
  template <bool SOLE, bool OPEN, class M>
  S2S_INLINE Vec<T> differentiate_lanes(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h,
                                        int64_t at, int64_t first, int64_t n, int64_t n_keys, int64_t lane, ScoreRow<T>& row) {
    const AttentionSpan& span = p.spans[b];
    const int64_t i = first + lane, there = min(lanes<T>, n - lane), row_begin = p.first_row(b, h) + i;
    const Hull seen = OPEN ? Hull{0, n_keys} : turned_keys(span, p.left, p.right, i, there, at);
    T *const weights = m.weights + lane, *const slopes = m.grads + lane;
    for (int64_t j = 0; j < n_keys && !OPEN; ++j)
      if (j < seen.begin || j >= seen.end) {
        store(weights + j * attention_block, Vec<T>{});
        store(slopes + j * attention_block, Vec<T>{});
      }
    const auto of_rows = [&](const T* from)
                             __attribute__((always_inline)) { return there == lanes<T> ? load(from) : load_partial(from, there); };
    const Vec<T> hidden = broadcast(-std::numeric_limits<T>::infinity()), one = broadcast(T(1));
    const Vec<T> peak = of_rows(p.peaks + row_begin), share = of_rows(p.shares + row_begin), level = select(peak == hidden, Vec<T>{}, peak);
    Vec<T> grad_lse = {}, sums[2] = {};
    for (int64_t c = 0; g.grad_lse && c < there; ++c) grad_lse[c] = AttentionDerivative<S>::grad_of_lse(p, g, b, h, i + c);
    const auto weigh = [&](int64_t j, Vec<T>& sum) __attribute__((always_inline)) {
      T *const weight_at = weights + j * attention_block, *const slope_at = slopes + j * attention_block;
      const Vec<T> s = turned_score<T, OPEN>(span, p.left, p.right, first, n, at + j, lane, row, load(weight_at));
      Vec<T> weight = vexp_weight(s - level) * share, slope = load(slope_at);
      if constexpr (!OPEN) weight = select(s == hidden, Vec<T>{}, weight), slope = select(s == hidden, Vec<T>{}, slope);
      sum = fma(weight, slope, sum);
      store(weight_at, weight);
      if constexpr (!OPEN) store(slope_at, slope);
    };
    int64_t j = seen.begin;
    for (; j + 1 < seen.end; j += 2) weigh(j, sums[0]), weigh(j + 1, sums[1]);
    if (j < seen.end) weigh(j, sums[0]);
    // Delta of the very gradients that it is taken from is the most exact one, where no other blocks have a part in it.
    Vec<T> delta = sums[0] + sums[1] - grad_lse;
    if constexpr (!SOLE) {
      using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
      const auto bound = [](int64_t x) { return static_cast<Lane>(max(int64_t{0}, min(x, lanes<T>))); };
      const int64_t block_end = at + attention_block;
      const Lane begin = at ? bound(at + p.left - span.diagonal - i) : 0;
      const Lane end = span.keys > block_end ? bound(block_end - p.right - span.diagonal - i) : static_cast<Lane>(lanes<T>);
      const Vec<T> known = load(m.delta + i);
      delta = select(iota<Lane>() >= begin, delta + known * T(0), known);  // NaN where the result is not finite
      delta = select(iota<Lane>() < end, delta, known);
    }
    // A key that has all the weight, be it the only one that is seen, moves nothing but lse: the difference would be made of rounding
    // errors.
    const Vec<T> full = select(share == one, one, hidden), alone = delta * T(0) + grad_lse;
    for (j = seen.begin; j < seen.end; ++j) {
      T* const slope_at = slopes + j * attention_block;
      const Vec<T> weight = load(weights + j * attention_block);
      Vec<T> slope = select(weight == full, alone, weight * (load(slope_at) - delta)) * row.scale;
      if constexpr (!OPEN) {
        turned_interval(span, p.left, p.right, first, n, at + j, row);
        slope = within(row, lane, slope, Vec<T>{});  // delta may be NaN
      }
      store(slope_at, slope);
    }
    return delta;
  }
};
