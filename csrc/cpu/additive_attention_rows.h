// Rows between the storage type and the type computed in, and sums of them.

// n elements `stride` apart, side by side in the type computed in; and back.
template <class S>
void widen_elements(const S* from, int64_t stride, compute_t<S>* to, int64_t n) {
  using C = compute_t<S>;
  int64_t i = 0;
  for (; stride == 1 && i + lanes<C> <= n; i += lanes<C>) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_compute(from[i * stride]);
}

template <class S>
void narrow_elements(const compute_t<S>* from, S* to, int64_t n) {
  using C = compute_t<S>;
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) store(to + i, load(from + i));
  if (i < n) store_partial(to + i, load_partial(from + i, n - i), n - i);
}

// to[v] += by * from[v]
template <class C>
S2S_INLINE void add_scaled(C by, const C* from, C* to, int64_t n) {
  int64_t v = 0;
  for (; v + lanes<C> <= n; v += lanes<C>) store(to + v, fma(broadcast(by), load(from + v), load(to + v)));
  for (; v < n; ++v) to[v] = fma(by, from[v], to[v]);
}

template <class S>
struct AdditiveStorageKernels {
  static constexpr auto widen = &widen_elements<S>;
  static constexpr auto narrow = &narrow_elements<S>;
};
