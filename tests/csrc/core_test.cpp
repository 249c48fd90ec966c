// Unit tests of the shared CPU core, run under the instruction set that S2S_CPU_ISA names: core_test <suite>. Prints what failed and exits
// with 1.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#define S2S_TILES
#define S2S_KERNELS "core_kernels.h"
#include "each_isa.h"

using s2s::bfloat16;
using s2s::float16;

namespace {

int failures = 0;

template <class... Values>
void check(bool passed, const char* format, Values... values) {
  if (passed) return;
  if (++failures <= 20) std::printf(format, values...), std::printf("\n");
}
void check(bool passed, const char* text) { check(passed, "%s", text); }

template <class T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0;
}

// ---- mathematics ----
// Distance from the exact value in units of the last place of T there.
template <class T>
double ulps(T got, long double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0 : INFINITY;
  if (std::fabs(exact) > std::numeric_limits<T>::max()) {
    const bool at_limit = std::fabs(got) == std::numeric_limits<T>::max() && !std::isinf(exact);
    return (std::isinf(got) || at_limit) && std::signbit(got) == std::signbit(exact) ? 0 : INFINITY;
  }
  if (!std::isfinite(got))
    return std::fabs(exact) > std::numeric_limits<T>::max() * (1 - 2 * std::numeric_limits<T>::epsilon()) ? 1 : INFINITY;
  int exponent;
  std::frexp(std::fmax(std::fabs(exact), static_cast<long double>(std::numeric_limits<T>::min())), &exponent);
  return static_cast<double>(std::fabs(got - exact) / std::ldexp(1.0L, exponent - std::numeric_limits<T>::digits));
}

template <class T>
std::vector<T> math_inputs() {
  std::vector<T> x = {0,
                      T(-0.0),
                      1,
                      -1,
                      T(0.5),
                      T(1e4),
                      T(-1e4),
                      T(1e30),
                      T(-1e30),
                      INFINITY,
                      -INFINITY,
                      NAN,
                      std::numeric_limits<T>::min(),
                      std::numeric_limits<T>::denorm_min(),
                      std::numeric_limits<T>::max(),
                      std::numeric_limits<T>::lowest(),
                      T(88.7),
                      T(-87.3),
                      T(-103.9)};
  const int dense = std::is_same_v<T, float> ? 150000 : 60000;
  for (const T range : {T(0.4), T(2), T(7), T(25), T(110), T(800)})
    for (int i = 0; i < dense / 6; ++i) x.push_back(range * (T(2) * i / (dense / 6) - 1) + T(1e-6) * i / dense);
  std::mt19937_64 random(1);
  for (int i = 0; i < dense / 3; ++i) {  // any bit pattern: all magnitudes alike
    T value;
    const uint64_t bits = random();
    std::memcpy(&value, &bits, sizeof value);
    x.push_back(value);
  }
  return x;
}

template <class T>
void test_function(const char* name, typename s2s::baseline::CoreProbe<T>::Unary function, long double (*exact)(long double), double limit,
                   bool flushes) {
  const std::vector<T> x = math_inputs<T>();
  std::vector<T> y(x.size() + 1, T(77));
  function(x.data(), y.data(), static_cast<int64_t>(x.size()));
  check(y.back() == T(77), "%s wrote past its end", name);
  double worst = 0;
  T worst_at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const long double want = exact(x[i]);
    if (flushes && std::fabs(want) < std::numeric_limits<T>::min() * 1.5L && std::fabs(y[i]) <= std::numeric_limits<T>::min() * 1.5L)
      continue;
    const double error = ulps(y[i], want);
    if (!(error <= worst)) worst = error, worst_at = x[i];
  }
  std::printf("%s<%s> %.2f ulp at %.9g\n", name, sizeof(T) == 4 ? "float" : "double", worst, static_cast<double>(worst_at));
  check(worst <= limit, "%s: %g ulp at %.9g exceed %g", name, worst, static_cast<double>(worst_at), limit);
}

