// Binding of additive attention on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "additive_attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <numeric>
#include <tuple>
#include <vector>

#include "pool.h"
#include "tensor.h"

#define S2S_KERNELS "additive_attention_kernels.h"
#include "each_isa.h"
// clang-format off: needs the kernels
#include "additive_attention_binding.h"
// clang-format on

namespace s2s {
namespace {

// Which rows (B, N) hold anything that isn't finite.
template <class C>
const uint8_t* flagged(const Rows<const C>& rows, int64_t batch, int64_t count, int64_t width, std::deque<Workspace>& kept) {
  kept.emplace_back(Workspace::bytes<uint8_t>(batch * count));
  uint8_t* flags = kept.back().template take<uint8_t>(batch * count);
  const auto flag = S2S_SELECT(AdditiveKernels<C>::flag);
  parallel(batch, 1 + (1 << 15) / (count * width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) flag(rows.at(b, 0), rows.row, count, width, flags + b * count);
  });
  return flags;
}

// Fills blocks [begin, end) of a table (B, blocks, even(A), 2, key_block), counted over the batch, and the flags (B, S). Blocks past a
// length are 0 if `all`, else left alone. columns: scratch of width * key_block elements.
template <class C>
void fill_blocks(const AdditiveAttention<C>& p, int64_t begin, int64_t end, C* table, uint8_t* outlier, C* columns, bool all) {
  const auto fill = S2S_SELECT(AdditiveKernels<C>::table);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.blocks(), at = task % p.blocks(), first = at * key_block, count = std::min(key_block, p.length(b) - first);
    C* const to = table + b * p.table_batch + at * p.block_size();
    if (count > 0)
      fill(p.width, count, p.key.at(b, first), p.key.row, outlier + b * p.outlier_batch + first, to, columns);
    else if (all)
      std::fill(to, to + p.block_size(), C(0));
  }
}
template <class C>
void fill_table(const AdditiveAttention<C>& p, C* table, uint8_t* outlier, bool all) {
  const int64_t scratch = Workspace::bytes<C>(p.width * key_block);
  Workspace workspace(thread_count() * scratch);
  uint8_t* const columns = workspace.take<uint8_t>(thread_count() * scratch);
  std::atomic<int64_t> next{0};
  parallel(p.batch * p.blocks(), 1 + (1 << 12) / (key_block * p.width + 1), [&](int64_t begin, int64_t end) {
    fill_blocks(p, begin, end, table, outlier, reinterpret_cast<C*>(columns + next.fetch_add(1) * scratch), all);
  });
}

// The entries of the batch, those with the most keys first.
template <class C>
std::vector<int64_t> longest_first(const AdditiveAttention<C>& p) {
  std::vector<int64_t> order(static_cast<size_t>(p.batch));
  std::iota(order.begin(), order.end(), 0);
  if (p.lengths) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.length(a) > p.length(b); });
  return order;
}

struct Arguments {
  const Tensor &query, &key, &value, &weight;
  const OptionalTensor &mask, &key_lengths, &seed, &table, &outliers;
  double dropout_p;
};

// One call: its arguments unpacked, and what they are unpacked into.
template <class S>
class Call {
 public:
  using C = compute_t<S>;
  AdditiveAttention<C> p{};
  C scale = 1;
  std::deque<Workspace> kept;
  bool entry_tables = false;  // each batch entry has its table made by the task that comes to it, in memory that stays in the cache

