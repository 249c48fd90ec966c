// The gradients of one call of a recurrence. Included by recurrence.cpp after each_isa.h, since it names kernels.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <vector>

#include "recurrence_runner.h"

namespace s2s {
namespace {

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
    if (kept.grad_output) check_positions(op, "grad_output", *kept.grad_output, a.x, s_.width, type_);
    check_argument(op, "grad_h", kept.grad_h, type_, {s_.batch, s_.width});
    check_argument(op, "grad_c", kept.grad_c, type_, {s_.batch, s_.hidden});
    const auto check = [&](const char* name, const OptionalTensor& tensor, int64_t last) {
      STD_TORCH_CHECK(tensor, op, ": ", name, " must be given");
      check_positions(op, name, *tensor, a.x, last, scalar_type_of<C>);
      STD_TORCH_CHECK(tensor->is_contiguous(), op, ": ", name, " must be contiguous");
    };
    if (keeps_gates(s_.cell, a.zoneout_h)) check("gates", kept.gates, s_.gate_units);
    check("hidden", kept.hidden, s_.width);
    if (s_.cell == Cell::lstm || s_.cell == Cell::gru) check("extra", kept.extra, s_.hidden);
    if (a.norm_ih) check("normed", kept.normed, normed_row(s_.gate_units));
    const OptionalTensor* given[wanted_count] = {nullptr,      nullptr, nullptr,    nullptr,    nullptr,   &a.h0,    &a.c0,
                                                 &a.weight_hr, &a.mask, &a.norm_ih, &a.norm_hh, &a.norm_c, &a.norm_b};
    for (int i = 0; i < wanted_count; ++i)
      STD_TORCH_CHECK(!wants(i) || !given[i] || given[i]->has_value(), op, ": needs must ask for gradients of given arguments only");
  }

