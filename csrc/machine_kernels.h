// Probes of the machine's limits, once per instruction set.

// `rounds` rounds of twelve independent chains of fused multiply-adds: enough in flight to hide their latency on every current core.
// Returns the floating-point operations of it.
template <class T>
double fma_chains(int64_t rounds, T* sink) {
  constexpr int chains = 12;
  Vec<T> sum[chains], factor = broadcast<T>(T(0.999)), term = broadcast<T>(T(1e-3));
  for (int i = 0; i < chains; ++i) sum[i] = broadcast<T>(T(i));
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) sum[i] = fma(sum[i], factor, term);
  for (int i = 0; i < chains; ++i) *sink += hsum(sum[i]);
  return 2.0 * chains * static_cast<double>(lanes<T>) * static_cast<double>(rounds);
}

// Reads n floats (a multiple of 8 vectors) once.
template <class T>
void read_all(const T* from, int64_t n, T* sink) {
  Vec<T> sum[8] = {};
  for (int64_t i = 0; i + 8 * lanes<T> <= n; i += 8 * lanes<T>) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = max(sum[j], load(from + i + j * lanes<T>));
  }
  for (int j = 0; j < 8; ++j) *sink += hmax(sum[j]);
}
