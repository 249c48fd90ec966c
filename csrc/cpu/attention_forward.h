// Forward attention of one key head and the query heads that read it: for a block of queries, block after block of keys, products,
// running softmax and weighted values, a group of attention_rows queries at a time, so that a block's scores never leave the
// first-level cache. (Online softmax: Milakov and Gimelshein 2018; in blocks: Dao et al. 2022.)

template <class S>
struct AttentionForward {
  using T = compute_t<S>;
  using Tiled = TiledForward<S>;
  static constexpr int64_t queries_at_once = attention_queries;

  struct Memory {
    T *transposed, *value_copies, *query_copies, *key_copies, *out, *sums, *totals, *divisors, *peaks, *scores, *factors;
    Rows<T>*keys, *values;
    uint8_t *bad_values, *spoilt;
    ScoreExtras<S> extras;
    typename Tiled::Memory tiled;
  };

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t blocks = (p.source + attention_block - 1) / attention_block;
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    Memory m;
    // Of all keys, or of one block of queries.
    m.transposed = pieces.take<T>(Tiled::always_pays(p) ? 0 : max(blocks, int64_t{1}) * attention_block * p.width);
    m.value_copies = pieces.take<T>(blocks * attention_block * value_width);
    m.query_copies = pieces.take<T>(queries_at_once * width);
    m.key_copies = pieces.take<T>((may_turn(p) || may_be_few(p) ? blocks : 1) * attention_block * width);
    m.out = pieces.take<T>(queries_at_once * value_width);
    m.sums = pieces.take<T>(queries_at_once * lanes<T>);
    m.totals = pieces.take<T>(queries_at_once);
    m.divisors = pieces.take<T>(queries_at_once);
    m.peaks = pieces.take<T>(queries_at_once);
    m.scores = pieces.take<T>((may_turn(p) ? attention_block : attention_rows) * attention_block);
    m.factors = pieces.take<T>(attention_block);
    m.keys = pieces.take<Rows<T>>(blocks);
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

  // Whether scores are made turned: there is little to a score, and lanes of queries are no emptier than those of keys.
  static bool may_turn(const AttentionCall<S>& p) {
    return plain<S> && !(p.softcap > 0 || p.bias || p.mask || p.slopes || p.dropout) && !Tiled::always_pays(p);
  }
  static bool turned(const AttentionCall<S>& p, const AttentionSpan& span) {
    return may_turn(p) && !Tiled::pays(p, span) && !few(p, span) && span.queries > few_queries &&
           whole_vectors<T>(span.queries) * span.keys <= (span.queries + lanes<T> / 4) * whole_vectors<T>(span.keys);
  }

  // Whether keys are multiplied as they lie in memory.
  static bool may_be_few(const AttentionCall<S>& p) { return are_few(p, p.least_time, p.least_source); }
  static bool few(const AttentionCall<S>& p, const AttentionSpan& span) {
    return are_few(p, span.queries, span.keys) && !Tiled::pays(p, span);
  }
  // So few that turning keys and values around for them costs more than their products, or so few of both, of wide heads, that turning
  // either does.
  static bool are_few(const AttentionCall<S>& p, int64_t queries, int64_t keys) {
    return (queries <= few_queries && min(p.width, p.value_width) > lanes<T>) ||
           (2 * queries <= lanes<T> && keys < lanes<T> && p.width >= (queries - 1) * lanes<T>);
  }

