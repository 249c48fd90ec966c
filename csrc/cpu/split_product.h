// Products of float32 matrices on the tile unit, which multiplies bfloat16 and adds in float32: of the planes of their numbers
// (split_planes.h).
//
// Of the nine products of planes six are made; the other three are below 2^-22 of the whole and of either sign, so that a product is as
// exact as one rounded to float32. Six products on the tile unit take less than half the time of one on the multipliers.
//
// The rule of order, which makes the bits independent of how callers split m or n over threads: k is cut into blocks of split_kc; in a
// block each element of C has one accumulator, starting at 0, to which the products of 32 of k at a time are added, k ascending, plane by
// plane; blocks are added to C in ascending order (the first replaces C unless accumulating).
//
// What is marked as not finite is multiplied on the vector unit from the planes, whose sum is the number.

inline constexpr int64_t split_kc = 256;

// Sixteen columns of one row where something isn't finite.
__attribute__((noinline)) inline void split_row_exactly(const SplitLeft& left, int64_t row, const char* right, float* to) {
  __m512 sum = {};
  const auto value = [](const char* word, int odd) {
    uint16_t bits;
    std::memcpy(&bits, word + 2 * odd, 2);
    return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  };
  for (int64_t step = 0; step < left.steps; ++step)
    for (int pair = 0; pair < 16; ++pair) {
      const char* const a = left.tile(row / 16) + step * split_step + row % 16 * 64 + pair * 4;
      const char* const b = right + step * split_step + pair * 64;
      for (int odd = 0; odd < 2; ++odd) {
        float from = 0;
        __m512 factor = {};
        for (int p = 2; p >= 0; --p) {
          from += value(a + p * split_tile, odd);
          const __m512i words = _mm512_load_si512(b + split_plane(p));
          factor += (__m512)(odd ? _mm512_and_epi32(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
                                 : _mm512_maskz_slli_epi32(-1, words, 16));
        }
        sum = fma(broadcast(from), factor, sum);
      }
    }
  _mm512_storeu_ps(to, sum);
}

struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#define S2S_LOAD(tile, from) _tile_loadd(tile, from, 64)
#define S2S_FMA(sum, left, right) _tile_dpbf16ps(sum, left, right)

// The sums of the row tiles a and c by the columns b and d, in the first four registers, start at 0 and go on a step in four parts, between
// which there may be other work. Loads stand between the products, which would wait for them otherwise, and go through memory upwards.
S2S_INLINE void split_clear() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}
S2S_INLINE void split_part(int part, const char* a, const char* c, const char* b, const char* d) {
  switch (part) {
    case 0:
      S2S_LOAD(4, a);
      S2S_LOAD(6, b);
      S2S_FMA(0, 4, 6);
      S2S_LOAD(7, d);
      S2S_FMA(1, 4, 7);
      S2S_LOAD(5, c);
      S2S_FMA(2, 5, 6);
      S2S_LOAD(6, b + split_tile);
      S2S_FMA(3, 5, 7);
      S2S_LOAD(7, d + split_tile);
      S2S_FMA(0, 4, 6);
      S2S_FMA(1, 4, 7);
      return;
    case 1:
      S2S_FMA(2, 5, 6);
      S2S_LOAD(4, a + split_tile);
      S2S_FMA(3, 5, 7);
      S2S_LOAD(5, c + split_tile);
      S2S_FMA(0, 4, 6);
      S2S_FMA(1, 4, 7);
      S2S_FMA(2, 5, 6);
      S2S_LOAD(6, b + 2 * split_tile);
      S2S_FMA(3, 5, 7);
      S2S_LOAD(7, d + 2 * split_tile);
      return;
    case 2:
      S2S_FMA(0, 4, 6);
      S2S_FMA(1, 4, 7);
      S2S_FMA(2, 5, 6);
      S2S_LOAD(4, a);
      S2S_FMA(3, 5, 7);
      S2S_LOAD(5, c);
      S2S_FMA(0, 4, 6);
      S2S_FMA(1, 4, 7);
      return;
    default:
      S2S_LOAD(4, a + 2 * split_tile);
      S2S_FMA(2, 5, 6);
      S2S_FMA(3, 5, 7);
      S2S_LOAD(5, c + 2 * split_tile);
      S2S_FMA(0, 4, 6);
      S2S_FMA(1, 4, 7);
      S2S_FMA(2, 5, 6);
      S2S_FMA(3, 5, 7);
  }
}
// A whole step of factors that are one plane each: bfloat16 as they are.
S2S_INLINE void plane_step(const char* a, const char* c, const char* b, const char* d) {
  S2S_LOAD(4, a);
  S2S_LOAD(6, b);
  S2S_FMA(0, 4, 6);
  S2S_LOAD(7, d);
  S2S_FMA(1, 4, 7);
  S2S_LOAD(5, c);
  S2S_FMA(2, 5, 6);
  S2S_FMA(3, 5, 7);
}
// Sums of the row tiles a and c by the columns from b on, `stride` apart.
S2S_INLINE void split_two_by_two(int64_t steps, const char* a, const char* c, const char* b, int64_t stride, float* sums) {
  split_clear();
  for (int64_t s = 0; s < steps; ++s, a += split_step, b += split_step, c += split_step) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) split_part(part, a, c, b, b + stride);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// One row tile by two or four columns, in the same order.
