// Binding of the recurrences on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "recurrence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.h"
#include "tensor.h"

#define S2S_KERNELS "recurrence_kernels.h"
#include "each_isa.h"
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

  std::vector<Tensor> run(bool save) {
    const bool lstm = s_.cell == Cell::lstm, exact = save && !std::is_same_v<S, C>;
    const ScalarType wide = scalar_type_of<C>;
    std::vector<Tensor> results;
    const auto empty_if = [&](bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) -> OptionalTensor {
      if (!wanted) return std::nullopt;
      results.push_back(empty_cpu(sizes, type));
      return results.back();
    };
    const OptionalTensor output = empty_if(true, {s_.batch, s_.time, s_.width}, type_), h_n = empty_if(true, {s_.batch, s_.width}, type_);
    const OptionalTensor c_n = empty_if(lstm, {s_.batch, s_.hidden}, type_);
    const OptionalTensor gates = empty_if(save, {s_.batch, s_.time, s_.gate_units}, wide);
    const OptionalTensor extra = empty_if(save && (lstm || s_.cell == Cell::gru), {s_.batch, s_.time, s_.hidden}, wide);
    const OptionalTensor hidden = empty_if(exact, {s_.batch, s_.time, s_.width}, wide);
    const OptionalTensor normed = empty_if(save && a_.norm_ih, {s_.batch, s_.time, 2 * s_.gate_units + 2}, wide);

    const auto place = [](const OptionalTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; };
    run({place(output), s_.time * s_.width, s_.width, place(h_n), place(c_n), place(gates), place(extra), place(hidden), place(normed)});
    return results;
  }

  void run(const RecurrencePlaces& to) {
    RecurrenceForward<C> p{};
    this->fill(p);
    p.gates = static_cast<C*>(to.gates), p.extra = static_cast<C*>(to.extra), p.normed = static_cast<C*>(to.normed);
    p.hidden_exact = static_cast<C*>(to.hidden);
    p.bias = bias_.data(), p.bias_hn = bias_.data() + s_.gate_units;
    p.x = source<S>(a_.x);
    const auto write = S2S_SELECT(RowKernels<S>::write);
    p.output = {to.output, to.output_batch, to.output_time, write};
    p.h_n = {to.h_n, s_.width, 0, write};
    if (s_.cell == Cell::lstm) p.c_n = {to.c_n, s_.hidden, 0, write};

    const int64_t ih = this->packed_size(s_.gate_units, s_.inputs), hh = this->packed_size(s_.gate_units, s_.width);
    const int64_t hr = a_.weight_hr ? this->packed_size(s_.width, s_.hidden) : 0;
    const int64_t most = std::max({s_.inputs, s_.width, s_.hidden});
    const int64_t scratch = S2S_SELECT(RecurrenceProducts<C>::pack_workspace)(most);
    Workspace workspace(Workspace::bytes<C>(ih) + Workspace::bytes<C>(hh) + Workspace::bytes<C>(hr) + Workspace::bytes<C>(scratch));
    C *weight_ih = workspace.take<C>(ih), *weight_hh = workspace.take<C>(hh), *weight_hr = workspace.take<C>(hr);
    C* own = workspace.take<C>(scratch);
    const auto pack = S2S_SELECT(RecurrenceProducts<C>::pack_transposed);
    pack(s_.gate_units, s_.inputs, source<S>(a_.weight_ih), nullptr, weight_ih, own);
    pack(s_.gate_units, s_.width, source<S>(a_.weight_hh), a_.weight_dropout > 0 ? &this->dropout_ : nullptr, weight_hh, own);
    if (a_.weight_hr) pack(s_.width, s_.hidden, source<S>(a_.weight_hr), nullptr, weight_hr, own);
    p.weight_ih = weight_ih, p.weight_hh = weight_hh, p.weight_hr = a_.weight_hr ? weight_hr : nullptr;

    const int64_t groups = this->groups(), rows = (s_.batch + groups - 1) / groups;
    p.x_rows = groups == 1 ? this->rows_of_x(p.x_row) : nullptr;
    p.block_rows = std::min<int64_t>(plan_.slots() + 1, std::max<int64_t>(192, (1 << 17) / s_.gate_units));
    this->run_groups(p, groups, S2S_SELECT(RecurrenceForwardGroup<C>::workspace)(p, rows), S2S_SELECT(RecurrenceForwardGroup<C>::run));
    if (a_.lengths) {
      this->clear_absent(static_cast<S*>(to.output), s_.width, to.output_batch, to.output_time);
      if (p.hidden_exact) this->clear_absent(p.hidden_exact, s_.width);
      // No slot is left undefined: what forward gives is the same on every run.
      const int64_t first = plan_.slots(), end = s_.batch * s_.time;
      if (p.gates) std::fill(p.gates + first * s_.gate_units, p.gates + end * s_.gate_units, C(0));
      if (p.extra) std::fill(p.extra + first * s_.hidden, p.extra + end * s_.hidden, C(0));
      if (p.normed) std::fill(p.normed + first * p.normed_row(), p.normed + end * p.normed_row(), C(0));
    }
  }

 private:
  std::vector<C> bias_;
};

