// Direct convolution: registers hold a block of outputs by a stretch of time, weights are broadcast, inputs are loaded where they lie,
// shifted by their tap. The rule of order: terms are taken taps oldest first, channels ascending, in chains of chain_terms, the first of
// which starts from the bias; what chains come to is added up in their order. Nothing else touches a chain: a position that is absent for a
// tap is blended out, so that neither tiling nor threads nor chunks show in the bits.

// Some channels of one tap of a tile: lane i of channel c reads x[c * stride + i]; only lanes in [from, to) are present. `row` is that of
// its first weights: channels of earlier taps and of earlier pieces of this one.
template <class C>
struct Piece {
  const C* x;
  int64_t stride, from, to, row, channels;
};

// Lanes [from, to) of a vector, in the form in which masked operations take them.
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
template <class C>
using Present = std::conditional_t<sizeof(C) == 4, __mmask16, __mmask8>;
#else
template <class C>
using Present = Mask<C>;
#endif

template <class C>
S2S_INLINE Present<C> lanes_between(int64_t from, int64_t to) {
  const int64_t first = max<int64_t>(0, min(from, lanes<C>)), last = max<int64_t>(0, min(to, lanes<C>));
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  return static_cast<Present<C>>(((1u << last) - 1) & ~((1u << first) - 1));
#else
  using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  const Vec<I> lane = iota<I>();
  return (lane >= broadcast(static_cast<I>(first))) & (lane < broadcast(static_cast<I>(last)));
#endif
}

// Lanes [from, to) of a vector, 0 elsewhere; the memory of the others isn't touched.
template <class C>
S2S_INLINE Vec<C> load_between(const C* x, Present<C> present, int64_t from, int64_t to) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 32
  if constexpr (sizeof(C) == 4) return _mm256_maskload_ps(x, (__m256i)present);
  if constexpr (sizeof(C) == 8) return _mm256_maskload_pd(x, (__m256i)present);
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4) return _mm512_maskz_loadu_ps(present, x);
  if constexpr (sizeof(C) == 8) return _mm512_maskz_loadu_pd(present, x);
#endif
  Vec<C> v{};
  for (int64_t i = max<int64_t>(0, from); i < min(to, lanes<C>); ++i) v[i] = x[i];
  return v;
}

// a * b + c where a lane is present, c elsewhere.
template <class C>
S2S_INLINE Vec<C> fma_where(Present<C> present, Vec<C> a, Vec<C> b, Vec<C> c) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  if constexpr (sizeof(C) == 4) return _mm512_mask3_fmadd_ps(a, b, c, present);
  if constexpr (sizeof(C) == 8) return _mm512_mask3_fmadd_pd(a, b, c, present);
#else
  return select(present, fma(a, b, c), c);
#endif
}

// u[r * u_stride + lane] for R outputs and V vectors of lanes from `at`; weights [k][c][R] of the block, start (R), or null: the chains are
// added to what u holds.
template <int R, int V, class C>
void accumulate(const Piece<C>* pieces, int64_t first, int64_t last, const C* weights, const C* start, int64_t at, C* u, int64_t u_stride) {
  Vec<C> sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = start ? broadcast(start[r]) : Vec<C>{};
  bool add_to = !start;
  const auto end_chain = S2S_LAMBDA() {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        C* const to = u + r * u_stride + at + v * lanes<C>;
        store(to, add_to ? load(to) + sum[r][v] : sum[r][v]);
        sum[r][v] = Vec<C>{};
      }
    add_to = true;
  };
  const auto add_piece = S2S_LAMBDA(const Piece<C>& piece, const auto& take, const auto& add) {
    const C *w = weights + piece.row * R, *x = piece.x + at;
    const int64_t stride = piece.stride, channels = piece.channels;
    for (int64_t c = 0; c < channels; ++c, x += stride, w += R) {
      Vec<C> in[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) in[v] = take(v, x + v * lanes<C>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<C> scale = broadcast(w[r]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sum[r][v] = add(v, scale, in[v], sum[r][v]);
      }
    }
  };
  int64_t chain = start ? 0 : pieces[first].row / chain_terms;
  for (const Piece<C>* piece = pieces + first; piece < pieces + last; ++piece) {
    if (piece->row / chain_terms != chain) {
      end_chain();
      chain = piece->row / chain_terms;
    }
    const int64_t from = piece->from - at, to = piece->to - at;
    if (from <= 0 && to >= V * lanes<C>) {
      add_piece(
          *piece, S2S_LAMBDA(int, const C* x) { return load(x); }, S2S_LAMBDA(int, Vec<C> a, Vec<C> b, Vec<C> c) { return fma(a, b, c); });
    } else {
      Present<C> present[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) present[v] = lanes_between<C>(from - v * lanes<C>, to - v * lanes<C>);
      add_piece(
          *piece, S2S_LAMBDA(int v, const C* x) { return load_between<C>(x, present[v], from - v * lanes<C>, to - v * lanes<C>); },
          S2S_LAMBDA(int v, Vec<C> a, Vec<C> b, Vec<C> c) { return fma_where<C>(present[v], a, b, c); });
    }
  }
  end_chain();
}

