// Small matrix products for attention, and the blocks of rows that they read.
//
// C (rows, columns) = or += A (rows, depth) B (depth, columns), columns whole vectors. Each element has an accumulator, starting at 0, to
// which fma(a, b, .) is applied for ascending depth, and another one after each chain of it, whatever the shape of the tile: no bits depend
// on how rows are grouped.

inline constexpr int64_t attention_rows = 6;
inline constexpr int64_t attention_chain = 128;  // of more terms, rounding shows in peaked weights
inline constexpr int64_t attention_vectors = S2S_VECTOR_BYTES == 64 ? 4 : 2;
inline constexpr int64_t attention_rows_most = 12;
inline constexpr int64_t attention_stretch = 16;

// Rows of a tile of so many vectors: sums enough to keep the multipliers busy, and no more than there are registers.
constexpr int64_t attention_rows_of(int64_t vectors) {
  const int64_t rows = attention_rows * attention_vectors / (vectors < 1 ? 1 : vectors);
  return rows < attention_rows ? attention_rows : rows < attention_rows_most ? rows : attention_rows_most;
}
// Groups of equal size, about, in which a product of so many columns goes through its rows.
template <class T>
constexpr int64_t attention_groups(int64_t rows, int64_t columns) {
  const int64_t most = attention_rows_of((columns + lanes<T> - 1) / lanes<T>);
  return (rows + most - 1) / most;
}

template <class T>
constexpr int64_t whole_vectors(int64_t n) {
  return (n + lanes<T> - 1) / lanes<T> * lanes<T>;
}

// Asks early for a line that will be written. The builtin asks for it as one to read where an instruction set doesn't name the instruction,
// which processors without it pass over.
S2S_INLINE void prefetch_to_write(const void* line) {
#if defined(__x86_64__)
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  __builtin_prefetch(line, 1, 2);
#endif
}

// Asks for n rows that will be read.
template <class S>
S2S_INLINE void prefetch_rows(int64_t n, int64_t width, const S* from, int64_t row) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < width; c += 64 / int64_t{sizeof(S)}) __builtin_prefetch(from + i * row + c, 0, 2);
}

// Brings in, a little at a time, what the task after this one will read and write: short sequences spend their time waiting for memory.
struct Ahead {
  const char* at[8];
  int64_t left[8];
  bool written[8];
  int streams = 0, now = 0;
  int64_t lines = 0, each = 0;

  // The rows of the head after (b, h), if they are dense and few.
  template <class S>
  void add(const S* data, const int64_t* stride, int64_t b, int64_t h, int64_t batch, int64_t heads, int64_t rows, int64_t width,
           bool write = false) {
    if (stride[2] != width || rows * width * static_cast<int64_t>(sizeof(S)) > (1 << 15)) return;
    const int64_t next = b * heads + h + 1;
    if (next >= batch * heads) return;
    at[streams] = reinterpret_cast<const char*>(data + next / heads * stride[0] + next % heads * stride[1]);
    left[streams] = (rows * width * static_cast<int64_t>(sizeof(S)) + 63) / 64;
    written[streams] = write;
    lines += left[streams++];
  }
  // In so many steps, of as many lines each, so that the processor can foresee the loop's end.
  void begin(int64_t steps) { each = (lines + steps - 1) / max(int64_t{1}, steps); }
  void step() {
    for (int64_t due = each; due > 0 && now < streams;) {
      const int64_t n = min(due, left[now]);
      const char *line = at[now], *const end = line + 64 * n;
      if (written[now])
        for (; line != end; line += 64) prefetch_to_write(line);
      else
        for (; line != end; line += 64) __builtin_prefetch(line, 0, 2);
      at[now] = end;
      due -= n;
      if (!(left[now] -= n)) ++now;
    }
  }
};

// Element (i, k) of A is a[i * a_row + k * a_step].
template <class T>
struct Product {
  int64_t depth;
  const T* a;
  int64_t a_row, a_step;
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  bool add;
  Ahead* ahead = nullptr;  // goes a step for each attention_stretch rows of B, in each tile
  int64_t chain = attention_chain;
};

// The columns from `column` on.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) void attention_tile(const Product<T>& p, int64_t column) {
  // A pointer for every three rows, as in gemm_tile.
  constexpr int bases = (ROWS + 2) / 3;
  const T *left[bases], *b = p.b + column;
  const int64_t a_row = p.a_row, a_step = p.a_step, b_row = p.b_row;
  for (int i = 0; i < bases; ++i) left[i] = hidden(p.a + 3 * i * a_row);
  Vec<T> sum[ROWS][VECTORS] = {};
  const int64_t stretch = p.ahead ? attention_stretch : p.depth;
  for (int64_t k = 0; k < p.depth;) {
    const int64_t end = min(p.depth, k + stretch);
    if (p.ahead) p.ahead->step();
    for (; k < end; ++k) {
      Vec<T> right[VECTORS];
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) right[j] = load(b + j * lanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Vec<T> factor = broadcast(left[i / 3][i % 3 * a_row]);
#pragma GCC unroll 16
        for (int j = 0; j < VECTORS; ++j) sum[i][j] = fma(factor, right[j], sum[i][j]);
      }
#pragma GCC unroll 16
      for (int i = 0; i < bases; ++i) left[i] += a_step;
      b += b_row;
    }
  }
  T* const c = p.c + column;
  const int64_t c_row = p.c_row;
  if (p.add) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) store(c + i * c_row + j * lanes<T>, load(c + i * c_row + j * lanes<T>) + sum[i][j]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < VECTORS; ++j) store(c + i * c_row + j * lanes<T>, sum[i][j]);
    }
  }
}

