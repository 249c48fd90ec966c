// Scores of additive attention: score(i, j) = sum_a w_a tanh(q_ia + k_ja).
//
// For q <= 0, with A = exp(2q) <= 1 and p = expm1(2k), exp(2(q + k)) = A p + A, so
//     tanh(q + k) = n / d,   n = A p + expm1(2q),   d = A p + (A + 1),
// and for q > 0 it is the negative of the same at -q, -k. The exponentials are per row of queries or keys; what is left per element is two
// fused multiply-adds and a reciprocal, of which two elements share one. The two terms of n stay within max(1, exp(2(q + k))), so that
// cancellation costs n at most a rounding of that, and small q and k keep their digits. p is the only factor that can overflow, so keys
// beyond a limit ("outliers") take tanh itself; with |k| <= limit the product of two denominators is finite, and no query is out of range.
// What a lane computes depends on its own key alone.

template <class C>
inline constexpr C key_limit = sizeof(C) == 4 ? C(20) : C(100);

// expm1(x) for |x| <= 2 key_limit
template <class C>
S2S_INLINE Vec<C> expm1_limited(Vec<C> x) {
  Vec<typename MathConstants<C>::Bits> rounded;
  const Vec<C> r = reduce_exponent<C>(x, rounded);
  const Vec<C> scale = power_of_two<C>(rounded);
  return fma(scale, expm1_reduced<C>(r), scale - C(1));
}

// expm1(-x) = -expm1(x) / (expm1(x) + 1) from expm1(x), x >= 0, with what the sum loses in rounding.
template <class C>
S2S_INLINE Vec<C> opposite(Vec<C> more) {
  const Vec<C> sum = more + C(1), lost = more - (sum - C(1)), inverse = reciprocal(sum), about = -more * inverse;
  return fma(fma(-lost, about, fma(-sum, about, -more)), inverse, about);
}

// One block of the table: `count` keys of which those flagged as outliers, and the lanes past the last, are as a key of 0.
// `columns` is scratch of width * key_block elements.
template <class C>
void additive_key_table(int64_t width, int64_t count, const C* key, int64_t key_row, uint8_t* outlier, C* table, C* columns) {
  for (int64_t j = 0; j < count; ++j) {
    const C* k = key + j * key_row;
    Vec<C> largest{}, invalid{};
    int64_t a = 0;
    for (; a + lanes<C> <= width; a += lanes<C>) {
      const Vec<C> v = load(k + a);
      largest = max(vabs(v), largest);
      invalid = fma(v, Vec<C>{}, invalid);  // NaN where there was a NaN, which max doesn't tell
    }
    bool out = hmax(largest) > key_limit<C> || hsum(invalid) != C(0);
    for (; a < width; ++a) out |= !(k[a] <= key_limit<C> && k[a] >= -key_limit<C>);
    outlier[j] = out;
  }
  copy_transposed(count, width, key, key_row, int64_t{1}, columns, key_block);
  for (int64_t a = 0; a < width; ++a) {
    C* column = columns + a * key_block;
    C* to = table + a * 2 * key_block;
    for (int64_t j = count; j < key_block; ++j) column[j] = C(0);
    for (int64_t j = 0; j < count; ++j) column[j] = outlier[j] ? C(0) : column[j];
    for (int64_t j = 0; j < key_block; j += lanes<C>) {
      const Vec<C> twice = load(column + j) * C(2), size = vabs(twice), more = expm1_limited<C>(size);
      const Vec<C> less = rounds_once ? opposite<C>(more) : expm1_limited<C>(-size);
      const auto negative = twice < Vec<C>{};
      store(to + j, select(negative, less, more));
      store(to + key_block + j, select(negative, more, less));
    }
  }
  if (width % 2) std::memset(table + width * 2 * key_block, 0, 2 * key_block * sizeof(C));
}

// The power of two that brings the largest weight to at most 1, so that no product with the denominators overflows; 0 where a weight
// isn't finite.
template <class C>
C weight_scale(int64_t width, const C* weight) {
  C largest = 0;
  for (int64_t a = 0; a < width; ++a) {
    const C size = weight[a] < 0 ? -weight[a] : weight[a];
    if (!(size <= std::numeric_limits<C>::max())) return C(0);
    if (size > largest) largest = size;
  }
  C scale = 1;
  while (scale < largest && scale < std::numeric_limits<C>::max() / 2) scale *= 2;
  return scale;
}

