// Binding of attention on the CPU: unpacks tensors, checks again what Python has checked, splits the work over torch's threads.
#include "attention.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "pool.h"
#include "tensor.h"

#define S2S_BFLOAT16
#define S2S_TILES
#define S2S_KERNELS "attention_kernels.h"
#include "each_isa.h"

namespace s2s {
namespace {

// The arguments that forward and backward share.
struct Arguments {
  const Tensor &query, &key, &value;
  const OptionalTensor &mask, &bias, &query_lengths, &key_lengths, &slopes, &seed;
  std::optional<int64_t> left, right;
  bool bottom_right;
  double dropout_p;
  std::optional<double> scale, softcap;
  const Tensor *query_starts = nullptr, *key_starts = nullptr;  // of packed sequences

  bool packed() const { return query_starts; }
};

// Tensors of rows are (B, H, rows, D), or (rows, H, D) where sequences are packed.
int64_t rows_of(const Tensor& tensor, bool packed) { return tensor.size(packed ? 0 : 2); }

void check_rows(const char* op, const char* name, const Tensor& tensor, ScalarType type, bool packed, int64_t batch, int64_t heads,
                int64_t rows, int64_t width) {
  if (packed)
    check_argument(op, name, tensor, type, {rows, heads, width});
  else
    check_argument(op, name, tensor, type, {batch, heads, rows, width});
}

Tensor empty_rows(bool packed, int64_t batch, int64_t heads, int64_t rows, int64_t width, ScalarType type) {
  return packed ? empty_cpu({rows, heads, width}, type) : empty_cpu({batch, heads, rows, width}, type);
}

// Over (B, H, rows, D).
void strides_of(const Tensor& tensor, bool packed, int64_t* stride) {
  constexpr int64_t places[2][4] = {{0, 1, 2, 3}, {-1, 1, 0, 2}};
  for (int i = 0; i < 4; ++i) stride[i] = places[packed][i] < 0 ? 0 : tensor.stride(places[packed][i]);
}

// Strides over (B, H, T, S) of a tensor whose sizes are those or 1.
void broadcast_strides(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> sizes, int64_t* stride) {
  check_cpu(op, name, tensor);
  check_dim(op, name, tensor, static_cast<int64_t>(sizes.size()));
  int64_t i = 0;
  for (const int64_t size : sizes) {
    STD_TORCH_CHECK(tensor.size(i) == 1 || tensor.size(i) == size, op, ": ", name, " must be broadcastable, got ", shape_text(tensor));
    stride[i] = tensor.size(i) == 1 ? 0 : tensor.stride(i);
    ++i;
  }
}

FloatType float_type(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return FloatType::float64;
    case ScalarType::Float:
      return FloatType::float32;
    case ScalarType::BFloat16:
      return FloatType::bfloat16;
    default:
      check_dtype(op, name, tensor, ScalarType::Half);
      return FloatType::float16;
  }
}

int64_t length_of(const char* op, const char* name, const OptionalTensor& lengths, int64_t b, int64_t limit) {
  if (!lengths) return limit;
  const int64_t length = data<int64_t>(*lengths)[b * lengths->stride(0)];
  STD_TORCH_CHECK(length >= 0 && length <= limit, op, ": ", name, " must be in [0, ", limit, "], got ", length);
  return length;
}

const int64_t* starts_of(const char* op, const char* name, const Tensor& starts, int64_t batch, int64_t rows, std::vector<int64_t>& copy) {
  check_argument(op, name, starts, ScalarType::Long, {batch + 1});
  for (int64_t b = 0; b <= batch; ++b) copy.push_back(data<int64_t>(starts)[b * starts.stride(0)]);
  STD_TORCH_CHECK(copy.front() == 0 && copy.back() == rows && std::is_sorted(copy.begin(), copy.end()), op, ": ", name,
                  " must ascend from 0 to ", rows, ", got ", copy.front(), " to ", copy.back());
  return copy.data();
}

// The spans of packed sequences, and the longest one's lengths.
template <class S>
void packed_spans(const char* op, const Arguments& a, AttentionCall<S>& p, std::vector<AttentionSpan>& spans) {
  std::vector<int64_t> query_copy, key_copy;
  const int64_t* const queries = starts_of(op, "cu_seqlens_q", *a.query_starts, p.batch, p.time, query_copy);
  const int64_t* const keys = starts_of(op, "cu_seqlens_k", *a.key_starts, p.batch, p.source, key_copy);
  p.time = p.source = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t time = queries[b + 1] - queries[b], source = keys[b + 1] - keys[b];
    spans.push_back({queries[b], time, time, keys[b], source, source, a.bottom_right ? source - time : 0});
    p.time = std::max(p.time, time), p.source = std::max(p.source, source);
  }
}

