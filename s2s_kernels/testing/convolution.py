"""Samples of causal convolution and its step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..nn.state import ConvState
from ..ops.convolution import causal_conv1d, causal_conv1d_step
from .rule import Call, Draw, ErrorSample, OperatorCase, Sample, call


def convolution_sample(
    name: str,
    batch: int = 2,
    channels: int = 3,
    outputs: int = 4,
    time: int = 5,
    taps: int = 3,
    *,
    bias: bool = True,
    residual: bool = False,
    lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    initial_state: bool = False,
    poison: bool = False,
    scale: float = 1.0,
    smooth: bool = True,
    **options: Any,
) -> Sample:
    """A call of causal_conv1d; `poison` puts NaN where lengths make positions absent."""

    def build(draw: Draw) -> Call:
        groups, dilation = options.get("groups", 1), options.get("dilation", 1)
        x = draw(batch, channels, time, scale=scale)
        # Kept near 1 whatever the size of the sum, as a trained network keeps it.
        weight = draw(outputs, channels // groups, taps, scale=(channels // groups * taps) ** -0.5)
        values = dict(options)
        results = outputs // 2 if options.get("activation") in ("glu", "gated_tanh") else outputs
        if residual:
            values["residual"] = draw(batch, results, time)
        if initial_state:
            values["initial_state"] = draw(batch, channels, (taps - 1) * dilation)
        if lengths is not None:
            values["lengths"] = draw.tensor(lengths, lengths_dtype)
            for row, length in enumerate(lengths if poison else ()):
                x[row, :, length:] = float("nan")
                if residual:
                    values["residual"][row, :, length:] = float("inf")
        return call(x, weight, draw(outputs) if bias else None, **values)

    return Sample(name, build, smooth and not poison)


def convolution_errors(step: bool) -> tuple[ErrorSample, ...]:
    """What causal_conv1d and its step refuse alike; `step` leaves out the time."""
    data = "x_t" if step else "x"

    def refused(name: str, error: type[Exception], argument: str, change: Callable[..., Any]) -> ErrorSample:
        def build(draw: Draw) -> Call:
            values: dict[str, Any] = {"weight": draw(4, 3, 2), data: draw(2, 3) if step else draw(2, 3, 5)}
            if step:
                values["state"] = draw(2, 3, 1)
            values.update(change(draw))
            return call(**values)

        return ErrorSample(name, build, error, argument)

    shape = (2, 4) if step else (2, 4, 5)
    return (
        refused("rank of x", ValueError, data, lambda draw: {data: draw(3)}),
        refused("dtype of x", TypeError, data, lambda draw: {data: draw(*shape).long()}),
        refused("x no tensor", TypeError, data, lambda draw: {data: [1.0]}),
        refused("rank of weight", ValueError, "weight", lambda draw: {"weight": draw(4, 3)}),
        refused("no taps", ValueError, "weight", lambda draw: {"weight": draw(4, 3, 0)}),
        refused("channels of weight", ValueError, "weight", lambda draw: {"weight": draw(4, 2, 2)}),
        refused("dtype of weight", TypeError, "weight", lambda draw: {"weight": draw(4, 3, 2, dtype=torch.int32)}),
        refused(
            "odd channels under a gate", ValueError, "weight",
            lambda draw: {"weight": draw(3, 3, 2), "activation": "glu"},
        ),
        refused("shape of bias", ValueError, "bias", lambda draw: {"bias": draw(3)}),
        refused("dtype of bias", TypeError, "bias", lambda draw: {"bias": draw(4, dtype=torch.int32)}),
        refused("shape of residual", ValueError, "residual", lambda draw: {"residual": draw(*shape)[1:]}),
        refused("dilation 0", ValueError, "dilation", lambda draw: {"dilation": 0}),
        refused("dilation no integer", TypeError, "dilation", lambda draw: {"dilation": 1.0}),
        refused("groups", ValueError, "groups", lambda draw: {"groups": 2}),
        refused("groups 0", ValueError, "groups", lambda draw: {"groups": 0}),
        refused("activation", ValueError, "activation", lambda draw: {"activation": "softmax"}),
        *(
            [refused("shape of the state", ValueError, "state", lambda draw: {"state": draw(2, 3, 2)})]
            if step
            else [
                refused("lengths above T", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([6, 1])}),
                refused("lengths below 0", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([-1, 1])}),
                refused("size of lengths", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([1])}),
                refused("floating lengths", TypeError, "lengths", lambda draw: {"lengths": draw(2)}),
                refused(
                    "shape of the state", ValueError, "initial_state", lambda draw: {"initial_state": draw(2, 3, 2)}
                ),
                refused(
                    "state without causal", ValueError, "initial_state",
                    lambda draw: {"initial_state": draw(2, 3, 1), "causal": False},
                ),
                refused(
                    "returned state without causal", ValueError, "return_state",
                    lambda draw: {"return_state": True, "causal": False},
                ),
            ]
        ),
    )  # fmt: skip


def convolution_by_length(draw: Draw, time: int) -> Call:
    weight = draw(6, 2, 3, scale=0.5)
    return call(
        draw(2, 4, time), weight, draw(6), dilation=2, groups=2, activation="gated_tanh", residual=draw(2, 3, time)
    )


def step_on_copy(
    x_t: torch.Tensor, state: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """causal_conv1d_step as a function of tensors: the state goes in and comes out as (B, C_in, (K-1) dilation)."""
    ring = ConvState(state)
    y_t = causal_conv1d_step(x_t, ring, weight, bias, **options)
    return y_t, ring.ordered()


def step_sample(
    name: str,
    batch: int = 2,
    channels: int = 3,
    outputs: int = 4,
    taps: int = 3,
    *,
    residual: bool = False,
    **options: Any,
) -> Sample:
    def build(draw: Draw) -> Call:
        groups, dilation = options.get("groups", 1), options.get("dilation", 1)
        weight = draw(outputs, channels // groups, taps, scale=(channels // groups * taps) ** -0.5)
        values = dict(options)
        if residual:
            values["residual"] = draw(batch, outputs)
        state = draw(batch, channels, (taps - 1) * dilation)
        return call(draw(batch, channels), state, weight, draw(outputs), **values)

    return Sample(name, build)


def step_by_length(draw: Draw, time: int) -> Call:
    """There is no time in a step: the batch grows in its place."""
    return call(draw(time, 4), draw(time, 4, 6), draw(6, 4, 4, scale=0.25), draw(6), dilation=2, activation="silu")


CASES = {
    "causal_conv1d": OperatorCase(
        causal_conv1d,
        (
            convolution_sample("plain"),
            convolution_sample("no bias, dilation", time=9, dilation=3, bias=False),
            convolution_sample("kernel of one", taps=1),
            convolution_sample("sequence shorter than the kernel", time=2, taps=4, dilation=2),
            convolution_sample("one position", time=1, initial_state=True),
            convolution_sample("no positions", time=0, initial_state=True, return_state=True, smooth=False),
            convolution_sample("empty batch", batch=0, smooth=False),
            convolution_sample("depthwise", channels=4, groups=4, taps=4),
            convolution_sample("depthwise, several outputs a channel", channels=2, groups=2, time=7, dilation=2),
            convolution_sample("groups", channels=4, groups=2, outputs=6),
            convolution_sample("silu", activation="silu"),
            convolution_sample("gelu", activation="gelu", residual=True),
            convolution_sample("tanh", activation="tanh"),
            convolution_sample("tanh, residual", activation="tanh", residual=True),
            convolution_sample("glu", activation="glu", residual=True),
            convolution_sample("gated tanh", activation="gated_tanh"),
            convolution_sample("gate across groups", channels=4, groups=2, activation="gated_tanh", residual=True),
            convolution_sample("relu", outputs=7, time=65, activation="relu", smooth=False),
            convolution_sample("relu, residual", activation="relu", residual=True, smooth=False),
            convolution_sample("residual", residual=True),
            convolution_sample("state", time=4, dilation=2, initial_state=True, return_state=True),
            convolution_sample("state returned", return_state=True),
            convolution_sample("lengths", 3, time=6, lengths=(4, 0, 6), activation="silu", residual=True),
            convolution_sample("int32 lengths", lengths=(2, 5), lengths_dtype=torch.int32),
            convolution_sample(
                "lengths and state", 3, time=6, lengths=(1, 0, 6), dilation=2, initial_state=True, return_state=True
            ),
            convolution_sample("centred", time=7, taps=4, causal=False),
            convolution_sample("centred, lengths", time=7, lengths=(3, 7), causal=False, activation="glu"),
            convolution_sample(
                "everything",
                3,
                4,
                8,
                6,
                2,
                lengths=(6, 2, 0),
                groups=2,
                dilation=3,
                activation="glu",
                residual=True,
                initial_state=True,
                return_state=True,
            ),
            convolution_sample(
                "poisoned", 3, time=70, lengths=(70, 1, 33), activation="gelu", residual=True, poison=True
            ),
            convolution_sample("poisoned, centred", 3, time=40, taps=5, lengths=(0, 17, 39), causal=False, poison=True),
            convolution_sample(
                "poisoned, depthwise", channels=4, groups=4, time=40, lengths=(17, 3), dilation=8, poison=True
            ),
            convolution_sample(
                "poisoned, state", time=40, lengths=(17, 3), initial_state=True, return_state=True, poison=True
            ),
            convolution_sample("saturated", activation="gated_tanh", scale=1e4, smooth=False),
            convolution_sample("tails", 2, 7, 65, 129, 2, dilation=64, smooth=False),
            convolution_sample("tails, gated", 1, 65, 14, 33, 3, dilation=5, activation="gated_tanh", smooth=False),
            convolution_sample("tails, depthwise", 2, 65, 65, 129, 4, groups=65, dilation=8, smooth=False),
            convolution_sample(
                "many channels",
                2,
                34,
                26,
                300,
                2,
                groups=2,
                dilation=5,
                lengths=(300, 17),
                initial_state=True,
                smooth=False,
            ),
            convolution_sample(
                "many channels, centred", 2, 18, 30, 270, 2, lengths=(3, 261), causal=False, smooth=False
            ),
            convolution_sample("single channel", 1, 1, 1, 7, 7, smooth=False),
            convolution_sample("nine taps", 2, 5, 13, 150, 9, dilation=16, activation="relu", smooth=False),
            convolution_sample("several tiles", 1, 3, 5, 1100, 3, dilation=7, smooth=False),
        ),
        convolution_errors(step=False),
        convolution_by_length,
    ),
    "causal_conv1d_step": OperatorCase(
        step_on_copy,
        (
            step_sample("plain"),
            step_sample("kernel of one", taps=1),
            step_sample("dilation", dilation=4, activation="silu", residual=True),
            step_sample("gate", activation="gated_tanh"),
            step_sample("depthwise", channels=4, groups=4),
            step_sample("groups", channels=4, groups=2, activation="gelu"),
        ),
        convolution_errors(step=True),
        step_by_length,
    ),
}
