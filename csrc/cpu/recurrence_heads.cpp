// Heads one after another, each by the kernels of a whole recurrence, which share it among the threads. Their results go where they belong
// among those of all heads; their weights, gathered from the gates of all, are copied.
#include "recurrence_heads.h"

#include <algorithm>
#include <cstring>

#include "recurrence_cell.h"

namespace s2s {
namespace {

using torch::stable::narrow;
using torch::stable::select;

const OptionalTensor absent;

// A new tensor over the positions of x for each head: (heads, B, T, last), or (heads, N, last) of a packed sequence.
Tensor of_each_head(const Tensor& x, int64_t heads, int64_t last, ScalarType type) {
  return x.dim() == 2 ? empty_cpu({heads, x.size(0), last}, type) : empty_cpu({heads, x.size(0), x.size(1), last}, type);
}

Tensor zeroed(const Tensor& like, ScalarType type) {
  Tensor made = over_positions(like, like.size(-1), type);
  return torch::stable::zero_(made);
}

struct Heads {
  const RecurrenceArguments& a;
  int64_t heads, gates, batch, hidden, own;  // own: units of a head
  ScalarType type, wide;

  Heads(const char* op, const RecurrenceArguments& arguments) : a(arguments) {
    STD_TORCH_CHECK(a.cell >= 0 && a.cell <= static_cast<int64_t>(Cell::rnn_relu), op, ": cell must be in [0, 3], got ", a.cell);
    gates = gates_of(static_cast<Cell>(a.cell)), type = a.x.scalar_type();
    wide = type == ScalarType::Double ? type : ScalarType::Float;
    check_cpu(op, "x", a.x);
    check_dim(op, "x", a.x, a.packed ? 2 : 3);
    check_dim(op, "weight_hh", a.weight_hh, 3);
    heads = a.weight_hh.size(0), own = a.weight_hh.size(2), hidden = heads * own;
    STD_TORCH_CHECK(hidden > 0, op, ": weight_hh must have a head and a unit, got ", shape_text(a.weight_hh));
    check_argument(op, "weight_hh", a.weight_hh, type, {heads, gates * own, own});
    check_argument(op, "weight_ih", a.weight_ih, type, {gates * hidden, a.x.size(-1)});
    STD_TORCH_CHECK(!a.weight_hr && !a.norm_ih && !a.norm_hh && !a.norm_c && !a.norm_b, op,
                    ": heads must be without projection and layer_norm");
    STD_TORCH_CHECK(a.weight_dropout == 0 && !(a.training && (a.zoneout_h > 0 || a.zoneout_c > 0)), op, ": heads must be without dropout");
    if (a.packed) {
      STD_TORCH_CHECK(a.lengths, op, ": a packed x must have lengths");
      check_dim(op, "lengths", *a.lengths, 1);
    }
    batch = a.packed ? a.lengths->size(0) : a.x.size(0);
    for (const auto& [name, state] : {std::pair{"h0", &a.h0}, {"c0", &a.c0}, {"recurrent_mask", &a.mask}})
      check_argument(op, name, *state, type, {batch, hidden});
  }

  bool lstm() const { return static_cast<Cell>(a.cell) == Cell::lstm; }
  bool keeps_extra() const { return lstm() || static_cast<Cell>(a.cell) == Cell::gru; }

  // The rows of all gates that belong to a head, as rows of its own: of a weight (G H, I) or a bias (G H).
  Tensor rows(const Tensor& from, int64_t head) const {
    const int64_t item = size_of(type), columns = from.dim() == 2 ? from.size(1) : 1, step = from.dim() == 2 ? from.stride(1) : 1;
    const Tensor to = from.dim() == 2 ? empty_cpu({gates * own, columns}, type) : empty_cpu({gates * own}, type);
    const auto* source = static_cast<const uint8_t*>(from.const_data_ptr());
    uint8_t* target = bytes(to);
    for (int64_t g = 0; g < gates; ++g)
      for (int64_t i = 0; i < own; ++i) {
        const uint8_t* const row = source + (g * hidden + head * own + i) * from.stride(0) * item;
        if (step == 1)
          std::memcpy(target, row, static_cast<size_t>(columns * item));
        else
          for (int64_t j = 0; j < columns; ++j) std::memcpy(target + j * item, row + j * step * item, static_cast<size_t>(item));
        target += columns * item;
      }
    return to;
  }
  OptionalTensor rows(const OptionalTensor& from, int64_t head) const { return from ? OptionalTensor(rows(*from, head)) : absent; }

