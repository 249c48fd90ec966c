// Forward attention on the tile unit: a pipeline of groups of rows. While one group's scores become weights, the next one's scores and the
// weighted values of the one before are multiplied, and the sums of the one before that are added up.

template <class S, class T = compute_t<S>>
struct TiledForward {
  static constexpr bool possible = false;
  struct Memory {};
  static bool pays(const AttentionCall<S>&, const AttentionSpan&) { return false; }
  static bool may_pay(const AttentionCall<S>&) { return false; }
  static bool always_pays(const AttentionCall<S>&) { return false; }
  static Memory memory(const AttentionCall<S>&, Pieces&) { return {}; }
  static void pack_keys(const AttentionCall<S>&, const Memory&, int64_t, int64_t, const Rows<T>&) {}
  static void pack_values(const AttentionCall<S>&, const Memory&, int64_t, int64_t, const Rows<T>&) {}
  template <bool EXTRA, class M>
  static void queries(const AttentionCall<S>&, const M&, int64_t, int64_t, int64_t, int64_t, const Rows<T>&, int64_t, int64_t, Ahead&) {}
};

#if defined(S2S_TILE_UNIT)
template <class S>
struct TiledForward<S, float> {
  using T = float;
  static constexpr bool possible = true;
  static constexpr int plane_count = std::is_same_v<S, bfloat16> ? 1 : 3;
  static constexpr bool scaled = plane_count > 1;  // queries are, not scores; bfloat16 must stay what they are
  using Layout = TiledLayout<plane_count>;

  struct Memory {
    float *keys, *values, *queries, *weights, *scores, *sums, *factors;
    float* rounded;  // sums of weights as they are multiplied, a vector a row
  };

