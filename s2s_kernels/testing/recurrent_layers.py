"""Samples of recurrent networks of several layers and directions, as the layers of s2s_kernels.nn run them."""

import functools
from typing import Any

import torch

from ..ops.recurrence.reference import GATES
from ..ops.recurrence.stack import stack
from .rule import Call, Draw, OperatorCase, Sample, call


def recurrent_layers(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    h0: torch.Tensor | None = None,
    c0: torch.Tensor | None = None,
    *,
    cell: str,
    zoneout: float | tuple[float, float] | None = None,
    time_first: bool = False,
    packed: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    output, states = stack(
        cell,
        x,
        weights,
        (h0, c0) if cell == "lstm" else (h0,),
        dropout=0.0,
        recurrent_dropout=0.0,
        weight_dropout=0.0,
        zoneout=zoneout or 0.0,
        training=False,
        time_first=time_first,
        packed=packed,
        **options,
    )
    return output, *states


def build(
    draw: Draw,
    cell: str = "lstm",
    *,
    batch: int = 2,
    time: int = 3,
    inputs: int = 2,
    hidden: int = 3,
    layers: int = 2,
    directions: int = 1,
    bias: bool = True,
    projection: int | None = None,
    normed: bool = False,
    lengths: tuple[int, ...] | None = None,
    reset: float | None = None,
    state: bool = False,
    scale: float = 0.5,
    **options: Any,
) -> Call:
    rows, width, lstm = GATES[cell] * hidden, projection or hidden, cell == "lstm"
    x, weights = draw(batch, time, inputs), []
    for layer in range(layers):
        for _ in range(directions):
            weights += [draw(rows, inputs if layer == 0 else directions * width, scale=scale)]
            weights += [draw(rows, width, scale=scale)]
            weights += [draw(rows, scale=scale) for _ in range(2 * bias)]
            weights += [draw(width, hidden, scale=scale)] if projection else []
            sizes = (rows, rows, hidden, hidden)[: 4 if lstm else 2] if normed else ()
            weights += [draw(size, scale=0.2) for size in sizes]
    h0 = draw(layers * directions, batch, width) if state else None
    c0 = draw(layers * directions, batch, hidden) if state and lstm else None
    return call(
        x,
        weights,
        h0,
        c0,
        cell=cell,
        directions=directions,
        bias=bias,
        projected=projection is not None,
        normed=normed,
        lengths=None if lengths is None else draw.tensor(lengths),
        reset=None if reset is None else draw.mask(batch, time, p=reset),
        **options,
    )


def sample(name: str, cell: str = "lstm", *, smooth: bool = True, **sizes: Any) -> Sample:
    return Sample(name, functools.partial(build, cell=cell, **sizes), smooth)


def by_length(draw: Draw, time: int) -> Call:
    return build(draw, "rnn_tanh", time=time, lengths=(time, time // 2), state=True)


CASES = {
    "recurrent layers": OperatorCase(
        recurrent_layers,
        (
            sample("LSTM, both directions", time=2, directions=2, bias=False, state=True, lengths=(1, 2)),
            sample("GRU, time first", "gru", batch=3, lengths=(3, 0, 2), reset=0.5, state=True, time_first=True),
            sample("LSTM, projected", time=2, layers=1, directions=2, bias=False, projection=2, time_first=True),
            sample("LSTM, layer norm", hidden=7, layers=1, normed=True, zoneout=(0.25, 0.5), state=True, smooth=False),
            sample("GRU, layer norm", "gru", hidden=7, layers=1, directions=2, normed=True, smooth=False),
            sample("RNN, three layers", "rnn_tanh", layers=3, directions=2, smooth=False),
            sample("rectified RNN", "rnn_relu", layers=2, state=True, lengths=(2, 3), smooth=False),
            sample("nothing", "gru", batch=0, directions=2, state=True, smooth=False),
            sample("no positions", time=0, directions=2, state=True, smooth=False),
            sample(
                "tails", batch=5, time=9, inputs=17, hidden=33, directions=2, lengths=(9, 1, 0, 8, 4), scale=0.2,
                state=True, smooth=False,
            ),
        ),
        (),
        by_length,
        loops=True,
    )
}  # fmt: skip
