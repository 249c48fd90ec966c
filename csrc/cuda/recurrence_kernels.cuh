// The persistent recurrences: one launch takes a whole call through time. recurrence_plan.h says how blocks share the work.
//
// A plain step has one barrier. Where there is layer normalisation or a projection a step has more parts, between which the blocks of a
// team wait for each other once more:
//   forward   for the statistics of W_hh h; for those of an LSTM's c; for what is projected
//   backward  for the gradient of what is projected; for the sums that the gradient of an LSTM's LN(c) takes
// so that an LSTM that normalises waits three times in forward and twice in backward, and once more each with a projection; a GRU or RNN
// twice and once.
// Forward's statistics can't come with a later exchange: what is exchanged is made of them, by functions that aren't linear. The gradient
// of LN(W_hh h) can, since a product is linear: of a = w * grad, with n the normalised product and s its scale, it is s (a - mean(a) - n
// mean(a n)), and W_hh^T of that is s (W_hh^T a - mean(a) W_hh^T 1 - mean(a n) W_hh^T n). So a step exchanges a and, under the same
// barrier, the sums for both means; W_hh^T 1 and, of all positions at once, W_hh^T n are products made before the launch, and the gradient
// itself is made of a after it.
#pragma once
#include "recurrence_statistics.cuh"

