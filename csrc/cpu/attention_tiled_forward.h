// Forward attention on the tile unit: a pipeline of groups of rows. While one group's scores become weights, the next one's scores and the
// weighted values of the one before are multiplied, and the sums of the one before that are added up.

template <class S, bool Possible = tiled_possible<S>>
struct TiledForward {
  struct Memory {};
  static bool pays(const AttentionCall<S>&, const AttentionSpan&) { return false; }
  static bool may_pay(const AttentionCall<S>&) { return false; }
  static bool always_pays(const AttentionCall<S>&) { return false; }
  static Memory memory(const AttentionCall<S>&, Pieces&) { return {}; }
  static int64_t steps(int64_t) { return 0; }
  template <class M>
  static compute_t<S> divisor(const AttentionCall<S>&, const M&, int64_t, compute_t<S> total) {
    return total;
  }
  template <class M>
  static void pack_keys(const AttentionCall<S>&, const M&, int64_t, int64_t, const S*) {}
  template <class M>
  static void pack_values(const AttentionCall<S>&, const M&, int64_t, int64_t, const S*, bool) {}
  template <bool EXTRA, class M>
  static void queries(const AttentionCall<S>&, const M&, int64_t, int64_t, int64_t, int64_t, const S*, int64_t, int64_t, Ahead&) {}
};

#if defined(S2S_BFLOAT16_PRODUCTS)
// Row i of the queries at hand: products become scores and then weights, as planes, whose lines for 32 keys are `step` bytes apart. The
// factor, which is returned, brings what was summed before to the new maximum.
template <int PLANES, bool EXTRA, int PAIRS, class S, class M>
S2S_INLINE float tiled_weights_of(const AttentionCall<S>& p, const M& m, const ScoreRow<float>& row, const Hull& hull, int64_t block,
                                  int64_t dropout_row, int64_t i, const float* products, char* planes, int64_t step) {
  using T = float;
  const T lowest = -std::numeric_limits<T>::infinity();
  Vec<T> scores[2 * PAIRS], top = broadcast(lowest), slowed;
#pragma GCC unroll 4
  for (int v = 0; v < 2 * PAIRS; ++v) {
    const int64_t c = hull.begin + v * lanes<T>;
    scores[v] = score<T, EXTRA, (PLANES > 1)>(row, c, load(products + c), slowed);
    top = max(scores[v], top);  // a NaN is passed over here and comes back with the weights
  }
  const int64_t at = block * attention_block;
  if (m.values[block].bad) {
    const auto seen = [&](int64_t c) { return scores[(c - hull.begin) / lanes<T>][(c - hull.begin) % lanes<T>] != lowest; };
    for (int64_t c = hull.begin; c < min(hull.end, row.valid); ++c)
      if (m.bad_values[at + c] && seen(c)) m.spoilt[i] = 1;
  }
  T& kept = m.peaks[i];
  const T before = kept, peak = max(before, hmax(top));
  Vec<T> sum = load(m.sums + i * lanes<T>);
  T factor = 1;
  if (peak > before) {
    if (before != lowest) factor = vexp_fast(before - peak);
    sum = sum * factor;
    kept = peak;
  }
  Vec<T> rounded{};
  if constexpr (PLANES == 1) rounded = load(m.tiled.rounded + i * lanes<T>) * factor;
  const T level = peak == lowest ? T(0) : peak;
  if (p.dropout)
    dropout_factors<T>(p.seed0, p.seed1, 0, dropout_row, at + hull.begin, hull.end - hull.begin, p.threshold, static_cast<T>(p.kept),
                       m.factors + hull.begin);
#pragma GCC unroll 2
  for (int pair = 0; pair < PAIRS; ++pair) {
    Vec<T> low = vexp_weight(scores[2 * pair] - level), high = vexp_weight(scores[2 * pair + 1] - level);
    sum = sum + low + high;
    if (p.dropout) {
      const T* const factors = m.factors + hull.begin + 2 * pair * lanes<T>;
      low = low * load(factors), high = high * load(factors + lanes<T>);
    }
    if constexpr (PLANES == 1) {
      const __m512i words = in_turns(low, high);
      _mm512_store_si512(planes + pair * step, words);
      rounded = _mm512_dpbf16_ps(rounded, (__m512bh)words, (__m512bh)_mm512_set1_epi32(0x3f803f80));  // by one
    } else {
      put_planes<PLANES, false>(low, high, planes + pair * step);
    }
  }
  store(m.sums + i * lanes<T>, sum);
  if constexpr (PLANES == 1) store(m.tiled.rounded + i * lanes<T>, rounded);
  return factor;
}

