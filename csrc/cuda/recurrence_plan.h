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
// the block reads them once, into shared memory. What a step costs is modelled in `step_time`; the plan of least time is taken.
//
// Measured on an H100, microseconds a step, forward and backward, B = 16 unless said: LSTM float16 H = 768 3.0 and 4.0, where cuDNN's
// persistent kernel takes 2.2 forward; bfloat16 H = 128, 512, 1024, 1536 2.3, 2.7, 3.5, 5.4 and 2.5, 3.3, 5.2, 8.2; with one row of H = 512
// 2.5 and 2.9; with 128 rows of H = 256, 768 3.5, 11 and 3.7, 14. GRU H = 512 2.7 and 3.0. An LSTM normalised, H = 512, 9.8 and 8.5; one of
// 768 projected to 256 5.4 and 6.7. Of the 3.0 us 0.9 are the exchanged rows out of L2 and the products, 0.9 the cell, 1.0 the barrier: the
// fence before the counter, the counter, and whoever waits for it reading it again.
//
// Predicted by `step_time` and not measured, the same of a bfloat16 LSTM, B = 16: H = 128, 512, 1024, 1536 on an A100 3.1, 3.5, 5.2, 7.3
// and 3.4, 4.5, 6.7, 9.4, on a B200 as on an H100 (2.6, 2.8, 3.2, 5.7 and 2.8, 3.7, 5.4, 7.7). Of both directions of a layer, each on half
// of an H100: H = 768, 1024 3.5, 4.3 and 4.5, 5.5, where one after the other would take 6.0, 6.4 and 8.6, 10.8.
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
constexpr int feed_turns = 2;                 // steps that are read ahead: memory takes longer to answer than a step
constexpr int row_group = 4, word_group = 8;  // loads out of L2 that a thread has under way: of exchanged rows, and of sums about them
constexpr int row_lanes = 16;                 // that sum over a row of the batch, in layer normalisation

// K-blocks whose recurrent weights fit a warp's registers: 96 a lane.
constexpr int held_blocks(Operand operand, bool backward, bool extended) {
  return operand == Operand::float32 ? 0 : backward ? 12 - 2 * extended : 6 - extended;
}

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

// Of each unit, four numbers each, that go out to memory once the block has arrived: gates or their gradients; extra and h, or the
// gradients of a GRU's recurrent candidate and of h; forward's normalised product.
S2S_EVERYWHERE constexpr int written_fours(bool extended) { return extended ? 3 : 2; }

// Numbers of a unit that every step reads, by their places: of each gate forward's bias, or its sum of the weights in backward; what layer
// normalisation multiplies each gate and an LSTM's cell by, and what it adds to that.
constexpr int bias = 0, weight_sum = 0, norm_hh = 4, norm_c = 8, norm_b = 9;
S2S_EVERYWHERE constexpr int unit_constants(bool extended) { return extended ? 10 : 4; }

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
  int weights, projection, exchange, partial, feeds, written, constants, state, kept, pairs, moments, scales, lengths, bytes;

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
    feeds = take(feed_turns * p.rows * s.feeds * most_units(p) * 4);
    written = take(p.rows * written_fours(s.extended()) * most_units(p) * 16);
    constants = take(unit_constants(s.extended()) * most_units(p) * 4);
    state = take(s.states() * p.rows * most_units(p) * 4);
    kept = take(s.kept() * p.rows * most_units(p) * 4);
    pairs = take(pairs_bytes(p, s) / (p.cluster ? 1 : 4));
    moments = take(s.normed ? p.rows * 16 : 0);
    scales = take(s.normed && s.backward ? feed_turns * p.rows * 16 : 0);
    lengths = take((2 + feed_turns) * p.rows * 4);  // and whether steps that were read ahead start anew
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

