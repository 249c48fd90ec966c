// From products to weights and gradients of scores, a row at a time; sums of gradients that must not be chains of floats are doubles.

// A vector as doubles.
template <class T>
struct LongVec {
  static constexpr int parts = sizeof(double) / sizeof(T);
  Vec<double> part[parts];
};
S2S_INLINE LongVec<double> lengthen(Vec<double> v) { return {{v}}; }
S2S_INLINE LongVec<float> lengthen(Vec<float> v) {
  typedef float Half __attribute__((vector_size(S2S_VECTOR_BYTES / 2)));
  struct Halves {
    Half low, high;
  };
  const Halves halves = bit_cast<Halves>(v);
  return {{__builtin_convertvector(halves.low, Vec<double>), __builtin_convertvector(halves.high, Vec<double>)}};
}

// to[i] += v[i] for each lane.
template <class T>
S2S_INLINE void add_long(double* to, LongVec<T> v) {
  for (int i = 0; i < LongVec<T>::parts; ++i) store(to + i * lanes<double>, load(to + i * lanes<double>) + v.part[i]);
}

template <class T>
S2S_INLINE void add_long_product(LongVec<T>& sum, Vec<T> a, Vec<T> b) {
  const LongVec<T> left = lengthen(a), right = lengthen(b);
  for (int i = 0; i < LongVec<T>::parts; ++i) sum.part[i] = fma(left.part[i], right.part[i], sum.part[i]);
}

template <class T>
S2S_INLINE T total_of(LongVec<T> v) {
  for (int i = 1; i < LongVec<T>::parts; ++i) v.part[0] = v.part[0] + v.part[i];
  return static_cast<T>(hsum(v.part[0]));
}

template <class S>
struct AttentionDerivative {
  using T = compute_t<S>;

  // Blocks of keys that one part has.
  static int64_t part_blocks(const AttentionCall<S>& p, int64_t parts) {
    const int64_t blocks = (p.source + attention_block - 1) / attention_block;
    return (blocks + parts - 1) / parts;
  }

  static double* slope_row(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t h, int64_t part, int64_t i) {
    return g.slope_rows + 2 * (part * p.all_rows() + p.first_row(b, h) + i);
  }
  static T grad_of_lse(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t h, int64_t i) {
    const int64_t* const stride = g.grad_lse_stride;
    return g.grad_lse ? g.grad_lse[b * stride[0] + h * stride[1] + (p.spans[b].query_begin + i) * stride[2]] : T(0);
  }

  // `rows` rows from the i'th on.
  template <bool EXTRA, bool TILED, class M>
  S2S_INLINE void differentiate_rows(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h,
                                     int64_t at, int64_t i, int64_t rows, const Hull& hull, const T* peaks, const T* shares,
                                     ScoreRow<T>& row, T* weights, T* slopes) {
    const AttentionSpan& span = p.spans[b];
    for (int64_t r = 0; r < rows; ++r) {
      row.begin = max(hull.begin, first_key(span, p.left, i + r) - at);
      row.end = min(hull.end, end_key(span, p.right, i + r) - at);
      if constexpr (EXTRA) {
        row.distance = static_cast<T>(at - i - r - span.diagonal);
        m.extras.point(p, b, h, i + r, at, row);
      }
      differentiate<EXTRA, TILED>(p, g, m, b, h, i + r, at, row, hull, peaks[i + r], shares[i + r], m.delta[i + r],
                                  weights + r * attention_block, slopes + r * attention_block);
    }
  }

