"""Fake kernels of the recurrences, and the function that differentiates them."""

import contextlib

import torch

from ..differentiation import Options, Tensors
from ..random import keep_mask
from . import reference

# Which random numbers of the call's seed each mask takes.
STREAM_H, STREAM_C, STREAM_WEIGHT = 0, 1, 2

# tensors: x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, four of layer_norm, lengths,
# reset, seed. options: cell, reverse, zoneout of h, zoneout of c, whether in training, weight_dropout.


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask = tensors[:9]
    layer_norm, (lengths, reset, seed) = tensors[9:13], tensors[13:]
    cell, reverse, zoneout_h, zoneout_c, training, weight_dropout = options
    assert x is not None and weight_ih is not None and weight_hh is not None
    (batch, time, _), hidden = x.shape, weight_ih.shape[0] // reference.GATES[cell]
    update_h = update_c = factors = None
    if training and zoneout_h > 0:
        assert seed is not None
        update_h = keep_mask(seed, (batch, time, weight_hh.shape[1]), zoneout_h, STREAM_H)
    if training and zoneout_c > 0:
        assert seed is not None
        update_c = keep_mask(seed, (batch, time, hidden), zoneout_c, STREAM_C)
    if weight_dropout > 0:
        assert seed is not None
        factors = keep_mask(seed, tuple(weight_hh.shape), weight_dropout, STREAM_WEIGHT).to(torch.float64)
        factors = factors / (1 - weight_dropout if weight_dropout < 1 else 1)
    # The arguments have been cast already; what is made of them here is wider on purpose.
    device = x.device.type
    plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else None
    with plain or contextlib.nullcontext():
        return reference.recurrence(
            cell,
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            h0,
            c0,
            lengths=lengths,
            reset=reset,
            reverse=reverse,
            weight_hr=weight_hr,
            recurrent_mask=recurrent_mask,
            zoneout=(zoneout_h, zoneout_c),
            update=(update_h, update_c),
            layer_norm=layer_norm,
            weight_factors=factors,
        )
