// One call of causal convolution as its binding sees it: arguments checked, weights packed, tiles dealt to threads. Included by
// convolution.cpp after each_isa.h, since it names kernels.
#pragma once
#include <algorithm>
#include <atomic>
#include <vector>

#include "caches.h"
#include "convolution_binding.h"
#include "pool.h"

namespace s2s {
namespace {

template <class S>
Signal<const S> signal(const OptionalTensor& tensor) {
  if (!tensor) return {};
  return {data<S>(*tensor), tensor->stride(0), tensor->stride(1), tensor->stride(2)};
}

template <class S>
Signal<S> contiguous_signal(S* to, int64_t channels, int64_t time) {
  return {to, channels * time, time, 1};
}

Shape checked_sequence(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& lengths,
                       const OptionalTensor& initial_state, int64_t dilation, int64_t groups, int64_t activation, bool causal) {
  check_dim(op, "x", x, 3);
  Shape shape = checked_shape(op, x, weight, dilation, groups, activation);
  shape.time = x.size(2);
  shape.left = causal ? shape.span : shape.span / 2;
  check_argument(op, "initial_state", initial_state, x.scalar_type(), {shape.batch, shape.channels, shape.span});
  STD_TORCH_CHECK(causal || !initial_state, op, ": initial_state must be absent when causal is False");
  check_argument(op, "lengths", lengths, ScalarType::Long, {shape.batch});
  if (lengths) {
    shape.lengths = data<int64_t>(*lengths);
    for (int64_t b = 0; b < shape.batch; ++b)
      STD_TORCH_CHECK(shape.lengths[b] >= 0 && shape.lengths[b] <= shape.time, op, ": lengths must be in [0, T] = [0, ", shape.time,
                      "], got ", shape.lengths[b]);
  }
  return shape;
}

// Blocks of outputs as accumulate_block takes them, as equal as can be; `step` 2 keeps the two halves of a gate together.
int64_t block_rows(int64_t outputs, int64_t step) {
  const int64_t blocks = std::max<int64_t>(1, (outputs + 5) / 6), rows = (outputs + blocks - 1) / blocks;
  return std::max(step, (rows + step - 1) / step * step);
}

// R rows of weights, one beside the other: to[(k * channels + c) * R + r].
template <int R, class S>
void pack_rows(const S* const* rows, int64_t channels, int64_t channel, int64_t taps, int64_t tap, compute_t<S>* to) {
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < taps; ++k)
      for (int r = 0; r < R; ++r) to[(k * channels + c) * R + r] = to_compute(rows[r][c * channel + k * tap]);
}

// weight (outputs, channels, K) -> [group][block][k][channel][row].
template <class S>
void pack_weights(const View<const S, 3>& weight, int64_t groups, int64_t rows, bool gate, compute_t<S>* to) {
  const int64_t outputs = weight.size[0] / groups, channels = weight.size[1], taps = weight.size[2], half = weight.size[0] / 2;
  const int64_t blocks = (outputs + rows - 1) / rows;
  parallel(groups * blocks, 1 + (1 << 15) / (rows * channels * taps + 1), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t g = task / blocks, done = task % blocks * rows, here = std::min(rows, outputs - done);
      const S* from[6];
      for (int64_t r = 0; r < here; ++r) {
        int64_t output = g * outputs + done + r;
        if (gate) output = r < here / 2 ? done / 2 + r : half + done / 2 + (r - here / 2);
        from[r] = weight.data + output * weight.stride[0];
      }
      const auto pack = here == 1   ? pack_rows<1, S>
                        : here == 2 ? pack_rows<2, S>
                        : here == 3 ? pack_rows<3, S>
                        : here == 4 ? pack_rows<4, S>
                        : here == 5 ? pack_rows<5, S>
                                    : pack_rows<6, S>;
      pack(from, channels, weight.stride[1], taps, weight.stride[2], to + (g * outputs + done) * channels * taps);
    }
  });
}

