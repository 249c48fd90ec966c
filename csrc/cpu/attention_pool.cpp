// Binding of attention pooling on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <tuple>

#include "pool.h"
#include "tensor.h"

#define S2S_KERNELS "attention_pool_kernels.h"
#include "each_isa.h"
// clang-format off: needs the kernels
#include "additive_attention_binding.h"
// clang-format on

namespace s2s {
namespace {

constexpr int64_t pool_rows = 96;   // positions of a task
constexpr int64_t pool_parts = 16;  // sums of the parameters' gradients: as many whatever the number of threads

// One call: its arguments checked and unpacked.
template <class S>
class Pool {
 public:
  using C = compute_t<S>;
  int64_t batch, time, width, units;

  Pool(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& context, const OptionalTensor& lengths)
      : batch(x.size(0)),
        time(x.size(1)),
        width(x.size(2)),
        units(weight.size(0)),
        type_(x.scalar_type()),
        lengths_(as_contiguous(lengths)) {
    lengths_data_ = data<int64_t>(lengths_);
    x_ = wide_rows<S>(x, kept_);
    bias_ = wide_vector<S>(bias, kept_), context_ = wide_vector<S>(context, kept_);
    kept_.emplace_back(Workspace::bytes<C>(units * width) + Workspace::bytes<C>(S2S_SELECT(PoolKernels<C>::packed_size)(units, width)));
    C* wide = kept_.back().template take<C>(units * width);
    C* packed = kept_.back().template take<C>(S2S_SELECT(PoolKernels<C>::packed_size)(units, width));
    const auto widen = S2S_SELECT(AdditiveStorageKernels<S>::widen);
    for (int64_t a = 0; a < units; ++a) widen(data<S>(weight) + a * weight.stride(0), weight.stride(1), wide + a * width, width);
    S2S_SELECT(PoolKernels<C>::pack)(units, width, wide, int64_t{1}, width, packed);
    weight_ = wide, packed_ = packed;
  }

