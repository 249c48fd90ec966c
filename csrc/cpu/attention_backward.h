// Backward attention, one key head and one part of its keys at a time. For each block of keys and each block of the queries that see it,
// weights are made again from the saved peaks and shares, and five products give dV += W'dO, dK += dS'Q and dQ += dS K. The part owns the
// gradients of its keys and values; sums over queries run in the order of the loops. (Dao et al. 2022; delta_i = dO_i . O_i less the
// gradient of lse.)

template <class S>
struct AttentionBackward {
  using T = compute_t<S>;
  using Tiled = TiledBackward<S>;
  using Turned = TurnedBackward<S>;
  using Derivative = AttentionDerivative<S>;
  static constexpr int64_t groups_at_once = 11, queries_at_once = groups_at_once * attention_rows;

  struct Memory {
    T *query_copies, *grad_copies, *delta, *query_sums, *key_sums, *value_sums;
    T *key_copies, *value_copies, *keys_transposed, *values_transposed, *queries_turned, *grads_turned, *weights, *grads, *factors;
    double* slope_sums;  // of a head, a lane each
    uint8_t* flags;
    ScoreExtras<S> extras;
    typename Tiled::Memory tiled;
  };
  // Whether forward was on the tile unit.
  static bool tiled(const AttentionCall<S>& p, int64_t b) { return TiledForward<S>::pays(p, p.spans[b]); }

  static Memory memory(const AttentionCall<S>& p, const AttentionGradients<S>& g, Pieces& pieces) {
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    const int64_t part = Derivative::part_blocks(p, g.parts) * attention_block;
    Memory m;
    m.query_copies = pieces.take<T>(p.time * width);
    m.grad_copies = pieces.take<T>(p.time * value_width);
    m.delta = pieces.take<T>(whole_vectors<T>(p.time));
    m.query_sums = g.parts == 1 ? pieces.take<T>(p.time * width) : nullptr;
    m.key_sums = pieces.take<T>(part * width);
    m.value_sums = pieces.take<T>(part * value_width);
    m.key_copies = pieces.take<T>(attention_block * width);
    m.value_copies = pieces.take<T>(attention_block * value_width);
    m.keys_transposed = pieces.take<T>(attention_block * p.width);
    m.values_transposed = pieces.take<T>(attention_block * p.value_width);
    const int64_t turned = AttentionForward<S>::may_turn(p) ? (p.time + attention_block - 1) / attention_block * attention_block : 0;
    m.queries_turned = pieces.take<T>(turned * p.width);
    m.grads_turned = pieces.take<T>(turned * p.value_width);
    m.weights = pieces.take<T>(queries_at_once * attention_block);
    m.grads = pieces.take<T>(queries_at_once * attention_block);
    m.factors = pieces.take<T>(attention_block);
    m.slope_sums = pieces.take<double>(lanes<T>);
    m.flags = pieces.take<uint8_t>(max(p.time, attention_block));
    m.extras = {pieces.take<T>(attention_block), pieces.take<uint8_t>(attention_block)};
    if (TiledForward<S>::may_pay(p)) m.tiled = Tiled::memory(p, pieces);
    return m;
  }

  static int64_t bytes(const AttentionCall<S>& p, const AttentionGradients<S>& g) {
    Pieces pieces{nullptr};
    memory(p, g, pieces);
    return pieces.used;
  }