// For the gradient with respect to the input: outputs and channels change places.
template <class S>
void pack_transposed_weights(const View<const S, 3>& weight, int64_t groups, int64_t rows, compute_t<S>* to) {
  View<const S, 3> turned = weight;
  const int64_t outputs = weight.size[0] / groups;
  turned.size[0] = weight.size[1];
  turned.size[1] = outputs;
  turned.stride[0] = weight.stride[1];
  turned.stride[1] = weight.stride[0];
  for (int64_t g = 0; g < groups; ++g) {
    turned.data = weight.data + g * outputs * weight.stride[0];
    pack_weights(turned, 1, rows, false, to + g * turned.size[0] * outputs * weight.size[2]);
  }
}

// A convolution cut into tiles of time, each of one group of one row of the batch.
template <class In, class Out>
class Tiles {
  using C = compute_t<In>;

 public:
  explicit Tiles(const Convolution<In, Out>& p) : p_(p) {
    const int64_t channels = p.channels / p.groups, length = p.end - p.begin;
    p_.stream = p.batch * p.outputs * length * static_cast<int64_t>(sizeof(Out)) > beyond_caches();
    width_ = std::min(tile_width(channels), (length + 63) / 64 * 64);
    const int64_t outputs = p.outputs / p.groups;
    const bool staged = needs_stages<C>(p.taps * channels, width_, outputs, p.rows);
    if (staged) width_ = std::min(width_, stage_width);
    each_ = length > 0 ? (length + width_ - 1) / width_ : 0;
    row_bytes_ = Workspace::bytes<C>(p.taps * std::max<int64_t>(channels, 1) * (width_ + 16));
    // Lines of a block of outputs, or of all where they wait between stages; as many pieces as a tile's taps and channels are cut into.
    u_bytes_ = Workspace::bytes<C>((staged ? outputs : 6) * (width_ + 16));
    piece_bytes_ = Workspace::bytes<uint8_t>(p.taps * (2 + channels / chain_terms) * piece_size);
  }
  int64_t each() const { return each_; }  // tiles of a group of a row
  int64_t work() const { return std::max<int64_t>(1, width_ * (p_.outputs / p_.groups) * (p_.channels / p_.groups) * p_.taps); }
  int64_t scratch() const { return row_bytes_ + u_bytes_ + piece_bytes_; }  // bytes, for each thread

  void run(int64_t b, int64_t group, int64_t tile, uint8_t* scratch) const {
    const int64_t t0 = p_.begin + tile * width_;
    S2S_SELECT(ConvolutionKernels<In, Out>::tile)
    (p_, b, group, t0, std::min(width_, p_.end - t0), scratch + row_bytes_ + u_bytes_, reinterpret_cast<C*>(scratch),
     reinterpret_cast<C*>(scratch + row_bytes_));
  }
  int64_t width() const { return width_; }
  // After a thread's last tile.
  void end() const {
    if (p_.stream) S2S_SELECT(ConvolutionKernels<In, Out>::end_of_stream)();
  }

 private:
  Convolution<In, Out> p_;
  int64_t width_, each_, row_bytes_, u_bytes_, piece_bytes_;
};

template <class In, class Out>
void convolve(const Convolution<In, Out>& p) {
  const Tiles<In, Out> tiles(p);
  const int64_t tasks = p.outputs ? p.batch * p.groups * tiles.each() : 0, threads = std::min(thread_count(), tasks);
  Workspace workspace(threads * tiles.scratch());
  uint8_t* scratch = workspace.take<uint8_t>(threads * tiles.scratch());
  std::atomic<int64_t> next{0};
  parallel(tasks, std::max<int64_t>(1, (1 << 17) / tiles.work()), [&](int64_t begin, int64_t end) {
    uint8_t* own = scratch + next.fetch_add(1) * tiles.scratch();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t bg = task / tiles.each();
      tiles.run(bg / p.groups, bg % p.groups, task % tiles.each(), own);
    }
    tiles.end();
  });
}

// A vector of parameters in the compute type.
template <class S>
std::vector<compute_t<S>> widened(const OptionalTensor& tensor) {
  std::vector<compute_t<S>> result;
  if (!tensor) return result;
  const View<const S, 1> from = view<const S, 1>(*tensor);
  for (int64_t i = 0; i < from.size[0]; ++i) result.push_back(to_compute(from.data[i * from.stride[0]]));
  return result;
}

}  // namespace
}  // namespace s2s