namespace s2s::persistent {

// The rows of a weight matrix (rows, columns) in a block's products.
template <class Element>
__device__ inline WeightRun<Element> row_of(const void* weight, int64_t row, int column, int columns, bool exists) {
  return {static_cast<const Element*>(weight) + row * columns + column, 1, exists ? columns - column : 0};
}
template <class Element>
__device__ inline WeightRun<Element> column_of(const void* weight, int64_t row, int column, int columns, int left, bool exists) {
  return {static_cast<const Element*>(weight) + row * columns + column, columns, exists ? left : 0};
}

// The projection's part of a step: where there is none, no warps have a share of it.
template <class Block, Operand operand, bool cluster, class Weight>
__device__ inline auto projection_of(const Recurrence& a, const Block& block, const Weight& weight) {
  return BlockProduct<operand, cluster, 1, 0>(projection_product(a.plan, a.shape),
                                              block.template shared<device::Words>(block.layout().projection),
                                              block.template shared<float>(block.layout().partial), weight);
}

// Shared memory: RecurrenceLayout. Blocks: teams * team, in clusters of a team or all resident at once; threads: the plan's warps.
template <Operand operand, bool cluster, int held, bool extended>
__global__ void __launch_bounds__(most_threads, 1) recurrence_forward(const __grid_constant__ RecurrenceForward a) {
  using Block = RecurrenceBlock<operand, cluster, extended>;
  using Element = typename Block::Element;
  Block block(a);
  const Exchange<operand> recurrent = block.recurrent();
  const OwnUnits own = block.of_hidden, own_h = block.of_width;
  const int H = a.hidden, P = extended ? a.width : a.hidden, U = a.plan.units, G = a.shape.gates;
  // The block's rows of the weights are gate by gate, units * G of them.
  const BlockProduct<operand, cluster, recurrent_tiles(false), held> product(
      recurrent_product(a.plan, a.shape), block.template shared<device::Words>(block.layout().weights),
      block.template shared<float>(block.layout().partial), [&](int row, int k) {
        const int gate = row / U, unit = row % U;
        return row_of<Element>(a.weight_hh, static_cast<int64_t>(gate) * H + own.first + unit, k, P, gate < G && unit < own.count);
      });

  block.read_constants(bias, a.bias_hh, G, H, own);
  if constexpr (extended) block.read_norms(own);

  // What the step to come sees of h, as its product's operand too.
  const auto hand_on = [&](int row, int unit, int step, bool starts, float h) {
    if (starts) h = 0.f;
    *block.state(0, row, unit) = h;
    if (a.mask) h *= a.mask[(block.first_row + row) * P + own_h.first + unit];
    recurrent.put(step % 2, row, 0, unit, h);
  };
  const auto starts_after = [&](int row, int step) { return step + 1 < block.lengths[row] && block.starts(row, step + 1); };
  // The cell's own step of a unit; sums: of its product. Returns what becomes h, but for an LSTM that normalises its cell: of that it keeps
  // the cell and the output gate.
  const auto cell_step = [&](int row, int unit, int step, bool starts, float (&sums)[4]) {
    const int64_t position = block.position(row, step);
    const int at = own.first + unit;
    float gate[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      gate[g] = g < G ? *block.fed(step, row, g, unit) : 0.f;
      if (g < G && a.bias_hh) sums[g] += *block.constant(bias + g, unit);
    }
    const float c_before = *block.state(1, row, unit);
    float h = 0.f, c = c_before;
    if (a.cell == Cell::lstm) {
      lstm_step(gate, sums, c);
      if (extended && a.norm_c)
        *block.kept(row, 0, unit) = c, *block.kept(row, 1, unit) = gate[3];
      else
        h = gate[3] * tanhf(c);
    } else if (a.cell == Cell::gru) {
      h = gru_step(gate, sums, *block.state(0, row, unit));
    } else {
      h = rnn_step(gate, sums, a.cell == Cell::rnn_relu);
    }
    c = blended(new_share(a, stream_c, position, at), c_before, c);
    block.written(row, unit)[0] = {gate[0], gate[1], gate[2], gate[3]};
    block.written(row, unit)[1].at[0] = a.cell == Cell::lstm ? c : sums[2];
    *block.state(1, row, unit) = starts ? 0.f : c;
    return h;
  };
  // The step's end for a unit of h.
  const auto settle = [&](int row, int unit, int step, bool starts, float h) {
    const int64_t position = block.position(row, step);
    const int at = own_h.first + unit;
    h = blended(new_share(a, stream_h, position, at), *block.state(0, row, unit), h);
    block.written(row, unit)[1].at[1] = h;
    hand_on(row, unit, step + 1, starts, h);
  };
  const auto write_cell = [&](int row, int unit, int step) {
    const int64_t position = block.position(row, step);
    const int at = own.first + unit;
    const device::Four* const from = block.written(row, unit);
    const device::Four gates = from[0];
    const float extra = from[1].at[0];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (g >= G) continue;
      if (a.gates) a.gates[(position * G + g) * H + at] = gates.at[g];
      if (extended && a.normed && a.norm_hh) a.normed[position * a.normed_row + g * H + at] = from[2].at[g];
    }
    if (a.extra) a.extra[position * H + at] = extra;
    if (a.c_n && step == block.lengths[row] - 1)
      static_cast<Element*>(a.c_n)[(block.first_row + row) * H + at] = device::rounded<Element>(extra);
  };
  const auto write_output = [&](int row, int unit, int step) {
    const int64_t position = block.position(row, step);
    const int at = own_h.first + unit;
    const float h = block.written(row, unit)[1].at[1];
    static_cast<Element*>(a.output)[position * P + at] = device::rounded<Element>(h);
    if (a.exact) a.exact[position * P + at] = h;
    if (step == block.lengths[row] - 1) static_cast<Element*>(a.h_n)[(block.first_row + row) * P + at] = device::rounded<Element>(h);
  };
  const auto write = [&](int step) {
    block.each_unit(own_h, 0, block.rows, step, [&](int row, int unit) {
      write_output(row, unit, step);
      if constexpr (!extended) write_cell(row, unit, step);
    });
    if constexpr (extended) block.each_unit(own, 0, block.rows, step, [&](int row, int unit) { write_cell(row, unit, step); });
  };
  // `by` multiplies what is exchanged, pass by pass; item(row, unit, column) finds its sums there.
  const auto multiply = [&](const auto& by, const Exchange<operand>& from, int turn, const OwnUnits& of, int step, const auto& item) {
    for (int first = 0; first < block.rows; first += columns) {
      by.run(block.ready(from, turn, first), from.row_bytes, block.rows - first);
      device::copies_wait();
      device::block_sync();
      const int end = block.rows - first < columns ? block.rows : first + columns;
      block.each_unit(of, first, end, step, [&](int row, int unit) { item(row, unit, row - first); });
      if (first + columns < block.rows) device::block_sync();  // the sums' memory is the next pass's
    }
  };