  // Queries [query_begin, query_end) of the heads that read key head kv.
  static void run(const AttentionCall<S>& p, int64_t b, int64_t kv, int64_t query_begin, int64_t query_end, char* scratch) {
    const AttentionSpan& span = p.spans[b];
    const bool tiled = Tiled::pays(p, span), turned = AttentionForward::turned(p, span);
    const bool as_they_are = turned || few(p, span);
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
      if (tiled) {
        Tiled::pack_keys(p, m, at / attention_block, n, key + at * p.key_stride[2]);
        continue;
      }
      const Rows<T> keys = prepare_rows(n, p.width, key + at * p.key_stride[2], p.key_stride[2], p.key_stride[3],
                                        m.key_copies + (as_they_are ? at * whole_vectors<T>(p.width) : 0));
      m.keys[at / attention_block] = keys;
      if (!as_they_are) transpose_rows(n, p.width, keys, m.transposed + at * p.width);
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
    const int64_t rows = present - query_begin, blocks = block_end - block_begin;
    const bool only = span.keys <= attention_block && blocks == 1;  // and not just for these queries: threads deal them differently
    if ((turned || tiled) && only) {
      ahead.add(p.out, p.out_stride, b, kv * group + group - 1, p.batch, p.heads, p.time, p.value_width, true);
      if (p.wide_out) ahead.add(p.wide_out, p.out_stride, b, kv * group + group - 1, p.batch, p.heads, p.time, p.value_width, true);
    }
    const int64_t keys = min(span.keys, blocks * attention_block);
    ahead.begin(group * (turned ? turned_steps<T>(keys, rows, p.width) + turned_steps<T>(rows, p.value_width, keys)
                                : (tiled ? Tiled::steps(rows) : rows / attention_rows) * blocks));
    const int64_t value_width = whole_vectors<T>(p.value_width);
    for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
      for (int64_t i = query_begin; i < query_end; i += queries_at_once) {
        const int64_t n = min(queries_at_once, query_end - i), some = max(int64_t{0}, min(n, present - i));
        if constexpr (std::is_same_v<S, T>) {
          // Weights of the only block can be divided by their sum before they meet values, and results be made where they are wanted.
          if (turned && only && value_width == p.value_width && !p.wide_out && !cleaned) {
            S* const out = p.out + b * p.out_stride[0] + h * p.out_stride[1] + (span.query_begin + i) * p.out_stride[2];
            turned_queries<true>(p, m, b, h, i, some, block_begin, block_end, out, p.out_stride[2], ahead);
            if (all_finite(some, value_width, out, p.out_stride[2])) {
              finish<true>(p, m, b, h, i, n, some);
              continue;
            }
          }
        }
        queries(p, m, b, h, i, some, block_begin, block_end, ahead);
        if (!cleaned && !all_finite(some, value_width, m.out, value_width)) {
          prepare_values(p, m, b, kv, block_begin, block_end, true);
          cleaned = true;
          queries(p, m, b, h, i, some, block_begin, block_end, ahead);
        }
        finish<false>(p, m, b, h, i, n, some);
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
      if (Tiled::pays(p, span))
        Tiled::pack_values(p, m, k, n, value + at * p.value_stride[2], clean);
      else
        m.values[k] = prepare_rows(n, p.value_width, value + at * p.value_stride[2], p.value_stride[2], p.value_stride[3],
                                   m.value_copies + at * whole_vectors<T>(p.value_width), clean ? m.bad_values + at : nullptr);
    }
  }

  static const S* query_at(const AttentionCall<S>& p, int64_t b, int64_t h, int64_t i) {
    return p.query + b * p.query_stride[0] + h * p.query_stride[1] + (p.spans[b].query_begin + i) * p.query_stride[2];
  }
  static Rows<T> query_rows(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n) {
    return prepare_rows(n, p.width, query_at(p, b, h, first), p.query_stride[2], p.query_stride[3], m.query_copies);
  }

