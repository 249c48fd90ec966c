// The kernels of attention pooling, gathered for each_isa.h.
// clang-format off: each needs those before it
#include "additive_attention_rows.h"
#include "attention_pool.h"
// clang-format on
