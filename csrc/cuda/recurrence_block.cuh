// A block of the persistent recurrences: its place in a team, its part of the exchange and of products, what it reads ahead.
#pragma once
#include "recurrence_cells.cuh"
#include "recurrence_product.cuh"

namespace s2s::persistent {

// The units of H or of P that a block has; 0 or fewer of them where others have all. And which of them a thread has in every step: one, in
// every so-manieth row of a tile. That is found once: a division takes as long as half of a unit's arithmetic.
struct OwnUnits {
  static constexpr int never = 1 << 20;  // a row that no tile has

  int first, count, unit, row, rows;
  __device__ OwnUnits(int rank, int each, int all)
      : first(rank * each),
        count(each < all - first ? each : all - first),
        unit(threadIdx.x % each),
        row(unit < count && threadIdx.x / each < blockDim.x / each ? threadIdx.x / each : never),
        rows(blockDim.x / each) {}
};

// Rows that every block of a team writes its units of, for a product to read whole. In two turns, or in one where another exchange lies
// between a read and the write after it.
template <Operand operand>
struct Exchange {
  using Element = typename OperandType<operand>::Element;
  static constexpr int each = 16 / static_cast<int>(sizeof(Element));

  unsigned char* rows;
  int turn_bytes, row_bytes, stride, segments;
  OwnUnits own;
  // What a thread sends to other blocks of a cluster: one of the block's vectors of 16 bytes, in one of a tile's rows, to every so-manieth.
  struct Sender {
    int items, of_row, item, row, at, peer, peers;
  } sender;

  __device__ Exchange(unsigned char* rows, int64_t turn_bytes, const ExchangedRow& kind, const OwnUnits& own, int most, int tile)
      : rows(rows),
        turn_bytes(static_cast<int>(turn_bytes)),
        row_bytes(static_cast<int>(kind.row_bytes())),
        stride(kind.stride()),
        segments(kind.segments),
        own(own) {
    const int of_row = segments * ((most + each - 1) / each), items = tile * of_row, threads = blockDim.x;
    const int item = items < threads ? threadIdx.x % items : threadIdx.x, peers = items < threads ? threads / items : 1;
    const int peer = items < threads ? threadIdx.x / items : 0;
    sender = {items, of_row, peer < peers ? item : OwnUnits::never, item / of_row, 0, peer, peers};
    sender.at = at(item);
  }
  // The place in a row of one of the items, in vectors; below 0: nothing of the block's is there.
  __device__ int at(int item) const {
    const int vectors = sender.of_row / segments, vector = item % sender.of_row % vectors;
    return vector * each < own.count ? (item % sender.of_row / vectors * stride + own.first) / each + vector : -1;
  }

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
    const int vectors = most_own() / (a.wide_copies ? 4 : 1), each_row = vectors * a.shape.feeds, threads = blockDim.x;
    feed_rows_ = each_row < threads ? threads / each_row : 1;
    feed_row_ = threadIdx.x / each_row < feed_rows_ ? threadIdx.x / each_row : each_row < threads ? OwnUnits::never : 0;
    feed_column_ = each_row < threads ? threadIdx.x % each_row : threadIdx.x;
    feed_slot_ = feed_column_ / vectors;
    feed_vector_ = feed_column_ % vectors;
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
  // Numbers of a unit that are the same in every step: those of memory would have to be read anew after each barrier.
  __device__ float* constant(int which, int unit) const { return shared<float>(layout_.constants) + which * most_own() + unit; }
  // `count` of them, from `which` on, of data (count, units); nothing where there is no data.
  __device__ void read_constants(int which, const float* data, int count, int64_t stride, const OwnUnits& own) const {
    for (int unit = threadIdx.x; data && unit < own.count; unit += blockDim.x)
      for (int i = 0; i < count; ++i) *constant(which + i, unit) = data[i * stride + own.first + unit];
  }
  __device__ void read_norms(const OwnUnits& own) const {
    read_constants(norm_hh, a_.norm_hh, a_.shape.gates, a_.hidden, own);
    read_constants(norm_c, a_.norm_c, 1, 0, own);
    read_constants(norm_b, a_.norm_b, 1, 0, own);
  }
  // Numbers of a unit that outlast a barrier.
  __device__ float* kept(int row, int which, int unit) const {
    return shared<float>(layout_.kept) + (row * a_.shape.kept() + which) * most_own() + unit;
  }

