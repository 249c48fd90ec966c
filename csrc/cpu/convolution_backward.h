// Gradients of the activation and of the weights. The gradient with respect to the input is a convolution too: convolution_tile does it.

// The gradient with respect to what enters the activation, for one result channel of one row of the batch: n positions into `a` (and `b`
// under a gate). `saved_b` and `b` are read and written under a gate only.
template <Activation A, class S>
void activation_gradient_line(const S* grad, int64_t grad_stride, const compute_t<S>* saved_a, const compute_t<S>* saved_b, compute_t<S>* a,
                              compute_t<S>* b, int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const int64_t left = n - i;
    Vec<C> before_a{}, before_b{}, grad_b{};
    if constexpr (A != Activation::none) before_a = left >= lanes<C> ? load(saved_a + i) : load_partial(saved_a + i, left);
    if constexpr (is_gate(A)) before_b = left >= lanes<C> ? load(saved_b + i) : load_partial(saved_b + i, left);
    const Vec<C> grad_a = activate_gradient<A, C>(load_spread(grad + i * grad_stride, grad_stride, left), before_a, before_b, &grad_b);
    if (left >= lanes<C>)
      store(a + i, grad_a);
    else
      store_partial(a + i, grad_a, left);
    if constexpr (is_gate(A)) {
      if (left >= lanes<C>)
        store(b + i, grad_b);
      else
        store_partial(b + i, grad_b, left);
    }
  }
}

template <class S>
void activation_gradient(Activation activation, const S* grad, int64_t grad_stride, const compute_t<S>* saved_a,
                         const compute_t<S>* saved_b, compute_t<S>* a, compute_t<S>* b, int64_t n) {
  switch (activation) {
    case Activation::none:
      return activation_gradient_line<Activation::none>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::relu:
      return activation_gradient_line<Activation::relu>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::silu:
      return activation_gradient_line<Activation::silu>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::gelu:
      return activation_gradient_line<Activation::gelu>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::tanh:
      return activation_gradient_line<Activation::tanh>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::glu:
      return activation_gradient_line<Activation::glu>(grad, grad_stride, saved_a, saved_b, a, b, n);
    case Activation::gated_tanh:
      return activation_gradient_line<Activation::gated_tanh>(grad, grad_stride, saved_a, saved_b, a, b, n);
  }
}

// The same from what came out of the activation, for relu and tanh.
template <class S>
void activation_gradient_from_output(Activation activation, const S* grad, int64_t grad_stride, const S* y, compute_t<S>* a, int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const Vec<C> g = load_spread(grad + i * grad_stride, grad_stride, n - i), out = load_spread(y + i, 1, n - i);
    const Vec<C> v = activation == Activation::relu ? select(out <= C(0), Vec<C>{}, g) : g * (C(1) - out * out);
    if (n - i >= lanes<C>)
      store(a + i, v);
    else
      store_partial(a + i, v, n - i);
  }
}

