// Gradients of additive attention. With g the gradient of a score and t = tanh(q + k), recomputed as forward did: key and query get
// w g (1 - t^2), the weight g t.

// One unit a, V vectors of keys, all rows of a tile: key[v] += sum_i g (1 - t^2), query[i] += sum_v of the same, weight += sum g t.
template <class C, int V>
S2S_INLINE void gradient_vectors(int64_t rows, const C* table, const QueryTable<C>& q, int64_t at, const C* gradient, int64_t gradient_row,
                                 C* key, Vec<C>* query, Vec<C>& weight) {
  Vec<C> to_key[V], to_weight{};
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) to_key[v] = load(key + v * lanes<C>);
  for (int64_t i = 0; i < rows; ++i, at += q.stride) {
    const C* const column = table + q.side[at];
    const C* const line = gradient + i * gradient_row;
    const Vec<C> factor = broadcast(q.factor[at]), more = broadcast(q.factor[at] + C(1));
    const Vec<C> slope = broadcast(q.slope[at]), offset = broadcast(q.offset[at]);
    Vec<C> n[V], u[V], to_query = query[i];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<C> p = load(column + v * lanes<C>);
      u[v] = reciprocal(fma(factor, p, more));  // two that shared a division would have one key touch the other's bits
      n[v] = fma(slope, p, offset);
    }
    Vec<C> of_row{};  // short sums first: a long one loses digits
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<C> g = load(line + v * lanes<C>), t = n[v] * u[v], slack = fma(-t, t, broadcast(C(1)));
      to_key[v] = fma(g, slack, to_key[v]);
      to_query = fma(g, slack, to_query);
      of_row = fma(g, t, of_row);
    }
    to_weight = to_weight + of_row;
    query[i] = to_query;
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(key + v * lanes<C>, to_key[v]);
  weight = weight + to_weight;
}

// A tile of rows against one block of the table. grad_key (A, key_block), grad_query (rows, A) and grad_weight (A) are added to; the first
// two still lack the weight.
template <class C>
void gradient_block(int64_t rows, int64_t width, int64_t count, const C* table, const QueryTable<C>& q, const C* gradient,
                    int64_t gradient_row, C* grad_key, C* grad_query, C* grad_weight) {
  Vec<C> query[query_rows];
  for (int64_t a = 0; a < width; ++a) {
    const C* const column = table + a * 2 * key_block;
    C* const key = grad_key + a * key_block;
    Vec<C> weight{};
    for (int64_t i = 0; i < rows; ++i) query[i] = Vec<C>{};
    int64_t j = 0;
    for (; j + 4 * lanes<C> <= count; j += 4 * lanes<C>)
      gradient_vectors<C, 4>(rows, column + j, q, a, gradient + j, gradient_row, key + j, query, weight);
    for (; j < count; j += lanes<C>) gradient_vectors<C, 1>(rows, column + j, q, a, gradient + j, gradient_row, key + j, query, weight);
    for (int64_t i = 0; i < rows; ++i) grad_query[i * width + a] += hsum(query[i]);
    grad_weight[a] += hsum(weight);
  }
}

// One pair by tanh itself: query, key and weight (A) each.
template <class C>
void gradient_exactly(int64_t width, const C* query, const C* key, C gradient, C* grad_query, C* grad_key, C* grad_weight) {
  for (int64_t a = 0; a < width; a += lanes<C>) {
    const int64_t left = width - a;
    const Vec<C> g = broadcast(gradient);
    if (left >= lanes<C>) {
      const Vec<C> t = vtanh(load(query + a) + load(key + a)), slack = fma(-t, t, broadcast(C(1)));
      store(grad_query + a, fma(g, slack, load(grad_query + a)));
      store(grad_key + a, fma(g, slack, load(grad_key + a)));
      store(grad_weight + a, fma(g, t, load(grad_weight + a)));
    } else {
      const Vec<C> t = vtanh(load_partial(query + a, left) + load_partial(key + a, left)), slack = fma(-t, t, broadcast(C(1)));
      store_partial(grad_query + a, fma(g, slack, load_partial(grad_query + a, left)), left);
      store_partial(grad_key + a, fma(g, slack, load_partial(grad_key + a, left)), left);
      store_partial(grad_weight + a, fma(g, t, load_partial(grad_weight + a, left)), left);
    }
  }
}

// Weights again from the scores of row i and what forward saved.
template <class C>
void weights_again(const AdditiveAttention<C>& p, int64_t b, int64_t i, C* row, const C* statistics) {
  const int64_t n = p.length(b);
  if (statistics[1] == C(0)) {
    for (int64_t j = 0; j < n; ++j) row[j] = C(0);
    return;
  }
  exponentials(p, b, i, row, n, statistics[0]);
  scale_row(row, n, C(1) / statistics[1]);
  hide(p, b, i, row, n, C(0));
}

