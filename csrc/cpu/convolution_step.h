// One position: lanes hold outputs, so that each sum is the one of the whole form, by its rule of order. The weights lie with their
// reduction contiguous; a panel of rows is turned over in registers on its way, then serves every row of the batch.

static constexpr int64_t panel_vectors = 4;

// V vectors of sums, each of chains.
template <class C, int V>
struct ChainSum {
  Vec<C> chain[V], total[V];
  int64_t left = chain_terms;  // terms that the chain still takes
  bool several = false;

  // Before a term.
  inline __attribute__((always_inline)) void make_room() {
    if (left) return;
    end_chain();
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) chain[v] = Vec<C>{};
    left = chain_terms, several = true;
  }
  // The sums, in `total`.
  inline __attribute__((always_inline)) void end_chain() {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[v] = several ? total[v] + chain[v] : chain[v];
  }
};

#if defined(__x86_64__)
// v[i] lane l = the element `column + i` of row l, rows `stride` apart: sixteen bytes of each of the rows i, i + 4, ... at a time, so that
// what is left is a 4 by 4 transposition within 128 bits. at(row) gives a row.
template <class Row>
S2S_INLINE void load_columns(const Row& at, int64_t column, Vec<float> (&v)[4]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#if S2S_VECTOR_BYTES == 16
    v[i] = (Vec<float>)_mm_loadu_ps(at(i) + column);
#elif S2S_VECTOR_BYTES == 32
    v[i] = (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(i) + column)), _mm_loadu_ps(at(i + 4) + column), 1);
#else
    v[i] = (Vec<float>)_mm512_insertf32x4(
        _mm512_insertf32x4(_mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(at(i) + column)), _mm_loadu_ps(at(i + 4) + column), 1),
                           _mm_loadu_ps(at(i + 8) + column), 2),
        _mm_loadu_ps(at(i + 12) + column), 3);
#endif
  }
  const auto a = S2S_MM(unpacklo_ps)(v[0], v[1]), b = S2S_MM(unpackhi_ps)(v[0], v[1]);
  const auto d = S2S_MM(unpacklo_ps)(v[2], v[3]), e = S2S_MM(unpackhi_ps)(v[2], v[3]);
  v[0] = (Vec<float>)S2S_MM(shuffle_ps)(a, d, 0x44);
  v[1] = (Vec<float>)S2S_MM(shuffle_ps)(a, d, 0xee);
  v[2] = (Vec<float>)S2S_MM(shuffle_ps)(b, e, 0x44);
  v[3] = (Vec<float>)S2S_MM(shuffle_ps)(b, e, 0xee);
}
#endif

// Columns [0, n) of `rows` rows, as to[column place][lane]; the places are k * channels + c for the column c * taps + k.
template <class S>
S2S_INLINE void turn_panel(const S* from, int64_t rows, int64_t channels, int64_t taps, compute_t<S>* to) {
  using C = compute_t<S>;
  constexpr int64_t width = panel_vectors * lanes<C>;
  const int64_t columns = channels * taps;
  int64_t column = 0;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, float>) {
    for (int64_t lane = 0; lane < width; lane += lanes<C>) {
      const float* row[lanes<C>];
      for (int i = 0; i < lanes<C>; ++i) row[i] = from + min(lane + i, rows - 1) * columns;
      int64_t c = 0, k = 0;
      for (column = 0; column + 4 <= columns; column += 4) {
        Vec<float> v[4];
        load_columns(S2S_LAMBDA(int i) { return row[i]; }, column, v);
        for (int i = 0; i < 4; ++i) {
          store(to + (k * channels + c) * width + lane, v[i]);
          if (++k == taps) k = 0, ++c;
        }
      }
    }
  }
#endif
  for (; column < columns; ++column)
    for (int64_t lane = 0; lane < width; ++lane)
      to[(column % taps * channels + column / taps) * width + lane] = to_compute(from[min(lane, rows - 1) * columns + column]);
}