  std::vector<Tensor> run() {
    RecurrenceBackward<C> p{};
    this->fill(p);
    const int64_t gates = s_.gate_units, hidden = s_.hidden, width = s_.width;
    const bool two = s_.cell == Cell::gru || a_.norm_ih, projects = a_.weight_hr.has_value(), norm_c = a_.norm_c.has_value();
    p.hidden_exact = mutable_data<C>(kept_.hidden);
    if (keeps_gates(s_.cell, a_.zoneout_h)) p.gates = mutable_data<C>(kept_.gates);
    if (s_.cell == Cell::lstm || s_.cell == Cell::gru) p.extra = mutable_data<C>(kept_.extra);
    if (a_.norm_ih) p.normed = mutable_data<C>(kept_.normed);
    p.grad_output = source<S>(kept_.grad_output, a_.packed), p.grad_h = source<S>(kept_.grad_h), p.grad_c = source<S>(kept_.grad_c);
    p.grad_row = p.padded(gates);
    p.tiled_hh = this->tiled_hh();
    plan_chunks();

    const auto split = this->split();
    const int64_t groups = split.groups, ranges = split.ranges(), rows = (plan_.schedule.lanes + groups - 1) / groups;
    const auto values = [&](bool wanted, int64_t columns) {
      return wanted ? this->packed_size(columns, chunk_slots_, tiled_gradients()) : 0;
    };
    if (reads_hh_in_place(split, rows)) p.weight_hh = source<S>(a_.weight_hh).plain, p.weight_hh_row = a_.weight_hh.stride(0);
    const int64_t hh = p.weight_hh ? 0 : this->packed_size(split.most_units(), gates, p.tiled_hh);
    const int64_t row = std::max({s_.inputs, width, hidden}) + 16;
    const int64_t unpacked = unpacked_ih() ? S2S_SELECT(RecurrenceProducts<C>::unpacked_workspace)(tile, s_.inputs, gates)
                                           : S2S_SELECT(RecurrenceProducts<C>::workspace)(tile, gates, this->tiled_ih());
    const int64_t scratch =
        std::max({S2S_SELECT(RecurrenceProducts<C>::gradient_workspace)(tiled_gradients()),
                  in_place() ? unpacked : (tile + 1) * s_.inputs + unpacked, S2S_SELECT(RecurrenceProducts<C>::pack_workspace)(row)});
    const int64_t state = S2S_SELECT(RecurrenceBackwardPart<C>::workspace)(p, rows, split.most_units());
    const bool narrows = !std::is_same_v<S, C>;
    const int64_t sizes[] = {chunk_slots_ * p.grad_row,
                             two ? chunk_slots_ * p.grad_row : 0,
                             projects ? chunk_slots_ * p.padded(width) : 0,
                             projects && wants(want_hr) ? chunk_slots_ * hidden : 0,
                             norm_c ? chunk_slots_ * hidden : 0,
                             norm_c ? chunk_slots_ * hidden : 0,
                             projects ? this->packed_size(hidden, width, false) : 0,
                             wants(want_x) && !unpacked_ih() ? this->packed_size(s_.inputs, gates, this->tiled_ih()) : 0,
                             values(wants(want_ih), s_.inputs),
                             values(wants(want_hh), width),
                             values(wants(want_hr), hidden),
                             narrows && wants(want_ih) ? gates * s_.inputs : 0,
                             narrows && wants(want_hh) ? gates * width : 0,
                             narrows && wants(want_hr) ? width * hidden : 0,
                             sum_row() * sum_count};
    int64_t bytes = ranges * (Workspace::bytes<C>(hh) + Workspace::bytes<C>(scratch) + Workspace::bytes<C>(state));
    for (const int64_t size : sizes) bytes += Workspace::bytes<C>(size);
    Workspace workspace(bytes);
    C* parts[std::size(sizes)];
    for (size_t i = 0; i < std::size(sizes); ++i) parts[i] = workspace.take<C>(sizes[i]);
    std::vector<C*> hhs, states, scratches;
    for (int64_t i = 0; i < ranges; ++i) hhs.push_back(workspace.take<C>(hh));
    for (int64_t i = 0; i < ranges; ++i) states.push_back(workspace.take<C>(state)), scratches.push_back(workspace.take<C>(scratch));
    p.grad_in = parts[0], p.grad_rec = two ? parts[1] : parts[0];
    p.grad_projected = projects ? parts[2] : nullptr, p.unprojected = projects && wants(want_hr) ? parts[3] : nullptr;
    p.grad_norm_c = norm_c ? parts[4] : nullptr, p.normed_c = norm_c ? parts[5] : nullptr;
    p.weight_hr = projects ? parts[6] : nullptr;
    weight_ih_ = parts[7], values_ = {parts[8], parts[9], parts[10]}, sums_ = parts[14];
    std::fill(sums_, sums_ + sum_row() * sum_count, C(0));
    make_results();
    for (const auto& [i, wide] : {std::pair{want_ih, parts[11]}, std::pair{want_hh, parts[12]}, std::pair{want_hr, parts[13]}})
      if (wants(i)) {
        if constexpr (std::is_same_v<S, C>)
          matrices_[i] = mutable_data<S>(*results_[i]);
        else
          matrices_[i] = wide;
        if (chunks_.empty()) std::fill(matrices_[i], matrices_[i] + results_[i]->numel(), C(0));
      }
    if (wants(want_h0)) p.grad_h0 = target<S>(*results_[want_h0]);
    if (wants(want_c0)) p.grad_c0 = target<S>(*results_[want_c0]);
    if (wants(want_mask)) p.grad_mask = target<S>(*results_[want_mask]);

    const auto start_rows = S2S_SELECT(RecurrenceProducts<C>::start_rows);
    if (p.tiled_hh && split.slices == 1) start_rows(gates, width, hhs[0]);
    if (weight_ih_ && this->tiled_ih()) start_rows(gates, s_.inputs, weight_ih_);
    const int64_t columns[] = {s_.inputs, width, hidden};
    for (int i = 0; i < 3; ++i)
      if (tiled_gradients() && wants(i == 0 ? want_ih : i == 1 ? want_hh : want_hr)) start_rows(chunk_slots_, columns[i], values_[i]);

    this->crew(ranges, [&](Crew::Member& member, int64_t begin, int64_t end) {
      const auto enter = S2S_SELECT(RecurrenceBackwardPart<C>::enter), leave = S2S_SELECT(RecurrenceBackwardPart<C>::leave);
      const auto advance = S2S_SELECT(RecurrenceBackwardPart<C>::advance);
      C* const own = scratches[begin];
      pack_weights(member, split.slices == 1 && !p.weight_hh ? hhs[0] : nullptr, parts[6], own);
      const bool shares = split.slices > 1;
      const int64_t count = shares ? 1 : end - begin;  // parts of this thread
      const auto part = [&](int64_t i) { return shares ? split.part(begin, end) : split.part(begin + i, begin + i + 1); };
      const C* const hh_of = shares ? hhs[begin] : hhs[0];
      if (shares && !p.weight_hh) {
        const Part units = part(0);
        if (p.tiled_hh) start_rows(gates, units.units, hhs[begin]);
        S2S_SELECT(RecurrenceProducts<C>::pack)(0, gates, gates, units.unit, units.units, source<S>(a_.weight_hh), dropout(), p.tiled_hh,
                                                hhs[begin], own);
      }
      RecurrenceBackward<C> here = p;
      for (int64_t i = 0; i < count; ++i) enter(here, part(i), states[begin + i]);
      for (const Chunk& chunk : chunks_) {
        here.first_slot = plan_.schedule.offset[chunk.first];
        for (int64_t i = 0; i < count; ++i)
          advance(here, part(i), hh_of, chunk.first, chunk.last, states[begin + i], shares ? &member : nullptr);
        member.wait();
        products(here, chunk, member, own);
      }
      for (int64_t i = 0; i < count; ++i) leave(here, part(i), states[begin + i]);
      if (dropout() && wants(want_hh)) {
        const auto drop = S2S_SELECT(RecurrenceProducts<C>::drop);
        member.tasks((gates + 63) / 64, [&](int64_t i) {
          for (int64_t r = i * 64; r < std::min(gates, (i + 1) * 64); ++r)
            drop(this->dropout_, r, 0, width, own, matrices_[want_hh] + r * width);
        });
      }
    });
    return finished();
  }

