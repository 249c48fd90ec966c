// Tiles of bfloat16, the operands of products that are added up in float32, and how numbers come to lie in them: of a left factor 16 rows
// of 32 numbers, of a right one 32 rows of 16 columns, whose rows stand in pairs, element by element beside each other.
//
// A float32 has 24 significant bits: the sum of three bfloat16 of 8 bits each, here called its planes: the leading bits as they are, and
// what is left, twice rounded to nearest. Magnitudes below 2^-110 lose their last bits. Neither infinities nor NaN have planes: what holds
// any is marked, row by row on the left and tile by tile on the right.

inline constexpr int64_t split_mc = 96;                // rows of a left factor at most
inline constexpr int64_t split_tile = 1024;            // bytes of a tile: 16 rows of 32 elements
inline constexpr int64_t split_step = 3 * split_tile;  // three planes of 16 rows or columns, 32 deep

constexpr int64_t split_steps(int64_t k) { return (k + 31) / 32; }
// Where the planes of a step of the right factor lie: in the order in which the product comes to them, the last one first.
constexpr int64_t split_plane(int p) { return (2 - p) * split_tile; }

// ---- splitting ----
struct Planes {
  __m512i plane[3];
};

// The planes of 32 numbers, first those of `low`; lanes of `bad` without finite value keep it in their first plane.
S2S_INLINE Planes split(__m512 low, __m512 high, uint32_t* bad) {
  const __m512i leading = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const __mmask16 bad_low = _mm512_fpclass_ps_mask(low, 0x99), bad_high = _mm512_fpclass_ps_mask(high, 0x99);
  *bad = static_cast<uint32_t>(bad_low) | static_cast<uint32_t>(bad_high) << 16;
  const __m512 left_low = _mm512_maskz_sub_ps(~bad_low, low, (__m512)_mm512_and_epi32((__m512i)low, leading));
  const __m512 left_high = _mm512_maskz_sub_ps(~bad_high, high, (__m512)_mm512_and_epi32((__m512i)high, leading));
  const __m512i middle = (__m512i)_mm512_cvtne2ps_pbh(left_high, left_low);
  const __m512i middle_low = _mm512_maskz_slli_epi32(-1, _mm512_maskz_cvtepu16_epi32(-1, _mm512_castsi512_si256(middle)), 16);
  const __m512i middle_high =
      _mm512_maskz_slli_epi32(-1, _mm512_maskz_cvtepu16_epi32(-1, _mm512_maskz_extracti64x4_epi64(-1, middle, 1)), 16);
  const __m512i last = (__m512i)_mm512_cvtne2ps_pbh(left_high - (__m512)middle_high, left_low - (__m512)middle_low);
  alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return {{_mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(upper), (__m512i)high), middle, last}};
}

S2S_INLINE __m512 split_load(const float* from, int64_t n) {
  if (n >= 16) return _mm512_loadu_ps(from);
  return n > 0 ? load_partial(from, n) : (__m512){};
}

// Line j, word i of a tile = a[i], word j
S2S_INLINE void split_transpose(__m512i (&a)[16], char* tile) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_maskz_unpacklo_epi32(-1, a[i], a[i + 1]);
    b[i + 1] = _mm512_maskz_unpackhi_epi32(-1, a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_maskz_unpacklo_epi64(-1, b[i], b[i + 2]);
    a[i + 1] = _mm512_maskz_unpackhi_epi64(-1, b[i], b[i + 2]);
    a[i + 2] = _mm512_maskz_unpacklo_epi64(-1, b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_maskz_unpackhi_epi64(-1, b[i + 1], b[i + 3]);
  }
  // a[4 q + r]: words 4 l + r of rows 4 q .. 4 q + 3, l the 128-bit lane
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    b[r] = _mm512_maskz_shuffle_i32x4(-1, a[r], a[4 + r], 0x88);
    b[4 + r] = _mm512_maskz_shuffle_i32x4(-1, a[r], a[4 + r], 0xdd);
    b[8 + r] = _mm512_maskz_shuffle_i32x4(-1, a[8 + r], a[12 + r], 0x88);
    b[12 + r] = _mm512_maskz_shuffle_i32x4(-1, a[8 + r], a[12 + r], 0xdd);
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    _mm512_store_si512(tile + 64 * r, _mm512_maskz_shuffle_i32x4(-1, b[r], b[8 + r], 0x88));
    _mm512_store_si512(tile + 64 * (8 + r), _mm512_maskz_shuffle_i32x4(-1, b[r], b[8 + r], 0xdd));
    _mm512_store_si512(tile + 64 * (4 + r), _mm512_maskz_shuffle_i32x4(-1, b[4 + r], b[12 + r], 0x88));
    _mm512_store_si512(tile + 64 * (12 + r), _mm512_maskz_shuffle_i32x4(-1, b[4 + r], b[12 + r], 0xdd));
  }
}

S2S_INLINE void split_transpose(char* tile) {
  __m512i a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_load_si512(tile + 64 * i);
  split_transpose(a, tile);
}

