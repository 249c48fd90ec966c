// What the recurrences of every device share: their cells, and the random numbers of their masks.
#pragma once
#include <cstdint>

namespace s2s {

enum class Cell : int64_t { lstm, gru, rnn_tanh, rnn_relu };

constexpr int64_t gates_of(Cell cell) { return cell == Cell::lstm ? 4 : cell == Cell::gru ? 3 : 1; }

// Whether backward needs the gates themselves: an RNN's is its output, unless zoneout takes the output from before.
constexpr bool keeps_gates(Cell cell, double zoneout_h) { return cell == Cell::lstm || cell == Cell::gru || zoneout_h > 0; }

// Which random numbers of the call's seed each mask takes.
enum Stream : uint32_t { stream_h = 0, stream_c = 1, stream_weight = 2 };

}  // namespace s2s
