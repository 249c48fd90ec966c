// Runs the emulated kernels under a thread sanitizer, forward and backward, and checks that what they give is finite: what an emulated copy
// overwrites, and shared memory that nothing has been written to, are NaN. An argument says which synchronisation the emulator forgets.
#include <algorithm>
#include <cstdio>
#include <string_view>
#include <vector>

#include "recurrence_emulated.h"

using namespace s2s::persistent;
using s2s::Cell;

namespace {

// Options of a case.
constexpr int staged = 1, normed = 2, projected = 4, reset = 8, reverse = 16, ragged = 32, state = 64, masked = 128, zoned = 256;

struct Case {
  const char* name;
  Cell cell;
  Operand operand;
  bool cluster;
  int batch, hidden, width, units, teams, rows, options;
};

// Two of everything that there are barriers between: blocks, warps, passes of a tile, tiles that a team takes in turn. A thread has other
// rows in a pass than in the whole tile where 16 is no multiple of how many rows a block's threads take at once.
const Case cases[] = {
    {"lstm grid", Cell::lstm, Operand::tf32, false, 40, 21, 21, 11, 2, 16, ragged | state},
    {"lstm cluster", Cell::lstm, Operand::tf32, true, 37, 24, 24, 12, 1, 32, ragged | state | zoned},
    {"gru grid", Cell::gru, Operand::bfloat16, false, 20, 24, 24, 12, 1, 32, staged | reset | reverse | ragged | masked},
    {"gru cluster", Cell::gru, Operand::tf32, true, 33, 24, 24, 12, 2, 16, state | reset | masked},
    {"rnn grid", Cell::rnn_tanh, Operand::tf32, false, 33, 17, 17, 9, 1, 16, reset | reverse | zoned},
    {"rnn cluster", Cell::rnn_relu, Operand::bfloat16, true, 18, 21, 21, 8, 1, 32, ragged | state},
    {"lstm normed grid", Cell::lstm, Operand::tf32, false, 34, 24, 24, 12, 1, 32, normed | state | ragged},
    {"lstm normed cluster", Cell::lstm, Operand::bfloat16, true, 20, 21, 21, 8, 1, 16, normed | reset | reverse},
    {"gru normed grid", Cell::gru, Operand::bfloat16, false, 20, 24, 24, 12, 1, 32, normed | staged | state | reset},
    {"rnn normed cluster", Cell::rnn_tanh, Operand::tf32, true, 33, 24, 24, 12, 2, 16, normed | masked | ragged},
    {"lstm projected grid", Cell::lstm, Operand::bfloat16, false, 34, 24, 20, 12, 1, 32, projected | staged | state | zoned},
    {"lstm projected cluster", Cell::lstm, Operand::tf32, true, 20, 24, 21, 12, 1, 32, projected | ragged | reset},
    {"lstm normed projected grid", Cell::lstm, Operand::tf32, false, 35, 24, 21, 12, 2, 32, normed | projected | state | reverse | ragged},
    {"lstm normed projected cluster", Cell::lstm, Operand::tf32, true, 35, 24, 20, 12, 1, 32, normed | projected | state | masked},
};

template <class Arguments>
void run_any(const Arguments& a) {
  a.shape.operand == Operand::bfloat16 ? run_of<Operand::bfloat16>(a) : run_of<Operand::tf32>(a);
}

// Whether all results are finite.
bool runs(const Case& c) {
  const int64_t B = c.batch, T = 4, H = c.hidden, P = c.width, G = s2s::gates_of(c.cell);
  const auto has = [&](int option) { return (c.options & option) != 0; };
  const bool lstm = c.cell == Cell::lstm;
  RecurrenceCall call{};
  call.batch = B, call.time = T, call.hidden = H, call.width = P;
  call.cell = static_cast<int64_t>(c.cell), call.operand = static_cast<int64_t>(c.operand);
  call.reverse = has(reverse), call.training = has(zoned), call.normed = has(normed), call.projected = has(projected);
  call.zoneout_h = has(zoned) ? 0.3 : 0, call.zoneout_c = lstm ? call.zoneout_h : 0;

  uint32_t word = 1;
  const auto noise = [&](int64_t size) {
    std::vector<float> values(size);
    for (float& value : values) value = static_cast<float>(word = word * 1664525u + 1013904223u) / 4294967296.f - 0.5f;
    return values;
  };
  // Of the operand's type.
  const auto weights = [&](int64_t size) {
    std::vector<float> values = noise(size);
    if (c.operand == Operand::bfloat16)
      for (int64_t i = 0; i < size; ++i)
        reinterpret_cast<device::bfloat16*>(values.data())[i] = device::rounded<device::bfloat16>(values[i]);
    return values;
  };
  const auto inputs = noise(B * T * G * H), weight = weights(G * H * P), projection = weights(P * H), h0 = noise(B * P), c0 = noise(B * H);
  const auto bias = noise(G * H), mask = noise(B * P), norm = noise(G * H), product = noise(B * T * P), grad = noise(B * T * P);
  const int64_t seed[2] = {3, 4};
  std::vector<int64_t> lengths(B, T);
  lengths[0] = T / 2, lengths[B - 1] = 0;
  std::vector<uint8_t> flags(B * T);
  for (int64_t i = 0; i < B * T; i += 3) flags[i] = 1;
  const int64_t normed_row = 2 * G * H + 16;
  std::vector<float> output(B * T * P), h_n(B * P), c_n(B * H), gates(B * T * G * H), extra(B * T * H), exact(B * T * P);
  std::vector<float> kept(B * T * normed_row), grad_inputs(B * T * G * H), grad_recurrent(B * T * G * H), grad_h0(B * P), grad_c0(B * H);
  std::vector<float> grad_projected(B * T * P), grad_norm_c(B * H), grad_norm_b(B * H);

  const auto plan_for = [&](bool backward) {
    RecurrencePlan plan{};
    plan.cluster = c.cluster, plan.staged = has(staged), plan.units = c.units, plan.team = static_cast<int>(H + c.units - 1) / c.units;
    while (c.cluster && (plan.team & (plan.team - 1))) ++plan.team;
    plan.teams = c.teams, plan.rows = c.rows, plan.warps_k = 2;
    complete_plan(plan, shape_of(call, backward));
    return plan;
  };
  const RecurrencePlan there = plan_for(false), back = plan_for(true);
  std::vector<device::Words> workspace((there.workspace_bytes + back.workspace_bytes) / 16 + 1);

  RecurrenceForwardPointers forward{};
  RecurrenceBackwardPointers backward{};
  const auto both = [&](auto& pointers) {
    pointers.weight_hh = weight.data(), pointers.workspace = workspace.data(), pointers.seed = seed;
    if (has(state)) pointers.h0 = h0.data();
    if (has(state) && lstm) pointers.c0 = c0.data();
    if (has(masked)) pointers.mask = mask.data();
    if (has(ragged)) pointers.lengths = lengths.data();
    if (has(reset)) pointers.reset = flags.data();
    if (has(projected)) pointers.weight_hr = projection.data();
    if (has(normed)) pointers.norm_hh = norm.data(), pointers.normed = kept.data();
    if (has(normed) && lstm) pointers.norm_c = pointers.norm_b = norm.data();
    pointers.gates = gates.data(), pointers.extra = extra.data();
  };
  both(forward), both(backward);
  forward.inputs = inputs.data(), forward.output = output.data(), forward.h_n = h_n.data(), forward.exact = exact.data();
  if (c.cell == Cell::gru) forward.bias_hh = bias.data(), backward.grad_recurrent = grad_recurrent.data();
  backward.grad_output = grad.data(), backward.output = exact.data(), backward.grad_inputs = grad_inputs.data();
  backward.grad_h0 = grad_h0.data();
  if (lstm) forward.c_n = c_n.data(), backward.grad_c0 = grad_c0.data();
  if (has(state)) backward.grad_h = h0.data();
  if (has(state) && lstm) backward.grad_c = c0.data();
  if (has(projected)) backward.grad_projected = grad_projected.data();
  if (has(normed)) {
    backward.normed_product = product.data(), backward.weight_sums = bias.data();
    if (lstm) backward.grad_norm_c = grad_norm_c.data(), backward.grad_norm_b = grad_norm_b.data();
  }
  run_any(forward_arguments(there, call, forward));
  workspace.assign(workspace.size(), {});
  run_any(backward_arguments(back, call, backward));
  for (const auto* results : {&exact, &gates, &grad_inputs, &grad_h0, &grad_c0, &grad_norm_c})
    for (const float value : *results)
      if (!std::isfinite(value)) return false;
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string_view> kinds{"nothing", "block", "cluster", "grid", "copies"};
  const auto kind = std::find(kinds.begin(), kinds.end(), count > 1 ? arguments[1] : kinds[0]);
  if (kind == kinds.end()) return 2;
  emulator::forgotten = static_cast<emulator::Forgotten>(kind - kinds.begin());
  for (const Case& c : cases) {
    std::printf("%s: ", c.name);
    std::fflush(stdout);  // a race ends the program
    const bool finite = runs(c);
    std::puts(finite ? "finite" : "not finite");
    if (!finite) return 1;
  }
}
