// The kernels of additive attention, gathered for each_isa.h.
// clang-format off: each needs those before it
#include "additive_attention_rows.h"
#include "additive_attention_scores.h"
#include "additive_attention_forward.h"
#include "additive_attention_backward.h"
// clang-format on

template <class C>
struct AdditiveKernels {
  static constexpr auto table = &additive_key_table<C>;
  static constexpr auto scale = &weight_scale<C>;
  static constexpr auto flag = &flag_rows<C>;
  static constexpr auto context = &additive_context<C>;
  static constexpr auto gradients = &additive_gradients<C>;
  static constexpr auto finish_key = &finish_key_gradient<C>;
  static constexpr auto workspace = &gemm_workspace<C>;
  static constexpr auto threshold = &philox_threshold;
};
