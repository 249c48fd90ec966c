// Binding of the recurrences on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "recurrence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "caches.h"
#include "pool.h"
#include "tensor.h"

#define S2S_TILES
#define S2S_KERNELS "recurrence_kernels.h"
#include "each_isa.h"
#include "recurrence_gradients.h"
#include "recurrence_heads.h"
#include "recurrence_runner.h"

namespace s2s {
namespace {

template <class S>
class Forward : Runner<S> {
  using C = compute_t<S>;
  using Base = Runner<S>;
  using Base::a_;
  using Base::plan_;
  using Base::s_;
  using Base::type_;

 public:
  Forward(const char* op, const Arguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) : Base(op, a) {
    check_argument(op, "bias_ih", bias_ih, type_, {s_.gate_units});
    check_argument(op, "bias_hh", bias_hh, type_, {s_.gate_units});
    bias_.assign(s_.gate_units + s_.hidden, C(0));
    const int64_t summed = s_.cell == Cell::gru ? 2 * s_.hidden : s_.gate_units;
    if (const C* from = this->wide(bias_ih))
      for (int64_t j = 0; j < s_.gate_units; ++j) bias_[j] = from[j];
    if (const C* from = this->wide(bias_hh))
      for (int64_t j = 0; j < s_.gate_units; ++j) bias_[j < summed ? j : s_.gate_units + j - summed] += from[j];
  }

  // The state after one step: h and, of an LSTM, c.
  std::vector<Tensor> step() {
    std::vector<Tensor> states{empty_cpu({s_.batch, s_.width}, type_)};
    if (s_.cell == Cell::lstm) states.push_back(empty_cpu({s_.batch, s_.hidden}, type_));
    RecurrencePlaces to{};
    to.output = to.h_n = states[0].mutable_data_ptr(), to.output_time = to.h_row = s_.width, to.c_row = s_.hidden;
    if (s_.cell == Cell::lstm) to.c_n = states[1].mutable_data_ptr();
    run(to);
    return states;
  }

  std::vector<Tensor> run(int64_t save) {
    check_save("recurrence", save);
    const bool lstm = s_.cell == Cell::lstm, exact = save && !std::is_same_v<S, C>;
    const ScalarType wide = scalar_type_of<C>;
    std::vector<Tensor> results;
    const auto place = [&](const Tensor& tensor) {
      results.push_back(tensor);
      return tensor.mutable_data_ptr();
    };
    const auto kept = [&](bool wanted, int64_t last) { return wanted ? place(over_positions(a_.x, last, wide)) : nullptr; };
    RecurrencePlaces to{};
    to.output = place(over_positions(a_.x, s_.width, type_));
    to.output_batch = s_.time * s_.width, to.output_time = s_.width;
    to.h_n = place(empty_cpu({s_.batch, s_.width}, type_)), to.h_row = s_.width, to.c_row = s_.hidden;
    if (lstm) to.c_n = place(empty_cpu({s_.batch, s_.hidden}, type_));
    to.gates = kept(save && keeps_gates(s_.cell, a_.zoneout_h), s_.gate_units);
    to.extra = kept(save && (lstm || s_.cell == Cell::gru), s_.hidden);
    to.hidden = kept(exact, s_.width);
    to.normed = kept(save && a_.norm_ih, normed_row(s_.gate_units));
    to.defined = save == save_defined;
    run(to);
    return results;
  }

