// Rows between the storage type and the type computed in, and sums of them.

// to[v] += by * from[v]
template <class C>
S2S_INLINE void add_scaled(C by, const C* from, C* to, int64_t n) {
  int64_t v = 0;
  for (; v + lanes<C> <= n; v += lanes<C>) store(to + v, fma(broadcast(by), load(from + v), load(to + v)));
  for (; v < n; ++v) to[v] = fma(by, from[v], to[v]);
}

template <class S>
struct AdditiveStorageKernels {
  static constexpr auto widen = &widen_line<S>;
  static constexpr auto narrow = &narrow_line<S>;
};
