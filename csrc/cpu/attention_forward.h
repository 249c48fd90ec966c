// Forward attention of one key head and the query heads that read it: for a block of queries, block after block of keys, products,
// running softmax and weighted values, a group of attention_rows queries at a time, so that a block's scores never leave the
// first-level cache. (Online softmax: Milakov and Gimelshein 2018; in blocks: Dao et al. 2022.)

template <class S>
struct AttentionForward {
  using T = compute_t<S>;
  using Tiled = TiledForward<S>;
  static constexpr int64_t queries_at_once = attention_queries;

  struct Memory {
    T *transposed, *value_copies, *query_copies, *key_copies, *out, *sums, *peaks, *scores, *factors;
    Rows<T>* values;
    uint8_t *bad_values, *spoilt;
    ScoreExtras<S> extras;
    typename Tiled::Memory tiled;
  };

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t blocks = (p.source + attention_block - 1) / attention_block;
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    Memory m;
    m.transposed = pieces.take<T>(Tiled::always_pays(p) ? 0 : blocks * attention_block * p.width);
    m.value_copies = pieces.take<T>(blocks * attention_block * value_width);
    m.query_copies = pieces.take<T>(queries_at_once * width);
    m.key_copies = pieces.take<T>(attention_block * width);
    m.out = pieces.take<T>(queries_at_once * value_width);
    m.sums = pieces.take<T>(queries_at_once * (lanes<T> + 1) + lanes<T>);
    m.peaks = pieces.take<T>(queries_at_once);
    m.scores = pieces.take<T>(attention_rows * attention_block);
    m.factors = pieces.take<T>(attention_block);
    m.values = pieces.take<Rows<T>>(blocks);
    m.bad_values = pieces.take<uint8_t>(blocks * attention_block);
    m.spoilt = pieces.take<uint8_t>(queries_at_once);
    m.extras = {pieces.take<T>(attention_block), pieces.take<uint8_t>(attention_block)};
    if (Tiled::may_pay(p)) m.tiled = Tiled::memory(p, pieces);
    return m;
  }

  static int64_t bytes(const AttentionCall<S>& p) {
    Pieces pieces{nullptr};
    memory(p, pieces);
    return pieces.used;
  }

  // Queries [query_begin, query_end) of the heads that read key head kv.
  static void run(const AttentionCall<S>& p, int64_t b, int64_t kv, int64_t query_begin, int64_t query_end, char* scratch) {
    const AttentionSpan& span = p.spans[b];
    const bool tiled = Tiled::pays(p, span);
    query_end = min(query_end, span.query_rows);
    if (query_begin >= query_end) return;
    Pieces pieces{scratch};
    const Memory m = memory(p, pieces);
    const int64_t present = min(query_end, span.queries);
    int64_t block_begin = 0, block_end = 0;
    if (query_begin < present) {
      const int64_t first = first_key(span, p.left, query_begin), end = end_key(span, p.right, present - 1);
      if (first < end) {
        block_begin = first / attention_block;
        block_end = (end + attention_block - 1) / attention_block;
      }
    }
    const S* const key = p.key + b * p.key_stride[0] + kv * p.key_stride[1] + span.key_begin * p.key_stride[2];
    for (int64_t at = block_begin * attention_block; at < min(span.keys, block_end * attention_block); at += attention_block) {
      const int64_t n = min(attention_block, span.keys - at);
      const Rows<T> keys = prepare_rows(n, p.width, key + at * p.key_stride[2], p.key_stride[2], p.key_stride[3], m.key_copies);
      if (tiled)
        Tiled::pack_keys(p, m.tiled, at / attention_block, n, keys);
      else
        transpose_rows(n, p.width, keys, m.transposed + at * p.width);
    }
    prepare_values(p, m, b, kv, block_begin, block_end, false);
    bool cleaned = false;
    const int64_t group = p.heads / p.kv_heads;
    Ahead ahead;
    if (p.key_stride[3] == 1 && p.value_stride[3] == 1 && p.query_stride[3] == 1) {
      ahead.add(p.key, p.key_stride, b, kv, p.batch, p.kv_heads, p.source, p.width);
      ahead.add(p.value, p.value_stride, b, kv, p.batch, p.kv_heads, p.source, p.value_width);
      ahead.add(p.query, p.query_stride, b, kv * group + group - 1, p.batch, p.heads, p.time, p.width);
    }
    ahead.begin(group * (present - query_begin) / (tiled ? tiled_rows : attention_rows) * (block_end - block_begin));
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (int64_t i = query_begin; i < query_end; i += queries_at_once) {
        const int64_t n = min(queries_at_once, query_end - i), some = max(int64_t{0}, min(n, present - i));
        queries(p, m, b, h, i, some, block_begin, block_end, ahead);
        const int64_t value_width = whole_vectors<T>(p.value_width);
        if (!cleaned && !all_finite(some, value_width, m.out, value_width)) {
          prepare_values(p, m, b, kv, block_begin, block_end, true);
          cleaned = true;
          queries(p, m, b, h, i, some, block_begin, block_end, ahead);
        }
        finish(p, m, b, h, i, n, some);
      }
  }

 private:
  static void prepare_values(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t kv, int64_t block_begin, int64_t block_end,
                             bool clean) {
    const AttentionSpan& span = p.spans[b];
    const S* const value = p.value + b * p.value_stride[0] + kv * p.value_stride[1] + span.key_begin * p.value_stride[2];
    for (int64_t k = block_begin; k < block_end; ++k) {
      const int64_t at = k * attention_block;
      const int64_t n = min(attention_block, span.keys - at);
      m.values[k] = prepare_rows(n, p.value_width, value + at * p.value_stride[2], p.value_stride[2], p.value_stride[3],
                                 m.value_copies + at * whole_vectors<T>(p.value_width), clean ? m.bad_values + at : nullptr);
      if (Tiled::pays(p, span)) Tiled::pack_values(p, m.tiled, k, n, m.values[k]);
    }
  }

  static void queries(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n, int64_t block_begin,
                      int64_t block_end, Ahead& ahead) {
    if (n <= 0) return;
    const S* const from = p.query + b * p.query_stride[0] + h * p.query_stride[1] + (p.spans[b].query_begin + first) * p.query_stride[2];
    const Rows<T> queries = prepare_rows(n, p.width, from, p.query_stride[2], p.query_stride[3], m.query_copies);
    std::memset(m.out, 0, static_cast<size_t>(n * whole_vectors<T>(p.value_width)) * sizeof(T));
    std::memset(m.sums, 0, static_cast<size_t>(n * lanes<T>) * sizeof(T));
    std::memset(m.spoilt, 0, static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) m.peaks[i] = -std::numeric_limits<T>::infinity();
    const bool extra = !plain<S> || p.softcap > 0 || p.bias || p.mask || p.slopes;
    const auto run = Tiled::pays(p, p.spans[b])
                         ? extra ? &Tiled::template queries<true, Memory> : &Tiled::template queries<!plain<S>, Memory>
                     : extra ? &queries_of<true>
                             : &queries_of<!plain<S>>;
    run(p, m, b, h, first, n, queries, block_begin, block_end, ahead);
  }

  template <bool EXTRA>
  static void queries_of(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n, const Rows<T>& queries,
                         int64_t block_begin, int64_t block_end, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t value_width = whole_vectors<T>(p.value_width);
    ScoreRow<T> row = score_row_of(p, b, h);
    // Where heads are this narrow, each weight's error is that of a few roundings, and a long chain of sums would be most of the result's.
    const int64_t chain = value_width == lanes<T> ? 16 : attention_block;
    for (int64_t k = block_begin; k < block_end; ++k) {
      const int64_t at = k * attention_block;
      row.valid = min(attention_block, span.keys - at);
      for (int64_t g = 0; g < n; g += attention_rows) {
        const int64_t rows = min(attention_rows, n - g);
        const Hull hull = hull_of<T>(span, p.left, p.right, first + g, first + g + rows - 1, at);
        if (hull.empty()) continue;
        ahead.step();
        attention_product<T>(rows, hull.end - hull.begin,
                             {p.width, queries.data + g * queries.row, queries.row, 1, m.transposed + at * p.width + hull.begin,
                              attention_block, m.scores + hull.begin, attention_block, false});
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t i = first + g + r;
          row.begin = max(hull.begin, first_key(span, p.left, i) - at);
          row.end = min(hull.end, end_key(span, p.right, i) - at);
          if constexpr (EXTRA) {
            row.distance = static_cast<T>(at - i - span.diagonal);
            m.extras.point(p, b, h, i, at, row);
          }
          weigh<EXTRA>(p, m, row, hull, p.first_row(b, h) + i, at, g + r, m.scores + r * attention_block, m.values[k].bad);
        }
        const int64_t end = min(hull.end, row.valid);
        for (int64_t c = hull.begin; c < end; c += chain)
          attention_product<T>(rows, value_width,
                               {min(chain, end - c), m.scores + c, attention_block, 1, m.values[k].data + c * m.values[k].row,
                                m.values[k].row, m.out + g * value_width, value_width, true});
      }
    }
  }

  // Products become scores and then weights; what was summed before is brought to the new maximum.
  template <bool EXTRA>
  S2S_INLINE void weigh(const AttentionCall<S>& p, const Memory& m, const ScoreRow<T>& row, const Hull& hull, int64_t dropout_row,
                        int64_t at, int64_t r, T* scores, bool bad_values) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Vec<T> top = broadcast(lowest), slowed;
    for (int64_t c = hull.begin; c < hull.end; c += lanes<T>) {
      const Vec<T> s = score<T, EXTRA>(row, c, load(scores + c), slowed);
      store(scores + c, s);
      top = max(s, top);  // a NaN is passed over here and comes back with the weights
    }
    if (bad_values)
      for (int64_t c = hull.begin; c < min(hull.end, row.valid); ++c)
        if (m.bad_values[at + c] && scores[c] != lowest) m.spoilt[r] = 1;
    const T before = m.peaks[r], peak = max(before, hmax(top));
    Vec<T> sum = load(m.sums + r * lanes<T>);
    if (peak > before) {
      if (before != lowest) {
        const Vec<T> factor = broadcast(vexp_fast(before - peak));
        sum = sum * factor;
        const int64_t width = whole_vectors<T>(p.value_width);
        T* const out = m.out + r * width;
        for (int64_t c = 0; c < width; c += lanes<T>) store(out + c, load(out + c) * factor);
      }
      m.peaks[r] = peak;
    }
    const T level = peak == lowest ? T(0) : peak;
    if (p.dropout) {
      dropout_factors<T>(p.seed0, p.seed1, 0, dropout_row, at + hull.begin, hull.end - hull.begin, p.threshold, static_cast<T>(p.kept),
                         m.factors + hull.begin);
      for (int64_t c = hull.begin; c < hull.end; c += lanes<T>) {
        const Vec<T> weight = vexp_weight(load(scores + c) - level);
        sum = sum + weight;
        store(scores + c, weight * load(m.factors + c));
      }
    } else {
      for (int64_t c = hull.begin; c < hull.end; c += lanes<T>) {
        const Vec<T> weight = vexp_weight(load(scores + c) - level);
        sum = sum + weight;
        store(scores + c, weight);
      }
    }
    store(m.sums + r * lanes<T>, sum);
  }

  // Sums become results; rows [present, n) are absent.
  static void finish(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n, int64_t present) {
    const int64_t value_width = whole_vectors<T>(p.value_width), row_begin = p.spans[b].query_begin + first;
    T* const lse = p.lse + p.first_row(b, h) + first;
    S* const out = p.out + b * p.out_stride[0] + h * p.out_stride[1] + row_begin * p.out_stride[2];
    T* const logarithms = m.sums + queries_at_once * lanes<T>;
    for (int64_t i = 0; i < whole_vectors<T>(n); ++i) logarithms[i] = i < present ? hsum(load(m.sums + i * lanes<T>)) : T(0);
    for (int64_t i = 0; i < n; ++i) m.sums[i] = logarithms[i];
    for (int64_t i = 0; i < n; i += lanes<T>) store(logarithms + i, vlog(load(logarithms + i)));
    for (int64_t i = 0; i < n; ++i)
      finish_row(p, m.out + i * value_width, m.sums[i], logarithms[i], i < present ? m.peaks[i] : T(0), i < present && m.spoilt[i],
                 out + i * p.out_stride[2], lse + i);
  }

 public:
  static void finish_row(const AttentionCall<S>& p, const T* sums, T total, T logarithm, T peak, bool spoilt, S* out, T* lse) {
    const bool none = total == T(0);
    *lse = none ? -std::numeric_limits<T>::infinity() : peak + logarithm;
    const T share = none ? T(0) : T(1) / total, factor = spoilt ? std::numeric_limits<T>::quiet_NaN() : share;
    if (p.peaks) p.peaks[lse - p.lse] = peak, p.shares[lse - p.lse] = share;
    write(p.value_width, sums, none, factor, out);
    if (p.wide_out) write(p.value_width, sums, none, factor, p.wide_out + (out - p.out));
  }

 private:
  template <class O>
  S2S_INLINE void write(int64_t width, const T* sums, bool none, T factor, O* out) {
    int64_t c = 0;
    for (; c + lanes<T> <= width; c += lanes<T>) store(out + c, none ? Vec<T>{} : load(sums + c) * factor);
    if (c < width) store_partial(out + c, none ? Vec<T>{} : load(sums + c) * factor, width - c);
  }
};
