// One query a head against a long cache: nothing is packed, each key and value is read once for all query heads that share it. The keys
// are dealt to chunks of attention_decode_chunk, whatever the number of threads; `combine` joins what they found, in order.

template <class S>
struct AttentionDecode {
  using T = compute_t<S>;
  static constexpr int64_t heads_at_once = 4;
  using Dots = AttentionDots<S>;
  static constexpr bool pairs = Dots::pairs;

  // What a chunk leaves behind for each query head: sums (whole vectors of Dv), total, peak.
  static int64_t part_size(const AttentionCall<S>& p) { return whole_vectors<T>(p.value_width) + 2; }

  struct Memory {
    T *queries, *scores, *factors;
    S* words;  // the queries where they are multiplied as they are
    uint8_t* seen;
    ScoreExtras<S> extras;
  };

  static Memory memory(const AttentionCall<S>& p, Pieces& pieces) {
    Memory m;
    m.queries = pieces.take<T>(heads_at_once * whole_vectors<T>(p.width));
    m.words = pieces.take<S>(pairs ? heads_at_once * Dots::whole_pairs(p.width) : 0);
    m.scores = pieces.take<T>(heads_at_once * attention_block);
    m.factors = pieces.take<T>(attention_block);
    m.seen = pieces.take<uint8_t>(heads_at_once * attention_block);
    m.extras = {pieces.take<T>(attention_block), pieces.take<uint8_t>(attention_block)};
    return m;
  }

  static int64_t bytes(const AttentionCall<S>& p) {
    Pieces pieces{nullptr};
    memory(p, pieces);
    return pieces.used;
  }

  // Chunk `chunk` of the keys of head kv; `parts` (heads of the group, part_size).
  static void run(const AttentionCall<S>& p, int64_t b, int64_t kv, int64_t chunk, T* parts, char* scratch) {
    if (!p.spans[b].query_rows) return;
    Pieces pieces{scratch};
    const Memory m = memory(p, pieces);
    const int64_t group = p.heads / p.kv_heads, size = part_size(p);
    for (int64_t g = 0; g < group; g += heads_at_once) {
      const int64_t h = kv * group + g, n = min(heads_at_once, group - g);
      if (plain<S> && !(p.softcap > 0 || p.bias || p.mask || p.slopes))
        heads<!plain<S>>(p, m, b, kv, h, n, chunk, parts + g * size);
      else
        heads<true>(p, m, b, kv, h, n, chunk, parts + g * size);
    }
  }