  Call(const char* op, const Arguments& in, bool may_defer) {
    p.batch = in.query.size(0), p.rows = in.query.size(1), p.width = in.query.size(2);
    p.keys = in.key.size(1), p.values = in.value.size(2);
    lengths_ = as_contiguous(in.key_lengths);
    p.lengths = lengths_ ? data<int64_t>(*lengths_) : nullptr;
    p.query = wide_rows<S>(in.query, kept), p.key = wide_rows<S>(in.key, kept), p.value = wide_rows<S>(in.value, kept);
    p.weight = wide_vector<S>(in.weight, kept);
    if (in.mask) {
      p.mask = reinterpret_cast<const uint8_t*>(data<bool>(*in.mask));
      p.mask_batch = in.mask->stride(0), p.mask_row = in.mask->stride(1), p.mask_key = in.mask->stride(2);
      p.hidden_value = flagged(p.value, p.batch, p.keys, p.values, kept);
    }
    if (in.seed) {
      const auto words = seed_words(op, "seed", *in.seed);
      p.dropout = true, p.seed[0] = words[0], p.seed[1] = words[1];
      p.threshold = S2S_SELECT(AdditiveKernels<C>::threshold)(in.dropout_p);
      p.keep_scale = in.dropout_p < 1 ? static_cast<C>(1 / (1 - in.dropout_p)) : C(0);
    }
    scale = S2S_SELECT(AdditiveKernels<C>::scale)(p.width, p.weight);
    if (scale == C(0)) return;  // a weight that isn't finite: tanh itself for all
    p.table_batch = p.blocks() * p.block_size(), p.outlier_batch = p.keys;
    if (in.table) {
      p.table = data<C>(*in.table), p.outlier = reinterpret_cast<const uint8_t*>(data<bool>(*in.outliers));
    } else if (p.rows > 2) {  // for fewer rows the table costs more than it saves
      entry_tables = may_defer && p.batch >= thread_count();
      if (entry_tables) return;
      kept.emplace_back(Workspace::bytes<C>(p.batch * p.table_batch) + Workspace::bytes<uint8_t>(p.batch * p.keys));
      C* table = kept.back().template take<C>(p.batch * p.table_batch);
      uint8_t* outlier = kept.back().template take<uint8_t>(p.batch * p.keys);
      fill_table(p, table, outlier, false);
      p.table = table, p.outlier = outlier;
    }
  }

  int64_t tiles() const { return blocks_of(p.rows, query_rows); }
  int64_t tile() const { return tiles() ? blocks_of(p.rows, tiles()) : 0; }
  int64_t scores_row() const { return blocks_of(p.keys, key_block) * key_block + unit_pad; }
  int64_t table_stride() const { return (p.width + 2 * unit_pad - 1) / unit_pad * unit_pad + unit_pad; }

  int64_t scratch_bytes(bool backward) const {
    const int64_t rows = tile();
    return 5 * Workspace::bytes<C>(rows * table_stride()) + Workspace::bytes<int32_t>(rows * table_stride()) +
           2 * Workspace::bytes<C>(rows * scores_row()) + Workspace::bytes<C>(scores_row()) +
           Workspace::bytes<C>(rows * std::max(p.width, p.values)) + Workspace::bytes<C>(3 * p.width) +
           Workspace::bytes<C>(product_size(backward));
  }

  AdditiveScratch<C> scratch(uint8_t* at, bool backward) const {
    const auto take = [&](int64_t count) {
      C* part = reinterpret_cast<C*>(at);
      at += Workspace::bytes<C>(count);
      return part;
    };
    const int64_t rows = tile(), queries = rows * table_stride();
    AdditiveScratch<C> s{};
    s.queries.stride = table_stride(), s.queries.scale = scale;
    s.queries.factor = take(queries), s.queries.slope = take(queries), s.queries.offset = take(queries);
    s.queries.weighted_slope = take(queries), s.queries.weighted_offset = take(queries);
    s.scores_row = scores_row();
    s.scores = take(rows * s.scores_row), s.gradient = take(rows * s.scores_row), s.factors = take(s.scores_row);
    s.rows = take(rows * std::max(p.width, p.values)), s.line = take(3 * p.width), s.product = take(product_size(backward));
    s.queries.side = reinterpret_cast<int32_t*>(at);
    return s;
  }

  int64_t grain() const { return 1 + (1 << 16) / (tile() * p.keys * (p.width + p.values) + 1); }

 private:
  int64_t product_size(bool backward) const {
    const auto size = S2S_SELECT(AdditiveKernels<C>::workspace);
    const int64_t wide = std::max(p.keys, p.values), rows = tile();
    return backward ? std::max(size(rows, wide, wide), size(p.keys, p.values, rows)) : size(rows, p.values, p.keys);
  }

  OptionalTensor lengths_;
};

