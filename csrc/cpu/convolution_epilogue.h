// What follows the accumulation: condition, activation, gate, residual. Shared by the whole form (a line is a stretch of time of one
// channel) and the step (a line is the channels of one row), so that both give the same bits.
// Scratch lines are readable up to the next multiple of the vector length.

// a, and for a gate its partner b.
template <Activation A, class C>
S2S_INLINE Vec<C> activate(Vec<C> a, Vec<C> b) {
  if constexpr (A == Activation::relu) return select(a <= C(0), Vec<C>{}, a);  // a NaN passes
  if constexpr (A == Activation::silu) return a * vsigmoid(a);
  if constexpr (A == Activation::gelu) return C(0.5) * a * (C(1) + verf(a * C(M_SQRT1_2)));
  if constexpr (A == Activation::tanh) return vtanh(a);
  if constexpr (A == Activation::glu) return a * vsigmoid(b);
  if constexpr (A == Activation::gated_tanh) return vtanh(a) * vsigmoid(b);
  return a;
}

template <class S>
void add_line(compute_t<S>* u, const S* from, int64_t stride, int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    const Vec<C> sum = load(u + i) + load_spread(from + i * stride, stride, n - i);
    if (n - i >= lanes<C>)
      store(u + i, sum);
    else
      store_partial(u + i, sum, n - i);
  }
}

// Not inlined: one body, so that the compiler can't contract a product and the residual's sum in one place and not in another.
template <Activation A, class S>
__attribute__((noinline)) void finish_line(const compute_t<S>* a, const compute_t<S>* b, const S* residual, int64_t residual_stride, S* y,
                                           int64_t n) {
  using C = compute_t<S>;
  for (int64_t i = 0; i < n; i += lanes<C>) {
    Vec<C> v = activate<A, C>(load(a + i), is_gate(A) ? load(b + i) : Vec<C>{});
    if (residual) v = v + load_spread(residual + i * residual_stride, residual_stride, n - i);
    if (n - i >= lanes<C>)
      store(y + i, v);
    else
      store_partial(y + i, v, n - i);
  }
}

template <class S>
void finish_line(Activation activation, const compute_t<S>* a, const compute_t<S>* b, const S* residual, int64_t residual_stride, S* y,
                 int64_t n) {
  switch (activation) {
    case Activation::none:
      return finish_line<Activation::none>(a, b, residual, residual_stride, y, n);
    case Activation::relu:
      return finish_line<Activation::relu>(a, b, residual, residual_stride, y, n);
    case Activation::silu:
      return finish_line<Activation::silu>(a, b, residual, residual_stride, y, n);
    case Activation::gelu:
      return finish_line<Activation::gelu>(a, b, residual, residual_stride, y, n);
    case Activation::tanh:
      return finish_line<Activation::tanh>(a, b, residual, residual_stride, y, n);
    case Activation::glu:
      return finish_line<Activation::glu>(a, b, residual, residual_stride, y, n);
    case Activation::gated_tanh:
      return finish_line<Activation::gated_tanh>(a, b, residual, residual_stride, y, n);
  }
}

// The gradient with respect to what enters the activation: of a, and for a gate of b through *grad_b.
// a and b are what entered it.
template <Activation A, class C>
S2S_INLINE Vec<C> activate_gradient(Vec<C> grad, Vec<C> a, Vec<C> b, Vec<C>* grad_b) {
  if constexpr (A == Activation::relu) return select(a <= C(0), Vec<C>{}, grad);
  if constexpr (A == Activation::silu) {
    const Vec<C> s = vsigmoid(a);
    return grad * s * (C(1) + a * (C(1) - s));
  }
  if constexpr (A == Activation::gelu) {
    const Vec<C> density = C(0.5 * M_2_SQRTPI * M_SQRT1_2) * vexp(C(-0.5) * a * a);
    return grad * (C(0.5) * (C(1) + verf(a * C(M_SQRT1_2))) + a * density);
  }
  if constexpr (A == Activation::tanh) {
    const Vec<C> y = vtanh(a);
    return grad * (C(1) - y * y);
  }
  if constexpr (A == Activation::glu) {
    const Vec<C> s = vsigmoid(b);
    *grad_b = grad * a * (s * (C(1) - s));
    return grad * s;
  }
  if constexpr (A == Activation::gated_tanh) {
    const Vec<C> h = vtanh(a), s = vsigmoid(b);
    *grad_b = grad * h * (s * (C(1) - s));
    return grad * s * (C(1) - h * h);
  }
  return grad;
}
