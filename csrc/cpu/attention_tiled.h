// Attention's products on the tile unit (split_product.h), where the instruction set has one, are made while the multipliers work on the
// scores of other rows: the queue's products advance a little between one row and the next.
//
// What is not finite is not marked here: its products are not finite, which the kernels look for.

inline constexpr int64_t attention_queries = 96;  // of one head that are looked at together
inline constexpr int64_t tiled_rows = 32;         // a group: two row tiles

#if defined(S2S_TILE_UNIT)
// The planes of tiled_rows rows.
constexpr int64_t tiled_planes(int64_t depth) { return 2 * split_steps(depth) * split_step / 4; }

class TileQueue {
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
    const int64_t stride = split_column(right_steps);
    const char* b = reinterpret_cast<const char*>(right) + 64 + first * split_step;
    for (int64_t j = 0; j < columns; j += 32, b += 2 * stride)
      work_[count_++] = {a, a + depth_steps * split_step, b, stride, steps, to + j, to_row * 4};
    parts_ += columns / 32 * 4 * steps;
  }
  int64_t parts() const { return parts_; }

  // Until `done` of the parts are.
  __attribute__((noinline)) void advance(int64_t done) {
    for (; done_ < done; ++done_) {
      Work& w = work_[at_];
      const int part = static_cast<int>(done_ % 4);
      if (part == 0 && w.fresh) split_clear(), w.fresh = false;
      split_part(part, w.a, w.c, w.b, w.b + w.stride);
      if (part < 3) continue;
      w.a += split_step, w.c += split_step, w.b += split_step;
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

// Two vectors of 16 numbers as a line of a factor, in which they take turns: element i of `low` stands before element i of `high`. The
// planes are cut off, not rounded, so that their sum is the number to the bit.
template <bool Right>
S2S_INLINE void put_planes(__m512 low, __m512 high, char* to) {
  const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
#pragma GCC unroll 3
  for (int plane = 0; plane < 3; ++plane) {
    const __m512i words = _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_maskz_srli_epi32(-1, (__m512i)low, 16), (__m512i)high);
    _mm512_store_si512(to + (Right ? split_plane(plane) : plane * split_tile), words);
    low = low - (__m512)_mm512_and_epi32((__m512i)low, leading);
    high = high - (__m512)_mm512_and_epi32((__m512i)high, leading);
  }
}

// to (rows, width) = from times a number.
inline void tiled_scale(int64_t rows, int64_t width, const float* from, int64_t from_row, float scale, float* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += lanes<float>) store(to + i * width + c, load(from + i * from_row + c) * scale);
}
// The planes of at most tiled_rows rows.
inline void tiled_split(int64_t rows, int64_t depth, const float* from, int64_t from_row, float* planes) {
  SplitLeft left{};
  left.data = reinterpret_cast<char*>(planes);
  split_left(rows, depth, from, from_row, left);
}

// n <= attention_block rows as columns of a right factor.
inline void tiled_pack_columns(int64_t n, int64_t depth, const Rows<float>& rows, float* packed) {
  for (int64_t j = 0; j < split_columns(n); ++j)
    split_pack_column(j, depth, n - 16 * j, S2S_LAMBDA(int64_t i) { return rows.data + (16 * j + i) * rows.row; }, packed);
}
// The same as its rows, of attention_block in all and in the order of put_planes.
inline void tiled_pack_rows(int64_t n, int64_t columns, const Rows<float>& rows, float* packed) {
  constexpr int64_t steps = split_steps(attention_block);
  for (int64_t j = 0; j < split_columns(columns); ++j) {
    char* const to = reinterpret_cast<char*>(packed) + j * split_column(steps) + 64;
    const auto row = S2S_LAMBDA(int64_t k) { return k < n ? rows.data + k * rows.row + 16 * j : nullptr; };
    for (int64_t k = 0; k < n; k += 32)
      for (int64_t line = 0; line < 16; ++line)
        split_pair<true>(row(k + line), row(k + line + 16), columns - 16 * j, to + k / 32 * split_step + line * 64);
  }
}
#endif
