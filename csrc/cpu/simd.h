// Vectors of this instruction set. Vec<T> is a GCC/Clang vector type: arithmetic, comparisons (giving a Mask<T>) and bit operations are its
// operators. Storage of 16-bit floats is loaded into and stored from Vec<float>; lanes<bfloat16> is therefore lanes<float>.
// Multiply-adds are written as fma. The library must be compiled with -ffp-contract=off: only then has an expression the same bits wherever
// it is inlined.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(S2S_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Mask = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
template <class T>
inline constexpr int64_t lanes = S2S_VECTOR_BYTES / static_cast<int64_t>(sizeof(compute_t<T>));

// S2S_MM names the intrinsic of this width; S2S_OP also hands it its arguments. Plain 512-bit intrinsics start from an undefined value, of
// which GCC warns; the zeroing forms with a full mask compile to the same instruction.
#undef S2S_MM
#undef S2S_OP
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 16
#define S2S_MM(name) _mm_##name
#define S2S_OP(name, ...) _mm_##name(__VA_ARGS__)
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 32
#define S2S_MM(name) _mm256_##name
#define S2S_OP(name, ...) _mm256_##name(__VA_ARGS__)
#elif defined(__x86_64__)
#define S2S_MM(name) _mm512_##name
#define S2S_OP(name, ...) _mm512_maskz_##name(-1, __VA_ARGS__)
#endif

template <class T>
S2S_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // and not x + 0, which would lose the sign of -0
}

// Writes past the caches, for what is read much later; `to` is aligned to the vector. After the last of them comes stream_end.
template <class T>
S2S_INLINE void stream(T* to, Vec<T> v) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 32
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__x86_64__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#else
  std::memcpy(to, &v, sizeof v);
#endif
}
S2S_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Keeps the value where it is: the compiler would read memory again at every use.
template <class T>
S2S_INLINE void keep_in_register(Vec<T>& v) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}
// The pointer, without its history.
template <class T>
S2S_INLINE T* hidden(T* pointer) {
  asm("" : "+r"(pointer));
  return pointer;
}

template <class T>
S2S_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int64_t i = 0; i < lanes<T>; ++i) v[i] = static_cast<T>(i);
  return v;
}

template <class To, class From>
S2S_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// ---- conversions of whole vectors of 16-bit storage ----
typedef uint16_t HalfWords __attribute__((vector_size(S2S_VECTOR_BYTES / 2)));

S2S_INLINE Vec<float> widen(HalfWords words, bfloat16) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  const Vec<uint32_t> wide = (Vec<uint32_t>)S2S_OP(cvtepu16_epi32, (__m256i)words);  // the compiler would make it of halves
#else
  const Vec<uint32_t> wide = __builtin_convertvector(words, Vec<uint32_t>);
#endif
  return bit_cast<Vec<float>>(wide << 16);
}

#if defined(S2S_BFLOAT16_PRODUCTS) && !defined(S2S_TILE_UNIT)
// This copy is attention's alone, whose products take numbers below the least normal one for 0, as the instruction does.
S2S_INLINE HalfWords narrow(Vec<float> v, bfloat16) { return (HalfWords)_mm512_maskz_cvtneps_pbh(-1, v); }
#else
S2S_INLINE HalfWords narrow(Vec<float> v, bfloat16) {
  const Vec<uint32_t> u = bit_cast<Vec<uint32_t>>(v);
  const Vec<uint32_t> rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : (u >> 16 | 0x40u), HalfWords);
}
#endif

