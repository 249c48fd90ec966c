"""Samples of lstm, gru and rnn."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.recurrence import gru, lstm, rnn
from ..ops.recurrence.reference import GATES
from .rule import Call, Draw, ErrorSample, OperatorCase, Sample, call


def recurrence_sample(
    cell: str,
    name: str,
    batch: int = 2,
    time: int = 4,
    inputs: int = 3,
    hidden: int = 2,
    *,
    projected: int | None = None,
    bias: bool = True,
    state: bool = False,
    lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    reset: Sequence[Sequence[int]] | float | None = None,
    recurrent_mask: bool = False,
    layer_norm: bool = False,
    poison: bool = False,
    scale: float = 1.0,
    input_scale: float = 1.0,
    smooth: bool = True,
    heads: int | None = None,
    **options: Any,
) -> Sample:
    """A call of one cell.

    Args:
        reset: flags, or the share of them that are set.
        poison: put NaN where lengths make positions absent, and set the flags there.
        scale: of x.
        input_scale: of weight_ih. Gradients of x that many units sum up round by more than 4 eps, the definition too.
    """
    gates, width = GATES[cell], projected or hidden

    def build(draw: Draw) -> Call:
        x = draw(batch, time, inputs, scale=scale)
        # As large as layers are initialised, larger where there is little to sum. Under layer normalisation small sums
        # would be divided by themselves.
        size = 2.0 if layer_norm else 0.7
        weight_ih = draw(gates * hidden, inputs, scale=input_scale * size * (inputs + 1) ** -0.5)
        shape = (gates * hidden, width) if heads is None else (heads, gates * hidden // heads, width // heads)
        weight_hh = draw(*shape, scale=size * (shape[-1] + 1) ** -0.5)
        biases = (draw(gates * hidden, scale=0.5), draw(gates * hidden, scale=0.5)) if bias else (None, None)
        values = dict(options)
        if state:
            values["h0"] = draw(batch, width)
            if cell == "lstm":
                values["c0"] = draw(batch, hidden)
        if projected is not None:
            values["weight_hr"] = draw(projected, hidden, scale=hidden**-0.5)
        if recurrent_mask:
            values["recurrent_mask"] = 2 * draw.mask(batch, width, p=0.7).to(draw.dtype)
        if layer_norm:
            norms = [draw(gates * hidden, scale=0.2), draw(gates * hidden, scale=0.2)]
            values["layer_norm"] = tuple([*norms, draw(hidden), draw(hidden)] if cell == "lstm" else norms)
        if isinstance(reset, float):
            values["reset"] = draw.mask(batch, time, p=reset)
        elif reset is not None:
            values["reset"] = draw.tensor(reset, torch.bool)
        if lengths is not None:
            values["lengths"] = draw.tensor(lengths, lengths_dtype)
            for row, length in enumerate(lengths if poison else ()):
                x[row, length:] = float("nan")
                if "reset" in values:
                    values["reset"][row, length:] = True
        return call(x, weight_ih, weight_hh, *biases, **values)

    # Broadcast weights, among the layouts that smooth samples go through, make all gates equal, and normalising those
    # only blows up rounding: layer normalisation has tests of its own.
    return Sample(name, build, smooth and not poison and not layer_norm)


def by_length(cell: str, draw: Draw, time: int) -> Call:
    gates = GATES[cell]
    weights = draw(gates * 4, 3, scale=0.5), draw(gates * 4, 4, scale=0.5)
    lengths = draw.tensor([time, time - 2])
    return call(draw(2, time, 3), *weights, draw(gates * 4), draw(gates * 4), lengths=lengths, reverse=True)


def recurrence_errors(cell: str) -> tuple[ErrorSample, ...]:
    """What every cell refuses, and what only it refuses."""
    rows = GATES[cell] * 2

    def refused(name: str, error: type[Exception], argument: str, change: Callable[..., Any]) -> ErrorSample:
        def build(draw: Draw) -> Call:
            values = {"x": draw(2, 5, 3), "weight_ih": draw(rows, 3), "weight_hh": draw(rows, 2)}
            values.update(change(draw))
            return call(**values)

        return ErrorSample(name, build, error, argument)

    common = (
        refused("rank of x", ValueError, "x", lambda draw: {"x": draw(5, 3)}),
        refused("dtype of x", TypeError, "x", lambda draw: {"x": draw(2, 5, 3).long()}),
        refused("x no tensor", TypeError, "x", lambda draw: {"x": [1.0]}),
        refused("rank of weight_ih", ValueError, "weight_ih", lambda draw: {"weight_ih": draw(rows)}),
        refused("columns of weight_ih", ValueError, "weight_ih", lambda draw: {"weight_ih": draw(rows, 4)}),
        refused("no units", ValueError, "weight_ih", lambda draw: {"weight_ih": draw(0, 3)}),
        refused("weight_ih no tensor", TypeError, "weight_ih", lambda draw: {"weight_ih": None}),
        refused("columns of weight_hh", ValueError, "weight_hh", lambda draw: {"weight_hh": draw(rows, 3)}),
        refused("dtype of weight_hh", TypeError, "weight_hh", lambda draw: {"weight_hh": draw(rows, 2).int()}),
        refused("heads that don't divide", ValueError, "weight_hh", lambda draw: {"weight_hh": draw(3, rows, 1)}),
        refused("blocks of heads", ValueError, "weight_hh", lambda draw: {"weight_hh": draw(2, rows // 2, 2)}),
        refused("no heads", ValueError, "weight_hh", lambda draw: {"weight_hh": draw(0, rows, 2)}),
        refused("size of bias_ih", ValueError, "bias_ih", lambda draw: {"bias_ih": draw(rows + 1)}),
        refused("size of bias_hh", ValueError, "bias_hh", lambda draw: {"bias_hh": draw(1, rows)}),
        refused("shape of h0", ValueError, "h0", lambda draw: {"h0": draw(2, 3)}),
        refused("dtype of h0", TypeError, "h0", lambda draw: {"h0": draw(2, 2, dtype=torch.int64)}),
        refused("lengths above T", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([6, 1])}),
        refused("lengths below 0", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([-1, 1])}),
        refused("size of lengths", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([1])}),
        refused("floating lengths", TypeError, "lengths", lambda draw: {"lengths": draw(2)}),
        refused("shape of reset", ValueError, "reset", lambda draw: {"reset": draw.mask(2, 4)}),
        refused("dtype of reset", TypeError, "reset", lambda draw: {"reset": draw.integers(0, 2, 2, 5)}),
        refused("shape of the mask", ValueError, "recurrent_mask", lambda draw: {"recurrent_mask": draw(2, 5, 2)}),
        refused("zoneout above 1", ValueError, "zoneout", lambda draw: {"zoneout": 1.5}),
        refused("zoneout no number", TypeError, "zoneout", lambda draw: {"zoneout": "much"}),
        refused("layer_norm no tuple", TypeError, "layer_norm", lambda draw: {"layer_norm": True}),
        refused("length of layer_norm", ValueError, "layer_norm", lambda draw: {"layer_norm": (draw(rows),)}),
    )
    if cell == "lstm":
        return (
            *common,
            refused("shape of c0", ValueError, "c0", lambda draw: {"c0": draw(2, 3)}),
            refused("shape of weight_hr", ValueError, "weight_hr", lambda draw: {"weight_hr": draw(1, 3)}),
            refused("weight_hh beside weight_hr", ValueError, "weight_hh", lambda draw: {"weight_hr": draw(1, 2)}),
            refused("three zoneouts", TypeError, "zoneout", lambda draw: {"zoneout": (0.1, 0.1, 0.1)}),
            refused("size of a layer norm", ValueError, "layer_norm", lambda draw: {"layer_norm": (draw(rows),) * 4}),
        )
    pair = refused("a pair of zoneouts", TypeError, "zoneout", lambda draw: {"zoneout": (0.1, 0.1)})
    if cell == "gru":
        return (*common, pair)
    other = refused("nonlinearity", ValueError, "nonlinearity", lambda draw: {"nonlinearity": "sigmoid"})
    return (*common, pair, other)


lstm_sample = functools.partial(recurrence_sample, "lstm")
gru_sample = functools.partial(recurrence_sample, "gru")
rnn_sample = functools.partial(recurrence_sample, "rnn_tanh")

# Enough rows, positions and units for the products of large batches, and no multiple of any tile.
many_rows: dict[str, Any] = {"lengths": [5, 0, 3, 4, *[5] * 9, 1, 2, 5, 5], "reset": 0.2, "state": True, "poison": True}

CASES = {
    "lstm": OperatorCase(
        lstm,
        (
            lstm_sample("plain"),
            lstm_sample("no bias, state", bias=False, state=True),
            lstm_sample("no positions", time=0, state=True, smooth=False),
            lstm_sample("empty batch", batch=0, state=True, smooth=False),
            lstm_sample("lengths", 3, lengths=(2, 0, 4), state=True),
            lstm_sample("reset", reset=[[1, 0, 0, 1], [0, 0, 1, 0]], state=True),
            lstm_sample(
                "reverse, reset, lengths", 3, lengths=(4, 0, 3), reset=[[1, 0, 1, 0]] * 3, state=True, reverse=True
            ),
            lstm_sample("projection", hidden=3, projected=2, state=True),
            lstm_sample("recurrent mask", recurrent_mask=True, state=True),
            lstm_sample("zoneout in training", zoneout=(0.5, 0.25), training=True, state=True),
            lstm_sample("zoneout in evaluation", zoneout=(0.5, 0.25), state=True),
            lstm_sample("layer norm", time=2, hidden=5, layer_norm=True, state=True),
            lstm_sample(
                "everything",
                3,
                3,
                hidden=7,
                projected=4,
                lengths=(2, 3, 0),
                reset=[[0, 1, 0]] * 3,
                state=True,
                reverse=True,
                recurrent_mask=True,
                layer_norm=True,
                zoneout=0.25,
                training=True,
            ),
            lstm_sample("poisoned", 3, 9, 5, 7, lengths=(9, 1, 4), reset=0.3, state=True, poison=True),
            lstm_sample("poisoned, reverse", 3, 9, 5, 7, lengths=(0, 8, 4), reset=0.3, poison=True, reverse=True),
            lstm_sample("saturated", scale=1e4, smooth=False),
            lstm_sample("tails", 7, 5, 65, 33, state=True, smooth=False),
            lstm_sample("tails, projection", 5, 3, 7, 65, projected=17, state=True, smooth=False),
            lstm_sample("one row", 1, 4, 17, 129, input_scale=0.3, smooth=False),
            lstm_sample("many rows", 17, 5, 37, 41, **many_rows, recurrent_mask=True),
            lstm_sample("heads", hidden=4, heads=2, state=True),
            lstm_sample(
                "heads, reverse, lengths",
                3,
                4,
                hidden=6,
                heads=3,
                lengths=(4, 0, 3),
                reset=[[1, 0, 1, 0]] * 3,
                state=True,
                reverse=True,
                recurrent_mask=True,
                zoneout=(0.5, 0.25),
                smooth=False,
            ),
            lstm_sample("heads, many rows", 17, 5, 37, 39, heads=3, **many_rows, bias=False),
            lstm_sample("heads, random", hidden=4, heads=2, zoneout=0.5, training=True, smooth=False),
            lstm_sample("heads, projection, layer norm", time=2, hidden=8, heads=2, projected=6, layer_norm=True),
        ),
        recurrence_errors("lstm"),
        functools.partial(by_length, "lstm"),
        loops=True,
    ),
    "gru": OperatorCase(
        gru,
        (
            gru_sample("plain"),
            gru_sample("no bias, state", bias=False, state=True),
            gru_sample("no positions", time=0, state=True, smooth=False),
            gru_sample("lengths, reset", 3, lengths=(2, 0, 4), reset=[[0, 1, 0, 1]] * 3, state=True),
            gru_sample("reverse", 3, lengths=(4, 1, 3), reset=[[0, 1, 1, 0]] * 3, state=True, reverse=True),
            gru_sample("zoneout in training, recurrent mask", zoneout=0.5, training=True, recurrent_mask=True),
            gru_sample("zoneout in evaluation", zoneout=0.5, state=True),
            gru_sample("layer norm", time=2, hidden=5, layer_norm=True, state=True),
            gru_sample(
                "everything",
                3,
                3,
                hidden=7,
                lengths=(2, 3, 0),
                reset=[[0, 1, 0]] * 3,
                state=True,
                reverse=True,
                recurrent_mask=True,
                layer_norm=True,
                zoneout=0.25,
                training=True,
            ),
            gru_sample("poisoned", 3, 9, 5, 7, lengths=(9, 1, 4), reset=0.3, state=True, poison=True, reverse=True),
            gru_sample("saturated", scale=1e4, smooth=False),
            gru_sample("tails", 7, 5, 65, 33, state=True, smooth=False),
            gru_sample("one row", 1, 4, 17, 129, input_scale=0.3, smooth=False),
            gru_sample("many rows", 17, 5, 37, 41, **many_rows, reverse=True),
            gru_sample("heads", hidden=4, heads=2, lengths=(4, 2), state=True),
            gru_sample("heads, many rows", 17, 5, 37, 40, heads=5, **many_rows, reverse=True),
        ),
        recurrence_errors("gru"),
        functools.partial(by_length, "gru"),
        loops=True,
    ),
    "rnn": OperatorCase(
        rnn,
        (
            rnn_sample("plain"),
            rnn_sample("no bias, state", bias=False, state=True),
            rnn_sample("no positions", time=0, state=True, smooth=False),
            rnn_sample("lengths, reset", 3, lengths=(2, 0, 4), reset=[[0, 1, 0, 1]] * 3, state=True),
            rnn_sample("layer norm", time=2, hidden=5, layer_norm=True, state=True),
            rnn_sample(
                "everything",
                3,
                3,
                hidden=7,
                lengths=(2, 3, 0),
                reset=[[0, 1, 0]] * 3,
                state=True,
                reverse=True,
                recurrent_mask=True,
                layer_norm=True,
                zoneout=0.25,
                training=True,
            ),
            rnn_sample("relu", 3, 5, lengths=(2, 0, 5), state=True, nonlinearity="relu", smooth=False),
            rnn_sample("relu, tails", 7, 5, 65, 33, state=True, nonlinearity="relu", smooth=False),
            rnn_sample("poisoned", 3, 9, 5, 7, lengths=(9, 1, 4), reset=0.3, state=True, poison=True, reverse=True),
            rnn_sample("saturated", scale=1e4, smooth=False),
            rnn_sample("one row", 1, 4, 17, 129, input_scale=0.3, smooth=False),
            rnn_sample("many rows", 17, 5, 37, 41, **many_rows),
            rnn_sample("heads", hidden=4, heads=4, reset=[[1, 0, 0, 1], [0, 0, 1, 0]], recurrent_mask=True),
            rnn_sample("one head", 3, hidden=4, heads=1, nonlinearity="relu", zoneout=0.25, smooth=False),
        ),
        recurrence_errors("rnn_tanh"),
        functools.partial(by_length, "rnn_tanh"),
        loops=True,
    ),
}