using Kept = RecurrenceKept;

template <class S>
class Backward : Runner<S> {
  using C = compute_t<S>;
  using Base = Runner<S>;
  using Base::a_;
  using Base::plan_;
  using Base::s_;
  using Base::type_;

 public:
  Backward(const char* op, const Arguments& a, const Kept& kept, int64_t needs) : Base(op, a), kept_(kept), needs_(needs) {
    check_argument(op, "grad_output", kept.grad_output, type_, {s_.batch, s_.time, s_.width});
    check_argument(op, "grad_h", kept.grad_h, type_, {s_.batch, s_.width});
    check_argument(op, "grad_c", kept.grad_c, type_, {s_.batch, s_.hidden});
    const ScalarType wide = scalar_type_of<C>;
    const auto check = [&](const char* name, const OptionalTensor& tensor, int64_t last) {
      STD_TORCH_CHECK(tensor, op, ": ", name, " must be given");
      check_argument(op, name, *tensor, wide, {s_.batch, s_.time, last});
      STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
    };
    check("gates", kept.gates, s_.gate_units);
    check("hidden", kept.hidden, s_.width);
    if (s_.cell == Cell::lstm || s_.cell == Cell::gru) check("extra", kept.extra, s_.hidden);
    if (a.norm_ih) check("normed", kept.normed, 2 * s_.gate_units + 2);
    const OptionalTensor* given[wanted_count] = {nullptr,      nullptr, nullptr,    nullptr,    nullptr,   &a.h0,    &a.c0,
                                                 &a.weight_hr, &a.mask, &a.norm_ih, &a.norm_hh, &a.norm_c, &a.norm_b};
    for (int i = 0; i < wanted_count; ++i)
      STD_TORCH_CHECK(!wants(i) || !given[i] || given[i]->has_value(), op, ": needs must ask for gradients of given arguments only");
  }