// The gradients of row i's scores into `gradient` (in: those of the weights that come from the context, 0 if none), and its weights after
// dropout into `row` (in: before).
template <class C>
void softmax_gradient(const AdditiveAttention<C>& p, const AdditiveAttentionGradient<C>& g, int64_t b, int64_t i, C* row, C* gradient,
                      C* factors) {
  const int64_t n = p.length(b);
  if (p.dropout) {
    dropout_factors<C>(p.seed[0], p.seed[1], 0, b * p.rows + i, 0, n, p.threshold, p.keep_scale, factors);
    for (int64_t j = 0; j < n; ++j) gradient[j] = factors[j] == C(0) ? C(0) : gradient[j] * factors[j];
  }
  if (g.grad_weights.data) {
    const C* more = g.grad_weights.at(b, i);
    for (int64_t j = 0; j < n; ++j) gradient[j] += more[j];
  }
  hide(p, b, i, gradient, n, C(0));
  Vec<C> sum{};
  int64_t j = 0;
  for (; j + lanes<C> <= n; j += lanes<C>) sum = fma(load(row + j), load(gradient + j), sum);
  C mean = hsum(sum);
  for (; j < n; ++j) mean = fma(row[j], gradient[j], mean);
  for (j = 0; j + lanes<C> <= n; j += lanes<C>) store(gradient + j, load(row + j) * (load(gradient + j) - mean));
  for (; j < n; ++j) gradient[j] = row[j] * (gradient[j] - mean);
  hide(p, b, i, gradient, n, C(0));
  if (p.dropout)
    for (j = 0; j < n; ++j) row[j] = factors[j] == C(0) ? C(0) : row[j] * factors[j];
}

// `score_gradients` where there is no table: grad_key (S, A).
template <class C>
void score_gradients_exactly(const AdditiveAttention<C>& p, int64_t b, int64_t begin, int64_t rows, const AdditiveScratch<C>& s,
                             C* grad_query, C* grad_key, C* grad_weight) {
  constexpr int64_t stretch = 32;  // short sums first: a long one loses digits
  C* const to_weight = s.line;
  const int64_t n = p.length(b);
  for (int64_t first = 0; first < n; first += stretch) {
    for (int64_t a = 0; a < p.width; ++a) to_weight[a] = C(0);
    for (int64_t j = first; j < min(n, first + stretch); ++j)
      for (int64_t i = 0; i < rows; ++i)
        if (visible(p, b, begin + i, j))
          gradient_exactly(p.width, p.query.at(b, begin + i), p.key.at(b, j), s.gradient[i * s.scores_row + j], grad_query + i * p.width,
                           grad_key + j * p.width, to_weight);
    for (int64_t a = 0; a < p.width; ++a) grad_weight[a] += to_weight[a];
  }
}

// The gradients of query, key and weight of a tile, from those of its scores in s.gradient, which is used up. grad_key (blocks, A,
// key_block).
template <class C>
void score_gradients(const AdditiveAttention<C>& p, int64_t b, int64_t begin, int64_t rows, const AdditiveScratch<C>& s, C* grad_query,
                     C* grad_key, C* grad_weight) {
  if (!p.table) return score_gradients_exactly(p, b, begin, rows, s, grad_query, grad_key, grad_weight);
  const int64_t n = p.length(b);
  // A row with a NaN would spoil the keys that are hidden from it too: 0 times NaN is NaN. Where a mask can hide any it takes its visible
  // keys one by one.
  uint8_t apart[query_rows] = {};
  bool any = false;
  if (p.mask) {
    flag_rows(p.query.at(b, begin), p.query.row, rows, p.width, apart);
    for (int64_t i = 0; i < rows; ++i) any |= apart[i] != 0;
  }
  C *const to_weight = s.line + p.width, *const of_block = to_weight + p.width;  // short sums first: a long one loses digits
  for (int64_t at = 0; at * key_block < n; ++at) {
    bool used = false;
    for (int64_t j = at * key_block; j < min(n, (at + 1) * key_block); ++j) {
      const bool outlier = p.outlier[b * p.outlier_batch + j];
      if (!outlier && !any) continue;
      for (int64_t a = 0; a < (used ? 2 : 3) * p.width; ++a) s.line[a] = C(0);
      used = true;
      for (int64_t i = 0; i < rows; ++i) {
        if (!(outlier || apart[i]) || !visible(p, b, begin + i, j)) continue;
        gradient_exactly(p.width, p.query.at(b, begin + i), p.key.at(b, j), s.gradient[i * s.scores_row + j], grad_query + i * p.width,
                         s.line, to_weight);
        s.gradient[i * s.scores_row + j] = C(0);
      }
      C* const column = grad_key + at * p.width * key_block + j % key_block;
      for (int64_t a = 0; a < p.width; ++a) {
        column[a * key_block] += s.line[a];
        of_block[a] += to_weight[a];
      }
    }
    for (int64_t a = 0; used && a < p.width; ++a) grad_weight[a] += of_block[a];
  }
  for (int64_t i = 0; i < rows && any; ++i) {
    if (!apart[i]) continue;
    QueryTable<C> none = s.queries;
    const int64_t at = i * s.queries.stride;
    for (int64_t a = 0; a < p.width; ++a) none.factor[at + a] = none.slope[at + a] = none.offset[at + a] = C(0), none.side[at + a] = 0;
    for (int64_t j = 0; j < n; ++j) s.gradient[i * s.scores_row + j] = C(0);
  }
  for (int64_t i = 0; i < rows; ++i)  // lanes past the last key
    for (int64_t j = n; j < s.scores_row; ++j) s.gradient[i * s.scores_row + j] = C(0);
  for (int64_t at = 0; at * key_block < n; ++at)
    gradient_block(rows, p.width, min(key_block, n - at * key_block), p.block(b, at), s.queries, s.gradient + at * key_block, s.scores_row,
                   grad_key + at * p.width * key_block, grad_query, grad_weight);
}

