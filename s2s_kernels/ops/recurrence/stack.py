"""All layers and directions of a recurrent network: what `s2s_kernels.nn`'s layers run."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ... import checks, dispatch
from ..differentiation import Options, Tensors, differentiable
from . import Asked, autograd, beyond_torch, builtin, chosen, one_of_a_stack, recording, reference, run
from .layers import grouped, reference_of, stacked, through

States = tuple[torch.Tensor | None, ...]  # h, and c of an LSTM


def stack(
    cell: str,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    states: States,
    *,
    directions: int,
    bias: bool,
    projected: bool,
    normed: bool,
    lengths: torch.Tensor | None,
    reset: torch.Tensor | None,
    dropout: float,
    recurrent_dropout: float,
    weight_dropout: float,
    zoneout: float | tuple[float, float],
    training: bool,
    time_first: bool,
    packed: bool,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Runs x through the layers, each from the outputs of the one before, in both directions if there are two.

    Where nothing is random, and there are no heads, all of it is one call of a kernel.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: (B, T, I), checked against the weights by the caller.
        weights: of each layer, of each direction of it: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and the
            tensors of layer_norm. weight_hh may be of heads.
        states: before the sequence, each (D layers, B, its width) or None.
        directions: D, 1 or 2.
        bias, projected, normed: whether there are biases, projections and layer normalisation among the weights.
        lengths, reset: as `lstm`, checked.
        dropout: probability of dropping an element of what one layer hands the next.
        recurrent_dropout: of dropping a unit of h in the recurrent product, one mask a sequence.
        weight_dropout: of dropping an element of weight_hh, one mask a call.
        zoneout, training: as `lstm`. Without training nothing is dropped.
        time_first: return the output as (T, B, ...).
        packed: x is (N, I), the data of a PackedSequence whose rows are sorted by lengths, and so is the output.

    Returns:
        output (B, T, D H_out), contiguous, and the states after the sequence, in the shape of those before it.
    """
    lstm = cell == "lstm"
    zoneout_h, zoneout_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout if lstm else 0.0)
    zoned = zoneout_h > 0 or zoneout_c > 0
    random = training and (zoned or dropout > 0 or recurrent_dropout > 0 or weight_dropout > 0)
    whole = not random and weights[1].dim() == 2
    options = (cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first, packed)
    h0, c0 = states if lstm else (states[0], None)
    if whole and x.is_cpu and dispatch.at_rest():
        return _at_once(kernel, (x, h0, c0, lengths, reset, *weights), options)
    untouched = x.is_cuda and dispatch.untouched((x, h0, c0, lengths, reset, *weights))
    if not untouched:
        x, h0, c0, *weights = checks.autocast(x, h0, c0, *weights)  # type: ignore[assignment]
    states = (h0, c0) if lstm else (h0,)
    tensors = (x, h0, c0, lengths, reset, *weights)
    cells = len(weights) // (2 + 2 * bias + projected + normed * (4 if lstm else 2))
    masked, weights_dropped = (training and p > 0 for p in (recurrent_dropout, weight_dropout))
    beyond = beyond_torch(weights[1], normed, lengths, reset, masked, zoned, weights_dropped)
    (rows, width), heads = reference.whole_shape(weights[1]), weights[1].shape[0] if weights[1].dim() == 3 else 1
    batch, time, inputs = (0, *x.shape) if packed else x.shape
    asked = Asked(
        cell, x.dtype, x.device, batch, time, inputs, rows // reference.GATES[cell], width, projected, normed,
        not (zoned or masked or projected or normed), beyond, recording(tensors), heads, cells // directions,
        directions,
    )  # fmt: skip
    backend = chosen(asked, untouched)
    if whole and backend in ("cpu", "torch") and not dispatch.transformed(*tensors):
        return _at_once(kernel if backend == "cpu" else builtin.kernel, tensors, options)

    # A GPU's kernels check the shapes, and each layer's call needs no other check than that all tensors are of a kind.
    usual = untouched and not (packed or zoned or masked or weights_dropped) and _alike(x, (h0, c0, *weights))
    parts = list(grouped(weights, bias, projected, normed, lstm))
    batch = (lengths if packed and lengths is not None else x).shape[0]
    if packed and x.is_cuda:  # from a PackedSequence, which has them on the CPU: once for all layers
        lengths = checks.lengths(cell.partition("_")[0], "lengths", lengths, x, batch, time)

    beside = tensors if directions == 2 and backend in ("triton", "cuda") and _has_streams(x) else None
    sharing = 1 if beside is None else directions

    def one(x: torch.Tensor, index: int, reverse: bool) -> Tensors:
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *norms = parts[index]
        before = [state if state is None else state[index] for state in states]
        if usual:
            c0 = before[1] if lstm else None
            given = (x, *parts[index][:4], before[0], c0, weight_hr, None, *norms, lengths, reset, None)
            found = one_of_a_stack(cell, given, reverse, training, backend if len(parts) == 1 else None, sharing)
            if found is not None:
                return found
        mask = None
        if training and recurrent_dropout > 0:
            mask = F.dropout(x.new_ones(batch, width), recurrent_dropout)
        return run(
            cell,
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            *before,
            lengths=lengths,
            reset=reset,
            reverse=reverse,
            weight_hr=weight_hr,
            recurrent_mask=mask,
            zoneout=zoneout,
            training=training,
            layer_norm=tuple(norms if lstm else norms[:2]) if normed else None,
            weight_dropout=weight_dropout if training else 0.0,
            packed=packed,
            sharing=sharing,
        )

    output, finals = through(x, len(parts), directions, time_first, one, dropout if training else 0.0, beside)
    return output, tuple(stacked(final) for final in finals[: len(states)])