  static void run(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t kv, int64_t part, char* scratch) {
    const AttentionSpan& span = p.spans[b];
    Pieces pieces{scratch};
    const Memory m = memory(p, g, pieces);
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    const int64_t per_part = Derivative::part_blocks(p, g.parts) * attention_block;
    const int64_t part_begin = part * per_part, part_end = min(span.key_rows, part_begin + per_part);
    const int64_t count = max(int64_t{0}, part_end - part_begin);
    const int64_t present = min(count, max(int64_t{0}, span.keys - part_begin));
    // Sums are made where they are wanted, if they can be.
    T *key_sums = m.key_sums, *value_sums = m.value_sums;
    bool keys_in_place = false, values_in_place = false;
    if constexpr (std::is_same_v<S, T>) {
      keys_in_place = g.key && width == p.width && g.key_row == width;
      values_in_place = g.value && value_width == p.value_width && g.value_row == value_width;
      if (keys_in_place) key_sums = g.key + b * g.key_stride[0] + kv * g.key_stride[1] + (span.key_begin + part_begin) * g.key_row;
      if (values_in_place)
        value_sums = g.value + b * g.value_stride[0] + kv * g.value_stride[1] + (span.key_begin + part_begin) * g.value_row;
    }
    const int64_t group = p.heads / p.kv_heads;
    // One head's gradients of a block of keys are written when they are made: sums of all keys would come back from far away.
    const bool at_once = group == 1 && !keys_in_place && !values_in_place && !sole(p, span);
    Ahead ahead;
    if (p.key_stride[3] == 1 && p.value_stride[3] == 1 && p.query_stride[3] == 1 && g.grad_out_stride[3] == 1) {
      const int64_t last = kv * group + group - 1;
      ahead.add(p.query, p.query_stride, b, last, p.batch, p.heads, p.time, p.width);
      ahead.add(g.grad_out, g.grad_out_stride, b, last, p.batch, p.heads, p.time, p.value_width);
      if (p.wide_out)
        ahead.add(p.wide_out, p.out_stride, b, last, p.batch, p.heads, p.time, p.value_width);
      else if (p.out && !sole(p, span))
        ahead.add(static_cast<const S*>(p.out), p.out_stride, b, last, p.batch, p.heads, p.time, p.value_width);
      ahead.add(p.key, p.key_stride, b, kv, p.batch, p.kv_heads, p.source, p.width);
      ahead.add(p.value, p.value_stride, b, kv, p.batch, p.kv_heads, p.source, p.value_width);
    }
    if (sole(p, span) || (tiled(p, b) && max(p.time, p.source) <= attention_block)) {
      const auto results = [&](const S* grad, const int64_t* stride, int64_t row, int64_t h, int64_t heads, int64_t rows, int64_t columns) {
        const int64_t strides[3] = {stride[0], stride[1], row};
        if (grad) ahead.add(grad, strides, b, h, p.batch, heads, rows, columns, true);
      };
      results(g.query, g.query_stride, g.query_row, kv * group + group - 1, p.heads, p.time, p.width);
      results(g.key, g.key_stride, g.key_row, kv, p.kv_heads, p.source, p.width);
      results(g.value, g.value_stride, g.value_row, kv, p.kv_heads, p.source, p.value_width);
    }
    const int64_t n = span.queries, keys = span.keys;
    ahead.begin(group *
                (AttentionForward<S>::turned(p, span)
                     ? turned_steps<T>(keys, n, p.width) + turned_steps<T>(keys, n, p.value_width) + turned_steps<T>(n, p.width, keys) +
                           turned_steps<T>(keys, p.width, n) + turned_steps<T>(keys, p.value_width, n)
                     : (tiled(p, b) ? TiledForward<S>::steps(n) : n / attention_rows) * ((keys + attention_block - 1) / attention_block)));
    AttentionGradients<S> wanted = g;
    bool spoilt = false;
    for (bool clean : {false, true}) {
      bool finite = true;
      if (!clean && sole(p, span)) {
        zero_rows(span.keys, count, width, key_sums, value_width, value_sums);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
          finite &= sole_head(p, g, m, b, h, key_sums, value_sums, h > kv * group, ahead);
        if (finite) break;
        finite = true;
      }
      // The first head's products replace what is there, but for absent keys.
      const int64_t given = replaces(p, b) ? present : 0;
      if (!at_once) zero_rows(given, count, width, key_sums, value_width, value_sums);
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h) {
        if (plain<S> && !(p.softcap > 0 || p.bias || p.mask || p.slopes))
          finite &= head<!plain<S>>(p, wanted, m, b, h, part, part_begin, part_end, key_sums, value_sums, at_once, clean, spoilt, ahead);
        else
          finite &= head<true>(p, wanted, m, b, h, part, part_begin, part_end, key_sums, value_sums, at_once, clean, spoilt, ahead);
      }
      if (finite && (!g.key || at_once || all_finite(count, width, key_sums, width))) break;
      wanted.bias = nullptr, wanted.long_bias = nullptr;  // have been added to, and were right: hidden keys have no part in them
    }
    if (at_once)
      clear_keys(p, g, b, kv, part_begin + present, count - present);
    else
      write_keys(p, g, b, kv, part_begin, count, keys_in_place ? nullptr : key_sums, value_sums, spoilt, values_in_place);
  }

  // The gradient of the slope of query head h of batch element b. A row's gradients of scores sum up to that of its lse, but for the error
  // of its delta: that one is taken from every weight's gradient, and would be multiplied by the distances, which are large.
  static void finish_slope(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t h) {
    double total = 0;
    for (int64_t part = 0; part < g.parts; ++part) total += g.slopes[(part * p.batch + b) * p.heads + h];
    for (int64_t i = 0; i < p.spans[b].queries; ++i) {
      if (p.shares[p.first_row(b, h) + i] == T(0)) continue;
      double grad = -static_cast<double>(Derivative::grad_of_lse(p, g, b, h, i)), distance = 0;
      for (int64_t part = 0; part < g.parts; ++part) {
        const double* const sums = Derivative::slope_row(p, g, b, h, part, i);
        grad += sums[0], distance += sums[1];
      }
      total += grad * distance;
    }
    g.slopes[b * p.heads + h] = total;
  }

  // The parts of the gradient of queries added up, for rows [begin, end) of all.
  static void add_parts(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t begin, int64_t end) {
    const int64_t width = whole_vectors<T>(p.width), all = p.all_rows(), time = p.lse_stride[1];
    for (int64_t at = begin; at < end; ++at) {
      const int64_t b = at / time / p.heads, h = at / time % p.heads, i = at % time;
      T* const first = g.query_parts + at * width;
      for (int64_t part = 1; part < g.parts; ++part)
        for (int64_t c = 0; c < width; c += lanes<T>) store(first + c, load(first + c) + load(first + (part * all) * width + c));
      write_rows(1, p.width, first, g.query + b * g.query_stride[0] + h * g.query_stride[1] + i * g.query_row, g.query_row);
    }
  }

 private:
  friend Tiled;

  // From rows of whole vectors. Dense rows narrower than a vector are written by whole ones: the next row overwrites what is too much.
  static void write_rows(int64_t n, int64_t width, const T* from, S* to, int64_t row) {
    const int64_t from_row = whole_vectors<T>(width);
    int64_t j = 0;
    for (; row == width && width < lanes<T> && (n - j) * width >= lanes<T>; ++j) store(to + j * width, load(from + j * from_row));
    for (; j < n; ++j) {
      int64_t c = 0;
      for (; c + lanes<T> <= width; c += lanes<T>) store(to + j * row + c, load(from + j * from_row + c));
      if (c < width) store_partial(to + j * row + c, load(from + j * from_row + c), width - c);
    }
  }
  static void clear_rows(int64_t n, int64_t width, S* to, int64_t row) {
    if (row == width) width *= n, n = 1;
    for (int64_t j = 0; j < n; ++j) std::memset(to + j * row, 0, static_cast<size_t>(width) * sizeof(S));
  }

  // The gradients of n keys, from the first'th on, and of their values; where they are in place already, a value's may still be dropped.
  static void write_keys(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t kv, int64_t first, int64_t n,
                         const T* key_sums, T* value_sums, bool spoilt, bool values_in_place = false) {
    const int64_t value_width = whole_vectors<T>(p.value_width), at = p.spans[b].key_begin + first;
    if (g.key && key_sums) write_rows(n, p.width, key_sums, key_grad(p, g, b, kv, first), g.key_row);
    for (int64_t j = 0; j < n && g.value && spoilt; ++j) drop_bad(p, b, kv, at + j, value_sums + j * value_width);
    if (g.value && !values_in_place) write_rows(n, p.value_width, value_sums, value_grad(p, g, b, kv, first), g.value_row);
  }
  static S* key_grad(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t kv, int64_t first) {
    return g.key + b * g.key_stride[0] + kv * g.key_stride[1] + (p.spans[b].key_begin + first) * g.key_row;
  }
  static S* value_grad(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t kv, int64_t first) {
    return g.value + b * g.value_stride[0] + kv * g.value_stride[1] + (p.spans[b].key_begin + first) * g.value_row;
  }
  // Nothing reaches these keys.
  static void clear_keys(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t kv, int64_t first, int64_t n) {
    if (g.key) clear_rows(n, p.width, key_grad(p, g, b, kv, first), g.key_row);
    if (g.value) clear_rows(n, p.value_width, value_grad(p, g, b, kv, first), g.value_row);
  }

  // What is not finite in a value was left out of the products, and has no gradient, but NaN where a weight is.
  static void drop_bad(const AttentionCall<S>& p, int64_t b, int64_t kv, int64_t at, T* sums) {
    const S* const value = p.value + b * p.value_stride[0] + kv * p.value_stride[1] + at * p.value_stride[2];
    for (int64_t c = 0; c < p.value_width; ++c)
      if (to_compute(value[c * p.value_stride[3]]) * T(0) != T(0)) sums[c] *= T(0);
  }

  // One query head. With `clean`, what is not finite is left out of queries and keys; else whether the gradient of queries is finite, and
  // with `at_once`, when the sums are of one block of keys and go where they are wanted, that of keys.
  // `spoilt` becomes true where a result of forward is not finite.
  template <bool EXTRA>
  static bool head(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t part,
                   int64_t part_begin, int64_t part_end, T* key_sums, T* value_sums, bool at_once, bool clean, bool& spoilt, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width), kv = h / (p.heads / p.kv_heads);
    const int64_t row_begin = p.first_row(b, h);
    const T *const peaks = p.peaks + row_begin, *const shares = p.shares + row_begin;
    uint8_t* const flags = clean ? m.flags : nullptr;
    const bool tiled = AttentionBackward::tiled(p, b);
    Rows<T> queries{}, grads{};
    if (tiled) {
      Tiled::begin(p, g, m, b, h, part, shares, flags, spoilt);
    } else {
      queries = query_rows(p, m, b, h, flags);
      grads = grads_of(p, g, m, b, h, part, shares, spoilt);
    }
    T* query_sums;
    const bool in_place = place_queries(p, g, m, b, h, part, query_sums);
    if (g.query) std::memset(query_sums, 0, static_cast<size_t>(span.query_rows * width) * sizeof(T));
    const bool turned = AttentionForward<S>::turned(p, span), few = AttentionForward<S>::few(p, span);
    const bool fresh = replaces(p, b) && h % (p.heads / p.kv_heads) == 0;
    if (turned) Turned::turn(p, m, queries, grads, span.queries);
    ScoreRow<T> row = score_row_of(p, b, h);
    for (int64_t c = 0; c < lanes<T>; ++c) m.slope_sums[c] = 0;
    if (g.slope_rows) std::memset(Derivative::slope_row(p, g, b, h, part, 0), 0, static_cast<size_t>(span.queries) * 2 * sizeof(double));
    bool finite = true;
    // Of n keys and the queries [begin, end), which may see some of them.
    const auto block_of_keys = [&](int64_t at, int64_t n, int64_t begin, int64_t end, T* key_sums, T* value_sums) {
      if (at_once && !fresh) zero_rows(0, n, width, key_sums, value_width, value_sums);
      row.valid = n;
      if (tiled) {
        Tiled::template block<EXTRA>(p, g, m, b, h, at, n, begin, end, peaks, shares, row, query_sums, key_sums, value_sums, fresh, flags,
                                     ahead);
        return;
      }
      const Rows<T> keys = key_rows(p, m, b, kv, at, n, flags), values = value_rows(p, m, b, kv, at, n);
      if constexpr (!EXTRA) {
        if (turned) {
          for (int64_t i = begin / attention_block * attention_block; i < end; i += attention_block)
            Turned::template block<false>(p, g, m, b, h, at, n, i, min(attention_block, span.queries - i), queries, grads, keys, values,
                                          row, query_sums, key_sums, value_sums, false, ahead);
          return;
        }
      }
      if (!few) {
        transpose_rows(n, p.width, keys, m.keys_transposed);
        transpose_rows(n, p.value_width, values, m.values_transposed);
      }
      for (int64_t i = begin; i < end; i += queries_at_once)
        block<EXTRA>(p, g, m, b, h, at, i, min(queries_at_once, end - i), queries, grads, keys, values, peaks, shares, row, query_sums,
                     key_sums, value_sums, fresh, ahead);
    };
    for (int64_t at = part_begin; at < min(part_end, span.keys); at += attention_block) {
      const int64_t n = min(attention_block, span.keys - at), local = at_once ? 0 : at - part_begin;
      const int64_t begin = max(int64_t{0}, at - span.diagonal - p.right);
      const int64_t end = min(span.queries, at + n + p.left - span.diagonal);
      if (begin < end)
        block_of_keys(at, n, begin, end, key_sums + local * width, value_sums + local * value_width);
      else if (at_once)
        clear_keys(p, g, b, kv, at, n);
      else if (fresh)
        zero_rows(local, local + n, width, key_sums, value_width, value_sums);
      if (!at_once || begin >= end) continue;
      finite &= !g.key || all_finite(n, width, key_sums, width);
      write_keys(p, g, b, kv, at, n, key_sums, value_sums, spoilt);
    }
    if (g.slopes) {
      double& total = g.slopes[(part * p.batch + b) * p.heads + h] = 0;
      for (int64_t c = 0; c < lanes<T>; ++c) total += m.slope_sums[c];
    }
    if (!g.query) return finite;
    if (!g.query_parts && !in_place) write_rows(span.query_rows, p.width, query_sums, grad_query_of(p, g, b, h), g.query_row);
    return finite && all_finite(span.query_rows, width, query_sums, width);
  }

  // Whether the first head's products replace what is in the sums.
  static bool replaces(const AttentionCall<S>& p, int64_t b) {
    return tiled(p, b) ? Tiled::replaces : AttentionForward<S>::few(p, p.spans[b]);
  }
  // Whether all of a head is one block, turned: nothing is added to sums, and delta comes from the gradients themselves.
  static bool sole(const AttentionCall<S>& p, const AttentionSpan& span) {
    return AttentionForward<S>::turned(p, span) && span.queries && span.keys && span.queries <= attention_block &&
           span.keys <= attention_block;
  }
  // Where the sums of a query head's gradient are made, and whether that is where they are wanted.
  static bool place_queries(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t part,
                            T*& sums) {
    const int64_t width = whole_vectors<T>(p.width);
    sums = g.query_parts ? g.query_parts + (part * p.all_rows() + p.first_row(b, h)) * width : m.query_sums;
    if constexpr (std::is_same_v<S, T>) {
      if (g.query && !g.query_parts && width == p.width && g.query_row == width) {
        sums = grad_query_of(p, g, b, h);
        return true;
      }
    }
    return false;
  }
  static S* grad_query_of(const AttentionCall<S>& p, const AttentionGradients<S>& g, int64_t b, int64_t h) {
    return g.query ? g.query + b * g.query_stride[0] + h * g.query_stride[1] + p.spans[b].query_begin * g.query_row : nullptr;
  }
  static Rows<T> query_rows(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t h, uint8_t* flags) {
    const AttentionSpan& span = p.spans[b];
    return prepare_rows(span.queries, p.width,
                        p.query + b * p.query_stride[0] + h * p.query_stride[1] + span.query_begin * p.query_stride[2], p.query_stride[2],
                        p.query_stride[3], m.query_copies, flags);
  }
  static Rows<T> grad_rows(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h) {
    const AttentionSpan& span = p.spans[b];
    return prepare_rows(span.queries, p.value_width,
                        g.grad_out + b * g.grad_out_stride[0] + h * g.grad_out_stride[1] + span.query_begin * g.grad_out_stride[2],
                        g.grad_out_stride[2], g.grad_out_stride[3], m.grad_copies);
  }
  static Rows<T> key_rows(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t kv, int64_t at, int64_t n, uint8_t* flags) {
    const S* const key = p.key + b * p.key_stride[0] + kv * p.key_stride[1] + (p.spans[b].key_begin + at) * p.key_stride[2];
    return prepare_rows(n, p.width, key, p.key_stride[2], p.key_stride[3], m.key_copies, flags, p.next(p.key_stride));
  }
  static Rows<T> value_rows(const AttentionCall<S>& p, const Memory& m, int64_t b, int64_t kv, int64_t at, int64_t n) {
    const S* const value = p.value + b * p.value_stride[0] + kv * p.value_stride[1] + (p.spans[b].key_begin + at) * p.value_stride[2];
    return prepare_rows(n, p.value_width, value, p.value_stride[2], p.value_stride[3], m.value_copies, nullptr, p.next(p.value_stride));
  }
  // One query head that is one block with its keys; whether its gradients are finite.
  static bool sole_head(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, T* key_sums,
                        T* value_sums, bool add, Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t width = whole_vectors<T>(p.width), kv = h / (p.heads / p.kv_heads);
    T* query_sums;
    const bool in_place = place_queries(p, g, m, b, h, 0, query_sums);
    const Rows<T> queries = query_rows(p, m, b, h, nullptr), grads = grad_rows(p, g, m, b, h);
    const Rows<T> keys = key_rows(p, m, b, kv, 0, span.keys, nullptr), values = value_rows(p, m, b, kv, 0, span.keys);
    Turned::turn(p, m, queries, grads, span.queries);
    ScoreRow<T> row = score_row_of(p, b, h);
    const bool finite = Turned::template block<true>(p, g, m, b, h, 0, span.keys, 0, span.queries, queries, grads, keys, values, row,
                                                     query_sums, key_sums, value_sums, !add, ahead);
    if (g.query) {
      std::memset(query_sums + span.queries * width, 0, static_cast<size_t>((span.query_rows - span.queries) * width) * sizeof(T));
      if (!in_place) write_rows(span.query_rows, p.width, query_sums, grad_query_of(p, g, b, h), g.query_row);
    }
    const int64_t value_width = whole_vectors<T>(p.value_width);
    return finite ||
           ((!g.query || all_finite(span.queries, width, query_sums, width)) && (!g.key || all_finite(span.keys, width, key_sums, width)) &&
            (!g.value || all_finite(span.keys, value_width, value_sums, value_width)));
  }

  // The incoming gradient, with nothing in the rows that see no key, and delta.
  static Rows<T> grads_of(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t part,
                          const T* shares, bool& spoilt) {
    Rows<T> grads = grad_rows(p, g, m, b, h);
    upstream(p, g, m, b, h, part, shares, grads, m.grad_copies, whole_vectors<T>(p.value_width), spoilt);
    return grads;
  }
  // The same, of rows that are there, with copies in rows of `row`.
  template <class R>
  static void upstream(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t part,
                       const T* shares, Rows<R>& grads, R* copies, int64_t row, bool& spoilt) {
    if (p.wide_out)
      upstream(p, g, m, b, h, part, shares, p.wide_out, grads, copies, row, spoilt);
    else
      upstream(p, g, m, b, h, part, shares, static_cast<const S*>(p.out), grads, copies, row, spoilt);
  }
  template <class O, class R>
  static void upstream(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t part,
                       const T* shares, const O* all_out, Rows<R>& grads, R* copies, int64_t copies_row, bool& spoilt) {
    const AttentionSpan& span = p.spans[b];
    const O* const out = all_out + b * p.out_stride[0] + h * p.out_stride[1] + span.query_begin * p.out_stride[2];
    bool dead = false;
    for (int64_t i = 0; i < span.queries; ++i) {
      // In double: a row's delta is taken from every weight's gradient, so that its error doesn't average out.
      LongVec<T> sum = {};
      const O* const row = out + i * p.out_stride[2];
      int64_t c = 0;
      for (; c + lanes<T> <= p.value_width; c += lanes<T>) add_long_product<T>(sum, load(grads.data + i * grads.row + c), load(row + c));
      if (c < p.value_width) add_long_product<T>(sum, load(grads.data + i * grads.row + c), load_partial(row + c, p.value_width - c));
      T delta = total_of(sum);
      if (delta * T(0) != T(0)) (shares[i] == T(0) ? dead : spoilt) = true;
      const T grad_lse = Derivative::grad_of_lse(p, g, b, h, i);
      // A bias that is the same for all keys moves nothing but lse.
      if (!g.bias_stride[3] && part == 0 && shares[i] != T(0)) {
        const int64_t place = b * g.bias_stride[0] + h * g.bias_stride[1] + i * g.bias_stride[2];
        const T grad = delta * T(0) + grad_lse;
        if (g.bias) g.bias[place] += grad;
        if (g.long_bias) g.long_bias[place] += static_cast<double>(grad);
      }
      delta -= grad_lse;
      m.delta[i] = delta;
    }
    if (dead) {
      for (int64_t i = 0; i < span.queries; ++i)
        for (int64_t c = 0; c < copies_row; ++c) copies[i * copies_row + c] = shares[i] == T(0) ? R{} : grads.data[i * grads.row + c];
      grads.data = copies, grads.row = copies_row;
    }
  }

  static void zero_rows(int64_t begin, int64_t end, int64_t width, T* key_sums, int64_t value_width, T* value_sums) {
    std::memset(key_sums + begin * width, 0, static_cast<size_t>((end - begin) * width) * sizeof(T));
    std::memset(value_sums + begin * value_width, 0, static_cast<size_t>((end - begin) * value_width) * sizeof(T));
  }

  // One block of n queries from `first` on with the block of keys from `at` on. With `fresh` nothing is in the sums of keys and values.
  template <bool EXTRA>
  static void block(const AttentionCall<S>& p, const AttentionGradients<S>& g, const Memory& m, int64_t b, int64_t h, int64_t at,
                    int64_t first, int64_t n, const Rows<T>& queries, const Rows<T>& grads, const Rows<T>& keys, const Rows<T>& values,
                    const T* peaks, const T* shares, ScoreRow<T>& row, T* query_sums, T* key_sums, T* value_sums, bool fresh,
                    Ahead& ahead) {
    const AttentionSpan& span = p.spans[b];
    const int64_t width = whole_vectors<T>(p.width), value_width = whole_vectors<T>(p.value_width);
    const bool few = AttentionForward<S>::few(p, span);
    Hull hulls[groups_at_once];
    for (int64_t q = 0; q < n; q += attention_rows) {
      const int64_t rows = min(attention_rows, n - q), i = first + q;
      Hull& hull = hulls[q / attention_rows];
      hull = seen_of(p, b, h, i, i + rows - 1, at);
      T *const weights = m.weights + q * attention_block, *const slopes = m.grads + q * attention_block;
      if (hull.empty()) {
        if (p.mask || p.bias)  // which may show some of it to queries before and after these
          for (T* const rest : {weights, slopes}) std::memset(rest, 0, static_cast<size_t>(rows * attention_block) * sizeof(T));
        continue;
      }
      ahead.step();
      const int64_t columns = hull.end - hull.begin;
      if (few) {
        const int64_t valid = min(hull.end, row.valid) - hull.begin;
        few_products<T>(rows, p.width, queries, i, valid, keys, hull.begin, weights + hull.begin);
        few_products<T>(rows, p.value_width, grads, i, valid, values, hull.begin, slopes + hull.begin);
      } else {
        attention_product<T>(rows, columns,
                             {p.width, queries.data + i * queries.row, queries.row, 1, m.keys_transposed + hull.begin, attention_block,
                              weights + hull.begin, attention_block, false});
        attention_product<T>(rows, columns,
                             {p.value_width, grads.data + i * grads.row, grads.row, 1, m.values_transposed + hull.begin, attention_block,
                              slopes + hull.begin, attention_block, false});
      }
      Derivative::template differentiate_rows<EXTRA, false>(p, g, m, b, h, at, i, rows, hull, peaks, shares, row, weights, slopes);
      if (g.query)
        attention_product<T>(rows, width,
                             {min(hull.end, row.valid) - hull.begin, slopes + hull.begin, attention_block, 1,
                              keys.data + hull.begin * keys.row, keys.row, query_sums + i * width, width, true});
    }
    const int64_t groups = (n + attention_rows - 1) / attention_rows;
    for (int64_t j = 0; j < row.valid && (g.key || g.value); j += attention_rows) {
      const int64_t rows = min(attention_rows, row.valid - j);
      int64_t low = 0, high = groups;
      while (low < high && (hulls[low].empty() || hulls[low].end <= j)) ++low;
      while (high > low && (hulls[high - 1].empty() || hulls[high - 1].begin >= j + rows)) --high;
      if (low == high) {
        if (fresh) zero_rows(j, j + rows, width, key_sums, value_width, value_sums);
        continue;
      }
      const int64_t q = low * attention_rows, depth = min(n, high * attention_rows) - q;
      if (g.value)
        attention_product<T>(rows, value_width,
                             {depth, m.weights + q * attention_block + j, 1, attention_block, grads.data + (first + q) * grads.row,
                              grads.row, value_sums + j * value_width, value_width, !fresh});
      if (g.key)
        attention_product<T>(rows, width,
                             {depth, m.grads + q * attention_block + j, 1, attention_block, queries.data + (first + q) * queries.row,
                              queries.row, key_sums + j * width, width, !fresh});
    }
  }
};
