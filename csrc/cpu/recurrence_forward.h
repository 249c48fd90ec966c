// Forward: one part of the rows or units runs through time alone, or meets the others once a step where they share rows. The input product
// of the next steps is made block by block; each step adds the recurrent product and ends in the cell's own arithmetic.

// sum: of the input product and the recurrent one, for n units; bias, gates: for `all` units; gates: where the activated gates go, past the
// caches if it streams, or null. h null: it is made later, from c and o, which takes its place in the sum.
template <class T>
void lstm_units(int64_t n, int64_t all, T* sum, const T* bias, T* c, T* h, T* gates, bool streams) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j, m = 3 * n + j;
        const Vec<T> i = vsigmoid(at.get(sum + j) + at.get(bias + j));
        const Vec<T> f = vsigmoid(at.get(sum + k) + at.get(bias + all + j));
        const Vec<T> g = vtanh(at.get(sum + l) + at.get(bias + 2 * all + j));
        const Vec<T> o = vsigmoid(at.get(sum + m) + at.get(bias + 3 * all + j));
        const Vec<T> cell = fma(f, at.get(c + j), i * g);
        at.put(c + j, cell);
        at.put(sum + m, o);
        if (gates) {
          at.keep(gates + j, i, streams);
          at.keep(gates + all + j, f, streams);
          at.keep(gates + 2 * all + j, g, streams);
          at.keep(gates + 3 * all + j, o, streams);
        }
      });
  // In a loop of its own: a tanh at the end of that chain would wait for all of it.
  if (h) each_vector<T>(n, S2S_LAMBDA(auto at, int64_t j) { at.put(h + j, at.get(sum + 3 * n + j) * vtanh(at.get(c + j))); });
}

template <class T>
void lstm_output(int64_t n, const T* normed, const T* weight, const T* bias, const T* o, T* h) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        at.put(h + j, at.get(o + j) * vtanh(fma(at.get(normed + j), at.get(weight + j), at.get(bias + j))));
      });
}

// pre, rec: the input product and the recurrent one. recurrent_n: where W_hn h + b_hn goes, or null.
template <class T>
void gru_units(int64_t n, int64_t all, const T* pre, const T* rec, const T* bias, const T* bias_hn, T* h, T* gates, T* recurrent_n,
               bool streams) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j;
        const Vec<T> r = vsigmoid(at.get(pre + j) + at.get(bias + j) + at.get(rec + j));
        const Vec<T> z = vsigmoid(at.get(pre + k) + at.get(bias + all + j) + at.get(rec + k));
        const Vec<T> hn = at.get(rec + l) + at.get(bias_hn + j);
        const Vec<T> candidate = vtanh(fma(r, hn, at.get(pre + l) + at.get(bias + 2 * all + j)));
        at.put(h + j, fma(z, at.get(h + j), (T(1) - z) * candidate));
        if (gates) {
          at.keep(gates + j, r, streams);
          at.keep(gates + all + j, z, streams);
          at.keep(gates + 2 * all + j, candidate, streams);
          at.keep(recurrent_n + j, hn, streams);
        }
      });
}

template <class T>
void rnn_units(int64_t n, bool relu, const T* sum, const T* bias, T* h, T* gates, bool streams) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> before = at.get(sum + j) + at.get(bias + j);
        const Vec<T> value = relu ? max(Vec<T>{}, before) : vtanh(before);  // a NaN comes through
        at.put(h + j, value);
        if (gates) at.keep(gates + j, value, streams);
      });
}

template <class C>
class RecurrenceForwardPart {
  using Products = RecurrenceProducts<C>;