  void run(const RecurrencePlaces& to) {
    RecurrenceForward<C> p{};
    this->fill(p);
    p.gates = static_cast<C*>(to.gates), p.extra = static_cast<C*>(to.extra), p.normed = static_cast<C*>(to.normed);
    p.hidden_exact = static_cast<C*>(to.hidden);
    p.bias = bias_.data(), p.bias_hn = bias_.data() + s_.gate_units;
    p.x = source<S>(a_.x, a_.packed);
    p.weight_ih = source<S>(a_.weight_ih), p.weight_hh = source<S>(a_.weight_hh);
    p.dropout = a_.weight_dropout > 0 ? &this->dropout_ : nullptr;
    const auto write = S2S_SELECT(RowKernels<S>::write);
    p.output = {to.output, to.output_batch, to.output_time, write};
    p.h_n = {to.h_n, to.h_row, 0, write};
    if (s_.cell == Cell::lstm) p.c_n = {to.c_n, to.c_row, 0, write};
    p.block_rows = std::min<int64_t>(plan_.slots() + 1, std::max<int64_t>(192, (1 << 17) / s_.gate_units));
    // Weights that are used but a few times would take longer to pack, and those that come from beyond the second-level cache come as fast
    // unpacked. Dot products round in another order than products do, so who makes them must not depend on the threads.
    const bool dots = std::is_same_v<C, float> && p.weight_ih.unit == 1 && p.weight_hh.unit == 1;
    const int64_t lanes = plan_.schedule.lanes;
    const bool far = s_.gate_units * s_.width * static_cast<int64_t>(sizeof(C)) > (3 << 19);
    const bool soon = far || plan_.schedule.steps <= S2S_SELECT(UnpackedProduct<S>::few_steps)(s_.gate_units, s_.width);
    p.unpacked_hh = !p.dropout && (s_.time == 1 || (dots && lanes == 1 && soon));
    const auto product = S2S_SELECT(UnpackedProduct<S>::product);
    p.product_ih = product(dots, plan_.slots(), s_.gate_units, s_.inputs), p.product_hh = product(dots, lanes, s_.gate_units, s_.width);
    // Step after step, weights that exceed the cache are found there in part when they are walked to and fro. A sum of two products is the
    // same whichever comes first.
    static thread_local bool turn = false;
    p.backwards =
        p.unpacked_hh && s_.time == 1 && dots && S2S_SELECT(UnpackedProduct<S>::few)(lanes, s_.gate_units, s_.width) && (turn = !turn);
    p.tiled_ih = s_.time > 1 && this->tiled_ih() && !S2S_SELECT(UnpackedProduct<S>::splits)(dots, plan_.slots(), s_.gate_units, s_.inputs);
    p.tiled_hh = !p.unpacked_hh && this->tiled_hh();
    p.unpacked_ih = s_.time == 1 || (plan_.slots() < p.block_rows && !p.tiled_ih);
    // What backward reads much later needn't push anything out of the caches, if it is more than they hold.
    const int64_t kept_row = s_.gate_units + (p.extra ? s_.hidden : 0) + (p.normed ? p.normed_row() : 0);
    p.streams = plan_.slots() * kept_row * static_cast<int64_t>(sizeof(C)) > beyond_caches() && s_.hidden % (64 / sizeof(C)) == 0;
    for (const void* kept : {to.gates, to.extra, to.normed})
      if (reinterpret_cast<uintptr_t>(kept) % 64 != 0) p.streams = false;

    const auto split = this->split();
    const int64_t groups = split.groups, ranges = split.ranges(), rows = (plan_.schedule.lanes + groups - 1) / groups;
    const bool shares = split.slices == 1;  // packed weights
    p.x_rows = groups == 1 ? this->rows_of_x(p.x_row) : nullptr;
    const int64_t ih = shares && !p.unpacked_ih ? this->packed_size(s_.gate_units, s_.inputs, p.tiled_ih) : 0,
                  hh = shares && !p.unpacked_hh ? this->packed_size(s_.gate_units, s_.width, p.tiled_hh) : 0;
    const int64_t hr = a_.weight_hr ? this->packed_size(s_.width, s_.hidden, false) : 0, left = groups * rows * p.padded(s_.width);
    const int64_t scratch = S2S_SELECT(RecurrenceProducts<C>::pack_workspace)(std::max({s_.inputs, s_.width, s_.hidden}));
    const int64_t each = std::max(scratch, S2S_SELECT(RecurrenceForwardPart<C>::workspace)(p, rows, split.most_units(), !shares));
    Workspace workspace(Workspace::bytes<C>(ih) + Workspace::bytes<C>(hh) + Workspace::bytes<C>(hr) + 2 * Workspace::bytes<C>(left) +
                        ranges * Workspace::bytes<C>(each));
    C *weight_ih = workspace.take<C>(ih), *weight_hh = workspace.take<C>(hh), *weight_hr = workspace.take<C>(hr);
    for (C*& side : p.left) side = workspace.take<C>(left);
    p.weight_hr = a_.weight_hr ? weight_hr : nullptr;
    std::vector<C*> own;
    for (int64_t i = 0; i < ranges; ++i) own.push_back(workspace.take<C>(each));

    const auto run_part = S2S_SELECT(RecurrenceForwardPart<C>::run);
    const auto pack_units = S2S_SELECT(RecurrenceProducts<C>::pack_units);
    const auto pack_transposed = S2S_SELECT(RecurrenceProducts<C>::pack_transposed);
    const auto panels_of = S2S_SELECT(RecurrenceProducts<C>::panels);
    const int64_t panels = panels_of(s_.gate_units), rows_of_hr = panels_of(s_.width), packs = ih || hh ? (panels + 3) / 4 : 0;
    this->crew(ranges, [&](Crew::Member& member, int64_t begin, int64_t end) {
      C* const mine = own[begin];
      if (split.slices > 1) return run_part(p, split.part(begin, end), nullptr, nullptr, mine, &member);
      member.tasks(packs + (a_.weight_hr ? 1 : 0), [&](int64_t i) {
        if (i < packs)
          pack_units(p, split.part(0, 1), i * 4, std::min(panels, i * 4 + 4), ih ? weight_ih : nullptr, hh ? weight_hh : nullptr, mine);
        else
          pack_transposed(0, rows_of_hr, s_.width, s_.hidden, s_.width, s_.width, 0, source<S>(a_.weight_hr), nullptr, false, weight_hr,
                          mine);
      });
      for (int64_t g = begin; g < end; ++g) run_part(p, split.part(g, g + 1), weight_ih, weight_hh, own[g], nullptr);
    });
    if (a_.lengths && !a_.packed) {
      this->clear_absent(static_cast<S*>(to.output), s_.width, to.output_batch, to.output_time);
      if (p.hidden_exact) this->clear_absent(p.hidden_exact, s_.width);
      // As much memory again as a dense call would write: worth it only where somebody looks.
      const int64_t first = plan_.slots(), end = to.defined ? s_.batch * s_.time : first;
      if (p.gates) std::fill(p.gates + first * s_.gate_units, p.gates + end * s_.gate_units, C(0));
      if (p.extra) std::fill(p.extra + first * s_.hidden, p.extra + end * s_.hidden, C(0));
      if (p.normed) std::fill(p.normed + first * p.normed_row(), p.normed + end * p.normed_row(), C(0));
    }
  }

