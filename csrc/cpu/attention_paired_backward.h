// Backward attention by products of bfloat16 on vectors. Gradients of keys and values are products with weights and slopes turned, whose
// lines, of two rows in turns, are pairs along the queries.

#if defined(S2S_BFLOAT16_PRODUCTS) && !defined(S2S_TILE_UNIT)
template <class S>
struct TiledBackward<S, true> {
  using T = float;
  using Layout = TiledLayout<1>;
  static constexpr int64_t chunk_rows = attention_block, depth = split_steps(attention_block);
  static constexpr int64_t slope_row = 2 * attention_block;  // bytes

  struct Memory {
    Rows<S>*queries, *grads;                 // of a head
    S *query_copies, *grad_copies, *copies;  // of a head, of a block of keys
    float *query_pairs, *grad_pairs;         // right factors: rows of each chunk
    float *keys, *values, *key_pairs;        // of a block: keys and values as columns, keys as rows
    float *scores, *slopes;                  // of a chunk: rows of attention_block
    char* left;                              // slopes row by row
    float *weight_pairs, *slope_pairs;       // lines
  };

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t chunks = (p.time + chunk_rows - 1) / chunk_rows;
    const auto take = [&](int64_t count) { return pieces.take<float>(count); };
    Memory m;
    m.queries = pieces.take<Rows<S>>(1);
    m.grads = pieces.take<Rows<S>>(1);
    m.query_copies = pieces.take<S>(p.time * PairRows::padded(p.width));
    m.grad_copies = pieces.take<S>(p.time * PairRows::padded(p.value_width));
    m.copies = pieces.take<S>(attention_block * PairRows::padded(max(p.width, p.value_width)));
    m.query_pairs = take(chunks * Layout::packed_size(p.width, chunk_rows));
    m.grad_pairs = take(chunks * Layout::packed_size(p.value_width, chunk_rows));
    m.keys = take(Layout::packed_size(attention_block, p.width));
    m.values = take(Layout::packed_size(attention_block, p.value_width));
    m.key_pairs = take(Layout::packed_size(p.width, attention_block));
    m.scores = take(chunk_rows * attention_block);
    m.slopes = take(chunk_rows * attention_block);
    m.left = pieces.take<char>(chunk_rows * slope_row);
    m.weight_pairs = take(Layout::packed_size(attention_block, chunk_rows));
    m.slope_pairs = take(Layout::packed_size(attention_block, chunk_rows));
    return m;
  }

  static constexpr bool replaces = true;  // what is in fresh sums

  // One query head: its queries, and the gradients of their results.
  template <class M>
  static void begin(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& all, int64_t b, int64_t h, int64_t part,
                    const T* shares, uint8_t* flags, bool& spoilt) {
    using Backward = AttentionBackward<S>;
    const Memory& m = all.tiled;
    const AttentionSpan& span = p.spans[b];
    const int64_t n = span.queries;
    const S* const query = p.query + b * p.query_stride[0] + h * p.query_stride[1] + span.query_begin * p.query_stride[2];
    const S* const grad = g.grad_out + b * g.grad_out_stride[0] + h * g.grad_out_stride[1] + span.query_begin * g.grad_out_stride[2];
    *m.queries = flags ? PairRows::of(n, p.width, Backward::query_rows(p, all, b, h, flags), m.query_copies)
                       : PairRows::left(n, p.width, query, p.query_stride[2], p.query_stride[3], m.query_copies);
    *m.grads = PairRows::left(n, p.value_width, grad, g.grad_out_stride[2], g.grad_out_stride[3], m.grad_copies);
    Backward::upstream(p, g, all, b, h, part, shares, *m.grads, m.grad_copies, PairRows::padded(p.value_width), spoilt);
    for (int64_t i = 0; i < n; i += chunk_rows) {
      const auto pack = [&](const Rows<S>& rows, int64_t width, float* to) {
        const int64_t size = Layout::packed_size(width, chunk_rows);
        tiled_pack_rows<1>(min(chunk_rows, n - i), width, Rows<S>{rows.data + i * rows.row, rows.row, false}, to + i / chunk_rows * size);
      };
      if (g.key) pack(*m.queries, p.width, m.query_pairs);
      if (g.value) pack(*m.grads, p.value_width, m.grad_pairs);
    }
  }

  // The queries [begin, end) with the n keys from `at` on.
  template <bool EXTRA, class M>
  static void block(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& all, int64_t b, int64_t h, int64_t at, int64_t n,
                    int64_t begin, int64_t end, const T* peaks, const T* shares, ScoreRow<T>& row, T* query_sums, T* key_sums,
                    T* value_sums, bool fresh, uint8_t* flags, Ahead& ahead) {
    const Memory& m = all.tiled;
    const AttentionSpan& span = p.spans[b];
    pack_keys(p, g, all, b, h / (p.heads / p.kv_heads), at, n, flags);
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    for (int64_t first = begin / chunk_rows * chunk_rows; first < end; first += chunk_rows) {
      const int64_t rows = min(chunk_rows, end - first);
      int64_t low = chunk_rows, high = 0;  // the rows that see something
      for (int64_t r = 0, next; r < rows; r = next) {
        const PairGroup group = PairGroup::of(p, b, h, first, r, rows, at, PairGroup::most(p.width, chunk_rows));
        const Hull hull = group.hull;
        const int64_t i = first + r, count = group.end - r;
        next = group.end;
        const int64_t whole = (next + tiled_rows - 1) / tiled_rows * tiled_rows;
        const auto clear = [&](int64_t begin) {
          for (T* const rest : {m.scores, m.slopes})
            std::memset(rest + begin * attention_block, 0, static_cast<size_t>((whole - begin) * attention_block) * sizeof(T));
        };
        const auto put = [&] {
          for (int64_t j = r; j < next; j += tiled_rows) {
            put_lines(m.scores + j * attention_block, j, m.weight_pairs);
            put_lines(m.slopes + j * attention_block, j, m.slope_pairs);
          }
        };
        if (hull.empty()) {
          if (low < high) clear(r), put();  // others may follow
          continue;
        }
        low = min(low, r), high = next;
        const auto product = [&](const Rows<S>& left, int64_t size, const float* right, T* to) {
          const int64_t steps = split_steps(size);
          pair_product<false>(count, (hull.end - hull.begin) / 16,
                              {16 * steps, reinterpret_cast<const char*>(left.data + i * left.row), 2 * left.row,
                               lines(right) + hull.begin / 16 * Layout::column(steps), Layout::column(steps),
                               to + r * attention_block + hull.begin, attention_block, false});
        };
        product(*m.queries, p.width, m.keys, m.scores);
        product(*m.grads, p.value_width, m.values, m.slopes);
        for (int64_t j = 0; j < count; ++j) {
          T *const weights = m.scores + (r + j) * attention_block, *const slopes = m.slopes + (r + j) * attention_block;
          ahead.step();
          AttentionDerivative<S>::template differentiate_rows<EXTRA, false>(p, g, all, b, h, at, i + j, 1, hull, peaks, shares, row,
                                                                            weights, slopes);
          for (int64_t c = hull.begin; c < hull.end; c += 32)  // in the order of key_pairs
            _mm512_store_si512(m.left + j * slope_row + 2 * c, in_turns(load(slopes + c), load(slopes + c + 16)));
        }
        clear(next), put();
        if (!g.query) continue;
        pair_product<false>(
            count, width / 16,
            {(hull.end - hull.begin) / 2, m.left + 2 * hull.begin, slope_row, lines(m.key_pairs) + hull.begin / 32 * Layout::step,
             Layout::column(depth), query_sums + i * width, width, true});
      }
      if (low >= high) continue;
      const auto add = [&](const float* turned, const float* right, int64_t size, T* to) {
        const int64_t vectors = whole_vectors<T>(size) / 16, skipped = low / tiled_rows * Layout::step;
        pair_product<true>(n, vectors,
                           {line_count(high - low), lines(turned) + skipped, Layout::column(depth),
                            lines(right + first / chunk_rows * Layout::packed_size(size, chunk_rows)) + skipped, Layout::column(depth), to,
                            vectors * 16, !fresh});
      };
      if (g.value) add(m.weight_pairs, m.grad_pairs, p.value_width, value_sums);
      if (g.key) add(m.slope_pairs, m.query_pairs, p.width, key_sums);
      fresh = false;
    }
    if (fresh) AttentionBackward<S>::zero_rows(0, n, width, key_sums, value_width, value_sums);
  }

 private:
  // Lines that so many rows come to, of which r and r + 16 share one.
  static int64_t line_count(int64_t rows) { return rows / tiled_rows * 16 + min(int64_t{16}, rows % tiled_rows); }
  // The lines of a right factor's first column.
  static const char* lines(const float* factor) { return reinterpret_cast<const char*>(factor) + 64; }

  template <class M>
  static void pack_keys(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& all, int64_t b, int64_t kv, int64_t at,
                        int64_t n, uint8_t* flags) {
    const Memory& m = all.tiled;
    const auto from = [&](const S* data, const int64_t* stride) {
      return data + b * stride[0] + kv * stride[1] + (p.spans[b].key_begin + at) * stride[2];
    };
    const Rows<S> keys = flags ? PairRows::of(n, p.width, AttentionBackward<S>::key_rows(p, all, b, kv, at, n, flags), m.copies)
                               : PairRows::right(n, p.width, from(p.key, p.key_stride), p.key_stride[2], p.key_stride[3], m.copies);
    tiled_pack_columns<1>(n, p.width, keys, m.keys, p.next(p.key_stride));
    if (g.query) tiled_pack_rows<1>(n, p.width, keys, m.key_pairs);
    tiled_pack_columns<1>(n, p.value_width,
                          PairRows::right(n, p.value_width, from(p.value, p.value_stride), p.value_stride[2], p.value_stride[3], m.copies),
                          m.values, p.next(p.value_stride));
  }
  // tiled_rows rows, the `first` of a chunk and so on, as lines of a right factor: r and r + 16 in turns.
  static void put_lines(const T* rows, int64_t first, float* to) {
    for (int64_t r = 0; r < 16; ++r) {
      const T* const row = rows + r * attention_block;
      char* line = reinterpret_cast<char*>(to) + 64 + first / tiled_rows * Layout::step + r * 64;
      for (int64_t j = 0; j < attention_block; j += 16, line += Layout::column(depth))
        _mm512_store_si512(line, in_turns(load(row + j), load(row + 16 * attention_block + j)));
    }
  }
};
#endif
