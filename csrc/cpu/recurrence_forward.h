// Forward: one group of rows runs through time alone. The input product of the next steps is made block by block; each step adds the
// recurrent product and ends in the cell's own arithmetic.

// pre: the input product; rec: the recurrent one; gates: where the activated gates go, or null. h null: it is made later, from o and c.
template <class T>
void lstm_units(int64_t n, const T* pre, const T* rec, const T* bias, T* c, T* h, T* gates) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j, m = 3 * n + j;
        const Vec<T> i = vsigmoid(at.get(pre + j) + at.get(bias + j) + at.get(rec + j));
        const Vec<T> f = vsigmoid(at.get(pre + k) + at.get(bias + k) + at.get(rec + k));
        const Vec<T> g = vtanh(at.get(pre + l) + at.get(bias + l) + at.get(rec + l));
        const Vec<T> o = vsigmoid(at.get(pre + m) + at.get(bias + m) + at.get(rec + m));
        const Vec<T> cell = fma(f, at.get(c + j), i * g);
        at.put(c + j, cell);
        if (h) at.put(h + j, o * vtanh(cell));
        if (gates) {
          at.put(gates + j, i);
          at.put(gates + k, f);
          at.put(gates + l, g);
          at.put(gates + m, o);
        }
      });
}

template <class T>
void lstm_output(int64_t n, const T* normed, const T* weight, const T* bias, const T* o, T* h) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        at.put(h + j, at.get(o + j) * vtanh(fma(at.get(normed + j), at.get(weight + j), at.get(bias + j))));
      });
}

// recurrent_n: where W_hn h + b_hn goes, or null.
template <class T>
void gru_units(int64_t n, const T* pre, const T* rec, const T* bias, const T* bias_hn, T* h, T* gates, T* recurrent_n) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const int64_t k = n + j, l = 2 * n + j;
        const Vec<T> r = vsigmoid(at.get(pre + j) + at.get(bias + j) + at.get(rec + j));
        const Vec<T> z = vsigmoid(at.get(pre + k) + at.get(bias + k) + at.get(rec + k));
        const Vec<T> hn = at.get(rec + l) + at.get(bias_hn + j);
        const Vec<T> candidate = vtanh(fma(r, hn, at.get(pre + l) + at.get(bias + l)));
        at.put(h + j, fma(z, at.get(h + j), (T(1) - z) * candidate));
        if (gates) {
          at.put(gates + j, r);
          at.put(gates + k, z);
          at.put(gates + l, candidate);
          at.put(recurrent_n + j, hn);
        }
      });
}

template <class T>
void rnn_units(int64_t n, bool relu, const T* pre, const T* rec, const T* bias, T* h, T* gates) {
  each_vector<T>(
      n, S2S_LAMBDA(auto at, int64_t j) {
        const Vec<T> sum = at.get(pre + j) + at.get(bias + j) + at.get(rec + j);
        const Vec<T> value = relu ? max(Vec<T>{}, sum) : vtanh(sum);  // a NaN comes through
        at.put(h + j, value);
        if (gates) at.put(gates + j, value);
      });
}

template <class C>
class RecurrenceForwardGroup {
  using Products = RecurrenceProducts<C>;

 public:
  // Elements of scratch for a group of `rows` rows.
  static int64_t workspace(const RecurrenceForward<C>& p, int64_t rows) {
    const int64_t blocks = p.block_rows + rows;
    return blocks * (p.gate_units + (p.x_rows ? 0 : p.inputs + gemm_row_pad)) + rows * (3 * p.width + 2 * p.hidden + p.gate_units) +
           3 * (p.width + p.hidden) + 16 * 16;
  }

  static void run(const RecurrenceForward<C>& p, const Group& group, C* workspace) {
    RecurrenceForwardGroup(p, group, workspace).through_time();
  }

