// How a recurrence is laid over a GPU: host code, and what its kernels read of it. No torch, no CUDA headers.
//
// A team of blocks holds the recurrent weights of a layer for the whole call, each block those of some hidden units, and takes a tile of
// the batch through time: a step multiplies the block's weights by the whole exchanged vector of the step before, ends in the cell's own
// arithmetic on the block's units, and exchanges what these give. What is exchanged is h in forward and, in backward, the gradients of the
// gates: G times as many bytes as partial sums of dh would have if each block summed over its own gates, but rounded to the operand's 16
// bits, written once instead of by every block, summed in a fixed order without another exchange, and with one barrier a step.
//
// Two exchanges: a cluster (one team each) writes into its blocks' shared memories; a cooperative grid goes through the L2 cache and a
// counter in global memory. A grid's blocks all read all rows, which is dear where these are many: where several warps want the same ones,
// the block reads them once, into shared memory. What a step costs is modelled in `step_time`; the plan of least time is taken. Predicted
// for the bar GR2 (LSTM, float16, B = 16, H = 768, H100), forward: 96 blocks of 8 units, 1.1 us for the barrier and the latency of L2, 0.45
// us for 2.4 MiB out of it, 0.2 us for products, 0.2 us for sums over warps, 0.1 us for the cell: 2.0 us a step, where cuDNN takes 1.96.
// Backward: 48 blocks of 16 units, 2.6 us. Other sizes, forward, float16, H = 256, 512, 1024, 1536: with 16 rows 1.1, 1.7, 2.5, 4.4 us
// (A100: 1.7, 2.0, 3.6, 5.8), with one row 0.9, 1.4, 1.8, 3.0, with 128 rows 1.1, 2.1, 11, 27, and 6.1 for H = 768.
//
// Layer normalisation needs sums over all units within a step (recurrence_kernels.cuh says which waits that takes), a projection has a
// second product and its weights, which stay in shared memory. Predicted, forward and backward, B = 16, H100: an LSTM normalised, H = 512
// 4.1 and 3.5 us, where a wait costs 0.45 us in a cluster and 0.6 in a grid and the sums themselves about as much; a GRU 2.9 and 2.3; an
// LSTM of 768 projected to 256 3.1 and 4.0 us, 5.2 and 5.3 with both. Not measured: no number here has met a GPU.
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
constexpr int most_feeds = 11;
constexpr int row_group = 4, word_group = 8;  // loads out of L2 that a thread has under way: of exchanged rows, and of sums about them
constexpr int row_lanes = 16;                 // that sum over a row of the batch, in layer normalisation

// K-blocks whose recurrent weights fit a warp's registers: 96 a lane.
constexpr int held_blocks(Operand operand, bool backward) { return operand == Operand::float32 ? 0 : backward ? 12 : 6; }

struct RecurrencePlan {
  int cluster;               // whether the exchange is a cluster's, else the grid's
  int staged;                // whether a grid's blocks copy a pass's rows into shared memory, for warps that read the same ones
  int extended;              // whether it is for the kernels that normalise and project
  int units, width_units;    // of H and of P that each block has
  int team, teams;           // blocks that hold the weights together, and how many such teams there are
  int rows;                  // of the batch, that a team takes through time together
  int warps_m, warps_k;      // warps of a block, over its rows of the recurrent weights and over K
  int project_m, project_k;  // the same of a projection's weights, 0 without one
  int held;                  // K-blocks whose recurrent weights a warp keeps in registers; all others are in shared memory
  int shared_bytes;
  int64_t workspace_bytes;
};

// A plan as integers, in the order of its fields.
constexpr int plan_fields = 15;
inline void write_plan(const RecurrencePlan& p, int64_t* to) {
  const int64_t fields[plan_fields] = {p.cluster,   p.staged,    p.extended, p.units,        p.width_units,
                                       p.team,      p.teams,     p.rows,     p.warps_m,      p.warps_k,
                                       p.project_m, p.project_k, p.held,     p.shared_bytes, p.workspace_bytes};
  for (int i = 0; i < plan_fields; ++i) to[i] = fields[i];
}
inline RecurrencePlan read_plan(const int64_t* from) {
  int small[plan_fields - 1];
  for (int i = 0; i < plan_fields - 1; ++i) small[i] = static_cast<int>(from[i]);
  return {small[0],  small[1],  small[2],  small[3],  small[4],
          small[5],  small[6],  small[7],  small[8],  small[9],
          small[10], small[11], small[12], small[13], from[plan_fields - 1]};
}

