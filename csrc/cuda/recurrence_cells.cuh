// The arithmetic of one unit's step, in float32; the CPU's is in csrc/cpu/recurrence_forward.h and recurrence_backward.h.
#pragma once
#include "device.cuh"
#include "recurrence_arguments.h"

namespace s2s::persistent {

__device__ inline float sigmoid(float x) { return device::reciprocal(1.f + expf(-x)); }

// The share of its new value that a unit takes under zoneout: 0 or 1 in training. position: b T + t.
__device__ inline float new_share(const Recurrence& a, Stream stream, int64_t position, int unit) {
  const float p = stream == stream_h ? a.zoneout_h : a.zoneout_c;
  if (p <= 0.f) return 1.f;
  if (!a.training) return 1.f - p;
  const uint64_t threshold = stream == stream_h ? a.threshold_h : a.threshold_c;
  return random_word(a.seed[0], a.seed[1], stream, position, unit) >= threshold ? 1.f : 0.f;
}

// A share of 0 or 1 hides the other value, infinite ones too.
__device__ inline float blended(float share, float before, float now) {
  return share == 1.f ? now : share == 0.f ? before : fmaf(1.f - share, before, share * now);
}

// gate, recurrent: both products of each gate, and biases; become the activated gates, as backward reads them. The new h is what the
// output gate makes of c.
__device__ inline void lstm_step(float (&gate)[4], const float (&recurrent)[4], float& c) {
  gate[0] = sigmoid(gate[0] + recurrent[0]);
  gate[1] = sigmoid(gate[1] + recurrent[1]);
  gate[2] = tanhf(gate[2] + recurrent[2]);
  gate[3] = sigmoid(gate[3] + recurrent[3]);
  c = fmaf(gate[1], c, gate[0] * gate[2]);
}

// These two return the new h.
__device__ inline float gru_step(float (&gate)[4], const float (&recurrent)[4], float h) {
  gate[0] = sigmoid(gate[0] + recurrent[0]);
  gate[1] = sigmoid(gate[1] + recurrent[1]);
  gate[2] = tanhf(fmaf(gate[0], recurrent[2], gate[2]));
  return fmaf(gate[1], h, (1.f - gate[1]) * gate[2]);
}

__device__ inline float rnn_step(float (&gate)[4], const float (&recurrent)[4], bool relu) {
  const float sum = gate[0] + recurrent[0];
  gate[0] = relu ? (sum <= 0.f ? 0.f : sum) : tanhf(sum);  // a NaN comes through
  return gate[0];
}

// What an LSTM's output gate multiplies, and what of the gradient of h reaches before the tanh.
struct Squashed {
  float value, gradient;
};
__device__ inline Squashed squashed_cell(float c, float o, float dh) {
  const float value = tanhf(c);
  return {value, dh * o * (1.f - value * value)};
}

// gate: activated; becomes the gradient before activation. dc: of the new cell; becomes that of the one before.
__device__ inline void lstm_gradient(float (&gate)[4], float c_before, float squashed, float dh, float& dc) {
  const float i = gate[0], f = gate[1], g = gate[2], o = gate[3];
  gate[0] = dc * g * (i * (1.f - i));
  gate[1] = dc * c_before * (f * (1.f - f));
  gate[2] = dc * i * (1.f - g * g);
  gate[3] = dh * squashed * (o * (1.f - o));
  dc *= f;
}

// recurrent_n: W_hn h + b_hn. The gradient of the recurrent product is that of the gates but for n, whose is returned.
__device__ inline float gru_gradient(float (&gate)[4], float recurrent_n, float h_before, float dh) {
  const float r = gate[0], z = gate[1], n = gate[2];
  const float dn = dh * (1.f - z) * (1.f - n * n);
  gate[0] = dn * recurrent_n * (r * (1.f - r));
  gate[1] = dh * (h_before - n) * (z * (1.f - z));
  gate[2] = dn;
  return dn * r;
}

__device__ inline void rnn_gradient(float (&gate)[4], float dh, bool relu) {
  const float h = gate[0];
  gate[0] = relu ? (h <= 0.f ? 0.f : dh) : dh * (1.f - h * h);
}

}  // namespace s2s::persistent
