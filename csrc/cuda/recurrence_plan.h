// How a recurrence is laid over a GPU: host code, and what its kernels read of it. No torch, no CUDA headers.
//
// A team of blocks holds the recurrent weights of a layer for the whole call, each block those of some hidden units, and takes a tile of
// the batch through time: a step multiplies the block's weights by the whole exchanged vector of the step before, ends in the cell's own
// arithmetic on the block's units, and exchanges what these give. What is exchanged is h in forward and, in backward, the gradients of the
// gates: G times as many bytes as partial sums of dh would have if each block summed over its own gates, but rounded to the operand's 16
// bits, written once instead of by every block, summed in a fixed order without another exchange, and with one barrier a step.
//
// Two exchanges: a cluster (one team each) writes into its blocks' shared memories; a cooperative grid goes through the L2 cache and a
// counter in global memory. What a step costs is modelled in `step_time`; the plan of least time is taken. Predicted for the bar GR2 (LSTM,
// float16, B = 16, H = 768, H100), forward: 96 blocks of 8 units, 1.1 us for the barrier and the latency of L2, 0.45 us for 2.4 MiB out of
// it, 0.2 us for products, 0.2 us for sums over warps, 0.1 us for the cell: 2.0 us a step, where cuDNN takes 1.96. Backward: 48 blocks of
// 16 units, 2.6 us. Other sizes, forward, float16, H = 256, 512, 1024, 1536: with 16 rows 1.1, 1.7, 2.5, 4.4 us (A100: 1.7, 2.0, 3.6, 5.8),
// with one row 0.9, 1.4, 1.8, 3.0, with 128 rows 1.1, 2.1, 11, 27: the grid's blocks all read all rows, which is dear where these are many.
// Not measured: no number here has met a GPU.
#pragma once
#include <cstdint>
#include <initializer_list>

#include "../cpu/recurrence_cell.h"

#if defined(__CUDACC__)
#define S2S_EVERYWHERE __host__ __device__ inline
#else
#define S2S_EVERYWHERE inline
#endif

namespace s2s::persistent {

// What products read: a 16-bit type, float32 rounded to tf32 for the tensor cores, or float32 itself for the multipliers.
enum class Operand : int { bfloat16, float16, tf32, float32 };

constexpr int warp = 32, tile_m = 16, tile_n = 8;
constexpr int columns = 2 * tile_n;  // rows of the batch that a pass of a step multiplies
constexpr int block_bytes = 64;      // of K: what four lanes read of a row at once, the K of two matrix instructions
constexpr int most_threads = 256;
constexpr int most_feeds = 6;
constexpr int held_forward = 6, held_backward = 12;  // K-blocks whose weights fit a warp's registers: 96 a lane

struct RecurrencePlan {
  int cluster;           // whether the exchange is a cluster's, else the grid's
  int units;             // of each block
  int team, teams;       // blocks that hold the weights together, and how many such teams there are
  int rows;              // of the batch, that a team takes through time together
  int warps_m, warps_k;  // warps of a block, over its rows of the weights and over K
  int held;              // K-blocks whose weights a warp keeps in registers; those of the others are in shared memory
  int shared_bytes;
  int64_t workspace_bytes;
};

// A plan as integers, in the order of its fields.
constexpr int plan_fields = 10;
inline void write_plan(const RecurrencePlan& p, int64_t* to) {
  const int64_t fields[plan_fields] = {p.cluster, p.units,   p.team, p.teams,        p.rows,
                                       p.warps_m, p.warps_k, p.held, p.shared_bytes, p.workspace_bytes};
  for (int i = 0; i < plan_fields; ++i) to[i] = fields[i];
}
inline RecurrencePlan read_plan(const int64_t* from) {
  int small[plan_fields - 1];
  for (int i = 0; i < plan_fields - 1; ++i) small[i] = static_cast<int>(from[i]);
  return {small[0], small[1], small[2], small[3], small[4], small[5], small[6], small[7], small[8], from[plan_fields - 1]};
}

struct RecurrenceShape {
  int64_t batch, hidden;
  int gates;
  Operand operand;
  bool backward;
  int feeds;  // values that a unit's step reads of global memory

