// Attention pooling: softmax over t of context . tanh(W x_t + b), then the weighted sum of x.

// hidden (rows, A) = tanh(x W^T + bias), W^T packed.
template <class C>
void pool_hidden(int64_t rows, int64_t units, int64_t width, const C* x, int64_t x_row, const C* packed, const C* bias, C* hidden) {
  gemm_packed(rows, units, width, x, x_row, packed, hidden, units, false);
  for (int64_t i = 0; i < rows; ++i) {
    C* const row = hidden + i * units;
    int64_t a = 0;
    for (; a + lanes<C> <= units; a += lanes<C>) store(row + a, vtanh(load(row + a) + load(bias + a)));
    if (a < units) store_partial(row + a, vtanh(load_partial(row + a, units - a) + load_partial(bias + a, units - a)), units - a);
  }
}

template <class C>
C pool_dot(const C* a, const C* b, int64_t n) {
  Vec<C> sum{};
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_partial(a + i, n - i), load_partial(b + i, n - i), sum);
  return hsum(sum);
}

template <class C>
void pool_scores(int64_t rows, int64_t units, int64_t width, const C* x, int64_t x_row, const C* packed, const C* bias, const C* context,
                 C* hidden, C* scores) {
  pool_hidden(rows, units, width, x, x_row, packed, bias, hidden);
  for (int64_t i = 0; i < rows; ++i) scores[i] = pool_dot(hidden + i * units, context, units);
}

// Scores of one sequence become weights, and x their weighted sum: pooled (I).
template <class C>
void pool_sum(int64_t length, int64_t width, const C* x, int64_t x_row, C* scores, C* pooled, C* product) {
  C most = -std::numeric_limits<C>::infinity();
  double sum = 0;
  for (int64_t t = 0; t < length; ++t) most = scores[t] > most ? scores[t] : most;
  for (int64_t t = 0; t < length; ++t) sum += scores[t] = vexp_fast(scores[t] - most);
  const C total = static_cast<C>(sum);
  for (int64_t t = 0; t < length; ++t) scores[t] /= total;
  // Of terms of one sign, a long sum loses digits.
  constexpr int64_t stretch = 64;
  for (int64_t t = 0; t == 0 || t < length; t += stretch)
    gemm<C>(1, width, min(stretch, length - t), scores + t, length, 1, x + t * x_row, x_row, 1, pooled, width, t > 0, product);
}

// The gradients of one sequence's scores (length), from that of pooled (I, or null) and of the weights (length, or null).
template <class C>
void pool_score_gradient(int64_t length, int64_t width, const C* x, int64_t x_row, const C* weights, const C* grad_pooled,
                         const C* grad_weights, C* to, C* product) {
  if (grad_pooled) gemm<C>(1, length, width, grad_pooled, width, 1, x, 1, x_row, to, length, false, product);
  // The mean by what the weights sum up to, not by 1: positions that are alike have no gradient.
  double sum = 0, all = 0;
  for (int64_t t = 0; t < length; ++t) {
    to[t] = (grad_pooled ? to[t] : C(0)) + (grad_weights ? grad_weights[t] : C(0));
    sum += static_cast<double>(weights[t]) * static_cast<double>(to[t]), all += static_cast<double>(weights[t]);
  }
  const C mean = static_cast<C>(sum / all);
  for (int64_t t = 0; t < length; ++t) to[t] = weights[t] * (to[t] - mean);
}

// The gradients of a task's positions from those of their scores: grad_x (rows, I) is written, grad_weight (A, I), grad_bias (A) and
// grad_context (A) are added to. grad_pooled may be null.
template <class C>
void pool_gradients(int64_t rows, int64_t units, int64_t width, const C* x, int64_t x_row, const C* packed, const C* weight, const C* bias,
                    const C* context, const C* weights, const C* score_gradient, const C* grad_pooled, C* hidden, C* grad_x, C* grad_weight,
                    C* grad_bias, C* grad_context, C* product) {
  pool_hidden(rows, units, width, x, x_row, packed, bias, hidden);
  for (int64_t i = 0; i < rows; ++i) {
    C* const row = hidden + i * units;
    const Vec<C> g = broadcast(score_gradient[i]);
    for (int64_t a = 0; a < units; a += lanes<C>) {
      const int64_t left = units - a;
      const bool whole = left >= lanes<C>;
      const Vec<C> t = whole ? load(row + a) : load_partial(row + a, left), c = whole ? load(context + a) : load_partial(context + a, left);
      const Vec<C> before = g * c * fma(-t, t, broadcast(C(1)));
      if (whole) {
        store(grad_context + a, fma(g, t, load(grad_context + a)));
        store(grad_bias + a, load(grad_bias + a) + before);
        store(row + a, before);
      } else {
        store_partial(grad_context + a, fma(g, t, load_partial(grad_context + a, left)), left);
        store_partial(grad_bias + a, load_partial(grad_bias + a, left) + before, left);
        store_partial(row + a, before, left);
      }
    }
  }
  gemm<C>(units, width, rows, hidden, 1, units, x, x_row, 1, grad_weight, width, true, product);
  gemm<C>(rows, width, units, hidden, units, 1, weight, width, 1, grad_x, width, false, product);
  for (int64_t i = 0; i < rows && grad_pooled; ++i) add_scaled(weights[i], grad_pooled, grad_x + i * width, width);
}

template <class C>
struct PoolKernels {
  static constexpr auto packed_size = &packed_b_size<C>;
  static constexpr auto pack = &pack_b<C, C>;
  static constexpr auto workspace = &gemm_workspace<C>;
  static constexpr auto scores = &pool_scores<C>;
  static constexpr auto sum = &pool_sum<C>;
  static constexpr auto score_gradient = &pool_score_gradient<C>;
  static constexpr auto gradients = &pool_gradients<C>;
};