def _at_once(
    kernel: Callable[[Tensors, Options], Tensors], tensors: Tensors, options: Options
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """All layers by one call of a kernel."""
    output, h_n, c_n = kernel(tensors, options)
    assert output is not None and h_n is not None
    return output, (h_n,) if c_n is None else (h_n, c_n)


def _alike(x: torch.Tensor, others: Tensors) -> bool:
    """Whether all are of one dtype, that of a GPU's kernels, and on one device."""
    dtype, device = x.dtype, x.device
    for tensor in others:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            return False
    return dtype in (torch.float16, torch.bfloat16, torch.float32) and x.layout == torch.strided


def _has_streams(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, and nothing traces or transforms the call."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and x.is_cuda and not torch._C._are_functorch_transforms_active()


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    x, h0, c0, lengths, reset, *weights = tensors
    cell, *rest = options
    output, h_n, c_n, *saved = torch.ops.s2s.recurrence_stack_forward(
        x, weights, h0, c0, lengths, reset, autograd.CELLS.index(cell), *rest, autograd.saving(save)
    )
    return (output, h_n, c_n if cell == "lstm" else None), (output, *saved) if save else ()


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    if all(grad is None for grad in grads):
        return (None,) * len(tensors)
    x, h0, c0, lengths, reset, *weights = tensors
    output, *kept = saved
    cell, *rest = options
    wanted = [needs[0], *needs[5:], needs[1], needs[2]]
    found = torch.ops.s2s.recurrence_stack_backward(
        *grads, x, weights, h0, c0, lengths, reset, output, kept, autograd.CELLS.index(cell), *rest, wanted
    )
    results = iter(found)
    grad_x, *grad_weights = (next(results) if need else None for need in wanted[:-2])
    grad_h0, grad_c0 = (next(results) if need else None for need in wanted[-2:])
    return grad_x, grad_h0, grad_c0, None, None, *grad_weights


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::recurrence_stack_forward")
    def _(
        x, weights, h0, c0, lengths, reset, cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first,
        packed, save,
    ):  # fmt: skip
        name = autograd.CELLS[cell]
        (rows, width), hidden = weights[1].shape, weights[1].shape[0] // reference.GATES[name]
        batch, positions = (lengths if packed else x).shape[0], x.shape[:-1]
        cells = len(list(grouped(weights, bias, projected, normed, name == "lstm")))
        wide = torch.promote_types(x.dtype, torch.float32)
        saved = []
        for first in range(0, cells if save else 0, directions):
            last = time_first and first + directions == cells
            if first:
                saved.append(x.new_empty(*positions, directions * width))
            kept = (
                (autograd.keeps_gates(name, zoneout_h), rows),
                (name in ("lstm", "gru"), hidden),
                (wide != x.dtype or directions == 2 or last, width),
                (normed, autograd.normed_row(rows)),
            )
            for _ in range(directions):
                saved += [x.new_empty((*positions, size) if wanted else (0,), dtype=wide) for wanted, size in kept]
        return [
            x.new_empty(*(reversed(positions) if time_first else positions), directions * width),
            x.new_empty(cells, batch, width),
            x.new_empty((cells, batch, hidden) if name == "lstm" else (0,)),
            *saved,
        ]

    @torch.library.register_fake("s2s::recurrence_stack_backward")
    def _(
        grad_output, grad_h, grad_c, x, weights, h0, c0, lengths, reset, output, saved, cell, directions, bias,
        projected, normed, zoneout_h, zoneout_c, time_first, packed, needs,
    ):  # fmt: skip
        inputs = (x, *weights, h0, c0)
        return [x.new_empty(v.shape) for v, need in zip(inputs, needs, strict=True) if need]


kernel = differentiable("recurrence_stack", forward=_forward, backward=_backward, reference=reference_of)
