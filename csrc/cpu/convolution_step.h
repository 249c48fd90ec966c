// One position: lanes hold outputs, so that each chain (bias, taps oldest first, channels ascending) is the one of the whole form. The
// weights lie with their reduction contiguous; a panel of rows is turned over in registers on its way, then serves every row of the batch.

static constexpr int64_t panel_vectors = 4;

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
      // Sixteen bytes of each of rows i, i + 4, ... at a time: what is left is a 4 by 4 transposition within 128 bits.
      const float* row[4][lanes<C> / 4];
      for (int i = 0; i < 4; ++i)
        for (int64_t j = 0; j < lanes<C> / 4; ++j) row[i][j] = from + min(lane + i + 4 * j, rows - 1) * columns;
      int64_t c = 0, k = 0;
      for (column = 0; column + 4 <= columns; column += 4) {
        float* place[4];
        for (int i = 0; i < 4; ++i) {
          place[i] = to + (k * channels + c) * width + lane;
          if (++k == taps) k = 0, ++c;
        }
        Vec<float> v[4];
        for (int i = 0; i < 4; ++i) {
#if S2S_VECTOR_BYTES == 16
          v[i] = (Vec<float>)_mm_loadu_ps(row[i][0] + column);
#elif S2S_VECTOR_BYTES == 32
          v[i] = (Vec<float>)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[i][0] + column)),
                                                  _mm_loadu_ps(row[i][1] + column), 1);
#else
          v[i] = (Vec<float>)_mm512_insertf32x4(
              _mm512_insertf32x4(
                  _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(row[i][0] + column)), _mm_loadu_ps(row[i][1] + column), 1),
                  _mm_loadu_ps(row[i][2] + column), 2),
              _mm_loadu_ps(row[i][3] + column), 3);
#endif
        }
        const auto a = S2S_MM(unpacklo_ps)(v[0], v[1]), b = S2S_MM(unpackhi_ps)(v[0], v[1]);
        const auto d = S2S_MM(unpacklo_ps)(v[2], v[3]), e = S2S_MM(unpackhi_ps)(v[2], v[3]);
        store(place[0], (Vec<float>)S2S_MM(shuffle_ps)(a, d, 0x44));
        store(place[1], (Vec<float>)S2S_MM(shuffle_ps)(a, d, 0xee));
        store(place[2], (Vec<float>)S2S_MM(shuffle_ps)(b, e, 0x44));
        store(place[3], (Vec<float>)S2S_MM(shuffle_ps)(b, e, 0xee));
      }
    }
  }
#endif
  for (; column < columns; ++column)
    for (int64_t lane = 0; lane < width; ++lane)
      to[(column % taps * channels + column / taps) * width + lane] = to_compute(from[min(lane, rows - 1) * columns + column]);
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
