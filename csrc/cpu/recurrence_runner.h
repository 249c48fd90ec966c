// One call of a recurrence as its binding sees it: arguments checked, the schedule of its batch, access to any storage type. Included by
// recurrence.cpp after each_isa.h, since it names kernels.
#pragma once
#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "pool.h"
#include "recurrence.h"
#include "recurrence_call.h"
#include "tensor.h"

namespace s2s {
namespace {

using Arguments = RecurrenceArguments;

struct Sizes {
  int64_t batch, time, inputs, hidden, width, gate_units;
  int64_t positions;  // of a tensor over positions: B T, or N of a packed sequence
  Cell cell;
};

// The longest of `lengths`.
int64_t longest(const Tensor& lengths) {
  const int64_t* from = data<int64_t>(lengths);
  int64_t most = 0;
  for (int64_t b = 0; b < lengths.size(0); ++b) most = std::max(most, from[b * lengths.stride(0)]);
  return most;
}

Sizes checked(const char* op, const Arguments& a) {
  Sizes s{};
  STD_TORCH_CHECK(a.cell >= 0 && a.cell <= static_cast<int64_t>(Cell::rnn_relu), op, ": cell must be in [0, 3], got ", a.cell);
  s.cell = static_cast<Cell>(a.cell);
  const int64_t gates = gates_of(s.cell);
  const ScalarType type = a.x.scalar_type();
  check_cpu(op, "x", a.x);
  check_dim(op, "x", a.x, a.packed ? 2 : 3);
  check_dim(op, "weight_ih", a.weight_ih, 2);
  if (a.packed) {
    STD_TORCH_CHECK(!a.reset, op, ": reset must be absent beside a packed x");
    s.batch = s.positions = a.x.size(0), s.time = 1;
    if (a.lengths) {
      check_cpu(op, "lengths", *a.lengths);
      check_dtype(op, "lengths", *a.lengths, ScalarType::Long);
      check_dim(op, "lengths", *a.lengths, 1);
      s.batch = a.lengths->size(0), s.time = longest(*a.lengths);
    }
  } else {
    s.batch = a.x.size(0), s.time = a.x.size(1), s.positions = s.batch * s.time;
  }
  s.inputs = a.x.size(-1);
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
  // cost(lanes): of a step of so many, in any unit.
  template <class Cost>
  Plan(const char* op, const Arguments& a, const Sizes& s, const Cost& cost) : order_(s.batch), length_(s.batch, s.time) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    if (a.lengths) {
      const int64_t* from = data<int64_t>(*a.lengths);
      for (int64_t b = 0; b < s.batch; ++b) {
        length_[b] = from[b * a.lengths->stride(0)];
        STD_TORCH_CHECK(length_[b] >= 0 && length_[b] <= s.time, op, ": lengths must be in [0, T] = [0, ", s.time, "], got ", length_[b]);
      }
      std::stable_sort(order_.begin(), order_.end(), [&](int64_t i, int64_t j) { return length_[i] > length_[j]; });
      STD_TORCH_CHECK(!a.packed || sorted_as_given(), op, ": lengths of a packed x must be in descending order");
    }
    const int64_t longest = s.batch ? length_[order_[0]] : 0;
    std::vector<Lane> lanes;
    if (!a.packed && longest > 0 && length_[order_.back()] < longest) lanes = fill_lanes(longest, cost);
    lane_end_.reserve(s.batch);
    for (const Lane& lane : lanes) lane_end_.push_back(lane.end);
    for (int64_t i = 0; i < s.batch && lanes.empty(); ++i) lane_end_.push_back(length_[order_[i]]);
    const int64_t steps = lane_end_.empty() ? 0 : lane_end_[0];
    count_.resize(steps), offset_.resize(steps + 1);
    int64_t present = static_cast<int64_t>(lane_end_.size());
    for (int64_t step = 0; step < steps; ++step) {
      while (present > 0 && lane_end_[present - 1] <= step) --present;
      count_[step] = present;
      offset_[step + 1] = offset_[step] + present;
    }
    STD_TORCH_CHECK(!a.packed || slots() == s.positions, op, ": a packed x must have as many rows as lengths sum up to, ", slots(),
                    ", got ", s.positions);
    if (!lanes.empty()) position_.resize(slots());
    for (size_t i = 0; i < lanes.size(); ++i) {
      int64_t step = 0;
      for (const int64_t b : lanes[i].rows)
        for (int64_t t = 0; t < length_[b]; ++t) position_[offset_[step++] + static_cast<int64_t>(i)] = {b, t};
    }
    schedule = {s.batch,
                s.time,
                a.reverse,
                a.packed,
                static_cast<int64_t>(lane_end_.size()),
                steps,
                order_.data(),
                lanes.empty() ? nullptr : position_.data(),
                lane_end_.data(),
                length_.data(),
                count_.data(),
                offset_.data(),
                nullptr,
                0,
                0};
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
  int64_t step_of_slot(int64_t slot) const { return std::upper_bound(offset_.begin(), offset_.end(), slot) - offset_.begin() - 1; }

  Schedule schedule;

 private:
  struct Lane {
    int64_t end = 0;
    std::vector<int64_t> rows;
  };

  // Rows dealt to lanes, longest first, each to the lane that ends first; as many lanes as cost least in all. None: a lane for each row.
  template <class Cost>
  std::vector<Lane> fill_lanes(int64_t longest, const Cost& cost) const {
    const int64_t rows = static_cast<int64_t>(order_.size()), total = std::accumulate(length_.begin(), length_.end(), int64_t{0});
    const int64_t least = (total + longest - 1) / longest;
    std::vector<Lane> best;
    double lowest = cost(rows) * static_cast<double>(longest);
    for (const int64_t count : {least, least + 1, least + 2, least / 16 * 16}) {
      if (count < 1 || count >= rows) continue;
      std::vector<Lane> lanes(count);
      const auto later = [&](int64_t i, int64_t j) { return std::pair(lanes[i].end, i) > std::pair(lanes[j].end, j); };
      std::vector<int64_t> heap(count);  // the lane that ends first is on top
      std::iota(heap.begin(), heap.end(), int64_t{0});
      for (const int64_t b : order_) {
        if (length_[b] == 0) break;
        std::pop_heap(heap.begin(), heap.end(), later);
        Lane& lane = lanes[heap.back()];
        lane.end += length_[b], lane.rows.push_back(b);
        std::push_heap(heap.begin(), heap.end(), later);
      }
      std::stable_sort(lanes.begin(), lanes.end(), [](const Lane& i, const Lane& j) { return i.end > j.end; });
      const double price = cost(count) * static_cast<double>(lanes[0].end);
      if (price < lowest) lowest = price, best = std::move(lanes);
    }
    return best;
  }

  std::vector<int64_t> order_, length_, lane_end_, count_, offset_;
  std::vector<Position> position_;
};

// Strides of a tensor's rows over batch and time: of (B, T, ...), (B, ...), and (N, ...) over the positions of a packed sequence.
std::pair<int64_t, int64_t> row_strides(const Tensor& tensor, bool packed) {
  if (packed) return {0, tensor.stride(0)};
  const int64_t rank = tensor.dim();
  return {rank > 1 ? tensor.stride(0) : 0, rank > 2 ? tensor.stride(1) : 0};
}

template <class S>
Source<compute_t<S>> source(const OptionalTensor& tensor, bool packed = false) {
  if (!tensor) return {};
  const auto [batch, time] = row_strides(*tensor, packed);
  const int64_t unit = tensor->stride(tensor->dim() - 1);
  Source<compute_t<S>> found{data<S>(*tensor), batch, time, unit, S2S_SELECT(RowKernels<S>::read), S2S_SELECT(RowKernels<S>::add)};
  if constexpr (std::is_same_v<S, compute_t<S>>)
    if (unit == 1) found.plain = data<S>(*tensor);
  return found;
}

template <class S>
Target<compute_t<S>> target(const Tensor& tensor, bool packed = false) {
  const auto [batch, time] = row_strides(tensor, packed);
  return {mutable_data<S>(tensor), batch, time, S2S_SELECT(RowKernels<S>::write)};
}

// What both directions do with their arguments.
template <class S>
class Runner {
 protected:
  using C = compute_t<S>;