  // Whether there are rows enough to make up for packing keys and values; backward, which packs more, follows forward. An element's own
  // lengths decide.
  static bool pays(const AttentionCall<S>& p, const AttentionSpan& span) { return pays(p, span.queries, span.keys); }
  static bool may_pay(const AttentionCall<S>& p) { return pays(p, p.time, p.source); }
  static bool always_pays(const AttentionCall<S>& p) { return pays(p, p.least_time, p.least_source); }
  static bool pays(const AttentionCall<S>& p, int64_t queries, int64_t keys) {
    // A bias that is wider than 16 bits has a gradient that comes of weights that are.
    if (!p.kv_heads || (plane_count == 1 && p.wide_out && p.bias && p.bias_type <= FloatType::float32)) return false;
    const int64_t rows = queries * (p.heads / p.kv_heads);
    const int64_t least = plane_count == 1 ? 64 : p.right >= p.source ? 192 : p.peaks ? 448 : 320;
    return p.width >= 32 && p.value_width >= 32 && rows >= least && keys >= 32;
  }
  static int64_t columns(const AttentionCall<S>& p) { return split_columns(p.value_width) * 16; }

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t blocks = (p.source + attention_block - 1) / attention_block;
    Memory m;
    m.keys = pieces.take<float>(blocks * Layout::packed_size(attention_block, p.width));
    m.values = pieces.take<float>(blocks * Layout::packed_size(columns(p), attention_block));
    m.queries = pieces.take<float>(attention_queries / tiled_rows * Layout::planes(p.width));
    m.weights = pieces.take<float>(2 * Layout::planes(attention_block));
    m.scores = pieces.take<float>(2 * tiled_rows * attention_block);
    m.sums = pieces.take<float>(2 * tiled_rows * columns(p));
    m.factors = pieces.take<float>(3 * tiled_rows);
    m.rounded = pieces.take<float>(plane_count == 1 ? attention_queries * lanes<float> : 0);
    return m;
  }

  static void pack_keys(const AttentionCall<S>& p, const Memory& m, int64_t block, int64_t n, const Rows<T>& keys) {
    tiled_pack_columns<plane_count>(n, p.width, keys, m.keys + block * Layout::packed_size(attention_block, p.width));
  }
  static void pack_values(const AttentionCall<S>& p, const Memory& m, int64_t block, int64_t n, const Rows<T>& values) {
    tiled_pack_rows<plane_count>(n, whole_vectors<T>(p.value_width), values,
                                 m.values + block * Layout::packed_size(columns(p), attention_block));
  }

  // The turn'th group of rows with a block of keys of which they see something; no rows: there is none.
  struct Group {
    int64_t block, begin, rows, turn;
    Hull hull;

    float* scores(const Memory& m) const { return m.scores + turn % 2 * tiled_rows * attention_block; }
    float* weights(const Memory& m) const { return m.weights + turn % 2 * Layout::planes(attention_block); }
    float* factors(const Memory& m) const { return m.factors + turn % 3 * tiled_rows; }
  };

  template <bool EXTRA, class M>
  static void queries(const AttentionCall<S>& p, const M& m, int64_t b, int64_t h, int64_t first, int64_t n, const Rows<T>& queries,
                      int64_t block_begin, int64_t block_end, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t steps = split_steps(p.width);
    const int64_t padded = whole_vectors<T>(p.width);
    if (scaled) tiled_scale(n, padded, queries.data, queries.row, static_cast<T>(p.scale), m.query_copies);
    const T* const from = scaled ? m.query_copies : queries.data;
    const int64_t from_row = scaled ? padded : queries.row;
    for (int64_t g = 0; g < n; g += tiled_rows)
      tiled_split<plane_count>(min(tiled_rows, n - g), p.width, from + g * from_row, from_row,
                               m.tiled.queries + g / tiled_rows * Layout::planes(p.width));
    const auto group_at = [&](int64_t turn, int64_t block, int64_t begin) {
      for (; block < block_end; ++block, begin = 0)
        for (; begin < n; begin += tiled_rows) {
          const int64_t rows = min(tiled_rows, n - begin);
          const Hull hull = hull_of<T>(span, p.left, p.right, first + begin, first + begin + rows - 1, block * attention_block, 32);
          if (!hull.empty()) return Group{block, begin, rows, turn, hull};
        }
      return Group{};
    };
    TileQueue<plane_count> queue;
    const auto add_scores = [&](const Group& group) {
      const float* const keys = m.tiled.keys + group.block * Layout::packed_size(attention_block, p.width);
      queue.add(m.tiled.queries + group.begin / tiled_rows * Layout::planes(p.width), steps, steps,
                keys + group.hull.begin / 16 * Layout::column(steps) / 4, steps, 0, group.hull.end - group.hull.begin,
                group.scores(m.tiled) + group.hull.begin, attention_block);
    };
    const auto sums = [&](const Group& group) { return m.tiled.sums + group.turn % 2 * tiled_rows * columns(p); };
    const auto add_values = [&](const Group& group) {
      constexpr int64_t depth = split_steps(attention_block);
      queue.add(group.weights(m.tiled), depth, (group.hull.end - group.hull.begin) / 32,
                m.tiled.values + group.block * Layout::packed_size(columns(p), attention_block), depth, group.hull.begin / 32, columns(p),
                sums(group), columns(p));
    };
    const int64_t width = whole_vectors<T>(p.value_width);
    const auto add_up = [&](const Group& group, int64_t row) {
      const float* const from = sums(group) + row * columns(p);
      const Vec<T> factor = broadcast(group.factors(m.tiled)[row]);
      T* const out = m.out + (group.begin + row) * width;
      for (int64_t c = 0; c < width; c += lanes<T>) store(out + c, fma(load(out + c), factor, load(from + c)));
    };

    if constexpr (plane_count == 1) std::memset(m.tiled.rounded, 0, static_cast<size_t>(n * lanes<T>) * sizeof(float));
    ScoreRow<T> row = score_row_of(p, b, h);
    Group last{}, before{}, now = group_at(0, block_begin, 0);
    if (now.rows) add_scores(now);
    queue.finish();
    while (now.rows) {
      const Group next = group_at(now.turn + 1, now.block, now.begin + tiled_rows);
      if (next.rows) add_scores(next);
      if (before.rows) add_values(before);
      ahead.step();
      const int64_t at = now.block * attention_block;
      row.valid = min(attention_block, span.keys - at);
      for (int64_t r = 0; r < now.rows; ++r) {
        queue.advance(queue.parts() * (r + 1) / now.rows);
        if (r < last.rows) add_up(last, r);
        const int64_t i = first + now.begin + r;
        row.begin = max(now.hull.begin, first_key(span, p.left, i) - at);
        row.end = min(now.hull.end, end_key(span, p.right, i) - at);
        if constexpr (EXTRA) {
          row.distance = static_cast<T>(at - i - span.diagonal);
          m.extras.point(p, b, h, i, at, row);
        }
        if (now.hull.end - now.hull.begin == 64)
          weigh<EXTRA, 2>(p, m, row, now, p.first_row(b, h) + i, r);
        else
          weigh<EXTRA, 1>(p, m, row, now, p.first_row(b, h) + i, r);
      }
      for (int64_t r = now.rows; r < last.rows; ++r) add_up(last, r);
      queue.finish();
      last = before, before = now, now = next;
    }
    if (before.rows) add_values(before);
    for (int64_t r = 0; r < last.rows; ++r) add_up(last, r);
    queue.finish();
    for (int64_t r = 0; r < before.rows; ++r) add_up(before, r);
    if constexpr (plane_count == 1) {
      // Results are divided by what weights sum up to before they are rounded to 16 bits. What all values share would keep the difference,
      // and pass it on to the gradients.
      for (int64_t i = 0; i < n && !p.dropout; ++i) {
        const T total = hsum(load(m.sums + i * lanes<T>)), rounded = hsum(load(m.tiled.rounded + i * lanes<T>));
        const Vec<T> factor = broadcast(rounded == T(0) ? T(1) : total / rounded);
        for (int64_t c = 0; c < width; c += lanes<T>) store(m.out + i * width + c, load(m.out + i * width + c) * factor);
      }
    }
  }

  // Row r of a group: products become scores and then weights, as planes; the factor brings what was summed before to the new maximum.
  template <bool EXTRA, int PAIRS, class M>
  S2S_INLINE void weigh(const AttentionCall<S>& p, const M& m, const ScoreRow<T>& row, const Group& group, int64_t dropout_row, int64_t r) {
    const T lowest = -std::numeric_limits<T>::infinity();
    const Hull& hull = group.hull;
    const T* const products = group.scores(m.tiled) + r * attention_block;
    Vec<T> scores[2 * PAIRS], top = broadcast(lowest), slowed;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * PAIRS; ++v) {
      const int64_t c = hull.begin + v * lanes<T>;
      scores[v] = score<T, EXTRA, scaled>(row, c, load(products + c), slowed);
      top = max(scores[v], top);  // a NaN is passed over here and comes back with the weights
    }
    const int64_t at = group.block * attention_block;
    if (m.values[group.block].bad) {
      const auto seen = [&](int64_t c) { return scores[(c - hull.begin) / lanes<T>][(c - hull.begin) % lanes<T>] != lowest; };
      for (int64_t c = hull.begin; c < min(hull.end, row.valid); ++c)
        if (m.bad_values[at + c] && seen(c)) m.spoilt[group.begin + r] = 1;
    }
    T& kept = m.peaks[group.begin + r];
    const T before = kept, peak = max(before, hmax(top));
    T* const total = m.sums + (group.begin + r) * lanes<T>;
    Vec<T> sum = load(total);
    T factor = 1;
    if (peak > before) {
      if (before != lowest) factor = vexp_fast(before - peak);
      sum = sum * factor;
      kept = peak;
    }
    group.factors(m.tiled)[r] = factor;
    Vec<T> rounded{};
    T* const rounded_total = m.tiled.rounded + (plane_count == 1 ? (group.begin + r) * lanes<T> : 0);
    if constexpr (plane_count == 1) rounded = load(rounded_total) * factor;
    const T level = peak == lowest ? T(0) : peak;
    if (p.dropout)
      dropout_factors<T>(p.seed0, p.seed1, 0, dropout_row, at + hull.begin, hull.end - hull.begin, p.threshold, static_cast<T>(p.kept),
                         m.factors + hull.begin);
    char* const planes =
        reinterpret_cast<char*>(group.weights(m.tiled)) + r / 16 * split_steps(attention_block) * Layout::step + r % 16 * 64;
#pragma GCC unroll 2
    for (int pair = 0; pair < PAIRS; ++pair) {
      Vec<T> low = vexp_weight(scores[2 * pair] - level), high = vexp_weight(scores[2 * pair + 1] - level);
      sum = sum + low + high;
      if constexpr (plane_count == 1) rounded = rounded + to_16_bits(low) + to_16_bits(high);
      if (p.dropout) {
        const T* const factors = m.factors + hull.begin + 2 * pair * lanes<T>;
        low = low * load(factors), high = high * load(factors + lanes<T>);
      }
      put_planes<plane_count, false>(low, high, planes + pair * Layout::step);
    }
    store(total, sum);
    if constexpr (plane_count == 1) store(rounded_total, rounded);
  }
};
#endif