// What a product reads of a row of the batch: `segments` runs of as many values, each of which begins at a multiple of 16 bytes.
struct ExchangedRow {
  int64_t values;
  int segments, element_bytes;

  S2S_EVERYWHERE int stride() const {
    const int each = 16 / element_bytes;
    return static_cast<int>((values + each - 1) / each * each);
  }
  S2S_EVERYWHERE int depth() const { return stride() * segments; }
  S2S_EVERYWHERE int blocks_k() const { return (depth() * element_bytes + block_bytes - 1) / block_bytes; }
  // Bytes from one row to the next: an odd number of half lines, so that two rows meet in no bank of shared memory.
  S2S_EVERYWHERE int64_t row_bytes() const { return static_cast<int64_t>(blocks_k() | 1) * block_bytes; }
};

struct RecurrenceShape {
  int64_t batch, hidden, width;  // B, H and P
  Cell cell;
  int gates;
  Operand operand;
  bool backward, normed, projected;
  int feeds;  // values that a unit's step reads of global memory

  // Layer normalisation or a projection: other kernels than those of plain steps.
  S2S_EVERYWHERE bool extended() const { return normed || projected; }
  S2S_EVERYWHERE int element_bytes() const { return operand == Operand::bfloat16 || operand == Operand::float16 ? 2 : 4; }
  S2S_EVERYWHERE ExchangedRow recurrent() const { return {backward ? hidden : width, backward ? gates : 1, element_bytes()}; }
  S2S_EVERYWHERE ExchangedRow projection() const { return {backward ? width : hidden, 1, element_bytes()}; }
  // Numbers that a block keeps of each of its units within a step.
  S2S_EVERYWHERE int kept() const { return !extended() ? 0 : backward ? 4 : gates; }
  S2S_EVERYWHERE int states() const { return normed && backward ? 4 : 2; }
};

S2S_EVERYWHERE int padded_rows(int rows) { return (rows + columns - 1) / columns * columns; }
// Of sums over one warp's K, in shared memory: so wide that the eight rows of a tile meet in no bank.
constexpr int partial_row = columns + 8;

// How the warps of a block share one of a step's products. tiles: of 16 rows of the weights, that a warp has.
struct ProductShape {
  int tiles, warps_m, warps_k, held, blocks_k;

  S2S_EVERYWHERE int each() const { return warps_k > 0 ? (blocks_k + warps_k - 1) / warps_k : 0; }  // K-blocks of a warp
  S2S_EVERYWHERE int rest() const { return each() > held ? each() - held : 0; }
  S2S_EVERYWHERE int warps() const { return warps_m * warps_k; }
  S2S_EVERYWHERE int weight_bytes() const { return warps() * rest() * tiles * warp * 32; }
  S2S_EVERYWHERE int partial_bytes() const { return warps() * tiles * tile_m * partial_row * 4; }
};
S2S_EVERYWHERE constexpr int recurrent_tiles(bool backward) { return backward ? 1 : 2; }
S2S_EVERYWHERE ProductShape recurrent_product(const RecurrencePlan& p, const RecurrenceShape& s) {
  return {recurrent_tiles(s.backward), p.warps_m, p.warps_k, p.held, s.recurrent().blocks_k()};
}
S2S_EVERYWHERE ProductShape projection_product(const RecurrencePlan& p, const RecurrenceShape& s) {
  return {1, p.project_m, p.project_k, 0, s.projection().blocks_k()};
}

S2S_EVERYWHERE int warps_of(const RecurrencePlan& p) {
  const int recurrent = p.warps_m * p.warps_k, projection = p.project_m * p.project_k;
  return recurrent > projection ? recurrent : projection;
}
S2S_EVERYWHERE int most_units(const RecurrencePlan& p) { return p.units > p.width_units ? p.units : p.width_units; }
S2S_EVERYWHERE int64_t exchanged_bytes(const RecurrencePlan& p, const ExchangedRow& row) { return padded_rows(p.rows) * row.row_bytes(); }
// Of the pairs of numbers about rows that a team's blocks send each other: for each of two normalisations, in two turns.
S2S_EVERYWHERE int64_t pairs_bytes(const RecurrencePlan& p, const RecurrenceShape& s) {
  return s.normed ? static_cast<int64_t>(4) * p.rows * p.team * 8 : 0;
}

