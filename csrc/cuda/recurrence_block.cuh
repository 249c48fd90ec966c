// A block of the persistent recurrences: its place in a team, its part of the exchange and of products, what it reads ahead.
#pragma once
#include "recurrence_cells.cuh"
#include "recurrence_product.cuh"

namespace s2s::persistent {

// The units of H or of P that a block has; 0 or fewer of them where others have all.
struct OwnUnits {
  int first, count;
  __device__ OwnUnits(int rank, int each, int all) : first(rank * each), count(each < all - first ? each : all - first) {}
};

// Rows that every block of a team writes its units of, for a product to read whole. In two turns, or in one where another exchange lies
// between a read and the write after it.
template <Operand operand>
struct Exchange {
  using Element = typename OperandType<operand>::Element;

  unsigned char* rows;
  int turn_bytes, row_bytes, stride, segments;
  OwnUnits own;

  __device__ unsigned char* row(int turn, int row) const { return rows + turn * turn_bytes + row * row_bytes; }
  __device__ void put(int turn, int at, int segment, int unit, float value) const {
    reinterpret_cast<Element*>(row(turn, at))[segment * stride + own.first + unit] = as_operand<operand>(value);
  }
};

// extended: for layer normalisation, a projection or both; which, the arguments say.
template <Operand operand, bool cluster, bool extended>
class RecurrenceBlock {
  using Words = device::Words;

 public:
  using Element = typename OperandType<operand>::Element;

  __device__ explicit RecurrenceBlock(const Recurrence& a)
      : rank(cluster ? device::cluster_rank() : blockIdx.x % a.plan.team),
        team(blockIdx.x / a.plan.team),
        teams(gridDim.x / a.plan.team),
        of_hidden(rank, a.plan.units, a.hidden),
        of_width(extended ? OwnUnits(rank, a.plan.width_units, a.width) : of_hidden),
        a_(a),
        layout_(a.plan, a.shape) {
    const int64_t both = 2 * exchanged_bytes(a.plan, a.shape.recurrent());
    const int64_t projected = extended && a.shape.projected ? exchanged_bytes(a.plan, a.shape.projection()) : 0;
    if constexpr (cluster) {
      rows_ = shared<unsigned char>(layout_.exchange);
      for (int i = threadIdx.x; i < (both + projected) / 16; i += blockDim.x) reinterpret_cast<Words*>(rows_)[i] = Words{};
      pairs = shared<device::Pair>(layout_.pairs);
      device::cluster_arrive();  // before others store here
      device::cluster_wait();
    } else {
      counter_ = reinterpret_cast<unsigned*>(a.workspace + team * counter_bytes);
      rows_ = a.workspace + a.plan.teams * counter_bytes + team * team_bytes(a.plan, a.shape);
      pairs = reinterpret_cast<device::Pair*>(rows_ + both + projected);
    }
    lengths = shared<int>(layout_.lengths);
  }

  template <class T>
  __device__ T* shared(int offset) const {
    return reinterpret_cast<T*>(device::shared_memory<unsigned char>() + offset);
  }
  __device__ const RecurrenceLayout& layout() const { return layout_; }
  // The states: h, or its gradient, of units of P; c, or its gradient; then those of an LSTM's normalisation.
  __device__ float* state(int which, int row, int unit) const {
    return shared<float>(layout_.state) + (which * a_.plan.rows + row) * most_own() + unit;
  }
  // Numbers of a unit that outlast a barrier.
  __device__ float* kept(int row, int which, int unit) const {
    return shared<float>(layout_.kept) + (row * a_.shape.kept() + which) * most_own() + unit;
  }