#if defined(__x86_64__)
// One row of the batch uses each weight once: what belongs to the oldest tap is multiplied as it is turned over, the rest waits in `later`
// for its place in the chain. One vector of outputs from `output` on, of which `weight` holds the rows. K taps, or any where K is 0; the
// columns are a multiple of what the loop turns over at once. `ahead` is what comes next in memory, of ahead_lines lines: it is asked for
// early and in equal parts, since few of these rows' lines follow one another as the processor would expect.
template <int K>
static void step_once(const ConvolutionStep<float>& p, const float* weight, int64_t channels, int64_t channel, int64_t output, float* later,
                      const char* ahead, int64_t ahead_lines) {
  constexpr int64_t n = lanes<float>, block = K == 3 ? 3 : 1;
  const int64_t taps = K ? K : p.taps, columns = channels * taps, ahead_step = (ahead_lines * 4 + columns - 1) / columns;
  const float* x = p.tap[0] + channel;
  ChainSum<float, 1> sum;
  sum.chain[0] = p.bias ? load(p.bias + output) : Vec<float>{};
  const auto add = S2S_LAMBDA(Vec<float> w, float in) {
    sum.make_room();
    sum.chain[0] = fma(w, broadcast(in), sum.chain[0]);
    --sum.left;
  };
  int64_t c = 0, k = 0;
  for (int64_t column = 0; column < columns; column += 4 * block) {
#pragma GCC unroll 3
    for (int64_t part = 0; part < block; ++part) {
      for (int64_t i = min(ahead_step, ahead_lines); i > 0; --i, --ahead_lines, ahead += 64) __builtin_prefetch(ahead, 0, 3);
      Vec<float> v[4];
      load_columns(S2S_LAMBDA(int i) { return weight + i * columns; }, column + part * 4, v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const int64_t place = part * 4 + i, tap = K ? place % taps : k, at = K ? c + place / taps : c;
        if (tap == 0)
          add(v[i], x[at]);
        else
          store(later + ((tap - 1) * channels + at) * n, v[i]);
        if (!K && ++k == taps) k = 0, ++c;
      }
    }
    if (K) c += 4 * block / taps;
  }
  for (k = 1; k < taps; ++k) {
    x = p.tap[k] + channel;
    for (c = 0; c < channels; ++c, later += n) add(load(later), x[c]);
  }
  sum.end_chain();
  store(p.u + output, sum.total[0]);
}

// Vectors of outputs from `first` on, as many as are whole; returns how many outputs they are.
S2S_INLINE int64_t step_once_rows(const ConvolutionStep<float>& p, int64_t group, int64_t first, int64_t count, float* later) {
  constexpr int64_t n = lanes<float>;
  const int64_t channels = p.channels / p.groups, columns = channels * p.taps;
  const int64_t begin = group * (p.outputs / p.groups) + first, lines = n * columns * static_cast<int64_t>(sizeof(float)) / 64;
  const auto once = p.taps == 1                        ? step_once<1>
                    : p.taps == 2                      ? step_once<2>
                    : p.taps == 3 && channels % 4 == 0 ? step_once<3>
                    : p.taps == 4                      ? step_once<4>
                                                       : step_once<0>;
  int64_t done = 0;
  for (; done + n <= count; done += n) {
    const int64_t output = begin + done;
    const float* weight = p.weight + output * columns;
    if (output + 2 * n <= p.outputs)
      once(p, weight, channels, group * channels, output, later, reinterpret_cast<const char*>(weight + n * columns), lines);
    else
      once(p, weight, channels, group * channels, output, later, p.ahead, p.ahead_bytes / 64);
  }
  return done;
}
#endif

// V vectors of outputs for one row of the batch, of which `sum` holds the bias; the weights of a column lie `width` after those of the one
// before. What is linearly ahead in memory is asked for, where `Ahead`.
template <int V, bool Ahead, class S, class W>
S2S_INLINE void multiply_panel(const ConvolutionStep<S>& p, int64_t row, int64_t channel, int64_t channels, const W* w, int64_t width,
                               ChainSum<compute_t<S>, V>& sum) {
  using C = compute_t<S>;
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(W)), distance = 32 * line;
  for (int64_t k = 0; k < p.taps; ++k) {
    const S* x = p.tap[k] + row * p.tap_batch[k] + channel;
    for (int64_t c = 0; c < channels;) {
      sum.make_room();
      const int64_t until = min(channels, c + sum.left);
      for (sum.left -= until - c; c < until; ++c, w += width) {
        if constexpr (Ahead)
          for (int64_t i = 0; i < V * lanes<C>; i += line) __builtin_prefetch(w + distance + i, 0, 3);
        const Vec<C> in = broadcast(to_compute(x[c]));
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum.chain[v] = fma(load(w + v * lanes<C>), in, sum.chain[v]);
      }
    }
  }
  sum.end_chain();
}

template <class S, int V>
S2S_INLINE void store_sums(compute_t<S>* u, const Vec<compute_t<S>> (&sum)[V], int64_t count) {
  constexpr int64_t n = lanes<compute_t<S>>;
  for (int v = 0; v < V && v * n < count; ++v) store_partial(u + v * n, sum[v], min(count - v * n, n));
}

// Outputs [first, first + count) of a group for every row of the batch, count <= panel_vectors vectors.
template <class S>
void step_panel(const ConvolutionStep<S>& p, int64_t group, int64_t first, int64_t count, compute_t<S>* panel) {
  using C = compute_t<S>;
  constexpr int64_t width = panel_vectors * lanes<C>;
  const int64_t channels = p.channels / p.groups, output = group * (p.outputs / p.groups) + first;
  turn_panel(p.weight + output * channels * p.taps, count, channels, p.taps, panel);
  Vec<C> start[panel_vectors] = {};
  if (p.bias)
    for (int v = 0; v < panel_vectors; ++v)
      if (count > v * lanes<C>) start[v] = load_spread(p.bias + output + v * lanes<C>, 1, count - v * lanes<C>);
  for (int64_t b = 0; b < p.batch; ++b) {
    ChainSum<C, panel_vectors> sum;
    for (int v = 0; v < panel_vectors; ++v) sum.chain[v] = start[v];
    multiply_panel<panel_vectors, false>(p, b, group * channels, channels, panel, width, sum);
    store_sums<S>(p.u + b * p.outputs + output, sum.total, count);
  }
}