template <int R, int V, class C>
void accumulate_lanes(const Piece<C>* pieces, int64_t count, const C* weights, const C* start, int64_t at, C* u, int64_t u_stride) {
  const int64_t until = at + V * lanes<C>;
  // Taps follow each other in time, so those with a present lane are neighbours.
  int64_t first = 0, last = count;
  while (first < last && (pieces[first].to <= at || pieces[first].from >= until)) ++first;
  while (first < last && (pieces[last - 1].to <= at || pieces[last - 1].from >= until)) --last;
  if (start || first < last) accumulate<R, V>(pieces, first, last, weights, start, at, u, u_stride);
}

template <int R, class C>
void accumulate_rows(const Piece<C>* pieces, int64_t count, const C* weights, const C* start, int64_t width, C* u, int64_t u_stride) {
  constexpr int V = S2S_VECTOR_BYTES == 64 || R <= 2 ? 4 : 2;  // as many accumulators as registers allow
  int64_t at = 0;
  for (; at + V * lanes<C> <= width; at += V * lanes<C>) accumulate_lanes<R, V>(pieces, count, weights, start, at, u, u_stride);
  if (V == 4 && at + 2 * lanes<C> <= width) {  // fewer accumulators would wait for one another
    accumulate_lanes<R, 2>(pieces, count, weights, start, at, u, u_stride);
    at += 2 * lanes<C>;
  }
  for (; at < width; at += lanes<C>) accumulate_lanes<R, 1>(pieces, count, weights, start, at, u, u_stride);
}

template <class C>
void accumulate_block(int64_t rows, const Piece<C>* pieces, int64_t count, const C* weights, const C* start, int64_t width, C* u,
                      int64_t u_stride) {
  switch (rows) {
    case 1:
      return accumulate_rows<1>(pieces, count, weights, start, width, u, u_stride);
    case 2:
      return accumulate_rows<2>(pieces, count, weights, start, width, u, u_stride);
    case 3:
      return accumulate_rows<3>(pieces, count, weights, start, width, u, u_stride);
    case 4:
      return accumulate_rows<4>(pieces, count, weights, start, width, u, u_stride);
    case 5:
      return accumulate_rows<5>(pieces, count, weights, start, width, u, u_stride);
    default:
      return accumulate_rows<6>(pieces, count, weights, start, width, u, u_stride);
  }
}

#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
// What lies `on` elements after the first of two vectors, as an index into both.
template <class C>
S2S_INLINE __m512i index_on(int64_t on) {
  using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  return (__m512i)(iota<I>() + broadcast(static_cast<I>(on)));
}

S2S_INLINE Vec<float> between(__m512i index, Vec<float> first, Vec<float> second) { return _mm512_permutex2var_ps(first, index, second); }
S2S_INLINE Vec<double> between(__m512i index, Vec<double> first, Vec<double> second) {
  return _mm512_permutex2var_pd(first, index, second);
}
#endif

// sum[v] += w times the v'th vector from x on. Most vectors that start anywhere lie in two cache lines: those lines are read once each,
// from where they begin, which stays within memory that holds something of x.
template <int V, class C>
S2S_INLINE void add_vectors(Vec<C> w, const C* x, Vec<C> (&sum)[V]) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  const int64_t bytes = reinterpret_cast<uintptr_t>(x) % 64, on = bytes / int64_t{sizeof(C)};
  if (on && bytes % sizeof(C) == 0) {
    const __m512i index = index_on<C>(on);
    Vec<C> first = load(x - on);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<C> second = load(x - on + (v + 1) * lanes<C>);
      sum[v] = fma(w, between(index, first, second), sum[v]);
      first = second;
    }
    return;
  }
#endif
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = fma(w, load(x + v * lanes<C>), sum[v]);
}

