// The launches of the persistent recurrences, for their binding. No torch, no CUDA headers: a stream is a pointer.
#pragma once
#include "recurrence_arguments.h"

namespace s2s::persistent {

// Null, or what went wrong in CUDA's words.
const char* launch_recurrence(const RecurrenceForward& arguments, void* stream);
const char* launch_recurrence(const RecurrenceBackward& arguments, void* stream);
// How many teams of the plan the current device can run at once.
const char* resident_teams(const RecurrencePlan& plan, Operand operand, bool backward, int* teams);

}  // namespace s2s::persistent