// Checks everything but what the results are; `spans` is filled.
template <class S>
AttentionCall<S> checked_call(const char* op, const Arguments& a, std::vector<AttentionSpan>& spans) {
  AttentionCall<S> p{};
  const int64_t rank = a.packed() ? 3 : 4;
  check_dim(op, "query", a.query, rank);
  check_dim(op, "key", a.key, rank);
  check_dim(op, "value", a.value, rank);
  p.packed = a.packed();
  if (p.packed) {
    check_dim(op, "cu_seqlens_q", *a.query_starts, 1);
    STD_TORCH_CHECK(a.query_starts->size(0) >= 1, op, ": cu_seqlens_q must have B + 1 elements, got 0");
  }
  p.batch = p.packed ? a.query_starts->size(0) - 1 : a.query.size(0);
  p.heads = a.query.size(1), p.time = rows_of(a.query, p.packed), p.width = a.query.size(rank - 1);
  p.kv_heads = a.key.size(1), p.source = rows_of(a.key, p.packed), p.value_width = a.value.size(rank - 1);
  check_rows(op, "query", a.query, scalar_type_of<S>, p.packed, p.batch, p.heads, p.time, p.width);
  check_rows(op, "key", a.key, scalar_type_of<S>, p.packed, p.batch, p.kv_heads, p.source, p.width);
  check_rows(op, "value", a.value, scalar_type_of<S>, p.packed, p.batch, p.kv_heads, p.source, p.value_width);
  for (const int64_t width : {p.width, p.value_width})
    STD_TORCH_CHECK(width >= 1 && width <= 1024, op, ": query and value must be 1 to 1024 wide, got ", width);
  STD_TORCH_CHECK(p.kv_heads ? p.heads % p.kv_heads == 0 : p.heads == 0, op, ": key must have a number of heads that divides ", p.heads,
                  ", got ", p.kv_heads);
  strides_of(a.query, p.packed, p.query_stride);
  strides_of(a.key, p.packed, p.key_stride);
  strides_of(a.value, p.packed, p.value_stride);
  p.lse_stride[0] = p.packed ? 0 : p.heads * p.time, p.lse_stride[1] = p.time;
  p.query = data<S>(a.query), p.key = data<S>(a.key), p.value = data<S>(a.value);
  if (a.mask) {
    check_dtype(op, "mask", *a.mask, ScalarType::Bool);
    broadcast_strides(op, "mask", *a.mask, {p.batch, p.heads, p.time, p.source}, p.mask_stride);
    p.mask = static_cast<const uint8_t*>(a.mask->const_data_ptr());
  }
  if (a.bias) {
    p.bias_type = float_type(op, "bias", *a.bias);
    broadcast_strides(op, "bias", *a.bias, {p.batch, p.heads, p.time, p.source}, p.bias_stride);
    p.bias = a.bias->const_data_ptr();
  }
  if (a.slopes) {
    check_cpu(op, "alibi_slopes", *a.slopes);
    check_dtype(op, "alibi_slopes", *a.slopes, scalar_type_of<S>);
    const bool per_batch = a.slopes->dim() == 2;
    if (per_batch)
      check_shape(op, "alibi_slopes", *a.slopes, {p.batch, p.heads});
    else
      check_shape(op, "alibi_slopes", *a.slopes, {p.heads});
    p.slopes = data<S>(*a.slopes);
    p.slope_stride[0] = per_batch ? a.slopes->stride(0) : 0;
    p.slope_stride[1] = a.slopes->stride(per_batch ? 1 : 0);
  }
  STD_TORCH_CHECK((!a.left || *a.left >= 0) && (!a.right || *a.right >= 0), op, ": window must have sides of at least 0");
  constexpr int64_t unbounded = int64_t{1} << 60;
  p.left = std::min(a.left.value_or(unbounded), unbounded);
  p.right = std::min(a.right.value_or(unbounded), unbounded);
  p.scale = a.scale.value_or(1 / std::sqrt(static_cast<double>(p.width)));
  p.softcap = a.softcap.value_or(0);
  STD_TORCH_CHECK(!a.softcap || p.softcap > 0, op, ": softcap must be above 0, got ", p.softcap);
  STD_TORCH_CHECK(a.dropout_p >= 0 && a.dropout_p <= 1, op, ": dropout_p must be in [0, 1], got ", a.dropout_p);
  p.dropout = a.dropout_p > 0;
  if (p.dropout) {
    STD_TORCH_CHECK(a.seed, op, ": seed must be given under dropout");
    const std::array<int64_t, 2> words = seed_words(op, "seed", *a.seed);
    p.seed0 = words[0], p.seed1 = words[1];
    p.threshold = baseline::philox_threshold(a.dropout_p);
    p.kept = a.dropout_p < 1 ? 1 / (1 - a.dropout_p) : 0;
  }
  check_argument(op, "query_lengths", a.query_lengths, ScalarType::Long, {p.batch});
  check_argument(op, "key_lengths", a.key_lengths, ScalarType::Long, {p.batch});
  if (p.packed) packed_spans(op, a, p, spans);
  for (int64_t b = 0; b < (p.packed ? 0 : p.batch); ++b) {
    const int64_t queries = length_of(op, "query_lengths", a.query_lengths, b, p.time);
    const int64_t keys = length_of(op, "key_lengths", a.key_lengths, b, p.source);
    spans.push_back({0, queries, p.time, 0, keys, p.source, a.bottom_right ? keys - queries : 0});
  }
  p.spans = spans.data();
  p.least_time = p.time, p.least_source = p.source;
  for (const AttentionSpan& span : spans)
    p.least_time = std::min(p.least_time, span.queries), p.least_source = std::min(p.least_source, span.keys);
  return p;
}