  const auto take_steps = [&](const auto& step_of, const auto& write_rows) {
    for (int64_t begin = static_cast<int64_t>(block.team) * a.plan.rows; begin < a.batch;
         begin += static_cast<int64_t>(block.teams) * a.plan.rows) {
      const int steps = block.enter(begin);
      const int most = extended ? most_units(a.plan) : U;
      for (int i = threadIdx.x; i < block.rows * most; i += blockDim.x) {
        const int row = i / most, unit = i % most;
        const bool starts = block.lengths[row] > 0 && block.starts_in_memory(row, 0);
        if (unit < own_h.count) {
          const int64_t at = (begin + row) * P + own_h.first + unit;
          const float h = a.h0 ? a.h0[at] : 0.f;
          if (block.lengths[row] == 0) static_cast<Element*>(a.h_n)[at] = device::rounded<Element>(h);
          hand_on(row, unit, 0, starts, h);
        }
        if (unit < own.count) {
          const int64_t at = (begin + row) * H + own.first + unit;
          const float c = a.c0 ? a.c0[at] : 0.f;
          if (block.lengths[row] == 0 && a.c_n) static_cast<Element*>(a.c_n)[at] = device::rounded<Element>(c);
          *block.state(1, row, unit) = starts ? 0.f : c;
        }
      }
      block.meet(recurrent, 0, [&] {
        for (int step = 0; step < feed_turns; ++step) block.feed(step);
      });
      for (int step = 0; step < steps; ++step) {
        step_of(step);
        block.meet(recurrent, (step + 1) % 2, [&] {
          write(step);
          write_rows(step);
          block.feed(step + feed_turns);
        });
      }
    }
  };