// sum[r][c] += grad row r . x row c over n positions; R N accumulators of a vector each.
template <int R, int N, class C>
void add_products(const C* grad, int64_t grad_stride, const C* x, int64_t x_stride, int64_t n, C* sum, int64_t sum_row,
                  int64_t sum_column) {
  Vec<C> part[R][N] = {};
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) {
    Vec<C> in[N];
    for (int c = 0; c < N; ++c) in[c] = load(x + c * x_stride + i);
    for (int r = 0; r < R; ++r) {
      const Vec<C> g = load(grad + r * grad_stride + i);
      for (int c = 0; c < N; ++c) part[r][c] = fma(g, in[c], part[r][c]);
    }
  }
  if (i < n) {
    Vec<C> in[N];
    for (int c = 0; c < N; ++c) in[c] = load_partial(x + c * x_stride + i, n - i);
    for (int r = 0; r < R; ++r) {
      const Vec<C> g = load_partial(grad + r * grad_stride + i, n - i);
      for (int c = 0; c < N; ++c) part[r][c] = fma(g, in[c], part[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < N; ++c) sum[r * sum_row + c * sum_column] += hsum(part[r][c]);
}

// One row by one row: four accumulators hide the latency.
template <class C>
C dot(const C* a, const C* b, int64_t n) {
  Vec<C> part[4] = {};
  int64_t i = 0;
  for (; i + 4 * lanes<C> <= n; i += 4 * lanes<C>)
    for (int v = 0; v < 4; ++v) part[v] = fma(load(a + i + v * lanes<C>), load(b + i + v * lanes<C>), part[v]);
  for (; i + lanes<C> <= n; i += lanes<C>) part[0] = fma(load(a + i), load(b + i), part[0]);
  if (i < n) part[0] = fma(load_partial(a + i, n - i), load_partial(b + i, n - i), part[0]);
  return hsum((part[0] + part[1]) + (part[2] + part[3]));
}

template <int R, class C>
void add_product_columns(const C* grad, int64_t grad_stride, const C* x, int64_t x_stride, int64_t channels, int64_t n, C* sum,
                         int64_t sum_row, int64_t sum_column) {
  int64_t c = 0;
  for (; c + 3 <= channels; c += 3)
    add_products<R, 3>(grad, grad_stride, x + c * x_stride, x_stride, n, sum + c * sum_column, sum_row, sum_column);
  if (channels - c == 2) add_products<R, 2>(grad, grad_stride, x + c * x_stride, x_stride, n, sum + c * sum_column, sum_row, sum_column);
  if (channels - c == 1) add_products<R, 1>(grad, grad_stride, x + c * x_stride, x_stride, n, sum + c * sum_column, sum_row, sum_column);
}

// The rows [first, first + count), count <= 4, of a group of few channels: a fixed order over the batch, stretches of time, taps and
// channels.
template <class C>
void weight_gradient_rows(const WeightGradient<C>& p, int64_t group, int64_t first, int64_t count) {
  constexpr int64_t stretch = 512;
  const int64_t channels = p.channels / p.groups, output = group * (p.outputs / p.groups) + first;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t high = p.high[b];
    const C* grad = p.grad.data + b * p.grad.batch + output * p.grad.channel;
    const C* x = p.x.data + b * p.x.batch + group * channels * p.x.channel;
    for (int64_t t = 0; t < high; t += stretch) {
      const int64_t until = min(t + stretch, high);
      for (int64_t k = 0; k < p.taps; ++k) {
        const int64_t shift = p.origin + k * p.dilation;
        const int64_t from = max(t, p.low - shift), to = min(until, high - shift);
        if (from >= to) continue;
        const C* rows = grad + from;
        const C* columns = x + from + shift;
        C* sum = p.grad_weight + (k * p.outputs + output) * channels;
        const int64_t n = to - from;
        if (count == 1 && channels == 1) {
          *sum += dot(rows, columns, n);
          continue;
        }
        switch (count) {
          case 1:
            add_product_columns<1>(rows, p.grad.channel, columns, p.x.channel, channels, n, sum, channels, 1);
            break;
          case 2:
            add_product_columns<2>(rows, p.grad.channel, columns, p.x.channel, channels, n, sum, channels, 1);
            break;
          case 3:
            add_product_columns<3>(rows, p.grad.channel, columns, p.x.channel, channels, n, sum, channels, 1);
            break;
          default:
            add_product_columns<4>(rows, p.grad.channel, columns, p.x.channel, channels, n, sum, channels, 1);
        }
      }
      if (p.grad_bias) add_row_sums(grad + t, p.grad.channel, count, until - t, p.grad_bias + output);
    }
  }
}

// ---- channels that leave much of a product's vectors empty: products of rows, over time ----
// Outputs and channels of a block, whose sums fill the registers.
inline constexpr int weight_block = S2S_VECTOR_BYTES == 64 ? 5 : 3;

// The share of multiply-adds that count.
constexpr double weight_block_use(int64_t outputs, int64_t channels) {
  const auto use = [](int64_t n) {
    return static_cast<double>(n) / static_cast<double>((n + weight_block - 1) / weight_block * weight_block);
  };
  return 0.9 * use(outputs) * use(channels);
}
// Not for float64, which is there to be compared with the definition's own sums, whose order is that of products, nor for so few positions
// that adding the lanes of a block takes as long as its products.
template <class C>
bool weight_blocks_pay(int64_t outputs, int64_t channels, int64_t positions) {
  const int64_t panel = gemm_nr<C>, columns = (channels + panel - 1) / panel * panel;
  return sizeof(C) == 4 && positions >= 64 * lanes<C> &&
         weight_block_use(outputs, channels) * static_cast<double>(columns) > static_cast<double>(channels);
}

// total[r][c] += grad row r times x row c over n positions, lane by lane.
template <class C>
S2S_INLINE void add_block(const C* const* grad, const C* const* x, int64_t n, C* total) {
  constexpr int B = weight_block;
  Vec<C> sum[B][B] = {};
  const auto multiply = S2S_LAMBDA(const auto& take) {
    Vec<C> in[B];
#pragma GCC unroll 8
    for (int c = 0; c < B; ++c) in[c] = take(x[c]);
#pragma GCC unroll 8
    for (int r = 0; r < B; ++r) {
      const Vec<C> g = take(grad[r]);
#pragma GCC unroll 8
      for (int c = 0; c < B; ++c) sum[r][c] = fma(g, in[c], sum[r][c]);
    }
  };
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) multiply(S2S_LAMBDA(const C* from) { return load(from + i); });
  if (i < n) multiply(S2S_LAMBDA(const C* from) { return load_partial(from + i, n - i); });
  for (int r = 0; r < B; ++r)
    for (int c = 0; c < B; ++c) {
      C* const to = total + (r * B + c) * lanes<C>;
      store(to, load(to) + sum[r][c]);
    }
}

// Elements of scratch for the sums of a block of outputs.
template <class C>
int64_t weight_block_scratch(int64_t channels, int64_t taps) {
  return taps * ((channels + weight_block - 1) / weight_block) * weight_block * weight_block * lanes<C>;
}

