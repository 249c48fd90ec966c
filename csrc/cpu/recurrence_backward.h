// Backward: one part of the rows or units runs back through some times alone, or meets the others once a step where they share rows, and
// leaves the gradients of the gates. From these the weights' gradients and x's are made in products over all of those positions, while
// they are in the cache.

// Gates and their gradients are those of `all` units, `n` of which are looked at. dh: of the output of this step; dc: in, of the new cell
// state, out, of the one before. to: of the gates before their activation.
// tanh_c and through_norm where the cell is normalised: tanh of the normalised cell, and what reaches the new cell through h.
template <class T>
void lstm_unit_gradients(int64_t n, int64_t all, const T* gates, const T* c_before, const T* dh, const T* tanh_c, const T* through_norm,
                         T* dc, T* to) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = all + j, l = 2 * all + j, m = 3 * all + j;
        const Vec<T> i = at.get(gates + j), f = at.get(gates + k), g = at.get(gates + l), o = at.get(gates + m);
        const Vec<T> before = at.get(c_before + j), out = at.get(dh + j), one = broadcast(T(1));
        const Vec<T> squashed = tanh_c ? at.get(tanh_c + j) : vtanh(fma(f, before, i * g));
        const Vec<T> through = through_norm ? at.get(through_norm + j) : out * o * (one - squashed * squashed);
        const Vec<T> cell = at.get(dc + j) + through;
        at.put(to + j, cell * g * (i * (one - i)));
        at.put(to + k, cell * before * (f * (one - f)));
        at.put(to + l, cell * i * (one - g * g));
        at.put(to + m, out * squashed * (o * (one - o)));
        at.put(dc + j, cell * f);
      });
}

// The cell before this step's zoneout, and h before the projection.
template <class T>
void lstm_cell_again(int64_t n, int64_t all, const T* gates, const T* c_before, T* c) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        at.put(c + j, fma(at.get(gates + all + j), at.get(c_before + j), at.get(gates + j) * at.get(gates + 2 * all + j)));
      });
}
template <class T>
void lstm_output_again(int64_t n, const T* o, const T* c, T* h) {
  each_vector<T>(n, S2S_LAMBDA(auto at, int64_t j) { at.put(h + j, at.get(o + j) * vtanh(at.get(c + j))); });
}

// c becomes tanh of the normalised cell, of which `normed` keeps the normalised part; grad: what reaches the normalisation's output.
template <class T>
void lstm_norm_gradients(int64_t n, const T* normed, const T* weight, const T* bias, const T* o, const T* dh, T* c, T* grad) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> squashed = vtanh(fma(at.get(normed + j), at.get(weight + j), at.get(bias + j)));
        at.put(c + j, squashed);
        at.put(grad + j, at.get(dh + j) * at.get(o + j) * (T(1) - squashed * squashed));
      });
}

// direct: what reaches h of the step before without the recurrent product, replaced or (if `add`) increased; may be dh.
template <class T>
void gru_unit_gradients(int64_t n, int64_t all, const T* gates, const T* recurrent_n, const T* h_before, const T* dh, T* direct, bool add,
                        T* in, T* rec) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = all + j, l = 2 * all + j;
        const Vec<T> r = at.get(gates + j), z = at.get(gates + k), candidate = at.get(gates + l), one = broadcast(T(1));
        const Vec<T> out = at.get(dh + j);
        const Vec<T> dn = out * (one - z) * (one - candidate * candidate);
        const Vec<T> dz = out * (at.get(h_before + j) - candidate) * (z * (one - z));
        const Vec<T> dr = dn * at.get(recurrent_n + j) * (r * (one - r));
        const Vec<T> passed = out * z;
        at.put(direct + j, add ? at.get(direct + j) + passed : passed);
        at.put(in + j, dr);
        at.put(in + k, dz);
        at.put(in + l, dn);
        at.put(rec + j, dr);
        at.put(rec + k, dz);
        at.put(rec + l, dn * r);
      });
}

template <class T>
void rnn_unit_gradients(int64_t n, bool relu, const T* value, const T* dh, T* to) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> h = at.get(value + j), out = at.get(dh + j);
        // A NaN lets the gradient through, as torch's relu does.
        at.put(to + j, relu ? select(h <= Vec<T>{}, Vec<T>{}, out) : out * (T(1) - h * h));
      });
}

// total = product * mask + (if `add`) total; grad_mask increases by product * h.
template <class T>
void masked_gradients(int64_t n, const T* product, const T* mask, const T* h, bool add, T* total, T* grad_mask) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> p = at.get(product + j), through = p * at.get(mask + j);
        at.put(total + j, add ? at.get(total + j) + through : through);
        at.put(grad_mask + j, fma(p, at.get(h + j), at.get(grad_mask + j)));
      });
}