// Memory for each range of a parallel loop that the pool really starts.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : bytes_((bytes + 63) / 64 * 64), workspace_(Workspace::bytes<char>(thread_count() * bytes_)) {
    base_ = workspace_.take<char>(thread_count() * bytes_);
  }
  void restart() { next_ = 0; }
  char* take() { return base_ + next_.fetch_add(1) * bytes_; }

 private:
  int64_t bytes_;
  Workspace workspace_;
  char* base_;
  std::atomic<int64_t> next_{0};
};

template <class S>
void out_strides(const Tensor& out, AttentionCall<S>& p) {
  int64_t stride[4];
  strides_of(out, p.packed, stride);
  std::copy(stride, stride + 3, p.out_stride);
}

// The batch elements of `which`, of one query each.
template <class S>
void decode(const AttentionCall<S>& p, const std::vector<int64_t>& which) {
  using T = compute_t<S>;
  const int64_t chunks = std::max<int64_t>(1, (p.source + attention_decode_chunk - 1) / attention_decode_chunk);
  const int64_t size = S2S_SELECT(AttentionDecode<S>::part_size)(p), group = p.heads / p.kv_heads;
  Scratch scratch(S2S_SELECT(AttentionDecode<S>::bytes)(p));
  const int64_t elements = static_cast<int64_t>(which.size());
  const auto element = [&](int64_t at) { return which[static_cast<size_t>(at)]; };
  Workspace workspace(Workspace::bytes<T>(chunks * elements * p.heads * size));
  T* const parts = workspace.take<T>(chunks * elements * p.heads * size);
  const auto run = S2S_SELECT(AttentionDecode<S>::run);
  const auto combine = S2S_SELECT(AttentionDecode<S>::combine);
  const int64_t stride = elements * p.heads * size;
  parallel(elements * p.kv_heads * chunks, 1, [&](int64_t begin, int64_t end) {
    char* const own = scratch.take();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, head = task / chunks;
      run(p, element(head / p.kv_heads), head % p.kv_heads, chunk, parts + chunk * stride + head * group * size, own);
    }
  });
  parallel(elements * p.heads, 256, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) combine(p, element(at / p.heads), at % p.heads, chunks, parts + at * size, stride);
  });
}