  // One row: products become weights (after dropout), and the gradient of the weights that of the products.
  template <bool EXTRA, bool TILED, class M>
  S2S_INLINE void differentiate(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t i,
                                int64_t at, const ScoreRow<T>& row, const Hull& hull, T peak, T share, T delta, T* weights, T* grads) {
    for (int64_t c = 0; c < hull.begin; c += lanes<T>) store(weights + c, Vec<T>{}), store(grads + c, Vec<T>{});
    for (int64_t c = hull.end; c < row.valid; c += lanes<T>) store(weights + c, Vec<T>{}), store(grads + c, Vec<T>{});
    if (p.dropout)
      dropout_factors<T>(p.seed0, p.seed1, 0, p.first_row(b, h) + i, at + hull.begin, hull.end - hull.begin, p.threshold,
                         static_cast<T>(p.kept), m.factors + hull.begin);
    const Vec<T> hidden = broadcast(-std::numeric_limits<T>::infinity());
    const T level = peak == -std::numeric_limits<T>::infinity() ? T(0) : peak;
    // share is the largest weight too. Where few keys have most of it, gradients less delta are small differences, of which the rounding of
    // forward's result makes too much; at least if there are no other blocks, delta can be made of the very gradients it is taken from.
    const AttentionSpan& span = p.spans[b];
    if (share >= T(0.25) && first_key(span, p.left, i) >= at && end_key(span, p.right, i) <= at + attention_block)
      delta = delta * T(0) + weighted<EXTRA, TILED>(p, m, row, hull, level, share, weights, grads) - grad_of_lse(p, g, b, h, i);
    T* bias = nullptr;
    double* long_bias = nullptr;
    if constexpr (EXTRA) {
      const int64_t place = b * g.bias_stride[0] + h * g.bias_stride[1] + i * g.bias_stride[2] + at * g.bias_stride[3];
      if (g.bias && g.bias_stride[3]) bias = g.bias + place, prefetch_row(bias, g.bias_stride[2]);
      if (g.long_bias && g.bias_stride[3]) long_bias = g.long_bias + place, prefetch_row(long_bias, g.bias_stride[2]);
    }
    // A key that has all the weight, be it the only one that is seen, moves nothing but lse: the difference would be made of rounding
    // errors.
    const bool alone = share == T(1);
    const T alone_grad = alone ? delta * T(0) + grad_of_lse(p, g, b, h, i) : T(0);
    Vec<T> slope_sum = {}, grad_sum = {}, distance_sum = {};
    for (int64_t c = hull.begin; c < hull.end; c += lanes<T>) {
      Vec<T> slowed;
      const Vec<T> s = score<T, EXTRA, TILED>(row, c, load(weights + c), slowed);
      Vec<T> weight = select(s == hidden, Vec<T>{}, vexp_weight(s - level) * share), grad = load(grads + c);
      if (p.dropout) {
        const Vec<T> factor = load(m.factors + c);
        grad = grad * factor;
        store(weights + c, weight * factor);
      } else {
        store(weights + c, weight);
      }
      grad = select(s == hidden, Vec<T>{}, weight * (grad - delta));
      if (alone) grad = select(weight == T(1), broadcast(alone_grad), grad);
      if constexpr (EXTRA) {
        if (bias) {
          if (c + lanes<T> <= row.valid)
            store(bias + c, load(bias + c) + grad);
          else if (c < row.valid)
            store_partial(bias + c, load_partial(bias + c, row.valid - c) + grad, row.valid - c);
        }
        if (long_bias) {
          if (c + lanes<T> <= row.valid)
            add_long(long_bias + c, lengthen(grad));
          else
            for (int64_t lane = 0; c + lane < row.valid; ++lane) long_bias[c + lane] += static_cast<double>(grad[lane]);
        }
        if (g.slopes) {
          const Vec<T> distance = vabs(iota<T>() + (row.distance + static_cast<T>(c)));
          slope_sum = fma(-grad, distance, slope_sum);
          grad_sum = grad_sum + grad;
          distance_sum = fma(weight, distance, distance_sum);
        }
        if (row.capped) grad = select(s == hidden, Vec<T>{}, grad * (T(1) - slowed * slowed));
      }
      store(grads + c, grad * row.scale);
    }
    if (EXTRA && g.slopes) {
      add_long(m.slope_sums, lengthen(slope_sum));
      double* const sums = slope_row(p, g, b, h, at / (part_blocks(p, g.parts) * attention_block), i);
      sums[0] += static_cast<double>(hsum(grad_sum)), sums[1] += static_cast<double>(hsum(distance_sum));
    }
  }
  // Of one row, the sum of weights (after dropout) times their gradients.
  template <bool EXTRA, bool TILED, class M>
  static __attribute__((noinline)) T weighted(const AttentionCall<S>& p, const M& m, const ScoreRow<T>& row, const Hull& hull, T level,
                                              T share, const T* products, const T* grads) {
    const Vec<T> hidden = broadcast(-std::numeric_limits<T>::infinity());
    LongVec<T> sum = {};
    for (int64_t c = hull.begin; c < hull.end; c += lanes<T>) {
      Vec<T> slowed;
      const Vec<T> s = score<T, EXTRA, TILED>(row, c, load(products + c), slowed);
      const Vec<T> grad = p.dropout ? load(grads + c) * load(m.factors + c) : load(grads + c);
      add_long_product<T>(sum, vexp_weight(s - level) * share, select(s == hidden, Vec<T>{}, grad));
    }
    return total_of(sum);
  }
  template <class B>
  S2S_INLINE void prefetch_row(const B* row, int64_t stride) {
    for (int64_t c = 0; stride && c < attention_block; c += 64 / static_cast<int64_t>(sizeof(B)))
      __builtin_prefetch(row + 6 * stride + c, 1);
  }
};

// to[i] = from[i] + from[n + i] + ... of `parts` arrays, in the storage type.
template <class T, class S>
void add_up(const T* from, int64_t n, int64_t parts, int64_t begin, int64_t end, S* to) {
  int64_t i = begin;
  if constexpr (std::is_same_v<T, compute_t<S>>)
    for (; i + lanes<T> <= end; i += lanes<T>) {
      Vec<T> sum = load(from + i);
      for (int64_t part = 1; part < parts; ++part) sum = sum + load(from + part * n + i);
      store(to + i, sum);
    }
  for (; i < end; ++i) {
    T sum = from[i];
    for (int64_t part = 1; part < parts; ++part) sum += from[part * n + i];
    to[i] = from_compute<S>(static_cast<compute_t<S>>(sum));
  }
}