// Rows [begin, begin + rows) of batch entry b. grad_query (rows, A) is written, grad_key, grad_value (S, Dv) and grad_weight are added to.
template <class C>
void additive_gradients(const AdditiveAttention<C>& p, const AdditiveAttentionGradient<C>& g, int64_t b, int64_t begin, int64_t rows,
                        const AdditiveScratch<C>& s, C* grad_query, C* grad_key, C* grad_value, C* grad_weight) {
  const int64_t n = p.length(b);
  additive_scores(p, b, begin, rows, s);
  if (g.grad_context.data && g.need_scores)
    gemm<C>(rows, n, p.values, g.grad_context.at(b, begin), g.grad_context.row, 1, p.value.at(b, 0), 1, p.value.row, s.gradient,
            s.scores_row, false, s.product);
  else
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < n; ++j) s.gradient[i * s.scores_row + j] = C(0);
  for (int64_t i = 0; i < rows; ++i) {
    C* const row = s.scores + i * s.scores_row;
    weights_again(p, b, begin + i, row, g.statistics + 2 * (b * p.rows + begin + i));
    softmax_gradient(p, g, b, begin + i, row, s.gradient + i * s.scores_row, s.factors);
  }
  if (g.grad_context.data && g.need_value) {
    if (!g.hidden_gradient || !any_flag<C>(g.hidden_gradient + b * p.rows + begin, rows)) {
      gemm<C>(n, p.values, rows, s.scores, 1, s.scores_row, g.grad_context.at(b, begin), g.grad_context.row, 1, grad_value, p.values, true,
              s.product);
    } else {
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; ++j)
          if (visible(p, b, begin + i, j))
            add_scaled(s.scores[i * s.scores_row + j], g.grad_context.at(b, begin + i), grad_value + j * p.values, p.values);
    }
  }
  if (!g.need_scores) return;
  for (int64_t k = 0; k < rows * p.width; ++k) grad_query[k] = C(0);
  score_gradients(p, b, begin, rows, s, grad_query, grad_key, grad_weight);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t a = 0; a < p.width; ++a) grad_query[i * p.width + a] *= p.weight[a];
}

// The gradient of `count` keys, to (count, A), from `parts` partial sums, part_size apart, added in order, that still lack the weight:
// (A, key_block) where there is a table, else (count, A). The first part is used up.
template <class C>
void finish_key_gradient(bool table, int64_t width, int64_t count, C* partial, int64_t parts, int64_t part_size, const C* weight, C* to) {
  const int64_t lines = table ? width : count, line = table ? count : width, stride = table ? key_block : width;
  for (int64_t i = 0; i < lines; ++i) {
    C* const sum = partial + i * stride;
    for (int64_t k = 1; k < parts; ++k) {
      const C* const more = sum + k * part_size;
      for (int64_t j = 0; j < line; ++j) sum[j] += more[j];
    }
    C* const result = table ? sum : to + i * width;
    for (int64_t j = 0; j < line; ++j) result[j] = sum[j] * weight[table ? i : j];
  }
  if (table) copy_transposed(width, count, partial, key_block, int64_t{1}, to, width);
}