 public:
  // Elements of scratch for a part of `rows` rows and `units` units; parts next to each other need no more than the sum of theirs.
  static int64_t workspace(const RecurrenceForward<C>& p, int64_t rows, int64_t units, bool packs) {
    const int64_t blocks = p.block_rows + rows, gates = p.gate_units / p.hidden * units;
    int64_t weights = packs ? Products::packed_size(gates, p.inputs, p.tiled_ih) + Products::packed_size(gates, p.width, p.tiled_hh) +
                                  Products::pack_workspace(p.inputs + p.width)
                            : 0;
    weights += Products::workspace(blocks, p.inputs > p.width ? p.inputs : p.width, p.tiled_ih || p.tiled_hh);
    if (p.unpacked_ih) weights += Products::unpacked_workspace(blocks, gates, p.inputs > p.width ? p.inputs : p.width);
    return blocks * (gates + (p.x_rows ? 0 : p.inputs + gemm_row_pad)) + rows * (3 * p.width + 2 * units + gates) + 3 * (p.width + units) +
           weights + 20 * 16;
  }

  // weight_ih, weight_hh: packed for all units; null: the part packs its own, unless they stay unpacked.
  static void run(const RecurrenceForward<C>& p, const Part& part, const C* weight_ih, const C* weight_hh, C* workspace,
                  Crew::Member* others) {
    RecurrenceForwardPart(p, part, weight_ih, weight_hh, workspace, others).through_time();
  }

 private:
  RecurrenceForwardPart(const RecurrenceForward<C>& p, const Part& part, const C* weight_ih, const C* weight_hh, C* workspace,
                        Crew::Member* others)
      : p_(p), s_(p.schedule), part_(part), others_(others), weight_ih_(weight_ih), weight_hh_(weight_hh) {
    rows_ = part.rows(s_.lanes);
    units_ = part.units;
    gates_ = p.gate_units / p.hidden * units_;
    own_ = p.weight_hr ? p.width : units_;
    left_row_ = p.padded(p.width);
    const int64_t blocks = p.block_rows + rows_;
    const auto take = [&](int64_t count) {
      C* const place = workspace;
      workspace += (count + 15) / 16 * 16;
      return place;
    };
    pre_ = take(blocks * gates_);
    x_ = p.x_rows ? nullptr : take(blocks * (p.inputs + gemm_row_pad));
    rec_ = take(rows_ * gates_);
    h_ = take(rows_ * own_);
    c_ = take(p.cell == Cell::lstm ? rows_ * units_ : 0);
    unprojected_ = take(p.weight_hr ? rows_ * units_ : 0);
    projected_ = take(p.weight_hr && p.zoneout.h > 0 ? rows_ * p.width : 0);
    share_ = take(p.width + units_);
    before_h_ = take(p.width);
    before_c_ = take(units_);
    normed_c_ = take(p.norm_c ? units_ : 0);
    if (units_ < p.hidden) {
      C* const ih = p.unpacked_ih ? nullptr : take(Products::packed_size(gates_, p.inputs, p.tiled_ih));
      C* const hh = p.unpacked_hh ? nullptr : take(Products::packed_size(gates_, p.width, p.tiled_hh));
      Products::pack_units(p, part, 0, Products::panels(gates_), ih, hh, workspace);
      weight_ih_ = ih, weight_hh_ = hh;
    }
    scratch_ = workspace;
    sums_ = p.cell != Cell::gru && !p.norm_hh;
    // A part writes only its own units of what the parts share.
    for (int i = 0; i < 2; ++i)
      left_[i] = p.left[i] + (part.groups > 1 ? part.group * ((s_.lanes + part.groups - 1) / part.groups) : 0) * left_row_;
  }