 private:
  // Steps whose gradients are in the cache together, in the order in which backward comes to them.
  struct Chunk {
    int64_t first, last;
  };
  // The sums over all positions of one value a unit: biases and the weights of layer normalisation.
  enum { sum_bias_ih, sum_bias_hh, sum_norm_ih, sum_norm_hh, sum_norm_c, sum_norm_b, sum_count };

  bool wants(int i) const { return needs_ >> i & 1; }
  const WeightDropout* dropout() const { return a_.weight_dropout > 0 ? &this->dropout_ : nullptr; }
  // Positions of x's gradient that one task makes: of the few of one row's chunk, some for each thread.
  const int64_t tile = s_.batch == 1 && thread_count() > 1 ? 64 : 192;
  static constexpr int64_t tile_rows = 4;  // rows of the batch, where tasks go by these
  // Whether the product with W_ih is made of so few positions that packing the weights would take longer.
  bool unpacked_ih() const { return plan_.slots() <= 192 && !this->tiled_ih(); }
  // Whether the weights' gradients, sums over positions, are the tile unit's.
  bool tiled_gradients() const {
    return this->worth_tiles() && S2S_SELECT(RecurrenceProducts<C>::tiled)(s_.gate_units, std::min(s_.inputs, s_.width), plan_.slots());
  }
  // Of one row, and of a packed sequence, x's gradient has the order of the slots: products make it there.
  bool in_place() const { return std::is_same_v<S, C> && (a_.packed || s_.batch == 1); }
  // For one row, weights of whole panels are read as fast where they lie, if a second-level cache holds them.
  bool reads_hh_in_place(const typename Base::Split& split, int64_t rows) const {
    if (rows != 1 || this->tiled_hh() || dropout() || !source<S>(a_.weight_hh).plain) return false;
    if (s_.gate_units * s_.width * static_cast<int64_t>(sizeof(C)) > (3 << 19) * split.slices) return false;
    if (split.slices == 1) return s_.width == this->packed_size(s_.width, 1, false);
    for (int64_t i = 0; i < split.slices; ++i) {
      const int64_t units = split.bound(i + 1) - split.bound(i);
      if (units != this->packed_size(units, 1, false)) return false;
    }
    return true;
  }
  int64_t sum_row() const { return (s_.gate_units + 15) / 16 * 16; }

