// exp, log, tanh, sigmoid and erf on vectors. A NaN gives NaN, an infinity its limit. Errors stay within 2 ulp (3 for tanh and erf), close
// to 0 too. Polynomials are minimax fits (Remez) on the reduced ranges; the reductions are Cody and Waite's, "Software Manual for the
// Elementary Functions", 1980.

template <class T>
struct MathConstants;

template <>
struct MathConstants<float> {
  using Bits = uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr Bits bias = 127, half_root = 0x3f3504f3u, mantissa_mask = 0x7fffffu;
  static constexpr Bits one = 0x3f800000u, exponent_tag = 0x4b000000u, round_bits = 0x4b400000u;
  static constexpr float exponent_tag_value = 8388608.0f + 127.0f, round = 12582912.0f;
  static constexpr float log2e = 1.44269504f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float ln2 = 0.693147181f;
  static constexpr float exp_min = -104.0f, exp_max = 89.0f, exp_fast_min = -88.0f, exp_fast_max = 88.8f, tanh_max = 20.0f;
  static constexpr float sigmoid_min = -87.33f;
  static constexpr float smallest_normal = 0x1p-126f, subnormal_scale = 0x1p25f, subnormal_exponent = 25.0f;
  // (expm1(r) - r) / r^2 for |r| <= ln(2) / 2
  static constexpr float exp[] = {0.5000000054f, 0.1666666691f, 0.04166632426f, 0.008333218874f, 0.00139434294f, 0.0001996291045f};
  // (2 atanh(s) / s - 2) / s^2 in s^2, for the s of arguments between sqrt(1/2) and sqrt(2)
  static constexpr float log[] = {0.6666677966f, 0.3997709025f, 0.2988494318f};
  // erf(x) / x - 1 in x^2 for |x| <= 1, and log(erfc(1 + t)) for 0 <= t <= erf_max - 1, weighted by its share in erf
  static constexpr float erf_max = 4.0f;
  static constexpr float erf[] = {0.1283791657f,   -0.3761262583f,    0.1128358516f, -0.02685381222f,
                                  0.005188328038f, -0.0008010195418f, 7.85386375e-5f};
  static constexpr float log_erfc[] = {-1.84960551f,   -2.638967516f,   -0.8431070647f,   -0.04156355141f,
                                       0.01004658866f, -0.00201209793f, 0.0002895888879f, -2.169751856e-5f};
};

template <>
struct MathConstants<double> {
  using Bits = uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr Bits bias = 1023, half_root = 0x3fe6a09e667f3bcdu, mantissa_mask = 0xfffffffffffffu;
  static constexpr Bits one = 0x3ff0000000000000u, exponent_tag = 0x4330000000000000u, round_bits = 0x4338000000000000u;
  static constexpr double exponent_tag_value = 4503599627370496.0 + 1023.0, round = 6755399441055744.0;
  static constexpr double log2e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double exp_min = -746.0, exp_max = 710.0, exp_fast_min = -709.0, exp_fast_max = 709.8, tanh_max = 40.0;
  static constexpr double sigmoid_min = -708.39;
  static constexpr double smallest_normal = 0x1p-1022, subnormal_scale = 0x1p54, subnormal_exponent = 54.0;
  static constexpr double exp[] = {0.500000000000000088,   0.166666666666666711,   0.0416666666666520705,    0.00833333333332604455,
                                   0.00138888888956739041, 0.00019841269875147741, 0.0000248015744406941998, 2.75572549759880007e-6,
                                   2.75679675989540354e-7, 2.51053963786837623e-8, 1.76878032348983241e-9};
  static constexpr double log[] = {0.666666666666673893, 0.399999999993803615, 0.285714287508529561, 0.222221976280689337,
                                   0.1818361707691909,   0.153126147557008056, 0.148111233487727347};
  static constexpr double erf_max = 6.0;
  static constexpr double erf[] = {0.128379167095512574,   -0.376126389031837476,   0.112837916709548575,    -0.0268661706450728932,
                                   0.00522397762478085377, -0.00085483269787416408, 0.000120553310368845413, -0.0000149255935066369999,
                                   1.64609728144106652e-6, -1.63500252076522738e-7, 1.4657879812163377e-8,   -1.13656660721195603e-9,
                                   5.94526225160077529e-11};
  static constexpr double log_erfc[] = {
      -1.84960550993324826,    -2.63896751423478858,    -0.843107256358658965,    -0.0415610980421832005,    0.0100338253784688566,
      -0.00197790259411242619, 0.000237322591075353361, 0.0000262775610755054581, -0.0000271584734380555547, 9.60795470795502114e-6,
      -2.0587373569751575e-6,  1.42031851256667551e-7,  9.80602229066542573e-8,   -5.2268817507886935e-8,    1.49872142633969617e-8,
      -2.88159809510693263e-9, 3.70966152336042101e-10, -2.90672985388823808e-11, 1.04963044462114547e-12};
};

