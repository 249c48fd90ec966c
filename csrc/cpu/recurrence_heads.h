// Block-diagonal recurrent weights: each head is a recurrence of its own, of as many units, over the same input.
#pragma once
#include <vector>

#include "recurrence_call.h"

namespace s2s {

// weight_hh (heads, G H / heads, H / heads): the gates of a head in the order of those of all. What is kept for backward is laid out head
// by head, (heads, B, T, ...). Without projection, layer normalisation and what is random.
std::vector<Tensor> run_heads(const RecurrenceArguments& a, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, int64_t save);
std::vector<Tensor> run_heads_backward(const RecurrenceArguments& a, const RecurrenceKept& kept, int64_t needs);

}  // namespace s2s