  void plan_chunks() {
    const Schedule& s = plan_.schedule;
    const int64_t end = s.steps;
    // One row has little to keep for long; several rows keep the products of narrow layers large.
    const int64_t most = s.batch == 1 ? 128 : std::max<int64_t>(256, (1 << 17) / s_.gate_units / 256 * 256);
    for (int64_t done = 0; done < end;) {
      int64_t steps = 0, slots = 0;
      while (done + steps < end) {
        const int64_t t = s.reverse ? done + steps : end - 1 - done - steps;
        if (steps > 0 && slots + s.count[t] > most) break;
        slots += s.count[t], ++steps;
      }
      const int64_t first = s.reverse ? done : end - done - steps;
      chunks_.push_back({first, first + steps});
      chunk_slots_ = std::max(chunk_slots_, slots);
      done += steps;
    }
  }

  void make_results() {
    const int64_t gates = s_.gate_units, width = s_.width, hidden = s_.hidden;
    const int64_t sizes[wanted_count][2] = {{},
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
      const bool matrix = i == want_ih || i == want_hh || i == want_h0 || i == want_c0 || i == want_hr || i == want_mask;
      results_[i] = i == want_x ? over_positions(a_.x, s_.inputs, type_)
                    : matrix    ? empty_cpu({sizes[i][0], sizes[i][1]}, type_)
                                : empty_cpu({sizes[i][0]}, type_);
    }
  }

  // hh: null where every thread packs its own part.
  void pack_weights(Crew::Member& member, C* hh, C* hr, C* own) {
    const int64_t gates = s_.gate_units, width = s_.width, rows = 64, pieces = (gates + rows - 1) / rows;
    const auto pack = S2S_SELECT(RecurrenceProducts<C>::pack);
    const bool projects = a_.weight_hr.has_value();
    member.tasks(2 * pieces + projects, [&](int64_t i) {
      if (i == 2 * pieces) return pack(0, width, width, 0, s_.hidden, source<S>(a_.weight_hr), nullptr, false, hr, own);
      const int64_t first = i / 2 * rows, last = std::min(gates, first + rows);
      if (i % 2 == 0 && hh) pack(first, last, gates, 0, width, source<S>(a_.weight_hh), dropout(), this->tiled_hh(), hh, own);
      if (i % 2 == 1 && wants(want_x) && !unpacked_ih())
        pack(first, last, gates, 0, s_.inputs, source<S>(a_.weight_ih), nullptr, this->tiled_ih(), weight_ih_, own);
    });
  }

