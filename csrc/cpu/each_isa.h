// Includes the kernel header S2S_KERNELS once per instruction set, each copy in a namespace of its own: s2s::baseline, s2s::avx2,
// s2s::avx512, s2s::avx512_bf16, s2s::amx. The last two have products of bfloat16 beside all of AVX-512, on vectors and on the tile unit,
// and are compiled where S2S_BFLOAT16 and S2S_TILES ask for them; elsewhere they are other names for AVX-512's copy. Kernel headers have no
// guard, include nothing, and find simd.h, vector_math.h and gemm.h already there, built for the same instruction set. Included once by
// each binding file (csrc/cpu/<stem>.cpp); several kernel headers of one stem are gathered in one that names them all.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "isa.h"
#include "storage.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Helpers that take or return vectors are inlined always: a call would pass them by an ABI that depends on the instruction set.
#define S2S_INLINE static inline __attribute__((always_inline))
#define S2S_LAMBDA(...) [&](__VA_ARGS__) __attribute__((always_inline))

#define S2S_ISA baseline
#define S2S_VECTOR_BYTES 16
#include "isa_region.h"
#undef S2S_ISA
#undef S2S_VECTOR_BYTES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define S2S_ISA avx2
#define S2S_VECTOR_BYTES 32
#include "isa_region.h"
#undef S2S_ISA
#undef S2S_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define S2S_ISA avx512
#define S2S_VECTOR_BYTES 64
#include "isa_region.h"
#undef S2S_ISA
#undef S2S_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(S2S_BFLOAT16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define S2S_ISA avx512_bf16
#define S2S_VECTOR_BYTES 64
#define S2S_BFLOAT16_PRODUCTS
#include "isa_region.h"
#undef S2S_BFLOAT16_PRODUCTS
#undef S2S_ISA
#undef S2S_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace s2s {
namespace avx512_bf16 = avx512;
}
#endif

#if defined(S2S_TILES)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#endif
#define S2S_ISA amx
#define S2S_VECTOR_BYTES 64
#define S2S_BFLOAT16_PRODUCTS
#define S2S_TILE_UNIT
#include "isa_region.h"
#undef S2S_TILE_UNIT
#undef S2S_BFLOAT16_PRODUCTS
#undef S2S_ISA
#undef S2S_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#else
namespace s2s {
namespace amx = avx512;
}
#endif

#endif
#undef S2S_BFLOAT16
#undef S2S_TILES
#undef S2S_KERNELS
