// Binding of the recurrences on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "recurrence.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "pool.h"
#include "recurrence_call.h"
#include "tensor.h"

#define S2S_KERNELS "recurrence_kernels.h"
#include "each_isa.h"

namespace s2s {
namespace {

using Arguments = RecurrenceArguments;

struct Sizes {
  int64_t batch, time, inputs, hidden, width, gate_units;
  Cell cell;
};

Sizes checked(const char* op, const Arguments& a) {
  Sizes s{};
  STD_TORCH_CHECK(a.cell >= 0 && a.cell <= static_cast<int64_t>(Cell::rnn_relu), op, ": cell must be in [0, 3], got ", a.cell);
  s.cell = static_cast<Cell>(a.cell);
  const int64_t gates = gates_of(s.cell);
  const ScalarType type = a.x.scalar_type();
  check_cpu(op, "x", a.x);
  check_dim(op, "x", a.x, 3);
  check_dim(op, "weight_ih", a.weight_ih, 2);
  s.batch = a.x.size(0), s.time = a.x.size(1), s.inputs = a.x.size(2);
  s.gate_units = a.weight_ih.size(0);
  STD_TORCH_CHECK(s.gate_units > 0 && s.gate_units % gates == 0, op, ": weight_ih must have ", gates, " rows a unit, got ",
                  shape_text(a.weight_ih));
  s.hidden = s.gate_units / gates;
  check_argument(op, "weight_ih", a.weight_ih, type, {s.gate_units, s.inputs});
  s.width = s.hidden;
  if (a.weight_hr) {
    STD_TORCH_CHECK(s.cell == Cell::lstm, op, ": weight_hr must be absent, only an LSTM projects");
    check_argument(op, "weight_hr", a.weight_hr, type, {-1, s.hidden});
    s.width = a.weight_hr->size(0);
    STD_TORCH_CHECK(s.width > 0, op, ": weight_hr must have a row");
  }
  check_argument(op, "weight_hh", a.weight_hh, type, {s.gate_units, s.width});
  check_argument(op, "h0", a.h0, type, {s.batch, s.width});
  STD_TORCH_CHECK(!a.c0 || s.cell == Cell::lstm, op, ": c0 must be absent, only an LSTM has a cell");
  check_argument(op, "c0", a.c0, type, {s.batch, s.hidden});
  check_argument(op, "recurrent_mask", a.mask, type, {s.batch, s.width});
  const bool normed = a.norm_ih.has_value(), cell_normed = normed && s.cell == Cell::lstm;
  STD_TORCH_CHECK(a.norm_hh.has_value() == normed && a.norm_c.has_value() == cell_normed && a.norm_b.has_value() == cell_normed, op,
                  ": layer_norm must be whole");
  check_argument(op, "norm_ih", a.norm_ih, type, {s.gate_units});
  check_argument(op, "norm_hh", a.norm_hh, type, {s.gate_units});
  check_argument(op, "norm_c", a.norm_c, type, {s.hidden});
  check_argument(op, "norm_b", a.norm_b, type, {s.hidden});
  check_argument(op, "lengths", a.lengths, ScalarType::Long, {s.batch});
  check_argument(op, "reset", a.reset, ScalarType::Bool, {s.batch, s.time});
  for (const double p : {a.zoneout_h, a.zoneout_c, a.weight_dropout})
    STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": zoneout and weight_dropout must be in [0, 1], got ", p);
  STD_TORCH_CHECK(a.zoneout_c == 0 || s.cell == Cell::lstm, op, ": zoneout of the cell must be 0, only an LSTM has one");
  const bool random = a.weight_dropout > 0 || (a.training && (a.zoneout_h > 0 || a.zoneout_c > 0));
  STD_TORCH_CHECK(!random || a.seed, op, ": seed must be given");
  return s;
}

// The schedule of a batch, with the memory it points into.
class Plan {
 public:
  Plan(const char* op, const Arguments& a, const Sizes& s)
      : order_(s.batch), length_(s.batch, s.time), count_(s.time), offset_(s.time + 1) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (a.lengths) {
      const int64_t* from = data<int64_t>(*a.lengths);
      for (int64_t b = 0; b < s.batch; ++b) {
        length_[b] = from[b * a.lengths->stride(0)];
        STD_TORCH_CHECK(length_[b] >= 0 && length_[b] <= s.time, op, ": lengths must be in [0, T] = [0, ", s.time, "], got ", length_[b]);
      }
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) { return length_[i] > length_[j]; });
    }
    int64_t present = s.batch;
    for (int64_t t = 0; t < s.time; ++t) {
      while (present > 0 && length_[order_[present - 1]] <= t) --present;
      count_[t] = present;
      offset_[t + 1] = offset_[t] + present;
    }
    schedule = {s.batch, s.time, a.reverse, order_.data(), length_.data(), count_.data(), offset_.data(), nullptr, 0, 0};
    if (a.reset) {
      schedule.reset = data<bool>(*a.reset);
      schedule.reset_batch = a.reset->stride(0), schedule.reset_time = a.reset->stride(1);
    }
  }
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  int64_t slots() const { return offset_.back(); }
  bool sorted_as_given() const { return std::is_sorted(order_.begin(), order_.end()); }
  bool every_row_whole() const { return slots() == schedule.batch * schedule.time; }
  int64_t time_of_slot(int64_t slot) const { return std::upper_bound(offset_.begin(), offset_.end(), slot) - offset_.begin() - 1; }

  Schedule schedule;

 private:
  std::vector<int64_t> order_, length_, count_, offset_;
};