 private:
  RecurrenceForwardGroup(const RecurrenceForward<C>& p, const Group& group, C* workspace) : p_(p), s_(p.schedule), group_(group) {
    rows_ = group.rows(s_.batch);
    const int64_t blocks = p.block_rows + rows_;
    const auto take = [&](int64_t count) {
      C* const part = workspace;
      workspace += (count + 15) / 16 * 16;
      return part;
    };
    pre_ = take(blocks * p.gate_units);
    x_ = p.x_rows ? nullptr : take(blocks * (p.inputs + gemm_row_pad));
    rec_ = take(rows_ * p.gate_units);
    h_ = take(rows_ * p.width);
    c_ = take(p.cell == Cell::lstm ? rows_ * p.hidden : 0);
    masked_ = take(p.mask ? rows_ * p.width : 0);
    unprojected_ = take(p.weight_hr ? rows_ * p.hidden : 0);
    projected_ = take(p.weight_hr && p.zoneout.h > 0 ? rows_ * p.width : 0);
    share_ = take(p.width + p.hidden);
    before_h_ = take(p.width);
    before_c_ = take(p.hidden);
    normed_c_ = take(p.norm_c ? p.hidden : 0);
  }

  void through_time() {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t b = s_.order[group_.rank(row)];
      start(p_.h0, b, p_.width, h_ + row * p_.width);
      if (p_.cell == Cell::lstm) start(p_.c0, b, p_.hidden, c_ + row * p_.hidden);
    }
    int64_t end = 0;  // the first time at which no row of this group is present
    if (rows_) end = s_.length[s_.order[group_.rank(0)]];
    for (int64_t done = 0; done < end;) {
      int64_t steps = 0, rows = 0;
      while (done + steps < end && (steps == 0 || rows + present(s_.reverse ? end - 1 - done - steps : done + steps) <= p_.block_rows)) {
        rows += present(s_.reverse ? end - 1 - done - steps : done + steps);
        ++steps;
      }
      const int64_t first = s_.reverse ? end - done - steps : done;
      input_product(first, first + steps, rows);
      const C* pre = s_.reverse ? pre_ + rows * p_.gate_units : pre_;
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t t = s_.reverse ? first + steps - 1 - i : first + i, here = present(t) * p_.gate_units;
        if (s_.reverse) pre -= here;
        step(t, pre);
        if (!s_.reverse) pre += here;
      }
      done += steps;
    }
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t b = s_.order[group_.rank(row)];
      p_.h_n.write(p_.h_n.data, b * p_.h_n.batch, p_.width, h_ + row * p_.width);
      if (p_.cell == Cell::lstm) p_.c_n.write(p_.c_n.data, b * p_.c_n.batch, p_.hidden, c_ + row * p_.hidden);
    }
  }

  int64_t present(int64_t t) const { return group_.rows(s_.count[t]); }
  int64_t slot(int64_t t, int64_t row) const { return s_.offset[t] + group_.rank(row); }

  static void start(const C* from, int64_t b, int64_t n, C* to) {
    if (from)
      std::memcpy(to, from + b * n, static_cast<size_t>(n) * sizeof(C));
    else
      clear(to, n);
  }
  static void clear(C* to, int64_t n) { std::memset(to, 0, static_cast<size_t>(n) * sizeof(C)); }

  // W_ih x of the times [first, last), one row after another, time by time.
  void input_product(int64_t first, int64_t last, int64_t rows) {
    const C* from = x_;
    int64_t from_row = p_.inputs + gemm_row_pad;
    if (p_.x_rows) {
      from = p_.x_rows + s_.offset[first] * p_.x_row;
      from_row = p_.x_row;
    } else {
      C* to = x_;
      for (int64_t t = first; t < last; ++t)
        for (int64_t row = 0; row < present(t); ++row, to += from_row)
          p_.x.read(p_.x.data, s_.order[group_.rank(row)] * p_.x.batch + t * p_.x.time, p_.x.unit, p_.inputs, to);
    }
    Products::packed(rows, p_.gate_units, p_.inputs, from, from_row, p_.weight_ih, pre_, p_.gate_units, false, false);
    if (!p_.norm_ih) return;
    C* row = pre_;
    for (int64_t t = first; t < last; ++t)
      for (int64_t i = 0; i < present(t); ++i, row += p_.gate_units) {
        C* const keep = p_.normed ? p_.normed + slot(t, i) * p_.normed_row() : nullptr;
        const C scale = Products::normalise(p_.gate_units, row, p_.norm_ih, keep, row);
        if (keep) keep[2 * p_.gate_units] = scale;
      }
  }

  void step(int64_t t, const C* pre) {
    const int64_t here = present(t), gates = p_.gate_units, hidden = p_.hidden, width = p_.width;
    for (int64_t row = 0; s_.reset && row < here; ++row) {
      if (!s_.starts(s_.order[group_.rank(row)], t)) continue;
      clear(h_ + row * width, width);
      if (p_.cell == Cell::lstm) clear(c_ + row * hidden, hidden);
    }
    const C* left = h_;
    if (p_.mask) {
      std::memcpy(masked_, h_, static_cast<size_t>(here * width) * sizeof(C));
      for (int64_t row = 0; row < here; ++row) multiply(width, p_.mask + s_.order[group_.rank(row)] * width, masked_ + row * width);
      left = masked_;
    }
    Products::packed(here, gates, width, left, width, p_.weight_hh, rec_, gates, false, t % 2);
    for (int64_t row = 0; row < here; ++row) units(t, row, pre + row * gates, rec_ + row * gates);
    if (p_.weight_hr) project(t, here);
    for (int64_t row = 0; row < here; ++row) {
      const int64_t b = s_.order[group_.rank(row)], at = b * s_.time + t;
      p_.output.write(p_.output.data, b * p_.output.batch + t * p_.output.time, width, h_ + row * width);
      if (p_.hidden_exact) std::memcpy(p_.hidden_exact + at * width, h_ + row * width, static_cast<size_t>(width) * sizeof(C));
    }
  }

  void units(int64_t t, int64_t row, const C* pre, C* rec) {
    const int64_t n = p_.hidden, at = s_.order[group_.rank(row)] * s_.time + t, slot = this->slot(t, row);
    C* gates = p_.gates ? p_.gates + slot * p_.gate_units : nullptr;
    C* const extra = p_.extra ? p_.extra + slot * n : nullptr;
    C* const h = p_.weight_hr ? unprojected_ + row * n : h_ + row * n;
    if (p_.norm_hh) {
      C* const keep = p_.normed ? p_.normed + slot * p_.normed_row() : nullptr;
      const C scale = Products::normalise(p_.gate_units, rec, p_.norm_hh, keep ? keep + p_.gate_units : nullptr, rec);
      if (keep) keep[2 * p_.gate_units + 1] = scale;
    }
    const bool zoned = p_.zoneout.h > 0 && !p_.weight_hr;
    if (zoned) std::memcpy(before_h_, h, static_cast<size_t>(n) * sizeof(C));
    if (p_.cell == Cell::gru) {
      gru_units(n, pre, rec, p_.bias, p_.bias_hn, h, gates, extra);
    } else if (p_.cell == Cell::lstm) {
      C* const c = c_ + row * n;
      if (p_.zoneout.c > 0) std::memcpy(before_c_, c, static_cast<size_t>(n) * sizeof(C));
      if (p_.norm_c) {
        if (!gates) gates = rec;
        lstm_units<C>(n, pre, rec, p_.bias, c, nullptr, gates);
        Products::normalise(n, c, nullptr, nullptr, normed_c_);
        lstm_output(n, normed_c_, p_.norm_c, p_.norm_b, gates + 3 * n, h);
      } else {
        lstm_units(n, pre, rec, p_.bias, c, h, gates);
      }
      if (p_.zoneout.c > 0) blend(n, Zones<C>{p_.zoneout, share_}.c(at, n), before_c_, c);
      if (extra) std::memcpy(extra, c, static_cast<size_t>(n) * sizeof(C));
    } else {
      rnn_units(n, p_.cell == Cell::rnn_relu, pre, rec, p_.bias, h, gates);
    }
    if (zoned) blend(n, Zones<C>{p_.zoneout, share_}.h(at, n), before_h_, h);
  }

  void project(int64_t t, int64_t here) {
    const int64_t width = p_.width;
    C* const to = p_.zoneout.h > 0 ? projected_ : h_;
    Products::packed(here, width, p_.hidden, unprojected_, p_.hidden, p_.weight_hr, to, width, false, false);
    if (to == h_) return;
    for (int64_t row = 0; row < here; ++row) {
      const int64_t at = s_.order[group_.rank(row)] * s_.time + t;
      blend(width, Zones<C>{p_.zoneout, share_}.h(at, width), h_ + row * width, to + row * width);
      std::memcpy(h_ + row * width, to + row * width, static_cast<size_t>(width) * sizeof(C));
    }
  }

  const RecurrenceForward<C>& p_;
  const Schedule& s_;
  const Group group_;
  int64_t rows_;
  C *pre_, *x_, *rec_, *h_, *c_, *masked_, *unprojected_, *projected_, *share_, *before_h_, *before_c_, *normed_c_;
};