  if constexpr (!extended) {
    take_steps(
        [&](int step) {
          multiply(product, recurrent, step % 2, own, step, [&](int row, int unit, int column) {
            float sums[4];
            product.summed(unit, U, G, column, sums);
            const bool starts = starts_after(row, step);
            settle(row, unit, step, starts, cell_step(row, unit, step, starts, sums));
          });
        },
        [](int) {});
  } else {
    const Exchange<operand> projected = block.projection();
    const auto projection = projection_of<Block, operand, cluster>(
        a, block, [&](int unit, int k) { return row_of<Element>(a.weight_hr, own_h.first + unit, k, H, unit < own_h.count); });
    RowStatistics<operand, cluster> statistics(a, block);
    const auto write_scales = [&](int step) {
      if (!a.normed || block.rank > 0) return;
      for (int row = threadIdx.x; row < block.rows; row += blockDim.x) {
        if (step >= block.lengths[row]) continue;
        float* const to = a.normed + block.position(row, step) * a.normed_row + G * H;
        to[scale_hh] = statistics.of(row)[2];
        if (a.norm_c) to[mean_c] = statistics.of(row)[0], to[scale_c] = statistics.of(row)[1];
      }
    };
    const auto finish = [&](int row, int unit, float h) {
      if (a.shape.projected)
        projected.put(0, row, 0, unit, h);
      else
        *block.kept(row, 0, unit) = h;
    };
    take_steps(
        [&](int step) {
          multiply(product, recurrent, step % 2, own, step, [&](int row, int unit, int column) {
            float sums[4];
            product.summed(unit, U, G, column, sums);
#pragma unroll
            for (int g = 0; g < 4; ++g)
              if (g < G) *block.kept(row, g, unit) = sums[g];
          });
          device::block_sync();
          if (a.norm_hh) {
            statistics.send_moments(0, G, step);
            statistics.meet();
            statistics.receive_moments(0, G);
            device::block_sync();
            for (int row = threadIdx.x; row < block.rows; row += blockDim.x) statistics.of(row)[2] = statistics.of(row)[1];
          }
          block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
            float sums[4];
#pragma unroll
            for (int g = 0; g < 4; ++g) {
              sums[g] = g < G ? *block.kept(row, g, unit) : 0.f;
              if (g >= G || !a.norm_hh) continue;
              sums[g] = (sums[g] - statistics.of(row)[0]) * statistics.of(row)[1];
              block.written(row, unit)[2].at[g] = sums[g];
              sums[g] *= *block.constant(norm_hh + g, unit);
            }
            const float h = cell_step(row, unit, step, starts_after(row, step), sums);
            if (!a.norm_c) finish(row, unit, h);
          });
          if (a.norm_c) {
            device::block_sync();
            statistics.send_moments(1, 1, step);
            statistics.meet();
            statistics.receive_moments(1, 1);
            device::block_sync();
            block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
              const float normal = (*block.kept(row, 0, unit) - statistics.of(row)[0]) * statistics.of(row)[1];
              finish(row, unit,
                     *block.kept(row, 1, unit) * tanhf(fmaf(normal, *block.constant(norm_c, unit), *block.constant(norm_b, unit))));
            });
          }
          statistics.pass();
          if (a.shape.projected) {
            block.meet(projected, 0, [] {});
            multiply(projection, projected, 0, own_h, step,
                     [&](int row, int unit, int column) { *block.kept(row, 0, unit) = projection.summed(unit, column); });
            device::block_sync();
          }
          block.each_unit(own_h, 0, block.rows, step,
                          [&](int row, int unit) { settle(row, unit, step, starts_after(row, step), *block.kept(row, 0, unit)); });
        },
        write_scales);
  }
}

