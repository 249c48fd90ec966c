// Attention's products of bfloat16 (split_planes.h), where the instruction set has any. On the tile unit (split_product.h) they are made
// while the multipliers work on the scores of other rows: the queue's products advance a little between one row and the next. Without one
// they are made on vectors (attention_paired.h).
//
// Factors are three planes, which are worth it on the tile unit alone, or one where they are bfloat16 to begin with: weights and gradients
// of scores are then rounded to it, as in eager torch.
//
// What is not finite is not marked here: its products are not finite, which the kernels look for.

inline constexpr int64_t attention_queries = 96;  // of one head that are looked at together
inline constexpr int64_t tiled_rows = 32;         // a group: two row tiles

// Whether S has such products.
template <class S>
inline constexpr bool tiled_possible =
#if defined(S2S_TILE_UNIT)
    std::is_same_v<compute_t<S>, float>;
#elif defined(S2S_BFLOAT16_PRODUCTS)
    std::is_same_v<S, bfloat16>;
#else
    false;
#endif

#if defined(S2S_BFLOAT16_PRODUCTS)
// Where factors of so many planes lie, in bytes, and what they take, in floats: a step, a right factor's column, all of it, the planes of
// tiled_rows rows.
template <int PLANES>
struct TiledLayout {
  static constexpr int64_t step = PLANES * split_tile;
  static constexpr int64_t column(int64_t steps) { return 64 + steps * step; }
  static constexpr int64_t packed_size(int64_t n, int64_t k) { return split_columns(n) * column(split_steps(k)) / 4; }
  static constexpr int64_t planes(int64_t depth) { return 2 * split_steps(depth) * step / 4; }
};

#if defined(S2S_TILE_UNIT)
template <int PLANES>
class TileQueue {
  using Layout = TiledLayout<PLANES>;
  static constexpr int64_t parts_of_step = PLANES == 1 ? 1 : 4;

 public:
  TileQueue() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~TileQueue() { _tile_release(); }
  TileQueue(const TileQueue&) = delete;

  // to (tiled_rows, columns) = left times right. left: planes of tiled_rows rows, `depth_steps` in all, of which `steps` are taken; right:
  // of a packed factor of right_steps steps those from `first` on; columns: a multiple of 32.
  void add(const float* left, int64_t depth_steps, int64_t steps, const float* right, int64_t right_steps, int64_t first, int64_t columns,
           float* to, int64_t to_row) {
    const char* const a = reinterpret_cast<const char*>(left);
    const int64_t stride = Layout::column(right_steps);
    const char* b = reinterpret_cast<const char*>(right) + 64 + first * Layout::step;
    for (int64_t j = 0; j < columns; j += 32, b += 2 * stride)
      work_[count_++] = {a, a + depth_steps * Layout::step, b, stride, steps, to + j, to_row * 4};
    parts_ += columns / 32 * parts_of_step * steps;
  }
  int64_t parts() const { return parts_; }

  // Until `done` of the parts are.
  __attribute__((noinline)) void advance(int64_t done) {
    for (; done_ < done; ++done_) {
      Work& w = work_[at_];
      const int part = static_cast<int>(done_ % parts_of_step);
      if (part == 0 && w.fresh) split_clear(), w.fresh = false;
      if constexpr (PLANES == 1)
        plane_step(w.a, w.c, w.b, w.b + w.stride);
      else
        split_part(part, w.a, w.c, w.b, w.b + w.stride);
      if (part < parts_of_step - 1) continue;
      w.a += Layout::step, w.c += Layout::step, w.b += Layout::step;
      if (--w.steps) continue;
      _tile_stored(0, w.to, w.to_row);
      _tile_stored(1, w.to + 16, w.to_row);
      _tile_stored(2, w.to + 4 * w.to_row, w.to_row);
      _tile_stored(3, w.to + 4 * w.to_row + 16, w.to_row);
      ++at_;
    }
  }
  void finish() {
    advance(parts_);
    count_ = at_ = parts_ = done_ = 0;
  }

 private:
  struct Work {
    const char *a, *c, *b;
    int64_t stride, steps;
    float* to;
    int64_t to_row;
    bool fresh = true;
  };
  Work work_[8 + 6 * 1024 / 32];  // of backward, for the widest heads
  int64_t count_ = 0, at_ = 0, parts_ = 0, done_ = 0;
};
#endif

// Two vectors of 16 numbers, in turns, as bfloat16.
S2S_INLINE __m512i in_turns(__m512 low, __m512 high) { return split_beside((__m512i)_mm512_cvtne2ps_pbh(high, low)); }
// The same as a line of a factor: element i of `low` stands before element i of `high`. Three planes are cut off, not rounded, so that
// their sum is the number to the bit.
template <int PLANES, bool Right>
S2S_INLINE void put_planes(__m512 low, __m512 high, char* to) {
  if constexpr (PLANES == 1) {
    _mm512_store_si512(to, in_turns(low, high));
    return;
  }
  const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 3
  for (int plane = 0; plane < 3; ++plane) {
    const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_maskz_srli_epi32(-1, (__m512i)low, 16), (__m512i)high);
    _mm512_store_si512(to + (Right ? split_plane(plane) : plane * split_tile), words);
    low = low - (__m512)_mm512_and_epi32((__m512i)low, leading);
    high = high - (__m512)_mm512_and_epi32((__m512i)high, leading);
  }
}

