// The kernels of causal convolution, gathered for each_isa.h.
#include "convolution_epilogue.h"
#include "convolution_forward.h"
#include "convolution_backward.h"
#include "convolution_step.h"