template <class C>
class RecurrenceBackwardPart {
  using Products = RecurrenceProducts<C>;

 public:
  // Elements of scratch for a part of `rows` rows and `units` units, which hold its state from one advance to the next.
  static int64_t workspace(const RecurrenceBackward<C>& p, int64_t rows, int64_t units) {
    const int64_t own = units < p.hidden ? units : p.width;  // only a part of all units projects
    return rows * (4 * own + 2 * units) + 2 * (own + units) + 4 * units + 16 * 16 + Products::workspace(rows, p.gate_units, p.tiled_hh);
  }

  static void enter(const RecurrenceBackward<C>& p, const Part& part, C* workspace) {
    RecurrenceBackwardPart(p, part, nullptr, workspace, nullptr).begin();
  }
  // Through the times [first, last), the latest step of forward first. weight_hh: packed, the columns that belong to the part's units, or
  // null.
  static void advance(const RecurrenceBackward<C>& p, const Part& part, const C* weight_hh, int64_t first, int64_t last, C* workspace,
                      Crew::Member* others) {
    RecurrenceBackwardPart self(p, part, weight_hh, workspace, others);
    for (int64_t i = 0; i < last - first; ++i) self.step(p.schedule.reverse ? first + i : last - 1 - i);
  }
  static void leave(const RecurrenceBackward<C>& p, const Part& part, C* workspace) {
    RecurrenceBackwardPart(p, part, nullptr, workspace, nullptr).end();
  }

  // What the product of position (b, t) with W_hh multiplied, (P), where it lies or in `scratch`.
  static const C* recurrent_input(const RecurrenceBackward<C>& p, int64_t b, int64_t t, C* scratch) {
    const C* const from = h_before(p, b, t);
    if (from && !p.mask) return from;
    const size_t bytes = static_cast<size_t>(p.width) * sizeof(C);
    if (from)
      std::memcpy(scratch, from, bytes);
    else
      std::memset(scratch, 0, bytes);
    if (p.mask) multiply(p.width, p.mask + b * p.width, scratch);
    return scratch;
  }

 private:
  RecurrenceBackwardPart(const RecurrenceBackward<C>& p, const Part& part, const C* weight_hh, C* workspace, Crew::Member* others)
      : p_(p), s_(p.schedule), part_(part), others_(others), weight_hh_(weight_hh) {
    rows_ = part.rows(s_.lanes);
    units_ = part.units;
    own_ = p.weight_hr ? p.width : units_;
    const auto take = [&](int64_t count) {
      C* const place = workspace;
      workspace += (count + 15) / 16 * 16;
      return place;
    };
    dh_ = take(rows_ * own_);
    dc_ = take(rows_ * units_);
    own_dh_ = take(p.zoneout.h > 0 ? rows_ * own_ : 0);
    unprojected_ = take(p.weight_hr ? rows_ * units_ : 0);
    product_ = take(p.mask ? rows_ * own_ : 0);
    grad_mask_ = take(p.mask ? rows_ * own_ : 0);
    zeros_ = take(own_ + units_);
    share_ = take(own_ + units_);
    kept_c_ = take(units_);
    cell_ = take(units_);
    normed_ = take(units_);
    through_ = take(units_);
    scratch_ = workspace;
    last_ = s_.reverse && rows_ ? s_.lane_end[part.lane(0)] - 1 : 0;
    // Something passes h by, so the recurrent product adds to what is there.
    direct_ = p.cell == Cell::gru || p.zoneout.h > 0;
  }

  void begin() {
    clear(zeros_, own_ + units_);
    if (p_.mask) clear(grad_mask_, rows_ * own_);
  }
  // Rows of the batch without any position.
  void end() {
    for (int64_t b = 0; part_.group == 0 && b < s_.batch; ++b) {
      if (s_.length[b]) continue;
      start(p_.grad_h, b, own_, share_);
      finish(p_.grad_h0, b, own_, share_);
      start(p_.grad_c, b, units_, share_);
      finish(p_.grad_c0, b, units_, share_);
      finish(p_.grad_mask, b, own_, zeros_);
    }
  }

  Position at(int64_t step, int64_t row) const { return s_.at(step, part_.lane(row)); }
  int64_t slot(int64_t step, int64_t row) const { return s_.offset[step] + part_.lane(row); }