// 32 numbers of a row, of which `valid` are there, as bfloat16.
S2S_INLINE __m512i in_order(const float* from, int64_t valid) {
  return (__m512i)_mm512_cvtne2ps_pbh(split_load(from + 16, valid - 16), split_load(from, valid));
}
S2S_INLINE __m512i in_order(const bfloat16* from, int64_t valid) {
  return valid >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32{1} << valid) - 1, from);
}
// A line of a right factor: 16 numbers of two rows in turns; a null row is 0.
S2S_INLINE __m512i in_turns(const float* even, const float* odd, int64_t valid) {
  return in_turns(even ? split_load(even, valid) : (__m512){}, odd ? split_load(odd, valid) : (__m512){});
}
S2S_INLINE __m512i in_turns(const bfloat16* even, const bfloat16* odd, int64_t valid) {
  const __mmask16 some = static_cast<__mmask16>(valid >= 16 ? 0xffff : (1 << valid) - 1);
  const auto words = [some](const bfloat16* from) {
    return from ? _mm512_maskz_cvtepu16_epi32(-1, _mm256_maskz_loadu_epi16(some, from)) : __m512i{};
  };
  return _mm512_or_epi32(words(even), _mm512_maskz_slli_epi32(-1, words(odd), 16));
}

// to (rows, width) = from times a number.
inline void tiled_scale(int64_t rows, int64_t width, const float* from, int64_t from_row, float scale, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += lanes<float>) store(to + i * width + c, load(from + i * from_row + c) * scale);
}
// The planes of at most tiled_rows rows.
template <int PLANES>
void tiled_split(int64_t rows, int64_t depth, const float* from, int64_t from_row, float* planes) {
  if constexpr (PLANES == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      char* to = reinterpret_cast<char*>(planes) + i / 16 * split_steps(depth) * split_tile + i % 16 * 64;
      for (int64_t k = 0; k < depth; k += 32, to += split_tile) _mm512_store_si512(to, in_order(from + i * from_row + k, depth - k));
    }
    return;
  }
  SplitLeft left{};
  left.data = reinterpret_cast<char*>(planes);
  split_left(rows, depth, from, from_row, left);
}

// n <= attention_block rows as columns of a right factor.
template <int PLANES, class R>
void tiled_pack_columns(int64_t n, int64_t depth, const Rows<R>& rows, float* packed, int64_t next = 0) {
  if constexpr (PLANES == 1) {
    for (int64_t j = 0; j < 16 * split_columns(n); j += 16) {
      char* to = reinterpret_cast<char*>(packed) + j / 16 * TiledLayout<1>::column(split_steps(depth)) + 64;
      if (next) prefetch_rows(16, depth, rows.data + j * rows.row + next, rows.row);
      for (int64_t k = 0; k < depth; k += 32, to += split_tile) {
        __m512i lines[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) lines[i] = j + i < n ? in_order(rows.data + (j + i) * rows.row + k, depth - k) : __m512i{};
        split_transpose(lines, to);
      }
    }
  } else {
    for (int64_t j = 0; j < split_columns(n); ++j)
      split_pack_column(j, depth, n - 16 * j, S2S_LAMBDA(int64_t i) { return rows.data + (16 * j + i) * rows.row; }, packed);
  }
}
// The same as its rows, of attention_block in all and in the order of put_planes.
template <int PLANES, class R>
void tiled_pack_rows(int64_t n, int64_t columns, const Rows<R>& rows, float* packed) {
  using Layout = TiledLayout<PLANES>;
  constexpr int64_t steps = split_steps(attention_block);
  for (int64_t j = 0; j < split_columns(columns); ++j) {
    char* const to = reinterpret_cast<char*>(packed) + j * Layout::column(steps) + 64;
    const auto row = S2S_LAMBDA(int64_t k) { return k < n ? rows.data + k * rows.row + 16 * j : nullptr; };
    for (int64_t k = 0; k < n; k += 32)
      for (int64_t line = 0; line < 16; ++line) {
        char* const place = to + k / 32 * Layout::step + line * 64;
        const R *const even = row(k + line), *const odd = row(k + line + 16);
        if constexpr (PLANES == 1)
          _mm512_store_si512(place, in_turns(even, odd, max(columns - 16 * j, int64_t{0})));
        else
          split_pair<true>(even, odd, columns - 16 * j, place);
      }
  }
}
#endif
