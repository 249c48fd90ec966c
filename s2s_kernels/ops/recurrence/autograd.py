"""Fake kernels of the recurrences, and the function that differentiates them."""

import torch

from ... import checks, dispatch
from .. import python_kernels
from ..differentiation import Options, Tensors, differentiable
from ..random import keep_mask
from . import reference

# Which random numbers of the call's seed each mask takes.
STREAM_H, STREAM_C, STREAM_WEIGHT = 0, 1, 2

# tensors: x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, four of layer_norm, lengths,
# reset, seed. options: cell, reverse, zoneout of h, zoneout of c, whether in training, weight_dropout, whether x is
# packed: (N, I), the present positions time by time, its rows sorted by lengths; of the cuda backend, how many such
# calls the device is shared by, 0 of others.

CELLS = tuple(reference.GATES)  # by the numbers that the C++ side knows them by


class Unfit(RuntimeError):
    """A kernel's refusal of arguments that don't fit together, before any work."""


def normed_row(rows: int) -> int:
    """What layer normalisation keeps of a position, in elements, as the C++ side lays it out."""
    return 2 * rows + 16


def keeps_gates(cell: str, zoneout_h: float) -> bool:
    """Whether backward needs the gates themselves: an RNN's is its output, unless zoneout takes it from before."""
    return cell in ("lstm", "gru") or zoneout_h > 0


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::recurrence_forward")
    def _(
        x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask, norm_ih, norm_hh, norm_c, norm_b,
        lengths, reset, seed, cell, reverse, zoneout_h, zoneout_c, training, weight_dropout, packed, cuda,
        save,
    ):  # fmt: skip
        batch, positions = (lengths if packed else x).shape[0], x.shape[:-1]
        rows, width = reference.whole_shape(weight_hh)
        heads = weight_hh.shape[:1] if weight_hh.dim() == 3 else ()
        name = CELLS[cell]
        hidden = rows // reference.GATES[name]
        wide = torch.promote_types(x.dtype, torch.float32)
        lstm = [x.new_empty(batch, hidden)] if name == "lstm" else []
        kept = (
            (save and keeps_gates(name, zoneout_h), rows),
            (save and name in ("lstm", "gru"), hidden),
            (save and wide != x.dtype, width),
            (save and norm_ih is not None, normed_row(rows)),
        )
        # Of heads it is laid out head by head.
        parts = heads[0] if heads else 1
        saved = [x.new_empty(*heads, *positions, size // parts, dtype=wide) for wanted, size in kept if wanted]
        return [x.new_empty(*positions, width), x.new_empty(batch, width), *lstm, *saved]

    @torch.library.register_fake("s2s::recurrence_backward")
    def _(
        grad_output, grad_h, grad_c, x, weight_ih, weight_hh, h0, c0, weight_hr, recurrent_mask, norm_ih, norm_hh,
        norm_c, norm_b, lengths, reset, seed, gates, extra, hidden, normed, cell, reverse, zoneout_h, zoneout_c,
        training, weight_dropout, packed, cuda, needs,
    ):  # fmt: skip
        batch, inputs = (lengths if packed else x).shape[0], x.shape[-1]
        rows, width = reference.whole_shape(weight_hh)
        units = rows // reference.GATES[CELLS[cell]]
        shapes = (
            x.shape, (rows, inputs), weight_hh.shape, (rows,), (rows,), (batch, width), (batch, units),
            (width, units), (batch, width), (rows,), (rows,), (units,), (units,),
        )  # fmt: skip
        return [x.new_empty(shape) for place, shape in enumerate(shapes) if needs >> place & 1]

    @torch.library.register_fake("s2s::recurrence_step")
    def _(x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, cell):
        states = 2 if CELLS[cell] == "lstm" else 1
        return [x.new_empty(x.shape[0], weight_hh.shape[1]) for _ in range(states)]


python_kernels.register(f"{__package__}.device", "recurrence_forward", "recurrence_backward", "recurrence_step")


def saving(save: bool) -> int:
    """What forward is told to keep: nothing, what backward needs, or that with no memory left undefined, as torch's own
    operators leave none under deterministic algorithms."""
    return int(save) + int(save and torch.are_deterministic_algorithms_enabled())


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    cell, *rest = options
    x, norm_ih = tensors[0], tensors[9]
    assert x is not None
    forward = python_kernels.function_of("recurrence_forward", x, tensors)
    results = iter(forward(*tensors, CELLS.index(cell), *rest, saving(save)))
    output, h_n = next(results), next(results)
    c_n = next(results) if cell == "lstm" else None
    if not save:
        return (output, h_n, c_n), ()
    gates = next(results) if keeps_gates(cell, options[2]) else None
    extra = next(results) if cell in ("lstm", "gru") else None
    # As wide as the computation, the output serves backward itself.
    hidden = output if x.dtype in (torch.float64, torch.float32) else next(results)
    return (output, h_n, c_n), (gates, extra, hidden, None if norm_ih is None else next(results))


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    if all(grad is None for grad in grads):
        return (None,) * len(tensors)
    cell, *rest = options
    wanted = sum(need << place for place, need in enumerate(needs[:13]))
    given = (*grads, *tensors[:3], *tensors[5:], *saved)
    assert tensors[0] is not None
    backward = python_kernels.function_of("recurrence_backward", tensors[0], given)
    results = iter(backward(*given, CELLS.index(cell), *rest, wanted))
    return tuple(next(results) if need else None for need in needs)


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    x, weight_ih, weight_hh, bias_ih, bias_hh, h0, c0, weight_hr, recurrent_mask = tensors[:9]
    layer_norm, (lengths, reset, seed) = tensors[9:13], tensors[13:]
    cell, reverse, zoneout_h, zoneout_c, training, weight_dropout, packed, cuda = options
    assert x is not None and weight_ih is not None and weight_hh is not None
    if packed:
        assert lengths is not None
        x, where = reference.padded(x, lengths)
        padded = (x, *tensors[1:])
        output, *states = reference_of(padded, (*options[:-2], False, cuda))
        assert output is not None
        return output.transpose(0, 1).flatten(0, 1).index_select(0, where), *states
    (batch, time, _), hidden = x.shape, weight_ih.shape[0] // reference.GATES[cell]
    shape = reference.whole_shape(weight_hh)
    update_h = update_c = factors = None
    if training and zoneout_h > 0:
        assert seed is not None
        update_h = keep_mask(seed, (batch, time, shape[1]), zoneout_h, STREAM_H)
    if training and zoneout_c > 0:
        assert seed is not None
        update_c = keep_mask(seed, (batch, time, hidden), zoneout_c, STREAM_C)
    if weight_dropout > 0:
        assert seed is not None
        factors = keep_mask(seed, shape, weight_dropout, STREAM_WEIGHT).to(torch.float64)
        factors = factors / (1 - weight_dropout if weight_dropout < 1 else 1)
    with checks.without_autocast(x):
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


kernel = differentiable("recurrence", forward=_forward, backward=_backward, reference=reference_of)
