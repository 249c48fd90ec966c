// From products of queries and keys to scores: scale, cap, bias, slope, and what hides a key from a query.

// The keys that query i sees are an interval; both its ends grow with i.
S2S_INLINE int64_t first_key(const AttentionSpan& span, int64_t left, int64_t i) { return max(int64_t{0}, i + span.diagonal - left); }
S2S_INLINE int64_t end_key(const AttentionSpan& span, int64_t right, int64_t i) { return min(span.keys, i + span.diagonal + right + 1); }

// The columns of a block that a group of rows sees, rounded to multiples of `whole`.
struct Hull {
  int64_t begin, end;
  bool empty() const { return end <= begin; }
};

template <class T>
S2S_INLINE Hull hull_of(const AttentionSpan& span, int64_t left, int64_t right, int64_t first_row, int64_t last_row, int64_t block_begin,
                        int64_t whole = lanes<T>) {
  const int64_t begin = max(int64_t{0}, first_key(span, left, first_row) - block_begin);
  const int64_t end = min(attention_block, end_key(span, right, last_row) - block_begin);
  if (end <= begin) return {0, 0};
  return {begin / whole * whole, (end + whole - 1) / whole * whole};
}

// Whether calls with nothing but a scale and intervals have code of their own: float64 and float16 are not worth it.
template <class S>
inline constexpr bool plain = std::is_same_v<S, float> || std::is_same_v<S, bfloat16>;

// One row of scores within one block of keys; columns count from the block's first key.
template <class T>
struct ScoreRow {
  int64_t begin, end;  // the columns seen, but for what mask and bias hide
  int64_t valid;       // the columns that exist
  T scale, cap, over_cap;
  const T* bias;
  const uint8_t* mask;
  T slope, distance;  // distance of the block's first key from the diagonal
  bool capped, sloped;
};

// A byte for each lane of Vec<float> and Vec<double>.
typedef uint8_t FloatBytes __attribute__((vector_size(S2S_VECTOR_BYTES / 4)));
typedef uint8_t DoubleBytes __attribute__((vector_size(S2S_VECTOR_BYTES / 8)));

template <class T>
S2S_INLINE Mask<T> load_mask(const uint8_t* from, int64_t n) {
  std::conditional_t<sizeof(T) == 4, FloatBytes, DoubleBytes> bytes = {};
  if (n >= lanes<T>)
    std::memcpy(&bytes, from, sizeof bytes);
  else
    for (int64_t i = 0; i < n; ++i) bytes[i] = from[i];
  return __builtin_convertvector(bytes, Mask<T>) != 0;
}

// The vector of columns from c on, with `other` outside of the interval that the row sees.
template <class T>
S2S_INLINE Vec<T> within(const ScoreRow<T>& row, int64_t c, Vec<T> v, Vec<T> other) {
  using Lane = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  if (row.begin <= c && row.end >= c + lanes<T>) return v;
  const Vec<Lane> column = iota<Lane>() + static_cast<Lane>(c);
  v = select(column >= static_cast<Lane>(row.begin), v, other);
  return select(column < static_cast<Lane>(row.end), v, other);
}

// The scores of one vector of columns from c on, -infinity where hidden. Without EXTRA there is only a scale and the interval.
// `slowed` becomes tanh(score / cap). SCALED: the product has been scaled.
template <class T, bool EXTRA, bool SCALED = false>
S2S_INLINE Vec<T> score(const ScoreRow<T>& row, int64_t c, Vec<T> product, Vec<T>& slowed) {
  const Vec<T> hidden = broadcast(-std::numeric_limits<T>::infinity());
  // What is not finite gives NaN, be it an infinity.
  Vec<T> s = fma(product, Vec<T>{}, product);
  if constexpr (!SCALED) s = s * row.scale;
  if constexpr (EXTRA) {
    if (row.capped) {
      slowed = vtanh(s * row.over_cap);
      s = slowed * row.cap;
    }
    const int64_t n = row.valid - c;
    if (row.bias) {
      const Vec<T> bias = n >= lanes<T> ? load(row.bias + c) : load_partial(row.bias + c, max(n, int64_t{0}));
      s = select(bias == hidden, hidden, s + bias);
    }
    if (row.sloped) s = s - row.slope * vabs(iota<T>() + (row.distance + static_cast<T>(c)));
    if (row.mask) s = select(load_mask<T>(row.mask + c, max(n, int64_t{0})), s, hidden);
  }
  return within(row, c, s, hidden);
}

template <class T, class B>
__attribute__((noinline)) void copy_bias(const B* from, int64_t stride, int64_t n, T* to) {
  for (int64_t c = 0; c < n; ++c) {
    const compute_t<B> x = to_compute(from[c * stride]);
    // The least finite number of a wider type must not become an infinity, which would hide.
    if constexpr (sizeof(compute_t<B>) > sizeof(T)) {
      const compute_t<B> least = -std::numeric_limits<T>::max();
      to[c] = static_cast<T>(x < least && x * 0 == 0 ? least : x);
    } else {
      to[c] = static_cast<T>(x);
    }
  }
}

// Points a row at its bias and mask, through buffers of attention_block elements where they can't be read in place.
template <class S>
struct ScoreExtras {
  using T = compute_t<S>;
  T* bias_buffer;
  uint8_t* mask_buffer;