template <int PLANES, bool EXTRA, class S, class M>
S2S_INLINE float tiled_weights(const AttentionCall<S>& p, const M& m, const ScoreRow<float>& row, const Hull& hull, int64_t block,
                               int64_t dropout_row, int64_t i, const float* products, char* planes, int64_t step) {
  if (hull.end - hull.begin == 64)
    return tiled_weights_of<PLANES, EXTRA, 2>(p, m, row, hull, block, dropout_row, i, products, planes, step);
  return tiled_weights_of<PLANES, EXTRA, 1>(p, m, row, hull, block, dropout_row, i, products, planes, step);
}

// What row i of bfloat16 is divided by: the sum of its weights as they were rounded to 16 bits. What all values share would keep the
// difference, and pass it on to the gradients.
template <class S, class M>
S2S_INLINE float rounded_total(const AttentionCall<S>& p, const M& m, int64_t i, float total) {
  const float rounded = p.dropout ? 0.0f : hsum(load(m.tiled.rounded + i * lanes<float>));
  return rounded == 0.0f ? total : rounded;
}
#endif

#if defined(S2S_TILE_UNIT)
template <class S>
struct TiledForward<S, true> {
  using T = float;
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
  template <class M>
  static T divisor(const AttentionCall<S>& p, const M& m, int64_t i, T total) {
    if constexpr (plane_count == 1) return rounded_total(p, m, i, total);
    return total;
  }
  // In which the next task's lines are asked for, of so many rows.
  static int64_t steps(int64_t rows) { return rows / tiled_rows; }
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

  // The n keys of a block.
  template <class M>
  static void pack_keys(const AttentionCall<S>& p, const M& m, int64_t block, int64_t n, const S* from) {
    const Rows<T> keys = prepare_rows(n, p.width, from, p.key_stride[2], p.key_stride[3], m.key_copies);
    tiled_pack_columns<plane_count>(n, p.width, keys, m.tiled.keys + block * Layout::packed_size(attention_block, p.width));
  }
  // Those of their values; `clean`: without what is not finite.
  template <class M>
  static void pack_values(const AttentionCall<S>& p, const M& m, int64_t block, int64_t n, const S* from, bool clean) {
    const int64_t at = block * attention_block;
    m.values[block] = prepare_rows(n, p.value_width, from, p.value_stride[2], p.value_stride[3],
                                   m.value_copies + at * whole_vectors<T>(p.value_width), clean ? m.bad_values + at : nullptr);
    tiled_pack_rows<plane_count>(n, whole_vectors<T>(p.value_width), m.values[block],
                                 m.tiled.values + block * Layout::packed_size(columns(p), attention_block));
  }

  // The turn'th group of rows with a block of keys of which they see something; no rows: there is none.
  struct Group {
    int64_t block, begin, rows, turn;
    Hull hull;

    float* scores(const Memory& m) const { return m.scores + turn % 2 * tiled_rows * attention_block; }
    float* weights(const Memory& m) const { return m.weights + turn % 2 * Layout::planes(attention_block); }
    float* factors(const Memory& m) const { return m.factors + turn % 3 * tiled_rows; }
    char* planes(const Memory& m, int64_t r) const {
      return reinterpret_cast<char*>(weights(m)) + r / 16 * split_steps(attention_block) * Layout::step + r % 16 * 64;
    }
  };

  template <bool EXTRA, class M>
  static void queries(const AttentionCall<S>& p, const M& m, int64_t b, int64_t h, int64_t first, int64_t n, const S* all,
                      int64_t block_begin, int64_t block_end, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const Rows<T> queries = prepare_rows(n, p.width, all, p.query_stride[2], p.query_stride[3], m.query_copies);
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
          const Hull hull = seen_of(p, b, h, first + begin, first + begin + rows - 1, block * attention_block, 32);
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
        now.factors(m.tiled)[r] =
            tiled_weights<plane_count, EXTRA>(p, m, row, now.hull, now.block, p.first_row(b, h) + i, now.begin + r,
                                              now.scores(m.tiled) + r * attention_block, now.planes(m.tiled, r), Layout::step);
      }
      for (int64_t r = now.rows; r < last.rows; ++r) add_up(last, r);
      queue.finish();
      last = before, before = now, now = next;
    }
    if (before.rows) add_values(before);
    for (int64_t r = 0; r < last.rows; ++r) add_up(last, r);
    queue.finish();
    for (int64_t r = 0; r < before.rows; ++r) add_up(before, r);
  }
};
#endif