  static void clear(C* to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(C)); }
  void start(const Source<C>& from, int64_t b, int64_t n, C* to) {
    if (from.data)
      from.read(from.data, b * from.batch + part_.unit * from.unit, from.unit, n, to);
    else
      clear(to, n);
  }
  void finish(const Target<C>& to, int64_t b, int64_t n, const C* from) {
    if (to.data) to.write(to.data, b * to.batch + part_.unit, n, from);
  }

  // The state that the step at t saw; null where there was none.
  static const C* h_before(const RecurrenceBackward<C>& p, int64_t b, int64_t t) {
    const Schedule& s = p.schedule;
    if (s.starts(b, t)) return nullptr;
    if (s.is_first(b, t)) return p.h0 ? p.h0 + b * p.width : nullptr;
    return p.hidden_exact + s.place(b, s.reverse ? t + 1 : t - 1, s.time * p.width, p.width);
  }
  const C* h_before(int64_t b, int64_t t) const {
    const C* const h = h_before(p_, b, t);
    return h ? h + part_.unit : zeros_;
  }
  const C* c_before(int64_t row, int64_t step, Position here) const {
    const auto [b, t] = here;
    if (s_.starts(b, t)) return zeros_;
    if (s_.is_first(b, t)) return p_.c0 ? p_.c0 + b * p_.hidden + part_.unit : zeros_;
    return p_.extra + slot(s_.reverse ? step + 1 : step - 1, row) * p_.hidden + part_.unit;
  }

  void step(int64_t t) {
    const int64_t here = part_.rows(s_.count[t]), width = p_.width, unit = part_.unit;
    const bool zoned = p_.zoneout.h > 0;
    const Zones<C> zones{p_.zoneout, share_};
    C* const own = zoned ? own_dh_ : dh_;
    for (int64_t row = 0; row < here; ++row) {
      const auto [b, time] = at(t, row);
      const Source<C>& grad = p_.grad_output;
      C* const dh = dh_ + row * own_;
      if (s_.is_last(b, time)) {
        start(p_.grad_h, b, own_, dh);
        start(p_.grad_c, b, units_, dc_ + row * units_);
      }
      if (grad.data) grad.add(grad.data, s_.place(b, time, grad.batch, grad.time) + unit * grad.unit, grad.unit, own_, dh);
      if (zoned) part(own_, zones.h(b * s_.time + time, unit, own_), dh, own + row * own_, dh);
      if (p_.grad_projected)
        std::memcpy(p_.grad_projected + (slot(t, row) - p_.first_slot) * p_.padded(width), own + row * own_,
                    static_cast<size_t>(width) * sizeof(C));
    }
    if (p_.weight_hr) Products::packed(here, units_, width, own, width, p_.weight_hr, false, unprojected_, units_, false, false, nullptr);
    const C* const units = p_.weight_hr ? unprojected_ : own;
    for (int64_t row = 0; row < here; ++row) cell(t, row, units + row * units_);
    if (others_) others_->wait();
    const C* const left = p_.grad_rec + (slot(t, 0) - p_.first_slot) * p_.grad_row;
    C* const to = p_.mask ? product_ : dh_;
    // The gates of the step to come, where all of them are this part's.
    const int64_t next = s_.reverse ? t + 1 : t - 1;
    const bool whole = t != last_ && part_.groups == 1 && units_ == p_.hidden && p_.gates;
    const C* const gates = whole ? p_.gates + s_.offset[next] * p_.gate_units : nullptr;
    const C* const gates_end = whole ? gates + s_.count[next] * p_.gate_units : nullptr;
    // The gradient of the state before the first step may be nobody's.
    const bool wanted = t != last_ || p_.grad_h0.data || p_.grad_mask.data, adds = direct_ && !p_.mask;
    if (wanted && p_.weight_hh)
      Products::in_place(own_, p_.gate_units, left, p_.weight_hh + unit, p_.weight_hh_row, to, adds, t % 2);
    else if (wanted)
      Products::packed(here, own_, p_.gate_units, left, part_.groups * p_.grad_row, weight_hh_, p_.tiled_hh, to, own_, adds, t % 2,
                       scratch_, gates, gates_end);
    const bool state = p_.grad_h0.data || p_.grad_c0.data || p_.grad_mask.data;
    for (int64_t row = 0; (p_.mask || s_.reset || state) && row < here; ++row) {
      const auto [b, time] = at(t, row);
      C *const dh = dh_ + row * own_, *const dc = dc_ + row * units_, *const grad_mask = grad_mask_ + row * own_;
      if (p_.mask) masked_gradients(own_, product_ + row * own_, p_.mask + b * width + unit, h_before(b, time), direct_, dh, grad_mask);
      if (s_.starts(b, time)) {
        clear(dh, own_);
        clear(dc, units_);
      }
      if (!state || !s_.is_first(b, time)) continue;
      finish(p_.grad_h0, b, own_, dh);
      finish(p_.grad_c0, b, units_, dc);
      finish(p_.grad_mask, b, own_, grad_mask);
      if (p_.mask) clear(grad_mask, own_);
    }
  }

  // dh: of what the cell gave, before zoneout and projection.
  void cell(int64_t t, int64_t row, const C* dh) {
    const int64_t n = units_, all = p_.hidden, unit = part_.unit, slot = this->slot(t, row), at = slot - p_.first_slot;
    const Position here = this->at(t, row);
    const C* const gates = p_.gates ? p_.gates + slot * p_.gate_units + unit : nullptr;
    C* const in = p_.grad_in + at * p_.grad_row + unit;
    C* const rec = p_.grad_rec + at * p_.grad_row + unit;
    if (p_.cell == Cell::gru) {
      gru_unit_gradients(n, all, gates, p_.extra + slot * all + unit, h_before(here.row, here.time), dh, dh_ + row * n, p_.zoneout.h > 0,
                         in, rec);
    } else if (p_.cell == Cell::lstm) {
      lstm(t, row, at, gates, dh, in);
    } else {
      const C* const value = gates ? gates : p_.hidden_exact + s_.place(here.row, here.time, s_.time * p_.width, p_.width) + unit;
      rnn_unit_gradients(n, p_.cell == Cell::rnn_relu, value, dh, in);
    }
    if (p_.norm_hh) {
      const C* const normed = p_.normed + slot * p_.normed_row();
      const C* const grad = p_.cell == Cell::gru ? rec : in;
      Products::normalise_gradient(p_.gate_units, grad, p_.norm_hh, normed + p_.gate_units, normed[2 * p_.gate_units + 1], rec);
    }
  }

  void lstm(int64_t t, int64_t row, int64_t at, const C* gates, const C* dh, C* to) {
    const int64_t n = units_, all = p_.hidden;
    const Position here = this->at(t, row);
    const C* const before = c_before(row, t, here);
    const C* const o = gates + 3 * all;
    C* const dc = dc_ + row * n;
    const C *tanh_c = nullptr, *through = nullptr;
    if (p_.zoneout.c > 0) {
      const Zones<C> zones{p_.zoneout, share_};
      std::memcpy(kept_c_, dc, static_cast<size_t>(n) * sizeof(C));
      part(n, zones.c(here.row * s_.time + here.time, part_.unit, n), kept_c_, dc, kept_c_);
    }
    if (p_.norm_c) {
      lstm_cell_again(n, all, gates, before, cell_);
      const C scale = Products::normalise(n, cell_, nullptr, nullptr, false, normed_, false);
      lstm_norm_gradients(n, normed_, p_.norm_c, p_.norm_b, o, dh, cell_, through_);
      if (p_.grad_norm_c) {
        std::memcpy(p_.grad_norm_c + at * n, through_, static_cast<size_t>(n) * sizeof(C));
        std::memcpy(p_.normed_c + at * n, normed_, static_cast<size_t>(n) * sizeof(C));
      }
      Products::normalise_gradient(n, through_, p_.norm_c, normed_, scale, through_);
      tanh_c = cell_, through = through_;
      if (p_.unprojected)
        each_vector<C>(n, S2S_LAMBDA(auto v, int64_t j) { v.put(p_.unprojected + at * n + j, v.get(o + j) * v.get(cell_ + j)); });
    } else if (p_.unprojected) {
      lstm_cell_again(n, all, gates, before, cell_);
      lstm_output_again(n, o, cell_, p_.unprojected + at * n);
    }
    lstm_unit_gradients(n, all, gates, before, dh, tanh_c, through, dc, to);
    if (p_.zoneout.c > 0) each_vector<C>(n, S2S_LAMBDA(auto v, int64_t j) { v.put(dc + j, v.get(dc + j) + v.get(kept_c_ + j)); });
  }

  const RecurrenceBackward<C>& p_;
  const Schedule& s_;
  const Part part_;
  Crew::Member* const others_;
  const C* const weight_hh_;
  int64_t rows_, units_, own_;  // own_: of the gradient of h, the columns that this part makes
  int64_t last_;                // the time of the last step
  bool direct_;
  C *dh_, *dc_, *own_dh_, *unprojected_, *product_, *grad_mask_, *zeros_, *share_, *kept_c_, *cell_, *normed_, *through_, *scratch_;
};