// The 16 words of either half, in turns.
S2S_INLINE __m512i split_beside(__m512i halves) {
  alignas(64) static const uint16_t beside[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                  8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(-1, _mm512_load_si512(beside), halves);
}

// A pair of rows of 16 columns, element by element beside each other, as a line of three tiles. A null row is 0.
template <bool Right>
S2S_INLINE uint32_t split_pair(const float* even, const float* odd, int64_t columns, char* to) {
  uint32_t bad;
  const Planes planes = split(even ? split_load(even, columns) : (__m512){}, odd ? split_load(odd, columns) : (__m512){}, &bad);
  for (int p = 0; p < 3; ++p) _mm512_store_si512(to + (Right ? split_plane(p) : p * split_tile), split_beside(planes.plane[p]));
  return bad | bad >> 16;
}

// ---- the right factor, packed once ----
// Columns 16 at a time, an even number of such tile columns: of each a line that says whether all of it is finite, and its steps, one after
// the other, three tiles each: of k, 32 at a time, two by two in a line.
constexpr int64_t split_column(int64_t steps) { return 64 + steps * split_step; }
constexpr int64_t split_columns(int64_t n) { return (n + 31) / 32 * 2; }
constexpr int64_t split_packed_size(int64_t n, int64_t k) { return split_columns(n) * split_column(split_steps(k)) / 4; }

S2S_INLINE void split_mark(char* column) { __atomic_store_n(reinterpret_cast<int32_t*>(column), 1, __ATOMIC_RELAXED); }
S2S_INLINE bool split_marked(const char* column) { return *reinterpret_cast<const int32_t*>(column) != 0; }

// Before rows are packed.
inline void split_unmark(int64_t n, int64_t k, float* packed) {
  for (int64_t j = 0; j < split_columns(n); ++j) std::memset(reinterpret_cast<char*>(packed) + j * split_column(split_steps(k)), 0, 64);
}

// Rows k and k + 1, k even, of a right factor of `depth` rows.
inline void split_pack_pair(int64_t k, int64_t depth, int64_t n, const float* even, const float* odd, float* packed) {
  const int64_t stride = split_column(split_steps(depth));
  char* column = reinterpret_cast<char*>(packed);
  for (int64_t j = 0; j < split_columns(n); ++j, column += stride)
    if (split_pair<true>(even + 16 * j, odd ? odd + 16 * j : nullptr, n - 16 * j, column + 64 + k / 32 * split_step + k % 32 / 2 * 64))
      split_mark(column);
}
// The lines from row k on to the end of its step are 0.
inline void split_pack_rest(int64_t k, int64_t depth, int64_t n, float* packed) {
  const int64_t stride = split_column(split_steps(depth)), line = (k % 32 + 1) / 2;
  if (k % 32 == 0 || line == 16) return;
  for (int64_t j = 0; j < split_columns(n); ++j)
    for (int p = 0; p < 3; ++p)
      std::memset(reinterpret_cast<char*>(packed) + j * stride + 64 + k / 32 * split_step + p * split_tile + line * 64, 0,
                  static_cast<size_t>(16 - line) * 64);
}

// Tile column j from its columns, each contiguous: `valid` of them, the others 0.
template <class Column>
void split_pack_column(int64_t j, int64_t depth, int64_t valid, const Column& column, float* packed) {
  char* const place = reinterpret_cast<char*>(packed) + j * split_column(split_steps(depth));
  std::memset(place, 0, 64);
  char* to = place + 64;
  for (int64_t k = 0; k < depth; k += 32, to += split_step) {
    for (int64_t i = 0; i < 16; ++i) {
      uint32_t bad = 0;
      const float* const from = i < valid ? column(i) + k : nullptr;
      const Planes planes =
          split(from ? split_load(from, depth - k) : (__m512){}, from ? split_load(from + 16, depth - k - 16) : (__m512){}, &bad);
      for (int p = 0; p < 3; ++p) _mm512_store_si512(to + split_plane(p) + i * 64, planes.plane[p]);
      if (bad) split_mark(place);
    }
    for (int p = 0; p < 3; ++p) split_transpose(to + p * split_tile);
  }
}

// ---- the left factor, split just before use ----
// Tiles of 16 rows, and of each its steps, three tiles each.
struct SplitLeft {
  char* data;
  int64_t rows, steps;
  bool bad;  // any of:
  bool bad_row[split_mc];

  char* tile(int64_t row_tile) const { return data + row_tile * steps * split_step; }
};

// Rows of A, k contiguous.
inline void split_left(int64_t rows, int64_t depth, const float* a, int64_t a_row, SplitLeft& left) {
  left.rows = rows, left.steps = split_steps(depth), left.bad = false;
  for (int64_t i = 0; i < rows; ++i) {
    const float* const from = a + i * a_row;
    char* to = left.tile(i / 16) + i % 16 * 64;
    uint32_t any = 0;
    for (int64_t k = 0; k < depth; k += 32, to += split_step) {
      uint32_t bad;
      const Planes planes = split(split_load(from + k, depth - k), split_load(from + k + 16, depth - k - 16), &bad);
      any |= bad;
      for (int p = 0; p < 3; ++p) _mm512_store_si512(to + p * split_tile, planes.plane[p]);
    }
    left.bad_row[i] = any != 0;
    left.bad |= any != 0;
  }
}

// Columns of A^T, which has k rows, rows contiguous.
inline void split_left_transposed(int64_t rows, int64_t depth, const float* a, int64_t a_row, SplitLeft& left) {
  left.rows = rows, left.steps = split_steps(depth), left.bad = false;
  for (int64_t i = 0; i < rows; i += 16) {
    char* to = left.tile(i / 16);
    uint32_t any = 0;
    for (int64_t k = 0; k < depth; k += 32, to += split_step) {
      const float* const from = a + k * a_row + i;
      for (int64_t line = 0; line < 16; ++line)
        any |= split_pair<false>(k + 2 * line < depth ? from + 2 * line * a_row : nullptr,
                                 k + 2 * line + 1 < depth ? from + (2 * line + 1) * a_row : nullptr, rows - i, to + line * 64);
      for (int p = 0; p < 3; ++p) split_transpose(to + p * split_tile);
    }
    any &= 0xffff;
    for (int64_t r = i; r < i + 16 && r < rows; ++r) left.bad_row[r] = any >> (r - i) & 1;
    left.bad |= any != 0;
  }
}