  Runner(const char* op, const Arguments& a)
      : a_(a), s_(checked(op, a)), plan_(op, a, s_, [this](int64_t lanes) { return step_cost(lanes); }), type_(a.x.scalar_type()) {
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
      if (x.stride(-1) != 1 && s_.inputs != 1) return nullptr;
      if (a_.packed) {
        row = x.stride(0);
        return data<S>(x);
      }
      if (s_.batch != 1 && !(plan_.sorted_as_given() && plan_.every_row_whole())) return nullptr;
      if (s_.batch != 1 && s_.time != 1 && x.stride(1) != s_.batch * x.stride(0)) return nullptr;
      row = s_.batch == 1 ? x.stride(1) : x.stride(0);
      return data<S>(x);
    }
    return nullptr;
  }

  int64_t packed_size(int64_t n, int64_t k, bool tiled) const { return S2S_SELECT(RecurrenceProducts<C>::packed_size)(n, k, tiled); }
  // Whether the products with W_ih and those with W_hh are the tile unit's: whatever the number of threads.
  bool tiled_ih() const { return worth_tiles() && S2S_SELECT(RecurrenceProducts<C>::tiled)(plan_.slots(), s_.gate_units, s_.inputs); }
  // Whether there are positions enough to make up for packing, which takes the tile unit's factors longer.
  bool worth_tiles() const { return plan_.slots() >= 64 && plan_.slots() * s_.gate_units * s_.inputs > (1 << 20); }
  bool tiled_hh() const { return s_.time > 1 && tiled_hh(plan_.schedule.lanes); }
  bool tiled_hh(int64_t lanes) const { return S2S_SELECT(RecurrenceProducts<C>::tiled)(lanes, s_.gate_units, s_.width); }
  // Of a step of so many lanes, in rows of a product on the multipliers; reading the weights costs as much as one.
  double step_cost(int64_t lanes) const {
    return tiled_hh(lanes) ? 10.5 * static_cast<double>((lanes + 15) / 16) : static_cast<double>(lanes + 1);
  }