void check(const char* op, const Arguments& in) {
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"query", in.query}, {"key", in.key}, {"value", in.value}}) {
    check_cpu(op, name, tensor);
    check_dim(op, name, tensor, 3);
  }
  const int64_t batch = in.query.size(0), rows = in.query.size(1), width = in.query.size(2), keys = in.key.size(1);
  const ScalarType type = in.query.scalar_type();
  check_argument(op, "key", in.key, type, {batch, keys, width});
  check_argument(op, "value", in.value, type, {batch, keys, -1});
  check_argument(op, "weight", in.weight, type, {width});
  check_argument(op, "mask", in.mask, ScalarType::Bool, {batch, rows, keys});
  check_lengths(op, "key_lengths", as_contiguous(in.key_lengths), batch, keys);
  STD_TORCH_CHECK(in.dropout_p >= 0 && in.dropout_p <= 1, op, ": dropout_p must be in [0, 1], got ", in.dropout_p);
  STD_TORCH_CHECK(in.seed.has_value() == (in.dropout_p > 0), op, ": seed must be given with dropout alone");
  STD_TORCH_CHECK(in.table.has_value() == in.outliers.has_value(), op, ": table and outliers must be given together");
  if (!in.table) return;
  const ScalarType wide = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  check_argument(op, "table", in.table, wide, {batch, blocks_of(keys, key_block), even(width), 2, key_block});
  check_argument(op, "outliers", in.outliers, ScalarType::Bool, {batch, keys});
  STD_TORCH_CHECK(in.table->is_contiguous() && in.outliers->is_contiguous(), op, ": table and outliers must be contiguous");
}

std::tuple<Tensor, Tensor> additive_attention_prepare(const Tensor& key, const OptionalTensor& key_lengths) {
  const char* op = "additive_attention_prepare";
  check_cpu(op, "key", key);
  check_dim(op, "key", key, 3);
  const int64_t batch = key.size(0), keys = key.size(1), width = key.size(2), blocks = blocks_of(keys, key_block);
  const OptionalTensor lengths = as_contiguous(key_lengths);
  check_lengths(op, "key_lengths", lengths, batch, keys);
  return dispatch_floating(op, "key", key, [&](auto zero) {
    using S = decltype(zero);
    using C = compute_t<S>;
    std::deque<Workspace> kept;
    AdditiveAttention<C> p{};
    p.batch = batch, p.keys = keys, p.width = width, p.lengths = data<int64_t>(lengths), p.key = wide_rows<S>(key, kept);
    p.table_batch = blocks * p.block_size(), p.outlier_batch = keys;
    Tensor table = empty_cpu({batch, blocks, even(width), 2, key_block}, scalar_type_of<C>);
    Tensor outliers = empty_cpu({batch, keys}, ScalarType::Bool);
    bool* flags = mutable_data<bool>(outliers);
    std::fill(flags, flags + batch * keys, false);
    fill_table(p, mutable_data<C>(table), reinterpret_cast<uint8_t*>(flags), true);
    return std::make_tuple(table, outliers);
  });
}

