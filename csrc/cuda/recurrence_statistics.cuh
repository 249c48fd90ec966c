// Sums over whole rows of the batch, of which each block of a team has some units: what layer normalisation needs within a step.
//
// Each block sends every other the two numbers that it makes of its units of a row, in one word of eight bytes, and each adds up the
// team's in the same order, so that all get the same bits; half a warp takes a row. In a cluster the words go into shared memory and a
// barrier of the cluster follows. In a grid they go through L2, and one bit of the second number says in which turn it was written: who
// waits for a word reads it until it is of this turn, and no barrier is needed. In two turns, since a block may be one exchange ahead of
// another.
#pragma once
#include "recurrence_block.cuh"

namespace s2s::persistent {

template <Operand operand, bool cluster>
class RowStatistics {
  using Block = RecurrenceBlock<operand, cluster, true>;

 public:
  __device__ RowStatistics(const Recurrence& a, const Block& block) : a_(a), block_(block) {}

  // What comes of a row, by its place: the mean and 1 / deviation, or two sums.
  __device__ float* of(int row) const { return block_.template shared<float>(block_.layout().moments) + row * 4; }

  // The mean and the squares' sum about it of the block's own values of each row, the first `kinds` that it keeps of each unit, to all.
  // slot: 0 or 1, of which each is sent once a step.
  __device__ void send_moments(int slot, int kinds, int step) const {
    const int units = block_.of_hidden.count, most = block_.most_own();
    each_row([&](int row, bool exists) {
      const int places = exists && step < block_.lengths[row] && units > 0 ? most * kinds : 0;
      const float* const values = block_.kept(row, 0, 0);
      const auto own = [&](int i) { return units == most || i % most < units; };
      float sum = 0.f, squares = 0.f;
#pragma unroll 2
      for (int i = lane(); i < places; i += row_lanes)
        if (own(i)) sum += values[i];
      const float mean = device::half_warp_sum(sum) / static_cast<float>(places > 0 ? units * kinds : 1);
#pragma unroll 2
      for (int i = lane(); i < places; i += row_lanes) {
        const float apart = values[i] - mean;
        if (own(i)) squares = fmaf(apart, apart, squares);
      }
      squares = device::half_warp_sum(squares);
      if (exists) send(slot, row, mean, squares);
    });
  }
  // -> mean, 1 / deviation of the whole row, kinds * H values. Blocks' means differ: their squares about the row's mean count too, and
  // nothing is subtracted from a sum of squares.
  __device__ void receive_moments(int slot, int kinds) const {
    const device::Pair* const pairs = receive(slot);
    each_row([&](int row, bool exists) {
      const int team = exists ? a_.plan.team : 0;
      const float all = static_cast<float>(kinds) * a_.hidden;
      float mean = 0.f, squares = 0.f;
      for (int rank = lane(); rank < team; rank += row_lanes)
        mean = fmaf(count_of(rank, kinds), device::float_of(pairs[row * team + rank].at[0]), mean);
      mean = device::half_warp_sum(mean) / all;
      for (int rank = lane(); rank < team; rank += row_lanes) {
        const device::Pair pair = pairs[row * team + rank];
        const float apart = device::float_of(pair.at[0]) - mean;
        squares += fmaf(count_of(rank, kinds) * apart, apart, device::float_of(pair.at[1]));
      }
      squares = device::half_warp_sum(squares);
      if (!exists || lane() != 0) return;
      of(row)[0] = mean;
      of(row)[1] = 1.f / sqrtf(squares / all + 1e-5f);
    });
  }