// One channel, K taps, all lanes of [at, width) present: inputs are read and outputs written once, past the cache where `stream`.
template <int K, class C>
void accumulate_line(const Piece<C>* taps, int64_t count, const C* weights, C start, int64_t at, int64_t width, C* u, bool streams) {
  constexpr int V = 4;
  Vec<C> scale[K ? K : 1];
  const C* x[K ? K : 1];
  for (int k = 0; k < K; ++k) scale[k] = broadcast(weights[k]), x[k] = taps[k].x;
  const int64_t step = V * lanes<C>;
  if (reinterpret_cast<uintptr_t>(u + at) % S2S_VECTOR_BYTES != 0) streams = false;
  for (; at < width; at += step) {
    Vec<C> sum[V];
    for (int v = 0; v < V; ++v) sum[v] = broadcast(start);
    if constexpr (K > 0) {
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) add_vectors<V, C>(scale[k], x[k] + at, sum);
    } else {
      for (int64_t k = 0; k < count; ++k) add_vectors<V, C>(broadcast(weights[k]), taps[k].x + at, sum);
    }
    for (int v = 0; v < V; ++v) {
      if (streams)
        stream(u + at + v * lanes<C>, sum[v]);
      else
        store(u + at + v * lanes<C>, sum[v]);
    }
  }
}

template <class C>
void accumulate_depthwise(const Piece<C>* taps, int64_t count, const C* weights, const C* start, int64_t width, C* u, bool stream) {
  constexpr int64_t step = 4 * lanes<C>;
  int64_t from = 0, to = width;
  for (int64_t k = 0; k < count; ++k) from = max(from, taps[k].from), to = min(to, taps[k].to);
  from = min(width, (from + step - 1) / step * step);
  to = from + max<int64_t>(0, to - from) / step * step;
  int64_t at = 0;
  for (; at + step <= from; at += step) accumulate_lanes<1, 4>(taps, count, weights, start, at, u, 0);
  if (to > from && at == from) {
    switch (count) {
      case 2:
        accumulate_line<2>(taps, count, weights, start[0], from, to, u, stream);
        break;
      case 3:
        accumulate_line<3>(taps, count, weights, start[0], from, to, u, stream);
        break;
      case 4:
        accumulate_line<4>(taps, count, weights, start[0], from, to, u, stream);
        break;
      default:
        accumulate_line<0>(taps, count, weights, start[0], from, to, u, stream);
    }
    at = to;
  }
  for (; at + step <= width; at += step) accumulate_lanes<1, 4>(taps, count, weights, start, at, u, 0);
  for (; at < width; at += lanes<C>) accumulate_lanes<1, 1>(taps, count, weights, start, at, u, 0);
}

// Positions [at, at + width) of some channels as rows `width` apart, 0 outside [from, to), which are lanes.
template <class In, class Out>
void gather_positions(const Convolution<In, Out>& p, int64_t b, int64_t channel, int64_t channels, int64_t at, int64_t from, int64_t to,
                      int64_t width, compute_t<In>* rows) {
  using C = compute_t<In>;
  const int64_t split = max(from, min(to, -at));  // lanes before it lie in `before`
  for (int64_t c = 0; c < channels; ++c) {
    C* row = rows + c * width;
    for (int64_t i = 0; i < from; ++i) row[i] = C(0);
    for (int64_t i = to; i < width; ++i) row[i] = C(0);
    if (from < split) {
      const In* x = p.before.data + b * p.before.batch + (channel + c) * p.before.channel + (at + p.span) * p.before.time;
      for (int64_t i = from; i < split; ++i) row[i] = to_compute(x[i * p.before.time]);
    }
  }
  const In* x = p.in.data + b * p.in.batch + channel * p.in.channel + at * p.in.time;
  if (p.in.time == 1) {
    for (int64_t c = 0; c < channels; ++c, x += p.in.channel) {
      int64_t i = split;
      for (; i + lanes<C> <= to; i += lanes<C>) {
        __builtin_prefetch(x + 8 * p.in.channel + i);  // rows may be pages apart, where nothing else brings them nearer
        store(rows + c * width + i, load(x + i));
      }
      for (; i < to; ++i) rows[c * width + i] = to_compute(x[i]);
    }
  } else {
    for (int64_t i = split; i < to; ++i)
      for (int64_t c = 0; c < channels; ++c) rows[c * width + i] = to_compute(x[i * p.in.time + c * p.in.channel]);
  }
}

