// Runs the emulated kernels under a thread sanitizer: an LSTM forward and backward through both exchanges, rows of different lengths.
// The sizes are arguments: batch, time, hidden, units of a block.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "recurrence_emulated.h"

using namespace s2s::persistent;

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int64_t B = std::atoi(arguments[1]), T = std::atoi(arguments[2]), H = std::atoi(arguments[3]);
  const int units = std::atoi(arguments[4]);
  uint32_t state = 1;
  const auto noise = [&](int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = static_cast<float>(state = state * 1664525u + 1013904223u) / 4294967296.f - 0.5f;
    return values;
  };
  std::vector<float> inputs = noise(B * T * 4 * H), weight = noise(4 * H * H), h0 = noise(B * H), grad = noise(B * T * H);
  std::vector<float> output(B * T * H), h_n(B * H), c_n(B * H), gates(B * T * 4 * H), extra(B * T * H);
  std::vector<float> grad_inputs(B * T * 4 * H), grad_h0(B * H), grad_c0(B * H);
  std::vector<int64_t> lengths(B, T);
  lengths[0] = T / 2;
  const RecurrenceCall call{B, T, H, 0, static_cast<int64_t>(Operand::tf32), 0, 0, 0, 0};
  for (const int cluster : {0, 1}) {
    int team = static_cast<int>(H + units - 1) / units;
    while (cluster && (team & (team - 1))) ++team;
    const auto plan_for = [&](int tiles, bool backward) {
      RecurrencePlan plan{cluster, units, team, 1, 2 * columns, tiles, 2, 0, 0, 0};
      complete_plan(plan, shape_of(call, backward));
      return plan;
    };
    const auto there = plan_for((4 * units + 31) / 32, false), back = plan_for((units + 15) / 16, true);
    std::vector<device::Words> workspace((there.workspace_bytes + back.workspace_bytes) / 16 + 1);
    const RecurrenceForwardPointers forwards{inputs.data(),  weight.data(), nullptr,      h0.data(),        h0.data(),     nullptr,
                                             lengths.data(), nullptr,       nullptr,      workspace.data(), output.data(), h_n.data(),
                                             c_n.data(),     gates.data(),  extra.data(), nullptr};
    run_forward<Operand::tf32, held_here>(forward_arguments(there, call, forwards));
    workspace.assign(workspace.size(), {});
    const RecurrenceBackwardPointers backwards{grad.data(),   nullptr,        nullptr,        weight.data(),    h0.data(),
                                               h0.data(),     nullptr,        lengths.data(), nullptr,          nullptr,
                                               output.data(), gates.data(),   extra.data(),   workspace.data(), grad_inputs.data(),
                                               nullptr,       grad_h0.data(), grad_c0.data()};
    run_backward<Operand::tf32, held_here>(backward_arguments(back, call, backwards));
    std::printf("%s: %g\n", cluster ? "cluster" : "grid", static_cast<double>(grad_h0.back()));
  }
}