  // Tiles of 16 rows that a warp has.
  S2S_EVERYWHERE int tiles() const { return backward ? 1 : 2; }
  S2S_EVERYWHERE int element_bytes() const { return operand == Operand::bfloat16 || operand == Operand::float16 ? 2 : 4; }
  // The units of one gate in an exchanged row, so many that each gate begins at a multiple of 16 bytes.
  S2S_EVERYWHERE int gate_stride() const {
    const int each = 16 / element_bytes();
    return static_cast<int>((hidden + each - 1) / each * each);
  }
  S2S_EVERYWHERE int depth() const { return gate_stride() * (backward ? gates : 1); }
  S2S_EVERYWHERE int blocks_k() const { return (depth() * element_bytes() + block_bytes - 1) / block_bytes; }
  // Bytes from one exchanged row to the next: an odd number of half lines, so that two rows meet in no bank of shared memory.
  S2S_EVERYWHERE int64_t row_bytes() const { return static_cast<int64_t>(blocks_k() | 1) * block_bytes; }
};

S2S_EVERYWHERE int padded_rows(int rows) { return (rows + columns - 1) / columns * columns; }
// Of sums over one warp's K, in shared memory: so wide that the eight rows of a tile meet in no bank.
constexpr int partial_row = columns + 8;

// Where the parts of a block's shared memory begin, in bytes.
struct RecurrenceLayout {
  int weights, exchange, partial, feeds, state, lengths, bytes;