  // How the lanes and units of a call are split: over the lanes, so that threads needn't meet, unless these are few or one thread's
  // second-level cache can't hold the recurrent weights; then over the hidden units.
  struct Split {
    int64_t groups = 1, slices = 1, hidden = 0;
    int64_t ranges() const { return std::max(groups, slices); }
    int64_t bound(int64_t slice) const { return slice == slices ? hidden : hidden * slice / slices / 16 * 16; }
    int64_t most_units() const {
      int64_t most = 0;
      for (int64_t i = 0; i < slices; ++i) most = std::max(most, bound(i + 1) - bound(i));
      return most;
    }
    Part part(int64_t begin, int64_t end) const {
      return slices > 1 ? Part{0, 1, bound(begin), bound(end) - bound(begin)} : Part{begin, groups, 0, hidden};
    }
  };
  Split split() const {
    Split split{1, 1, s_.hidden};
    const int64_t threads = thread_count(), slots = plan_.slots();
    if (threads == 1 || slots * s_.gate_units * (s_.inputs + s_.width) < (1 << 18)) return split;
    const int64_t weights = s_.gate_units * s_.width, a_step = weights * slots / std::max<int64_t>(1, plan_.schedule.steps);
    const bool separable = !a_.norm_ih && !a_.weight_hr && a_step >= (1 << 16) * threads;
    // A few rows of a tile take the time of all, which is worth a barrier where that time is long.
    const bool half_tiles = tiled_hh() && plan_.schedule.lanes <= 12 * threads && a_step >= (1 << 19) * threads;
    if (separable && (plan_.schedule.lanes < 2 * threads || half_tiles || weights * static_cast<int64_t>(sizeof(C)) > (3 << 19)))
      split.slices = std::min(threads, std::max<int64_t>(1, s_.hidden / 32));
    if (split.slices == 1) split.groups = std::max<int64_t>(1, std::min(threads, plan_.schedule.lanes));
    return split;
  }

  // Calls f(member, begin, end) in the threads of a crew that have [begin, end) of `ranges` ranges.
  template <class F>
  static void crew(int64_t ranges, const F& f) {
    Crew crew;
    parallel(ranges, 1, [&](int64_t begin, int64_t end) {
      Crew::Member member(crew, begin, end, ranges);
      f(member, begin, end);
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

}  // namespace
}  // namespace s2s