template <class S>
Source<compute_t<S>> source(const OptionalTensor& tensor) {
  if (!tensor) return {};
  const int64_t rank = tensor->dim();
  return {data<S>(*tensor),         rank > 1 ? tensor->stride(0) : 0, rank > 2 ? tensor->stride(1) : 0,
          tensor->stride(rank - 1), S2S_SELECT(RowKernels<S>::read),  S2S_SELECT(RowKernels<S>::add)};
}

template <class S>
Target<compute_t<S>> target(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  return {mutable_data<S>(tensor), tensor.stride(0), rank > 2 ? tensor.stride(1) : 0, S2S_SELECT(RowKernels<S>::write)};
}

// What both directions do with their arguments.
template <class S>
class Runner {
 protected:
  using C = compute_t<S>;

  Runner(const char* op, const Arguments& a) : a_(a), s_(checked(op, a)), plan_(op, a, s_), type_(a.x.scalar_type()) {
    if (a.seed) seed_ = seed_words(op, "seed", *a.seed);
    if (a.weight_dropout > 0) {
      const double kept = 1 - a.weight_dropout;
      dropout_ = {seed_[0], seed_[1], S2S_SELECT(philox_threshold)(a.weight_dropout), kept > 0 ? 1 / kept : 0};
    }
  }

  // The tensor in the compute type, contiguous: its own memory where that is so already.
  const C* wide(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    if constexpr (std::is_same_v<S, C>)
      if (tensor->is_contiguous()) return data<S>(*tensor);
    const Source<C> from = source<S>(tensor);
    const int64_t columns = tensor->size(tensor->dim() - 1), rows = tensor->dim() > 1 ? tensor->size(0) : 1;
    copies_.emplace_back(rows * columns + 1);
    for (int64_t i = 0; i < rows; ++i) from.read(from.data, i * from.batch, from.unit, columns, copies_.back().data() + i * columns);
    return copies_.back().data();
  }

  void fill(Recurrence<C>& p) {
    p.schedule = plan_.schedule;
    p.cell = s_.cell;
    p.inputs = s_.inputs, p.hidden = s_.hidden, p.width = s_.width, p.gate_units = s_.gate_units;
    p.h0 = wide(a_.h0), p.c0 = wide(a_.c0), p.mask = wide(a_.mask);
    p.norm_ih = wide(a_.norm_ih), p.norm_hh = wide(a_.norm_hh), p.norm_c = wide(a_.norm_c), p.norm_b = wide(a_.norm_b);
    const auto threshold = S2S_SELECT(philox_threshold);
    p.zoneout = {a_.zoneout_h, a_.zoneout_c, a_.training, threshold(a_.zoneout_h), threshold(a_.zoneout_c), seed_[0], seed_[1]};
  }