  std::tuple<Tensor, Tensor> forward() {
    Tensor pooled = empty_cpu({batch, width}, type_), weights = empty_cpu({batch, time}, scalar_type_of<C>);
    C* const scores = mutable_data<C>(weights);
    const int64_t bytes = Workspace::bytes<C>(pool_rows * units), threads = thread_count();
    Workspace workspace(threads * bytes);
    uint8_t* const memory = workspace.take<uint8_t>(threads * bytes);
    std::atomic<int64_t> next{0};
    const auto score = S2S_SELECT(PoolKernels<C>::scores);
    parallel(tasks(), grain(), [&](int64_t from, int64_t to) {
      C* const hidden = reinterpret_cast<C*>(memory + next.fetch_add(1) * bytes);
      for (int64_t task = from; task < to; ++task) {
        const int64_t b = task / chunks(), begin = task % chunks() * pool_rows, rows = std::min(pool_rows, length(b) - begin);
        if (rows > 0) score(rows, units, width, x_.at(b, begin), x_.row, packed_, bias_, context_, hidden, scores + b * time + begin);
      }
    });
    const int64_t product = Workspace::bytes<C>(product_size(1, width, time)), line = Workspace::bytes<C>(width);
    Workspace sums(threads * (product + line));
    uint8_t* const own = sums.take<uint8_t>(threads * (product + line));
    next = 0;
    S* const out = mutable_data<S>(pooled);
    const auto sum = S2S_SELECT(PoolKernels<C>::sum);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    parallel(batch, 1 + (1 << 15) / (time * width + 1), [&](int64_t from, int64_t to) {
      uint8_t* const at = own + next.fetch_add(1) * (product + line);
      C* const row = reinterpret_cast<C*>(at + product);
      for (int64_t b = from; b < to; ++b) {
        sum(length(b), width, x_.at(b, 0), x_.row, scores + b * time, row, reinterpret_cast<C*>(at));
        narrow(row, out + b * width, width);
        std::fill(scores + b * time + length(b), scores + (b + 1) * time, C(0));
      }
    });
    return {pooled, weights};
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const OptionalTensor& grad_pooled_in, const OptionalTensor& grad_weights_in,
                                                      const Tensor& weights_in) {
    Tensor grad_x = empty_cpu({batch, time, width}, type_), grad_weight = empty_cpu({units, width}, type_);
    Tensor grad_bias = empty_cpu({units}, type_), grad_context = empty_cpu({units}, type_);
    const Tensor saved = as_contiguous(weights_in);
    const C* const weights = data<C>(saved);
    const C *grad_pooled = nullptr, *grad_weights = nullptr;
    if (grad_pooled_in) grad_pooled = wide_matrix(*grad_pooled_in);
    if (grad_weights_in) grad_weights = wide_matrix(*grad_weights_in);
    const int64_t parts = std::max<int64_t>(1, std::min(pool_parts, tasks()));
    const int64_t sum_size = units * width + 2 * units;
    const int64_t product =
        std::max({product_size(1, time, width), product_size(units, width, pool_rows), product_size(pool_rows, width, units)});
    const int64_t scratch = Workspace::bytes<C>(product) + Workspace::bytes<C>(pool_rows * units) + Workspace::bytes<C>(pool_rows * width);
    const int64_t threads = thread_count();
    Workspace workspace(Workspace::bytes<C>(batch * time) + Workspace::bytes<C>(parts * sum_size) + threads * scratch);
    C* const scores = workspace.take<C>(batch * time);
    C* const sums = workspace.take<C>(parts * sum_size);
    uint8_t* const memory = workspace.take<uint8_t>(threads * scratch);
    std::atomic<int64_t> next{0};
    const auto of_scores = S2S_SELECT(PoolKernels<C>::score_gradient);
    parallel(batch, 1 + (1 << 15) / (time * width + 1), [&](int64_t from, int64_t to) {
      C* const own = reinterpret_cast<C*>(memory + next.fetch_add(1) * scratch);
      for (int64_t b = from; b < to; ++b)
        of_scores(length(b), width, x_.at(b, 0), x_.row, weights + b * time, grad_pooled ? grad_pooled + b * width : nullptr,
                  grad_weights ? grad_weights + b * time : nullptr, scores + b * time, own);
    });
    next = 0;
    S* const out = mutable_data<S>(grad_x);
    const auto gradients = S2S_SELECT(PoolKernels<C>::gradients);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    parallel(parts, 1, [&](int64_t from, int64_t to) {
      uint8_t* const own = memory + next.fetch_add(1) * scratch;
      C* const product_space = reinterpret_cast<C*>(own);
      C* const hidden = reinterpret_cast<C*>(own + Workspace::bytes<C>(product));
      C* const rows_space = reinterpret_cast<C*>(own + Workspace::bytes<C>(product) + Workspace::bytes<C>(pool_rows * units));
      for (int64_t part = from; part < to; ++part) {
        C* const sum = sums + part * sum_size;
        std::fill(sum, sum + sum_size, C(0));
        for (int64_t task = tasks() * part / parts; task < tasks() * (part + 1) / parts; ++task) {
          const int64_t b = task / chunks(), begin = task % chunks() * pool_rows, last = std::min(begin + pool_rows, time);
          const int64_t rows = std::clamp<int64_t>(length(b) - begin, 0, last - begin);
          S* const to_rows = out + (b * time + begin) * width;
          if (rows > 0) {
            gradients(rows, units, width, x_.at(b, begin), x_.row, packed_, weight_, bias_, context_, weights + b * time + begin,
                      scores + b * time + begin, grad_pooled ? grad_pooled + b * width : nullptr, hidden, rows_space, sum,
                      sum + units * width, sum + units * width + units, product_space);
            narrow(rows_space, to_rows, rows * width);
          }
          std::fill(to_rows + rows * width, to_rows + (last - begin) * width, S{});
        }
      }
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t k = 0; k < sum_size; ++k) sums[k] += sums[part * sum_size + k];
    narrow(sums, mutable_data<S>(grad_weight), units * width);
    narrow(sums + units * width, mutable_data<S>(grad_bias), units);
    narrow(sums + units * width + units, mutable_data<S>(grad_context), units);
    return {grad_x, grad_weight, grad_bias, grad_context};
  }

 private:
  int64_t length(int64_t b) const { return lengths_data_ ? lengths_data_[b] : time; }
  int64_t chunks() const { return blocks_of(time, pool_rows); }
  int64_t tasks() const { return batch * chunks(); }
  int64_t grain() const { return 1 + (1 << 16) / (std::min(pool_rows, time) * units * width + 1); }
  static int64_t product_size(int64_t m, int64_t n, int64_t k) { return S2S_SELECT(PoolKernels<C>::workspace)(m, n, k); }

  const C* wide_matrix(const Tensor& tensor) {
    const int64_t rows = tensor.size(0), columns = tensor.size(1);
    kept_.emplace_back(Workspace::bytes<C>(rows * columns));
    C* to = kept_.back().template take<C>(rows * columns);
    const auto widen = S2S_SELECT(AdditiveStorageKernels<S>::widen);
    for (int64_t i = 0; i < rows; ++i) widen(data<S>(tensor) + i * tensor.stride(0), tensor.stride(1), to + i * columns, columns);
    return to;
  }

  const ScalarType type_;
  const OptionalTensor lengths_;
  const int64_t* lengths_data_;
  std::deque<Workspace> kept_;
  Rows<const C> x_;
  const C *weight_, *packed_, *bias_, *context_;
};

void check_pool(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& context,
                const OptionalTensor& lengths) {
  check_cpu(op, "x", x);
  check_dim(op, "x", x, 3);
  check_argument(op, "weight", weight, x.scalar_type(), {-1, x.size(2)});
  check_argument(op, "bias", bias, x.scalar_type(), {weight.size(0)});
  check_argument(op, "context", context, x.scalar_type(), {weight.size(0)});
  check_lengths(op, "lengths", as_contiguous(lengths), x.size(0), x.size(1));
}

std::tuple<Tensor, Tensor> attention_pool_forward(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& context,
                                                  const OptionalTensor& lengths) {
  const char* op = "attention_pool_forward";
  check_pool(op, x, weight, bias, context, lengths);
  return dispatch_floating(op, "x", x, [&](auto zero) { return Pool<decltype(zero)>(op, x, weight, bias, context, lengths).forward(); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_pool_backward(const OptionalTensor& grad_pooled, const OptionalTensor& grad_weights,
                                                                   const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                                   const Tensor& context, const Tensor& weights,
                                                                   const OptionalTensor& lengths) {
  const char* op = "attention_pool_backward";
  check_pool(op, x, weight, bias, context, lengths);
  check_argument(op, "grad_pooled", grad_pooled, x.scalar_type(), {x.size(0), x.size(2)});
  check_argument(op, "grad_weights", grad_weights, x.scalar_type(), {x.size(0), x.size(1)});
  return dispatch_floating(op, "x", x, [&](auto zero) {
    using S = decltype(zero);
    check_argument(op, "weights", weights, scalar_type_of<compute_t<S>>, {x.size(0), x.size(1)});
    return Pool<S>(op, x, weight, bias, context, lengths).backward(grad_pooled, grad_weights, weights);
  });
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("attention_pool_forward", TORCH_BOX(&s2s::attention_pool_forward));
  m.impl("attention_pool_backward", TORCH_BOX(&s2s::attention_pool_backward));
}