// Where the parts of a block's shared memory begin, in bytes.
struct RecurrenceLayout {
  int weights, projection, exchange, partial, feeds, state, kept, pairs, moments, scales, lengths, bytes;

  S2S_EVERYWHERE RecurrenceLayout(const RecurrencePlan& p, const RecurrenceShape& s) {
    const ProductShape recurrent = recurrent_product(p, s), second = projection_product(p, s);
    const int partial_bytes = recurrent.partial_bytes(), second_bytes = second.partial_bytes();
    int at = 0;
    const auto take = [&](int64_t size) {
      const int place = at;
      at += static_cast<int>((size + 15) / 16 * 16);
      return place;
    };
    weights = take(recurrent.weight_bytes());
    projection = take(s.projected ? second.weight_bytes() : 0);
    const int64_t row_bytes = s.recurrent().row_bytes(), second_row = s.projected ? s.projection().row_bytes() : 0;
    exchange = take(p.cluster  ? padded_rows(p.rows) * (2 * row_bytes + second_row)
                    : p.staged ? columns * (row_bytes > second_row ? row_bytes : second_row)
                               : 0);
    partial = take(partial_bytes > second_bytes ? partial_bytes : second_bytes);
    feeds = take(p.rows * s.feeds * most_units(p) * 4);
    state = take(s.states() * p.rows * most_units(p) * 4);
    kept = take(s.kept() * p.rows * most_units(p) * 4);
    pairs = take(pairs_bytes(p, s) / (p.cluster ? 1 : 4));
    moments = take(s.normed ? p.rows * 16 : 0);
    scales = take(s.normed && s.backward ? p.rows * 16 : 0);
    lengths = take(p.rows * 4);
    bytes = at;
  }
};

// One counter for each team, in a line of its own, then of each team: the exchanged rows, twice, those of a projection, and pairs.
constexpr int counter_bytes = 128;
S2S_EVERYWHERE int64_t team_bytes(const RecurrencePlan& p, const RecurrenceShape& s) {
  return 2 * exchanged_bytes(p, s.recurrent()) + (s.projected ? exchanged_bytes(p, s.projection()) : 0) +
         (pairs_bytes(p, s) + 127) / 128 * 128;
}
inline int64_t workspace_bytes(const RecurrencePlan& p, const RecurrenceShape& s) {
  return p.cluster ? 0 : p.teams * (counter_bytes + team_bytes(p, s));
}

