// The gradients of a dense convolution on the tile unit (split_product.h), where the instruction set has one. Forward stays on the
// multipliers: its chains are those of single steps.

// grad_bias[output + r] += the sum of row r over n positions.
template <class C>
void add_row_sums(const C* grad, int64_t grad_stride, int64_t count, int64_t n, C* grad_bias) {
  for (int64_t r = 0; r < count; ++r) {
    Vec<C> part{};
    const C* row = grad + r * grad_stride;
    int64_t i = 0;
    for (; i + lanes<C> <= n; i += lanes<C>) part = part + load(row + i);
    if (i < n) part = part + load_partial(row + i, n - i);
    grad_bias[r] += hsum(part);
  }
}

template <class C>
struct TiledGradients {
  static constexpr int64_t stretch = 256, most_left = 8;  // positions of a tile; row blocks of a task

  // Whether the products of so many outputs and channels are faster from planes. Who decides must not ask how they are split: they round
  // otherwise than on the multipliers.
  static bool pays(int64_t outputs, int64_t channels, int64_t time) {
#if defined(S2S_TILE_UNIT)
    // Splitting takes the time of outputs + channels, products that of outputs * channels: 64 and 128 gain a tenth, 64 and 64 lose as much.
    return std::is_same_v<C, float> && time >= 128 && outputs * channels >= 40 * (outputs + channels);
#else
    return false;
#endif
  }

#if defined(S2S_TILE_UNIT)
  static constexpr int64_t most_rows = most_left * split_mc;

  // ---- weights: outputs by channels for each tap, positions being what is summed over ----
  static int64_t weight_scratch(int64_t rows, int64_t channels) {  // elements
    return split_workspace(split_mc, split_kc) * (1 + (rows + split_mc - 1) / split_mc) + split_packed_size(channels, split_kc) + 16;
  }

  // The rows [first, first + count) of a group, count <= most_rows.
  static void weights(const WeightGradient<C>& p, int64_t group, int64_t first, int64_t count, C* scratch) {
    if constexpr (std::is_same_v<C, float>) {
      const int64_t channels = p.channels / p.groups, output = group * (p.outputs / p.groups) + first;
      const int64_t blocks = (count + split_mc - 1) / split_mc;
      SplitLeft left[most_left], part = split_left_in(scratch);
      scratch += split_workspace(split_mc, split_kc);
      for (int64_t i = 0; i < blocks; ++i, scratch += split_workspace(split_mc, split_kc)) left[i] = split_left_in(scratch);
      float* const right = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
      for (int64_t b = 0; b < p.batch; ++b) {
        const float* const grad = p.grad.data + b * p.grad.batch + output * p.grad.channel;
        const float* const x = p.x.data + b * p.x.batch + group * channels * p.x.channel;
        for (int64_t t = 0, until; t < p.high[b]; t = until) {
          until = min(t + split_kc, p.high[b]);
          for (int64_t i = 0; i < blocks; ++i) split_rows_of(grad, p.grad.channel, i, count, t, until, left[i]);
          for (int64_t k = 0; k < p.taps; ++k) {
            const int64_t shift = p.origin + k * p.dilation, from = max(t, p.low - shift), to = min(until, p.high[b] - shift);
            if (from >= to) continue;
            for (int64_t j = 0; j < split_columns(channels); ++j)
              split_pack_column(
                  j, to - from, channels - 16 * j, S2S_LAMBDA(int64_t i) { return x + (16 * j + i) * p.x.channel + from + shift; }, right);
            for (int64_t i = 0; i < blocks; ++i) {
              const bool whole = from == t && to == until;
              if (!whole) split_rows_of(grad, p.grad.channel, i, count, from, to, part);
              float* const sum = p.grad_weight + (k * p.outputs + output + i * split_mc) * channels;
              split_block(whole ? left[i] : part, channels, right, split_steps(to - from), 0, sum, channels, true, false);
            }
          }
          if (p.grad_bias) add_row_sums(grad + t, p.grad.channel, count, until - t, p.grad_bias + output);
        }
      }
    }
  }

  // ---- inputs: a product for each tap, the outputs' channels being what is summed over ----
  // Elements of the planes of weights (outputs, taps * channels), and of scratch for a thread.
  static int64_t planes(int64_t outputs, int64_t channels, int64_t taps) {
    return taps * each(outputs) * each_depth(channels) * (split_workspace(split_mc, split_kc) + left_head / 4) + 16;
  }
  static int64_t input_scratch() { return split_packed_size(stretch, split_kc) + 16; }