#if defined(__x86_64__) && S2S_VECTOR_BYTES >= 32
#if S2S_VECTOR_BYTES == 32
S2S_INLINE Vec<float> widen(HalfWords words, float16) { return _mm256_cvtph_ps((__m128i)words); }
S2S_INLINE HalfWords narrow(Vec<float> v, float16) { return (HalfWords)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
S2S_INLINE Vec<float> widen(HalfWords words, float16) { return S2S_OP(cvtph_ps, (__m256i)words); }
S2S_INLINE HalfWords narrow(Vec<float> v, float16) { return (HalfWords)S2S_OP(cvtps_ph, v, _MM_FROUND_TO_NEAREST_INT); }
#endif
#else
S2S_INLINE Vec<float> widen(HalfWords words, float16) {
  Vec<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = to_float(float16{words[i]});
  return v;
}
S2S_INLINE HalfWords narrow(Vec<float> v, float16) {
  HalfWords words;
  for (int i = 0; i < lanes<float>; ++i) words[i] = to_float16(v[i]).bits;
  return words;
}
#endif

// ---- memory: any alignment; the partial forms touch the first n elements only (0 <= n <= lanes<T>) ----
template <class T>
S2S_INLINE Vec<compute_t<T>> load(const T* from) {
  if constexpr (sizeof(T) == 2) {
    HalfWords words;
    std::memcpy(&words, from, sizeof words);
    return widen(words, T{});
  } else {
    Vec<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
}

template <class T>
S2S_INLINE void store(T* to, Vec<compute_t<T>> v) {
  if constexpr (sizeof(T) == 2) {
    const HalfWords words = narrow(v, T{});
    std::memcpy(to, &words, sizeof words);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// The rest of the vector is 0.
template <class T>
S2S_INLINE Vec<compute_t<T>> load_partial(const T* from, int64_t n) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>) return _mm256_maskload_ps(from, (__m256i)(iota<int32_t>() < broadcast(static_cast<int32_t>(n))));
  if constexpr (std::is_same_v<T, double>) return _mm256_maskload_pd(from, (__m256i)(iota<int64_t>() < broadcast(n)));
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), from);
  if constexpr (std::is_same_v<T, double>) return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1u), from);
  if constexpr (sizeof(T) == 2) return widen((HalfWords)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1u), from), T{});
#endif
  T buffer[lanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
  return load(buffer);
}

template <class T>
S2S_INLINE void store_partial(T* to, Vec<compute_t<T>> v, int64_t n) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 32
  if constexpr (std::is_same_v<T, float>)
    return _mm256_maskstore_ps(to, (__m256i)(iota<int32_t>() < broadcast(static_cast<int32_t>(n))), v);
  if constexpr (std::is_same_v<T, double>) return _mm256_maskstore_pd(to, (__m256i)(iota<int64_t>() < broadcast(n)), v);
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) return _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1u), v);
  if constexpr (std::is_same_v<T, double>) return _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1u), v);
  if constexpr (sizeof(T) == 2) return _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1u), (__m256i)narrow(v, T{}));
#endif
  T buffer[lanes<T>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) to[i] = buffer[i];
}