long double exact_sigmoid(long double x) { return 1.0L / (1.0L + std::exp(-x)); }
long double exact_log(long double x) { return x < 0 ? std::numeric_limits<long double>::quiet_NaN() : std::log(x); }

// Past 88.3 (709.4) exp_fast may be infinite already: there it is held to nothing.
template <class T>
long double exact_exp_fast(long double x) {
  return x > (sizeof(T) == 4 ? 88.3L : 709.4L) ? INFINITY : std::exp(x);
}
template <class T>
void exp_fast_below_limit(const T* x, T* y, int64_t n) {
  S2S_SELECT(CoreProbe<T>::exp_fast)(x, y, n);
  for (int64_t i = 0; i < n; ++i)
    if (x[i] > (sizeof(T) == 4 ? T(88.3) : T(709.4))) y[i] = INFINITY;
}

template <class T>
void test_math() {
  test_function<T>("exp", S2S_SELECT(CoreProbe<T>::exp), std::exp, 1.5, false);
  test_function<T>("exp_fast", exp_fast_below_limit<T>, exact_exp_fast<T>, 1.5, true);
  test_function<T>("log", S2S_SELECT(CoreProbe<T>::log), exact_log, 1.5, false);
  test_function<T>("tanh", S2S_SELECT(CoreProbe<T>::tanh), std::tanh, 3, false);
  test_function<T>("sigmoid", S2S_SELECT(CoreProbe<T>::sigmoid), exact_sigmoid, 2.5, true);
  test_function<T>("erf", S2S_SELECT(CoreProbe<T>::erf), std::erf, 3, false);
  test_function<T>("sqrt", S2S_SELECT(CoreProbe<T>::sqrt), std::sqrt, 0.5001, false);

  const T x[] = {1e4, -1e4, INFINITY, -INFINITY};
  T y[4];
  S2S_SELECT(CoreProbe<T>::tanh)(x, y, 4);
  check(y[0] == 1 && y[1] == -1 && y[2] == 1 && y[3] == -1, "tanh saturates");
  S2S_SELECT(CoreProbe<T>::sigmoid)(x, y, 4);
  check(y[0] == 1 && y[1] == 0 && y[2] == 1 && y[3] == 0, "sigmoid saturates");
  S2S_SELECT(CoreProbe<T>::exp)(x, y, 4);
  check(std::isinf(y[0]) && y[1] == 0 && std::isinf(y[2]) && y[3] == 0, "exp saturates");
  S2S_SELECT(CoreProbe<T>::erf)(x, y, 4);
  check(y[0] == 1 && y[1] == -1 && y[2] == 1 && y[3] == -1, "erf saturates");

  const typename s2s::baseline::CoreProbe<T>::Unary functions[] = {S2S_SELECT(CoreProbe<T>::exp),     S2S_SELECT(CoreProbe<T>::exp_fast),
                                                                   S2S_SELECT(CoreProbe<T>::log),     S2S_SELECT(CoreProbe<T>::tanh),
                                                                   S2S_SELECT(CoreProbe<T>::sigmoid), S2S_SELECT(CoreProbe<T>::erf)};
  for (const T value : {T(0.3), T(2.5), T(17)}) {
    T scalars[6];
    S2S_SELECT(CoreProbe<T>::scalars)(value, scalars);
    for (int f = 0; f < 6; ++f) {
      T vector;
      functions[f](&value, &vector, 1);
      check(same_bits(vector, scalars[f]), "scalar function %d differs from the vector's", f);
    }
  }
}