  __device__ Exchange<operand> recurrent() const {
    const ExchangedRow row = a_.shape.recurrent();
    return {rows_,        static_cast<int>(exchanged_bytes(a_.plan, row)), static_cast<int>(row.row_bytes()), row.stride(),
            row.segments, a_.shape.backward ? of_hidden : of_width};
  }
  __device__ Exchange<operand> projection() const {
    const ExchangedRow row = a_.shape.projection();
    unsigned char* const rows = rows_ + 2 * exchanged_bytes(a_.plan, a_.shape.recurrent());
    return {rows, 0, static_cast<int>(row.row_bytes()), row.stride(), 1, a_.shape.backward ? of_width : of_hidden};
  }
  // Every block's values are there for all when this returns; meanwhile() is what needn't wait for them.
  template <class Meanwhile>
  __device__ void meet(const Exchange<operand>& exchange, int turn, const Meanwhile& meanwhile) {
    if constexpr (cluster) {
      device::block_sync();
      const int each = 16 / static_cast<int>(sizeof(Element)),
                vectors = (exchange.own.count > 0 ? exchange.own.count + each - 1 : 0) / each;
      const int segments = exchange.segments, count = rows * segments * vectors, peers = a_.plan.team - 1;
      for (int i = threadIdx.x; i < count * peers; i += blockDim.x) {
        const int peer = i / count, at = i % count, vector = at % vectors, segment = at / vectors % segments, row = at / vectors / segments;
        Words* const here =
            reinterpret_cast<Words*>(exchange.row(turn, row)) + (segment * exchange.stride + exchange.own.first) / each + vector;
        device::store_in_block(here, peer < rank ? peer : peer + 1, *here);
      }
#ifdef S2S_FORGET_THE_STEPS_BARRIER
      meanwhile();
#else
      device::cluster_arrive();
      meanwhile();
      device::cluster_wait();
#endif
    } else {
      device::block_sync();
#ifdef S2S_FORGET_THE_STEPS_BARRIER
      meanwhile();
#else
      target_ += a_.plan.team;
      if (threadIdx.x == 0) device::arrive(counter_);
      meanwhile();
      if (threadIdx.x == 0) {
        while (static_cast<int>(device::arrived(counter_) - target_) < 0) {
        }
      }
#endif
      device::block_sync();
    }
  }

  // A pass's exchanged rows, from `first` on, as products read them: a grid's in shared memory, where the plan has them there.
  __device__ const unsigned char* ready(const Exchange<operand>& exchange, int turn, int first) const {
    const unsigned char* const from = exchange.row(turn, first);
    if (cluster || !a_.plan.staged) return from;
    auto* const to = shared<unsigned char>(layout_.exchange);
    const int count = columns * exchange.row_bytes / 16, apart = blockDim.x;
#pragma unroll 1
    for (int begin = threadIdx.x; begin < count; begin += row_group * apart) {
      Words words[row_group];
#pragma unroll
      for (int i = 0; i < row_group; ++i)
        if (begin + i * apart < count) words[i] = device::load_coherent(from + static_cast<int64_t>(begin + i * apart) * 16);
#pragma unroll
      for (int i = 0; i < row_group; ++i)
        if (begin + i * apart < count) reinterpret_cast<Words*>(to)[begin + i * apart] = words[i];
    }
    device::block_sync();
    return to;
  }

  // Begins with the rows of the batch from `begin` on; returns the steps of the longest.
  __device__ int enter(int64_t begin) {
    first_row = begin;
    rows = static_cast<int>(a_.batch - begin < a_.plan.rows ? a_.batch - begin : a_.plan.rows);
    device::block_sync();  // others may still read the lengths of the rows before
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      int64_t length = a_.time;
      if (a_.lengths) length = a_.lengths[begin + row];
      lengths[row] = static_cast<int>(length < 0 ? 0 : length > a_.time ? a_.time : length);
    }
    device::block_sync();
    int steps = 0;
    for (int row = 0; row < rows; ++row) steps = lengths[row] > steps ? lengths[row] : steps;
    return steps;
  }

  // Step s of a row is at this time; b T + t.
  __device__ int time(int row, int step) const { return a_.reverse ? lengths[row] - 1 - step : step; }
  __device__ int64_t position(int row, int step) const { return (first_row + row) * a_.time + time(row, step); }
  // Whether the state is zeroed between the step before and this one.
  __device__ bool starts(int row, int step) const {
    if (!a_.reset) return false;
    const int t = time(row, step);
    const bool* const flags = a_.reset + (first_row + row) * a_.time;
    return a_.reverse ? t + 1 < lengths[row] && flags[t + 1] : flags[t];
  }
  __device__ bool has_before(int row, int step, const float* initial) const { return !starts(row, step) && (step > 0 || initial); }