#define S2S_COLUMN(sum, column)           \
  S2S_LOAD(7, column);                    \
  S2S_FMA(sum, 4, 7);                     \
  S2S_LOAD(7, (column) + split_tile);     \
  S2S_FMA(sum, 4, 7);                     \
  S2S_FMA(sum, 5, 7);                     \
  S2S_LOAD(7, (column) + 2 * split_tile); \
  S2S_FMA(sum, 5, 7);                     \
  S2S_FMA(sum, 4, 7);                     \
  S2S_FMA(sum, 6, 7)
template <int Columns>
S2S_INLINE void split_one_by(int64_t steps, const char* a, const char* b, int64_t stride, float* sums) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += split_step, b += split_step) {
    S2S_LOAD(4, a);
    S2S_LOAD(5, a + split_tile);
    S2S_LOAD(6, a + 2 * split_tile);
    S2S_COLUMN(0, b);
    S2S_COLUMN(1, b + stride);
    if constexpr (Columns == 4) {
      S2S_COLUMN(2, b + 2 * stride);
      S2S_COLUMN(3, b + 3 * stride);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}
#undef S2S_COLUMN

#undef S2S_LOAD
#undef S2S_FMA

// One tile of sums into C.
template <bool Add>
S2S_INLINE void split_finish_whole(int64_t rows, const float* sums, float* c, int64_t c_row) {
  if (rows == 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const __m512 sum = _mm512_load_ps(sums + i * 16);
      _mm512_storeu_ps(c + i * c_row, Add ? _mm512_loadu_ps(c + i * c_row) + sum : sum);
    }
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const __m512 sum = _mm512_load_ps(sums + i * 16);
    _mm512_storeu_ps(c + i * c_row, Add ? _mm512_loadu_ps(c + i * c_row) + sum : sum);
  }
}

inline void split_finish(const SplitLeft& left, int64_t row_tile, int64_t columns, const char* right, bool marked, const float* sums,
                         float* c, int64_t c_row, bool add) {
  const int64_t rows = gemm_min(16, left.rows - row_tile * 16);
  if (__builtin_expect(columns >= 16 && !left.bad && !marked, 1)) {
    if (add)
      split_finish_whole<true>(rows, sums, c, c_row);
    else
      split_finish_whole<false>(rows, sums, c, c_row);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    float* const to = c + i * c_row;
    __m512 sum = _mm512_load_ps(sums + i * 16);
    if (marked || left.bad_row[row_tile * 16 + i]) {
      alignas(64) float exact[16];
      split_row_exactly(left, row_tile * 16 + i, right, exact);
      sum = _mm512_load_ps(exact);
    }
    if (columns >= 16)
      store(to, add ? load(to) + sum : sum);
    else
      store_partial(to, add ? load_partial(to, columns) + sum : sum, columns);
  }
}