  // The sums of the first and of the second number that the block keeps of its units, to all.
  __device__ void send_sums(int slot, int step) const {
    each_row([&](int row, bool exists) {
      float first = 0.f, second = 0.f;
      const int count = exists && step < block_.lengths[row] ? block_.of_hidden.count : 0;
#pragma unroll 1
      for (int unit = lane(); unit < count; unit += row_lanes) {
        first += *block_.kept(row, 0, unit);
        second += *block_.kept(row, 1, unit);
      }
      first = device::half_warp_sum(first), second = device::half_warp_sum(second);
      if (exists) send(slot, row, first, second);
    });
  }
  // -> both sums over the whole row, divided by how many values there are, kinds * H.
  __device__ void receive_means(int slot, int kinds) const {
    const device::Pair* const pairs = receive(slot);
    each_row([&](int row, bool exists) {
      const int team = exists ? a_.plan.team : 0;
      float first = 0.f, second = 0.f;
      for (int rank = lane(); rank < team; rank += row_lanes) {
        first += device::float_of(pairs[row * team + rank].at[0]);
        second += device::float_of(pairs[row * team + rank].at[1]);
      }
      const float all = static_cast<float>(kinds) * a_.hidden;
      first = device::half_warp_sum(first), second = device::half_warp_sum(second);
      if (!exists || lane() != 0) return;
      of(row)[0] = first / all;
      of(row)[1] = second / all;
    });
  }

  // Between sending and receiving, unless another barrier of the team comes between them.
  __device__ void meet() const {
    if constexpr (cluster) {
      device::cluster_arrive();
      device::cluster_wait();
    }
  }
  // After every step.
  __device__ void pass() { ++turn_; }

 private:
  __device__ static int lane() { return threadIdx.x % row_lanes; }
  template <class Row>
  __device__ void each_row(const Row& of_row) const {
    const int halves = blockDim.x / row_lanes, own = threadIdx.x / row_lanes;
#pragma unroll 1
    for (int first = 0; first < block_.rows; first += halves) of_row(first + own, first + own < block_.rows);
  }
  __device__ float count_of(int rank, int kinds) const {
    const OwnUnits own(rank, a_.plan.units, a_.hidden);
    return own.count > 0 ? static_cast<float>(own.count * kinds) : 0.f;
  }
  // In shared memory of a cluster's blocks, in global memory of a grid's.
  __device__ device::Pair* words(int slot) const {
    return block_.pairs + static_cast<int64_t>(slot * 2 + turn_ % 2) * a_.plan.rows * a_.plan.team;
  }
  __device__ uint32_t stamp() const { return ~turn_ >> 1 & 1; }  // 1 in the first turns: at first all words are 0

  __device__ void send(int slot, int row, float first, float second) const {
    const device::Pair pair{{device::bits_of(first), device::bits_of(second)}};
    device::Pair* const here = words(slot) + row * a_.plan.team + block_.rank;
    if constexpr (cluster) {
      if (lane() < a_.plan.team) device::store_in_block(here, lane(), pair);
    } else if (lane() == 0) {
      device::store_atomically(here, {{pair.at[0], (pair.at[1] & ~1u) | stamp()}});
    }
  }
  // All words, row by row, in shared memory.
  __device__ const device::Pair* receive(int slot) const {
    device::Pair* from = words(slot);
    if constexpr (cluster) return from;
    device::Pair* const to = block_.template shared<device::Pair>(block_.layout().pairs);
    const int count = block_.rows * a_.plan.team, apart = blockDim.x;
#pragma unroll 1
    for (int first = threadIdx.x; first < count; first += word_group * apart) {
      device::Pair pairs[word_group] = {};
#pragma unroll
      for (int i = 0; i < word_group; ++i)
        if (first + i * apart < count) pairs[i] = device::load_atomically(from + first + i * apart);
#pragma unroll
      for (int i = 0; i < word_group; ++i) {
        if (first + i * apart >= count) continue;
        while ((pairs[i].at[1] & 1) != stamp()) pairs[i] = device::load_atomically(from + first + i * apart);
        to[first + i * apart] = pairs[i];
      }
    }
    device::block_sync();
    return to;
  }

  const Recurrence& a_;
  const Block& block_;
  unsigned turn_ = 0;
};

}  // namespace s2s::persistent
