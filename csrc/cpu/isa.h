// Which instruction set serves: the widest that both this library and the machine have, or what S2S_CPU_ISA names.
#pragma once
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace s2s {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3, amx = 4 };
inline constexpr const char* isa_names[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether vectors of bfloat16 can be multiplied (AVX512-BF16).
inline bool has_bfloat16_products() {
#if defined(__x86_64__)
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1u << 5;
#else
  return false;
#endif
}

// Whether there is a tile unit for bfloat16, and the kernel lets this process use it: its registers are large, so it wants to be asked.
inline bool has_tile_unit() {
#if defined(S2S_EMULATED_TILES)
  return has_bfloat16_products();
#elif defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return false;  // AMX-BF16, AMX-TILE
  if (!has_bfloat16_products()) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline Isa widest_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return has_tile_unit() ? Isa::amx : has_bfloat16_products() ? Isa::avx512_bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// Throws std::runtime_error where S2S_CPU_ISA names an unknown set or one that this machine lacks: running it would be an illegal
// instruction.
inline Isa choose_isa() {
  const char* forced = std::getenv("S2S_CPU_ISA");
  if (!forced || !*forced) return widest_isa();
  for (int i = 0; i <= static_cast<int>(Isa::amx); ++i)
    if (!std::strcmp(forced, isa_names[i])) {
      if (i > static_cast<int>(widest_isa()))
        throw std::runtime_error(std::string("S2S_CPU_ISA=") + forced + ": this machine has only " +
                                 isa_names[static_cast<int>(widest_isa())]);
      return static_cast<Isa>(i);
    }
  throw std::runtime_error(std::string("S2S_CPU_ISA must be baseline, avx2, avx512, avx512_bf16 or amx, got ") + forced);
}

inline Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

// The copy that this machine runs, of a function or table that exists once per instruction set with one and the same type.
template <class X>
X& select_isa(X& baseline, X& avx2, X& avx512, X& avx512_bf16, X& amx) {
  switch (active_isa()) {
    case Isa::amx:
      return amx;
    case Isa::avx512_bf16:
      return avx512_bf16;
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace s2s

// S2S_SELECT(lstm_forward<T>) or S2S_SELECT(Lstm<T>::forward): the active instruction set's function. Needs each_isa.h with that kernel
// before it.
#if defined(__x86_64__)
#define S2S_SELECT(...)                                                                                                                  \
  ::s2s::select_isa(::s2s::baseline::__VA_ARGS__, ::s2s::avx2::__VA_ARGS__, ::s2s::avx512::__VA_ARGS__, ::s2s::avx512_bf16::__VA_ARGS__, \
                    ::s2s::amx::__VA_ARGS__)
#else
#define S2S_SELECT(...) ::s2s::baseline::__VA_ARGS__
#endif
