// Backward: one group of rows runs back through time alone and leaves the gradients of the gates, from which the weights' gradients and x's
// are made in products over all positions afterwards.

// dh: of the output of this step; dc: in, of the new cell state, out, of the one before. to: of the gates before their activation.
// tanh_c and through_norm where the cell is normalised: tanh of the normalised cell, and what reaches the new cell through h.
template <class T>
void lstm_unit_gradients(int64_t n, const T* gates, const T* c_before, const T* dh, const T* tanh_c, const T* through_norm, T* dc, T* to) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j, m = 3 * n + j;
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
void lstm_cell_again(int64_t n, const T* gates, const T* c_before, T* c) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        at.put(c + j, fma(at.get(gates + n + j), at.get(c_before + j), at.get(gates + j) * at.get(gates + 2 * n + j)));
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
void gru_unit_gradients(int64_t n, const T* gates, const T* recurrent_n, const T* h_before, const T* dh, T* direct, bool add, T* in,
                        T* rec) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j;
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
        at.put(to + j, relu ? select(h > Vec<T>{}, out, Vec<T>{}) : out * (T(1) - h * h));
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
class RecurrenceBackwardGroup {
  using Products = RecurrenceProducts<C>;

 public:
  static int64_t workspace(const RecurrenceBackward<C>& p, int64_t rows) {
    return rows * (4 * p.width + 2 * p.hidden) + 2 * p.width + 6 * p.hidden + 16 * 16;
  }

  static void run(const RecurrenceBackward<C>& p, const Group& group, C* workspace) {
    RecurrenceBackwardGroup(p, group, workspace).through_time();
  }

  // What the recurrent products of the times [first, last) multiplied, by slot: (N, P).
  static void recurrent_inputs(const RecurrenceBackward<C>& p, int64_t first, int64_t last, C* to) {
    C zeros[1] = {};
    const Schedule& s = p.schedule;
    to += s.offset[first] * p.width;
    for (int64_t t = first; t < last; ++t)
      for (int64_t rank = 0; rank < s.count[t]; ++rank, to += p.width) {
        const int64_t b = s.order[rank];
        const C* const from = h_before(p, b, t, zeros);
        const size_t bytes = static_cast<size_t>(p.width) * sizeof(C);
        if (from == zeros)
          std::memset(to, 0, bytes);
        else
          std::memcpy(to, from, bytes);
        if (p.mask) multiply(p.width, p.mask + b * p.width, to);
      }
  }

 private:
  RecurrenceBackwardGroup(const RecurrenceBackward<C>& p, const Group& group, C* workspace) : p_(p), s_(p.schedule), group_(group) {
    rows_ = group.rows(s_.batch);
    const auto take = [&](int64_t count) {
      C* const part = workspace;
      workspace += (count + 15) / 16 * 16;
      return part;
    };
    dh_ = take(rows_ * p.width);
    dc_ = take(rows_ * p.hidden);
    own_ = take(p.zoneout.h > 0 ? rows_ * p.width : 0);
    unprojected_ = take(p.weight_hr ? rows_ * p.hidden : 0);
    product_ = take(p.mask ? rows_ * p.width : 0);
    grad_mask_ = take(p.mask ? rows_ * p.width : 0);
    zeros_ = take(p.width + p.hidden);
    share_ = take(p.width + p.hidden);
    kept_c_ = take(p.hidden);
    cell_ = take(p.hidden);
    normed_ = take(p.hidden);
    through_ = take(p.hidden);
    std::memset(zeros_, 0, static_cast<size_t>(p.width + p.hidden) * sizeof(C));
    if (p.mask) std::memset(grad_mask_, 0, static_cast<size_t>(rows_ * p.width) * sizeof(C));
    // Something passes h by, so the recurrent product adds to what is there.
    direct_ = p.cell == Cell::gru || p.zoneout.h > 0;
  }

  void through_time() {
    for (int64_t row = 0; row < rows_; ++row) {
      start(p_.grad_h, batch_row(row), p_.width, dh_ + row * p_.width);
      start(p_.grad_c, batch_row(row), p_.hidden, dc_ + row * p_.hidden);
    }
    const int64_t end = rows_ ? s_.length[batch_row(0)] : 0;
    for (int64_t i = 0; i < end; ++i) step(s_.reverse ? i : end - 1 - i);
    for (int64_t row = 0; row < rows_; ++row) {
      finish(p_.grad_h0, batch_row(row), p_.width, dh_ + row * p_.width);
      finish(p_.grad_c0, batch_row(row), p_.hidden, dc_ + row * p_.hidden);
      finish(p_.grad_mask, batch_row(row), p_.width, grad_mask_ + row * p_.width);
    }
  }

  int64_t batch_row(int64_t row) const { return s_.order[group_.rank(row)]; }
  int64_t slot(int64_t t, int64_t row) const { return s_.offset[t] + group_.rank(row); }

  static void start(const Source<C>& from, int64_t b, int64_t n, C* to) {
    if (from.data)
      from.read(from.data, b * from.batch, from.unit, n, to);
    else
      std::memset(to, 0, static_cast<size_t>(n) * sizeof(C));
  }
  static void finish(const Target<C>& to, int64_t b, int64_t n, const C* from) {
    if (to.data) to.write(to.data, b * to.batch, n, from);
  }