// The rows [first, first + count), count <= weight_block, of a group. Stretches of time are summed lane by lane, one after another.
template <class C>
void weight_gradient_blocks(const WeightGradient<C>& p, int64_t group, int64_t first, int64_t count, C* totals) {
  constexpr int64_t stretch = 512, B = weight_block, block = B * B * lanes<C>;
  const int64_t channels = p.channels / p.groups, output = group * (p.outputs / p.groups) + first, blocks = (channels + B - 1) / B;
  std::memset(totals, 0, static_cast<size_t>(weight_block_scratch<C>(channels, p.taps)) * sizeof(C));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t high = p.high[b];
    const C* const grad = p.grad.data + b * p.grad.batch + output * p.grad.channel;
    const C* const x = p.x.data + b * p.x.batch + group * channels * p.x.channel;
    for (int64_t t = 0; t < high; t += stretch) {
      const int64_t until = min(t + stretch, high);
      for (int64_t j = 0; j < blocks; ++j)
        for (int64_t k = 0; k < p.taps; ++k) {
          const int64_t shift = p.origin + k * p.dilation, from = max(t, p.low - shift), to = min(until, high - shift);
          if (from >= to) continue;
          const C *rows[B], *columns[B];  // what isn't there is what is, and left out
          for (int64_t r = 0; r < B; ++r) {
            rows[r] = grad + min(r, count - 1) * p.grad.channel + from;
            columns[r] = x + min(j * B + r, channels - 1) * p.x.channel + from + shift;
          }
          add_block(rows, columns, to - from, totals + (k * blocks + j) * block);
        }
      if (p.grad_bias) add_row_sums(grad + t, p.grad.channel, count, until - t, p.grad_bias + output);
    }
  }
  for (int64_t k = 0; k < p.taps; ++k)
    for (int64_t j = 0; j < blocks; ++j)
      for (int64_t r = 0; r < count; ++r)
        for (int64_t c = j * B; c < min((j + 1) * B, channels); ++c)
          p.grad_weight[(k * p.outputs + output + r) * channels + c] +=
              hsum(load(totals + (k * blocks + j) * block + (r * B + c - j * B) * lanes<C>));
}

// ---- many channels: a matrix product for each tap, positions being what is summed over ----
// The channels of one panel of row b of the batch, positions in rows: panel[(t - low) * gemm_nr + c]. A tap is then an offset into it.
template <class C>
void pack_input_panel(const WeightGradient<C>& p, int64_t b, int64_t group, int64_t index, C* panel) {
  const int64_t channels = p.channels / p.groups, first = index * gemm_nr<C>, depth = p.high[b] - p.low;
  const C* x = p.x.data + b * p.x.batch + (group * channels + first) * p.x.channel + p.low;
  pack_panels(depth, min(channels - first, gemm_nr<C>), x, 1, p.x.channel, panel, depth * gemm_nr<C>);
}

// The rows [first, first + count) of a group, for row b of the batch. `panels` are those of the group, panel_stride apart; `left` holds
// count (gemm_kc + gemm_row_pad).
template <class C>
void weight_gradient_products(const WeightGradient<C>& p, int64_t b, int64_t group, int64_t first, int64_t count, const C* panels,
                              int64_t panel_stride, C* left) {
  constexpr int64_t left_row = gemm_kc + gemm_row_pad;
  const int64_t channels = p.channels / p.groups, output = group * (p.outputs / p.groups) + first, high = p.high[b];
  const C* grad = p.grad.data + b * p.grad.batch + output * p.grad.channel;
  for (int64_t t = 0; t < high; t += gemm_kc) {
    const int64_t until = min(t + gemm_kc, high);
    copy_rows(count, until - t, grad + t, p.grad.channel, left, left_row);
    for (int64_t k = 0; k < p.taps; ++k) {
      const int64_t shift = p.origin + k * p.dilation;
      const int64_t from = max(t, p.low - shift), to = min(until, high - shift);
      if (from >= to) continue;
      gemm_block<C>(count, channels, to - from, left + (from - t), left_row, panels + (from + shift - p.low) * gemm_nr<C>, panel_stride,
                    gemm_nr<C>, p.grad_weight + (k * p.outputs + output) * channels, channels, true);
    }
    if (p.grad_bias) add_row_sums(left, left_row, count, until - t, p.grad_bias + output);
  }
}

template <class S>
struct ConvolutionGradientKernels {
  static constexpr auto widen = &widen_line<S>;
  static constexpr auto narrow = &narrow_line<S>;
  static constexpr auto activation = &activation_gradient<S>;
  static constexpr auto activation_from_output = &activation_gradient_from_output<S>;
  static constexpr auto weight_rows = &weight_gradient_rows<compute_t<S>>;
  static constexpr auto weight_blocks = &weight_gradient_blocks<compute_t<S>>;
  static constexpr auto blocks_pay = &weight_blocks_pay<compute_t<S>>;
  static constexpr auto block_scratch = &weight_block_scratch<compute_t<S>>;
  static constexpr int64_t block_rows = weight_block;
  static constexpr int64_t panel_columns = gemm_nr<compute_t<S>>, left_row = gemm_kc + gemm_row_pad;
  static constexpr auto pack_input = &pack_input_panel<compute_t<S>>;
  static constexpr auto weight_products = &weight_gradient_products<compute_t<S>>;
};