// Nanoseconds of a step. Fitted to 900 plans of LSTMs, GRUs and RNNs measured on an H100 (B 1 to 512, H 128 to 1536; root mean square error
// 9 %), in terms of what a thread does in turn: units of the cell, values stored and read ahead, passes, matrix instructions of a quarter
// of a multiprocessor; and of bytes: weights out of shared memory, exchanged rows out of L2 for a block and for all, or between the blocks
// of a cluster. A matrix instruction of a warp that waits for its operands takes 6 ns, not the 4 of its rate; a unit's turn 0.6 us, since
// few warps hide its latencies. Below compute capability 9.0 not measured: the same by the clock.
inline double step_time(const RecurrencePlan& p, const RecurrenceShape& s, bool hopper) {
  const auto turns = [](double items, double at_once) {
    return static_cast<double>(static_cast<int64_t>((items + at_once - 1) / at_once));
  };
  const int threads = warps_of(p) * warp, gates = s.gates;
  const double rows = static_cast<double>(s.batch < p.rows ? s.batch : p.rows), passes = turns(rows, columns);
  const double tiles_n = s.batch < p.rows ? turns(rows, tile_n) : padded_rows(p.rows) / tile_n, batch = tiles_n * tile_n;
  const double in_pass = rows < columns ? rows : columns, quarters = warps_of(p) > 4 ? warps_of(p) / 4.0 : 1;
  const double units = most_units(p), read = units * s.feeds / (p.units % 4 == 0 && p.width_units % 4 == 0 && s.hidden % 4 == 0 ? 4 : 1);
  const double cell = passes * turns(in_pass, threads / p.units);
  double time = 621 * cell + 76 * turns(rows, threads / p.units) * (gates + 1) + 527 * passes;
  time += 179 * (read < threads ? turns(rows, static_cast<int>(threads / read)) : rows * turns(read, threads));
  // An exchange of the block's units in each segment of a row, its barrier, and the product of what it gave.
  const auto multiply = [&](const ProductShape& product, const ExchangedRow& row, int own) {
    const double operand = batch * static_cast<double>(row.row_bytes()) / 1024;
    const double matrix = tiles_n * product.tiles * product.each() * quarters;
    time += matrix * (s.operand == Operand::float32 ? 142 : 5.75) + passes * product.weight_bytes() / 1024.0 * 15.1;
    if (p.cluster) return time += 675 + 41.5 * batch * own * s.element_bytes() * row.segments * (p.team - 1) / 1024;
    const double reads = p.staged ? operand : product.warps_m * operand;
    return time += 777 + 15.3 * reads + 6.74 * p.team * p.teams * reads / 1024 + (p.staged ? 440 * passes : 0);
  };
  multiply(recurrent_product(p, s), s.recurrent(), s.backward ? p.units : p.width_units);
  if (s.projected) {
    multiply(projection_product(p, s), s.projection(), s.backward ? p.width_units : p.units);
    time += 1200;
  }
  if (s.normed) {
    // One normalisation, and that of an LSTM's cell; the words that blocks send each other, of a thread.
    const double each = s.cell == Cell::lstm ? 2 : 1, words = batch * p.team / threads;
    time += each * (s.backward ? 1175 + 360 * cell + 330 * words : 870 * cell + 1210 * turns(batch * row_lanes, threads) + 510 * words);
  }
  return hopper ? time : time * 1.7 / 1.4;
}

// Of the whole batch: teams take several tiles of it in turn where there are more tiles than teams.
inline double planned_time(const RecurrencePlan& p, const RecurrenceShape& s, bool hopper) {
  const int64_t chunks = (s.batch + p.rows - 1) / p.rows;
  return static_cast<double>((chunks + p.teams - 1) / p.teams) * step_time(p, s, hopper);
}

struct RecurrenceMachine {
  int multiprocessors, shared_limit;  // bytes of shared memory that one block may have
  bool clusters;                      // compute capability 9.0 or above

  // Teams that are resident at once. A cluster lies within one of the groups of multiprocessors, of which an H100's have 16 or 18: 7 of 16
  // blocks were seen there, 14 of 8 and 30 of 4, the whole of which is asked of the device itself.
  int most_teams(bool cluster, int team) const {
    constexpr int group = 18;
    return cluster ? multiprocessors / group * (group / team) + multiprocessors % group / team : multiprocessors / team;
  }
};

// Calls visit(plan) for every plan that fits.
template <class Visit>
void each_plan(const RecurrenceShape& s, const RecurrenceMachine& m, const Visit& visit) {
  if (s.hidden < 1 || s.width < 1 || s.batch < 1 || s.hidden > 1 << 20 || s.width > 1 << 20) return;
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
    p.held = held_blocks(s.operand, s.backward, s.extended());
    for (int rows = columns; rows <= 128; rows *= 2) {
      p.rows = rows;
      const int64_t chunks = (s.batch + rows - 1) / rows, most = m.most_teams(p.cluster, p.team);
      if (most < 1) break;
      p.teams = static_cast<int>(chunks < most ? chunks : most);
      p.shared_bytes = RecurrenceLayout(p, s).bytes;
      if (p.shared_bytes > m.shared_limit) break;
      p.workspace_bytes = workspace_bytes(p, s);
      visit(p);
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
}

// The plan of least modelled time; false: nothing fits.
inline bool plan_recurrence(const RecurrenceShape& s, const RecurrenceMachine& m, RecurrencePlan& best) {
  double least = 0;
  bool found = false;
  each_plan(s, m, [&](const RecurrencePlan& p) {
    const double time = planned_time(p, s, m.clusters);
    if (!found || time < least) best = p, least = time, found = true;
  });
  return found;
}

}  // namespace s2s::persistent
#undef S2S_EVERYWHERE