  // The other way round, of contiguous tensors.
  void put_rows(const Tensor& from, const Tensor& to, int64_t head) const {
    const int64_t size = from.numel() / gates * size_of(type);
    if (size == 0) return;
    for (int64_t g = 0; g < gates; ++g)
      std::memcpy(bytes(to) + (g * heads + head) * size, bytes(from) + g * size, static_cast<size_t>(size));
  }
  // Of a state (B, H): the head's columns.
  void put_columns(const Tensor& from, const Tensor& to, int64_t head) const {
    const int64_t size = own * size_of(type);
    for (int64_t b = 0; b < batch; ++b)
      std::memcpy(bytes(to) + (b * heads + head) * size, bytes(from) + b * size, static_cast<size_t>(size));
  }

  // The head's part of the last dimension of a tensor of all units.
  OptionalTensor columns(const OptionalTensor& from, int64_t head) const {
    return from ? OptionalTensor(narrow(const_cast<Tensor&>(*from), from->dim() - 1, head * own, own)) : absent;
  }

  // Calls f(arguments) of one head.
  template <class F>
  void with_arguments(int64_t head, const F& f) const {
    const Tensor weight_ih = rows(a.weight_ih, head), weight_hh = select(const_cast<Tensor&>(a.weight_hh), 0, head);
    const OptionalTensor h0 = columns(a.h0, head), c0 = columns(a.c0, head), mask = columns(a.mask, head);
    f(RecurrenceArguments{a.x,       weight_ih, weight_hh, h0,     c0,        absent,      mask,        absent, absent, absent,  absent,
                          a.lengths, a.reset,   absent,    a.cell, a.reverse, a.zoneout_h, a.zoneout_c, false,  0.0,    a.packed});
  }
};

}  // namespace

std::vector<Tensor> run_heads(const RecurrenceArguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, int64_t save) {
  const char* op = "recurrence";
  check_save(op, save);
  const Heads s(op, a);
  const int64_t item = size_of(s.type);
  std::vector<Tensor> results{over_positions(a.x, s.hidden, s.type), empty_cpu({s.batch, s.hidden}, s.type)};
  if (s.lstm()) results.push_back(empty_cpu({s.batch, s.hidden}, s.type));
  const auto kept = [&](bool wanted, int64_t last) -> OptionalTensor {
    if (!save || !wanted) return absent;
    results.push_back(of_each_head(a.x, s.heads, last, s.wide));
    return results.back();
  };
  const Tensor output = results[0], h_n = results[1], c_n = results.back();
  const OptionalTensor gates = kept(keeps_gates(static_cast<Cell>(a.cell), a.zoneout_h), s.gates * s.own);
  const OptionalTensor extra = kept(s.keeps_extra(), s.own), exact = kept(s.type != s.wide, s.own);
  check_argument(op, "bias_ih", bias_ih, s.type, {s.gates * s.hidden});
  check_argument(op, "bias_hh", bias_hh, s.type, {s.gates * s.hidden});
  for (int64_t head = 0; head < s.heads; ++head) {
    const auto part = [&](const OptionalTensor& all) -> void* {
      return all ? bytes(*all) + head * (all->numel() / s.heads) * size_of(s.wide) : nullptr;
    };
    RecurrencePlaces to{};
    to.output = bytes(output) + head * s.own * item;
    to.output_batch = a.packed ? 0 : a.x.size(1) * s.hidden, to.output_time = s.hidden;
    to.h_n = bytes(h_n) + head * s.own * item, to.c_n = s.lstm() ? bytes(c_n) + head * s.own * item : nullptr;
    to.h_row = to.c_row = s.hidden;
    to.gates = part(gates), to.extra = part(extra), to.hidden = part(exact);
    to.defined = save == save_defined;
    const OptionalTensor own_ih = s.rows(bias_ih, head), own_hh = s.rows(bias_hh, head);
    s.with_arguments(head, [&](const RecurrenceArguments& own) { run_recurrence(own, own_ih, own_hh, to); });
  }
  return results;
}

std::vector<Tensor> run_heads_backward(const RecurrenceArguments& a, const RecurrenceKept& kept, int64_t needs) {
  const char* op = "recurrence_backward";
  const Heads s(op, a);
  constexpr int64_t allowed = (int64_t{1} << want_hr) - 1 + (int64_t{1} << want_mask);
  STD_TORCH_CHECK((needs & ~allowed) == 0, op, ": needs must ask for gradients of given arguments only");
  STD_TORCH_CHECK((!(needs >> want_h0 & 1) || a.h0) && (!(needs >> want_c0 & 1) || a.c0) && (!(needs >> want_mask & 1) || a.mask), op,
                  ": needs must ask for gradients of given arguments only");
  STD_TORCH_CHECK(kept.hidden, op, ": hidden must be what forward gave");
  const bool rounded = s.type != s.wide;
  const auto check_kept = [&](const char* name, const OptionalTensor& tensor, int64_t last) {
    if (!tensor) return;
    if (a.packed)
      check_argument(op, name, *tensor, s.wide, {s.heads, a.x.size(0), last});
    else
      check_argument(op, name, *tensor, s.wide, {s.heads, a.x.size(0), a.x.size(1), last});
    STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
  };
  check_kept("gates", kept.gates, s.gates * s.own);
  check_kept("extra", kept.extra, s.own);
  if (rounded)
    check_kept("hidden", kept.hidden, s.own);
  else
    check_positions(op, "hidden", *kept.hidden, a.x, s.hidden, s.type);
  if (kept.grad_output) check_positions(op, "grad_output", *kept.grad_output, a.x, s.hidden, s.type);
  check_argument(op, "grad_h", kept.grad_h, s.type, {s.batch, s.hidden});
  check_argument(op, "grad_c", kept.grad_c, s.type, {s.batch, s.hidden});

  OptionalTensor results[wanted_count];
  const auto make = [&](Wanted which, std::initializer_list<int64_t> shape) {
    if (needs >> which & 1) results[which] = empty_cpu(shape, s.type);
  };
  make(want_ih, {s.gates * s.hidden, a.x.size(-1)});
  make(want_hh, {s.heads, s.gates * s.own, s.own});
  make(want_bias_ih, {s.gates * s.hidden});
  make(want_bias_hh, {s.gates * s.hidden});
  for (const Wanted which : {want_h0, want_c0, want_mask}) make(which, {s.batch, s.hidden});
  for (int64_t head = 0; head < s.heads; ++head) {
    const auto part = [&](const OptionalTensor& all) { return all ? OptionalTensor(select(const_cast<Tensor&>(*all), 0, head)) : absent; };
    const OptionalTensor grad_output = s.columns(kept.grad_output, head), grad_h = s.columns(kept.grad_h, head);
    const OptionalTensor grad_c = s.columns(kept.grad_c, head), gates = part(kept.gates), extra = part(kept.extra);
    const OptionalTensor hidden = rounded ? part(kept.hidden) : as_contiguous(s.columns(kept.hidden, head));
    std::vector<Tensor> grads;
    s.with_arguments(head, [&](const RecurrenceArguments& own) {
      grads = run_recurrence_backward(own, {grad_output, grad_h, grad_c, gates, extra, hidden, absent}, needs);
    });
    auto next = grads.begin();
    for (int which = 0; which < wanted_count; ++which) {
      if (!(needs >> which & 1)) continue;
      const Tensor& found = *next++;
      if (which == want_x) {
        // Rounded once, however many heads there are.
        if (rounded && head == 0) results[want_x] = zeroed(found, s.wide);
        if (rounded || head > 0)
          add(op, *results[want_x], found);
        else
          results[want_x] = found;
      } else if (which == want_hh) {
        const int64_t size = found.numel() * size_of(s.type);
        std::memcpy(bytes(*results[which]) + head * size, bytes(found), static_cast<size_t>(size));
      } else if (which == want_h0 || which == want_c0 || which == want_mask) {
        s.put_columns(found, *results[which], head);
      } else {
        s.put_rows(found, *results[which], head);
      }
    }
  }
  if (rounded && results[want_x]) results[want_x] = torch::stable::to(*results[want_x], s.type);
  std::vector<Tensor> given;
  for (const OptionalTensor& result : results)
    if (result) given.push_back(*result);
  return given;
}

}  // namespace s2s