// V vectors of outputs, `count` of them wanted, of a packed panel.
template <int V, class S>
void step_packed_vectors(const ConvolutionStep<S>& p, int64_t output, int64_t count, const S* panel, int64_t width) {
  using C = compute_t<S>;
  for (int64_t b = 0; b < p.batch; ++b) {
    ChainSum<C, V> sum;
    for (int v = 0; v < V; ++v) sum.chain[v] = load(panel + v * lanes<C>);
    if (b == 0)
      multiply_panel<V, true>(p, b, 0, p.channels, panel + width, width, sum);
    else
      multiply_panel<V, false>(p, b, 0, p.channels, panel + width, width, sum);
    store_sums<S>(p.u + b * p.outputs + output, sum.total, count);
  }
}

// Outputs [first, first + count) of packed weights: the part of a panel, whose vectors are taken eight, four, two and one at a time.
template <class S>
void step_packed(const ConvolutionStep<S>& p, int64_t first, int64_t count) {
  constexpr int64_t n = lanes<compute_t<S>>;
  const S* panel = p.packed + first * (p.channels * p.taps + 1);
  const int64_t width = packed_step_width(count);
  int64_t at = 0;
  for (; at + 8 * n <= width; at += 8 * n) step_packed_vectors<8>(p, first + at, count - at, panel + at, width);
  for (; at + 4 * n <= width; at += 4 * n) step_packed_vectors<4>(p, first + at, count - at, panel + at, width);
  for (; at + 2 * n <= width; at += 2 * n) step_packed_vectors<2>(p, first + at, count - at, panel + at, width);
  for (; at < width; at += n) step_packed_vectors<1>(p, first + at, count - at, panel + at, width);
}

// Depthwise: lanes are channels, inputs are no longer shared. Channels [first, first + count).
template <class S>
void step_depthwise(const ConvolutionStep<S>& p, int64_t first, int64_t count, compute_t<S>* panel) {
  using C = compute_t<S>;
  for (int64_t at = first; at < first + count; at += lanes<C>) {
    const int64_t n = min(lanes<C>, first + count - at);
    for (int64_t k = 0; k < p.taps; ++k)
      for (int64_t lane = 0; lane < lanes<C>; ++lane)
        panel[k * lanes<C> + lane] = to_compute(p.weight[(at + min(lane, n - 1)) * p.taps + k]);
    const Vec<C> start = p.bias ? load_spread(p.bias + at, 1, n) : Vec<C>{};
    for (int64_t b = 0; b < p.batch; ++b) {
      ChainSum<C, 1> sum;
      sum.chain[0] = start;
      for (int64_t k = 0; k < p.taps; ++k, --sum.left) {
        sum.make_room();
        sum.chain[0] = fma(load(panel + k * lanes<C>), load_spread(p.tap[k] + b * p.tap_batch[k] + at, 1, n), sum.chain[0]);
      }
      sum.end_chain();
      store_partial(p.u + b * p.outputs + at, sum.total[0], n);
    }
  }
}

template <class S>
void step_rows(const ConvolutionStep<S>& p, int64_t group, int64_t first, int64_t count, compute_t<S>* panel) {
  using C = compute_t<S>;
  constexpr int64_t width = panel_vectors * lanes<C>;
  if (p.packed) {
    step_packed(p, first, count);
    return;
  }
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, float>) {
    if (p.batch == 1 && p.channels / p.groups * p.taps % 4 == 0) {
      const int64_t done = step_once_rows(p, group, first, count, panel);
      first += done, count -= done;
    }
  }
#endif
  for (int64_t at = first; at < first + count; at += width) step_panel(p, group, at, min(width, first + count - at), panel);
}

// y[b] = activation(u[b] + condition[b]) + residual[b].
template <class S>
void step_finish(Activation activation, compute_t<S>* u, int64_t batch, int64_t outputs, const S* condition, int64_t condition_batch,
                 int64_t condition_stride, const S* residual, int64_t residual_batch, int64_t residual_stride, S* y) {
  const int64_t results = is_gate(activation) ? outputs / 2 : outputs;
  for (int64_t b = 0; b < batch; ++b) {
    compute_t<S>* line = u + b * outputs;
    if (condition) add_line(line, condition + b * condition_batch, condition_stride, outputs);
    finish_line(activation, line, line + results, residual ? residual + b * residual_batch : nullptr, residual_stride, y + b * results,
                results);
  }
}

template <class S>
void add_lines(S* to, const S* from, int64_t n) {
  using C = compute_t<S>;
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) store(to + i, load(to + i) + load(from + i));
  if (i < n) store_partial(to + i, load_partial(to + i, n - i) + load_partial(from + i, n - i), n - i);
}

template <class S>
struct ConvolutionStepKernels {
  static constexpr auto rows = &step_rows<S>;
  static constexpr auto depthwise = &step_depthwise<S>;
  static constexpr auto finish = &step_finish<S>;
  static constexpr auto add = &add_lines<S>;
};