  S2S_EVERYWHERE RecurrenceLayout(const RecurrencePlan& p, const RecurrenceShape& s) {
    const int warps = p.warps_m * p.warps_k, each = (s.blocks_k() + p.warps_k - 1) / p.warps_k;
    const int rest = each > p.held ? each - p.held : 0, exchanged = static_cast<int>(padded_rows(p.rows) * s.row_bytes());
    int at = 0;
    const auto take = [&](int size) {
      const int place = at;
      at += (size + 15) / 16 * 16;
      return place;
    };
    weights = take(warps * rest * s.tiles() * warp * 32);
    exchange = take(p.cluster ? 2 * exchanged : 0);
    partial = take(p.warps_k * p.warps_m * s.tiles() * tile_m * partial_row * 4);
    feeds = take(p.rows * s.feeds * p.units * 4);
    state = take(2 * p.rows * p.units * 4);
    lengths = take(p.rows * 4);
    bytes = at;
  }
};

// One counter for each team, in a line of its own, then the exchanged rows of each, twice.
constexpr int counter_bytes = 128;
inline int64_t workspace_bytes(const RecurrencePlan& p, const RecurrenceShape& s) {
  return p.cluster ? 0 : p.teams * (counter_bytes + 2 * padded_rows(p.rows) * s.row_bytes());
}

// Nanoseconds of a step, from rates that are known of compute capability 8.0 and 9.0: bytes a clock of a multiprocessor from L2 (64) and
// from shared memory (128), of all of them from L2; latencies of a barrier through L2 (850 ns), of one of a cluster (250 ns) and of a read
// past the first cache (250 ns); 8 clocks of a quarter, or 6.4, for a matrix instruction.
inline double step_time(const RecurrencePlan& p, const RecurrenceShape& s, bool hopper) {
  const double ghz = hopper ? 1.7 : 1.4, l2_bytes = hopper ? 3200 : 2600;
  const int warps = p.warps_m * p.warps_k, each = (s.blocks_k() + p.warps_k - 1) / p.warps_k, passes = padded_rows(p.rows) / columns;
  const double batch = static_cast<double>(s.batch < p.rows ? (s.batch + tile_n - 1) / tile_n * tile_n : padded_rows(p.rows));
  const double operand = batch * static_cast<double>(s.row_bytes()), active = p.team * p.teams;
  const double tiles = batch / tile_n * s.tiles() * each * (warps > 4 ? warps / 4.0 : 1);
  // The multipliers: 64 products a lane for 16 vectors out of shared memory, for each block of K.
  const double product = s.operand == Operand::float32 ? tiles * 96 : tiles * 2 * (hopper ? 6.4 : 8);
  const int rest = each > p.held ? each - p.held : 0;
  const double weights = passes * warps * static_cast<double>(rest) * s.tiles() * warp * 32 / 128;
  const double sums = 2.0 * p.warps_k * p.warps_m * s.tiles() * tile_m * batch * 4 / 128 + passes * 60;
  const double cell = passes * 150 + batch * p.units / most_threads * 120;
  double exchange = 0, latency = 0;  // clocks, nanoseconds
  if (p.cluster) {
    latency = 250 + 200;
    exchange = p.warps_m * operand / 128 + batch * p.units * s.element_bytes() * (s.backward ? s.gates : 1) * (p.team - 1) / 32;
  } else {
    latency = 850 + 250;
    const double block = p.warps_m * operand / 64, all = active * p.warps_m * operand / l2_bytes;
    exchange = block > all ? block : all;
  }
  return latency + (exchange + product + weights + sums + cell) / ghz;
}

// Of the whole batch: teams take several tiles of it in turn where there are more tiles than teams.
inline double planned_time(const RecurrencePlan& p, const RecurrenceShape& s, bool hopper) {
  const int64_t chunks = (s.batch + p.rows - 1) / p.rows;
  return static_cast<double>((chunks + p.teams - 1) / p.teams) * step_time(p, s, hopper);
}

struct RecurrenceMachine {
  int multiprocessors, shared_limit;  // bytes of shared memory that one block may have
  bool clusters;                      // compute capability 9.0 or above
};

// The plan of least modelled time; false: nothing fits.
inline bool plan_recurrence(const RecurrenceShape& s, const RecurrenceMachine& m, RecurrencePlan& best) {
  if (s.hidden < 1 || s.batch < 1 || s.hidden > 1 << 20) return false;
  const int hidden = static_cast<int>(s.hidden), each = 16 / s.element_bytes();
  double least = 0;
  bool found = false;
  const auto consider = [&](bool cluster, int units) {
    RecurrencePlan p{};
    p.cluster = cluster, p.units = units, p.team = (hidden + units - 1) / units;
    if (cluster)
      for (p.team = 1; p.team * units < hidden;) p.team *= 2;
    if (p.team > m.multiprocessors || (cluster && p.team > 16)) return;
    const int tiles = ((s.backward ? 1 : s.gates) * units + tile_m - 1) / tile_m;
    p.warps_m = (tiles + s.tiles() - 1) / s.tiles();
    if (p.warps_m > most_threads / warp) return;
    p.warps_k = most_threads / warp / p.warps_m;
    if (p.warps_k > s.blocks_k()) p.warps_k = s.blocks_k();
    p.held = s.operand == Operand::float32 ? 0 : s.backward ? held_backward : held_forward;
    for (int rows = columns; rows <= 128; rows *= 2) {
      p.rows = rows;
      const int64_t chunks = (s.batch + rows - 1) / rows, most = m.multiprocessors / p.team;
      p.teams = static_cast<int>(chunks < most ? chunks : most);
      p.shared_bytes = RecurrenceLayout(p, s).bytes;
      if (p.shared_bytes > m.shared_limit) break;
      p.workspace_bytes = workspace_bytes(p, s);
      const double time = planned_time(p, s, m.clusters);
      if (!found || time < least) best = p, least = time, found = true;
      if (rows >= s.batch) break;
    }
  };
  // Units of a cluster's blocks are whole vectors of 16 bytes; those of a grid's are copied four at a time where they can be.
  for (const bool cluster : {false, true}) {
    const int step = cluster ? each : hidden % 4 == 0 ? 4 : 1;
    for (int units = step; units < hidden + step && units <= 128 && (m.clusters || !cluster); units += step) consider(cluster, units);
  }
  return found;
}

}  // namespace s2s::persistent
#undef S2S_EVERYWHERE