// coefficient[0] + coefficient[1] x + ...
template <class T, int N>
S2S_INLINE Vec<T> polynomial(const T (&coefficient)[N], Vec<T> x) {
  Vec<T> sum = broadcast(coefficient[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, broadcast(coefficient[i]));
  return sum;
}

// x = n ln 2 + r with an integer n: returns r, and n as the low bits of `rounded`. |x| is at most about 1100.
template <class T>
S2S_INLINE Vec<T> reduce_exponent(Vec<T> x, Vec<typename MathConstants<T>::Bits>& rounded) {
  using M = MathConstants<T>;
  const Vec<T> shifted = fma(x, broadcast(M::log2e), broadcast(M::round));
  const Vec<T> n = shifted - broadcast(M::round);
  rounded = bit_cast<Vec<typename M::Bits>>(shifted);
  return fma(n, broadcast(-M::ln2_low), fma(n, broadcast(-M::ln2_high), x));
}

// expm1(r) for |r| <= ln(2) / 2
template <class T>
S2S_INLINE Vec<T> expm1_reduced(Vec<T> r) {
  return fma(r * r, polynomial<T>(MathConstants<T>::exp, r), r);
}

// 2^n from the low bits of `rounded`: 0 at n = -bias, infinity at n = bias + 1.
template <class T>
S2S_INLINE Vec<T> power_of_two(Vec<typename MathConstants<T>::Bits> rounded) {
  return bit_cast<Vec<T>>((rounded + MathConstants<T>::bias) << MathConstants<T>::mantissa_bits);
}

template <class T>
S2S_INLINE Vec<T> exp_full(Vec<T> x) {
  using M = MathConstants<T>;
  Vec<typename M::Bits> rounded;
  const Vec<T> r = reduce_exponent<T>(max(broadcast(M::exp_min), min(broadcast(M::exp_max), x)), rounded);
  // In two factors, so that results near overflow and below the smallest normal are right.
  const Vec<typename M::Bits> n = rounded - M::round_bits, half = ((n + 4096u) >> 1) - 2048u;
  return (expm1_reduced<T>(r) + T(1)) * power_of_two<T>(half) * power_of_two<T>(n - half);
}

template <class T>
S2S_INLINE Vec<T> exp_fast(Vec<T> x) {
  using M = MathConstants<T>;
  Vec<typename M::Bits> rounded;
  const Vec<T> r = reduce_exponent<T>(max(broadcast(M::exp_fast_min), min(broadcast(M::exp_fast_max), x)), rounded);
  return (expm1_reduced<T>(r) + T(1)) * power_of_two<T>(rounded);
}

// exp(x) for x <= 0 with an error of an ulp or two of 1, not of the result, as sums that have a term of 1 need it; 0 from -88 on.
S2S_INLINE Vec<float> vexp_weight(Vec<float> x) {
  using M = MathConstants<float>;
  const Vec<float> kept = max(broadcast(M::exp_fast_min), x), biased = broadcast(M::round + static_cast<float>(M::bias));
  const Vec<float> shifted = fma(kept, broadcast(M::log2e), biased);
  const Vec<float> r = fma(shifted - biased, broadcast(-M::ln2), kept);
  const Vec<float> scale = bit_cast<Vec<float>>(bit_cast<Vec<M::Bits>>(shifted) << M::mantissa_bits);
  return fma(r, fma(r, polynomial<float>(M::exp, r), broadcast(1.0f)), broadcast(1.0f)) * scale;
}

S2S_INLINE Vec<double> vexp_weight(Vec<double> x) { return exp_fast<double>(x); }

// tanh(x) = e / (e + 2) with e = expm1(2x) = 2^n expm1(r) + (2^n - 1), which cancels nowhere. In float32 of |x|: near -1 the last bit of e
// would be the result's.
template <class T>
S2S_INLINE Vec<T> tanh_full(Vec<T> x) {
  using M = MathConstants<T>;
  constexpr bool of_magnitude = std::is_same_v<T, float>;
  Vec<typename M::Bits> rounded;
  const Vec<T> twice = min(broadcast(M::tanh_max), of_magnitude ? vabs(x + x) : x + x);
  const Vec<T> r = reduce_exponent<T>(of_magnitude ? twice : max(broadcast(-M::tanh_max), twice), rounded);
  const Vec<T> scale = power_of_two<T>(rounded);
  const Vec<T> e = fma(scale, expm1_reduced<T>(r), scale - T(1)), d = e + T(2);
  if constexpr (!of_magnitude) return e / d;
  // The quotient by Newton's step, from what e + 2 lost in rounding too.
  const Vec<T> lost = e - (d - T(2)), inverse = reciprocal(d), q = e * inverse;
  return copy_sign(fma(fma(-lost, q, fma(-d, q, e)), inverse, q), x);
}

template <class T>
S2S_INLINE Vec<T> log_full(Vec<T> x) {
  using M = MathConstants<T>;
  using Bits = typename M::Bits;
  const auto subnormal = x < broadcast(M::smallest_normal);
  const Vec<Bits> bits = bit_cast<Vec<Bits>>(select(subnormal, x * broadcast(M::subnormal_scale), x)) + (M::one - M::half_root);
  Vec<T> e = bit_cast<Vec<T>>((bits >> M::mantissa_bits) | M::exponent_tag) - broadcast(M::exponent_tag_value);
  e = e - select(subnormal, broadcast(M::subnormal_exponent), Vec<T>{});
  const Vec<T> f = bit_cast<Vec<T>>((bits & M::mantissa_mask) + M::half_root) - T(1);
  const Vec<T> s = f / (f + T(2)), square = s * s, half_square = f * f * T(0.5);
  const Vec<T> tail = fma(s, fma(square, polynomial<T>(M::log, square), half_square), e * broadcast(M::ln2_low));
  const Vec<T> finite = fma(e, broadcast(M::ln2_high), f - (half_square - tail));
  const Vec<T> infinity = broadcast(std::numeric_limits<T>::infinity());
  const Vec<T> positive = select(x == infinity, infinity, select(x == Vec<T>{}, -infinity, finite));
  return select(x >= Vec<T>{}, positive, broadcast(std::numeric_limits<T>::quiet_NaN()));
}

template <class T>
S2S_INLINE Vec<T> erf_full(Vec<T> x) {
  using M = MathConstants<T>;
  const Vec<T> magnitude = vabs(x);
  const Vec<T> near = fma(x, polynomial<T>(M::erf, x * x), x);
  const Vec<T> complement = exp_fast<T>(polynomial<T>(M::log_erfc, min(broadcast(M::erf_max), magnitude) - T(1)));
  return select(magnitude <= broadcast(T(1)), near, copy_sign(T(1) - complement, x));
}

S2S_INLINE Vec<float> vexp(Vec<float> x) { return exp_full<float>(x); }
S2S_INLINE Vec<double> vexp(Vec<double> x) { return exp_full<double>(x); }

// exp for arguments up to 88.3 (709.4): cheaper, and a result below the smallest normal number may be 0.
S2S_INLINE Vec<float> vexp_fast(Vec<float> x) { return exp_fast<float>(x); }
S2S_INLINE Vec<double> vexp_fast(Vec<double> x) { return exp_fast<double>(x); }

S2S_INLINE Vec<float> vlog(Vec<float> x) { return log_full<float>(x); }
S2S_INLINE Vec<double> vlog(Vec<double> x) { return log_full<double>(x); }

S2S_INLINE Vec<float> vtanh(Vec<float> x) { return tanh_full<float>(x); }
S2S_INLINE Vec<double> vtanh(Vec<double> x) { return tanh_full<double>(x); }

// A result below the smallest normal number is 0.
template <class T>
S2S_INLINE Vec<T> sigmoid_full(Vec<T> x) {
  using M = MathConstants<T>;
  const Vec<T> least = broadcast(M::sigmoid_min);
  Vec<typename M::Bits> rounded;
  const Vec<T> r = reduce_exponent<T>(-max(least, min(broadcast(-M::sigmoid_min), x)), rounded);
  const Vec<T> e = (expm1_reduced<T>(r) + T(1)) * power_of_two<T>(rounded);
  return select(x < least, Vec<T>{}, reciprocal(e + T(1)));
}
S2S_INLINE Vec<float> vsigmoid(Vec<float> x) { return sigmoid_full<float>(x); }
S2S_INLINE Vec<double> vsigmoid(Vec<double> x) { return sigmoid_full<double>(x); }

S2S_INLINE Vec<float> verf(Vec<float> x) { return erf_full<float>(x); }
S2S_INLINE Vec<double> verf(Vec<double> x) { return erf_full<double>(x); }

// Scalars: the same bits as the vectors give.
S2S_INLINE float vexp(float x) { return vexp(broadcast(x))[0]; }
S2S_INLINE double vexp(double x) { return vexp(broadcast(x))[0]; }
S2S_INLINE float vexp_fast(float x) { return vexp_fast(broadcast(x))[0]; }
S2S_INLINE double vexp_fast(double x) { return vexp_fast(broadcast(x))[0]; }
S2S_INLINE float vlog(float x) { return vlog(broadcast(x))[0]; }
S2S_INLINE double vlog(double x) { return vlog(broadcast(x))[0]; }
S2S_INLINE float vtanh(float x) { return vtanh(broadcast(x))[0]; }
S2S_INLINE double vtanh(double x) { return vtanh(broadcast(x))[0]; }
S2S_INLINE float vsigmoid(float x) { return vsigmoid(broadcast(x))[0]; }
S2S_INLINE double vsigmoid(double x) { return vsigmoid(broadcast(x))[0]; }
S2S_INLINE float verf(float x) { return verf(broadcast(x))[0]; }
S2S_INLINE double verf(double x) { return verf(broadcast(x))[0]; }
