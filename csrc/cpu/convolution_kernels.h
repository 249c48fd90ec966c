// The kernels of causal convolution over a sequence, gathered for each_isa.h.
#include "convolution_epilogue.h"
#include "convolution_forward.h"
#include "convolution_tiled.h"
#include "convolution_backward.h"