  // Does item(row, unit) for the block's own units in rows [first, end) that take the step.
  template <class Item>
  __device__ void each_unit(const OwnUnits& own, int units, int first, int end, int step, const Item& item) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < (end - first) * units; i += blockDim.x) {
      const int row = first + i / units, unit = i % units;
      if (unit < own.count && step < lengths[row]) item(row, unit);
    }
  }

  // Starts to copy what a step reads, for all rows.
  __device__ void feed(int step) const {
    const int each = a_.wide_copies ? 4 : 1, most = most_own() / each, feeds = a_.shape.feeds, count = rows * feeds * most;
    for (int i = threadIdx.x; step >= 0 && i < count; i += blockDim.x) {
      const int unit = i % most * each, slot = i / most % feeds, row = i / most / feeds;
      if (step >= lengths[row]) continue;
      const RecurrenceFeed& from = a_.feeds[slot];
      const bool wide = extended && from.of_width;
      if (unit >= (wide ? of_width.count : of_hidden.count)) continue;
      const float* source;
      if (!from.before)
        source = from.data + position(row, step) * from.stride;
      else if (!has_before(row, step, from.initial))
        continue;
      else
        source = step > 0 ? from.data + position(row, step - 1) * from.stride : from.initial + (first_row + row) * from.stride;
      source += (wide ? of_width.first : of_hidden.first) + unit;
      if (each == 4)
        device::copy_words(fed(row, slot, unit), source);
      else
        device::copy_word(fed(row, slot, unit), source);
    }
    if constexpr (extended)
      for (int i = threadIdx.x; step >= 0 && a_.scales && i < rows * scales_of_row; i += blockDim.x) {
        const int row = i / scales_of_row, number = i % scales_of_row;
        if (step < lengths[row]) device::copy_word(scale(row) + number, a_.scales + position(row, step) * a_.normed_row + number);
      }
  }
  __device__ float* fed(int row, int slot, int unit) const {
    return shared<float>(layout_.feeds) + (row * a_.shape.feeds + slot) * most_own() + unit;
  }

  // The `Scale`s of a row, read ahead too.
  __device__ float* scale(int row) const { return shared<float>(layout_.scales) + row * 4; }

  __device__ int most_own() const { return extended ? most_units(a_.plan) : a_.plan.units; }

  const int rank, team, teams;
  const OwnUnits of_hidden, of_width;
  int rows = 0;
  int64_t first_row = 0;
  int* lengths;
  device::Pair* pairs;  // in shared memory of a cluster's blocks, in global memory of a grid's

 private:
  const Recurrence& a_;
  const RecurrenceLayout layout_;
  unsigned char* rows_;
  unsigned *counter_ = nullptr, target_ = 0;
};

// The warps of a block over a product, and the weights that each keeps. Warps that it has no work for do nothing.
template <Operand operand, bool cluster, int tiles, int held>
class BlockProduct {
 public:
  // weights: the block's shared memory for them; partial: that for sums over the warps' K.
  template <class Weight>
  __device__ BlockProduct(const ProductShape& shape, device::Words* weights, float* partial, const Weight& weight)
      : warps_m_(shape.warps_m),
        warps_k_(shape.warps_k),
        warp_m_(warps_m_ > 0 ? threadIdx.x / warp % warps_m_ : 0),
        warp_k_(warps_m_ > 0 ? threadIdx.x / warp / warps_m_ : 0),
        partial_(partial),
        product_(weight, warp_m_ * tiles * tile_m, warp_k_ * shape.each(), count(shape),
                 weights + threadIdx.x / warp * shape.rest() * tiles * 2 * warp) {}

  // Of a pass's columns: the rows of the batch from the first on, `here` at most.
  __device__ void run(const unsigned char* rows, int row_bytes, int here) const {
    if (warp_k_ < warps_k_) product_.run(rows, row_bytes, here, partial_ + (warp_k_ * warps_m_ + warp_m_) * tiles * tile_m * partial_row);
  }

  // The sum for one of the block's rows of the weights, over the warps that share K, in a fixed order.
  __device__ float summed(int weight_row, int column) const {
    const int block = warps_m_ * tiles * tile_m * partial_row;
    const float* from = partial_ + weight_row * partial_row + column;
    float sum = from[0];
#pragma unroll
    for (int i = 1; i < most_threads / warp; ++i)  // unrolled, so that no load waits for another
      if (i < warps_k_) sum += from[i * block];
    return sum;
  }

 private:
  __device__ int count(const ProductShape& shape) const {
    const int left = warp_k_ < warps_k_ ? shape.blocks_k - warp_k_ * shape.each() : 0;
    return left < 0 ? 0 : left < shape.each() ? left : shape.each();
  }

  const int warps_m_, warps_k_, warp_m_, warp_k_;
  float* const partial_;
  const WarpProduct<operand, cluster, tiles, held> product_;
};

}  // namespace s2s::persistent
