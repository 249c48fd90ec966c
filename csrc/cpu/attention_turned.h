// Blocks of scores with a key for each row and a query for each lane: maxima, sums and gradients of a query's softmax then stand in lanes,
// and nothing is added up across a vector. For calls with nothing but a scale and intervals: biases, masks and the random numbers of
// dropout lie along the keys.

// The lanes that see key j, where lane 0 is query `first`, as score() takes them; past the last query all lanes do.
template <class T>
S2S_INLINE void turned_interval(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t j,
                                ScoreRow<T>& row) {
  const int64_t from = j - span.diagonal - first, end = from + left + 1;
  row.begin = max(int64_t{0}, from - right);
  row.end = end < n ? max(int64_t{0}, end) : attention_block;
}

// Keys of a block, from its first one on, that queries [first, first + n) see something of.
S2S_INLINE Hull turned_keys(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t at) {
  const int64_t begin = max(int64_t{0}, first_key(span, left, first) - at);
  const int64_t end = min(attention_block, end_key(span, right, first + n - 1) - at);
  if (end <= begin) return {0, 0};
  return {begin, end};
}

// Whether queries [first, first + n) see all of the keys of a block.
S2S_INLINE bool turned_open(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t at, int64_t keys) {
  return first_key(span, left, first + n - 1) <= at && end_key(span, right, first) >= at + keys;
}

// The c'th vector of scores of key j. OPEN: all is seen.
template <class T, bool OPEN>
S2S_INLINE Vec<T> turned_score(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t j, int64_t c,
                               ScoreRow<T>& row, Vec<T> product) {
  Vec<T> slowed;
  if constexpr (OPEN)
    row.begin = 0, row.end = attention_block;
  else
    turned_interval(span, left, right, first, n, j, row);
  return score<T, false>(row, c, product, slowed);
}

// The steps that Ahead goes in a product of so many rows and columns.
template <class T>
int64_t turned_steps(int64_t rows, int64_t columns, int64_t depth) {
  const int64_t tiles = (whole_vectors<T>(columns) / lanes<T> + attention_vectors - 1) / attention_vectors;
  return attention_groups<T>(rows, columns) * tiles * ((depth + attention_stretch - 1) / attention_stretch);
}

// to (keys, attention_block) = keys' rows times queries' columns (attention_block apart), where some query of a vector sees some key of a
// group.
template <class T>
void turned_product(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t at, const Hull& seen,
                    int64_t width, const Rows<T>& keys, const T* columns, T* to, Ahead& ahead) {
  const int64_t groups = attention_groups<T>(seen.end - seen.begin, n);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t j = seen.begin + gemm_group(seen.end - seen.begin, groups, g);
    const int64_t rows = seen.begin + gemm_group(seen.end - seen.begin, groups, g + 1) - j;
    const int64_t begin = max(int64_t{0}, at + j - span.diagonal - right - first) / lanes<T> * lanes<T>;
    const int64_t end = whole_vectors<T>(min(n, at + j + rows - span.diagonal + left - first));
    if (end <= begin) continue;
    attention_product<T>(rows, end - begin,
                         {width, keys.data + j * keys.row, keys.row, 1, columns + begin, attention_block, to + j * attention_block + begin,
                          attention_block, false, &ahead});
  }
}

// to (n, columns) = or += a block, turned, times rows of keys; of each group of queries only the keys that it sees.
template <class T>
void turned_rows(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t at, const T* block,
                 int64_t columns, const Rows<T>& keys, T* to, int64_t to_row, bool add, int64_t chain, Ahead& ahead) {
  const int64_t groups = attention_groups<T>(n, columns);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t i = gemm_group(n, groups, g), rows = gemm_group(n, groups, g + 1) - i;
    const Hull seen = turned_keys(span, left, right, first + i, rows, at);
    if (seen.empty() && add) continue;
    attention_product<T>(rows, columns,
                         {seen.end - seen.begin, block + seen.begin * attention_block + i, 1, attention_block,
                          keys.data + seen.begin * keys.row, keys.row, to + i * to_row, to_row, add, &ahead, chain});
  }
}

// to (keys, columns) = or += a block, turned, times rows of queries; of each group of keys only the queries that see it.
template <class T>
void turned_key_rows(const AttentionSpan& span, int64_t left, int64_t right, int64_t first, int64_t n, int64_t at, int64_t keys,
                     const T* block, int64_t columns, const Rows<T>& queries, T* to, bool add, Ahead& ahead) {
  const int64_t groups = attention_groups<T>(keys, columns);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t j = gemm_group(keys, groups, g), rows = gemm_group(keys, groups, g + 1) - j;
    const int64_t begin = min(n, max(int64_t{0}, at + j - span.diagonal - right - first));
    const int64_t end = max(begin, min(n, at + j + rows - span.diagonal + left - first));
    if (begin == end && add) continue;
    attention_product<T>(rows, columns,
                         {end - begin, block + j * attention_block + begin, attention_block, 1,
                          queries.data + (first + begin) * queries.row, queries.row, to + j * columns, columns, add, &ahead});
  }
}