std::tuple<Tensor, Tensor, Tensor> additive_attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                              const Tensor& weight, const OptionalTensor& mask,
                                                              const OptionalTensor& key_lengths, const OptionalTensor& seed,
                                                              const OptionalTensor& table, const OptionalTensor& outliers, double dropout_p,
                                                              bool return_weights, bool save) {
  const char* op = "additive_attention_forward";
  const Arguments in{query, key, value, weight, mask, key_lengths, seed, table, outliers, dropout_p};
  check(op, in);
  return dispatch_floating(op, "query", query, [&](auto zero) {
    using S = decltype(zero);
    using C = compute_t<S>;
    Call<S> call(op, in, true);
    const AdditiveAttention<C>& p = call.p;
    const ScalarType type = query.scalar_type(), wide = scalar_type_of<C>;
    Tensor context = empty_cpu({p.batch, p.rows, p.values}, type);
    Tensor weights = return_weights ? empty_cpu({p.batch, p.rows, p.keys}, type) : empty_cpu({0}, type);
    Tensor statistics = save ? empty_cpu({p.batch, p.rows, 2}, wide) : empty_cpu({0}, wide);
    S* const context_out = mutable_data<S>(context);
    S* const weights_out = mutable_data<S>(weights);
    C* const statistics_out = mutable_data<C>(statistics);
    const int64_t tiles = call.tiles(), shown = Workspace::bytes<C>(return_weights ? call.tile() * call.scores_row() : 0);
    const int64_t bytes = call.scratch_bytes(false), threads = thread_count();
    const int64_t table_bytes = Workspace::bytes<C>(p.table_batch), flag_bytes = Workspace::bytes<uint8_t>(p.keys);
    const int64_t entry = call.entry_tables ? table_bytes + flag_bytes + Workspace::bytes<C>(p.width * key_block) : 0;
    const int64_t each = bytes + shown + entry;
    Workspace workspace(threads * each);
    uint8_t* const memory = workspace.take<uint8_t>(threads * each);
    std::atomic<int64_t> next{0};
    const auto attend = S2S_SELECT(AdditiveKernels<C>::context);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    // The rows of a unit share a table. Several units for a thread, the longest first, let all threads end at once.
    const int64_t parts = call.entry_tables ? std::min(tiles, blocks_of(4 * threads, std::max<int64_t>(1, p.batch))) : tiles;
    const int64_t units = p.batch * parts;
    const std::vector<int64_t> order = longest_first(p);
    deal(units, call.grain() * parts / std::max<int64_t>(1, tiles), [&](const auto& next_unit) {
      uint8_t* const own = memory + next.fetch_add(1) * each;
      const AdditiveScratch<C> s = call.scratch(own, false);
      C* const before = return_weights ? reinterpret_cast<C*>(own + bytes) : nullptr;
      AdditiveAttention<C> here = p;
      if (call.entry_tables) here.table_batch = here.outlier_batch = 0;
      uint8_t* const place = own + bytes + shown;
      int64_t entry_of = -1;
      for (int64_t unit = next_unit(); unit < units; unit = next_unit()) {
        const int64_t b = order[static_cast<size_t>(unit / parts)], part = unit % parts;
        if (call.entry_tables && b != entry_of) {
          C* const table_of = reinterpret_cast<C*>(place);
          uint8_t* const flags = place + table_bytes;
          fill_blocks(here, b * p.blocks(), (b + 1) * p.blocks(), table_of, flags, reinterpret_cast<C*>(flags + flag_bytes), false);
          here.table = table_of, here.outlier = flags, entry_of = b;
        }
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
          const int64_t begin = tile * call.tile(), rows = std::min(call.tile(), p.rows - begin);
          const int64_t row = b * p.rows + begin, n = p.length(b);
          attend(here, b, begin, rows, s, save ? statistics_out + 2 * row : nullptr, before);
          narrow(s.rows, context_out + row * p.values, rows * p.values);
          for (int64_t i = 0; i < rows && before; ++i) {
            S* const line = weights_out + (row + i) * p.keys;
            narrow(before + i * s.scores_row, line, n);
            std::fill(line + n, line + p.keys, S{});
          }
        }
      }
    });
    return std::make_tuple(context, weights, statistics);
  });
}

// The rows of a batch entry are cut into parts, each with sums of its own for the gradients that all rows add to: enough parts for some
// threads, and as many whatever the number of threads, so that the order of the sums is always the same.
int64_t parts_of(int64_t batch, int64_t tiles) {
  constexpr int64_t enough = 8;
  return std::max<int64_t>(1, std::min(tiles, blocks_of(enough, std::max<int64_t>(1, batch))));
}

struct Needs {
  bool query, key, value, weight;
};

// Backward of one call.
template <class S>
class Backward {
  using C = compute_t<S>;

