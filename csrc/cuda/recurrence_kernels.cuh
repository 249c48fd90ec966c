// The persistent recurrences: one launch takes a whole call through time. recurrence_plan.h says how blocks share the work.
#pragma once
#include "recurrence_cells.cuh"
#include "recurrence_product.cuh"

namespace s2s::persistent {

// A block's place in its team, and what it does with others: the exchange of rows, and the barrier of a step.
template <Operand operand, bool cluster>
class RecurrenceBlock {
  using Words = device::Words;

 public:
  using Element = typename OperandType<operand>::Element;

  __device__ explicit RecurrenceBlock(const Recurrence& a) : a_(a), layout_(a.plan, a.shape), row_bytes_(a.shape.row_bytes()) {
    const int rank = cluster ? device::cluster_rank() : blockIdx.x % a.plan.team;
    team = blockIdx.x / a.plan.team;
    teams = gridDim.x / a.plan.team;
    first = rank * a.plan.units;
    units = min_of(a.plan.units, a.hidden - first);
    const int64_t exchanged = padded_rows(a.plan.rows) * row_bytes_;
    if constexpr (cluster) {
      rows_ = shared<unsigned char>(layout_.exchange);
      for (int i = threadIdx.x; i < 2 * exchanged / 16; i += blockDim.x) reinterpret_cast<Words*>(rows_)[i] = Words{};
      device::cluster_arrive();  // before others store here
      device::cluster_wait();
    } else {
      counter_ = reinterpret_cast<unsigned*>(a.workspace + team * counter_bytes);
      rows_ = a.workspace + a.plan.teams * counter_bytes + team * 2 * exchanged;
    }
    lengths = shared<int>(layout_.lengths);
  }

  __device__ static int min_of(int a, int b) { return a < b ? a : b; }
  template <class T>
  __device__ T* shared(int offset) const {
    return reinterpret_cast<T*>(device::shared_memory<unsigned char>() + offset);
  }
  __device__ const RecurrenceLayout& layout() const { return layout_; }
  __device__ int64_t row_bytes() const { return row_bytes_; }
  __device__ float* state(int which, int row, int unit) const {
    return shared<float>(layout_.state) + (which * a_.plan.rows + row) * a_.plan.units + unit;
  }