  void through_time() {
    const int64_t end = rows_ ? s_.lane_end[part_.lane(0)] : 0;
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t steps = s_.lane_end[part_.lane(row)];
      before_step(s_.reverse ? steps - 1 : 0, row, 0);
      if (s_.reverse) before_step(steps - 1, row, 1);  // whichever is read when this row begins
    }
    meet();
    for (int64_t done = 0; done < end;) {
      int64_t steps = 0, rows = 0;
      while (done + steps < end && (steps == 0 || rows + present(s_.reverse ? end - 1 - done - steps : done + steps) <= p_.block_rows)) {
        rows += present(s_.reverse ? end - 1 - done - steps : done + steps);
        ++steps;
      }
      const int64_t first = s_.reverse ? end - done - steps : done;
      // A call of one step that walks its weights backwards begins with those that the call before ended with.
      if (p_.backwards) recurrent_product(first, pre_, false, 0);
      input_product(first, first + steps, rows);
      C* pre = s_.reverse ? pre_ + rows * gates_ : pre_;
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t t = s_.reverse ? first + steps - 1 - i : first + i, here = present(t) * gates_;
        if (s_.reverse) pre -= here;
        step(t, pre, (done + i) % 2);
        if (!s_.reverse) pre += here;
      }
      done += steps;
    }
    if (p_.streams) stream_end();
    for (int64_t b = 0; part_.group == 0 && b < s_.batch; ++b) {
      if (s_.length[b]) continue;
      start(p_.h0, b, p_.width, own_, before_h_);
      if (p_.cell == Cell::lstm) start(p_.c0, b, p_.hidden, units_, before_c_);
      finish(b, before_h_, before_c_);
    }
  }

  int64_t present(int64_t step) const { return part_.rows(s_.count[step]); }
  Position at(int64_t step, int64_t row) const { return s_.at(step, part_.lane(row)); }
  int64_t slot(int64_t step, int64_t row) const { return s_.offset[step] + part_.lane(row); }
  void meet() {
    if (others_) others_->wait();
  }

  void start(const C* from, int64_t b, int64_t all, int64_t n, C* to) {
    if (from)
      std::memcpy(to, from + b * all + part_.unit, static_cast<size_t>(n) * sizeof(C));
    else
      clear(to, n);
  }
  static void clear(C* to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(C)); }
  // The state after the last position of row b of the batch.
  void finish(int64_t b, const C* h, const C* c) {
    p_.h_n.write(p_.h_n.data, b * p_.h_n.batch + part_.unit, own_, h);
    if (p_.cell == Cell::lstm) p_.c_n.write(p_.c_n.data, b * p_.c_n.batch + part_.unit, units_, c);
  }

  // The state of a row becomes what the step, to which it comes next, is to see.
  void before_step(int64_t step, int64_t row, int64_t turn) {
    if (step < 0 || step >= s_.lane_end[part_.lane(row)]) return;
    const auto [b, t] = at(step, row);
    C* const h = h_ + row * own_;
    C* const c = p_.cell == Cell::lstm ? c_ + row * units_ : nullptr;
    if (s_.is_first(b, t)) {
      start(p_.h0, b, p_.width, own_, h);
      if (c) start(p_.c0, b, p_.hidden, units_, c);
    }
    if (s_.starts(b, t)) {
      clear(h, own_);
      if (c) clear(c, units_);
    }
    C* const left = left_[turn] + row * left_row_ + part_.unit;
    std::memcpy(left, h, static_cast<size_t>(own_) * sizeof(C));
    if (p_.mask) multiply(own_, p_.mask + b * p_.width + part_.unit, left);
  }

  // C = or += A W^T, the rows of W that this part has.
  void unpacked_product(Unpacked<C> product, int64_t rows, int64_t columns, const C* a, int64_t a_row, const Source<C>& w, C* to, bool add,
                        bool backwards) {
    const int64_t at_once = units_ == p_.hidden ? gates_ : units_, parts = gates_ / at_once;
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t gate = backwards ? parts - 1 - i : i;
      product(rows, at_once, columns, a, a_row, w.data, (gate * p_.hidden + part_.unit) * w.batch, w.unit, w.batch, to + gate * at_once,
              gates_, add, backwards, scratch_);
    }
  }

  // W_ih x of the steps [first, last), one row after another, step by step.
  void input_product(int64_t first, int64_t last, int64_t rows) {
    const C* from = x_;
    int64_t from_row = p_.inputs + gemm_row_pad;
    const int64_t steps = last - first;
    if (p_.x.plain && !s_.position && rows == steps * rows_ && steps >= worth_a_product && !p_.x_rows && !p_.unpacked_ih) {
      // The rows of x of each row of the batch lie one after another: they needn't be gathered.
      const auto left = S2S_LAMBDA(int64_t row) { return p_.x.plain + s_.place(at(first, row).row, first, p_.x.batch, p_.x.time); };
      const auto to = S2S_LAMBDA(int64_t row) { return pre_ + row * gates_; };
      Products::packed_each(rows_, steps, gates_, p_.inputs, left, p_.x.time, weight_ih_, p_.tiled_ih, to, rows_ * gates_, scratch_);
      return normalise_input_product(first, last);
    }
    if (p_.x_rows) {
      from = p_.x_rows + s_.offset[first] * p_.x_row;
      from_row = p_.x_row;
    } else {
      C* to = x_;
      for (int64_t t = first; t < last; ++t)
        for (int64_t row = 0; row < present(t); ++row, to += from_row) {
          const Position from = at(t, row);
          p_.x.read(p_.x.data, s_.place(from.row, from.time, p_.x.batch, p_.x.time), p_.x.unit, p_.inputs, to);
        }
    }
    if (p_.unpacked_ih)
      unpacked_product(p_.product_ih, rows, p_.inputs, from, from_row, p_.weight_ih, pre_, p_.backwards && sums_, p_.backwards);
    else
      Products::packed(rows, gates_, p_.inputs, from, from_row, weight_ih_, p_.tiled_ih, pre_, gates_, false, false, scratch_);
    normalise_input_product(first, last);
  }

  void normalise_input_product(int64_t first, int64_t last) {
    if (!p_.norm_ih) return;
    C* row = pre_;
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < present(t); ++i, row += gates_) {
        C* const keep = p_.normed ? p_.normed + slot(t, i) * p_.normed_row() : nullptr;
        const C scale = Products::normalise(gates_, row, p_.norm_ih, keep, p_.streams, row, false);
        if (!keep) continue;
        clear(keep + 2 * gates_, p_.normed_row() - 2 * gates_);
        keep[2 * gates_] = scale;
      }
  }

  // W_hh h, added to `pre` where both are summed.
  void recurrent_product(int64_t t, C* pre, bool add, int64_t turn) {
    C* const to = sums_ ? pre : rec_;
    if (p_.unpacked_hh)
      unpacked_product(p_.product_hh, present(t), p_.width, left_[turn], left_row_, p_.weight_hh, to, add, p_.backwards || turn);
    else
      Products::packed(present(t), gates_, p_.width, left_[turn], left_row_, weight_hh_, p_.tiled_hh, to, gates_, add, turn, scratch_);
  }

  // turn: which of the two left factors this step sees; the other takes what the next one will.
  void step(int64_t t, C* pre, int64_t turn) {
    const int64_t here = present(t), next = s_.reverse ? t - 1 : t + 1;
    if (!p_.backwards) recurrent_product(t, pre, sums_, turn);
    for (int64_t row = 0; row < here; ++row) units(t, row, pre + row * gates_, rec_ + row * gates_);
    if (p_.weight_hr) project(t, here);
    for (int64_t row = 0; row < here; ++row) {
      const auto [b, time] = at(t, row);
      const C* const h = h_ + row * own_;
      p_.output.write(p_.output.data, s_.place(b, time, p_.output.batch, p_.output.time) + part_.unit, own_, h);
      if (p_.hidden_exact)
        std::memcpy(p_.hidden_exact + s_.place(b, time, s_.time * p_.width, p_.width) + part_.unit, h,
                    static_cast<size_t>(own_) * sizeof(C));
      if (s_.is_last(b, time)) finish(b, h, c_ + row * units_);
      before_step(next, row, 1 - turn);
    }
    meet();
  }

  // pre: the sum of both products where sums_.
  void units(int64_t t, int64_t row, C* pre, C* rec) {
    const int64_t n = units_, all = p_.hidden, unit = part_.unit, slot = this->slot(t, row);
    const auto [b, time] = this->at(t, row);
    const int64_t at = b * s_.time + time;
    C* const gates = p_.gates ? p_.gates + slot * p_.gate_units + unit : nullptr;
    C* const extra = p_.extra ? p_.extra + slot * all + unit : nullptr;
    C* const h = p_.weight_hr ? unprojected_ + row * n : h_ + row * n;
    const C* const bias = p_.bias + unit;
    if (p_.norm_hh) {
      C* const keep = p_.normed ? p_.normed + slot * p_.normed_row() : nullptr;
      const bool sums = p_.cell != Cell::gru;
      const C scale = Products::normalise(gates_, rec, p_.norm_hh, keep ? keep + gates_ : nullptr, p_.streams, sums ? pre : rec, sums);
      if (keep) keep[2 * gates_ + 1] = scale;
    }
    const bool zoned = p_.zoneout.h > 0 && !p_.weight_hr;
    const Zones<C> zones{p_.zoneout, share_};
    if (zoned) std::memcpy(before_h_, h, static_cast<size_t>(n) * sizeof(C));
    if (p_.cell == Cell::gru) {
      gru_units(n, all, pre, rec, bias, p_.bias_hn + unit, h, gates, extra, p_.streams);
    } else if (p_.cell == Cell::lstm) {
      C* const c = c_ + row * n;
      if (p_.zoneout.c > 0) std::memcpy(before_c_, c, static_cast<size_t>(n) * sizeof(C));
      if (p_.norm_c) {
        lstm_units<C>(n, all, pre, bias, c, nullptr, gates, p_.streams);
        Products::normalise(n, c, nullptr, nullptr, false, normed_c_, false);
        lstm_output(n, normed_c_, p_.norm_c, p_.norm_b, pre + 3 * n, h);
      } else {
        lstm_units(n, all, pre, bias, c, h, gates, p_.streams);
      }
      if (p_.zoneout.c > 0) blend(n, zones.c(at, unit, n), before_c_, c);
      if (extra) each_vector<C>(n, S2S_LAMBDA(auto v, int64_t j) { v.keep(extra + j, v.get(c + j), p_.streams); });
    } else {
      rnn_units(n, p_.cell == Cell::rnn_relu, pre, bias, h, gates, p_.streams);
    }
    if (zoned) blend(n, zones.h(at, unit, n), before_h_, h);
  }

  void project(int64_t t, int64_t here) {
    const int64_t width = p_.width;
    C* const to = p_.zoneout.h > 0 ? projected_ : h_;
    Products::packed(here, width, p_.hidden, unprojected_, p_.hidden, p_.weight_hr, false, to, width, false, false, nullptr);
    if (to == h_) return;
    for (int64_t row = 0; row < here; ++row) {
      const auto [b, time] = at(t, row);
      blend(width, Zones<C>{p_.zoneout, share_}.h(b * s_.time + time, 0, width), h_ + row * width, to + row * width);
      std::memcpy(h_ + row * width, to + row * width, static_cast<size_t>(width) * sizeof(C));
    }
  }

  const RecurrenceForward<C>& p_;
  const Schedule& s_;
  const Part part_;
  Crew::Member* const others_;
  const C *weight_ih_, *weight_hh_;
  bool sums_;                                      // the recurrent product is added to the input product
  int64_t rows_, units_, gates_, own_, left_row_;  // own_: of h, the columns that this part makes
  C *pre_, *x_, *rec_, *h_, *c_, *unprojected_, *projected_, *share_, *before_h_, *before_c_, *normed_c_, *scratch_, *left_[2];
};