 public:
  Backward(const char* op, const Arguments& in, const OptionalTensor& grad_context, const OptionalTensor& grad_weights,
           const Tensor& statistics, const Needs& needs)
      : call_(op, in, false), p_(call_.p), needs_(needs), statistics_(as_contiguous(statistics)) {
    const ScalarType type = in.query.scalar_type();
    grad_query_ = needs.query ? empty_cpu({p_.batch, p_.rows, p_.width}, type) : empty_cpu({0}, type);
    grad_key_ = needs.key ? empty_cpu({p_.batch, p_.keys, p_.width}, type) : empty_cpu({0}, type);
    grad_value_ = needs.value ? empty_cpu({p_.batch, p_.keys, p_.values}, type) : empty_cpu({0}, type);
    grad_weight_ = needs.weight ? empty_cpu({p_.width}, type) : empty_cpu({0}, type);
    g_.statistics = data<C>(statistics_);
    g_.need_scores = needs.query || needs.key || needs.weight, g_.need_value = needs.value;
    if (grad_context) {
      g_.grad_context = wide_rows<S>(*grad_context, call_.kept);
      if (p_.mask) g_.hidden_gradient = flagged(g_.grad_context, p_.batch, p_.rows, p_.values, call_.kept);
    }
    if (grad_weights) g_.grad_weights = wide_rows<S>(*grad_weights, call_.kept);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> run() {
    const int64_t tiles = call_.tiles(), parts = parts_of(p_.batch, tiles), tasks = p_.batch * parts;
    const int64_t block = p_.table ? key_block : 1;  // rows of keys as they are, or blocks of them on end
    key_size_ = g_.need_scores ? blocks_of(p_.keys, block) * block * p_.width : 0;
    value_size_ = needs_.value ? p_.keys * p_.values : 0;
    const int64_t weight_size = g_.need_scores ? p_.width : 0;
    Workspace sums(Workspace::bytes<C>(tasks * key_size_) + Workspace::bytes<C>(tasks * value_size_) +
                   Workspace::bytes<C>(tasks * weight_size));
    C* const key_sum = sums.take<C>(tasks * key_size_);
    C* const value_sum = sums.take<C>(tasks * value_size_);
    C* const weight_sum = sums.take<C>(tasks * weight_size);
    const int64_t bytes = call_.scratch_bytes(true), threads = thread_count();
    Workspace workspace(threads * bytes);
    uint8_t* const memory = workspace.take<uint8_t>(threads * bytes);
    std::atomic<int64_t> next{0};
    const auto gradients = S2S_SELECT(AdditiveKernels<C>::gradients);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    S* const grad_query = mutable_data<S>(grad_query_);
    const std::vector<int64_t> order = longest_first(p_);
    deal(tasks, call_.grain(), [&](const auto& next_unit) {
      const AdditiveScratch<C> s = call_.scratch(memory + next.fetch_add(1) * bytes, true);
      for (int64_t unit = next_unit(); unit < tasks; unit = next_unit()) {
        const int64_t b = order[static_cast<size_t>(unit / parts)], part = unit % parts, task = b * parts + part, length = p_.length(b);
        C* const key = key_sum + task * key_size_;
        C* const value = value_sum + task * value_size_;
        C* const weight = weight_sum + task * weight_size;
        if (key_size_) std::fill(key, key + blocks_of(length, block) * block * p_.width, C(0));
        if (value_size_) std::fill(value, value + length * p_.values, C(0));
        std::fill(weight, weight + weight_size, C(0));
        for (int64_t tile = tiles * part / parts; tile < tiles * (part + 1) / parts; ++tile) {
          const int64_t begin = tile * call_.tile(), rows = std::min(call_.tile(), p_.rows - begin);
          gradients(p_, g_, b, begin, rows, s, s.rows, key, value, weight);
          if (needs_.query) narrow(s.rows, grad_query + (b * p_.rows + begin) * p_.width, rows * p_.width);
        }
      }
    });
    if (needs_.key) finish_keys(key_sum, parts);
    if (needs_.value) finish_values(value_sum, parts);
    if (needs_.weight) {
      for (int64_t task = 1; task < tasks; ++task)
        for (int64_t a = 0; a < weight_size; ++a) weight_sum[a] += weight_sum[task * weight_size + a];
      if (!tasks) std::fill(mutable_data<S>(grad_weight_), mutable_data<S>(grad_weight_) + p_.width, S{});
      if (tasks) narrow(weight_sum, mutable_data<S>(grad_weight_), p_.width);
    }
    return {grad_query_, grad_key_, grad_value_, grad_weight_};
  }

 private:
  void finish_keys(C* sums, int64_t parts) {
    const int64_t blocks = p_.blocks(), scratch = Workspace::bytes<C>(p_.width * key_block), threads = thread_count();
    Workspace workspace(threads * scratch);
    uint8_t* const memory = workspace.take<uint8_t>(threads * scratch);
    std::atomic<int64_t> next{0};
    S* const out = mutable_data<S>(grad_key_);
    const auto finish = S2S_SELECT(AdditiveKernels<C>::finish_key);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    parallel(p_.batch * blocks, 1 + (1 << 14) / (p_.width * key_block + 1), [&](int64_t from, int64_t to) {
      C* const own = reinterpret_cast<C*>(memory + next.fetch_add(1) * scratch);
      for (int64_t task = from; task < to; ++task) {
        const int64_t b = task / blocks, at = task % blocks, first = at * key_block, last = std::min(first + key_block, p_.keys);
        const int64_t count = std::clamp<int64_t>(p_.length(b) - first, 0, last - first);
        C* const sum = sums + b * parts * key_size_ + at * p_.width * key_block;
        finish(p_.table != nullptr, p_.width, count, sum, parts, key_size_, p_.weight, own);
        S* const to_rows = out + (b * p_.keys + first) * p_.width;
        narrow(own, to_rows, count * p_.width);
        std::fill(to_rows + count * p_.width, to_rows + (last - first) * p_.width, S{});
      }
    });
  }

  void finish_values(C* sums, int64_t parts) {
    S* const out = mutable_data<S>(grad_value_);
    const auto narrow = S2S_SELECT(AdditiveStorageKernels<S>::narrow);
    parallel(p_.batch, 1 + (1 << 14) / (value_size_ + 1), [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        C* const sum = sums + b * parts * value_size_;
        const int64_t present = p_.length(b) * p_.values;
        for (int64_t part = 1; part < parts; ++part)
          for (int64_t k = 0; k < present; ++k) sum[k] += sum[part * value_size_ + k];
        narrow(sum, out + b * value_size_, present);
        std::fill(out + b * value_size_ + present, out + (b + 1) * value_size_, S{});
      }
    });
  }