template <class C>
void prepare_queries(int64_t rows, int64_t width, const C* query, int64_t query_row, const C* weight, const QueryTable<C>& to) {
  const C divide = C(1) / to.scale;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = i * to.stride;
    for (int64_t a = 0; a < even(width); a += lanes<C>) {
      const int64_t left = width - a;
      const bool whole = left >= lanes<C>;
      const Vec<C> q = whole ? load(query + i * query_row + a) : load_partial(query + i * query_row + a, left);
      const Vec<C> w = (whole ? load(weight + a) : load_partial(weight + a, left)) * divide;
      const auto positive = q > Vec<C>{};
      const Vec<C> negative = select(positive, -q, q) * C(2);  // 2q of the mirrored query, a NaN kept
      const Vec<C> factor = vexp_fast(negative), less = expm1_limited<C>(max(broadcast(C(-2) * key_limit<C>), negative));
      const Vec<C> sign = select(positive, broadcast(C(-1)), broadcast(C(1)));
      // Past the width a row is written on into its padding, where nothing reads it.
      store(to.factor + row + a, factor);
      store(to.slope + row + a, sign * factor);
      store(to.offset + row + a, sign * less);
      store(to.weighted_slope + row + a, w * (sign * factor));
      store(to.weighted_offset + row + a, w * (sign * less));
      if constexpr (sizeof(C) == sizeof(int32_t)) {
        const Mask<C> side = positive & static_cast<int32_t>(key_block);
        std::memcpy(to.side + row + a, &side, sizeof side);
      } else {
        for (int64_t v = 0; v < lanes<C>; ++v) to.side[row + a + v] = q[v] > C(0) ? static_cast<int32_t>(key_block) : 0;
      }
    }
  }
}

// scores[v] += sum over units [0, units) (an even number) for V vectors of keys.
template <class C, int V>
S2S_INLINE void score_vectors(int64_t units, const C* table, const QueryTable<C>& q, int64_t at, C* scores) {
  Vec<C> sum[V] = {};
  for (int64_t a = 0; a < units; a += 2) {
    const C* const left = table + a * 2 * key_block + q.side[at + a];
    const C* const right = table + (a + 1) * 2 * key_block + q.side[at + a + 1];
    const Vec<C> factor0 = broadcast(q.factor[at + a]), factor1 = broadcast(q.factor[at + a + 1]);
    const Vec<C> more0 = broadcast(q.factor[at + a] + C(1)), more1 = broadcast(q.factor[at + a + 1] + C(1));
    const Vec<C> slope0 = broadcast(q.weighted_slope[at + a]), slope1 = broadcast(q.weighted_slope[at + a + 1]);
    const Vec<C> offset0 = broadcast(q.weighted_offset[at + a]), offset1 = broadcast(q.weighted_offset[at + a + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<C> p0 = load(left + v * lanes<C>), p1 = load(right + v * lanes<C>);
      const Vec<C> d0 = fma(factor0, p0, more0), d1 = fma(factor1, p1, more1);
      const Vec<C> n0 = fma(slope0, p0, offset0), n1 = fma(slope1, p1, offset1);
      sum[v] = fma(fma(n0, d1, n1 * d0), reciprocal(d0 * d1), sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(scores + v * lanes<C>, load(scores + v * lanes<C>) + sum[v]);
}

// Scores of a tile of rows against one block of the table, divided by q.scale; rows of `scores` and `sums`, which is scratch, hold whole
// vectors.
template <class C>
void score_block(int64_t rows, int64_t width, int64_t count, const C* table, const QueryTable<C>& q, C* scores, C* sums,
                 int64_t scores_row) {
  // Units whose part of the table stays in the first-level cache for all rows. Those are summed up before they are added to the sum of so
  // many, and that to the whole: one long sum loses digits, and each addition to a large one does.
  constexpr int64_t stretch = 16, span = 8 * stretch;
  const int64_t whole = (count + lanes<C> - 1) / lanes<C> * lanes<C>, all = even(width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < whole; j += lanes<C>) store(scores + i * scores_row + j, Vec<C>{});
  for (int64_t a = 0; a < all; a += stretch) {
    const int64_t units = min(stretch, all - a);
    C* const into = a < span ? scores : sums;
    for (int64_t i = 0; i < rows; ++i) {
      C* const row = into + i * scores_row;
      for (int64_t j = 0; j < whole && a && a % span == 0; j += lanes<C>) store(row + j, Vec<C>{});
      const C* const part = table + a * 2 * key_block;
      int64_t j = 0;
      for (; j + 4 * lanes<C> <= whole; j += 4 * lanes<C>) score_vectors<C, 4>(units, part + j, q, i * q.stride + a, row + j);
      switch ((whole - j) / lanes<C>) {
        case 3:
          score_vectors<C, 3>(units, part + j, q, i * q.stride + a, row + j);
          break;
        case 2:
          score_vectors<C, 2>(units, part + j, q, i * q.stride + a, row + j);
          break;
        case 1:
          score_vectors<C, 1>(units, part + j, q, i * q.stride + a, row + j);
      }
      const bool last = a + stretch >= all || (a + stretch) % span == 0;
      C* const total = scores + i * scores_row;
      for (j = 0; j < whole && last && into == sums; j += lanes<C>) store(total + j, load(total + j) + load(row + j));
    }
  }
}

// The score of one pair by tanh itself.
template <class C>
C score_exactly(int64_t width, const C* query, const C* key, const C* weight) {
  Vec<C> sum{};
  int64_t a = 0;
  for (; a + lanes<C> <= width; a += lanes<C>) sum = fma(load(weight + a), vtanh(load(query + a) + load(key + a)), sum);
  if (a < width) {
    const int64_t left = width - a;
    sum = fma(load_partial(weight + a, left), vtanh(load_partial(query + a, left) + load_partial(key + a, left)), sum);
  }
  return hsum(sum);
}