// What becomes of the accumulated rows of a block, `u_stride` apart: `output` names the output that each is.
template <class In, class Out>
void finish_block(const Convolution<In, Out>& p, int64_t b, int64_t t0, int64_t width, int64_t kept, int64_t rows, const int64_t* output,
                  compute_t<In>* u, int64_t u_stride) {
  using C = compute_t<In>;
  const int64_t at = t0 - p.begin, length = p.end - p.begin;
  for (int64_t r = 0; r < rows; ++r) {
    if (p.condition.data)
      add_line(u + r * u_stride, p.condition.data + b * p.condition.batch + output[r] * p.condition.channel + t0 * p.condition.time,
               p.condition.time, kept);
    if (!p.saved) continue;
    C* saved = p.saved + (b * p.outputs + output[r]) * length + at;
    std::memcpy(saved, u + r * u_stride, kept * sizeof(C));
    for (int64_t i = kept; i < width; ++i) saved[i] = C(0);
  }
  if (!p.out.data) return;
  for (int64_t r = 0; r < (is_gate(p.activation) ? rows / 2 : rows); ++r) {
    Out* y = p.out.data + b * p.out.batch + output[r] * p.out.channel + at;
    const Out* residual =
        p.residual.data ? p.residual.data + b * p.residual.batch + output[r] * p.residual.channel + t0 * p.residual.time : nullptr;
    finish_line(p.activation, u + r * u_stride, u + (r + rows / 2) * u_stride, residual, p.residual.time, y, kept);
    for (int64_t i = kept; i < width; ++i) y[i] = from_compute<Out>(C(0));
  }
}

