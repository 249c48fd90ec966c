// The 16-bit storage types and their scalar conversions. Outside the ISA regions: one definition for the whole library.
#pragma once
#include <cstdint>
#include <cstring>

namespace s2s {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace detail {
inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}
template <class T>
struct Compute {
  using type = T;
};
template <>
struct Compute<bfloat16> {
  using type = float;
};
template <>
struct Compute<float16> {
  using type = float;
};
}  // namespace detail

// The type in which values stored as T are computed: float for the 16-bit types, else T itself.
template <class T>
using compute_t = typename detail::Compute<T>::type;

inline float to_float(bfloat16 x) { return detail::float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {
    const uint32_t quiet = magnitude > 0x7c00u ? 0x400000u : 0u;
    return detail::float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 | quiet);
  }
  // The exponent is re-biased by a product with 2^112, which makes subnormals normal on its way.
  return detail::float_of(sign | detail::bits_of(detail::float_of(magnitude << 13) * 0x1p112f));
}

// Round to nearest, ties to even; a NaN becomes quiet and keeps its sign and the top of its payload.
inline bfloat16 to_bfloat16(float x) {
  const uint32_t u = detail::bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(u >> 16 | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}

inline float16 to_float16(float x) {
  const uint32_t u = detail::bits_of(x), sign = u >> 16 & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu))};
  if (magnitude >= 0x47800000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65536 and above
  if (magnitude < 0x38800000u)  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return {static_cast<uint16_t>(sign | (detail::bits_of(detail::float_of(magnitude) + 0.5f) - 0x3f000000u))};
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

inline float to_compute(float x) { return x; }
inline double to_compute(double x) { return x; }
inline float to_compute(bfloat16 x) { return to_float(x); }
inline float to_compute(float16 x) { return to_float(x); }

namespace detail {
template <class T>
struct Convert {
  static T from(compute_t<T> x) { return x; }
};
template <>
struct Convert<bfloat16> {
  static bfloat16 from(float x) { return to_bfloat16(x); }
};
template <>
struct Convert<float16> {
  static float16 from(float x) { return to_float16(x); }
};
}  // namespace detail

// The storage value nearest to x: from_compute<bfloat16>(1.5f).
template <class T>
inline T from_compute(compute_t<T> x) {
  return detail::Convert<T>::from(x);
}

}  // namespace s2s
