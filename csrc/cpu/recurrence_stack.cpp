// All layers and directions of a recurrent network in one call: small networks spend their time on calls, not in them. Each direction
// writes its half of a layer's output where it belongs, and the last layer in the layout that is asked for.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "recurrence.h"
#include "recurrence_call.h"

namespace s2s {
namespace {

using torch::stable::narrow;
using torch::stable::select;
using torch::stable::transpose;

const OptionalTensor absent;

struct Stack {
  const char* op;
  const Tensor& x;
  const std::vector<Tensor>& weights;
  const OptionalTensor &h0, &c0, &lengths, &reset;
  Cell cell;
  int64_t directions;
  bool bias, projected, normed;
  double zoneout_h, zoneout_c;
  bool time_first, packed;

  int64_t batch, cells, gate_units, hidden, width;
  ScalarType type, wide;

  Stack(const char* op_, const Tensor& x_, const std::vector<Tensor>& weights_, const OptionalTensor& h0_, const OptionalTensor& c0_,
        const OptionalTensor& lengths_, const OptionalTensor& reset_, int64_t cell_, int64_t directions_, bool bias_, bool projected_,
        bool normed_, double zoneout_h_, double zoneout_c_, bool time_first_, bool packed_)
      : op(op_),
        x(x_),
        weights(weights_),
        h0(h0_),
        c0(c0_),
        lengths(lengths_),
        reset(reset_),
        directions(directions_),
        bias(bias_),
        projected(projected_),
        normed(normed_),
        zoneout_h(zoneout_h_),
        zoneout_c(zoneout_c_),
        time_first(time_first_),
        packed(packed_) {
    STD_TORCH_CHECK(cell_ >= 0 && cell_ <= static_cast<int64_t>(Cell::rnn_relu), op, ": cell must be in [0, 3], got ", cell_);
    cell = static_cast<Cell>(cell_);
    STD_TORCH_CHECK(directions == 1 || directions == 2, op, ": directions must be 1 or 2, got ", directions);
    check_cpu(op, "x", x);
    check_dim(op, "x", x, packed ? 2 : 3);
    STD_TORCH_CHECK(!packed || (lengths && !time_first), op, ": a packed x must have lengths, and time_first be false");
    if (packed) check_dim(op, "lengths", *lengths, 1);
    const int64_t count = static_cast<int64_t>(weights.size()), each = weights_each();
    STD_TORCH_CHECK(count > 0 && count % (each * directions) == 0, op, ": weights must be ", each,
                    " for each direction of each layer, got ", count);
    cells = count / each;
    check_dim(op, "weight_hh", weights[1], 2);
    batch = packed ? lengths->size(0) : x.size(0), type = x.scalar_type();
    wide = type == ScalarType::Double ? type : ScalarType::Float;
    gate_units = weights[1].size(0), width = weights[1].size(1), hidden = gate_units / gates_of(cell);
    for (int64_t i = 0; i < cells; ++i) check_argument(op, "weight_hh", weights[i * each + 1], type, {gate_units, width});
    check_argument(op, "h0", h0, type, {cells, batch, width});
    STD_TORCH_CHECK(!c0 || lstm(), op, ": c0 must be absent, only an LSTM has a cell");
    check_argument(op, "c0", c0, type, {cells, batch, hidden});
  }

  bool lstm() const { return cell == Cell::lstm; }
  int64_t weights_each() const { return 2 + 2 * bias + projected + (normed ? lstm() ? 4 : 2 : 0); }
  int64_t layers() const { return cells / directions; }
  bool is_last(int64_t layer) const { return layer + 1 == layers(); }
  // Whether the output of a layer can't be what backward needs of each direction: it is rounded, or not contiguous.
  bool keeps_hidden(int64_t layer) const { return type != wide || directions == 2 || (time_first && is_last(layer)); }

  // Calls f(arguments, bias_ih, bias_hh) for one direction of one layer, of which `from` is the input.
  template <class F>
  void with_arguments(const Tensor& from, int64_t index, const F& f) const {
    const Tensor* w = &weights[index * weights_each()];
    const OptionalTensor bias_ih = bias ? OptionalTensor(w[2]) : absent, bias_hh = bias ? OptionalTensor(w[3]) : absent;
    const Tensor* next = w + 2 + 2 * bias;
    const OptionalTensor weight_hr = projected ? OptionalTensor(*next) : absent;
    next += projected;
    const OptionalTensor norm_ih = normed ? OptionalTensor(next[0]) : absent, norm_hh = normed ? OptionalTensor(next[1]) : absent;
    const OptionalTensor norm_c = normed && lstm() ? OptionalTensor(next[2]) : absent;
    const OptionalTensor norm_b = normed && lstm() ? OptionalTensor(next[3]) : absent;
    const OptionalTensor h = row(h0, index), c = row(c0, index);
    f(RecurrenceArguments{from,
                          w[0],
                          w[1],
                          h,
                          c,
                          weight_hr,
                          absent,
                          norm_ih,
                          norm_hh,
                          norm_c,
                          norm_b,
                          lengths,
                          reset,
                          absent,
                          static_cast<int64_t>(cell),
                          index % directions == 1,
                          zoneout_h,
                          zoneout_c,
                          false,
                          0.0,
                          packed},
      bias_ih, bias_hh);
  }