  __device__ Exchange<operand> recurrent() const {
    const ExchangedRow row = a_.shape.recurrent();
    return {rows_, exchanged_bytes(a_.plan, row), row, a_.shape.backward ? of_hidden : of_width, most_own(), a_.plan.rows};
  }
  __device__ Exchange<operand> projection() const {
    unsigned char* const rows = rows_ + 2 * exchanged_bytes(a_.plan, a_.shape.recurrent());
    return {rows, 0, a_.shape.projection(), a_.shape.backward ? of_width : of_hidden, most_own(), a_.plan.rows};
  }
  // Every block's values are there for all when this returns; meanwhile() is what needn't wait for them.
  template <class Meanwhile>
  __device__ void meet(const Exchange<operand>& exchange, int turn, const Meanwhile& meanwhile) {
    if constexpr (cluster) {
      device::block_sync();
      const int peers = a_.plan.team - 1;
      for (int i = exchange.sender.item; i < exchange.sender.items; i += blockDim.x) {
        const bool known = i == exchange.sender.item;
        const int row = known ? exchange.sender.row : i / exchange.sender.of_row, at = known ? exchange.sender.at : exchange.at(i);
        if (row >= rows || at < 0) continue;
        Words* const here = reinterpret_cast<Words*>(exchange.row(turn, row)) + at;
        const Words value = *here;
        for (int peer = exchange.sender.peer; peer < peers; peer += exchange.sender.peers)
          device::store_in_block(here, peer < rank ? peer : peer + 1, value);
      }
      device::cluster_arrive();
      meanwhile();
      device::cluster_wait();
    } else {
      device::block_sync();
      target_ += a_.plan.team;
      const bool speaks = threadIdx.x == blockDim.x - 1;  // of the warp that has least to do meanwhile
      if (speaks) device::arrive(counter_);
      meanwhile();
      if (speaks) {
        while (static_cast<int>(device::arrived(counter_) - target_) < 0) {
        }
      }
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
  // Whether the state is zeroed between the step before and this one: as memory has it, and of a step that was read ahead.
  __device__ bool starts_in_memory(int row, int step) const {
    if (!a_.reset) return false;
    const int t = time(row, step);
    const bool* const flags = a_.reset + (first_row + row) * a_.time;
    return a_.reverse ? t + 1 < lengths[row] && flags[t + 1] : flags[t];
  }
  __device__ bool starts(int row, int step) const { return a_.reset && starting(row, step)[0]; }
  __device__ bool has_before(int row, int step, const float* initial) const { return !starts(row, step) && (step > 0 || initial); }

  // Does item(row, unit) for units of the block in rows [first, end) that take the step.
  template <class Item>
  __device__ void each_unit(const OwnUnits& own, int first, int end, int step, const Item& item) const {
#pragma unroll 1
    for (int row = first + own.row; row < end; row += own.rows)
      if (step < lengths[row]) item(row, own.unit);
  }

  // Starts to copy what a step reads, for all rows: one commit, of nothing where there is no such step.
  __device__ void feed(int step) const {
    const int each = a_.wide_copies ? 4 : 1, vectors = most_own() / each, each_row = vectors * a_.shape.feeds;
#pragma unroll 1
    for (int column = feed_column_; step >= 0 && column < each_row; column += blockDim.x) {
      const bool first = !extended && column == feed_column_;  // registers are short in extended kernels
      const int slot = first ? feed_slot_ : column / vectors, unit = (first ? feed_vector_ : column % vectors) * each;
      const RecurrenceFeed& from = a_.feeds[slot];
      const bool wide = extended && from.of_width;
      if (unit >= (wide ? of_width.count : of_hidden.count)) continue;
#pragma unroll 1
      for (int row = feed_row_; row < rows; row += feed_rows_) {
        if (step >= lengths[row]) continue;
        const float* source;
        if (!from.before)
          source = from.data + position(row, step) * from.stride;
        else if (step == 0 && !from.initial)
          continue;
        else
          source = step > 0 ? from.data + position(row, step - 1) * from.stride : from.initial + (first_row + row) * from.stride;
        source += (wide ? of_width.first : of_hidden.first) + unit;
        if (each == 4)
          device::copy_words(fed(step, row, slot, unit), source);
        else
          device::copy_word(fed(step, row, slot, unit), source);
      }
    }
    if constexpr (extended)
      for (int i = threadIdx.x; step >= 0 && a_.scales && i < rows * scales_of_row; i += blockDim.x) {
        const int row = i / scales_of_row, number = i % scales_of_row;
        if (step < lengths[row]) device::copy_word(scale(step, row) + number, a_.scales + position(row, step) * a_.normed_row + number);
      }
    if (a_.reset && step >= 0)
      for (int row = threadIdx.x; row < rows; row += blockDim.x)
        if (step < lengths[row]) *starting(row, step) = starts_in_memory(row, step);
    device::copies_commit();
  }
  __device__ float* fed(int step, int row, int slot, int unit) const {
    return shared<float>(layout_.feeds) + ((step % feed_turns * a_.plan.rows + row) * a_.shape.feeds + slot) * most_own() + unit;
  }
  // The `Scale`s of a row, read ahead too.
  __device__ float* scale(int step, int row) const { return shared<float>(layout_.scales) + (step % feed_turns * a_.plan.rows + row) * 4; }

  // What a step gives memory. A block that arrives waits until its own stores have been answered: they come after it has arrived.
  __device__ device::Four* written(int row, int unit) const {
    return shared<device::Four>(layout_.written) + (row * most_own() + unit) * written_fours(extended);
  }

  __device__ int most_own() const { return extended ? most_units(a_.plan) : a_.plan.units; }

  const int rank, team, teams;
  const OwnUnits of_hidden, of_width;
  int rows = 0;
  int64_t first_row = 0;
  int* lengths;
  device::Pair* pairs;  // in shared memory of a cluster's blocks, in global memory of a grid's

 private:
  // Backward asks for its step after it has begun to read two steps ahead.
  __device__ int* starting(int row, int step) const { return lengths + (1 + step % (feed_turns + 1)) * a_.plan.rows + row; }

  const Recurrence& a_;
  const RecurrenceLayout layout_;
  int feed_rows_, feed_row_, feed_column_, feed_slot_, feed_vector_;
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

  // The sums for one of the block's rows of the weights, and for those that follow it `apart`, `count` in all, over the warps that share K,
  // in a fixed order; others of `sums` mean nothing.
  template <int most>
  __device__ void summed(int weight_row, int apart, int count, int column, float (&sums)[most]) const {
    const float* const from = partial_ + weight_row * partial_row + column;
    const int next = device::in_register(warps_m_ * tiles * tile_m * partial_row);
    int other[most];
#pragma unroll
    for (int g = 0; g < most; ++g) other[g] = device::in_register(g < count ? g * apart * partial_row : 0);
    // Unrolled for the usual numbers, so that no load waits for another.
    if (warps_k_ == 8)
      add<8>(from, next, other, sums);
    else if (warps_k_ == 4)
      add<4>(from, next, other, sums);
    else
      add<1>(from, next, other, sums);
  }
  __device__ float summed(int weight_row, int column) const {
    float sum[1];
    summed(weight_row, 0, 1, column, sum);
    return sum[0];
  }

 private:
  template <int unrolled, int most>
  __device__ void add(const float* from, int next, const int (&other)[most], float (&sums)[most]) const {
#pragma unroll
    for (int g = 0; g < most; ++g) sums[g] = from[other[g]];
#pragma unroll unrolled
    for (int i = 1; i < (unrolled > 1 ? unrolled : warps_k_); ++i)
#pragma unroll
      for (int g = 0; g < most; ++g) sums[g] += from[i * next + other[g]];
  }
  __device__ int count(const ProductShape& shape) const {
    const int left = warp_k_ < warps_k_ ? shape.blocks_k - warp_k_ * shape.each() : 0;
    return left < 0 ? 0 : left < shape.each() ? left : shape.each();
  }

  const int warps_m_, warps_k_, warp_m_, warp_k_;
  float* const partial_;
  const WarpProduct<operand, cluster, tiles, held> product_;
};

}  // namespace s2s::persistent