template <Operand operand, bool cluster, int held, bool extended>
__global__ void __launch_bounds__(most_threads, 1) recurrence_backward(const __grid_constant__ RecurrenceBackward a) {
  using Block = RecurrenceBlock<operand, cluster, extended>;
  using Element = typename Block::Element;
  Block block(a);
  const Exchange<operand> recurrent = block.recurrent();
  const OwnUnits own = block.of_hidden, own_h = block.of_width;
  const int H = a.hidden, P = extended ? a.width : a.hidden, U = a.plan.units, G = a.shape.gates;
  // The block's rows of W_hh^T are its units of P.
  const BlockProduct<operand, cluster, recurrent_tiles(true), held> product(
      recurrent_product(a.plan, a.shape), block.template shared<device::Words>(block.layout().weights),
      block.template shared<float>(block.layout().partial), [&](int unit, int k) {
        const int gate = k / recurrent.stride, from = k % recurrent.stride;
        return column_of<Element>(a.weight_hh, static_cast<int64_t>(gate) * H + from, own_h.first + unit, P, H - from,
                                  gate < G && unit < own_h.count);
      });

  if constexpr (extended) {
    block.read_norms(own);
    block.read_constants(weight_sum, a.weight_sums, 1, 0, own_h);
  }

  // The gradient that reaches the step's new h, and in `direct` what of it reaches h of the step before without a product.
  const auto zoned = [&](int row, int unit, int step, float& direct) {
    const float dh = *block.state(0, row, unit) + *block.fed(step, row, 0, unit);
    const float share = new_share(a, stream_h, block.position(row, step), own_h.first + unit);
    direct = (1.f - share) * dh;
    return share * dh;
  };
  const auto cell_before = [&](int row, int unit, int step) {
    return block.has_before(row, step, a.c0) ? *block.fed(step, row, 5, unit) : 0.f;
  };
  // From the gradient of h that of the gates before activation, which goes out, and of the product's sums. squash(c): what an LSTM's output
  // gate multiplies, and the gradient of the new cell that comes through it.
  const auto cell_gradient = [&](int row, int unit, int step, bool starts, float dh, float& direct, float (&sums)[4], const auto& squash) {
    float dc = *block.state(1, row, unit), gate[4];
#pragma unroll
    for (int g = 0; g < 4; ++g) gate[g] = g < G ? *block.fed(step, row, 1 + g, unit) : 0.f;
    const float share_c = new_share(a, stream_c, block.position(row, step), own.first + unit);
    float recurrent_n = 0.f;
    if (a.cell == Cell::lstm) {
      const float c_before = cell_before(row, unit, step), kept = (1.f - share_c) * dc;
      const Squashed squashed = squash(fmaf(gate[1], c_before, gate[0] * gate[2]), gate[3]);
      dc = fmaf(share_c, dc, squashed.gradient);
      lstm_gradient(gate, c_before, squashed.value, dh, dc);
      dc += kept;
    } else if (a.cell == Cell::gru) {
      const float h_before = block.has_before(row, step, a.h0) ? *block.fed(step, row, 5, unit) : 0.f;
      direct += dh * gate[1];
      recurrent_n = gru_gradient(gate, *block.fed(step, row, 4, unit), h_before, dh);
    } else {
      rnn_gradient(gate, dh, a.cell == Cell::rnn_relu);
    }
    *block.state(1, row, unit) = starts ? 0.f : dc;
#pragma unroll
    for (int g = 0; g < 4; ++g) sums[g] = a.cell == Cell::gru && g == 2 ? recurrent_n : gate[g];
    block.written(row, unit)[0] = {gate[0], gate[1], gate[2], gate[3]};
    block.written(row, unit)[1].at[0] = recurrent_n;
  };
  const auto write_cell = [&](int row, int unit, int step) {
    const int64_t position = block.position(row, step);
    const device::Four gates = block.written(row, unit)[0];
    const float recurrent_n = block.written(row, unit)[1].at[0];
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      if (g >= G) continue;
      const int64_t to = (position * G + g) * H + own.first + unit;
      a.grad_inputs[to] = gates.at[g];
      if (a.grad_recurrent) a.grad_recurrent[to] = g == 2 ? recurrent_n : gates.at[g];  // a GRU's
    }
  };
  const auto write = [&](int step) {
    block.each_unit(own, 0, block.rows, step, [&](int row, int unit) { write_cell(row, unit, step); });
    if constexpr (extended) {
      if (!a.shape.projected) return;
      block.each_unit(own_h, 0, block.rows, step, [&](int row, int unit) {
        a.grad_projected[block.position(row, step) * P + own_h.first + unit] = block.written(row, unit)[1].at[1];
      });
    }
  };
  const auto multiply = [&](const auto& by, const Exchange<operand>& from, int turn, const OwnUnits& of, int step, const auto& before_sums,
                            const auto& item) {
    for (int first = 0; first < block.rows; first += columns) {
      by.run(block.ready(from, turn, first), from.row_bytes, block.rows - first);
      if (first == 0) before_sums();
      device::block_sync();
      const int end = block.rows - first < columns ? block.rows : first + columns;
      block.each_unit(of, first, end, step, [&](int row, int unit) { item(row, unit, row - first); });
      if (first + columns < block.rows) device::block_sync();
    }
  };

  int turn = 0;  // goes on from rows to rows: others may still read what the last step before exchanged
  const auto take_steps = [&](const auto& step_of) {
    for (int64_t begin = static_cast<int64_t>(block.team) * a.plan.rows; begin < a.batch;
         begin += static_cast<int64_t>(block.teams) * a.plan.rows) {
      const int steps = block.enter(begin);
      const int most = extended ? most_units(a.plan) : U;
      for (int i = threadIdx.x; i < block.rows * most; i += blockDim.x) {
        const int row = i / most, unit = i % most;
        if (unit < own_h.count) {
          const int64_t at = (begin + row) * P + own_h.first + unit;
          const float dh = a.grad_h ? a.grad_h[at] : 0.f;
          *block.state(0, row, unit) = dh;
          if (block.lengths[row] == 0) a.grad_h0[at] = dh;
        }
        if (unit < own.count) {
          const int64_t at = (begin + row) * H + own.first + unit;
          const float dc = a.grad_c ? a.grad_c[at] : 0.f;
          *block.state(1, row, unit) = dc;
          if (block.lengths[row] == 0 && a.grad_c0) a.grad_c0[at] = dc;
          if (extended && a.norm_c) *block.state(2, row, unit) = *block.state(3, row, unit) = 0.f;
        }
      }
      for (int ahead = 0; ahead < feed_turns; ++ahead) block.feed(steps - 1 - ahead);
      for (int step = steps - 1; step >= 0; --step, turn ^= 1) {
        device::copies_wait();
        device::block_sync();
        step_of(step);
      }
    }
  };
  // h's gradient with what the product brings, at the step's end.
  const auto settle = [&](int row, int unit, int step, float through) {
    const int64_t at = (block.first_row + row) * P + own_h.first + unit;
    float dh = *block.state(0, row, unit);
    if (!block.starts(row, step)) dh = fmaf(through, a.mask ? a.mask[at] : 1.f, dh);
    *block.state(0, row, unit) = dh;
    if (step == 0) a.grad_h0[at] = dh;
  };
  const auto settle_cell = [&](int row, int unit) {
    if (a.grad_c0) a.grad_c0[(block.first_row + row) * H + own.first + unit] = *block.state(1, row, unit);
  };

  if constexpr (!extended) {
    take_steps([&](int step) {
      block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
        const bool starts = block.starts(row, step);
        float direct, sums[4];
        const float dh = zoned(row, unit, step, direct);
        cell_gradient(row, unit, step, starts, dh, direct, sums, [&](float c, float o) { return squashed_cell(c, o, dh); });
        *block.state(0, row, unit) = starts ? 0.f : direct;
#pragma unroll
        for (int g = 0; g < 4; ++g)
          if (g < G) recurrent.put(turn, row, g, unit, sums[g]);
      });
      block.meet(recurrent, turn, [&] {
        write(step);
        block.feed(step - feed_turns);
      });
      multiply(
          product, recurrent, turn, own, step, [] {},
          [&](int row, int unit, int column) {
            settle(row, unit, step, product.summed(unit, column));
            if (step == 0) settle_cell(row, unit);
          });
    });
  } else {
    const Exchange<operand> projected = block.projection();
    const auto projection = projection_of<Block, operand, cluster>(
        a, block, [&](int unit, int k) { return column_of<Element>(a.weight_hr, k, own.first + unit, H, P - k, unit < own.count); });
    RowStatistics<operand, cluster> statistics(a, block);
    // Of an LSTM's cell, normalised: `normal`, and as `squashed_cell`, but the gradient is that of what w_c multiplies.
    const auto squashed_normal = [&](int row, int unit, int step, float c, float o, float dh, float& normal) {
      normal = (c - block.scale(step, row)[mean_c]) * block.scale(step, row)[scale_c];
      return squashed_cell(fmaf(normal, *block.constant(norm_c, unit), *block.constant(norm_b, unit)), o, dh);
    };
    take_steps([&](int step) {
      block.each_unit(own_h, 0, block.rows, step, [&](int row, int unit) {
        float direct;
        const float dh = zoned(row, unit, step, direct);
        *block.state(0, row, unit) = block.starts(row, step) ? 0.f : direct;
        if (a.norm_hh) *block.kept(row, 3, unit) = *block.fed(step, row, a.normed_feed + G, unit);
        if (a.shape.projected) {
          block.written(row, unit)[1].at[1] = dh;
          projected.put(0, row, 0, unit, dh);
        } else {
          *block.kept(row, 2, unit) = dh;
        }
      });
      if (a.shape.projected) {
        block.meet(projected, 0, [] {});
        multiply(
            projection, projected, 0, own, step, [] {},
            [&](int row, int unit, int column) { *block.kept(row, 2, unit) = projection.summed(unit, column); });
        device::block_sync();  // a pass's rows go to other threads than the whole tile's
      }
      if (a.norm_c) {
        block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
          const float i = *block.fed(step, row, 1, unit), f = *block.fed(step, row, 2, unit), g = *block.fed(step, row, 3, unit);
          float normal;
          const float c = fmaf(f, cell_before(row, unit, step), i * g), dh = *block.kept(row, 2, unit);
          const float through = squashed_normal(row, unit, step, c, *block.fed(step, row, 4, unit), dh, normal).gradient;
          *block.state(2, row, unit) += through * normal;
          *block.state(3, row, unit) += through;
          *block.kept(row, 0, unit) = through * *block.constant(norm_c, unit);
          *block.kept(row, 1, unit) = through * *block.constant(norm_c, unit) * normal;
        });
        device::block_sync();
        statistics.send_sums(1, step);
        statistics.meet();
        statistics.receive_means(1, 1);
        device::block_sync();
      }
      block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
        const bool starts = block.starts(row, step);
        float direct = 0.f, sums[4];
        const float dh = *block.kept(row, 2, unit);
        cell_gradient(row, unit, step, starts, dh, direct, sums, [&](float c, float o) {
          if (!a.norm_c) return squashed_cell(c, o, dh);
          float normal;
          Squashed squashed = squashed_normal(row, unit, step, c, o, dh, normal);
          const float *const means = statistics.of(row), apart = *block.kept(row, 0, unit) - means[0] - normal * means[1];
          squashed.gradient = block.scale(step, row)[scale_c] * apart;
          return squashed;
        });
        if (!starts && a.cell == Cell::gru) *block.state(0, row, unit) += direct;
        float sum = 0.f, sum_normal = 0.f;
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          if (g >= G) continue;
          if (a.norm_hh) {
            sums[g] *= *block.constant(norm_hh + g, unit);
            sum += sums[g];
            sum_normal = fmaf(sums[g], *block.fed(step, row, a.normed_feed + g, unit), sum_normal);
          }
          recurrent.put(turn, row, g, unit, sums[g]);
        }
        *block.kept(row, 0, unit) = sum;
        *block.kept(row, 1, unit) = sum_normal;
      });
      if (a.norm_hh) {
        device::block_sync();
        statistics.send_sums(0, step);
        for (int row = threadIdx.x; row < block.rows; row += blockDim.x) statistics.of(row)[2] = block.scale(step, row)[scale_hh];
      }
      block.meet(recurrent, turn, [&] {
        write(step);
        block.feed(step - feed_turns);
      });
      const auto receive = [&] {
        if (a.norm_hh) statistics.receive_means(0, G);
      };
      multiply(product, recurrent, turn, own_h, step, receive, [&](int row, int unit, int column) {
        float through = product.summed(unit, column);
        if (a.norm_hh) {
          const float* const means = statistics.of(row);
          through = means[2] * (through - means[0] * *block.constant(weight_sum, unit) - means[1] * *block.kept(row, 3, unit));
        }
        settle(row, unit, step, through);
      });
      statistics.pass();
      if (step > 0) return;
      block.each_unit(own, 0, block.rows, step, [&](int row, int unit) {
        settle_cell(row, unit);
        if (!a.norm_c) return;
        a.grad_norm_c[(block.first_row + row) * H + own.first + unit] = *block.state(2, row, unit);
        a.grad_norm_b[(block.first_row + row) * H + own.first + unit] = *block.state(3, row, unit);
      });
    });
  }
}

}  // namespace s2s::persistent
