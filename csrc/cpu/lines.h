// Lines of elements between the type they are stored in and the one that is computed in.

// Up to a vector of elements `stride` apart, in the compute type; 0 beyond n.
template <class S>
S2S_INLINE Vec<compute_t<S>> load_spread(const S* from, int64_t stride, int64_t n) {
  using C = compute_t<S>;
  if (stride == 1) return n >= lanes<C> ? load(from) : load_partial(from, n);
  Vec<C> v{};
  for (int64_t i = 0; i < min(n, lanes<C>); ++i) v[i] = to_compute(from[i * stride]);
  return v;
}

// n elements `stride` apart, side by side in the compute type; and back.
template <class S>
void widen_line(const S* from, int64_t stride, compute_t<S>* to, int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const Vec<C> v = load_spread(from + i * stride, stride, n - i);
    if (n - i >= lanes<C>)
      store(to + i, v);
    else
      store_partial(to + i, v, n - i);
  }
}

template <class S>
void narrow_line(const compute_t<S>* from, S* to, int64_t n) {
  using C = compute_t<S>;
  int64_t i = 0;
  for (; i + lanes<C> <= n; i += lanes<C>) store(to + i, load(from + i));
  if (i < n) store_partial(to + i, load_partial(from + i, n - i), n - i);
}
