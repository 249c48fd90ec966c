"""All layers and directions of a recurrent network: what `s2s_kernels.nn`'s layers run."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ... import checks, dispatch
from ..differentiation import Options, Tensors, differentiable
from . import OPERATORS, Asked, autograd, reference, run

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

    Where nothing is random, all of it is one call of a kernel.

    Args:
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        x: (B, T, I), checked against the weights by the caller.
        weights: of each layer, of each direction of it: weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and the
            tensors of layer_norm.
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
    x, h0, c0, *weights = checks.autocast(x, states[0], states[1] if lstm else None, *weights)  # type: ignore[assignment]
    states = (h0, c0) if lstm else (h0,)
    zoneout_h, zoneout_c = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout if lstm else 0.0)
    dropped = dropout > 0 or recurrent_dropout > 0 or weight_dropout > 0
    random = training and (dropped or zoneout_h > 0 or zoneout_c > 0)
    tensors = (x, h0, c0, lengths, reset, *weights)
    rows, width = weights[1].shape
    asked = Asked(cell, rows // reference.GATES[cell], width, x.dtype, x.device, projected, normed)
    backend = dispatch.choose(OPERATORS[cell.partition("_")[0]], x.device, asked)
    if not random and backend == "cpu" and not dispatch.transformed(*tensors):
        options = (cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first, packed)
        output, h_n, c_n = kernel(tensors, options)
        return output, (h_n, c_n) if lstm else (h_n,)  # type: ignore[return-value]

    grouped = list(_grouped(weights, bias, projected, normed, lstm))
    batch = (lengths if packed and lengths is not None else x).shape[0]

    def one(x: torch.Tensor, index: int, reverse: bool) -> Tensors:
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *norms = grouped[index]
        mask = None
        if training and recurrent_dropout > 0:
            mask = F.dropout(x.new_ones(batch, weight_hh.shape[1]), recurrent_dropout)
        return run(
            cell,
            x,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            *[state if state is None else state[index] for state in states],
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
        )

    beside = tensors if backend in ("triton", "cuda") and _has_streams(x) else None
    output, finals = _through(x, len(grouped), directions, time_first, one, dropout if training else 0.0, beside)
    return output, tuple(_stacked(final) for final in finals[: len(states)])


def _through(
    x: torch.Tensor,
    cells: int,
    directions: int,
    time_first: bool,
    one: Callable[[torch.Tensor, int, bool], Tensors],
    dropout: float = 0.0,
    beside: Tensors | None = None,
) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """x through every layer by one(x, index of the direction, whether it is reversed) -> (output, h_n, c_n): the output
    of the last, and h_n and c_n of all. beside: what `one` uses but x, where the second direction of a layer is to have
    a stream of its own."""
    finals: list[Any] = []
    for first in range(0, cells, directions):
        if first and dropout > 0:
            x = F.dropout(x, dropout)
        outputs = []
        begun = None if beside is None or directions == 1 else torch.cuda.current_stream(x.device).record_event()
        for index in range(first, first + directions):
            if begun is not None and beside is not None and index > first:
                output, *final = _on_another_stream(begun, (x, *beside), functools.partial(one, x, index, True))
            else:
                output, *final = one(x, index, index > first)
            outputs.append(output)
            finals.append(final)
        x = _joined(outputs, time_first and first + directions == cells)
    return x, list(zip(*finals, strict=True))


def _has_streams(x: torch.Tensor) -> bool:
    """Whether x is on a GPU, and nothing traces or transforms the call."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return plain and x.is_cuda and not torch._C._are_functorch_transforms_active()


def _on_another_stream(begun: torch.cuda.Event, given: Tensors, call: Callable[[], Tensors]) -> Tensors:
    """The tensors of a call that needs what was there at `begun` alone. Backward goes to its stream too: the memory of
    what it is given must not be used again before that is done with it."""
    device = next(tensor.device for tensor in given if tensor is not None)
    here, there = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    there.wait_event(begun)
    for tensor in given:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(there)
    with torch.cuda.stream(there):
        results = call()
    here.wait_stream(there)
    for tensor in results:
        if tensor is not None:
            tensor.record_stream(here)
    return results


# tensors: x, h0, c0, lengths, reset, then of each direction of each layer weight_ih, weight_hh and, if there are any,
# bias_ih, bias_hh, weight_hr, layer_norm. options: cell, directions, whether there are biases, projections and layer
# normalisation, zoneout of h and of c (the expectation), time_first, packed.


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


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    x, h0, c0, lengths, reset, *flat = tensors
    cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first, packed = options
    assert x is not None
    weights = list(_grouped(flat, bias, projected, normed, cell == "lstm"))

    def one(x: torch.Tensor, index: int, reverse: bool) -> Tensors:
        states = (None if state is None else state[index] for state in (h0, c0))
        return autograd.reference_of(
            (x, *weights[index][:4], *states, weights[index][4], None, *weights[index][5:], lengths, reset, None),
            (cell, reverse, zoneout_h, zoneout_c, False, 0.0, packed, False),
        )

    output, (h_n, c_n) = _through(x, len(weights), directions, time_first, one)
    return output, _stacked(h_n), _stacked(c_n) if cell == "lstm" else None


def _grouped(flat: Sequence[Any], bias: bool, projected: bool, normed: bool, lstm: bool) -> Iterator[tuple[Any, ...]]:
    """Of each direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and the four of layer_norm, None where there
    is none."""
    norms = (4 if lstm else 2) if normed else 0
    given = iter(flat)
    for _ in range(len(flat) // (2 + 2 * bias + projected + norms)):
        kinds = (True, True, bias, bias, projected, *(place < norms for place in range(4)))
        yield tuple(next(given) if kind else None for kind in kinds)


def _joined(outputs: Sequence[Any], time_first: bool) -> torch.Tensor:
    """The outputs of a layer's directions (B, T, H_out) side by side; (T, B, ...) if time_first."""
    if time_first:
        outputs = [output.transpose(0, 1) for output in outputs]
    return torch.cat(tuple(outputs), -1) if len(outputs) > 1 else outputs[0].contiguous()


def _stacked(states: Sequence[Any]) -> torch.Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(tuple(states))


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::recurrence_stack_forward")
    def _(
        x, weights, h0, c0, lengths, reset, cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first,
        packed, save,
    ):  # fmt: skip
        name = autograd.CELLS[cell]
        (rows, width), hidden = weights[1].shape, weights[1].shape[0] // reference.GATES[name]
        batch, positions = (lengths if packed else x).shape[0], x.shape[:-1]
        cells = len(list(_grouped(weights, bias, projected, normed, name == "lstm")))
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