template <class T>
void test_basics() {
  std::vector<T> x(16), y(16), out(2 + 6 * 16);
  for (int i = 0; i < 16; ++i) x[i] = T((i * 7) % 16) - 5, y[i] = T((i * 5) % 16) - 7;
  x[0] = T(-0.0);
  const int64_t lanes = S2S_SELECT(CoreProbe<T>::basics)(x.data(), y.data(), out.data());
  T sum = 0, most = x[0];
  for (int i = 0; i < lanes; ++i) sum += x[i], most = std::fmax(most, x[i]);
  check(out[0] == sum && out[1] == most, "horizontal sum or maximum");
  for (int i = 0; i < lanes; ++i) {
    const T* at = out.data() + 2 + i;
    check(same_bits(at[0], std::fabs(x[i])), "abs");
    check(same_bits(at[lanes], std::copysign(x[i], y[i])), "copy_sign");
    check(at[2 * lanes] == std::fmin(x[i], y[i]) && at[3 * lanes] == std::fmax(x[i], y[i]), "min or max");
    check(at[4 * lanes] == (x[i] < y[i] ? x[i] : y[i]), "select");
    check(at[5 * lanes] == x[i] * y[i] + x[i], "fma");
  }
}

// ---- 16-bit storage ----
float decode(uint16_t bits, int mantissa_bits, int bias) {
  const int exponent = (bits & 0x7fff) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1),
            top = (1 << (15 - mantissa_bits)) - 1;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == top) return mantissa ? NAN : sign * INFINITY;
  const float fraction = static_cast<float>(mantissa) / static_cast<float>(1 << mantissa_bits);
  return sign * (exponent ? std::ldexp(1 + fraction, exponent - bias) : std::ldexp(fraction, 1 - bias));
}

template <class S>
void test_storage(int mantissa_bits, int bias) {
  std::vector<S> all(65536 + 3);
  for (int i = 0; i < 65536; ++i) all[i].bits = static_cast<uint16_t>(i);
  std::vector<float> wide(65536 + 3);
  S2S_SELECT(core_widen<S>)(all.data(), wide.data(), 65536 + 3);
  std::vector<float> inputs;
  for (int i = 0; i < 65536; ++i) {
    const float want = decode(static_cast<uint16_t>(i), mantissa_bits, bias), scalar = s2s::to_float(all[i]);
    if (std::isnan(want)) {
      check(std::isnan(scalar) && std::isnan(wide[i]), "NaN %04x is lost", i);
    } else {
      check(same_bits(want, scalar) && same_bits(want, wide[i]), "%04x gives %g and %g, not %g", i, scalar, wide[i], want);
      const float next = decode(static_cast<uint16_t>(i + 1), mantissa_bits, bias),
                  middle = std::isinf(want) || std::isinf(next) ? want : want / 2 + next / 2;
      for (const float x : {want, middle, std::nextafter(middle, -INFINITY), std::nextafter(middle, INFINITY)}) inputs.push_back(x);
    }
  }
  for (const float x : {65519.99f, 65520.0f, -65520.0f, 1e30f, -1e30f, 3.4e38f, 1e-45f, INFINITY, -INFINITY}) inputs.push_back(x);
  std::vector<S> narrow(inputs.size());
  S2S_SELECT(core_narrow<S>)(inputs.data(), narrow.data(), static_cast<int64_t>(inputs.size()));
  const int smallest = 1 - bias - mantissa_bits;
  const double overflow = std::ldexp(2 - std::ldexp(1.0, -mantissa_bits - 1), bias);
  for (size_t i = 0; i < inputs.size(); ++i) {
    const double x = inputs[i];
    int exponent;
    std::frexp(x, &exponent);
    const int unit = std::max(exponent - 1 - mantissa_bits, smallest);
    const double rounded =
        std::isinf(x) || std::fabs(x) >= overflow ? std::copysign(INFINITY, x) : std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
    const uint16_t scalar = s2s::from_compute<S>(inputs[i]).bits;
    check(scalar == narrow[i].bits && decode(scalar, mantissa_bits, bias) == static_cast<float>(rounded),
          "%.9g is stored as %04x and %04x, not %.9g", x, scalar, narrow[i].bits, rounded);
  }
  const float nans[] = {NAN, -NAN, std::numeric_limits<float>::signaling_NaN()};
  S stored[3];
  S2S_SELECT(core_narrow<S>)(nans, stored, 3);
  for (int i = 0; i < 3; ++i)
    check(std::isnan(s2s::to_float(stored[i])) && std::isnan(s2s::to_float(s2s::from_compute<S>(nans[i]))), "a NaN is lost when stored");
}

