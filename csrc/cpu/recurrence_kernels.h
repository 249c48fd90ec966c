// The kernels of the recurrences, gathered for each_isa.h.
#include "recurrence_rows.h"
#include "recurrence_forward.h"
#include "recurrence_backward.h"
