// Backward attention on the tile unit: a pipeline of chunks of attention_block queries for each block of keys. While one chunk's scores
// become weights and gradients, the next one's scores are multiplied, and from the one before come gradients of queries, keys and values.
//
// Scores are those of forward to the bit: its peaks and shares belong to them. Gradients of keys and values are made transposed, so that
// weights are the right factor, whose lines are those of two rows: element by element beside each other, as put_planes makes them.

template <class S>
struct AttentionBackward;

template <class S, bool Possible = tiled_possible<S>>
struct TiledBackward {
  using T = compute_t<S>;
  struct Memory {};
  static Memory memory(const AttentionCall<S>&, Pieces&) { return {}; }
  static constexpr bool replaces = false;
  template <class M>
  static void begin(const AttentionCall<S>&, const AttentionGradients<S>&, const M&, int64_t, int64_t, int64_t, const T*, uint8_t*, bool&) {
  }
  template <bool EXTRA, class M>
  static void block(const AttentionCall<S>&, const AttentionGradients<S>&, const M&, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                    const T*, const T*, ScoreRow<T>&, T*, T*, T*, bool, uint8_t*, Ahead&) {}
};

#if defined(S2S_TILE_UNIT)
template <class S>
struct TiledBackward<S, true> {
  using T = float;
  static constexpr int plane_count = TiledForward<S>::plane_count;
  static constexpr bool scaled = TiledForward<S>::scaled;
  using Layout = TiledLayout<plane_count>;
  static constexpr int64_t chunk_rows = attention_block, groups = chunk_rows / tiled_rows, depth = split_steps(attention_block);