// ---- matrix products ----
template <class T>
T chain(T a, T b, T c) {
#if defined(__x86_64__)
  if (s2s::active_isa() == s2s::Isa::baseline) return a * b + c;
#endif
  return std::fma(a, b, c);
}

template <class S>
std::vector<S> random_values(size_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<S> values(n);
  for (S& value : values) value = s2s::from_compute<S>(static_cast<s2s::compute_t<S>>(normal(random)));
  return values;
}

struct Strides {
  int64_t row, col, size;
};

Strides strides(int layout, int64_t rows, int64_t cols) {
  switch (layout) {
    case 0:
      return {cols, 1, rows * cols + 1};
    case 1:
      return {1, rows, rows * cols + 1};
    case 2:
      return {cols + 5, 1, rows * (cols + 5) + 1};
    case 3:
      return {1, rows + 3, (rows + 3) * cols + 1};
    case 4:
      return {2 * cols + 1, 2, rows * (2 * cols + 1) + 1};
    default:
      return {0, 1, cols + 1};
  }
}

// Equality to the last bit with the documented order of operations, which makes the result independent of tile shapes and splits.
template <class T, class TA, class TB>
void test_product(int64_t m, int64_t n, int64_t k, int a_layout, int b_layout, bool accumulate, std::mt19937& random) {
  const Strides as = strides(a_layout, m, k), bs = strides(b_layout, k, n);
  const std::vector<TA> a = random_values<TA>(as.size, random);
  const std::vector<TB> b = random_values<TB>(bs.size, random);
  const int64_t c_row = n + 3;
  const std::vector<T> before = random_values<T>(m * c_row, random);
  std::vector<T> want = before, got = before;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      T total = accumulate ? before[i * c_row + j] : T(0);
      for (int64_t k0 = 0; k0 < k; k0 += 256) {
        T sum = 0;
        for (int64_t t = k0; t < std::min(k, k0 + 256); ++t)
          sum = chain<T>(s2s::to_compute(a[i * as.row + t * as.col]), s2s::to_compute(b[t * bs.row + j * bs.col]), sum);
        total = accumulate || k0 ? total + sum : sum;
      }
      want[i * c_row + j] = total;
    }
  const int64_t size = S2S_SELECT(CoreProbe<T>::workspace)(m, n, k);
  std::vector<T> workspace(size + 1, std::numeric_limits<T>::quiet_NaN());
  workspace[size] = T(42);
  const auto product = S2S_SELECT(core_product<T, TA, TB>);
  const auto equal = [&] { return want.empty() || std::memcmp(want.data(), got.data(), want.size() * sizeof(T)) == 0; };
  product(m, n, k, a.data(), as.row, as.col, b.data(), bs.row, bs.col, got.data(), c_row, accumulate, workspace.data());
  check(equal(), "gemm m %lld n %lld k %lld, layouts %d %d", (long long)m, (long long)n, (long long)k, a_layout, b_layout);
  check(workspace[size] == T(42), "gemm exceeds its workspace");

  // Any split of rows and columns.
  const int64_t row = std::uniform_int_distribution<int64_t>(0, m)(random), col = std::uniform_int_distribution<int64_t>(0, n)(random);
  got = before;
  for (const auto& [i0, i1] : {std::pair{int64_t{0}, row}, {row, m}})
    for (const auto& [j0, j1] : {std::pair{int64_t{0}, col}, {col, n}})
      product(i1 - i0, j1 - j0, k, a.data() + i0 * as.row, as.row, as.col, b.data() + j0 * bs.col, bs.row, bs.col,
              got.data() + i0 * c_row + j0, c_row, accumulate, workspace.data());
  check(equal(), "gemm split at %lld, %lld", (long long)row, (long long)col);

  if constexpr (std::is_same_v<T, TA>) {
    if (as.col != 1) return;
    const int64_t nr = S2S_SELECT(CoreProbe<T>::panel_columns)(), panels = (n + nr - 1) / nr, middle = panels / 2;
    std::vector<T> packed(S2S_SELECT(CoreProbe<T>::packed_size)(n, k) + 1, std::numeric_limits<T>::quiet_NaN());
    packed.back() = T(42);
    S2S_SELECT(core_pack<T, TB>)(n, k, b.data(), bs.row, bs.col, packed.data());
    check(packed.back() == T(42), "pack_b exceeds its size");
    const auto product_packed = S2S_SELECT(CoreProbe<T>::product_packed);
    got = before;
    product_packed(m, n, k, a.data(), as.row, packed.data(), got.data(), c_row, accumulate, -1, -1);
    check(equal(), "gemm_packed m %lld n %lld k %lld", (long long)m, (long long)n, (long long)k);
    got = before;
    product_packed(m, n, k, a.data(), as.row, packed.data(), got.data(), c_row, accumulate, middle, panels);
    product_packed(m, n, k, a.data(), as.row, packed.data(), got.data(), c_row, accumulate, 0, middle);
    check(equal(), "gemm_packed over split panels, m %lld n %lld k %lld", (long long)m, (long long)n, (long long)k);
  }
}

