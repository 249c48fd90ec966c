// What the bindings of additive attention and of attention pooling share. Included after the kernels (each_isa.h) in either.
#pragma once
#include <algorithm>
#include <deque>

#include "additive_attention.h"
#include "pool.h"
#include "tensor.h"

namespace s2s {
namespace {

constexpr int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

void check_lengths(const char* op, const char* name, const OptionalTensor& lengths, int64_t batch, int64_t most) {
  check_argument(op, name, lengths, ScalarType::Long, {batch});
  if (!lengths) return;
  const int64_t* values = data<int64_t>(*lengths);
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(values[b] >= 0 && values[b] <= most, op, ": ", name, " must be in [0, ", most, "], got ", values[b]);
}

// Rows in the type computed in: those of the tensor (B, N, W) itself where they have it and unit stride, else a copy that lives in `kept`.
template <class S>
Rows<const compute_t<S>> wide_rows(const Tensor& tensor, std::deque<Workspace>& kept) {
  using C = compute_t<S>;
  const int64_t batch = tensor.size(0), rows = tensor.size(1), width = tensor.size(2);
  const S* from = data<S>(tensor);
  if constexpr (std::is_same_v<S, C>)
    if (tensor.stride(2) == 1 || width <= 1) return {from, tensor.stride(0), tensor.stride(1)};
  const bool same = tensor.stride(0) == 0;  // a broadcast batch is copied once
  const int64_t copies = same ? std::min<int64_t>(batch, 1) : batch, from_batch = tensor.stride(0), from_row = tensor.stride(1);
  const int64_t stride = tensor.stride(2);
  kept.emplace_back(Workspace::bytes<C>(copies * rows * width));
  C* to = kept.back().template take<C>(copies * rows * width);
  const auto widen = S2S_SELECT(AdditiveStorageKernels<S>::widen);
  parallel(copies * rows, 1 + (1 << 15) / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) widen(from + at / rows * from_batch + at % rows * from_row, stride, to + at * width, width);
  });
  return {to, same ? 0 : rows * width, width};
}

// A vector in the type computed in, contiguous.
template <class S>
const compute_t<S>* wide_vector(const Tensor& tensor, std::deque<Workspace>& kept) {
  using C = compute_t<S>;
  kept.emplace_back(Workspace::bytes<C>(tensor.size(0)));
  C* to = kept.back().template take<C>(tensor.size(0));
  S2S_SELECT(AdditiveStorageKernels<S>::widen)(data<S>(tensor), tensor.stride(0), to, tensor.size(0));
  return to;
}

}  // namespace
}  // namespace s2s