  static void queries(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n, int64_t block_begin,
                      int64_t block_end, Ahead& ahead) {
    if (n <= 0) return;
    const int64_t value_width = whole_vectors<T>(p.value_width);
    std::memset(m.out, 0, static_cast<size_t>(n * value_width) * sizeof(T));
    std::memset(m.spoilt, 0, static_cast<size_t>(n));
    if constexpr (plain<S>) {
      if (turned(p, p.spans[b])) return turned_queries<false>(p, m, b, h, first, n, block_begin, block_end, m.out, value_width, ahead);
    }
    std::memset(m.sums, 0, static_cast<size_t>(n * lanes<T>) * sizeof(T));
    for (int64_t i = 0; i < n; ++i) m.peaks[i] = -std::numeric_limits<T>::infinity();
    const bool extra = !plain<S> || p.softcap > 0 || p.bias || p.mask || p.slopes;
    if (Tiled::pays(p, p.spans[b])) {
      const auto run = extra ? &Tiled::template queries<true, Memory> : &Tiled::template queries<!plain<S>, Memory>;
      run(p, m, b, h, first, n, query_at(p, b, h, first), block_begin, block_end, ahead);
    } else {
      const auto run = extra ? &queries_of<true> : &queries_of<!plain<S>>;
      run(p, m, b, h, first, n, query_rows(p, m, b, h, first, n), block_begin, block_end, ahead);
    }
    for (int64_t i = 0; i < n; ++i) m.totals[i] = hsum(load(m.sums + i * lanes<T>));
    if (Tiled::pays(p, p.spans[b]))
      for (int64_t i = 0; i < n; ++i) m.divisors[i] = Tiled::divisor(p, m, i, m.totals[i]);
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
        const Hull hull = seen_of(p, b, h, first + g, first + g + rows - 1, at);
        if (hull.empty()) continue;
        ahead.step();
        if (few(p, span))
          few_products<T>(rows, p.width, queries, g, min(hull.end, row.valid) - hull.begin, m.keys[k], hull.begin, m.scores + hull.begin);
        else
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
        attention_product<T>(rows, value_width,
                             {end - hull.begin, m.scores + hull.begin, attention_block, 1, m.values[k].data + hull.begin * m.values[k].row,
                              m.values[k].row, m.out + g * value_width, value_width, true, nullptr, chain});
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

  // The same with queries along the lanes (attention_turned.h). WHOLE: of the only block, weights are divided by their sum.
  template <bool WHOLE>
  static void turned_queries(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n,
                             int64_t block_begin, int64_t block_end, T* out, int64_t out_row, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const Rows<T> queries = query_rows(p, m, b, h, first, n);
    const int64_t value_width = whole_vectors<T>(p.value_width), chain = value_width == lanes<T> ? 16 : attention_block;
    ScoreRow<T> row = score_row_of(p, b, h);
    for (int64_t q = 0; q < n; q += attention_block) {
      const int64_t i = first + q, rows = min(attention_block, n - q);
      transpose_rows(rows, p.width, {queries.data + q * queries.row, queries.row, false}, m.transposed);
      for (int64_t c = 0; c < rows; c += lanes<T>) {
        store(m.peaks + q + c, broadcast(-std::numeric_limits<T>::infinity()));
        store(m.totals + q + c, Vec<T>{});
      }
      for (int64_t k = block_begin; k < block_end; ++k) {
        const int64_t at = k * attention_block;
        const Hull seen = turned_keys(span, p.left, p.right, i, rows, at);
        if (seen.empty() && !WHOLE) continue;
        turned_product(span, p.left, p.right, i, rows, at, seen, p.width, m.keys[k], m.transposed, m.scores, ahead);
        const bool open = turned_open(span, p.left, p.right, i, rows, at, min(attention_block, span.keys - at));
        const auto weigh = open ? &weigh_turned<WHOLE, true> : &weigh_turned<WHOLE, false>;
        weigh(p, m, span, row, i, rows, seen, k, q);
        T* const to = out + q * out_row;
        for (int64_t r = 0; r < rows && !WHOLE; ++r)
          for (int64_t c = 0; c < value_width && m.factors[r] != T(1); c += lanes<T>)
            store(to + r * out_row + c, load(to + r * out_row + c) * m.factors[r]);
        turned_rows(span, p.left, p.right, i, rows, at, m.scores, value_width, m.values[k], to, out_row, !WHOLE, chain, ahead);
      }
    }
  }

  // Products of n queries become scores and then weights; m.factors bring what was summed before to the new maximum. The block's peaks
  // begin at the q'th. OPEN: all is seen.
  template <bool WHOLE, bool OPEN>
  static void weigh_turned(const AttentionCall<S>& p, const Memory& m, const AttentionSpan& span, ScoreRow<T>& row, int64_t first,
                           int64_t n, const Hull& block, int64_t k, int64_t q) {
    for (int64_t lane = 0; lane < n; lane += lanes<T>) weigh_lanes<WHOLE, OPEN>(p, m, span, row, first, n, block, k, lane, q + lane);
  }
  template <bool WHOLE, bool OPEN>
  S2S_INLINE void weigh_lanes(const AttentionCall<S>& p, const Memory& m, const AttentionSpan& span, ScoreRow<T>& row, int64_t first,
                              int64_t n, const Hull& block, int64_t k, int64_t lane, int64_t c) {
    const T lowest = -std::numeric_limits<T>::infinity();
    const int64_t at = k * attention_block;
    const Hull seen = OPEN ? block : turned_keys(span, p.left, p.right, first + lane, min(lanes<T>, n - lane), at);
    T* const scores = m.scores + lane;
    for (int64_t j = block.begin; j < seen.begin; ++j) store(scores + j * attention_block, Vec<T>{});
    for (int64_t j = seen.end; j < block.end; ++j) store(scores + j * attention_block, Vec<T>{});
    Vec<T> tops[2] = {broadcast(lowest), broadcast(lowest)};
    const auto score_at = [&](int64_t j) __attribute__((always_inline)) {
      return turned_score<T, OPEN>(span, p.left, p.right, first, n, at + j, lane, row, load(scores + j * attention_block));
    };
    int64_t j = seen.begin;
    for (; j + 1 < seen.end; j += 2)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const Vec<T> s = score_at(j + v);
        store(scores + (j + v) * attention_block, s);
        tops[v] = max(s, tops[v]);  // a NaN is passed over here and comes back with the weights
      }
    if (j < seen.end) {
      const Vec<T> s = score_at(j);
      store(scores + j * attention_block, s);
      tops[0] = max(s, tops[0]);
    }
    if (m.values[k].bad)
      for (j = seen.begin; j < seen.end; ++j)
        for (int64_t i = 0; i < lanes<T> && m.bad_values[at + j]; ++i)
          if (scores[j * attention_block + i] != lowest) m.spoilt[c + i] = 1;
    const Vec<T> before = load(m.peaks + c), peak = max(max(tops[0], tops[1]), before);
    const Vec<T> level = select(peak == broadcast(lowest), Vec<T>{}, peak);
    Vec<T> sums[2] = {};
    for (j = seen.begin; j + 1 < seen.end; j += 2)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        T* const place = scores + (j + v) * attention_block;
        const Vec<T> weight = vexp_weight(load(place) - level);
        sums[v] = sums[v] + weight;
        store(place, weight);
      }
    if (j < seen.end) {
      const Vec<T> weight = vexp_weight(load(scores + j * attention_block) - level);
      sums[0] = sums[0] + weight;
      store(scores + j * attention_block, weight);
    }
    store(m.peaks + c, peak);
    Vec<T> total = sums[0] + sums[1];
    if constexpr (WHOLE) {
      store(m.totals + c, total);
      const Vec<T> share = select(total == Vec<T>{}, Vec<T>{}, broadcast(T(1)) / total);
      for (j = seen.begin; j < seen.end; ++j) store(scores + j * attention_block, load(scores + j * attention_block) * share);
    } else {
      const Vec<T> one = broadcast(T(1)), known = select(before > broadcast(lowest), vexp_fast(before - peak), one);
      const Vec<T> factor = select(peak > before, known, one);
      store(m.factors + lane, factor);
      store(m.totals + c, fma(load(m.totals + c), factor, total));
    }
  }

  // Sums become results; rows [present, n) are absent. ABSENT: only those have no result yet.
  template <bool ABSENT>
  static void finish(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t first, int64_t n, int64_t present) {
    const int64_t value_width = whole_vectors<T>(p.value_width), row_begin = p.spans[b].query_begin + first;
    T* const lse = p.lse + p.first_row(b, h) + first;
    S* const out = p.out + b * p.out_stride[0] + h * p.out_stride[1] + row_begin * p.out_stride[2];
    const T* const divisors = Tiled::pays(p, p.spans[b]) ? m.divisors : m.totals;
    for (int64_t i = 0; i < present; i += lanes<T>) store(m.sums + i, vlog(load(m.totals + i)));
    for (int64_t i = 0; i < present; ++i) {
      if constexpr (ABSENT)
        finish_lse(p, m.totals[i], m.sums[i], m.peaks[i], lse + i);
      else
        finish_row(p, m.out + i * value_width, m.totals[i], m.sums[i], m.peaks[i], divisors[i], m.spoilt[i], out + i * p.out_stride[2],
                   lse + i);
    }
    for (int64_t i = present; i < n; ++i) finish_row(p, m.out, T(0), T(0), T(0), T(0), false, out + i * p.out_stride[2], lse + i);
  }

 public:
  // Sums are divided by the divisor, which may differ from the total by how weights were rounded.
  static void finish_row(const AttentionCall<S>& p, const T* sums, T total, T logarithm, T peak, T divisor, bool spoilt, S* out, T* lse) {
    const bool none = total == T(0);
    finish_lse(p, total, logarithm, peak, lse);
    const T factor = spoilt ? std::numeric_limits<T>::quiet_NaN() : T(1) / divisor;
    write(p.value_width, sums, none, factor, out);
    if (p.wide_out) write(p.value_width, sums, none, factor, p.wide_out + (out - p.out));
  }

 private:
  S2S_INLINE void finish_lse(const AttentionCall<S>& p, T total, T logarithm, T peak, T* lse) {
    const bool none = total == T(0);
    *lse = none ? -std::numeric_limits<T>::infinity() : peak + logarithm;
    if (p.peaks) p.peaks[lse - p.lse] = peak, p.shares[lse - p.lse] = none ? T(0) : T(1) / total;
  }
  template <class O>
  S2S_INLINE void write(int64_t width, const T* sums, bool none, T factor, O* out) {
    int64_t c = 0;
    for (; c + lanes<T> <= width; c += lanes<T>) store(out + c, none ? Vec<T>{} : load(sums + c) * factor);
    if (c < width) store_partial(out + c, none ? Vec<T>{} : load(sums + c) * factor, width - c);
  }
};
