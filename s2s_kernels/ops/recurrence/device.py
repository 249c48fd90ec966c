"""The operators of recurrences on CUDA tensors, under the schemas of csrc/operators.cpp.

The products over all positions are the library's: of x with W_ih before the recurrent part, and after it, in backward,
those that give the gradients of x and of the weights. What lies between is an engine's, which `choice` names:

    forward(inputs, weight_hh, bias_hh, h0, c0, weight_hr, recurrent_mask, norm_hh, norm_c, norm_b, lengths, reset,
            seed, *, cell, reverse, zoneout_h, zoneout_c, training, save, dtype)
        -> output, h_n, c_n, gates, extra, hidden, normed_hh

inputs (B, T, G), float32, are [LN](W_ih x) + b_ih, and b_hh where it is only added to that: bias_hh is then None. The
weights, the mask and the states are of `dtype`, the rest float32. With `save` it returns what `autograd` names, all
float32; normed_hh is in a layout of its own. Rows past a length are undefined there.

    backward(grad_output, grad_h, grad_c, weight_hh, h0, c0, weight_hr, recurrent_mask, norm_hh, norm_c, norm_b,
             lengths, reset, seed, output, gates, extra, hidden, normed_hh,
             *, cell, reverse, zoneout_h, zoneout_c, training, dtype)
        -> grad_inputs, grad_recurrent, grad_h0, grad_c0, grad_projected, grad_norm_c, grad_norm_b

`hidden` holds the states where they are not in the output, which then stands for nothing but the sizes.
grad_recurrent is the gradient of W_hh h, grad_inputs itself where the two are equal, grad_projected that of W_hr's
product; both are 0 past a length. From these the driver has, with h the state that a step saw (`recurrent_input`):

    W_hh: grad_recurrent^T (mask h), and weight drop's factors;   mask: the sum over time of h (grad_recurrent W_hh)
    the result of LN(W_hh h), which b_hh is added to: grad_inputs, a GRU's candidate rows times r
    LN(W_hh h): its weight's gradient from that and the normalised product, which is made again

Of heads, an engine that takes a whole sequence in one kernel gets rows of a batch of their own (`device_heads`) and
weight_hh (heads, G, H); every other the matrix that the heads stand for.

The engines' layouts are their own, so layer normalisation costs two products more in backward than it must. A packed
sequence is padded between the products; its longest row is read by the host, the one synchronisation of this file.
"""

import torch
import torch.nn.functional as F

from .autograd import CELLS
from .device_call import call_of, check, check_saved, contiguous, wide
from .device_gradients import WANTED, Gradients
from .device_heads import apart, together
from .products import product
from .reference import EPS, GATES, diagonal_blocks
from .triton_steps import step

Optional = torch.Tensor | None


