// s2s_kernels._machine: what this machine is and what it can do at most. Handles no tensors and knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "cpu/caches.h"

#define S2S_KERNELS "../machine_kernels.h"
#include "cpu/each_isa.h"

namespace py = pybind11;

namespace {

using Clock = std::chrono::steady_clock;

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
  return {{"sse2", __builtin_cpu_supports("sse2") != 0},
          {"avx", __builtin_cpu_supports("avx") != 0},
          {"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"f16c", __builtin_cpu_supports("f16c") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512_bf16", s2s::has_bfloat16_products()},
          {"amx_bf16", s2s::has_tile_unit()}};
#else
  return {};
#endif
}

std::map<std::string, std::string> build() {
#if defined(__clang__)
  const std::string compiler = std::string("clang ") + __clang_version__;
#else
  const std::string compiler = std::string("gcc ") + __VERSION__;
#endif
#if defined(__x86_64__)
  const std::string sets = "baseline avx2 avx512 avx512_bf16 amx";
#else
  const std::string sets = "baseline";
#endif
  return {{"compiler", compiler}, {"standard", std::to_string(__cplusplus)}, {"instruction_sets", sets}};
}

// The best rate, in operations a second and over all threads together, of repeated short runs.
template <class T>
double fma_rate(int threads, double seconds) {
  if (threads < 1) throw py::value_error("fma_rate: threads must be at least 1, got " + std::to_string(threads));
  py::gil_scoped_release release;
  auto& probe = S2S_SELECT(fma_chains<T>);
  std::vector<double> rates(threads, 0.0);
  std::vector<std::thread> running;
  for (int i = 0; i < threads; ++i)
    running.emplace_back([&, i] {
      T sink = 0;
      const auto start = Clock::now();
      do {
        const auto begin = Clock::now();
        const double operations = probe(20000, &sink);
        rates[i] = std::max(rates[i], operations / since(begin));
      } while (since(start) < seconds);
    });
  for (auto& thread : running) thread.join();
  double total = 0;
  for (double rate : rates) total += rate;
  return total;
}

// The best rate of reading a buffer of so many bytes again and again, in bytes a second, one thread.
double read_bandwidth(int64_t bytes, double seconds) {
  if (bytes < 4096) throw py::value_error("read_bandwidth: bytes must be at least 4096, got " + std::to_string(bytes));
  py::gil_scoped_release release;
  auto& probe = S2S_SELECT(read_all<float>);
  std::vector<float> buffer(bytes / sizeof(float), 1.f);
  const int64_t passes = std::max<int64_t>(1, (int64_t{1} << 22) / bytes);
  float sink = 0;
  double best = 0;
  const auto start = Clock::now();
  do {
    const auto begin = Clock::now();
    for (int64_t i = 0; i < passes; ++i) probe(buffer.data(), static_cast<int64_t>(buffer.size()), &sink);
    best = std::max(best, static_cast<double>(passes) * static_cast<double>(bytes) / since(begin));
  } while (since(start) < seconds);
  return best;
}

}  // namespace

PYBIND11_MODULE(_machine, m) {
  m.doc() = "What this machine is and what it can do at most.";
  m.def("cpu_features", &cpu_features, "Instruction sets that the processor has: name to bool.");
  m.def(
      "active_isa", [] { return s2s::isa_names[static_cast<int>(s2s::active_isa())]; },
      "The instruction set that the kernels run. Raises RuntimeError where S2S_CPU_ISA names one that can't be.");
  m.def("widest_isa", [] { return s2s::isa_names[static_cast<int>(s2s::widest_isa())]; }, "The widest set of this machine.");
  m.def("last_cache", &s2s::last_cache, "Bytes of the last cache that a core sees, 0 where the processor doesn't tell.");
  m.def("build", &build, "Compiler, language standard and instruction sets of this build.");
  m.def("fma_rate_float32", &fma_rate<float>, py::arg("threads") = 1, py::arg("seconds") = 0.1,
        "Peak rate of float32 fused multiply-adds, in floating-point operations a second over all threads.");
  m.def("fma_rate_float64", &fma_rate<double>, py::arg("threads") = 1, py::arg("seconds") = 0.1, "The same for float64.");
  m.def("read_bandwidth", &read_bandwidth, py::arg("bytes"), py::arg("seconds") = 0.1,
        "Rate of reading a buffer of this size repeatedly, in bytes a second on one thread.");
}
