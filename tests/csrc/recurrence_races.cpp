// Runs the emulated kernels under a thread sanitizer: an LSTM forward and backward through both exchanges, rows of different lengths;
// plain, normalised, and normalised and projected, where a grid copies rows into shared memory too. The sizes are arguments: batch, time,
// hidden, units of a block.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "recurrence_emulated.h"

using namespace s2s::persistent;

namespace {

void run_both(const RecurrenceCall& call, int cluster, int units) {
  const int64_t B = call.batch, T = call.time, H = call.hidden, P = call.width;
  uint32_t state = 1;
  const auto noise = [&](int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = static_cast<float>(state = state * 1664525u + 1013904223u) / 4294967296.f - 0.5f;
    return values;
  };
  const std::vector<float> inputs = noise(B * T * 4 * H), weight = noise(4 * H * P), projection = noise(P * H), h0 = noise(B * P);
  const std::vector<float> c0 = noise(B * H), grad = noise(B * T * P), norm = noise(4 * H), product = noise(B * T * P);
  std::vector<float> output(B * T * P), h_n(B * P), c_n(B * H), gates(B * T * 4 * H), extra(B * T * H), normed(B * T * (8 * H + 16));
  std::vector<float> grad_inputs(B * T * 4 * H), grad_h0(B * P), grad_c0(B * H), grad_projected(B * T * P), grad_norms(2 * B * H);
  std::vector<int64_t> lengths(B, T);
  lengths[0] = T / 2;

  int team = static_cast<int>(H + units - 1) / units;
  while (cluster && (team & (team - 1))) ++team;
  const auto plan_for = [&](bool backward) {
    RecurrencePlan plan{};
    plan.cluster = cluster, plan.staged = !cluster && call.projected, plan.units = units, plan.team = team, plan.teams = 1,
    plan.rows = 2 * columns, plan.warps_k = 2;
    complete_plan(plan, shape_of(call, backward));
    return plan;
  };
  const RecurrencePlan there = plan_for(false), back = plan_for(true);
  std::vector<device::Words> workspace((there.workspace_bytes + back.workspace_bytes) / 16 + 1);

  RecurrenceForwardPointers forward{};
  forward.inputs = inputs.data(), forward.weight_hh = weight.data(), forward.h0 = h0.data(), forward.c0 = c0.data();
  forward.lengths = lengths.data(), forward.workspace = workspace.data(), forward.output = output.data(), forward.h_n = h_n.data();
  forward.c_n = c_n.data(), forward.gates = gates.data(), forward.extra = extra.data();
  RecurrenceBackwardPointers backward{};
  backward.grad_output = grad.data(), backward.weight_hh = weight.data(), backward.h0 = h0.data(), backward.c0 = c0.data();
  backward.lengths = lengths.data(), backward.output = output.data(), backward.gates = gates.data(), backward.extra = extra.data();
  backward.workspace = workspace.data(), backward.grad_inputs = grad_inputs.data(), backward.grad_h0 = grad_h0.data();
  backward.grad_c0 = grad_c0.data();
  if (call.projected) {
    forward.weight_hr = backward.weight_hr = projection.data();
    backward.grad_projected = grad_projected.data();
  }
  if (call.normed) {
    forward.norm_hh = forward.norm_c = forward.norm_b = backward.norm_hh = backward.norm_c = backward.norm_b = norm.data();
    forward.normed = normed.data(), backward.normed = normed.data();
    backward.normed_product = product.data(), backward.weight_sums = h0.data();
    backward.grad_norm_c = grad_norms.data(), backward.grad_norm_b = grad_norms.data() + B * H;
  }
  run_of<Operand::tf32>(forward_arguments(there, call, forward));
  workspace.assign(workspace.size(), {});
  run_of<Operand::tf32>(backward_arguments(back, call, backward));
  std::printf("%s: %g\n", cluster ? "cluster" : "grid", static_cast<double>(grad_h0.back()));
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int64_t B = std::atoi(arguments[1]), T = std::atoi(arguments[2]), H = std::atoi(arguments[3]);
  const int64_t few = B < 18 ? B : 18;  // two passes
  for (const int cluster : {0, 1}) {
    const auto operand = static_cast<int64_t>(Operand::tf32);
    const int units = std::atoi(arguments[4]);
    run_both({B, T, H, H, 0, operand, 0, 0, 0, 0, 0, 0}, cluster, units);
    run_both({few, T, H, H, 0, operand, 0, 0, 1, 0, 0, 0}, cluster, units);
    run_both({few, T, H, H / 2, 0, operand, 0, 0, 1, 1, 0, 0}, cluster, units);
  }
}