  // All that is made of one chunk's gradients.
  void products(const RecurrenceBackward<C>& p, const Chunk& chunk, Crew::Member& member, C* own) {
    const int64_t first = p.first_slot, slots = plan_.schedule.offset[chunk.last] - first, gates = s_.gate_units;
    const bool add = chunk.first != chunks_.front().first;
    constexpr int64_t few = 64;
    const int64_t packs = (slots + few - 1) / few, sums = (gates + 255) / 256;
    member.tasks(packs + sums, [&](int64_t i) {
      if (i < packs)
        pack_values(p, i * few, std::min(slots, (i + 1) * few), slots, own);
      else
        add_sums(p, slots, (i - packs) * 256, std::min(gates, (i - packs + 1) * 256));
    });
    if (a_.norm_ih && (wants(want_x) || wants(want_ih))) {
      const auto normalise_gradient = S2S_SELECT(RecurrenceProducts<C>::normalise_gradient);
      member.tasks(packs, [&](int64_t i) {
        for (int64_t at = i * few; at < std::min(slots, (i + 1) * few); ++at) {
          const C* normed = p.normed + (first + at) * p.normed_row();
          C* const grad = p.grad_in + at * p.grad_row;
          normalise_gradient(gates, grad, p.norm_ih, normed, normed[2 * gates], grad);
        }
      });
    }
    const int64_t rows = S2S_SELECT(RecurrenceProducts<C>::gradient_rows), pieces = (gates + rows - 1) / rows;
    const int64_t weights = wants(want_ih) || wants(want_hh) ? pieces : 0;
    const bool by_row = in_place_by_row(chunk, slots);
    const int64_t tiles = !wants(want_x) ? 0 : by_row ? (s_.batch + tile_rows - 1) / tile_rows : (slots + tile - 1) / tile;
    const int64_t projections = wants(want_hr) ? (s_.width + rows - 1) / rows : 0;
    member.tasks(weights + tiles + projections, [&](int64_t i) {
      if (i < tiles && by_row)
        input_gradients_by_row(p, chunk, i * tile_rows, own);
      else if (i < tiles)
        input_gradients(p, i * tile, std::min(slots, (i + 1) * tile), own);
      else if (i < tiles + weights)
        weight_gradients(p, slots, (i - tiles) * rows, std::min(gates, (i - tiles + 1) * rows), add, own);
      else
        projection_gradients(p, slots, (i - weights - tiles) * rows, std::min(s_.width, (i - weights - tiles + 1) * rows), add, own);
    });
  }

  // Calls f(position of the chunk, row of the batch, time) for the positions [begin, end) of a chunk.
  template <class F>
  void each_position(const RecurrenceBackward<C>& p, int64_t begin, int64_t end, const F& f) const {
    const Schedule& s = plan_.schedule;
    int64_t step = plan_.step_of_slot(p.first_slot + begin);
    for (int64_t at = begin; at < end; ++at) {
      while (p.first_slot + at >= s.offset[step + 1]) ++step;
      const Position here = s.at(step, p.first_slot + at - s.offset[step]);
      f(at, here.row, here.time);
    }
  }

  // What the gradients of the positions [begin, end) of a chunk are multiplied with, packed block by block. `begin` is even.
  void pack_values(const RecurrenceBackward<C>& p, int64_t begin, int64_t end, int64_t slots, C* scratch) {
    const auto pack_row = S2S_SELECT(RecurrenceProducts<C>::pack_row), pack_pair = S2S_SELECT(RecurrenceProducts<C>::pack_pair);
    const auto pack_rest = S2S_SELECT(RecurrenceProducts<C>::pack_rest);
    const auto recurrent_input = S2S_SELECT(RecurrenceBackwardPart<C>::recurrent_input);
    const int64_t depth = S2S_SELECT(RecurrenceProducts<C>::gradient_depth);
    const Source<C> x = source<S>(a_.x, a_.packed);
    const bool tiled = tiled_gradients();
    const int64_t row = std::max({s_.inputs, s_.width, s_.hidden}) + 16;
    const C* even[3];
    each_position(p, begin, end, [&](int64_t at, int64_t b, int64_t t) {
      const int64_t block = at / depth * depth, k = at - block;
      const int64_t here = std::min(depth, slots - block);
      const auto own = [&](int which) { return scratch + (at % 2 * 3 + which) * row; };  // two rows of each make a pair
      const auto put = [&](int which, int64_t columns, const C* from) {
        if (!tiled)
          pack_row(k, here, columns, from, values_[which] + this->packed_size(columns, block, false));
        else if (at % 2 == 0)
          even[which] = from;
        if (tiled && (at % 2 == 1 || at + 1 == end))
          pack_pair(at / 2 * 2, chunk_slots_, columns, even[which], at % 2 ? from : nullptr, values_[which]);
        if (tiled && at + 1 == slots) pack_rest(slots, chunk_slots_, columns, values_[which]);
      };
      if (wants(want_ih)) {
        const int64_t place = plan_.schedule.place(b, t, x.batch, x.time);
        if (!x.plain) x.read(x.data, place, x.unit, s_.inputs, own(0));
        put(0, s_.inputs, x.plain ? x.plain + place : own(0));
      }
      if (wants(want_hh)) put(1, s_.width, recurrent_input(p, b, t, own(1)));
      if (wants(want_hr)) put(2, s_.hidden, p.unprojected + at * s_.hidden);
    });
  }