// Products from planes are as exact as float32's own, and their bits are those of any split of rows and columns, of either layout and
// direction.
void test_tiles(int64_t m, int64_t n, int64_t k, int spoiled, bool accumulate, std::mt19937& random) {
  std::vector<float> a = random_values<float>(m * k, random), b = random_values<float>(k * n, random);
  const float odd[] = {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::max(), 0.0f};
  for (int i = 0; i < spoiled; ++i) {
    a[random() % a.size()] = odd[random() % 5];
    b[random() % b.size()] = odd[random() % 5];
  }
  std::vector<float> a_columns(a.size()), b_columns(b.size());
  for (int64_t i = 0; i < m; ++i)
    for (int64_t t = 0; t < k; ++t) a_columns[t * m + i] = a[i * k + t];
  for (int64_t t = 0; t < k; ++t)
    for (int64_t j = 0; j < n; ++j) b_columns[j * k + t] = b[t * n + j];
  const int64_t size = S2S_SELECT(TileProbe::packed_size)(n, k), scratch = S2S_SELECT(TileProbe::workspace)(m, k);
  const auto nan = std::numeric_limits<float>::quiet_NaN();
  // Panels are aligned to a cache line.
  std::vector<float> memory(size + 17, nan), other(size + 17, nan), workspace(scratch + 1, nan);
  const auto aligned = [](std::vector<float>& v) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(v.data()) + 63) / 64 * 64);
  };
  float* const packed = aligned(memory);
  packed[size] = workspace[scratch] = 42;
  S2S_SELECT(TileProbe::pack_rows)(n, k, b.data(), packed);
  S2S_SELECT(TileProbe::pack_columns)(n, k, b_columns.data(), aligned(other));
  check(packed[size] == 42, "packing for tiles exceeds its size");
  const int64_t c_row = n + 3;
  const std::vector<float> before = random_values<float>(m * c_row, random);
  std::vector<float> got = before;
  const auto product = S2S_SELECT(TileProbe::product);
  product(m, n, k, a.data(), k, packed, got.data(), c_row, accumulate, false, workspace.data());
  check(workspace[scratch] == 42, "a product of tiles exceeds its workspace");
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      // Each product is off by up to 3 2^-22, each addition by half a unit of the sum so far.
      double sum = 0, most = 0;
      for (int64_t t = 0; t < k; ++t) {
        const double term = static_cast<double>(a[i * k + t]) * b[t * n + j];
        sum += term, most += std::isfinite(term) ? std::abs(term) : 0;
      }
      const float start = accumulate ? before[i * c_row + j] : 0.0f, value = got[i * c_row + j];
      sum += start, most += std::abs(start);
      if (most >= 3e38) continue;  // a sum on the way may be infinite, in any order
      if (!std::isfinite(sum))
        check(std::isnan(sum) ? std::isnan(value) : value == static_cast<float>(sum), "tiles m %lld n %lld k %lld at %lld, %lld: %g for %g",
              (long long)m, (long long)n, (long long)k, (long long)i, (long long)j, value, sum);
      else
        check(std::abs(value - sum) <= most * (std::sqrt(static_cast<double>(k)) + 2) * 0x1p-23,
              "tiles m %lld n %lld k %lld at %lld, %lld: %.9g for %.9g", (long long)m, (long long)n, (long long)k, (long long)i,
              (long long)j, value, sum);
    }
    for (int64_t j = n; j < c_row; ++j) check(got[i * c_row + j] == before[i * c_row + j], "a product of tiles writes beyond its columns");
  }
  const std::vector<float> want = got;
  const auto equal = [&] { return std::memcmp(want.data(), got.data(), want.size() * sizeof(float)) == 0; };
  const auto same = [&](const char* what) {
    check(equal(), "tiles m %lld n %lld k %lld: other bits %s", (long long)m, (long long)n, (long long)k, what);
  };
  got = before;
  product(m, n, k, a.data(), k, aligned(other), got.data(), c_row, accumulate, true, workspace.data());
  same("from packed columns, backwards");
  got = before;
  const int64_t row = static_cast<int64_t>(random() % (m + 1));
  product(row, n, k, a.data(), k, packed, got.data(), c_row, accumulate, false, workspace.data());
  product(m - row, n, k, a.data() + row * k, k, packed, got.data() + row * c_row, c_row, accumulate, false, workspace.data());
  same("of split rows");
  if (m > 96 || k > 256) return;
  got = before;
  S2S_SELECT(TileProbe::product_transposed)(m, n, k, a_columns.data(), m, packed, got.data(), c_row, accumulate, workspace.data());
  same("from the columns of the left factor");
}

