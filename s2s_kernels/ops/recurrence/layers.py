"""All layers and directions of a recurrent network by calls of one each, and their definition."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..differentiation import Options, Tensors
from . import autograd

# tensors: x, h0, c0, lengths, reset, then of each direction of each layer weight_ih, weight_hh and, if there are any,
# bias_ih, bias_hh, weight_hr, layer_norm. options: cell, directions, whether there are biases, projections and layer
# normalisation, zoneout of h and of c (the expectation), time_first, packed.


def through(
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
        x = joined(outputs, time_first and first + directions == cells)
    return x, list(zip(*finals, strict=True))


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


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    x, h0, c0, lengths, reset, *flat = tensors
    cell, directions, bias, projected, normed, zoneout_h, zoneout_c, time_first, packed = options
    assert x is not None
    weights = list(grouped(flat, bias, projected, normed, cell == "lstm"))

    def one(x: torch.Tensor, index: int, reverse: bool) -> Tensors:
        states = (None if state is None else state[index] for state in (h0, c0))
        return autograd.reference_of(
            (x, *weights[index][:4], *states, weights[index][4], None, *weights[index][5:], lengths, reset, None),
            (cell, reverse, zoneout_h, zoneout_c, False, 0.0, packed, False),
        )

    output, (h_n, c_n) = through(x, len(weights), directions, time_first, one)
    return output, stacked(h_n), stacked(c_n) if cell == "lstm" else None


def grouped(flat: Sequence[Any], bias: bool, projected: bool, normed: bool, lstm: bool) -> Iterator[tuple[Any, ...]]:
    """Of each direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr and the four of layer_norm, None where there
    is none."""
    norms = (4 if lstm else 2) if normed else 0
    size = 2 + 2 * bias + projected + norms
    for first in range(0, len(flat), size):
        part = flat[first : first + size]
        biases, weight_hr = part[2:4] if bias else (None, None), part[2 + 2 * bias] if projected else None
        yield (*part[:2], *biases, weight_hr, *part[size - norms :], *(None,) * (4 - norms))


def joined(outputs: Sequence[Any], time_first: bool) -> torch.Tensor:
    """The outputs of a layer's directions (B, T, H_out) side by side; (T, B, ...) if time_first."""
    if time_first:
        outputs = [output.transpose(0, 1) for output in outputs]
    return torch.cat(tuple(outputs), -1) if len(outputs) > 1 else outputs[0].contiguous()


def stacked(states: Sequence[Any]) -> torch.Tensor:
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(tuple(states))