// ---- arithmetic ----
// a * b + c: rounded once where the instruction set has the instruction (always the same within one set).
#if defined(__x86_64__) && S2S_VECTOR_BYTES < 32
inline constexpr bool rounds_once = false;
#else
inline constexpr bool rounds_once = true;
#endif
#if defined(__x86_64__) && S2S_VECTOR_BYTES >= 32
S2S_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return S2S_MM(fmadd_ps)(a, b, c); }
S2S_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return S2S_MM(fmadd_pd)(a, b, c); }
S2S_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
S2S_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
#elif defined(__x86_64__)
S2S_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
S2S_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
S2S_INLINE float fma(float a, float b, float c) { return a * b + c; }
S2S_INLINE double fma(double a, double b, double c) { return a * b + c; }
#else
S2S_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
S2S_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
S2S_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  for (int64_t i = 0; i < lanes<float>; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
S2S_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  for (int64_t i = 0; i < lanes<double>; ++i) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
#endif

// min is a < b ? a : b and max is a > b ? a : b, lane by lane: a NaN in either gives b. Put a limit first to let a NaN through.
#if defined(__x86_64__)
S2S_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return S2S_OP(min_ps, a, b); }
S2S_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return S2S_OP(max_ps, a, b); }
S2S_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return S2S_OP(min_pd, a, b); }
S2S_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return S2S_OP(max_pd, a, b); }
S2S_INLINE Vec<float> vsqrt(Vec<float> v) { return S2S_OP(sqrt_ps, v); }
S2S_INLINE Vec<double> vsqrt(Vec<double> v) { return S2S_OP(sqrt_pd, v); }
#else
S2S_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
S2S_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
S2S_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
S2S_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
S2S_INLINE Vec<float> vsqrt(Vec<float> v) {
  for (int64_t i = 0; i < lanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
S2S_INLINE Vec<double> vsqrt(Vec<double> v) {
  for (int64_t i = 0; i < lanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif
template <class T>
S2S_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
S2S_INLINE std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a > b ? a : b;
}

// 1 / b for a b between 2^-125 and 2^126 in magnitude, within a unit in the last place: the divider would keep the multipliers of a wide
// vector waiting.
S2S_INLINE Vec<float> reciprocal(Vec<float> b) {
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 64
  const Vec<float> about = S2S_OP(rcp14_ps, b);
  return fma(about, fma(-b, about, broadcast(1.0f)), about);
#else
  return 1.0f / b;
#endif
}
S2S_INLINE Vec<double> reciprocal(Vec<double> b) { return 1.0 / b; }
// mask ? a : b, lane by lane; the mask is what a comparison of vectors gives.
S2S_INLINE Vec<float> select(Mask<float> mask, Vec<float> a, Vec<float> b) { return mask ? a : b; }
S2S_INLINE Vec<double> select(Mask<double> mask, Vec<double> a, Vec<double> b) { return mask ? a : b; }

S2S_INLINE Vec<float> vabs(Vec<float> v) { return bit_cast<Vec<float>>(bit_cast<Vec<int32_t>>(v) & 0x7fffffff); }
S2S_INLINE Vec<double> vabs(Vec<double> v) { return bit_cast<Vec<double>>(bit_cast<Vec<int64_t>>(v) & 0x7fffffffffffffff); }

// The magnitude of the first with the sign of the second.
S2S_INLINE Vec<float> copy_sign(Vec<float> v, Vec<float> sign) {
  return bit_cast<Vec<float>>((bit_cast<Vec<uint32_t>>(v) & 0x7fffffffu) | (bit_cast<Vec<uint32_t>>(sign) & 0x80000000u));
}
S2S_INLINE Vec<double> copy_sign(Vec<double> v, Vec<double> sign) {
  return bit_cast<Vec<double>>((bit_cast<Vec<uint64_t>>(v) & 0x7fffffffffffffffu) | (bit_cast<Vec<uint64_t>>(sign) & 0x8000000000000000u));
}

// Reductions fold halves upon each other, so their order is fixed for a given instruction set.
#if defined(__x86_64__)
#define S2S_FOLD(name, op)                                           \
  S2S_INLINE float name##_128(__m128 v) {                            \
    v = _mm_##op##_ps(v, _mm_movehl_ps(v, v));                       \
    return _mm_cvtss_f32(_mm_##op##_ss(v, _mm_shuffle_ps(v, v, 1))); \
  }                                                                  \
  S2S_INLINE double name##_128(__m128d v) { return _mm_cvtsd_f64(_mm_##op##_sd(v, _mm_unpackhi_pd(v, v))); }
S2S_FOLD(hsum, add)
S2S_FOLD(hmax, max)
#undef S2S_FOLD
#if S2S_VECTOR_BYTES == 16
S2S_INLINE float hsum(Vec<float> v) { return hsum_128((__m128)v); }
S2S_INLINE float hmax(Vec<float> v) { return hmax_128((__m128)v); }
S2S_INLINE double hsum(Vec<double> v) { return hsum_128((__m128d)v); }
S2S_INLINE double hmax(Vec<double> v) { return hmax_128((__m128d)v); }
#else
S2S_INLINE float hsum_256(__m256 v) { return hsum_128(_mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
S2S_INLINE float hmax_256(__m256 v) { return hmax_128(_mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1))); }
S2S_INLINE double hsum_256(__m256d v) { return hsum_128(_mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1))); }
S2S_INLINE double hmax_256(__m256d v) { return hmax_128(_mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1))); }
#if S2S_VECTOR_BYTES == 32
S2S_INLINE float hsum(Vec<float> v) { return hsum_256(v); }
S2S_INLINE float hmax(Vec<float> v) { return hmax_256(v); }
S2S_INLINE double hsum(Vec<double> v) { return hsum_256(v); }
S2S_INLINE double hmax(Vec<double> v) { return hmax_256(v); }
#else
S2S_INLINE float hsum(Vec<float> v) { return hsum_256(_mm256_add_ps(S2S_OP(extractf32x8_ps, v, 0), S2S_OP(extractf32x8_ps, v, 1))); }
S2S_INLINE float hmax(Vec<float> v) { return hmax_256(_mm256_max_ps(S2S_OP(extractf32x8_ps, v, 0), S2S_OP(extractf32x8_ps, v, 1))); }
S2S_INLINE double hsum(Vec<double> v) { return hsum_256(_mm256_add_pd(S2S_OP(extractf64x4_pd, v, 0), S2S_OP(extractf64x4_pd, v, 1))); }
S2S_INLINE double hmax(Vec<double> v) { return hmax_256(_mm256_max_pd(S2S_OP(extractf64x4_pd, v, 0), S2S_OP(extractf64x4_pd, v, 1))); }
#endif
#endif
#else
S2S_INLINE float hsum(Vec<float> v) { return (v[0] + v[2]) + (v[1] + v[3]); }
S2S_INLINE float hmax(Vec<float> v) { return max(max(v[0], v[2]), max(v[1], v[3])); }
S2S_INLINE double hsum(Vec<double> v) { return v[0] + v[1]; }
S2S_INLINE double hmax(Vec<double> v) { return max(v[0], v[1]); }
#endif