void test_all_tiles() {
  std::mt19937 random(11);
  const int64_t ms[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 95, 96, 97, 200}, ns[] = {1, 15, 16, 17, 32, 33, 64, 100, 129},
                ks[] = {1, 2, 31, 32, 33, 63, 64, 100, 255, 256, 257, 300};
  const auto pick = [&](const auto& values) { return values[random() % std::size(values)]; };
  for (int i = 0; i < 200; ++i) test_tiles(pick(ms), pick(ns), pick(ks), i % 4 ? 0 : static_cast<int>(random() % 4), random() % 2, random);
}

template <class T, class TA, class TB>
void test_products(int cases) {
  std::mt19937 random(7);
  const int64_t ms[] = {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 25, 33, 195, 200}, ns[] = {1, 7, 8, 15, 16, 17, 31, 33, 64, 96, 97, 200},
                ks[] = {1, 2, 7, 8, 31, 64, 100, 255, 256, 257, 600};
  const auto pick = [&](const auto& values) { return values[random() % std::size(values)]; };
  for (int i = 0; i < cases; ++i) {
    int64_t m = i % 4 ? pick(ms) : 1, n = pick(ns), k = pick(ks);
    if (m * n * k > 400000) m = ms[random() % 9];
    test_product<T, TA, TB>(m, n, k, static_cast<int>(random() % 6), static_cast<int>(random() % 6), random() % 2, random);
  }
  for (const bool accumulate : {false, true})
    for (const auto& [m, n, k] : {std::tuple{3, 5, 0}, {0, 5, 4}, {3, 0, 4}}) test_product<T, TA, TB>(m, n, k, 0, 0, accumulate, random);
}

