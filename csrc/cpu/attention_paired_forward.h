// Forward attention by products of bfloat16 on vectors: block after block of keys, tiled_rows queries at a time.

#if defined(S2S_BFLOAT16_PRODUCTS) && !defined(S2S_TILE_UNIT)
template <class S>
struct TiledForward<S, true> {
  using T = float;
  using Layout = TiledLayout<1>;

  struct Memory {
    float *keys, *values;  // right factors: keys as columns, values as rows
    float *scores, *factors, *rounded;
    char* weights;  // of a group, row by row
    S *queries, *key_copies;
  };
  static constexpr int64_t weight_row = 2 * attention_block;  // bytes

  // Whether there are rows enough to make up for packing keys and values. An element's own lengths decide.
  static bool pays(const AttentionCall<S>& p, const AttentionSpan& span) { return pays(p, span.queries, span.keys); }
  static bool may_pay(const AttentionCall<S>& p) { return pays(p, p.time, p.source); }
  static bool always_pays(const AttentionCall<S>& p) { return pays(p, p.least_time, p.least_source); }
  static bool pays(const AttentionCall<S>& p, int64_t queries, int64_t keys) {
    // A bias that is wider than 16 bits has a gradient that comes of weights that are.
    if (!p.kv_heads || (p.wide_out && p.bias && p.bias_type <= FloatType::float32)) return false;
    return p.width >= 32 && p.value_width >= 32 && queries >= 2 &&
           (keys > attention_block || queries * (p.heads / p.kv_heads) * keys >= 24 * 24);
  }
  template <class M>
  static T divisor(const AttentionCall<S>& p, const M& m, int64_t i, T total) {
    return rounded_total(p, m, i, total);
  }
  // In which the next task's lines are asked for, of so many rows.
  static int64_t steps(int64_t rows) { return rows; }

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t blocks = (p.source + attention_block - 1) / attention_block;
    Memory m;
    m.keys = pieces.take<float>(blocks * Layout::packed_size(attention_block, p.width));
    m.values = pieces.take<float>(blocks * Layout::packed_size(p.value_width, attention_block));
    const int64_t rows = PairGroup::most(p.width, attention_queries);
    m.scores = pieces.take<float>(rows * attention_block);
    m.factors = pieces.take<float>(rows);
    m.rounded = pieces.take<float>(attention_queries * lanes<float>);
    m.weights = pieces.take<char>(rows * weight_row);
    m.queries = pieces.take<S>(attention_queries * PairRows::padded(p.width));
    m.key_copies = pieces.take<S>(attention_block * PairRows::padded(max(p.width, p.value_width)));
    return m;
  }

  // The n keys of a block.
  template <class M>
  static void pack_keys(const AttentionCall<S>& p, const M& m, int64_t block, int64_t n, const S* from) {
    tiled_pack_columns<1>(n, p.width, PairRows::right(n, p.width, from, p.key_stride[2], p.key_stride[3], m.tiled.key_copies),
                          m.tiled.keys + block * Layout::packed_size(attention_block, p.width), p.next(p.key_stride));
  }
  // Those of their values; `clean`: without what is not finite.
  template <class M>
  static void pack_values(const AttentionCall<S>& p, const M& m, int64_t block, int64_t n, const S* from, bool clean) {
    float* const packed = m.tiled.values + block * Layout::packed_size(p.value_width, attention_block);
    if (!clean) {
      m.values[block] = {nullptr, 0, false};
      tiled_pack_rows<1>(n, p.value_width,
                         PairRows::right(n, p.value_width, from, p.value_stride[2], p.value_stride[3], m.tiled.key_copies), packed);
      return;
    }
    const int64_t at = block * attention_block;
    m.values[block] = prepare_rows(n, p.value_width, from, p.value_stride[2], p.value_stride[3],
                                   m.value_copies + at * whole_vectors<T>(p.value_width), m.bad_values + at);
    tiled_pack_rows<1>(n, p.value_width, m.values[block], packed);
  }

  template <bool EXTRA, class M>
  static void queries(const AttentionCall<S>& p, const M& m, int64_t b, int64_t h, int64_t first, int64_t n, const S* all,
                      int64_t block_begin, int64_t block_end, Ahead& ahead) {
    constexpr int64_t depth = split_steps(attention_block);
    const AttentionSpan& span = p.spans[b];
    const int64_t steps = split_steps(p.width), width = whole_vectors<T>(p.value_width);
    const Rows<S> queries = PairRows::left(n, p.width, all, p.query_stride[2], p.query_stride[3], m.tiled.queries);
    std::memset(m.tiled.rounded, 0, static_cast<size_t>(n * lanes<T>) * sizeof(T));
    ScoreRow<T> row = score_row_of(p, b, h);
    for (int64_t block = block_begin; block < block_end; ++block) {
      const int64_t at = block * attention_block;
      const auto right = [block](const float* factor, int64_t size) { return reinterpret_cast<const char*>(factor + block * size) + 64; };
      const char* const keys = right(m.tiled.keys, Layout::packed_size(attention_block, p.width));
      const char* const values = right(m.tiled.values, Layout::packed_size(p.value_width, attention_block));
      row.valid = min(attention_block, span.keys - at);
      for (int64_t begin = 0, end; begin < n; begin = end) {
        const PairGroup group = PairGroup::of(p, b, h, first, begin, n, at, PairGroup::most(p.width, attention_queries));
        const Hull hull = group.hull;
        const int64_t rows = group.end - begin;
        end = group.end;
        if (hull.empty()) continue;
        pair_product<false>(
            rows, (hull.end - hull.begin) / 16,
            {16 * steps, reinterpret_cast<const char*>(queries.data + begin * queries.row), 2 * queries.row,
             keys + hull.begin / 16 * Layout::column(steps), Layout::column(steps), m.tiled.scores + hull.begin, attention_block, false});
        for (int64_t r = 0; r < rows; ++r) {
          ahead.step();
          const int64_t i = first + begin + r;
          row.begin = max(hull.begin, first_key(span, p.left, i) - at);
          row.end = min(hull.end, end_key(span, p.right, i) - at);
          if constexpr (EXTRA) {
            row.distance = static_cast<T>(at - i - span.diagonal);
            m.extras.point(p, b, h, i, at, row);
          }
          m.tiled.factors[r] = tiled_weights<1, EXTRA>(p, m, row, hull, block, p.first_row(b, h) + i, begin + r,
                                                       m.tiled.scores + r * attention_block, m.tiled.weights + r * weight_row, 64);
        }
        pair_product<false>(rows, width / 16,
                            {(hull.end - hull.begin) / 2, m.tiled.weights, weight_row, values + hull.begin / 32 * Layout::step,
                             Layout::column(depth), m.out + begin * width, width, true, m.tiled.factors});
      }
    }
  }
};
#endif