// The sums of as many vectors as have lanes, each folded alike, as lanes of one.
#if defined(__x86_64__) && S2S_VECTOR_BYTES == 32
S2S_INLINE Vec<float> sums_of(const Vec<float> (&v)[8]) {
  __m256 pairs[4], quads[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) pairs[i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d even = (__m256d)pairs[2 * i], odd = (__m256d)pairs[2 * i + 1];
    quads[i] = (__m256)_mm256_unpacklo_pd(even, odd) + (__m256)_mm256_unpackhi_pd(even, odd);
  }
  return _mm256_permute2f128_ps(quads[0], quads[1], 0x20) + _mm256_permute2f128_ps(quads[0], quads[1], 0x31);
}
#elif defined(__x86_64__) && S2S_VECTOR_BYTES == 64
S2S_INLINE Vec<float> sums_of(const Vec<float> (&v)[16]) {
  __m512 pairs[8], quads[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] = _mm512_maskz_unpacklo_ps(-1, v[2 * i], v[2 * i + 1]) + _mm512_maskz_unpackhi_ps(-1, v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d even = (__m512d)pairs[2 * i], odd = (__m512d)pairs[2 * i + 1];
    quads[i] = (__m512)_mm512_maskz_unpacklo_pd(-1, even, odd) + (__m512)_mm512_maskz_unpackhi_pd(-1, even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_maskz_shuffle_f32x4(-1, quads[2 * i], quads[2 * i + 1], 0x88) +
                _mm512_maskz_shuffle_f32x4(-1, quads[2 * i], quads[2 * i + 1], 0xdd);
  return _mm512_maskz_shuffle_f32x4(-1, eights[0], eights[1], 0x88) + _mm512_maskz_shuffle_f32x4(-1, eights[0], eights[1], 0xdd);
}
#endif

// Vectors of a row: whole ones, and the part of one at its end.
template <class T>
struct WholeVector {
  template <class S>
  S2S_INLINE Vec<T> get(const S* from) {
    return load(from);
  }
  S2S_INLINE void put(T* to, Vec<T> v) { store(to, v); }
  S2S_INLINE void keep(T* to, Vec<T> v, bool streams) { streams ? stream(to, v) : store(to, v); }
  S2S_INLINE Vec<T> only(Vec<T> v) { return v; }  // 0 where there is no element
};
template <class T>
struct PartVector {
  int64_t n;
  template <class S>
  inline __attribute__((always_inline)) Vec<T> get(const S* from) const {
    return load_partial(from, n);
  }
  inline __attribute__((always_inline)) void put(T* to, Vec<T> v) const { store_partial(to, v, n); }
  inline __attribute__((always_inline)) void keep(T* to, Vec<T> v, bool) const { store_partial(to, v, n); }
  inline __attribute__((always_inline)) Vec<T> only(Vec<T> v) const {
    return select(iota<T>() < broadcast(static_cast<T>(n)), v, Vec<T>{});
  }
};

template <class T, class F>
S2S_INLINE void each_vector(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + lanes<T> <= n; j += lanes<T>) f(WholeVector<T>{}, j);
  if (j < n) f(PartVector<T>{n - j}, j);
}