  Call<S> call_;
  const AdditiveAttention<C>& p_;
  AdditiveAttentionGradient<C> g_{};
  const Needs needs_;
  const Tensor statistics_;
  Tensor grad_query_, grad_key_, grad_value_, grad_weight_;
  int64_t key_size_ = 0, value_size_ = 0;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> additive_attention_backward(
    const OptionalTensor& grad_context, const OptionalTensor& grad_weights, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& weight, const Tensor& statistics, const OptionalTensor& mask, const OptionalTensor& key_lengths,
    const OptionalTensor& seed, const OptionalTensor& table, const OptionalTensor& outliers, double dropout_p, bool need_query,
    bool need_key, bool need_value, bool need_weight) {
  const char* op = "additive_attention_backward";
  const Arguments in{query, key, value, weight, mask, key_lengths, seed, table, outliers, dropout_p};
  check(op, in);
  const int64_t batch = query.size(0), rows = query.size(1);
  check_argument(op, "grad_context", grad_context, query.scalar_type(), {batch, rows, value.size(2)});
  check_argument(op, "grad_weights", grad_weights, query.scalar_type(), {batch, rows, key.size(1)});
  return dispatch_floating(op, "query", query, [&](auto zero) {
    using S = decltype(zero);
    check_argument(op, "statistics", statistics, scalar_type_of<compute_t<S>>, {batch, rows, 2});
    return Backward<S>(op, in, grad_context, grad_weights, statistics, {need_query, need_key, need_value, need_weight}).run();
  });
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("additive_attention_prepare", TORCH_BOX(&s2s::additive_attention_prepare));
  m.impl("additive_attention_forward", TORCH_BOX(&s2s::additive_attention_forward));
  m.impl("additive_attention_backward", TORCH_BOX(&s2s::additive_attention_backward));
}
