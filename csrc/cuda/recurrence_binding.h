// What the bindings of the persistent recurrences share: plans and sizes as lists of integers.
#pragma once
#include "../cpu/tensor.h"
#include "recurrence_arguments.h"

namespace s2s::persistent {

inline constexpr const char* op = "recurrence_persistent";

inline RecurrencePlan checked_plan(const std::vector<int64_t>& plan) {
  STD_TORCH_CHECK(plan.size() == plan_fields, op, ": plan must have ", plan_fields, " fields, got ", plan.size());
  return read_plan(plan.data());
}

inline RecurrenceCall checked_call(const std::vector<int64_t>& size, double zoneout_h, double zoneout_c) {
  STD_TORCH_CHECK(size.size() == call_sizes, op, ": size must have ", call_sizes, " entries, got ", size.size());
  return {size[0], size[1], size[2], size[3], size[4], size[5], size[6], size[7], size[8], size[9], zoneout_h, zoneout_c};
}

}  // namespace s2s::persistent