  // weights (taps, channels, outputs).
  static void split_weights(int64_t outputs, int64_t channels, int64_t taps, const C* weights, C* to) {
    if constexpr (std::is_same_v<C, float>)
      for (int64_t k = 0; k < taps; ++k)
        for (int64_t c = 0; c < channels; c += split_kc)
          for (int64_t row = 0; row < outputs; row += split_mc) {
            SplitLeft* const left = left_at(to, outputs, channels, k, c, row);
            *left = split_left_in(reinterpret_cast<float*>(reinterpret_cast<char*>(left) + left_head));
            split_left_transposed(min(split_mc, outputs - row), min(split_kc, channels - c), weights + (k * channels + c) * outputs + row,
                                  outputs, *left);
          }
  }

  // Whether each tap is present at all positions of a tile, or at none.
  template <class Out>
  static bool serves(const Convolution<C, Out>& p, int64_t b, int64_t t0, int64_t width) {
    if (!std::is_same_v<C, float> || !std::is_same_v<Out, float> || (p.clip && t0 + width > p.high(b))) return false;
    for (int64_t k = 0; k < p.taps; ++k) {
      const int64_t at = t0 + p.origin + k * p.dilation;
      if (at + width > p.low() && at < p.high(b) && (at < p.low() || at + width > p.high(b))) return false;
    }
    return true;
  }

  template <class Out>
  static void inputs(const Convolution<C, Out>& p, int64_t b, int64_t group, int64_t t0, int64_t width, const C* planes, C* scratch) {
    if constexpr (std::is_same_v<C, float> && std::is_same_v<Out, float>) {
      const int64_t channels = p.channels / p.groups, outputs = p.outputs / p.groups;
      float* const y = p.out.data + b * p.out.batch + group * outputs * p.out.channel + t0 - p.begin;
      float* const right = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch) + 63) / 64 * 64);
      bool add = false;
      for (int64_t k = 0; k < p.taps; ++k) {
        const int64_t at = t0 + p.origin + k * p.dilation;
        if (at < p.low() || at + width > p.high(b)) continue;
        for (int64_t c = 0; c < channels; c += split_kc) {
          const int64_t depth = min(split_kc, channels - c), stride = p.in.channel;
          const float* const x = p.in.data + b * p.in.batch + (group * channels + c) * stride + at;
          split_unmark(width, depth, right);
          for (int64_t i = 0; i < depth; i += 2)
            split_pack_pair(i, depth, width, x + i * stride, i + 1 < depth ? x + (i + 1) * stride : nullptr, right);
          split_pack_rest(depth, depth, width, right);
          for (int64_t row = 0; row < outputs; row += split_mc)
            split_block(*left_at(const_cast<float*>(planes), outputs, channels, k, c, row), width, right, split_steps(depth), 0,
                        y + row * p.out.channel, p.out.channel, add, false);
          add = true;
        }
      }
      for (int64_t r = 0; r < outputs && !add; ++r)
        for (int64_t i = 0; i < width; ++i) y[r * p.out.channel + i] = 0;
    }
  }

 private:
  static constexpr int64_t left_head = (static_cast<int64_t>(sizeof(SplitLeft)) + 63) / 64 * 64;

  static int64_t each(int64_t outputs) { return (outputs + split_mc - 1) / split_mc; }
  static int64_t each_depth(int64_t channels) { return (channels + split_kc - 1) / split_kc; }
  static SplitLeft* left_at(float* planes, int64_t outputs, int64_t channels, int64_t k, int64_t c, int64_t row) {
    const int64_t size = split_workspace(split_mc, split_kc) + left_head / 4;
    float* const first = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(planes) + 63) / 64 * 64);
    return reinterpret_cast<SplitLeft*>(first + ((k * each_depth(channels) + c / split_kc) * each(outputs) + row / split_mc) * size);
  }
  // Block i of `count` rows over positions [from, to).
  static void split_rows_of(const float* grad, int64_t stride, int64_t i, int64_t count, int64_t from, int64_t to, SplitLeft& left) {
    split_left(min(split_mc, count - i * split_mc), to - from, grad + i * split_mc * stride + from, stride, left);
  }
#else
  static constexpr int64_t most_rows = 1;
  static int64_t weight_scratch(int64_t, int64_t) { return 0; }
  static void weights(const WeightGradient<C>&, int64_t, int64_t, int64_t, C*) {}
  static int64_t planes(int64_t, int64_t, int64_t) { return 0; }
  static int64_t input_scratch() { return 0; }
  static void split_weights(int64_t, int64_t, int64_t, const C*, C*) {}
  template <class Out>
  static bool serves(const Convolution<C, Out>&, int64_t, int64_t, int64_t) {
    return false;
  }
  template <class Out>
  static void inputs(const Convolution<C, Out>&, int64_t, int64_t, int64_t, int64_t, const C*, C*) {}
#endif
};
