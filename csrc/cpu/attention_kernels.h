// The kernels of attention, gathered for each_isa.h.
#include "attention_tile.h"
#include "attention_scores.h"
#include "attention_tiled.h"
#include "attention_tiled_forward.h"
#include "attention_forward.h"
#include "attention_tiled_backward.h"
#include "attention_backward.h"
#include "attention_decode.h"
