// What the bindings of one recurrence and of a stack of them share: a call of one layer and direction.
#pragma once
#include <cstdint>
#include <vector>

#include "pool.h"
#include "tensor.h"

namespace s2s {

// The tensors that forward and backward share.
struct __attribute__((visibility("hidden"))) RecurrenceArguments {
  const Tensor &x, &weight_ih, &weight_hh;
  const OptionalTensor &h0, &c0, &weight_hr, &mask, &norm_ih, &norm_hh, &norm_c, &norm_b, &lengths, &reset, &seed;
  int64_t cell;
  bool reverse;
  double zoneout_h, zoneout_c;
  bool training;
  double weight_dropout;
  bool packed;  // x (N, I) is a packed sequence, its rows sorted by lengths, longest first; no lengths: one step. So are the output and
                // what is kept
};

// Where forward puts its results, contiguous but for the output and the states, whose strides are given in elements; null: not kept.
struct RecurrencePlaces {
  void* output;  // (B, T, P), or (N, P) of a packed sequence, whose rows are output_time apart
  int64_t output_batch, output_time;
  void *h_n, *c_n;                        // (B, P), (B, H)
  int64_t h_row, c_row;                   // from one row of them to the next
  void *gates, *extra, *hidden, *normed;  // what backward needs, in the compute type
  bool defined;                           // what is kept is 0 where no position is present, and not left as it was
};

// What forward keeps: nothing, what backward needs, or that with no memory left undefined.
enum Save : int64_t { save_nothing = 0, save_needed = 1, save_defined = 2 };
inline void check_save(const char* op, int64_t save) {
  STD_TORCH_CHECK(save >= save_nothing && save <= save_defined, op, ": save must be in [0, 2], got ", save);
}

// What forward kept, and what reaches its results.
struct __attribute__((visibility("hidden"))) RecurrenceKept {
  const OptionalTensor &grad_output, &grad_h, &grad_c;
  const OptionalTensor &gates, &extra, &hidden, &normed;
};

// The gradients that backward can be asked for, in the order of the arguments; a bit each.
enum Wanted {
  want_x,
  want_ih,
  want_hh,
  want_bias_ih,
  want_bias_hh,
  want_h0,
  want_c0,
  want_hr,
  want_mask,
  want_norm_ih,
  want_norm_hh,
  want_norm_c,
  want_norm_b,
  wanted_count
};

// A new tensor over the positions of x: (B, T, last), or (N, last) of a packed sequence.
inline Tensor over_positions(const Tensor& x, int64_t last, ScalarType type) {
  return x.dim() == 2 ? empty_cpu({x.size(0), last}, type) : empty_cpu({x.size(0), x.size(1), last}, type);
}
inline void check_positions(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t last, ScalarType type) {
  if (x.dim() == 2)
    check_argument(op, name, tensor, type, {x.size(0), last});
  else
    check_argument(op, name, tensor, type, {x.size(0), x.size(1), last});
}

inline uint8_t* bytes(const Tensor& tensor) { return static_cast<uint8_t*>(tensor.mutable_data_ptr()); }
inline int64_t size_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// a += b, both contiguous; a may be as wide as the computation.
inline void add(const char* op, const Tensor& a, const Tensor& b) {
  dispatch_floating(op, "x", b, [&](auto zero) {
    using S = decltype(zero);
    const auto sum = [&](auto* to) {
      using A = std::remove_pointer_t<decltype(to)>;
      const S* const from = data<S>(b);
      parallel(a.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = from_compute<A>(to_compute(to[i]) + to_compute(from[i]));
      });
    };
    if (a.scalar_type() == b.scalar_type())
      sum(mutable_data<S>(a));
    else
      sum(mutable_data<compute_t<S>>(a));
  });
}

void run_recurrence(const RecurrenceArguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const RecurrencePlaces& to);
std::vector<Tensor> run_recurrence_backward(const RecurrenceArguments& a, const RecurrenceKept& kept, int64_t needs);

}  // namespace s2s
