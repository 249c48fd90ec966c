// One instruction set's copy of the shared vector code and of the kernels that each_isa.h names. Included by each_isa.h only.
namespace s2s::S2S_ISA {
// clang-format off: each needs those before it
#include "simd.h"
#include "vector_math.h"
#include "gemm.h"
#if defined(S2S_BFLOAT16_PRODUCTS)
#include "split_planes.h"
#endif
#if defined(S2S_TILE_UNIT)
#include "split_product.h"
#endif
#include "philox.h"
#include "lines.h"
#include S2S_KERNELS
// clang-format on
}  // namespace s2s::S2S_ISA