  void point(const AttentionCall<S>& p, int64_t b, int64_t h, int64_t i, int64_t block_begin, ScoreRow<T>& row) const {
    if (p.bias) {
      const int64_t* const stride = p.bias_stride;
      const int64_t at = b * stride[0] + h * stride[1] + i * stride[2] + block_begin * stride[3];
      row.bias = bias_buffer;
      // The next rows' segments lie pages apart, where the hardware prefetches nothing.
      const int64_t size = p.bias_type == FloatType::float64 ? 8 : p.bias_type == FloatType::float32 ? 4 : 2;
      const char* const ahead = static_cast<const char*>(p.bias) + (at + 6 * stride[2]) * size;
      if (stride[2])
        for (int64_t line = 0; line < attention_block * size; line += 64) __builtin_prefetch(ahead + line);
      switch (p.bias_type) {
        case FloatType::float64:
          if (std::is_same_v<T, double> && stride[3] == 1)
            row.bias = reinterpret_cast<const T*>(static_cast<const double*>(p.bias) + at);
          else
            copy_bias(static_cast<const double*>(p.bias) + at, stride[3], row.valid, bias_buffer);
          break;
        case FloatType::float32:
          if (std::is_same_v<T, float> && stride[3] == 1)
            row.bias = reinterpret_cast<const T*>(static_cast<const float*>(p.bias) + at);
          else
            copy_bias(static_cast<const float*>(p.bias) + at, stride[3], row.valid, bias_buffer);
          break;
        case FloatType::bfloat16:
          copy_bias(static_cast<const bfloat16*>(p.bias) + at, stride[3], row.valid, bias_buffer);
          break;
        case FloatType::float16:
          copy_bias(static_cast<const float16*>(p.bias) + at, stride[3], row.valid, bias_buffer);
          break;
      }
    }
    if (p.mask) {
      const int64_t* const stride = p.mask_stride;
      const uint8_t* const from = p.mask + b * stride[0] + h * stride[1] + i * stride[2] + block_begin * stride[3];
      row.mask = from;
      if (stride[3] != 1) {
        for (int64_t c = 0; c < row.valid; ++c) mask_buffer[c] = from[c * stride[3]];
        row.mask = mask_buffer;
      }
    }
  }
};

// Whether a line of n numbers, `stride` apart, is `hiding` throughout; at the first that isn't, as most lines begin, the search ends.
template <class N>
bool hides_line(const N* from, int64_t stride, int64_t n, N hiding) {
  constexpr int64_t together = 32 / static_cast<int64_t>(sizeof(N));
  const auto differs = [hiding](N x) __attribute__((always_inline)) {
    if constexpr (sizeof(N) == 2)
      return x.bits != hiding.bits;
    else
      return x != hiding;
  };
  int64_t c = 0;
  for (; stride == 1 && c + together <= n; c += together) {
    int any = 0;
#pragma GCC unroll 32
    for (int64_t i = 0; i < together; ++i) any |= differs(from[c + i]);
    if (any) return false;
  }
  for (; c < n; ++c)
    if (differs(from[c * stride])) return false;
  return true;
}

// Whether a mask, or a bias of -inf, hides the n keys from j on from all of `rows` queries from i on.
template <class N>
bool hides(const N* from, const int64_t* stride, int64_t b, int64_t h, int64_t i, int64_t rows, int64_t j, int64_t n, N hiding) {
  from += b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
  for (int64_t r = 0; r < (stride[2] ? rows : 1); ++r)
    if (!hides_line(from + r * stride[2], stride[3], stride[3] ? n : 1, hiding)) return false;
  return true;
}
template <class S>
bool hides(const AttentionCall<S>& p, int64_t b, int64_t h, int64_t i, int64_t rows, int64_t j, int64_t n) {
  if (p.mask && hides(p.mask, p.mask_stride, b, h, i, rows, j, n, uint8_t{0})) return true;
  const auto of_bias = [&](auto hiding) {
    return hides(static_cast<const decltype(hiding)*>(p.bias), p.bias_stride, b, h, i, rows, j, n, hiding);
  };
  if (!p.bias) return false;
  switch (p.bias_type) {
    case FloatType::float64:
      return of_bias(-std::numeric_limits<double>::infinity());
    case FloatType::float32:
      return of_bias(-std::numeric_limits<float>::infinity());
    case FloatType::bfloat16:
      return of_bias(bfloat16{0xff80});
    case FloatType::float16:
      return of_bias(float16{0xfc00});
  }
  return false;
}

// hull_of queries, empty where a mask or bias hides all of it.
template <class S>
Hull seen_of(const AttentionCall<S>& p, int64_t b, int64_t h, int64_t first_row, int64_t last_row, int64_t block_begin,
             int64_t whole = lanes<compute_t<S>>) {
  const AttentionSpan& span = p.spans[b];
  const Hull hull = hull_of<compute_t<S>>(span, p.left, p.right, first_row, last_row, block_begin, whole);
  if (hull.empty() || !(p.mask || p.bias)) return hull;
  const int64_t begin = block_begin + hull.begin, end = min(block_begin + hull.end, span.keys);
  return hides(p, b, h, first_row, last_row - first_row + 1, begin, end - begin) ? Hull{0, 0} : hull;
}

// What all rows of one head share.
template <class S>
ScoreRow<compute_t<S>> score_row_of(const AttentionCall<S>& p, int64_t b, int64_t h) {
  using T = compute_t<S>;
  ScoreRow<T> row{};
  row.scale = static_cast<T>(p.scale);
  row.capped = p.softcap > 0;
  row.cap = static_cast<T>(p.softcap);
  row.over_cap = row.capped ? static_cast<T>(1 / p.softcap) : T(0);
  row.sloped = p.slopes != nullptr;
  if (row.sloped) row.slope = to_compute(p.slopes[b * p.slope_stride[0] + h * p.slope_stride[1]]);
  return row;
}