template <class S>
void forward(const AttentionCall<S>& p) {
  if (p.batch * p.heads * p.time == 0) return;
  // Backward makes scores again in the order of AttentionForward, to the bit.
  const bool may_decode = !p.peaks && p.key_stride[3] == 1 && p.value_stride[3] == 1;
  std::vector<int64_t> decoded;
  for (int64_t b = 0; may_decode && b < p.batch; ++b)
    if (p.spans[b].query_rows == 1) decoded.push_back(b);
  if (!decoded.empty()) decode(p, decoded);
  if (p.time == 1 && may_decode) return;
  // A head's queries are dealt to several tasks only where there are too few heads: each task packs its keys itself.
  const int64_t heads = p.batch * p.kv_heads, threads = thread_count();
  const int64_t wanted = threads == 1 || heads >= 4 * threads ? 1 : (4 * threads + heads - 1) / heads;
  const int64_t pieces = std::max<int64_t>(1, std::min(wanted, p.time / 96)), piece = ((p.time + pieces - 1) / pieces + 95) / 96 * 96;
  const int64_t per_head = (p.time + piece - 1) / piece;
  const double work = 4.0 * static_cast<double>(p.heads / p.kv_heads * std::min(piece, p.time)) * static_cast<double>(p.source + 1) *
                      static_cast<double>(p.width + p.value_width);
  const auto run = S2S_SELECT(AttentionForward<S>::run);
  Scratch scratch(S2S_SELECT(AttentionForward<S>::bytes)(p));
  parallel(heads * per_head, static_cast<int64_t>(1e6 / work) + 1, [&](int64_t begin, int64_t end) {
    char* const own = scratch.take();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / per_head, at = task % per_head * piece;
      if (may_decode && p.spans[head / p.kv_heads].query_rows == 1) continue;
      run(p, head / p.kv_heads, head % p.kv_heads, at, std::min(p.time, at + piece), own);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const char* op, const Arguments& a, bool save, bool save_wide) {
  return dispatch_floating(op, "query", a.query, [&](auto zero) {
    using S = decltype(zero);
    std::vector<AttentionSpan> spans;
    AttentionCall<S> p = checked_call<S>(op, a, spans);
    const int64_t rows = p.lse_stride[1];
    const ScalarType wide = scalar_type_of<compute_t<S>>;
    const Tensor out = empty_rows(p.packed, p.batch, p.heads, rows, p.value_width, a.query.scalar_type());
    const Tensor lse = p.packed ? empty_cpu({p.heads, rows}, wide) : empty_cpu({p.batch, p.heads, rows}, wide);
    const Tensor softmax = !save      ? empty_cpu({0}, wide)
                           : p.packed ? empty_cpu({2, p.heads, rows}, wide)
                                      : empty_cpu({2, p.batch, p.heads, rows}, wide);
    // Backward subtracts from each weight's gradient that of the whole row, which rounding to 16 bits would drown.
    const bool keep_wide = save_wide || (save && sizeof(S) == 2);
    const Tensor wide_out = keep_wide ? empty_rows(p.packed, p.batch, p.heads, rows, p.value_width, wide) : empty_cpu({0}, wide);
    p.out = mutable_data<S>(out);
    p.lse = mutable_data<compute_t<S>>(lse);
    if (save) p.peaks = mutable_data<compute_t<S>>(softmax), p.shares = p.peaks + p.all_rows();
    if (keep_wide) p.wide_out = mutable_data<compute_t<S>>(wide_out);
    out_strides(out, p);
    forward(p);
    return std::make_tuple(out, lse, softmax, wide_out);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                             const OptionalTensor& mask, const OptionalTensor& bias,
                                                             const OptionalTensor& query_lengths, const OptionalTensor& key_lengths,
                                                             const OptionalTensor& slopes, const OptionalTensor& seed,
                                                             std::optional<int64_t> left, std::optional<int64_t> right, bool bottom_right,
                                                             double dropout_p, std::optional<double> scale, std::optional<double> softcap,
                                                             bool save, bool save_wide) {
  return forward(
      "attention_forward",
      {query, key, value, mask, bias, query_lengths, key_lengths, slopes, seed, left, right, bottom_right, dropout_p, scale, softcap}, save,
      save_wide);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_packed_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                                                    const Tensor& query_starts, const Tensor& key_starts,
                                                                    const OptionalTensor& slopes, const OptionalTensor& seed,
                                                                    std::optional<int64_t> left, std::optional<int64_t> right,
                                                                    bool bottom_right, double dropout_p, std::optional<double> scale,
                                                                    std::optional<double> softcap, bool save) {
  const OptionalTensor none;
  return forward("attention_packed_forward",
                 {query, key, value, none, none, none, none, slopes, seed, left, right, bottom_right, dropout_p, scale, softcap,
                  &query_starts, &key_starts},
                 save, false);
}

struct Needs {
  bool query, key, value, bias, slopes;
};

// Bias's gradient in bias's dtype from sums in the dtype of computation.
template <class T>
void convert_bias(FloatType type, const T* sums, int64_t n, const Tensor& to) {
  const auto convert = [&](auto zero) {
    using B = decltype(zero);
    B* const out = mutable_data<B>(to);
    const auto add = S2S_SELECT(add_up<T, B>);
    parallel(n, 1 << 14, [&](int64_t begin, int64_t end) { add(sums, n, 1, begin, end, out); });
  };
  switch (type) {
    case FloatType::float64:
      return convert(double{});
    case FloatType::float32:
      return convert(float{});
    case FloatType::bfloat16:
      return convert(bfloat16{});
    case FloatType::float16:
      return convert(float16{});
  }
}

template <class S>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const char* op, const Arguments& a, const Tensor& grad_out,
                                                            const OptionalTensor& grad_lse, const Tensor& out_in, const Tensor& softmax_in,
                                                            const Needs& needs) {
  using T = compute_t<S>;
  std::vector<AttentionSpan> spans;
  AttentionCall<S> p = checked_call<S>(op, a, spans);
  const ScalarType type = scalar_type_of<S>;
  const int64_t time = p.lse_stride[1], rows = p.all_rows();
  check_rows(op, "grad_out", grad_out, type, p.packed, p.batch, p.heads, time, p.value_width);
  const bool wide = out_in.scalar_type() != type;
  check_rows(op, "out", out_in, wide ? scalar_type_of<T> : type, p.packed, p.batch, p.heads, time, p.value_width);
  if (p.packed) {
    check_argument(op, "grad_lse", grad_lse, scalar_type_of<T>, {p.heads, time});
    check_argument(op, "softmax", softmax_in, scalar_type_of<T>, {2, p.heads, time});
  } else {
    check_argument(op, "grad_lse", grad_lse, scalar_type_of<T>, {p.batch, p.heads, time});
    check_argument(op, "softmax", softmax_in, scalar_type_of<T>, {2, p.batch, p.heads, time});
  }
  STD_TORCH_CHECK(!needs.bias || a.bias, op, ": bias must be given where its gradient is wanted");
  STD_TORCH_CHECK(!needs.slopes || a.slopes, op, ": alibi_slopes must be given where its gradient is wanted");
  const Tensor out = as_contiguous(out_in), softmax = as_contiguous(softmax_in);
  // Read only: a call has one set of pointers for both directions.
  if (wide)
    p.wide_out = const_cast<T*>(data<T>(out));
  else
    p.out = const_cast<S*>(data<S>(out));
  p.peaks = const_cast<T*>(data<T>(softmax));
  p.shares = p.peaks + rows;
  out_strides(out, p);

  AttentionGradients<S> g{};
  g.grad_out = data<S>(grad_out);
  strides_of(grad_out, p.packed, g.grad_out_stride);
  g.grad_lse = data<T>(grad_lse);
  if (grad_lse)
    for (int i = p.packed; i < 3; ++i) g.grad_lse_stride[i] = grad_lse->stride(i - p.packed);
  const auto result = [&](bool need, const Tensor& like, S*& to, int64_t* stride, int64_t& row) {
    if (!need) return empty_cpu({0}, type);
    Tensor grad = empty_rows(p.packed, p.batch, like.size(1), rows_of(like, p.packed), like.size(like.dim() - 1), type);
    to = mutable_data<S>(grad);
    int64_t strides[4];
    strides_of(grad, p.packed, strides);
    stride[0] = strides[0], stride[1] = strides[1], row = strides[2];
    return grad;
  };
  const Tensor grad_query = result(needs.query, a.query, g.query, g.query_stride, g.query_row);
  const Tensor grad_key = result(needs.key, a.key, g.key, g.key_stride, g.key_row);
  const Tensor grad_value = result(needs.value, a.value, g.value, g.value_stride, g.value_row);
  const ScalarType bias_type = a.bias ? a.bias->scalar_type() : type;
  const Tensor grad_bias =
      needs.bias ? empty_cpu({a.bias->size(0), a.bias->size(1), a.bias->size(2), a.bias->size(3)}, bias_type) : empty_cpu({0}, bias_type);
  const Tensor grad_slopes = !needs.slopes          ? empty_cpu({0}, type)
                             : a.slopes->dim() == 2 ? empty_cpu({p.batch, p.heads}, type)
                                                    : empty_cpu({p.heads}, type);

  // What shares an element of bias's gradient stays in one task, one after another. Where there are few tasks the keys are dealt to parts;
  // all this depends on shapes alone.
  const bool over_batch = needs.bias && p.bias_stride[0] == 0, over_heads = needs.bias && p.bias_stride[1] == 0;
  const int64_t batches = over_batch ? std::min<int64_t>(1, p.batch) : p.batch;
  const int64_t heads = over_heads ? std::min<int64_t>(1, p.kv_heads) : p.kv_heads;
  const int64_t blocks = (p.source + attention_block - 1) / attention_block, tasks = std::max<int64_t>(1, batches * heads);
  g.parts = std::max<int64_t>(1, std::min((32 + tasks - 1) / tasks, blocks / 4));
  // Chains of this many terms are no worse than torch's sums, which are pairwise over such chains.
  constexpr int64_t short_sum = 32;
  const int64_t terms = (over_batch ? p.batch : 1) * (over_heads ? p.heads : 1) * (needs.bias && p.bias_stride[2] == 0 ? p.time : 1);
  const bool is_long = needs.bias && sizeof(T) < sizeof(double) && terms > short_sum;
  const bool converts = needs.bias && (is_long || bias_type != scalar_type_of<T>);
  const int64_t bias_count = grad_bias.numel();
  Workspace bias_sums(!converts ? 0 : is_long ? Workspace::bytes<double>(bias_count) : Workspace::bytes<T>(bias_count));
  if (needs.bias) {
    for (int i = 0; i < 4; ++i) g.bias_stride[i] = grad_bias.size(i) == 1 ? 0 : grad_bias.stride(i);
    const auto clear = [&](auto* sums) {
      parallel(bias_count, 1 << 16, [&](int64_t begin, int64_t end) { std::fill(sums + begin, sums + end, 0); });
    };
    if (is_long)
      clear(g.long_bias = bias_sums.take<double>(bias_count));
    else
      clear(g.bias = converts ? bias_sums.take<T>(bias_count) : mutable_data<T>(grad_bias));
  }
  const int64_t width = (p.width + 15) / 16 * 16;
  const bool dealt = needs.query && g.parts > 1;
  Workspace sums(Workspace::bytes<T>(dealt ? g.parts * rows * width : 0) +
                 (needs.slopes ? Workspace::bytes<double>(g.parts * p.batch * p.heads) + Workspace::bytes<double>(g.parts * rows * 2) : 0));
  if (dealt) g.query_parts = sums.take<T>(g.parts * rows * width);
  if (needs.slopes) {
    g.slopes = sums.take<double>(g.parts * p.batch * p.heads);
    g.slope_rows = sums.take<double>(g.parts * rows * 2);
  }
  const auto run = S2S_SELECT(AttentionBackward<S>::run);
  Scratch scratch(S2S_SELECT(AttentionBackward<S>::bytes)(p, g));
  parallel(batches * heads * g.parts, 1, [&](int64_t begin, int64_t end) {
    char* const own = scratch.take();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % g.parts, head = task / g.parts % heads, batch = task / g.parts / heads;
      for (int64_t b = batch; b < (over_batch ? p.batch : batch + 1); ++b)
        for (int64_t kv = head; kv < (over_heads ? p.kv_heads : head + 1); ++kv) run(p, g, b, kv, part, own);
    }
  });
  if (dealt) {
    const auto add = S2S_SELECT(AttentionBackward<S>::add_parts);
    parallel(rows, 64, [&](int64_t begin, int64_t end) { add(p, g, begin, end); });
  }
  if (converts && is_long)
    convert_bias(p.bias_type, g.long_bias, bias_count, grad_bias);
  else if (converts)
    convert_bias(p.bias_type, g.bias, bias_count, grad_bias);
  if (needs.slopes) {
    const int64_t per_head = grad_slopes.dim() == 2 ? 1 : p.batch, n = grad_slopes.numel();
    const auto finish = S2S_SELECT(AttentionBackward<S>::finish_slope);
    parallel(p.batch * p.heads, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, p.time)), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) finish(p, g, at / p.heads, at % p.heads);
    });
    if (p.batch)
      S2S_SELECT(add_up<double, S>)(g.slopes, n, per_head, 0, n, mutable_data<S>(grad_slopes));
    else
      std::memset(mutable_data<S>(grad_slopes), 0, static_cast<size_t>(n) * sizeof(S));
  }
  return {grad_query, grad_key, grad_value, grad_bias, grad_slopes};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& softmax, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& mask, const OptionalTensor& bias, const OptionalTensor& query_lengths,
    const OptionalTensor& key_lengths, const OptionalTensor& slopes, const OptionalTensor& seed, std::optional<int64_t> left,
    std::optional<int64_t> right, bool bottom_right, double dropout_p, std::optional<double> scale, std::optional<double> softcap,
    bool need_query, bool need_key, bool need_value, bool need_bias, bool need_slopes) {
  const char* op = "attention_backward";
  return dispatch_floating(op, "query", query, [&](auto zero) {
    return backward<decltype(zero)>(
        op, {query, key, value, mask, bias, query_lengths, key_lengths, slopes, seed, left, right, bottom_right, dropout_p, scale, softcap},
        grad_out, grad_lse, out, softmax, {need_query, need_key, need_value, need_bias, need_slopes});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_packed_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& softmax, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& query_starts, const Tensor& key_starts, const OptionalTensor& slopes,
    const OptionalTensor& seed, std::optional<int64_t> left, std::optional<int64_t> right, bool bottom_right, double dropout_p,
    std::optional<double> scale, std::optional<double> softcap, bool need_query, bool need_key, bool need_value, bool need_slopes) {
  const char* op = "attention_packed_backward";
  return dispatch_floating(op, "query", query, [&](auto zero) {
    const OptionalTensor none;
    const auto [grad_query, grad_key, grad_value, grad_bias, grad_slopes] =
        backward<decltype(zero)>(op,
                                 {query, key, value, none, none, none, none, slopes, seed, left, right, bottom_right, dropout_p, scale,
                                  softcap, &query_starts, &key_starts},
                                 grad_out, grad_lse, out, softmax, {need_query, need_key, need_value, false, need_slopes});
    return std::make_tuple(grad_query, grad_key, grad_value, grad_slopes);
  });
}

}  // namespace
}  // namespace s2s

STABLE_TORCH_LIBRARY_IMPL(s2s, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&s2s::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&s2s::attention_backward));
  m.impl("attention_packed_forward", TORCH_BOX(&s2s::attention_packed_forward));
  m.impl("attention_packed_backward", TORCH_BOX(&s2s::attention_packed_backward));
}
