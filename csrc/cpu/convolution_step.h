// One position: lanes hold outputs, so that each chain (bias, taps oldest first, channels ascending) is the one of the whole form. The
// weights lie with their reduction contiguous; a panel of rows is turned over in registers on its way, then serves every row of the batch.

static constexpr int64_t panel_vectors = 4;

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
// for its place in the chain. Two vectors of outputs from `output` on, of which `weight` holds the rows; columns a multiple of four.
inline constexpr int64_t once_rows = 2 * lanes<float>;
static void step_once(const ConvolutionStep<float>& p, const float* weight, int64_t channels, int64_t channel, int64_t output, float* later,
                      const char*& ahead, int64_t ahead_lines) {
  const int64_t columns = channels * p.taps;
  const float* x = p.tap[0] + channel;
  Vec<float> sum[2] = {};
  if (p.bias) sum[0] = load(p.bias + output), sum[1] = load(p.bias + output + lanes<float>);
  int64_t c = 0, k = 0;
  for (int64_t column = 0; column < columns; column += 4) {
    for (int64_t i = 0; i < ahead_lines; ++i, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    Vec<float> v[2][4];
    load_columns(S2S_LAMBDA(int i) { return weight + i * columns; }, column, v[0]);
    load_columns(S2S_LAMBDA(int i) { return weight + (lanes<float> + i) * columns; }, column, v[1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      if (k == 0) {
        const Vec<float> in = broadcast(x[c]);
        sum[0] = fma(v[0][i], in, sum[0]), sum[1] = fma(v[1][i], in, sum[1]);
      } else {
        float* const to = later + ((k - 1) * channels + c) * once_rows;
        store(to, v[0][i]), store(to + lanes<float>, v[1][i]);
      }
      if (++k == p.taps) k = 0, ++c;
    }
  }
  for (k = 1; k < p.taps; ++k) {
    x = p.tap[k] + channel;
    for (c = 0; c < channels; ++c, later += once_rows) {
      const Vec<float> in = broadcast(x[c]);
      sum[0] = fma(load(later), in, sum[0]), sum[1] = fma(load(later + lanes<float>), in, sum[1]);
    }
  }
  store(p.u + output, sum[0]), store(p.u + output + lanes<float>, sum[1]);
}
#endif

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
    Vec<C> sum[panel_vectors];
    for (int v = 0; v < panel_vectors; ++v) sum[v] = start[v];
    const C* w = panel;
    for (int64_t k = 0; k < p.taps; ++k) {
      const S* x = p.tap[k] + b * p.tap_batch[k] + group * channels;
      for (int64_t c = 0; c < channels; ++c, w += width) {
        const Vec<C> in = broadcast(to_compute(x[c]));
        for (int v = 0; v < panel_vectors; ++v) sum[v] = fma(load(w + v * lanes<C>), in, sum[v]);
      }
    }
    C* u = p.u + b * p.outputs + output;
    for (int v = 0; v < panel_vectors && v * lanes<C> < count; ++v)
      store_partial(u + v * lanes<C>, sum[v], min(count - v * lanes<C>, lanes<C>));
  }
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
      Vec<C> sum = start;
      for (int64_t k = 0; k < p.taps; ++k)
        sum = fma(load(panel + k * lanes<C>), load_spread(p.tap[k] + b * p.tap_batch[k] + at, 1, n), sum);
      store_partial(p.u + b * p.outputs + at, sum, n);
    }
  }
}

template <class S>
void step_rows(const ConvolutionStep<S>& p, int64_t group, int64_t first, int64_t count, compute_t<S>* panel) {
  using C = compute_t<S>;
  constexpr int64_t width = panel_vectors * lanes<C>;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<S, float>) {
    const int64_t channels = p.channels / p.groups, columns = channels * p.taps, outputs = p.outputs / p.groups;
    if (p.batch == 1 && columns % 4 == 0) {
      // What follows in memory comes nearer while this is worked on, in equal parts.
      const char* ahead = p.ahead + first * p.ahead_bytes / p.outputs;
      const int64_t lines = (p.ahead_bytes * once_rows * 4 + p.outputs * columns * 64 - 1) / (p.outputs * columns * 64);
      for (; count >= once_rows; first += once_rows, count -= once_rows) {
        const int64_t output = group * outputs + first;
        step_once(p, p.weight + output * columns, channels, group * channels, output, panel, ahead, lines);
      }
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