def recurrence_forward(
    x: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, bias_ih: Optional, bias_hh: Optional,
    h0: Optional, c0: Optional, weight_hr: Optional, recurrent_mask: Optional, norm_ih: Optional, norm_hh: Optional,
    norm_c: Optional, norm_b: Optional, lengths: Optional, reset: Optional, seed: Optional, cell: int, reverse: bool,
    zoneout_h: float, zoneout_c: float, training: bool, weight_dropout: float, packed: bool, cuda: int, save: int,
) -> list[torch.Tensor]:  # fmt: skip
    call = call_of(
        "recurrence", x, weight_ih, weight_hh, (bias_ih, bias_hh), h0, c0, weight_hr, recurrent_mask,
        (norm_ih, norm_hh, norm_c, norm_b),
        lengths, reset, seed, cell, reverse, zoneout_h, zoneout_c, training, weight_dropout, packed, cuda,
    )  # fmt: skip
    inputs = product(x.flatten(0, -2), weight_ih.t())
    if call.norm_ih is not None:
        inputs = F.layer_norm(inputs, inputs.shape[1:], call.norm_ih, wide(bias_ih), EPS)
    else:
        bias = bias_ih
        if bias_hh is not None and CELLS[cell] != "gru":  # in float32, to which the sum is promoted
            bias, bias_hh = bias_hh if bias_ih is None else bias_ih.to(torch.float32) + bias_hh, None
        if bias is not None:
            inputs += bias
    bias_hh = wide(bias_hh)
    padded = inputs.view(*x.shape[:-1], inputs.shape[1]) if call.packing is None else call.packing.pad(inputs)
    gates = GATES[CELLS[cell]]
    if call.heads > 1:
        padded = apart(padded, call.heads, gates)
        bias_hh = None if bias_hh is None else apart(bias_hh.unsqueeze(0), call.heads, gates)
    output, h_n, c_n, *saved = call.engine.forward(
        padded, call.weight_hh, bias_hh, *call.recurrent(), save=bool(save), **call.options
    )
    states = [h_n] if c_n is None else [h_n, c_n]
    if call.heads > 1:
        output, *states = (together(v, call.heads) for v in (output, *states))
    shown = call.packed(output)
    assert shown is not None
    kept = [v for v in map(call.packed, saved) if v is not None]
    if weight_hh.dim() == 3:  # as others lay it out, though where heads aren't apart it is one matrix's
        each = 1 if call.apart else weight_hh.shape[0]
        kept = [v.view(weight_hh.shape[0], *x.shape[:-1], v.shape[-1] // each) for v in kept]
    return [shown, *states, *kept]


def recurrence_backward(
    grad_output: Optional, grad_h: Optional, grad_c: Optional, x: torch.Tensor, weight_ih: torch.Tensor,
    weight_hh: torch.Tensor, h0: Optional, c0: Optional, weight_hr: Optional, recurrent_mask: Optional,
    norm_ih: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional, reset: Optional,
    seed: Optional, gates: Optional, extra: Optional, hidden: torch.Tensor, normed: Optional, cell: int,
    reverse: bool, zoneout_h: float, zoneout_c: float, training: bool, weight_dropout: float, packed: bool,
    cuda: int, needs: int,
) -> list[torch.Tensor]:  # fmt: skip
    call = call_of(
        "recurrence_backward", x, weight_ih, weight_hh, (), h0, c0, weight_hr, recurrent_mask,
        (norm_ih, norm_hh, norm_c, norm_b), lengths, reset, seed, cell, reverse, zoneout_h, zoneout_c, training,
        weight_dropout, packed, cuda,
    )  # fmt: skip
    check_saved(call, x, weight_hh, (grad_output, grad_h, grad_c), (gates, extra, hidden, normed))
    if weight_hh.dim() == 3:

        def engines(kept: Optional) -> Optional:
            if kept is None:
                return None
            return kept.flatten(0, 1) if call.apart else kept.reshape(*x.shape[:-1], kept.shape[0] * kept.shape[-1])

        gates, extra = engines(gates), engines(extra)
        states = hidden if x.dtype == torch.float32 else engines(hidden)
        assert states is not None
        hidden = apart(states, call.heads) if call.apart and x.dtype == torch.float32 else states
    if call.heads > 1:
        grad_output, grad_h, grad_c = (
            None if v is None else apart(v, call.heads) for v in (grad_output, grad_h, grad_c)
        )
    gates, extra, normed, grad_output = map(call.padded, (gates, extra, normed, grad_output))
    states = call.padded(hidden)
    assert states is not None
    exact = None if x.dtype == torch.float32 else states
    grads = call.engine.backward(
        grad_output, grad_h, grad_c, call.weight_hh, *call.recurrent(), states, gates, extra, exact, normed,
        **call.options,
    )  # fmt: skip
    found = Gradients(call, x, weight_ih, gates, extra, states, weight_dropout, *grads)
    wanted = {name: getattr(found, name) for place, name in enumerate(WANTED) if needs >> place & 1}
    if weight_hh.dim() == 3 and not call.apart and "weight_hh" in wanted:
        blocks = diagonal_blocks(wanted["weight_hh"], weight_hh.shape[0], GATES[CELLS[cell]])
        wanted["weight_hh"] = blocks.contiguous()
    return [grad.to(x.dtype) for grad in wanted.values()]


def recurrence_step(
    x: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, bias_ih: Optional, bias_hh: Optional,
    h0: Optional, c0: Optional, cell: int,
) -> list[torch.Tensor]:  # fmt: skip
    check(
        "recurrence_step", x, weight_ih, weight_hh, (bias_ih, bias_hh), h0, c0, None, None, (), None, None, cell, False
    )  # fmt: skip
    inputs = product(x, weight_ih.t())
    return step(
        inputs, wide(bias_ih), weight_hh.contiguous(), wide(bias_hh), contiguous(h0), contiguous(c0), cell
    )  # fmt: skip