  // Joins the chunks of query head h of batch element b; `parts` is chunk 0's, the next chunk's lies `stride` further.
  static void combine(const AttentionCall<S>& p, int64_t b, int64_t h, int64_t chunks, T* parts, int64_t stride) {
    if (!p.spans[b].query_rows) return;
    const int64_t width = whole_vectors<T>(p.value_width);
    const T lowest = -std::numeric_limits<T>::infinity();
    T* const sums = parts;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const T* const other = parts + chunk * stride;
      const T peak = max(sums[width + 1], other[width + 1]), level = peak == lowest ? T(0) : peak;
      const T mine = vexp_fast(sums[width + 1] - level), its = vexp_fast(other[width + 1] - level);
      for (int64_t c = 0; c < width; c += lanes<T>) store(sums + c, load(sums + c) * mine + load(other + c) * its);
      sums[width] = sums[width] * mine + other[width] * its;
      sums[width + 1] = peak;
    }
    // As everywhere, a value that is not finite gives NaN to the whole row.
    bool spoilt = false;
    for (int64_t c = 0; c < p.value_width; ++c) spoilt = spoilt || sums[c] * T(0) != T(0);
    const int64_t row = p.spans[b].query_begin;
    AttentionForward<S>::finish_row(p, sums, sums[width], vlog(sums[width]), sums[width + 1], sums[width], spoilt,
                                    p.out + b * p.out_stride[0] + h * p.out_stride[1] + row * p.out_stride[2], p.lse + p.first_row(b, h));
  }

 private:
  // Brings nearer, row by row, what is read some rows later: the rest of these rows, then the first of those that follow.
  struct Next {
    const S* row;
    int64_t stride, width, left;
    const S* row_after;
    int64_t stride_after, width_after, left_after;
    void step() {
      if (left <= 0) {
        if (left_after <= 0) return;
        row = row_after, stride = stride_after, width = width_after, left = left_after, left_after = 0;
      }
      --left;
      for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(S))) __builtin_prefetch(row + c, 0, 3);
      row += stride;
    }
  };
  // So much further than a row is read that it comes in time, and yet is not driven out again.
  static int64_t rows_ahead(int64_t width) { return max(int64_t{1}, 4096 / (width * static_cast<int64_t>(sizeof(S)))); }

  // sums (HEADS, size) += weights (HEADS, attention_block) times n values.
  template <int HEADS>
  static void add_values(int64_t width, const T* weights, int64_t n, const S* values, int64_t row, T* sums, int64_t size, Next next) {
    constexpr int fewest = S2S_VECTOR_BYTES == 64 ? 4 : 2;
    constexpr int vectors = fewest * HEADS < 8 ? 8 / HEADS : fewest;  // as many sums as the multipliers' latency asks for
    columns<HEADS, vectors>(0, width, weights, n, values, row, sums, size, next);
  }
  // From column c on, as many vectors together as there are.
  template <int HEADS, int VECTORS>
  S2S_INLINE void columns(int64_t c, int64_t width, const T* weights, int64_t n, const S* values, int64_t row, T* sums, int64_t size,
                          Next& next) {
    for (; c + VECTORS * lanes<T> <= width; c += VECTORS * lanes<T>)
      add_columns<HEADS, VECTORS>(WholeVector<T>{}, weights, n, values + c, row, sums + c, size, next);
    if constexpr (VECTORS > 1)
      columns<HEADS, VECTORS / 2>(c, width, weights, n, values, row, sums, size, next);
    else if (c < width)
      add_columns<HEADS, 1>(PartVector<T>{width - c}, weights, n, values + c, row, sums + c, size, next);
  }
  template <int HEADS, int VECTORS, class At>
  S2S_INLINE void add_columns(At at, const T* weights, int64_t n, const S* values, int64_t row, T* sums, int64_t size, Next& next) {
    Vec<T> sum[HEADS][VECTORS];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) sum[h][v] = load(sums + h * size + v * lanes<T>);
    for (int64_t j = 0; j < n; ++j) {
      next.step();
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Vec<T> x = at.get(values + j * row + v * lanes<T>);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h) sum[h][v] = fma(broadcast(weights[h * attention_block + j]), x, sum[h][v]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) store(sums + h * size + v * lanes<T>, sum[h][v]);
  }

  template <bool EXTRA>
  static void heads(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t kv, int64_t h, int64_t n, int64_t chunk, T* parts) {
    switch (n) {
      case 4:
        return chunk_of<EXTRA, 4>(p, m, b, kv, h, chunk, parts);
      case 3:
        return chunk_of<EXTRA, 3>(p, m, b, kv, h, chunk, parts);
      case 2:
        return chunk_of<EXTRA, 2>(p, m, b, kv, h, chunk, parts);
      default:
        return chunk_of<EXTRA, 1>(p, m, b, kv, h, chunk, parts);
    }
  }

  template <bool EXTRA, int HEADS>
  static void chunk_of(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t kv, int64_t h, int64_t chunk, T* parts) {
    const AttentionSpan& span = p.spans[b];
    const int64_t size = part_size(p), width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    const T lowest = -std::numeric_limits<T>::infinity();
    for (int g = 0; g < HEADS; ++g) {
      T* const part = parts + g * size;
      for (int64_t c = 0; c < value_width + 2; ++c) part[c] = T(0);
      part[value_width + 1] = lowest;
      for (int64_t c = 0; c < width; ++c)
        m.queries[g * width + c] = c < p.width ? to_compute(p.query[b * p.query_stride[0] + (h + g) * p.query_stride[1] +
                                                                    span.query_begin * p.query_stride[2] + c * p.query_stride[3]])
                                               : T(0);
      for (int64_t c = 0; pairs && c < Dots::whole_pairs(p.width); ++c)
        m.words[g * Dots::whole_pairs(p.width) + c] = c < p.width ? p.query[b * p.query_stride[0] + (h + g) * p.query_stride[1] +
                                                                            span.query_begin * p.query_stride[2] + c * p.query_stride[3]]
                                                                  : S{};
    }
    if (span.queries <= 0) return;
    const int64_t begin = max(first_key(span, p.left, 0), chunk * attention_decode_chunk);
    const int64_t end = min(end_key(span, p.right, 0), (chunk + 1) * attention_decode_chunk);
    const S* const key = p.key + b * p.key_stride[0] + kv * p.key_stride[1] + span.key_begin * p.key_stride[2];
    const S* const value = p.value + b * p.value_stride[0] + kv * p.value_stride[1] + span.key_begin * p.value_stride[2];
    for (int64_t at = begin; at < end; at += attention_block) {
      const int64_t count = min(attention_block, end - at);
      bool hidden = EXTRA;
      for (int g = 0; g < HEADS && hidden; ++g) hidden = hides(p, b, h + g, 0, 1, at, count);
      if (hidden) continue;
      const int64_t ahead = rows_ahead(p.width), value_ahead = rows_ahead(p.value_width), after = at + attention_block;
      Next next_key{key + (at + ahead) * p.key_stride[2], p.key_stride[2],   p.width,       count - ahead,
                    value + at * p.value_stride[2],       p.value_stride[2], p.value_width, min(count, value_ahead)};
      const Next next_value{value + (at + value_ahead) * p.value_stride[2],
                            p.value_stride[2],
                            p.value_width,
                            count - value_ahead,
                            key + after * p.key_stride[2],
                            p.key_stride[2],
                            p.width,
                            min(ahead, end - after)};
      constexpr int64_t keys_at_once = Dots::template keys_at_once<HEADS>;
      for (int64_t j = 0; j < count; j += keys_at_once)
        Dots::template products<HEADS>(p.width, m.queries, m.words, min(keys_at_once, count - j), key + (at + j) * p.key_stride[2],
                                       p.key_stride[2], m.scores + j, [&]() __attribute__((always_inline)) { next_key.step(); });
      for (int g = 0; g < HEADS; ++g) weigh<EXTRA>(p, m, b, h + g, at, count, m.scores + g * attention_block, g, parts + g * size);
      const S* const values = value + at * p.value_stride[2];
      if ((p.mask || p.bias) && !all_finite(count, p.value_width, values, p.value_stride[2])) {
        // Even a weight of 0 would make NaN of what is not finite: heads that don't see such a value must not meet it.
        for (int64_t j = 0; j < count; ++j)
          for (int g = 0; g < HEADS; ++g)
            if (m.seen[g * attention_block + j])
              add_values<1>(p.value_width, m.scores + g * attention_block + j, 1, values + j * p.value_stride[2], p.value_stride[2],
                            parts + g * size, size, {});
      } else {
        add_values<HEADS>(p.value_width, m.scores, count, values, p.value_stride[2], parts, size, next_value);
      }
    }
  }

  template <bool EXTRA>
  S2S_INLINE void weigh(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, int64_t at, int64_t count, T* scores, int g,
                        T* part) {
    const int64_t value_width = whole_vectors<T>(p.value_width);
    const T lowest = -std::numeric_limits<T>::infinity();
    ScoreRow<T> row = score_row_of(p, b, h);
    row.begin = 0, row.end = row.valid = count;
    if constexpr (EXTRA) {
      row.distance = static_cast<T>(at - p.spans[b].diagonal);
      m.extras.point(p, b, h, 0, at, row);
    }
    const int64_t columns = whole_vectors<T>(count);
    Vec<T> top = broadcast(lowest), slowed;
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      const Vec<T> s = score<T, EXTRA>(row, c, load(scores + c), slowed);
      store(scores + c, s);
      top = max(s, top);
    }
    for (int64_t c = 0; EXTRA && c < count; ++c) m.seen[g * attention_block + c] = scores[c] != lowest;
    const T before = part[value_width + 1], peak = max(before, hmax(top));
    if (peak > before) {
      const T factor = before == lowest ? T(1) : vexp_fast(before - peak);
      for (int64_t c = 0; c < value_width; c += lanes<T>) store(part + c, load(part + c) * factor);
      part[value_width] *= factor;
      part[value_width + 1] = peak;
    }
    const T level = peak == lowest ? T(0) : peak;
    if (p.dropout) dropout_factors<T>(p.seed0, p.seed1, 0, p.first_row(b, h), at, columns, p.threshold, static_cast<T>(p.kept), m.factors);
    Vec<T> sum = {};
    for (int64_t c = 0; c < columns; c += lanes<T>) {
      const Vec<T> weight = vexp_weight(load(scores + c) - level);
      sum = sum + weight;
      store(scores + c, p.dropout ? weight * load(m.factors + c) : weight);
    }
    part[value_width] += hsum(sum);
  }
};