  // Of the gates' columns [begin, end).
  void add_sums(const RecurrenceBackward<C>& p, int64_t slots, int64_t begin, int64_t end) {
    const auto sum = S2S_SELECT(RecurrenceProducts<C>::sum_columns);
    const int64_t gates = s_.gate_units, hidden = s_.hidden;
    const C* const normed = p.normed ? p.normed + p.first_slot * p.normed_row() : nullptr;
    C* const to = sums_;
    const auto of = [&](int which) { return to + which * sum_row(); };
    // What the recurrent part gets beside the products: all that the input part gets, times r for a GRU's candidate.
    const int64_t equal = s_.cell == Cell::gru ? 2 * hidden : gates;
    const auto recurrent = [&](const C* values, C* total) {
      const int64_t middle = std::clamp(equal, begin, end);
      sum(slots, begin, middle, p.grad_in, p.grad_row, values, p.normed_row(), nullptr, 0, total);
      if (middle < end)
        sum(slots, middle, end, p.grad_in, p.grad_row, p.gates + p.first_slot * gates - equal, gates, values, p.normed_row(), total);
    };
    if (wants(want_bias_ih) || (wants(want_bias_hh) && equal == gates))
      sum(slots, begin, end, p.grad_in, p.grad_row, nullptr, 0, nullptr, 0, of(sum_bias_ih));
    if (wants(want_bias_hh) && equal < gates) recurrent(nullptr, of(sum_bias_hh));
    if (wants(want_norm_ih)) sum(slots, begin, end, p.grad_in, p.grad_row, normed, p.normed_row(), nullptr, 0, of(sum_norm_ih));
    if (wants(want_norm_hh)) recurrent(normed + gates, of(sum_norm_hh));
    const int64_t last = std::min(end, hidden);
    if (begin >= last) return;
    if (wants(want_norm_c)) sum(slots, begin, last, p.grad_norm_c, hidden, p.normed_c, hidden, nullptr, 0, of(sum_norm_c));
    if (wants(want_norm_b)) sum(slots, begin, last, p.grad_norm_c, hidden, nullptr, 0, nullptr, 0, of(sum_norm_b));
  }

  void weight_gradients(const RecurrenceBackward<C>& p, int64_t slots, int64_t begin, int64_t end, bool add, C* own) {
    const auto product = S2S_SELECT(RecurrenceProducts<C>::weight_gradients);
    GradientFactor<C> factors[2];
    int count = 0;
    if (wants(want_ih)) factors[count++] = {values_[0], s_.inputs, matrices_[want_ih]};
    if (wants(want_ih) && p.grad_in != p.grad_rec) {
      product(begin, end, slots, chunk_slots_, p.grad_in, p.grad_row, add, factors, count, tiled_gradients(), own);
      count = 0;
    }
    if (wants(want_hh)) factors[count++] = {values_[1], s_.width, matrices_[want_hh]};
    if (count)
      product(begin, end, slots, chunk_slots_, wants(want_hh) ? p.grad_rec : p.grad_in, p.grad_row, add, factors, count, tiled_gradients(),
              own);
  }

  void projection_gradients(const RecurrenceBackward<C>& p, int64_t slots, int64_t begin, int64_t end, bool add, C* own) {
    const GradientFactor<C> factor{values_[2], s_.hidden, matrices_[want_hr]};
    S2S_SELECT(RecurrenceProducts<C>::weight_gradients)
    (begin, end, slots, chunk_slots_, p.grad_projected, p.padded(s_.width), add, &factor, 1, tiled_gradients(), own);
  }

