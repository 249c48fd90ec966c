// Softmax over the scores of a tile of rows, dropout, and the context.

template <class C>
S2S_INLINE bool visible(const AdditiveAttention<C>& p, int64_t b, int64_t i, int64_t j) {
  return !p.mask || p.mask[b * p.mask_batch + i * p.mask_row + j * p.mask_key];
}

// The scores of rows [begin, begin + rows) of batch entry b against its present keys.
template <class C>
void additive_scores(const AdditiveAttention<C>& p, int64_t b, int64_t begin, int64_t rows, const AdditiveScratch<C>& s) {
  const int64_t length = p.length(b);
  if (p.table) prepare_queries(rows, p.width, p.query.at(b, begin), p.query.row, p.weight, s.queries);
  for (int64_t at = 0; at * key_block < length; ++at) {
    const int64_t first = at * key_block, count = min(key_block, length - first);
    if (p.table) {
      score_block(rows, p.width, count, p.block(b, at), s.queries, s.scores + first, s.gradient + first, s.scores_row);
      for (int64_t i = 0; i < rows && s.queries.scale != C(1); ++i)
        for (int64_t j = first; j < first + count; ++j) s.scores[i * s.scores_row + j] *= s.queries.scale;
    }
    for (int64_t j = first; j < first + count; ++j) {
      if (p.table && !p.outlier[b * p.outlier_batch + j]) continue;
      for (int64_t i = 0; i < rows; ++i)
        s.scores[i * s.scores_row + j] = score_exactly(p.width, p.query.at(b, begin + i), p.key.at(b, j), p.weight);
    }
  }
}

template <class C>
void hide(const AdditiveAttention<C>& p, int64_t b, int64_t i, C* row, int64_t n, C with) {
  for (int64_t j = 0; p.mask && j < n; ++j) row[j] = visible(p, b, i, j) ? row[j] : with;
}

// n scores become their exponentials less `most`, hidden ones 0; returns the sum.
template <class C>
C exponentials(const AdditiveAttention<C>& p, int64_t b, int64_t i, C* row, int64_t n, C most) {
  Vec<C> sum{};
  int64_t j = 0;
  hide(p, b, i, row, n, most);  // they may be NaN
  for (; j + lanes<C> <= n; j += lanes<C>) store(row + j, vexp_fast(load(row + j) - most));
  for (; j < n; ++j) row[j] = vexp_fast(row[j] - most);
  hide(p, b, i, row, n, C(0));
  for (j = 0; j + lanes<C> <= n; j += lanes<C>) sum = sum + load(row + j);
  C total = hsum(sum);
  for (; j < n; ++j) total += row[j];
  return total;
}

template <class C>
void scale_row(C* row, int64_t n, C by) {
  int64_t j = 0;
  for (; j + lanes<C> <= n; j += lanes<C>) store(row + j, load(row + j) * by);
  for (; j < n; ++j) row[j] *= by;
}

// Row i's scores become weights. statistics: the largest visible score and the sum of exponentials; 0 and 0 where nothing is visible.
template <class C>
void softmax_row(const AdditiveAttention<C>& p, int64_t b, int64_t i, C* row, C* statistics) {
  const int64_t n = p.length(b);
  C most = -std::numeric_limits<C>::infinity();
  int64_t count = p.mask ? 0 : n, j = 0;
  if (p.mask) {
    for (; j < n; ++j)
      if (visible(p, b, i, j)) {
        ++count;
        most = row[j] > most ? row[j] : most;
      }
  } else {
    Vec<C> largest = broadcast(most);
    for (; j + lanes<C> <= n; j += lanes<C>) largest = max(load(row + j), largest);
    most = hmax(largest);
    for (; j < n; ++j) most = row[j] > most ? row[j] : most;
  }
  C sum = 0;
  if (count) {
    sum = exponentials(p, b, i, row, n, most);
    scale_row(row, n, C(1) / sum);
    hide(p, b, i, row, n, C(0));  // again: a sum may be NaN
  } else {
    for (j = 0; j < n; ++j) row[j] = C(0);
    most = C(0);
  }
  if (statistics) statistics[0] = most, statistics[1] = sum;
}

// Weights become what is left of them after dropout.
template <class C>
void drop_row(const AdditiveAttention<C>& p, int64_t b, int64_t i, C* row, int64_t n, C* factors) {
  dropout_factors<C>(p.seed[0], p.seed[1], 0, b * p.rows + i, 0, n, p.threshold, p.keep_scale, factors);
  for (int64_t j = 0; j < n; ++j) row[j] = factors[j] == C(0) ? C(0) : row[j] * factors[j];
}

template <class C>
bool any_flag(const uint8_t* flags, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (flags[i]) return true;
  return false;
}

// Contexts (rows, Dv) of rows [begin, begin + rows) into s.rows; their statistics (rows, 2) where wanted. If `weights` is given it gets
// the weights before dropout, rows of scores_row elements.
template <class C>
void additive_context(const AdditiveAttention<C>& p, int64_t b, int64_t begin, int64_t rows, const AdditiveScratch<C>& s, C* statistics,
                      C* weights) {
  const int64_t n = p.length(b);
  additive_scores(p, b, begin, rows, s);
  for (int64_t i = 0; i < rows; ++i) {
    C* const row = s.scores + i * s.scores_row;
    softmax_row(p, b, begin + i, row, statistics ? statistics + 2 * i : nullptr);
    if (weights) std::memcpy(weights + i * s.scores_row, row, static_cast<size_t>(n) * sizeof(C));
    if (p.dropout) drop_row(p, b, begin + i, row, n, s.factors);
  }
  if (!p.hidden_value || !any_flag<C>(p.hidden_value + b * p.keys, n)) {
    gemm<C>(rows, p.values, n, s.scores, s.scores_row, 1, p.value.at(b, 0), p.value.row, 1, s.rows, p.values, false, s.product);
    return;
  }
  // A product would carry a NaN into the rows that the value is hidden from: 0 times NaN is NaN.
  for (int64_t i = 0; i < rows; ++i) {
    C* const to = s.rows + i * p.values;
    for (int64_t v = 0; v < p.values; ++v) to[v] = C(0);
    for (int64_t j = 0; j < n; ++j)
      if (visible(p, b, begin + i, j)) add_scaled(s.scores[i * s.scores_row + j], p.value.at(b, j), to, p.values);
  }
}

// Whether each of n rows holds anything that isn't finite.
template <class C>
void flag_rows(const C* from, int64_t row, int64_t n, int64_t width, uint8_t* flags) {
  for (int64_t i = 0; i < n; ++i) {
    Vec<C> part{};
    int64_t v = 0;
    for (; v + lanes<C> <= width; v += lanes<C>) part = fma(load(from + i * row + v), Vec<C>{}, part);
    C sum = hsum(part);
    for (; v < width; ++v) sum += from[i * row + v] * C(0);
    flags[i] = sum != C(0);
  }
}