  // Of the exchanged rows, those that steps of this parity read.
  __device__ unsigned char* exchanged_rows(int parity) const { return rows_ + parity * padded_rows(a_.plan.rows) * row_bytes_; }
  __device__ void exchange(int parity, int row, int gate, int unit, float value) const {
    reinterpret_cast<Element*>(exchanged_rows(parity) + row * row_bytes_)[gate * a_.shape.gate_stride() + first + unit] =
        as_operand<operand>(value);
  }
  // Every block's values of this parity are there for all when this returns; meanwhile() is what needn't wait for them.
  template <class Meanwhile>
  __device__ void meet(int parity, int segments, const Meanwhile& meanwhile) {
    if constexpr (cluster) {
      device::block_sync();
      const int each = 16 / static_cast<int>(sizeof(Element)), vectors = (units > 0 ? units + each - 1 : 0) / each;
      const int count = rows * segments * vectors, peers = a_.plan.team - 1, own = static_cast<int>(device::cluster_rank());
      for (int i = threadIdx.x; i < count * peers; i += blockDim.x) {
        const int peer = i / count, at = i % count, vector = at % vectors, gate = at / vectors % segments, row = at / vectors / segments;
        Words* const here =
            reinterpret_cast<Words*>(exchanged_rows(parity) + row * row_bytes_) + (gate * a_.shape.gate_stride() + first) / each + vector;
        device::store_in_block(here, peer < own ? peer : peer + 1, *here);
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

  // Starts to copy what a step reads, for all rows.
  __device__ void feed(int step) const {
    const int each = a_.wide_copies ? 4 : 1, pieces = (units > 0 ? units : 0) / each, feeds = a_.shape.feeds, count = rows * feeds * pieces;
    for (int i = threadIdx.x; step >= 0 && i < count; i += blockDim.x) {
      const int unit = i % pieces * each, slot = i / pieces % feeds, row = i / pieces / feeds;
      if (step >= lengths[row]) continue;
      const RecurrenceFeed& from = a_.feeds[slot];
      const float* source;
      if (!from.before)
        source = from.data + position(row, step) * from.width;
      else if (!has_before(row, step, from.initial))
        continue;
      else
        source = step > 0 ? from.data + position(row, step - 1) * from.width : from.initial + (first_row + row) * from.width;
      if (each == 4)
        device::copy_words(fed(row, slot, unit), reinterpret_cast<const float*>(source + first + unit));
      else
        device::copy_word(fed(row, slot, unit), source + first + unit);
    }
  }
  __device__ float* fed(int row, int slot, int unit) const {
    return shared<float>(layout_.feeds) + (row * a_.shape.feeds + slot) * a_.plan.units + unit;
  }

  // The product's sum for one of the block's rows of the weights, over the warps that share K, in a fixed order.
  __device__ float summed(int weight_row, int column) const {
    const int block = a_.plan.warps_m * a_.shape.tiles() * tile_m * partial_row;
    const float* from = shared<float>(layout_.partial) + weight_row * partial_row + column;
    float sum = from[0];
#pragma unroll
    for (int i = 1; i < most_threads / warp; ++i)  // unrolled, so that no load waits for another
      if (i < a_.plan.warps_k) sum += from[i * block];
    return sum;
  }
  __device__ float* partial(int warp_k, int warp_m) const {
    return shared<float>(layout_.partial) + (warp_k * a_.plan.warps_m + warp_m) * a_.shape.tiles() * tile_m * partial_row;
  }

  int team, teams, first, units, rows = 0;
  int64_t first_row = 0;
  int* lengths;

 private:
  const Recurrence& a_;
  const RecurrenceLayout layout_;
  const int64_t row_bytes_;
  unsigned char* rows_;
  unsigned *counter_ = nullptr, target_ = 0;
};

// The warps of a block over a product, and the weights that each keeps.
template <Operand operand, bool cluster, int tiles, int held>
class BlockProduct {
  using Block = RecurrenceBlock<operand, cluster>;

 public:
  template <class Weight>
  __device__ BlockProduct(const Recurrence& a, const Block& block, const Weight& weight)
      : block_(block),
        index_(threadIdx.x / warp),
        warp_m_(index_ % a.plan.warps_m),
        warp_k_(index_ / a.plan.warps_m),
        each_((a.shape.blocks_k() + a.plan.warps_k - 1) / a.plan.warps_k),
        product_(weight, warp_m_ * tiles * tile_m, warp_k_ * each_, count(a.shape.blocks_k()), rest(held)) {}

  __device__ void run(int parity, int first_row) const {
    product_.run(block_.exchanged_rows(parity) + first_row * block_.row_bytes(), block_.row_bytes(), block_.rows - first_row,
                 block_.partial(warp_k_, warp_m_));
  }

 private:
  __device__ int count(int blocks) const {
    const int left = blocks - warp_k_ * each_;
    return left < 0 ? 0 : left < each_ ? left : each_;
  }
  __device__ device::Words* rest(int kept) const {
    const int own = each_ > kept ? each_ - kept : 0;
    return block_.template shared<device::Words>(block_.layout().weights) + index_ * own * tiles * 2 * warp;
  }

  const Block& block_;
  const int index_, warp_m_, warp_k_, each_;
  const WarpProduct<operand, cluster, tiles, held> product_;
};

// Shared memory: RecurrenceLayout. Blocks: teams * team, in clusters of a team or all resident at once; threads: the plan's warps.
template <Operand operand, bool cluster, int held>
__global__ void __launch_bounds__(most_threads, 1) recurrence_forward(const __grid_constant__ RecurrenceForward a) {
  RecurrenceBlock<operand, cluster> block(a);
  using Element = typename RecurrenceBlock<operand, cluster>::Element;
  const int H = a.hidden, U = a.plan.units, G = a.shape.gates;
  // The block's rows of the weights are gate by gate, units * G of them.
  const BlockProduct<operand, cluster, 2, held> product(a, block, [&](int row, int k) {
    const int gate = row / U, unit = row % U, count = gate < G && unit < block.units ? H - k : 0;
    const auto* const rows = static_cast<const Element*>(a.weight_hh) + (static_cast<int64_t>(gate) * H + block.first + unit) * H;
    return WeightRun<Element>{rows + k, 1, count};
  });

  for (int64_t begin = static_cast<int64_t>(block.team) * a.plan.rows; begin < a.batch;
       begin += static_cast<int64_t>(block.teams) * a.plan.rows) {
    const int steps = block.enter(begin);
    // What the step to come sees of a state: h, as the product's operand, and c.
    const auto hand_on = [&](int row, int unit, int step, float h, float c) {
      if (step < block.lengths[row] && block.starts(row, step)) h = c = 0.f;
      *block.state(0, row, unit) = h;
      *block.state(1, row, unit) = c;
      if (a.mask) h *= a.mask[(begin + row) * H + block.first + unit];
      block.exchange(step % 2, row, 0, unit, h);
    };
    for (int i = threadIdx.x; i < block.rows * U; i += blockDim.x) {
      const int row = i / U, unit = i % U;
      if (unit >= block.units) continue;
      const int64_t at = (begin + row) * H + block.first + unit;
      const float h = a.h0 ? a.h0[at] : 0.f, c = a.c0 ? a.c0[at] : 0.f;
      if (block.lengths[row] == 0) {
        a.h_n[at] = h;
        if (a.c_n) a.c_n[at] = c;
      }
      hand_on(row, unit, 0, h, c);
    }
    block.meet(0, 1, [&] { block.feed(0); });
    for (int step = 0; step < steps; ++step) {
      for (int first = 0; first < block.rows; first += columns) {
        product.run(step % 2, first);
        device::copies_wait();
        device::block_sync();
        const int here = block.rows - first < columns ? block.rows - first : columns;
        for (int i = threadIdx.x; i < here * U; i += blockDim.x) {
          const int column = i / U, row = first + column, unit = i % U;
          if (unit >= block.units || step >= block.lengths[row]) continue;
          const int64_t position = block.position(row, step);
          float gate[4], recurrent[4];
#pragma unroll
          for (int g = 0; g < 4; ++g) {
            gate[g] = recurrent[g] = 0.f;
            if (g >= G) continue;
            gate[g] = *block.fed(row, g, unit);
            recurrent[g] = block.summed(g * U + unit, column);
            if (a.bias_hh) recurrent[g] += a.bias_hh[g * H + block.first + unit];
          }
          const float h_before = *block.state(0, row, unit), c_before = *block.state(1, row, unit);
          float h, c = c_before;
          if (a.cell == Cell::lstm)
            h = lstm_step(gate, recurrent, c);
          else if (a.cell == Cell::gru)
            h = gru_step(gate, recurrent, h_before);
          else
            h = rnn_step(gate, recurrent, a.cell == Cell::rnn_relu);
          const int at = block.first + unit;
          c = blended(new_share(a, stream_c, position, at), c_before, c);
          h = blended(new_share(a, stream_h, position, at), h_before, h);
          static_cast<Element*>(a.output)[position * H + at] = device::rounded<Element>(h);
#pragma unroll
          for (int g = 0; g < 4; ++g)
            if (a.gates && g < G) a.gates[(position * G + g) * H + at] = gate[g];
          if (a.extra) a.extra[position * H + at] = a.cell == Cell::lstm ? c : recurrent[2];
          if (a.exact) a.exact[position * H + at] = h;
          if (step == block.lengths[row] - 1) {
            a.h_n[(begin + row) * H + at] = h;
            if (a.c_n) a.c_n[(begin + row) * H + at] = c;
          }
          hand_on(row, unit, step + 1, h, c);
        }
        if (first + columns < block.rows) device::block_sync();  // the sums' memory is the next pass's
      }
      block.meet((step + 1) % 2, 1, [&] { block.feed(step + 1); });
    }
  }
}

template <Operand operand, bool cluster, int held>
__global__ void __launch_bounds__(most_threads, 1) recurrence_backward(const __grid_constant__ RecurrenceBackward a) {
  RecurrenceBlock<operand, cluster> block(a);
  using Element = typename RecurrenceBlock<operand, cluster>::Element;
  const int H = a.hidden, U = a.plan.units, G = a.shape.gates, stride = a.shape.gate_stride();
  // The block's rows of W_hh^T are its units.
  const BlockProduct<operand, cluster, 1, held> product(a, block, [&](int unit, int k) {
    const int gate = k / stride, from = k % stride, count = gate < G && unit < block.units ? H - from : 0;
    const auto* const columns = static_cast<const Element*>(a.weight_hh) + block.first + unit;
    return WeightRun<Element>{columns + (static_cast<int64_t>(gate) * H + from) * H, H, count};
  });

  int turn = 0;  // goes on from rows to rows: others may still read what the last step before exchanged
  for (int64_t begin = static_cast<int64_t>(block.team) * a.plan.rows; begin < a.batch;
       begin += static_cast<int64_t>(block.teams) * a.plan.rows) {
    const int steps = block.enter(begin);
    for (int i = threadIdx.x; i < block.rows * U; i += blockDim.x) {
      const int row = i / U, unit = i % U;
      if (unit >= block.units) continue;
      const int64_t at = (begin + row) * H + block.first + unit;
      const float dh = a.grad_h ? a.grad_h[at] : 0.f, dc = a.grad_c ? a.grad_c[at] : 0.f;
      *block.state(0, row, unit) = dh;
      *block.state(1, row, unit) = dc;
      if (block.lengths[row] > 0) continue;
      a.grad_h0[at] = dh;
      if (a.grad_c0) a.grad_c0[at] = dc;
    }
    block.feed(steps - 1);
    for (int step = steps - 1; step >= 0; --step, turn ^= 1) {
      device::copies_wait();
      device::block_sync();
      for (int i = threadIdx.x; i < block.rows * U; i += blockDim.x) {
        const int row = i / U, unit = i % U, at = block.first + unit;
        if (unit >= block.units || step >= block.lengths[row]) continue;
        const int64_t position = block.position(row, step);
        float dh = *block.state(0, row, unit) + *block.fed(row, 0, unit), dc = *block.state(1, row, unit);
        float gate[4], recurrent_n = 0.f;
#pragma unroll
        for (int g = 0; g < 4; ++g) gate[g] = g < G ? *block.fed(row, 1 + g, unit) : 0.f;
        const float share_h = new_share(a, stream_h, position, at), share_c = new_share(a, stream_c, position, at);
        float direct = (1.f - share_h) * dh;  // what reaches h of the step before without the product
        dh *= share_h;
        if (a.cell == Cell::lstm) {
          const float c_before = block.has_before(row, step, a.c0) ? *block.fed(row, 5, unit) : 0.f;
          const float kept = (1.f - share_c) * dc;
          dc *= share_c;
          lstm_gradient(gate, c_before, dh, dc);
          dc += kept;
        } else if (a.cell == Cell::gru) {
          const float h_before = block.has_before(row, step, a.h0) ? *block.fed(row, 5, unit) : 0.f;
          direct += dh * gate[1];
          recurrent_n = gru_gradient(gate, *block.fed(row, 4, unit), h_before, dh);
        } else {
          rnn_gradient(gate, dh, a.cell == Cell::rnn_relu);
        }
        const bool starts = block.starts(row, step);
        *block.state(0, row, unit) = starts ? 0.f : direct;
        *block.state(1, row, unit) = starts ? 0.f : dc;
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= G) continue;
          const float recurrent = a.cell == Cell::gru && g == 2 ? recurrent_n : gate[g];
          a.grad_inputs[(position * G + g) * H + at] = gate[g];
          if (a.grad_recurrent) a.grad_recurrent[(position * G + g) * H + at] = recurrent;
          block.exchange(turn, row, g, unit, recurrent);
        }
      }
      block.meet(turn, G, [&] { block.feed(step - 1); });
      for (int first = 0; first < block.rows; first += columns) {
        product.run(turn, first);
        device::block_sync();
        const int here = block.rows - first < columns ? block.rows - first : columns;
        for (int i = threadIdx.x; i < here * U; i += blockDim.x) {
          const int column = i / U, row = first + column, unit = i % U;
          if (unit >= block.units || step >= block.lengths[row]) continue;
          const int64_t at = (begin + row) * H + block.first + unit;
          float dh = *block.state(0, row, unit);
          if (!block.starts(row, step)) dh = fmaf(block.summed(unit, column), a.mask ? a.mask[at] : 1.f, dh);
          *block.state(0, row, unit) = dh;
          if (step > 0) continue;
          a.grad_h0[at] = dh;
          if (a.grad_c0) a.grad_c0[at] = *block.state(1, row, unit);
        }
        if (first + columns < block.rows) device::block_sync();
      }
    }
  }
}

}  // namespace s2s::persistent