  struct Memory {
    float *queries, *grads;                     // planes of all groups of queries (scaled), and of their gradients
    float *queries_turned, *grads_turned;       // the same of each chunk's transpose
    float *keys, *values, *key_rows;            // right factors: keys and values as columns, keys as rows
    float *scores, *slopes;                     // of two chunks: rows of attention_block
    float *left, *weights, *right;              // planes of two chunks: slopes as left factor, weights and slopes as right ones
    float *query_sums, *key_sums, *value_sums;  // of two chunks, those of keys and values transposed
    float *key_totals, *value_totals;           // of a block of keys, transposed
    float* scratch;
  };
  static int64_t whole(int64_t n) { return (n + tiled_rows - 1) / tiled_rows * tiled_rows; }
  static constexpr int64_t right_size() { return Layout::packed_size(attention_block, chunk_rows); }

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    const int64_t all = (p.time + chunk_rows - 1) / chunk_rows, width = whole(p.width), value_width = whole(p.value_width);
    const auto take = [&](int64_t count) { return pieces.take<float>(count); };
    Memory m;
    m.queries = take(all * groups * Layout::planes(p.width));
    m.grads = take(all * groups * Layout::planes(p.value_width));
    m.queries_turned = take(all * width / tiled_rows * Layout::planes(chunk_rows));
    m.grads_turned = take(all * value_width / tiled_rows * Layout::planes(chunk_rows));
    m.keys = take(Layout::packed_size(attention_block, p.width));
    m.values = take(Layout::packed_size(attention_block, p.value_width));
    m.key_rows = take(Layout::packed_size(width, attention_block));
    m.scores = take(2 * chunk_rows * attention_block);
    m.slopes = take(2 * chunk_rows * attention_block);
    m.left = take(2 * groups * Layout::planes(attention_block));
    m.weights = take(2 * right_size());
    m.right = take(2 * right_size());
    m.query_sums = take(2 * chunk_rows * width);
    m.key_sums = take(2 * width * attention_block);
    m.value_sums = take(2 * value_width * attention_block);
    m.key_totals = take(width * attention_block);
    m.value_totals = take(value_width * attention_block);
    m.scratch = take(max(max(width, value_width), chunk_rows) * attention_block);
    return m;
  }

  static constexpr bool replaces = false;  // what is in fresh sums

  // One query head: its queries, and the gradients of their results.
  template <class M>
  static void begin(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t part,
                    const T* shares, uint8_t* flags, bool& spoilt) {
    using Backward = AttentionBackward<S>;
    const Rows<T> queries = Backward::query_rows(p, m, b, h, flags), grads = Backward::grads_of(p, g, m, b, h, part, shares, spoilt);
    pack_queries(p, m.tiled, p.spans[b].queries, queries, grads);
  }

  // The queries [begin, end) with the n keys from `at` on.
  template <bool EXTRA, class M>
  static void block(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t at, int64_t n,
                    int64_t begin, int64_t end, const T* peaks, const T* shares, ScoreRow<T>& row, T* query_sums, T* key_sums,
                    T* value_sums, bool, uint8_t* flags, Ahead& ahead) {
    using Backward = AttentionBackward<S>;
    const int64_t kv = h / (p.heads / p.kv_heads);
    pack_keys(p, m.tiled, n, Backward::key_rows(p, m, b, kv, at, n, flags), Backward::value_rows(p, m, b, kv, at, n));
    chunks<EXTRA>(p, g, m, b, h, at, begin, end, peaks, shares, row, query_sums, ahead);
    if (g.key) turn_back(m.tiled, n, p.width, m.tiled.key_totals, key_sums);
    if (g.value) turn_back(m.tiled, n, p.value_width, m.tiled.value_totals, value_sums);
  }

 private:
  // All queries of a head, and the gradients of their results.
  static void pack_queries(const AttentionCall<S>& p, const Memory& m, int64_t n, const Rows<T>& queries, const Rows<T>& grads) {
    const int64_t width = whole_vectors<T>(p.width);
    for (int64_t i = 0; i < n; i += tiled_rows) {
      const int64_t rows = min(tiled_rows, n - i);
      const T* const from = queries.data + i * queries.row;
      if (scaled) tiled_scale(rows, width, from, queries.row, static_cast<T>(p.scale), m.scratch);
      tiled_split<plane_count>(rows, p.width, scaled ? m.scratch : from, scaled ? width : queries.row,
                               m.queries + i / tiled_rows * Layout::planes(p.width));
      tiled_split<plane_count>(rows, p.value_width, grads.data + i * grads.row, grads.row,
                               m.grads + i / tiled_rows * Layout::planes(p.value_width));
    }
    for (int64_t i = 0; i < n; i += chunk_rows) {
      turn(m, min(chunk_rows, n - i), p.width, queries, i, m.queries_turned);
      turn(m, min(chunk_rows, n - i), p.value_width, grads, i, m.grads_turned);
    }
  }
  static void pack_keys(const AttentionCall<S>& p, const Memory& m, int64_t n, const Rows<T>& keys, const Rows<T>& values) {
    tiled_pack_columns<plane_count>(n, p.width, keys, m.keys);
    tiled_pack_columns<plane_count>(n, p.value_width, values, m.values);
    tiled_pack_rows<plane_count>(n, whole_vectors<T>(p.width), keys, m.key_rows);
    std::memset(m.key_totals, 0, static_cast<size_t>(whole(p.width) * attention_block) * sizeof(T));
    std::memset(m.value_totals, 0, static_cast<size_t>(whole(p.value_width) * attention_block) * sizeof(T));
  }

  // The turn'th chunk of queries that see something of the block of keys: rows [first, first + rows); no rows: there is none.
  struct Chunk {
    int64_t first, rows, turn;
    Hull hulls[groups];

    // The groups that see something.
    int64_t begin() const { return hulls[0].empty() ? 1 : 0; }
    int64_t end() const { return rows <= tiled_rows || hulls[1].empty() ? 1 : 2; }
    int64_t of_two() const { return turn % 2; }
  };

  static T* scores(const Memory& m, const Chunk& c) { return m.scores + c.of_two() * chunk_rows * attention_block; }
  static T* slopes(const Memory& m, const Chunk& c) { return m.slopes + c.of_two() * chunk_rows * attention_block; }

  // Products of queries and keys, and of gradients and values.
  static void add_scores(const AttentionCall<S>& p, const Memory& m, const Chunk& c, TileQueue<plane_count>& queue) {
    for (int64_t g = c.begin(); g < c.end(); ++g) {
      const int64_t group = c.first / tiled_rows + g, begin = c.hulls[g].begin, columns = c.hulls[g].end - begin;
      const auto add = [&](const float* left, int64_t size, const float* right, T* to) {
        const int64_t steps = split_steps(size);
        queue.add(left + group * Layout::planes(size), steps, steps, right + begin / 16 * Layout::column(steps) / 4, steps, 0, columns,
                  to + g * tiled_rows * attention_block + begin, attention_block);
      };
      add(m.queries, p.width, m.keys, scores(m, c));
      add(m.grads, p.value_width, m.values, slopes(m, c));
    }
  }
  // What a chunk adds to the gradients.
  static void add_gradients(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, const Chunk& c, int64_t keys,
                            TileQueue<plane_count>& queue) {
    const int64_t width = whole(p.width);
    for (int64_t i = c.begin(); g.query && i < c.end(); ++i)
      queue.add(m.left + (c.of_two() * groups + i) * Layout::planes(attention_block), depth, (c.hulls[i].end - c.hulls[i].begin) / 32,
                m.key_rows, depth, c.hulls[i].begin / 32, width, m.query_sums + (c.of_two() * chunk_rows + i * tiled_rows) * width, width);
    const auto add = [&](const float* turned, int64_t size, const float* right, T* sums) {
      const int64_t parts = whole(size) / tiled_rows;
      for (int64_t d = 0; d < parts; ++d)
        queue.add(turned + (c.first / chunk_rows * parts + d) * Layout::planes(chunk_rows) + c.begin() * Layout::step / 4, depth,
                  c.end() - c.begin(), right + c.of_two() * right_size(), depth, c.begin(), whole(keys),
                  sums + (c.of_two() * parts + d) * tiled_rows * attention_block, attention_block);
    };
    if (g.value) add(m.grads_turned, p.value_width, m.weights, m.value_sums);
    if (g.key) add(m.queries_turned, p.width, m.right, m.key_sums);
  }
  // Adds up what add_gradients has made.
  static void add_up(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, const Chunk& c, T* query_sums) {
    const int64_t width = whole_vectors<T>(p.width);
    for (int64_t i = c.begin() * tiled_rows; g.query && i < min(c.rows, c.end() * tiled_rows); ++i)
      add(width, m.query_sums + (c.of_two() * chunk_rows + i) * whole(p.width), query_sums + (c.first + i) * width);
    if (g.value) add(p.value_width * attention_block, m.value_sums + c.of_two() * whole(p.value_width) * attention_block, m.value_totals);
    if (g.key) add(p.width * attention_block, m.key_sums + c.of_two() * whole(p.width) * attention_block, m.key_totals);
  }
  // Adds the totals of n keys to their sums, rows of `width` in whole vectors.
  static void turn_back(const Memory& m, int64_t n, int64_t width, const T* totals, T* sums) {
    const int64_t row = whole_vectors<T>(width);
    std::memset(m.scratch, 0, static_cast<size_t>(n * row) * sizeof(T));
    copy_transposed(width, n, totals, attention_block, int64_t{1}, m.scratch, row);
    add(n * row, m.scratch, sums);
  }

  // Rows r and r + 16 of a group as planes.
  static void put_rows(const Memory& m, const Chunk& c, int64_t group, int64_t r) {
    const int64_t at = (group * tiled_rows + r) * attention_block, next = at + 16 * attention_block;
    const T *const weight = scores(m, c), *const slope = slopes(m, c);
    const auto right = [&](float* planes, const T* from) {
      char* to = reinterpret_cast<char*>(planes + c.of_two() * right_size()) + 64 + group * Layout::step + r * 64;
      for (int64_t j = 0; j < attention_block; j += 16, to += Layout::column(depth))
        put_planes<plane_count, true>(load(from + at + j), load(from + next + j), to);
    };
    right(m.weights, weight);
    right(m.right, slope);
    char* to = reinterpret_cast<char*>(m.left + (c.of_two() * groups + group) * Layout::planes(attention_block)) + r * 64;
    for (int64_t j = c.hulls[group].begin; j < c.hulls[group].end; j += 32, to += Layout::step) {
      put_planes<plane_count, false>(load(slope + at + j), load(slope + at + j + 16), to);
      put_planes<plane_count, false>(load(slope + next + j), load(slope + next + j + 16), to + depth * Layout::step);
    }
  }

  // The queries [begin, end) with the block of keys from `at` on.
  template <bool EXTRA, class M>
  static void chunks(const AttentionCall<S>& p, const AttentionGradients<S>& g, const M& m, int64_t b, int64_t h, int64_t at, int64_t begin,
                     int64_t end, const T* peaks, const T* shares, ScoreRow<T>& row, T* query_sums, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const auto chunk_at = [&](int64_t turn, int64_t first) {
      Chunk chunk{};
      for (; first < end && !chunk.rows; first += chunk_rows) {
        chunk = {first, min(chunk_rows, end - first), turn, {}};
        for (int64_t q = 0; q < chunk.rows; q += tiled_rows)
          chunk.hulls[q / tiled_rows] = seen_of(p, b, h, first + q, first + min(chunk.rows, q + tiled_rows) - 1, at, 32);
        if (chunk.begin() >= chunk.end() || chunk.hulls[chunk.begin()].empty()) chunk.rows = 0;
      }
      return chunk;
    };
    TileQueue<plane_count> queue;
    Chunk last{}, before{}, now = chunk_at(0, begin / chunk_rows * chunk_rows);
    if (now.rows) add_scores(p, m.tiled, now, queue);
    queue.finish();
    while (now.rows) {
      const Chunk next = chunk_at(now.turn + 1, now.first + chunk_rows);
      if (next.rows) add_scores(p, m.tiled, next, queue);
      if (before.rows) add_gradients(p, g, m.tiled, before, row.valid, queue);
      T *const weights = scores(m.tiled, now), *const changes = slopes(m.tiled, now);
      int64_t done = 0;
      const int64_t all = (now.end() - now.begin()) * 16;
      for (int64_t q = now.begin(); q < now.end(); ++q) {
        ahead.step();
        for (int64_t r = 0; r < 16; ++r) {
          queue.advance(queue.parts() * ++done / all);
          for (int64_t i = q * tiled_rows + r; i <= q * tiled_rows + r + 16; i += 16) {
            const int64_t place = i * attention_block;
            if (i < now.rows)
              AttentionDerivative<S>::template differentiate_rows<EXTRA, scaled>(p, g, m, b, h, at, now.first + i, 1, now.hulls[q], peaks,
                                                                                 shares, row, weights + place, changes + place);
            else
              for (int64_t c = 0; c < attention_block; ++c) weights[place + c] = changes[place + c] = T(0);
          }
          put_rows(m.tiled, now, q, r);
        }
      }
      if (last.rows) add_up(p, g, m.tiled, last, query_sums);
      queue.finish();
      last = before, before = now, now = next;
    }
    if (before.rows) add_gradients(p, g, m.tiled, before, row.valid, queue);
    if (last.rows) add_up(p, g, m.tiled, last, query_sums);
    queue.finish();
    if (before.rows) add_up(p, g, m.tiled, before, query_sums);
  }
  static void add(int64_t n, const T* from, T* to) {
    for (int64_t c = 0; c < n; c += lanes<T>) store(to + c, load(to + c) + load(from + c));
  }
  // The planes of the transpose of n rows from `first` on, a multiple of chunk_rows.
  static void turn(const Memory& m, int64_t n, int64_t width, const Rows<T>& rows, int64_t first, float* planes) {
    planes += first / chunk_rows * (whole(width) / tiled_rows) * Layout::planes(chunk_rows);
    if (n < chunk_rows) std::memset(m.scratch, 0, static_cast<size_t>(width * chunk_rows) * sizeof(T));
    copy_transposed(n, width, rows.data + first * rows.row, rows.row, int64_t{1}, m.scratch, chunk_rows);
    for (int64_t c = 0; c < width; ++c) {
      char* to = reinterpret_cast<char*>(planes) + c / 16 * depth * Layout::step + c % 16 * 64;
      for (int64_t s = 0; s < depth; ++s, to += Layout::step)
        put_planes<plane_count, false>(load(m.scratch + c * chunk_rows + 32 * s), load(m.scratch + c * chunk_rows + 32 * s + 16), to);
    }
  }
};
#endif