  // The state that the step at t saw; `zeros` where there was none.
  static const C* h_before(const RecurrenceBackward<C>& p, int64_t b, int64_t t, const C* zeros) {
    const Schedule& s = p.schedule;
    if (s.starts(b, t)) return zeros;
    if (s.is_first(b, t)) return p.h0 ? p.h0 + b * p.width : zeros;
    return p.hidden_exact + (b * s.time + (s.reverse ? t + 1 : t - 1)) * p.width;
  }
  const C* h_before(int64_t b, int64_t t) const { return h_before(p_, b, t, zeros_); }
  const C* c_before(int64_t row, int64_t t) const {
    const int64_t b = batch_row(row);
    if (s_.starts(b, t)) return zeros_;
    if (s_.is_first(b, t)) return p_.c0 ? p_.c0 + b * p_.hidden : zeros_;
    return p_.extra + slot(s_.reverse ? t + 1 : t - 1, row) * p_.hidden;
  }

  void step(int64_t t) {
    const int64_t here = group_.rows(s_.count[t]), width = p_.width, hidden = p_.hidden, gates = p_.gate_units;
    const bool zoned = p_.zoneout.h > 0;
    const Zones<C> zones{p_.zoneout, share_};
    C* const own = zoned ? own_ : dh_;
    for (int64_t row = 0; row < here; ++row) {
      const int64_t b = batch_row(row), at = b * s_.time + t;
      C* const dh = dh_ + row * width;
      if (p_.grad_output.data)
        p_.grad_output.add(p_.grad_output.data, b * p_.grad_output.batch + t * p_.grad_output.time, p_.grad_output.unit, width, dh);
      if (zoned) part(width, zones.h(at, width), dh, own + row * width, dh);
      if (p_.grad_projected)
        std::memcpy(p_.grad_projected + slot(t, row) * width, own + row * width, static_cast<size_t>(width) * sizeof(C));
    }
    if (p_.weight_hr) Products::packed(here, hidden, width, own, width, p_.weight_hr, unprojected_, hidden, false, false);
    const C* const units = p_.weight_hr ? unprojected_ : own;
    for (int64_t row = 0; row < here; ++row) cell(t, row, units + row * hidden);
    const C* const left = p_.grad_rec + slot(t, 0) * gates;
    C* const to = p_.mask ? product_ : dh_;
    Products::packed(here, width, gates, left, group_.groups * gates, p_.weight_hh, to, width, direct_ && !p_.mask, t % 2);
    for (int64_t row = 0; (p_.mask || s_.reset) && row < here; ++row) {
      const int64_t b = batch_row(row);
      C* const dh = dh_ + row * width;
      if (p_.mask)
        masked_gradients(width, product_ + row * width, p_.mask + b * width, h_before(b, t), direct_, dh, grad_mask_ + row * width);
      if (!s_.starts(b, t)) continue;
      std::memset(dh, 0, static_cast<size_t>(width) * sizeof(C));
      std::memset(dc_ + row * hidden, 0, static_cast<size_t>(hidden) * sizeof(C));
    }
  }

  // dh: of what the cell gave, before zoneout and projection.
  void cell(int64_t t, int64_t row, const C* dh) {
    const int64_t n = p_.hidden, at = slot(t, row), b = batch_row(row);
    const C* const gates = p_.gates + at * p_.gate_units;
    C* const in = p_.grad_in + at * p_.gate_units;
    C* const rec = p_.grad_rec + at * p_.gate_units;
    if (p_.cell == Cell::gru) {
      gru_unit_gradients(n, gates, p_.extra + at * n, h_before(b, t), dh, dh_ + row * n, p_.zoneout.h > 0, in, rec);
    } else if (p_.cell == Cell::lstm) {
      lstm(t, row, at, gates, dh, in);
    } else {
      rnn_unit_gradients(n, p_.cell == Cell::rnn_relu, gates, dh, in);
    }
    if (p_.norm_hh) {
      const C* const normed = p_.normed + at * p_.normed_row();
      const C* const grad = p_.cell == Cell::gru ? rec : in;
      Products::normalise_gradient(p_.gate_units, grad, p_.norm_hh, normed + p_.gate_units, normed[2 * p_.gate_units + 1], rec);
    }
  }

  void lstm(int64_t t, int64_t row, int64_t at, const C* gates, const C* dh, C* to) {
    const int64_t n = p_.hidden;
    const C* const before = c_before(row, t);
    const C* const o = gates + 3 * n;
    C* const dc = dc_ + row * n;
    const C *tanh_c = nullptr, *through = nullptr;
    if (p_.zoneout.c > 0) {
      const Zones<C> zones{p_.zoneout, share_};
      std::memcpy(kept_c_, dc, static_cast<size_t>(n) * sizeof(C));
      part(n, zones.c(batch_row(row) * s_.time + t, n), kept_c_, dc, kept_c_);
    }
    if (p_.norm_c) {
      lstm_cell_again(n, gates, before, cell_);
      const C scale = Products::normalise(n, cell_, nullptr, nullptr, normed_);
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
      lstm_cell_again(n, gates, before, cell_);
      lstm_output_again(n, o, cell_, p_.unprojected + at * n);
    }
    lstm_unit_gradients(n, gates, before, dh, tanh_c, through, dc, to);
    if (p_.zoneout.c > 0) each_vector<C>(n, S2S_LAMBDA(auto v, int64_t j) { v.put(dc + j, v.get(dc + j) + v.get(kept_c_ + j)); });
  }

  const RecurrenceBackward<C>& p_;
  const Schedule& s_;
  const Group group_;
  int64_t rows_;
  bool direct_;
  C *dh_, *dc_, *own_, *unprojected_, *product_, *grad_mask_, *zeros_, *share_, *kept_c_, *cell_, *normed_, *through_;
};