  // Where all rows are present all the time, and long enough for a product each, x's gradient is made where it belongs.
  bool in_place_by_row(const Chunk& chunk, int64_t slots) const {
    const int64_t times = chunk.last - chunk.first;
    return std::is_same_v<S, C> && s_.batch > 1 && !plan_.schedule.position && slots == times * s_.batch && !a_.packed && !unpacked_ih() &&
           times >= worth_a_product;
  }
  void input_gradients_by_row(const RecurrenceBackward<C>& p, const Chunk& chunk, int64_t begin, C* own) {
    if constexpr (std::is_same_v<S, C>) {
      const C* left[tile_rows];
      C* to[tile_rows];
      const int64_t count = std::min(tile_rows, s_.batch - begin);
      for (int64_t i = 0; i < count; ++i) {
        left[i] = p.grad_in + (begin + i) * p.grad_row;
        to[i] = mutable_data<S>(*results_[want_x]) + (plan_.schedule.order[begin + i] * s_.time + chunk.first) * s_.inputs;
      }
      S2S_SELECT(RecurrenceProducts<C>::packed_several)
      (count, chunk.last - chunk.first, s_.inputs, s_.gate_units, left, s_.batch * p.grad_row, weight_ih_, this->tiled_ih(), to, s_.inputs,
       own);
    }
  }

  // x's gradient at the positions [begin, end) of a chunk.
  void input_gradients(const RecurrenceBackward<C>& p, int64_t begin, int64_t end, C* own) {
    const int64_t inputs = s_.inputs;
    C* to_rows = own;
    if constexpr (std::is_same_v<S, C>)
      if (in_place()) to_rows = mutable_data<S>(*results_[want_x]) + (p.first_slot + begin) * inputs;
    const C* const grad = p.grad_in + begin * p.grad_row;
    if (unpacked_ih()) {
      const Source<C> w = source<S>(a_.weight_ih);
      S2S_SELECT(UnpackedProduct<S>::run)
      (end - begin, inputs, s_.gate_units, grad, p.grad_row, w.data, 0, w.batch, w.unit, to_rows, inputs, false, false,
       in_place() ? own : own + tile * inputs);
    } else {
      S2S_SELECT(RecurrenceProducts<C>::packed)
      (end - begin, inputs, s_.gate_units, grad, p.grad_row, weight_ih_, this->tiled_ih(), to_rows, inputs, false, false,
       in_place() ? own : own + tile * inputs, nullptr, nullptr);
    }
    if (in_place()) return;
    const Target<C> to = target<S>(*results_[want_x], a_.packed);
    each_position(p, begin, end, [&](int64_t at, int64_t b, int64_t t) {
      to.write(to.data, plan_.schedule.place(b, t, to.batch, to.time), inputs, own + (at - begin) * inputs);
    });
  }

  std::vector<Tensor> finished() {
    const auto write = S2S_SELECT(RowKernels<S>::write);
    if constexpr (!std::is_same_v<S, C>)
      for (const int i : {want_ih, want_hh, want_hr})
        if (wants(i)) write(mutable_data<S>(*results_[i]), 0, results_[i]->numel(), matrices_[i]);
    const bool same = s_.cell != Cell::gru;
    const std::pair<int, int> sums[] = {{want_bias_ih, sum_bias_ih}, {want_bias_hh, same ? sum_bias_ih : sum_bias_hh},
                                        {want_norm_ih, sum_norm_ih}, {want_norm_hh, sum_norm_hh},
                                        {want_norm_c, sum_norm_c},   {want_norm_b, sum_norm_b}};
    for (const auto& [i, which] : sums)
      if (wants(i)) write(mutable_data<S>(*results_[i]), 0, results_[i]->numel(), sums_ + which * sum_row());
    if (wants(want_x) && a_.lengths && !a_.packed) this->clear_absent(mutable_data<S>(*results_[want_x]), s_.inputs);
    std::vector<Tensor> results;
    for (const OptionalTensor& result : results_)
      if (result) results.push_back(*result);
    return results;
  }

  const Kept& kept_;
  const int64_t needs_;
  OptionalTensor results_[wanted_count];
  std::vector<Chunk> chunks_;
  int64_t chunk_slots_ = 0;
  C *weight_ih_ = nullptr, *sums_ = nullptr;
  std::array<C*, 3> values_{};      // packed: x, the recurrent input, h before its projection
  C* matrices_[wanted_count] = {};  // gradients of weights in the compute type
};

}  // namespace
}  // namespace s2s