  std::vector<Tensor> run() {
    RecurrenceBackward<C> p{};
    this->fill(p);
    const int64_t slots = plan_.slots(), gates = s_.gate_units, hidden = s_.hidden, width = s_.width;
    const bool two = s_.cell == Cell::gru || a_.norm_ih, projects = a_.weight_hr.has_value(), norm_c = a_.norm_c.has_value();
    p.gates = mutable_data<C>(kept_.gates), p.hidden_exact = mutable_data<C>(kept_.hidden);
    if (s_.cell == Cell::lstm || s_.cell == Cell::gru) p.extra = mutable_data<C>(kept_.extra);
    if (a_.norm_ih) p.normed = mutable_data<C>(kept_.normed);
    p.grad_output = source<S>(kept_.grad_output), p.grad_h = source<S>(kept_.grad_h), p.grad_c = source<S>(kept_.grad_c);

    const int64_t hh = this->packed_size(width, gates), hr = projects ? this->packed_size(hidden, width) : 0;
    const int64_t ih = wants(want_x) ? this->packed_size(s_.inputs, gates) : 0;
    const int64_t scratch = S2S_SELECT(RecurrenceProducts<C>::pack_workspace)(std::max({s_.inputs, width, hidden}));
    int64_t x_row = s_.inputs;
    const C* x_rows = wants(want_ih) ? this->rows_of_x(x_row) : nullptr;
    const int64_t sizes[] = {slots * gates,
                             two ? slots * gates : 0,
                             projects ? slots * width : 0,
                             projects && wants(want_hr) ? slots * hidden : 0,
                             norm_c ? slots * hidden : 0,
                             norm_c ? slots * hidden : 0,
                             hh,
                             hr,
                             ih,
                             scratch,
                             wants(want_hh) && !hidden_in_place() ? slots * width : 0,
                             wants(want_ih) && !x_rows && !x_in_place() ? slots * s_.inputs : 0};
    int64_t bytes = 0;
    for (const int64_t size : sizes) bytes += Workspace::bytes<C>(size);
    Workspace workspace(bytes);
    C* parts[std::size(sizes)];
    for (size_t i = 0; i < std::size(sizes); ++i) parts[i] = workspace.take<C>(sizes[i]);
    p.grad_in = parts[0], p.grad_rec = two ? parts[1] : parts[0];
    p.grad_projected = projects ? parts[2] : nullptr, p.unprojected = projects && wants(want_hr) ? parts[3] : nullptr;
    p.grad_norm_c = norm_c ? parts[4] : nullptr, p.normed_c = norm_c ? parts[5] : nullptr;
    const auto pack = S2S_SELECT(RecurrenceProducts<C>::pack);
    pack(gates, width, source<S>(a_.weight_hh), a_.weight_dropout > 0 ? &this->dropout_ : nullptr, parts[6], parts[9]);
    if (projects) pack(width, hidden, source<S>(a_.weight_hr), nullptr, parts[7], parts[9]);
    p.weight_hh = parts[6], p.weight_hr = projects ? parts[7] : nullptr;

    const int64_t result_sizes[wanted_count][3] = {{s_.batch, s_.time, s_.inputs},
                                                   {gates, s_.inputs},
                                                   {gates, width},
                                                   {gates},
                                                   {gates},
                                                   {s_.batch, width},
                                                   {s_.batch, hidden},
                                                   {width, hidden},
                                                   {s_.batch, width},
                                                   {gates},
                                                   {gates},
                                                   {hidden},
                                                   {hidden}};
    for (int i = 0; i < wanted_count; ++i) {
      if (!wants(i)) continue;
      const int64_t* size = result_sizes[i];
      const bool matrix = i == want_ih || i == want_hh || i == want_h0 || i == want_c0 || i == want_hr || i == want_mask;
      results_[i] = i == want_x ? empty_cpu({size[0], size[1], size[2]}, type_)
                    : matrix    ? empty_cpu({size[0], size[1]}, type_)
                                : empty_cpu({size[0]}, type_);
    }
    if (wants(want_h0)) p.grad_h0 = target<S>(*results_[want_h0]);
    if (wants(want_c0)) p.grad_c0 = target<S>(*results_[want_c0]);
    if (wants(want_mask)) p.grad_mask = target<S>(*results_[want_mask]);

    const int64_t groups = this->groups(), rows = (s_.batch + groups - 1) / groups;
    this->run_groups(p, groups, S2S_SELECT(RecurrenceBackwardGroup<C>::workspace)(p, rows), S2S_SELECT(RecurrenceBackwardGroup<C>::run));

    vector_gradients(p);
    if (wants(want_hh)) matrix_gradient(want_hh, gates, width, recurrent_segments(p, parts[10]));
    if (wants(want_hr)) matrix_gradient(want_hr, width, hidden, {{p.grad_projected, width, p.unprojected, hidden, slots}});
    if (a_.norm_ih && (wants(want_x) || wants(want_ih))) {
      const auto normalise_gradient = S2S_SELECT(RecurrenceProducts<C>::normalise_gradient);
      parallel(slots, 1 + (1 << 13) / gates, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const C* normed = p.normed + i * p.normed_row();
          normalise_gradient(gates, p.grad_in + i * gates, p.norm_ih, normed, normed[2 * gates], p.grad_in + i * gates);
        }
      });
    }
    if (wants(want_ih)) matrix_gradient(want_ih, gates, s_.inputs, input_segments(p, x_rows, x_row, parts[11]));
    if (wants(want_x)) {
      pack(gates, s_.inputs, source<S>(a_.weight_ih), nullptr, parts[8], parts[9]);
      input_gradient(p.grad_in, parts[8]);
    }
    std::vector<Tensor> results;
    for (const OptionalTensor& result : results_)
      if (result) results.push_back(*result);
    return results;
  }

 private:
  bool wants(int i) const { return needs_ >> i & 1; }

  // A result (or the memory that it is narrowed from), written by `write`.
  template <class F>
  void narrowed(int i, int64_t count, const F& write) {
    if constexpr (std::is_same_v<S, C>) {
      write(mutable_data<S>(*results_[i]));
    } else {
      Workspace workspace(Workspace::bytes<C>(count));
      C* wide = workspace.take<C>(count);
      write(wide);
      S2S_SELECT(RowKernels<S>::write)(mutable_data<S>(*results_[i]), 0, count, wide);
    }
  }

  // The gradients that are sums over all positions of one value a unit.
  void vector_gradients(const RecurrenceBackward<C>& p) {
    const int64_t slots = plan_.slots(), gates = s_.gate_units, hidden = s_.hidden;
    const auto sum = S2S_SELECT(RecurrenceProducts<C>::sum_columns);
    const auto columns = [&](int64_t n, const C* a, int64_t a_row, const C* b, int64_t b_row, const C* c, int64_t c_row, C* to) {
      parallel((n + 127) / 128, 1 + (1 << 10) / (slots + 1),
               [&](int64_t begin, int64_t end) { sum(slots, begin * 128, std::min(n, end * 128), a, a_row, b, b_row, c, c_row, to); });
    };
    // What the recurrent part gets beside the products: all that the input part gets, times r for a GRU's candidate.
    const int64_t equal = s_.cell == Cell::gru ? 2 * hidden : gates;
    const auto recurrent = [&](const C* normed, C* to) {
      columns(equal, p.grad_in, gates, normed, p.normed_row(), nullptr, 0, to);
      if (equal < gates)
        columns(gates - equal, p.grad_in + equal, gates, p.gates, gates, normed ? normed + equal : nullptr, p.normed_row(), to + equal);
    };
    if (wants(want_bias_ih)) narrowed(want_bias_ih, gates, [&](C* to) { columns(gates, p.grad_in, gates, nullptr, 0, nullptr, 0, to); });
    if (wants(want_bias_hh) && wants(want_bias_ih) && equal == gates) {
      std::copy_n(mutable_data<S>(*results_[want_bias_ih]), gates, mutable_data<S>(*results_[want_bias_hh]));
    } else if (wants(want_bias_hh)) {
      narrowed(want_bias_hh, gates, [&](C* to) { recurrent(nullptr, to); });
    }
    if (wants(want_norm_ih))
      narrowed(want_norm_ih, gates, [&](C* to) { columns(gates, p.grad_in, gates, p.normed, p.normed_row(), nullptr, 0, to); });
    if (wants(want_norm_hh)) narrowed(want_norm_hh, gates, [&](C* to) { recurrent(p.normed + gates, to); });
    if (wants(want_norm_c))
      narrowed(want_norm_c, hidden, [&](C* to) { columns(hidden, p.grad_norm_c, hidden, p.normed_c, hidden, nullptr, 0, to); });
    if (wants(want_norm_b))
      narrowed(want_norm_b, hidden, [&](C* to) { columns(hidden, p.grad_norm_c, hidden, nullptr, 0, nullptr, 0, to); });
  }

  // Some of the positions over which a weight's gradient is summed: rows of gradients and of what they are multiplied with.
  struct Segment {
    const C* grad;
    int64_t grad_row;
    const C* values;
    int64_t values_row, count;
  };

  // Whether all positions of a row of the batch can be taken together: long enough to fill the blocks of a product.
  bool row_by_row() const { return plan_.every_row_whole() && (s_.batch == 1 || s_.time >= 192); }
  bool hidden_in_place() const { return row_by_row() && s_.time > 0 && !a_.mask && !a_.reset; }
  bool x_in_place() const { return row_by_row() && std::is_same_v<S, C> && a_.x.stride(2) == 1; }

  std::vector<Segment> recurrent_segments(const RecurrenceBackward<C>& p, C* gathered) {
    const int64_t gates = s_.gate_units, width = s_.width, batch = s_.batch, time = s_.time;
    if (!hidden_in_place()) {
      const auto gather = S2S_SELECT(RecurrenceBackwardGroup<C>::recurrent_inputs);
      parallel(time, 1 + (1 << 15) / (batch * width + 1), [&](int64_t begin, int64_t end) { gather(p, begin, end, gathered); });
      return {{p.grad_rec, gates, gathered, width, plan_.slots()}};
    }
    std::vector<Segment> segments;
    for (int64_t b = 0; b < batch; ++b) {
      const C* const hidden = p.hidden_exact + b * time * width;
      segments.push_back(
          {p.grad_rec + (a_.reverse ? b : batch + b) * gates, batch * gates, a_.reverse ? hidden + width : hidden, width, time - 1});
    }
    if (p.h0) segments.push_back({p.grad_rec + (a_.reverse ? (time - 1) * batch : 0) * gates, gates, p.h0, width, batch});
    return segments;
  }

  std::vector<Segment> input_segments(const RecurrenceBackward<C>& p, const C* x_rows, int64_t x_row, C* gathered) {
    const int64_t gates = s_.gate_units, slots = plan_.slots();
    if (x_rows) return {{p.grad_in, gates, x_rows, x_row, slots}};
    if (!x_in_place()) {
      gather_x(gathered);
      return {{p.grad_in, gates, gathered, s_.inputs, slots}};
    }
    std::vector<Segment> segments;
    if constexpr (std::is_same_v<S, C>)
      for (int64_t b = 0; b < s_.batch; ++b)
        segments.push_back({p.grad_in + b * gates, s_.batch * gates, data<S>(a_.x) + b * a_.x.stride(0), a_.x.stride(1), s_.time});
    return segments;
  }

  // grad^T times values, (m, n), summed over the segments in order; rows of the result are dealt to the threads.
  void matrix_gradient(int i, int64_t m, int64_t n, const std::vector<Segment>& segments) {
    const int64_t slots = plan_.slots();
    const bool drops = i == want_hh && a_.weight_dropout > 0;
    const int64_t parts = std::max<int64_t>(1, std::min(thread_count(), m * n * slots >> 20)), rows = (m + parts - 1) / parts;
    const int64_t size = S2S_SELECT(RecurrenceProducts<C>::product_workspace)(rows, n, slots) + n + 16;
    Workspace workspace(parts * Workspace::bytes<C>(size));
    std::vector<C*> scratch;
    for (int64_t part = 0; part < parts; ++part) scratch.push_back(workspace.take<C>(size));
    const auto product = S2S_SELECT(RecurrenceProducts<C>::transposed_product);
    const auto drop = S2S_SELECT(RecurrenceProducts<C>::drop);
    narrowed(i, m * n, [&](C* to) {
      if (segments.empty()) std::fill(to, to + m * n, C(0));
      parallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t first = std::min(m, part * rows), last = std::min(m, first + rows);
          for (const Segment& s : segments)
            product(last - first, n, s.count, s.grad + first, s.grad_row, s.values, s.values_row, to + first * n, n, &s != segments.data(),
                    scratch[part]);
          for (int64_t row = first; drops && row < last; ++row) drop(this->dropout_, row, n, scratch[part], to + row * n);
        }
      });
    });
  }

  void gather_x(C* to) {
    const Source<C> x = source<S>(a_.x);
    const Schedule& s = plan_.schedule;
    parallel(s_.time, 1 + (1 << 15) / (s_.batch * s_.inputs + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int64_t rank = 0; rank < s.count[t]; ++rank)
          x.read(x.data, s.order[rank] * x.batch + t * x.time, x.unit, s_.inputs, to + (s.offset[t] + rank) * s_.inputs);
    });
  }

  // The gates' gradients times W_ih, some positions at a time: those of one row of the batch, written where they belong, or neighbouring
  // slots, dealt out afterwards.
  void input_gradient(const C* grad, const C* weight) {
    constexpr int64_t rows = 192;
    const Schedule& s = plan_.schedule;
    const int64_t slots = plan_.slots(), inputs = s_.inputs, gates = s_.gate_units, time = s_.time;
    const Target<C> to = target<S>(*results_[want_x]);
    const bool in_place = row_by_row() && std::is_same_v<S, C>;
    const int64_t per_row = (time + rows - 1) / rows, chunks = in_place ? s_.batch * per_row : (slots + rows - 1) / rows;
    const int64_t blocks = (S2S_SELECT(RecurrenceProducts<C>::many_workspace)(rows) + 15) / 16 * 16;
    const int64_t threads = std::max<int64_t>(1, std::min(thread_count(), chunks)), size = rows * inputs + blocks;
    Workspace workspace(threads * Workspace::bytes<C>(size));
    std::vector<C*> scratch;
    for (int64_t i = 0; i < threads; ++i) scratch.push_back(workspace.take<C>(size));
    std::atomic<int64_t> next{0};
    const auto product = S2S_SELECT(RecurrenceProducts<C>::many);
    parallel(chunks, 1, [&](int64_t begin, int64_t end) {
      C* const copy = scratch[next.fetch_add(1)];
      C* const own = copy + blocks;
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        if (in_place) {
          const int64_t b = chunk / per_row, first = chunk % per_row * rows, count = std::min(rows, time - first);
          C* const row = static_cast<C*>(to.data) + (b * time + first) * inputs;
          product(count, inputs, gates, grad + (first * s_.batch + b) * gates, s_.batch * gates, weight, row, inputs, copy);
          continue;
        }
        const int64_t first = chunk * rows, count = std::min(rows, slots - first);
        product(count, inputs, gates, grad + first * gates, gates, weight, own, inputs, copy);
        int64_t t = plan_.time_of_slot(first);
        for (int64_t i = 0; i < count; ++i) {
          while (first + i >= s.offset[t + 1]) ++t;
          const int64_t b = s.order[first + i - s.offset[t]];
          to.write(to.data, (b * time + t) * inputs, inputs, own + i * inputs);
        }
      }
    });
    if (a_.lengths) this->clear_absent(static_cast<S*>(to.data), inputs);
  }

  const Kept& kept_;
  const int64_t needs_;
  OptionalTensor results_[wanted_count];
};