// ---- random words ----
void test_random() {
  const auto check_words = [](const uint32_t (&counter)[4], const uint32_t (&key)[2], const uint32_t (&want)[4]) {
    uint32_t got[4];
    S2S_SELECT(philox4x32_10)(counter, key, got);
    check(std::memcmp(got, want, sizeof got) == 0, "published answer of Philox4x32-10 for counter %08x", counter[0]);
  };
  check_words({0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  check_words({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  check_words({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});

  const auto word = S2S_SELECT(random_word);
  const auto threshold = S2S_SELECT(philox_threshold);
  check(threshold(0) == 0 && threshold(1) == uint64_t{1} << 32 && threshold(0.5) == uint64_t{1} << 31 && threshold(0x1p-33) == 0,
        "thresholds");
  const int64_t seed0 = -0x123456789abcdef, seed1 = 0x7fffffff0fedcba9, row = 0x523456789;
  for (const double p : {0.0, 0.1, 0.5, 0.999, 1.0})
    for (const int64_t column : {0, 1, 31, 32, 45, 1000003})
      for (const int64_t n : {0, 1, 5, 31, 32, 33, 64, 100}) {
        std::vector<float> single(n + 1, 7.0f);
        std::vector<double> twice(n + 1, 7.0);
        S2S_SELECT(CoreProbe<float>::factors)(seed0, seed1, 5, row, column, n, threshold(p), 1.25f, single.data());
        S2S_SELECT(CoreProbe<double>::factors)(seed0, seed1, 5, row, column, n, threshold(p), 1.25, twice.data());
        for (int64_t i = 0; i < n; ++i) {
          const float want = word(seed0, seed1, 5, row, column + i) >= threshold(p) ? 1.25f : 0.0f;
          check(single[i] == want && twice[i] == want, "dropout factor of column %lld at p = %g", (long long)(column + i), p);
        }
        check(single[n] == 7.0f && twice[n] == 7.0, "dropout_factors wrote past its end");
      }
  int kept = 0;
  std::vector<float> many(100000);
  S2S_SELECT(CoreProbe<float>::factors)(1, 2, 3, 4, 0, 100000, threshold(0.3), 1.0f, many.data());
  for (const float factor : many) kept += factor != 0;
  check(std::abs(kept - 70000) < 600, "%d of 100000 kept at p = 0.3", kept);
}

// word <seed0> <seed1> <stream> <row> <column>: for a comparison with another implementation of the definition.
void print_words(char** at) {
  for (; *at; at += 5)
    std::printf("%u\n", S2S_SELECT(random_word)(std::strtoll(at[0], nullptr, 10), std::strtoll(at[1], nullptr, 10),
                                                static_cast<uint32_t>(std::strtoul(at[2], nullptr, 10)), std::strtoll(at[3], nullptr, 10),
                                                std::strtoll(at[4], nullptr, 10)));
}

}  // namespace

int main(int count, char** arguments) {
  const std::string suite = count > 1 ? arguments[1] : "";
  if (suite == "math") {
    test_basics<float>();
    test_basics<double>();
    test_math<float>();
    test_math<double>();
  } else if (suite == "storage") {
    test_storage<bfloat16>(7, 127);
    test_storage<float16>(10, 15);
  } else if (suite == "tiles") {
    test_all_tiles();
  } else if (suite == "gemm") {
    test_products<float, float, float>(250);
    test_products<double, double, double>(150);
    test_products<float, bfloat16, bfloat16>(80);
    test_products<float, float16, float>(60);
    test_products<float, float, bfloat16>(60);
  } else if (suite == "random") {
    test_random();
  } else if (suite == "word") {
    print_words(arguments + 2);
  } else {
    std::printf("unknown suite\n");
    return 2;
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