// Outputs t in [t0, t0 + width) of one group of one row of the batch. Scratch as Tiles allots it.
template <class In, class Out>
void convolution_tile(const Convolution<In, Out>& p, int64_t b, int64_t group, int64_t t0, int64_t width, void* piece_memory,
                      compute_t<In>* rows, compute_t<In>* u) {
  using C = compute_t<In>;
  static_assert(sizeof(Piece<C>) == piece_size);
  Piece<C>* pieces = static_cast<Piece<C>*>(piece_memory);
  const int64_t channels = p.channels / p.groups, outputs = p.outputs / p.groups, channel = group * channels;
  const int64_t high = p.high(b), low = p.low();
  const int64_t kept = p.clip ? max<int64_t>(0, min(width, high - t0)) : width;
  const int64_t padded = (kept + lanes<C> - 1) / lanes<C> * lanes<C>;

  const int64_t reach = (p.taps - 1) * p.dilation;  // from the first tap to the last; negative for the gradient
  const int64_t earliest = t0 + p.origin + min<int64_t>(0, reach), shared_width = padded + max(reach, -reach);
  // Taps near each other may share their lines, which are then read across their ends unless the dilation is whole vectors: few taps have a
  // copy each, within the cache.
  const bool big = needs_stages<C>(p.taps * channels, padded, outputs, p.rows);
  const bool aligned = p.dilation % lanes<C> == 0 || p.taps == 1;
  const bool near = max(p.dilation, -p.dilation) < padded && (aligned || p.taps * channels * padded * int64_t{sizeof(C)} > stage_bytes);
  const bool staged = big && !(near && channels * shared_width * int64_t{sizeof(C)} <= stage_bytes + (4 << 10));
  // Channels whose rows lie a large power of two apart crowd into few of the first-level cache's sets (of 64, 12 lines each), more so where
  // taps read across lines: copies serve several blocks of outputs.
  const int64_t most = stage_rows<C>(padded) / chain_terms * chain_terms, at_once = staged ? min(most, p.taps * channels) : channels;
  const int64_t stride = p.in.channel * int64_t{sizeof(In)}, lines = padded * int64_t{sizeof(In)} / 64 + 1;
  const int64_t sets = min<int64_t>(64, 4096 / max<int64_t>(64, min<int64_t>(4096, stride & -stride)) * lines);
  const bool crowded = at_once * lines > 12 * sets && (staged || channels <= 128) &&
                       outputs >= (near && !aligned ? 4
                                   : staged         ? stage_blocks
                                                    : 16) *
                                      p.rows;
  const bool direct = std::is_same_v<In, C> && p.in.time == 1 && !crowded;
  const bool shared = !direct && near && !staged;
  if (shared && kept) {
    const int64_t from = max<int64_t>(0, min(shared_width, low - earliest)), to = max(from, min(shared_width, high - earliest));
    gather_positions(p, b, channel, channels, earliest, from, to, shared_width, rows);
  }
  int64_t count = 0;
  for (int64_t k = 0; k < p.taps && kept; ++k)
    for (int64_t c = 0, here; c < channels; c += here) {
      const int64_t at = t0 + p.origin + k * p.dilation, row = k * channels + c;
      here = min(channels - c, chain_terms - row % chain_terms);
      Piece<C>& piece = pieces[count++];
      piece.x = nullptr, piece.stride = padded, piece.row = row, piece.channels = here;
      piece.from = max<int64_t>(0, min(padded, low - at));
      piece.to = max(piece.from, min(padded, high - at));
      if (shared) {
        piece.x = rows + c * shared_width + (at - earliest), piece.stride = shared_width;
      } else if (direct && (at >= 0 || !p.before.data)) {
        if constexpr (std::is_same_v<In, C>) piece.x = p.in.data + b * p.in.batch + (channel + c) * p.in.channel + at;
        piece.stride = p.in.channel;
      }
    }

  const bool plain = std::is_same_v<Out, C> && p.activation == Activation::none && !p.condition.data && !p.residual.data && !p.saved &&
                     p.out.data && padded == kept;
  const bool gate = is_gate(p.activation);
  const int64_t half = p.outputs / 2;
  // The inputs of the tile after this one, some with each block of outputs: rows may be pages apart, where nothing else fetches them.
  const int64_t next = t0 + width + p.origin + max<int64_t>(0, reach);
  const bool more = channels > 1 && p.in.time == 1 && next >= 0 && next + width <= high;
  const In* next_row = p.in.data + b * p.in.batch + channel * p.in.channel + next;
  const int64_t next_rows = more ? (channels * p.rows + outputs - 1) / outputs : 0;
  int64_t asked = 0, first = 0, last = 0;
  do {  // a stage: as many pieces as the first-level cache holds; all blocks of outputs pass over it
    C* own = rows;
    for (const int64_t begin = first < count ? pieces[first].row : 0; last < count; ++last) {
      Piece<C>& piece = pieces[last];
      if (staged && piece.row % chain_terms == 0 && piece.row - begin >= most) break;
      if (piece.x) continue;
      if (piece.from < piece.to)
        gather_positions(p, b, channel + piece.row % channels, piece.channels, t0 + p.origin + piece.row / channels * p.dilation,
                         piece.from, piece.to, padded, own);
      piece.x = own;
      own += piece.channels * padded;
    }
    for (int64_t done = 0; done < outputs; done += p.rows) {
      for (const int64_t until = min(channels, asked + next_rows); last == count && asked < until; ++asked, next_row += p.in.channel)
        for (int64_t i = 0; i < width; i += 64 / int64_t{sizeof(In)}) __builtin_prefetch(next_row + i, 0, 2);
      const int64_t rows_here = min(p.rows, outputs - done);
      C start[6] = {};
      int64_t output[6];  // the output that each row of the block is
      for (int64_t r = 0; r < rows_here; ++r) {
        output[r] = group * outputs + done + r;
        if (gate) output[r] = r < rows_here / 2 ? done / 2 + r : half + done / 2 + (r - rows_here / 2);
        if (p.bias) start[r] = p.bias[output[r]];
      }
      const C* weights = p.weights + (group * outputs + done) * channels * p.taps;
      C* to = staged ? u + done * padded : u;
      int64_t to_stride = padded;
      if constexpr (std::is_same_v<Out, C>)  // what is accumulated is the result
        if (plain) to = p.out.data + b * p.out.batch + output[0] * p.out.channel + t0 - p.begin, to_stride = p.out.channel;
      if (rows_here == 1 && channels == 1 && p.taps <= chain_terms)
        accumulate_depthwise(pieces, p.taps, weights, start, padded, to, plain && p.stream);
      else
        accumulate_block(rows_here, pieces + first, last - first, weights, first ? nullptr : start, padded, to, to_stride);
      if (last < count) continue;
      if (!plain) {
        finish_block(p, b, t0, width, kept, rows_here, output, to, padded);
        continue;
      }
      if constexpr (std::is_same_v<Out, C>)
        for (int64_t r = 0; r < rows_here; ++r)
          for (int64_t i = kept; i < width; ++i) to[r * to_stride + i] = C(0);
    }
    first = last;
  } while (last < count);
}

template <class In, class Out>
struct ConvolutionKernels {
  static void end_of_stream() { stream_end(); }
  static constexpr auto tile = &convolution_tile<In, Out>;
  static constexpr auto finish =
      static_cast<void (*)(Activation, const compute_t<Out>*, const compute_t<Out>*, const Out*, int64_t, Out*, int64_t)>(
          &finish_line<Out>);
};