// Nanoseconds of a step, from rates that are known of compute capability 8.0 and 9.0: bytes a clock of a multiprocessor from L2 (64) and
// from shared memory (128), of all of them from L2; latencies of a barrier through L2 (850 ns), of one of a cluster (250 ns), of a read
// past the first cache (250 ns, 100 for each more of a thread's, which other warps' overlap) and of a word's way through L2 to who waits
// for it (600 ns); 8 clocks of a quarter, or 6.4, for a matrix instruction; 25 clocks for a shuffle.
inline double step_time(const RecurrencePlan& p, const RecurrenceShape& s, bool hopper) {
  const double ghz = hopper ? 1.7 : 1.4, l2_bytes = hopper ? 3200 : 2600;
  const int passes = padded_rows(p.rows) / columns;
  const double batch = static_cast<double>(s.batch < p.rows ? (s.batch + tile_n - 1) / tile_n * tile_n : padded_rows(p.rows));
  const double active = p.team * p.teams;
  double latency = 0, clocks = passes * 150 + batch * p.units / most_threads * 120;  // of the cell
  // An exchange of the block's units in each segment of a row, its barrier, and the product of what it gave.
  const auto multiply = [&](const ProductShape& product, const ExchangedRow& row, int units) {
    const double operand = batch * static_cast<double>(row.row_bytes());
    const double tiles = batch / tile_n * product.tiles * product.each() * (product.warps() > 4 ? product.warps() / 4.0 : 1);
    // The multipliers: 64 products a lane for 16 vectors out of shared memory, for each block of K.
    clocks += s.operand == Operand::float32 ? tiles * 96 : tiles * 2 * (hopper ? 6.4 : 8);
    clocks += passes * static_cast<double>(product.weight_bytes()) / 128;
    clocks += 2.0 * product.warps() * product.tiles * tile_m * batch * 4 / 128 + passes * 60;
    if (p.cluster) {
      latency += 250 + 200;
      clocks += product.warps_m * operand / 128 + batch * units * s.element_bytes() * row.segments * (p.team - 1) / 32;
    } else {
      latency += 850 + 250;
      const double reads = p.staged ? operand : product.warps_m * operand;
      const double block = reads / 64, all = active * reads / l2_bytes;
      clocks += (block > all ? block : all) + (p.staged ? product.warps_m * operand / 128 + 40 : 0);
      const double pass = operand / passes, under_way = 16.0 * row_group * warps_of(p) * warp;
      if (p.staged) latency += (passes - 1) * 250 + passes * 100 * static_cast<int>((pass - 1) / under_way);
    }
  };
  multiply(recurrent_product(p, s), s.recurrent(), s.backward ? p.units : p.width_units);
  if (s.projected) multiply(projection_product(p, s), s.projection(), s.backward ? p.width_units : p.units);
  if (s.normed) {
    // Sums for the recurrent product's gradient go with its exchange, and wait for nothing else.
    const int of_cell = s.cell == Cell::lstm ? 1 : 0, sums = s.backward ? 1 : 2, waits = of_cell + (s.backward ? 0 : 1);
    const int threads = warps_of(p) * warp, rounds = (static_cast<int>(batch) * row_lanes + threads - 1) / threads;
    const double words = batch * p.team, values = p.units * (s.backward ? 1 : s.gates);
    const double summed = sums * (2 * (4 * 25 + 30) + (values + p.team) / row_lanes * 10) + 120;
    clocks += rounds * (1 + of_cell) * summed + of_cell * (passes * 60 + batch * p.units / most_threads * 60);
    latency += waits * (p.cluster ? 250 + 200 : 600);
    if (!p.cluster) {
      const double block = words * 8 / 64, all = active * words * 8 / l2_bytes;
      clocks += (1 + of_cell) * (block > all ? block : all);
      latency += (1 + of_cell) * 250 * static_cast<int>((words - 1) / (word_group * threads));
    }
  }
  return latency + clocks / ghz;
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
  if (s.hidden < 1 || s.width < 1 || s.batch < 1 || s.hidden > 1 << 20 || s.width > 1 << 20) return false;
  const int hidden = static_cast<int>(s.hidden), width = static_cast<int>(s.width), each = 16 / s.element_bytes();
  // Units of a cluster's blocks are whole vectors of 16 bytes; those of a grid's are copied four at a time where they can be.
  const auto vectors = [&](bool cluster, int units) { return cluster ? each : units % 4 == 0 ? 4 : 1; };
  // Warps over so many rows of the weights, and over K.
  const auto share = [&](int rows, int tiles, const ExchangedRow& row, int& warps_m, int& warps_k) {
    warps_m = (rows + tiles * tile_m - 1) / (tiles * tile_m);
    if (warps_m > most_threads / warp) return false;
    warps_k = most_threads / warp / warps_m;
    if (warps_k > row.blocks_k()) warps_k = row.blocks_k();
    return true;
  };
  double least = 0;
  bool found = false;
  const auto consider = [&](bool cluster, bool staged, int units) {
    RecurrencePlan p{};
    p.cluster = cluster, p.staged = staged, p.extended = s.extended(), p.units = p.width_units = units,
    p.team = (hidden + units - 1) / units;
    if (cluster)
      for (p.team = 1; p.team * units < hidden;) p.team *= 2;
    if (p.team > m.multiprocessors || (cluster && p.team > 16)) return;
    if (s.projected) {
      const int step = vectors(cluster, width);
      p.width_units = ((width + p.team - 1) / p.team + step - 1) / step * step;
      if (!share(s.backward ? units : p.width_units, 1, s.projection(), p.project_m, p.project_k)) return;
    }
    const int rows_m = s.backward ? p.width_units : s.gates * units;
    if (!share(rows_m, recurrent_tiles(s.backward), s.recurrent(), p.warps_m, p.warps_k)) return;
    if (staged && p.warps_m < 2 && p.project_m < 2) return;
    p.held = held_blocks(s.operand, s.backward);
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
  for (const bool cluster : {false, true}) {
    const int step = vectors(cluster, hidden);
    for (int units = step; units < hidden + step && units <= 128 && (m.clusters || !cluster); units += step) {
      consider(cluster, false, units);
      if (!cluster) consider(cluster, true, units);
    }
  }
  return found;
}

}  // namespace s2s::persistent
#undef S2S_EVERYWHERE
