// The kernels of causal convolution step by step, gathered for each_isa.h.
#include "convolution_epilogue.h"
#include "convolution_step.h"