 private:
  std::vector<C> bias_;
};

std::vector<Tensor> recurrence_forward(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, const OptionalTensor& h0, const OptionalTensor& c0,
                                       const OptionalTensor& weight_hr, const OptionalTensor& recurrent_mask, const OptionalTensor& norm_ih,
                                       const OptionalTensor& norm_hh, const OptionalTensor& norm_c, const OptionalTensor& norm_b,
                                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& seed, int64_t cell,
                                       bool reverse, double zoneout_h, double zoneout_c, bool training, double weight_dropout, bool packed,
                                       int64_t cuda, int64_t save) {
  const Arguments a{x,       weight_ih, weight_hh, h0,   c0,      weight_hr, recurrent_mask, norm_ih,  norm_hh,        norm_c, norm_b,
                    lengths, reset,     seed,      cell, reverse, zoneout_h, zoneout_c,      training, weight_dropout, packed};
  if (weight_hh.dim() == 3) return run_heads(a, bias_ih, bias_hh, save);
  return dispatch_floating("recurrence", "x", x,
                           [&](auto zero) { return Forward<decltype(zero)>("recurrence", a, bias_ih, bias_hh).run(save); });
}

std::vector<Tensor> recurrence_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                        const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& h0,
                                        const OptionalTensor& c0, const OptionalTensor& weight_hr, const OptionalTensor& recurrent_mask,
                                        const OptionalTensor& norm_ih, const OptionalTensor& norm_hh, const OptionalTensor& norm_c,
                                        const OptionalTensor& norm_b, const OptionalTensor& lengths, const OptionalTensor& reset,
                                        const OptionalTensor& seed, const OptionalTensor& gates, const OptionalTensor& extra,
                                        const OptionalTensor& hidden, const OptionalTensor& normed, int64_t cell, bool reverse,
                                        double zoneout_h, double zoneout_c, bool training, double weight_dropout, bool packed, int64_t cuda,
                                        int64_t needs) {
  const Arguments a{x,       weight_ih, weight_hh, h0,   c0,      weight_hr, recurrent_mask, norm_ih,  norm_hh,        norm_c, norm_b,
                    lengths, reset,     seed,      cell, reverse, zoneout_h, zoneout_c,      training, weight_dropout, packed};
  const RecurrenceKept kept{grad_output, grad_h, grad_c, gates, extra, hidden, normed};
  return weight_hh.dim() == 3 ? run_heads_backward(a, kept, needs) : run_recurrence_backward(a, kept, needs);
}

std::vector<Tensor> recurrence_step(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                    const OptionalTensor& bias_hh, const OptionalTensor& h0, const OptionalTensor& c0, int64_t cell) {
  const OptionalTensor none;
  const Arguments a{x,    weight_ih, weight_hh, h0,   c0,    none, none, none,  none, none, none,
                    none, none,      none,      cell, false, 0,    0,    false, 0,    true};
  return dispatch_floating("recurrence_step", "x", x,
                           [&](auto zero) { return Forward<decltype(zero)>("recurrence_step", a, bias_ih, bias_hh).step(); });
}

}  // namespace

void run_recurrence(const RecurrenceArguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
                    const RecurrencePlaces& to) {
  dispatch_floating("recurrence", "x", a.x, [&](auto zero) { Forward<decltype(zero)>("recurrence", a, bias_ih, bias_hh).run(to); });
}

std::vector<Tensor> run_recurrence_backward(const RecurrenceArguments& a, const RecurrenceKept& kept, int64_t needs) {
  return dispatch_floating("recurrence_backward", "x", a.x,
                           [&](auto zero) { return Backward<decltype(zero)>("recurrence_backward", a, kept, needs).run(); });
}

}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("recurrence_forward", TORCH_BOX(&s2s::recurrence_forward));
  m.impl("recurrence_step", TORCH_BOX(&s2s::recurrence_step));
  m.impl("recurrence_backward", TORCH_BOX(&s2s::recurrence_backward));
}