// The columns [0, n) of C from the steps of a right factor of `steps` steps from `first_step` on.
inline void split_block(const SplitLeft& left, int64_t n, const float* packed, int64_t steps, int64_t first_step, float* c, int64_t c_row,
                        bool add, bool backwards) {
  alignas(64) float sums[2][1024];
  const TileShapes shapes;
  _tile_loadconfig(&shapes);
  const int64_t row_tiles = (left.rows + 15) / 16, columns = split_columns(n), stride = split_column(steps),
                at_once = row_tiles > 1 ? 2 : 4;
  const int64_t groups = (columns + at_once - 1) / at_once;
  // A block's sums go to C while the next block is multiplied: they come out of the tile unit late.
  struct {
    int64_t row_tile, rows, column, columns;
  } block{}, before{};
  const auto finish = [&](const auto& which, const float* from) {
    for (int64_t r = 0; r < which.rows; ++r)
      for (int64_t j = 0; j < which.columns; ++j) {
        const int64_t column = (which.column + j) * 16;
        if (column >= n) continue;
        const char* const head = reinterpret_cast<const char*>(packed) + (which.column + j) * stride;
        split_finish(left, which.row_tile + r, n - column, head + 64 + first_step * split_step, split_marked(head),
                     from + (r * which.columns + j) * 256, c + (which.row_tile + r) * 16 * c_row + column, c_row, add);
      }
  };
  int turn = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t group = backwards ? groups - 1 - g : g;
    block.column = group * at_once, block.columns = gemm_min(at_once, columns - block.column);
    const char* const b = reinterpret_cast<const char*>(packed) + block.column * stride + 64 + first_step * split_step;
    for (block.row_tile = 0; block.row_tile < row_tiles; block.row_tile += 2) {
      const char* const a = left.tile(block.row_tile);
      const bool four = block.columns == 4;
      block.rows = gemm_min(2, row_tiles - block.row_tile);
      if (block.rows == 2)
        split_two_by_two(left.steps, a, left.tile(block.row_tile + 1), b, stride, sums[turn]);
      else
        four ? split_one_by<4>(left.steps, a, b, stride, sums[turn]) : split_one_by<2>(left.steps, a, b, stride, sums[turn]);
      turn = 1 - turn;
      finish(before, sums[turn]);
      before = block;
    }
  }
  finish(before, sums[1 - turn]);
  _tile_release();
}

// Floats of scratch for the left factor of a product, enough for smaller m and k too.
constexpr int64_t split_workspace(int64_t m, int64_t k) {
  return (gemm_min(m, split_mc) + 15) / 16 * split_steps(gemm_min(k, split_kc)) * split_step / 4 + 16;
}
inline SplitLeft split_left_in(float* workspace) {
  SplitLeft left;
  left.data = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(workspace) + 63) / 64 * 64);
  return left;
}

// C (m, n) = or += A (m, k) times packed B; A of unit column stride.
inline void split_product(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, const float* packed, float* c, int64_t c_row,
                          bool add, bool backwards, float* workspace) {
  for (int64_t i = 0; k <= 0 && !add && i < m; ++i) std::memset(c + i * c_row, 0, static_cast<size_t>(n) * sizeof(float));
  SplitLeft left = split_left_in(workspace);
  for (int64_t i = 0; i < m; i += split_mc)
    for (int64_t k0 = 0; k0 < k; k0 += split_kc) {
      split_left(gemm_min(split_mc, m - i), gemm_min(split_kc, k - k0), a + i * a_row + k0, a_row, left);
      split_block(left, n, packed, split_steps(k), k0 / 32, c + i * c_row, c_row, add || k0 > 0, backwards);
    }
}