std::vector<Tensor> recurrence_forward(const Tensor& x, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                       const OptionalTensor& bias_hh, const OptionalTensor& h0, const OptionalTensor& c0,
                                       const OptionalTensor& weight_hr, const OptionalTensor& recurrent_mask, const OptionalTensor& norm_ih,
                                       const OptionalTensor& norm_hh, const OptionalTensor& norm_c, const OptionalTensor& norm_b,
                                       const OptionalTensor& lengths, const OptionalTensor& reset, const OptionalTensor& seed, int64_t cell,
                                       bool reverse, double zoneout_h, double zoneout_c, bool training, double weight_dropout, bool save) {
  const Arguments a{x,      weight_ih, weight_hh, h0,   c0,   weight_hr, recurrent_mask, norm_ih,   norm_hh,  norm_c,
                    norm_b, lengths,   reset,     seed, cell, reverse,   zoneout_h,      zoneout_c, training, weight_dropout};
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
                                        double zoneout_h, double zoneout_c, bool training, double weight_dropout, int64_t needs) {
  const Arguments a{x,      weight_ih, weight_hh, h0,   c0,   weight_hr, recurrent_mask, norm_ih,   norm_hh,  norm_c,
                    norm_b, lengths,   reset,     seed, cell, reverse,   zoneout_h,      zoneout_c, training, weight_dropout};
  return run_recurrence_backward(a, {grad_output, grad_h, grad_c, gates, extra, hidden, normed}, needs);
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
  m.impl("recurrence_backward", TORCH_BOX(&s2s::recurrence_backward));
}