  // Row `index` of a state of all layers and directions.
  static OptionalTensor row(const OptionalTensor& states, int64_t index) {
    return states ? OptionalTensor(select(const_cast<Tensor&>(*states), 0, index)) : absent;
  }
};

// Returns output, h_n, c_n and, to be saved: of each layer the input (but of the first), and of each direction gates, extra, hidden,
// normed.
std::vector<Tensor> recurrence_stack_forward(const Tensor& x, std::vector<Tensor> weights, const OptionalTensor& h0,
                                             const OptionalTensor& c0, const OptionalTensor& lengths, const OptionalTensor& reset,
                                             int64_t cell, int64_t directions, bool bias, bool projected, bool normed, double zoneout_h,
                                             double zoneout_c, bool time_first, bool packed, int64_t save) {
  check_save("recurrence_stack", save);
  const Stack s("recurrence_stack", x, weights, h0, c0, lengths, reset, cell, directions, bias, projected, normed, zoneout_h, zoneout_c,
                time_first, packed);
  const int64_t item = size_of(s.type), features = directions * s.width;
  const Tensor h_n = empty_cpu({s.cells, s.batch, s.width}, s.type);
  const Tensor c_n = s.lstm() ? empty_cpu({s.cells, s.batch, s.hidden}, s.type) : empty_cpu({0}, s.type);
  const auto kept = [&](bool wanted, int64_t size) { return wanted ? over_positions(x, size, s.wide) : empty_cpu({0}, s.wide); };
  std::vector<Tensor> saved;
  OptionalTensor from = x;
  for (int64_t layer = 0; layer < s.layers(); ++layer) {
    const bool turned = time_first && s.is_last(layer);
    const Tensor output = turned ? empty_cpu({x.size(1), s.batch, features}, s.type) : over_positions(x, features, s.type);
    if (save && layer > 0) saved.push_back(*from);
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = layer * directions + direction;
      RecurrencePlaces to{};
      to.defined = save == save_defined;
      to.output = bytes(output) + direction * s.width * item;
      to.output_batch = turned ? features : packed ? 0 : x.size(1) * features;
      to.output_time = turned ? s.batch * features : features;
      to.h_n = bytes(h_n) + index * s.batch * s.width * item;
      to.h_row = s.width, to.c_row = s.hidden;
      to.c_n = s.lstm() ? bytes(c_n) + index * s.batch * s.hidden * item : nullptr;
      if (save) {
        const Tensor own[] = {kept(keeps_gates(s.cell, zoneout_h), s.gate_units), kept(s.lstm() || s.cell == Cell::gru, s.hidden),
                              kept(s.keeps_hidden(layer), s.width), kept(normed, normed_row(s.gate_units))};
        void** const places[] = {&to.gates, &to.extra, &to.hidden, &to.normed};
        for (int i = 0; i < 4; ++i) {
          if (own[i].dim() > 1) *places[i] = own[i].mutable_data_ptr();
          saved.push_back(own[i]);
        }
      }
      s.with_arguments(*from, index, [&](const RecurrenceArguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
        run_recurrence(a, bias_ih, bias_hh, to);
      });
    }
    from = output;
  }
  std::vector<Tensor> results{*from, h_n, c_n};
  results.insert(results.end(), saved.begin(), saved.end());
  return results;
}

// Returns the gradients that are needed, in the order x, weights, h0, c0.
std::vector<Tensor> recurrence_stack_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_h, const OptionalTensor& grad_c,
                                              const Tensor& x, std::vector<Tensor> weights, const OptionalTensor& h0,
                                              const OptionalTensor& c0, const OptionalTensor& lengths, const OptionalTensor& reset,
                                              const Tensor& output, std::vector<Tensor> saved, int64_t cell, int64_t directions, bool bias,
                                              bool projected, bool normed, double zoneout_h, double zoneout_c, bool time_first, bool packed,
                                              std::vector<int64_t> needs) {
  const char* op = "recurrence_stack_backward";
  const Stack s(op, x, weights, h0, c0, lengths, reset, cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first,
                packed);
  const int64_t each = s.weights_each(), count = s.cells * each, features = directions * s.width;
  STD_TORCH_CHECK(static_cast<int64_t>(needs.size()) == count + 3, op, ": needs must have ", count + 3, " flags, got ", needs.size());
  STD_TORCH_CHECK(static_cast<int64_t>(saved.size()) == s.layers() - 1 + 4 * s.cells, op, ": saved must be what forward gave");
  STD_TORCH_CHECK((!needs[count + 1] || h0) && (!needs[count + 2] || c0), op, ": needs must ask for gradients of given arguments only");
  if (time_first)
    check_argument(op, "grad_output", grad_output, s.type, {x.size(1), s.batch, features});
  else if (grad_output)
    check_positions(op, "grad_output", *grad_output, x, features, s.type);
  check_argument(op, "grad_h", grad_h, s.type, {s.cells, s.batch, s.width});
  check_argument(op, "grad_c", grad_c, s.type, {s.cells, s.batch, s.hidden});

  std::vector<OptionalTensor> results(count + 3);
  if (needs[count + 1]) results[count + 1] = empty_cpu({s.cells, s.batch, s.width}, s.type);
  if (needs[count + 2]) results[count + 2] = empty_cpu({s.cells, s.batch, s.hidden}, s.type);
  // Which of the gradients of one direction, as run_recurrence_backward numbers them, belong to its weights, in their order.
  std::vector<int> own{want_ih, want_hh};
  if (bias) own.insert(own.end(), {want_bias_ih, want_bias_hh});
  if (projected) own.push_back(want_hr);
  if (normed) own.insert(own.end(), {want_norm_ih, want_norm_hh});
  if (normed && s.lstm()) own.insert(own.end(), {want_norm_c, want_norm_b});

  const int64_t item = size_of(s.type);
  OptionalTensor grad = grad_output;
  if (grad && time_first) grad = transpose(*grad, 0, 1);
  for (int64_t layer = s.layers() - 1; layer >= 0; --layer) {
    const int64_t place = layer * (1 + 4 * directions);  // in `saved`, after this layer's input
    const Tensor& from = layer > 0 ? saved[place - 1] : x;
    const bool below =
        needs[0] || needs[count + 1] || needs[count + 2] ||
        std::any_of(needs.begin() + 1, needs.begin() + 1 + layer * directions * each, [](int64_t need) { return need != 0; });
    OptionalTensor grad_from;
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = layer * directions + direction;
      int64_t wanted = int64_t{layer > 0 ? below : needs[0] != 0} << want_x;
      for (int64_t i = 0; i < each; ++i)
        if (needs[1 + index * each + i]) wanted |= int64_t{1} << own[i];
      if (needs[count + 1]) wanted |= int64_t{1} << want_h0;
      if (needs[count + 2]) wanted |= int64_t{1} << want_c0;
      if (wanted == 0) continue;
      const OptionalTensor grad_own =
          grad && directions == 2 ? OptionalTensor(narrow(*grad, packed ? 1 : 2, direction * s.width, s.width)) : grad;
      const OptionalTensor grad_h_n = Stack::row(grad_h, index), grad_c_n = Stack::row(grad_c, index);
      const Tensor* kept = &saved[place + 4 * direction];
      const Tensor& whole = s.is_last(layer) ? output : saved[place + 4 * directions];
      const Tensor& hidden = s.keeps_hidden(layer) ? kept[2] : whole;
      std::vector<Tensor> grads;
      s.with_arguments(from, index, [&](const RecurrenceArguments& a, const OptionalTensor&, const OptionalTensor&) {
        grads = run_recurrence_backward(a, {grad_own, grad_h_n, grad_c_n, kept[0], kept[1], hidden, kept[3]}, wanted);
      });
      auto next = grads.begin();
      for (int want = 0; want < wanted_count; ++want) {
        if (!(wanted >> want & 1)) continue;
        const Tensor& found = *next++;
        if (want == want_x) {
          if (grad_from)
            add(op, *grad_from, found);
          else
            grad_from = found;
        } else if (want == want_h0 || want == want_c0) {
          const int64_t size = s.batch * (want == want_h0 ? s.width : s.hidden) * item;
          const Tensor& to = *results[count + (want == want_h0 ? 1 : 2)];
          if (size > 0) std::memcpy(bytes(to) + index * size, found.const_data_ptr(), static_cast<size_t>(size));
        } else {
          results[1 + index * each + (std::find(own.begin(), own.end(), want) - own.begin())] = found;
        }
      }
    }
    grad = grad_from;
  }
  if (needs[0]) results[0] = grad;
  std::vector<Tensor> given;
  for (const OptionalTensor& result : results)
    if (result) given.push_back(*result);
  return given;
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("recurrence_stack_forward", TORCH_BOX(&s2s::recurrence_stack_forward));
  m.impl("recurrence_stack_backward", TORCH_BOX(&s2s::recurrence_stack_backward));
}