  // x as rows in the order of the slots, where it lies so already.
  const C* rows_of_x(int64_t& row) const {
    if constexpr (std::is_same_v<S, C>) {
      const Tensor& x = a_.x;
      const bool ordered = s_.batch == 1 || (plan_.sorted_as_given() && plan_.every_row_whole());
      if (!ordered || (x.stride(2) != 1 && s_.inputs != 1)) return nullptr;
      if (s_.batch != 1 && s_.time != 1 && x.stride(1) != s_.batch * x.stride(0)) return nullptr;
      row = s_.batch == 1 ? x.stride(1) : x.stride(0);
      return data<S>(x);
    }
    return nullptr;
  }

  int64_t packed_size(int64_t n, int64_t k) const { return S2S_SELECT(RecurrenceProducts<C>::packed_size)(n, k); }

  // Rows through time alone, one group a thread.
  int64_t groups() const {
    const int64_t work = plan_.slots() * s_.gate_units * (s_.inputs + s_.width);
    return work < (1 << 18) ? 1 : std::max<int64_t>(1, std::min(thread_count(), s_.batch));
  }

  template <class P, class F>
  void run_groups(const P& p, int64_t groups, int64_t elements, const F& run) {
    Workspace workspace(groups * Workspace::bytes<C>(elements));
    std::vector<C*> scratch;
    for (int64_t g = 0; g < groups; ++g) scratch.push_back(workspace.template take<C>(elements));
    parallel(groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) run(p, Group{g, groups}, scratch[g]);
    });
  }

  // Zeros the positions of a (B, T, n) result that are absent; its strides in elements.
  template <class X>
  void clear_absent(X* to, int64_t n, int64_t batch, int64_t time) const {
    const Schedule& s = plan_.schedule;
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t t = s.length[b]; t < s.time; ++t) std::fill_n(to + b * batch + t * time, n, from_compute<X>(compute_t<X>(0)));
  }
  template <class X>
  void clear_absent(X* to, int64_t n) const {
    clear_absent(to, n, plan_.schedule.time * n, n);
  }

  const Arguments& a_;
  const Sizes s_;
  const Plan plan_;
  const ScalarType type_;
  std::array<int64_t, 2> seed_{};
  WeightDropout dropout_{};
  std::vector<std::vector<C>> copies_;
};

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
    const auto empty_if = [](bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) {
      return wanted ? empty_cpu(sizes, type) : empty_cpu({0}, type);
    };
    const Tensor output = empty_cpu({s_.batch, s_.time, s_.width}, type_), h_n = empty_cpu({s_.batch, s_.width}, type_);
    const Tensor c_n = empty_if(lstm, {s_.batch, s_.hidden}, type_);
    const Tensor gates = empty_if(save, {s_.batch, s_.time, s_.gate_units}, wide);
    const Tensor extra = empty_if(save && (lstm || s_.cell == Cell::gru), {s_.batch, s_.time, s_.hidden}, wide);
    const Tensor hidden = empty_if(exact, {s_.batch, s_.time, s_.width}, wide);
    const Tensor normed = empty_if(save && a_.norm_ih, {s_.batch, s_.time, 2 * s_.gate_units + 2}, wide);
    const auto kept = [&](const Tensor& tensor) { return tensor.dim() == 3 ? tensor.mutable_data_ptr() : nullptr; };
    run({output.mutable_data_ptr(), s_.time * s_.width, s_.width, h_n.mutable_data_ptr(), c_n.mutable_data_ptr(), kept(gates), kept(extra),
         kept(hidden), kept(normed)});
    return {output, h_n, c_n, gates, extra, hidden, normed};
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
    const auto check = [&](const char* name, const Tensor& tensor, int64_t last) {
      check_argument(op, name, tensor, wide, {s_.batch, s_.time, last});
      STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
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
                             wants(want_hh) ? slots * width : 0,
                             wants(want_ih) && !x_rows ? slots * s_.inputs : 0};
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
    if (wants(want_hh)) {
      const auto gather = S2S_SELECT(RecurrenceBackwardGroup<C>::recurrent_inputs);
      parallel(s_.time, 1 + (1 << 15) / (s_.batch * width + 1), [&](int64_t begin, int64_t end) { gather(p, begin, end, parts[10]); });
      matrix_gradient(want_hh, gates, width, p.grad_rec, parts[10], width);
    }
    if (wants(want_hr)) matrix_gradient(want_hr, width, hidden, p.grad_projected, p.unprojected, hidden);
    if (a_.norm_ih && (wants(want_x) || wants(want_ih))) {
      const auto normalise_gradient = S2S_SELECT(RecurrenceProducts<C>::normalise_gradient);
      parallel(slots, 1 + (1 << 13) / gates, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const C* normed = p.normed + i * p.normed_row();
          normalise_gradient(gates, p.grad_in + i * gates, p.norm_ih, normed, normed[2 * gates], p.grad_in + i * gates);
        }
      });
    }
    if (wants(want_ih)) {
      if (!x_rows) gather_x(parts[11]);
      matrix_gradient(want_ih, gates, s_.inputs, p.grad_in, x_rows ? x_rows : parts[11], x_rows ? x_row : s_.inputs);
    }
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
    if (wants(want_bias_hh)) narrowed(want_bias_hh, gates, [&](C* to) { recurrent(nullptr, to); });
    if (wants(want_norm_ih))
      narrowed(want_norm_ih, gates, [&](C* to) { columns(gates, p.grad_in, gates, p.normed, p.normed_row(), nullptr, 0, to); });
    if (wants(want_norm_hh)) narrowed(want_norm_hh, gates, [&](C* to) { recurrent(p.normed + gates, to); });
    if (wants(want_norm_c))
      narrowed(want_norm_c, hidden, [&](C* to) { columns(hidden, p.grad_norm_c, hidden, p.normed_c, hidden, nullptr, 0, to); });
    if (wants(want_norm_b))
      narrowed(want_norm_b, hidden, [&](C* to) { columns(hidden, p.grad_norm_c, hidden, nullptr, 0, nullptr, 0, to); });
  }

  // grad (N, m)^T times values (N, n), rows of the result dealt to the threads.
  void matrix_gradient(int i, int64_t m, int64_t n, const C* grad, const C* values, int64_t values_row) {
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
      parallel(parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t first = std::min(m, part * rows), last = std::min(m, first + rows);
          product(last - first, n, slots, grad + first, m, values, values_row, to + first * n, n, scratch[part]);
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

  // The gates' gradients times W_ih, some positions at a time.
  void input_gradient(const C* grad, const C* weight) {
    constexpr int64_t rows = 192;
    const Schedule& s = plan_.schedule;
    const int64_t slots = plan_.slots(), inputs = s_.inputs, gates = s_.gate_units, chunks = (slots + rows - 1) / rows;
    const Target<C> to = target<S>(*results_[want_x]);
    const bool in_place = s_.batch == 1 && std::is_same_v<S, C>;
    const int64_t threads = std::max<int64_t>(1, std::min(thread_count(), chunks)), size = in_place ? 0 : rows * inputs;
    Workspace workspace(threads * Workspace::bytes<C>(size));
    std::vector<C*> scratch;
    for (int64_t i = 0; i < threads; ++i) scratch.push_back(workspace.take<C>(size));
    std::atomic<int64_t> next{0};
    const auto product = S2S_SELECT(RecurrenceProducts<C>::packed);
    parallel(chunks, 1, [&](int64_t begin, int64_t end) {
      C* own = scratch[next.fetch_add(1)];
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * rows, count = std::min(rows, slots - first);
        if (in_place) own = static_cast<C*>(to.data) + first * inputs;
        product(count, inputs, gates, grad + first * gates, gates, weight, own, inputs, false);
        if (in_place) continue;
        int64_t t = plan_.time_of_slot(first);
        for (int64_t i = 0; i < count; ++i) {
          while (first + i >= s.offset[t + 1]) ++t;
          const int64_t b = s.order[first + i - s.offset[t]];
          to.write(to.data, (b * s.time + t) * inputs, inputs, own + i * inputs);
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
                                        const OptionalTensor& seed, const Tensor& gates, const Tensor& extra, const Tensor& hidden,
                                        const Tensor& normed, int64_t cell, bool reverse, double zoneout_h, double zoneout_c, bool training,
                                        double weight_dropout, int64_t needs) {
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