// Columns [column, columns). The product is not copied: a vector read of what was just written word by word would wait.
template <class T, int ROWS, int VECTORS = attention_vectors>
void attention_columns(const Product<T>& p, int64_t columns, int64_t column = 0) {
  if constexpr (ROWS <= attention_rows_of(VECTORS))
    for (; column + VECTORS * lanes<T> <= columns; column += VECTORS * lanes<T>) attention_tile<T, ROWS, VECTORS>(p, column);
  if constexpr (VECTORS > 1) {
    if (column < columns) attention_columns<T, ROWS, VECTORS - 1>(p, columns, column);
  }
}

template <class T, int ROWS = attention_rows_most>
void attention_tiles(int64_t rows, const Product<T>& p, int64_t columns) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return attention_tiles<T, ROWS - 1>(rows, p, columns);
  attention_columns<T, ROWS>(p, columns);
}

// At most attention_rows_of the vectors that columns fill.
template <class T>
void attention_product(int64_t rows, int64_t columns, const Product<T>& whole) {
  if (whole.depth <= whole.chain) return attention_tiles(rows, whole, columns);
  Product<T> p = whole;
  for (int64_t done = 0;;) {
    p.depth = min(whole.chain, whole.depth - done);
    attention_tiles(rows, p, columns);
    if ((done += p.depth) == whole.depth) return;
    p.a += p.depth * p.a_step, p.b += p.depth * p.b_row, p.add = true;
  }
}

// ---- rows of an operand ----
// A product with what is not finite is NaN even where the weight is 0, so a hidden key could leak into a row. What is not finite is rare:
// products are made as if there were nothing of the kind, and made again from cleaned rows where their result is not finite.
// Rows of T, whole vectors long, zeros after the last element.
template <class T>
struct Rows {
  const T* data;
  int64_t row;
  bool bad;  // some row had something in it that is not finite: 0 stands in its place, and flags say which rows
};

template <class S>
bool all_finite(int64_t n, int64_t width, const S* from, int64_t row) {
  using T = compute_t<S>;
  Vec<T> sum[4] = {};
  for (int64_t i = 0; i < n; ++i) {
    const S* const source = from + i * row;
    int64_t c = 0;
    for (; c + 4 * lanes<T> <= width; c += 4 * lanes<T>) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) sum[v] = fma(load(source + c + v * lanes<T>), Vec<T>{}, sum[v]);
    }
    for (; c + lanes<T> <= width; c += lanes<T>) sum[0] = fma(load(source + c), Vec<T>{}, sum[0]);
    if (c < width) sum[1] = fma(load_partial(source + c, width - c), Vec<T>{}, sum[1]);
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3])) == T(0);
}

// Replaces what is not finite by 0 and flags its rows; whether there is any.
template <class T>
__attribute__((noinline)) bool clean_rows(int64_t n, int64_t width, T* rows, int64_t row, uint8_t* flags) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) {
    flags[i] = 0;
    for (int64_t c = 0; c < width; ++c)
      if (rows[i * row + c] * T(0) != T(0)) rows[i * row + c] = T(0), flags[i] = 1, any = true;
  }
  return any;
}

// Rows [0, n) in place where they are dense and need no conversion, else copied to `buffer` (n, whole vectors). With `flags` they are
// copied in any case and cleaned.
template <class S>
Rows<compute_t<S>> prepare_rows(int64_t n, int64_t width, const S* from, int64_t row_stride, int64_t column_stride, compute_t<S>* buffer,
                                uint8_t* flags = nullptr, int64_t next = 0) {
  using T = compute_t<S>;
  const int64_t padded = whole_vectors<T>(width);
  if constexpr (std::is_same_v<S, T>) {
    if (column_stride == 1 && row_stride == width && padded == width && !flags) return {from, width, false};
  }
  if (column_stride == 1 && width < lanes<T>) {
    for (int64_t i = 0; i < n; ++i) store(buffer + i * lanes<T>, load_partial(from + i * row_stride, width));
  } else if (column_stride == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const S* const source = from + i * row_stride;
      T* const target = buffer + i * padded;
      int64_t c = 0;
      for (; c + lanes<T> <= width; c += lanes<T>) store(target + c, load(source + c));
      if (c < width) store(target + c, load_partial(source + c, width - c));
      if (next) prefetch_rows(1, width, source + next, row_stride);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < width; ++c) buffer[i * padded + c] = to_compute(from[i * row_stride + c * column_stride]);
      for (int64_t c = width; c < padded; ++c) buffer[i * padded + c] = T(0);
    }
  }
  return {buffer, padded, flags && clean_rows(n, width, buffer, padded, flags)};
}

// transposed[c * attention_block + j] = rows[j * row + c] for the n <= attention_block rows; zeros in the columns after them.
template <class T>
void transpose_rows(int64_t n, int64_t width, const Rows<T>& rows, T* transposed) {
  const int64_t whole = whole_vectors<T>(n);
  for (int64_t c = 0; c < width && n < whole; ++c)
    for (int64_t j = n; j < whole; ++j) transposed[c * attention_block + j] = T(0);
  copy_transposed(n, width, rows.data, rows.row, int64_t{1}, transposed, attention_block);
}

// Memory of one thread, handed out in pieces that begin at cache lines. With no memory it measures.
struct Pieces {
  char* base;
  int64_t used = 0;
  template <class X>
  X* take(int64_t count) {
    X* const piece = reinterpret_cast<X*>(base + used);
    used += (count * static_cast<int64_t>(sizeof(X)) + 63) / 64 * 64;
    return piece;
  }
};
