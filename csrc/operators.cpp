// Every operator's schema, in one place, and the module that Python imports to load them.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(s2s, m) {
  // recurrence
  m.def(
      "recurrence_forward(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, Tensor? c0, Tensor? "
      "weight_hr, Tensor? recurrent_mask, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_b, Tensor? lengths, Tensor? "
      "reset, "
      "Tensor? seed, int cell, bool reverse, float zoneout_h, float zoneout_c, bool training, float weight_dropout, bool packed, int "
      "cuda, int save) -> "
      "Tensor[]");
  m.def(
      "recurrence_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? h0, "
      "Tensor? c0, Tensor? weight_hr, Tensor? recurrent_mask, Tensor? norm_ih, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_b, Tensor? "
      "lengths, Tensor? reset, Tensor? seed, Tensor? gates, Tensor? extra, Tensor? hidden, Tensor? normed, int cell, bool reverse, float "
      "zoneout_h, float zoneout_c, bool training, float weight_dropout, bool packed, int cuda, int needs) -> Tensor[]");
  m.def(
      "recurrence_step(Tensor x, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? h0, Tensor? c0, int cell) "
      "-> "
      "Tensor[]");
  m.def(
      "recurrence_stack_forward(Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? lengths, Tensor? reset, int cell, int "
      "directions, bool bias, bool projected, bool normed, float zoneout_h, float zoneout_c, bool time_first, bool packed, int save) -> "
      "Tensor[]");
  m.def(
      "recurrence_stack_backward(Tensor? grad_output, Tensor? grad_h, Tensor? grad_c, Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, "
      "Tensor? lengths, Tensor? reset, Tensor output, Tensor[] saved, int cell, int directions, bool bias, bool projected, bool normed, "
      "float zoneout_h, float zoneout_c, bool time_first, bool packed, int[] needs) -> Tensor[]");

  // The parts of a recurrence that go through time, on a GPU: no operators of their own, s2s_kernels/ops/recurrence calls them.
  // What a plan is predicted to take, in nanoseconds a step, can be asked without one.
  m.def("recurrence_persistent_plan(int[] size, bool backward, int[] machine) -> int[]");
  m.def("recurrence_persistent_step(int[] size, bool backward, int[] machine, int[] plan) -> float");
#if defined(S2S_CUDA)
  m.def("recurrence_persistent_resident(int[] plan, int operand, bool backward, int device) -> int");
  m.def(
      "recurrence_persistent_forward(Tensor inputs, Tensor weight_hh, Tensor? bias_hh, Tensor? h0, Tensor? c0, Tensor? weight_hr, Tensor? "
      "recurrent_mask, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_b, Tensor? lengths, Tensor? reset, Tensor? seed, Tensor(a!) "
      "workspace, "
      "Tensor(b!) output, Tensor(c!) h_n, Tensor(d!)? c_n, Tensor(e!)? gates, Tensor(f!)? extra, Tensor(g!)? hidden, Tensor(h!)? normed, "
      "int[] size, float zoneout_h, float zoneout_c, int[] plan) -> ()");
  m.def(
      "recurrence_persistent_backward(Tensor grad_output, Tensor? grad_h, Tensor? grad_c, Tensor weight_hh, Tensor? h0, Tensor? c0, "
      "Tensor? weight_hr, Tensor? recurrent_mask, Tensor? norm_hh, Tensor? norm_c, Tensor? norm_b, Tensor? lengths, Tensor? reset, Tensor? "
      "seed, Tensor states, Tensor? gates, Tensor? extra, Tensor? normed, Tensor? normed_product, Tensor? weight_sums, Tensor(a!) "
      "workspace, "
      "Tensor(b!) grad_inputs, Tensor(c!)? grad_recurrent, Tensor(d!) grad_h0, Tensor(e!)? grad_c0, Tensor(f!)? grad_projected, "
      "Tensor(g!)? "
      "grad_norm_c, Tensor(h!)? grad_norm_b, int[] size, float zoneout_h, float zoneout_c, int[] plan) -> ()");
#endif

  // convolution
  m.def(
      "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? lengths, Tensor? initial_state, Tensor? "
      "condition, "
      "int dilation, int groups, int activation, bool causal, bool save) -> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? saved, Tensor? lengths, Tensor? initial_state, int dilation, "
      "int groups, "
      "int activation, bool causal, bool saved_output, bool need_x, bool need_weight, bool need_bias, bool need_state, bool "
      "need_condition) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d_step(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor weight, Tensor? bias, Tensor? residual, int dilation, "
      "int groups, "
      "int activation) -> Tensor");
  m.def("conv_stack_pack(Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def(
      "wavenet_step(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor[] weights, Tensor[] biases, Tensor? packed, Tensor? "
      "condition, int[] dilations, int taps, int skips) -> Tensor");
  m.def(
      "tcn_step(Tensor x_t, Tensor(a!) ring, Tensor(b!) position, Tensor[] weights, Tensor[] biases, Tensor? packed, int[] dilations, int "
      "taps, int[] "
      "channels) -> Tensor");

  // attention
  m.def(
      "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? query_lengths, Tensor? key_lengths, "
      "Tensor? alibi_slopes, Tensor? seed, int? left, int? right, bool bottom_right, float dropout_p, float? scale, float? softcap, "
      "bool save, bool save_wide) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor softmax, Tensor query, Tensor key, Tensor value, "
      "Tensor? mask, Tensor? bias, Tensor? query_lengths, Tensor? key_lengths, Tensor? alibi_slopes, Tensor? seed, int? left, int? right, "
      "bool bottom_right, float dropout_p, float? scale, float? softcap, bool need_query, bool need_key, bool need_value, "
      "bool need_bias, bool need_slopes) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_packed_forward(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, "
      "Tensor? seed, int? left, int? right, bool bottom_right, float dropout_p, float? scale, float? softcap, bool save) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def(
      "attention_packed_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor softmax, Tensor query, Tensor key, Tensor value, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? alibi_slopes, Tensor? seed, int? left, int? right, bool bottom_right, float "
      "dropout_p, float? scale, float? softcap, bool need_query, bool need_key, bool need_value, bool need_slopes) -> (Tensor, Tensor, "
      "Tensor, Tensor)");

  // additive attention
  m.def("additive_attention_prepare(Tensor key, Tensor? key_lengths) -> (Tensor, Tensor)");
  m.def(
      "additive_attention_forward(Tensor query, Tensor key, Tensor value, Tensor weight, Tensor? mask, Tensor? key_lengths, Tensor? seed, "
      "Tensor? table, Tensor? outliers, float dropout_p, bool return_weights, bool save) -> (Tensor, Tensor, Tensor)");
  m.def(
      "additive_attention_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor key, Tensor value, Tensor weight, "
      "Tensor statistics, Tensor? mask, Tensor? key_lengths, Tensor? seed, Tensor? table, Tensor? outliers, float dropout_p, bool "
      "need_query, bool need_key, bool need_value, bool need_weight) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_pool_forward(Tensor x, Tensor weight, Tensor bias, Tensor context, Tensor? lengths) -> (Tensor, Tensor)");
  m.def(
      "attention_pool_backward(Tensor? grad_pooled, Tensor? grad_weights, Tensor x, Tensor weight, Tensor bias, Tensor context, Tensor "
      "weights, Tensor? lengths) -> (Tensor, Tensor, Tensor, Tensor)");
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
