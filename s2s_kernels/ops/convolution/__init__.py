"""Causal convolution: dense, grouped, depthwise, dilated, gated; over a whole sequence, in chunks, or step by step."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import torch

from ... import checks, dispatch
from . import autograd, reference

__all__ = ["causal_conv1d", "causal_conv1d_step"]

OPERATOR = dispatch.register("causal_conv1d", cpu=lambda dtype: None, triton=dispatch.not_in_triton)
STEP = dispatch.register("causal_conv1d_step", cpu=lambda dtype: None, triton=dispatch.not_in_triton)


def _stack_gap(records: bool) -> str | None:
    return "a step of a stack that records a gradient is the reference's" if records else None


WAVENET = dispatch.register("wavenet_step", cpu=_stack_gap)
TCN = dispatch.register("tcn_step", cpu=_stack_gap)


class Ring(Protocol):
    """What a streaming state holds: s2s_kernels.nn.ConvState."""

    ring: torch.Tensor
    position: torch.Tensor

    def ordered(self) -> torch.Tensor: ...
    def advance(self, x_t: torch.Tensor, in_place: bool) -> None: ...


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_state: bool = False,
    causal: bool = True,
) -> Any:
    """1-D convolution whose output at t sees the inputs at t, t - dilation, ..., t - (K-1) dilation only (van den
    Oord et al. 2016).

    Args:
        x: input (B, C_in, T), any strides (channels-last ones without a copy); float64, float32, bfloat16 or float16.
        weight: (C_out, C_in / groups, K), as `torch.nn.functional.conv1d`; oldest tap first.
        bias: (C_out,).
        dilation: distance in positions between neighbouring taps.
        groups: as `conv1d`; groups = C_in is depthwise.
        activation: None, "relu", "silu", "gelu" (the exact one), "tanh", or a gate that halves the channels: "glu",
            a * sigmoid(b), and "gated_tanh", tanh(a) * sigmoid(b), a the first half of C_out and b the second.
        residual: in the shape of the result, added after the activation.
        lengths: (B,) int32 or int64, on the CPU or beside x. Positions at or past it never matter, and the result is
            0 there.
        initial_state: (B, C_in, (K-1) dilation), the inputs before position 0, oldest first. Without it the taps
            before position 0 contribute nothing.
        return_state: also return the same kind of state after position T (after position `length` where lengths are
            given).
        causal: False centres the taps, (K-1) dilation // 2 of their reach on the left; takes and returns no state.

    Returns:
        y (B, C_out, T), or (B, C_out / 2, T) under a gate, contiguous, in x's dtype; (y, state) if `return_state`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: ``activation(F.conv1d(F.pad(x, ((K - 1) * dilation, 0)), weight, bias, dilation=dilation,
    groups=groups)) + residual``
    """
    name = "causal_conv1d"
    if causal is True and not return_state and type(dilation) is type(groups) is int and checks.are_read(lengths):
        given = (x, weight, bias, residual, lengths, initial_state, None)
        made = dispatch.directly(autograd.kernel, given, (dilation, groups, activation, True), triton=True)
        if made is not None:
            return made[0]
    checks.tensor(name, "x", x)
    x, weight, bias, residual, initial_state = checks.autocast(x, weight, bias, residual, initial_state)  # type: ignore[assignment]
    checks.data(name, "x", x, 3, "(B, C_in, T)")
    batch, channels, time = x.shape
    results = _parameters(name, x, channels, weight, bias, dilation, groups, activation)
    checks.like(name, "residual", residual, x, "x", (batch, results, time), "the result's shape (B, C, T)")
    lengths = checks.lengths(name, "lengths", lengths, x, batch, time)
    span = (weight.shape[2] - 1) * dilation
    checks.like(name, "initial_state", initial_state, x, "x", (batch, channels, span), "(B, C_in, (K-1) dilation)")
    if not causal and (initial_state is not None or return_state):
        which = "initial_state" if initial_state is not None else "return_state"
        checks.wrong_value(name, which, "absent when causal is False", "one")
    options = (dilation, groups, activation, causal)
    y = convolve((x, weight, bias, residual, lengths, initial_state, None), options)
    if not return_state:
        return y
    return y, reference.final_state(x, span, lengths, initial_state)


def convolve(tensors: autograd.Tensors, options: autograd.Options) -> torch.Tensor:
    """Chooses a backend for checked arguments: x, weight, bias, residual, lengths, initial_state, condition (added
    before the activation, (B, C_out, T or 1)); dilation, groups, activation, causal."""
    x = tensors[0]
    assert x is not None
    backend = dispatch.choose(OPERATOR, x.device, x.dtype)
    if backend == "reference" or dispatch.transformed(*tensors):
        return autograd.reference_of(tensors, options)[0]  # type: ignore[return-value]
    return autograd.kernel(tensors, options)[0]  # type: ignore[return-value]


def causal_conv1d_step(
    x_t: torch.Tensor,
    state: Ring,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One position of `causal_conv1d`, at a cost that doesn't depend on the dilation.

    Args:
        x_t: the input at this position (B, C_in).
        state: a `ConvState` of x_t's dtype with the inputs before it; updated in place. Where a gradient is recorded
            the state gets new tensors instead, so that the earlier steps can still be differentiated.
        weight, bias, dilation, groups, activation: as `causal_conv1d`.
        residual: in the shape of the result, added after the activation.

    Returns:
        y_t (B, C_out), or (B, C_out / 2) under a gate.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "causal_conv1d_step"
    checks.tensor(name, "x_t", x_t)
    x_t, weight, bias, residual = checks.autocast(x_t, weight, bias, residual)  # type: ignore[assignment]
    checks.data(name, "x_t", x_t, 2, "(B, C_in)")
    batch, channels = x_t.shape
    results = _parameters(name, x_t, channels, weight, bias, dilation, groups, activation, "x_t")
    checks.like(name, "residual", residual, x_t, "x_t", (batch, results), "the result's shape (B, C)")
    ring = ring_of(name, state, x_t)
    span = (weight.shape[2] - 1) * dilation
    checks.like(name, "state", ring, x_t, "x_t", (batch, span, channels), "a ring (B, (K-1) dilation, C_in)")
    records = recording(x_t, ring, weight, bias, residual)
    backend = dispatch.choose(STEP, x_t.device, x_t.dtype)
    transformed = dispatch.transformed(x_t, ring, weight, bias, residual)
    if backend == "reference" or transformed or records:
        # A ring that is written in place can't be differentiated: this is the whole form, on a copy and of one
        # position.
        after = None if residual is None else residual[:, :, None]
        y = convolve(
            (x_t[:, :, None], weight, bias, after, None, state.ordered(), None), (dilation, groups, activation, True)
        )
        state.advance(x_t, in_place=not (records or transformed))
        return y[:, :, 0]
    return torch.ops.s2s.causal_conv1d_step(
        x_t, ring, state.position, weight, bias, residual, dilation, groups, autograd.ACTIVATIONS.index(activation)
    )


def conditioned_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    condition: torch.Tensor | None,
    *,
    dilation: int,
    activation: str,
) -> torch.Tensor:
    """`causal_conv1d` with `condition` (B, C_out, T or 1) added before the activation."""
    name = "causal_conv1d"
    if type(dilation) is int:
        given = (x, weight, bias, None, None, None, condition)
        made = dispatch.directly(autograd.kernel, given, (dilation, 1, activation, True), triton=True)
        if made is not None:
            return made[0]
    checks.tensor(name, "x", x)
    x, weight, bias, condition = checks.autocast(x, weight, bias, condition)  # type: ignore[assignment]
    checks.data(name, "x", x, 3, "(B, C_in, T)")
    batch, channels, time = x.shape
    _parameters(name, x, channels, weight, bias, dilation, 1, activation)
    if condition is not None:
        several = condition.dim() == 3 and condition.shape[2] != 1
        shape = (batch, weight.shape[0], time if several else 1)
        checks.like(name, "condition", condition, x, "x", shape, "(B, C_out, T or 1)")
    return convolve((x, weight, bias, None, None, None, condition), (dilation, 1, activation, True))


# The weights and biases of a stack's convolutions in the order of their use.
StackParameters = tuple[list[torch.Tensor], list[torch.Tensor]]


class StackRing(Protocol):
    """What the streaming state of a stack holds: s2s_kernels.nn.ConvStackState."""

    ring: torch.Tensor
    position: torch.Tensor
    packed: torch.Tensor | None

    def ordered(self) -> list[torch.Tensor]: ...
    def replace(self, states: Sequence[torch.Tensor], in_place: bool) -> None: ...


def pack_stack(operator: dispatch.Operator, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """What a prepared state holds of a stack's parameters, for the steps of `operator`."""
    first = weights[0]
    checks.data(operator.name, "weights", first, 3, "(C_out, C_in, K)")
    if dispatch.choose(operator, first.device, False) != "cpu" or dispatch.transformed(*weights, *biases):
        _refuse_prepared(operator, first.device, False)
    weights, biases = ([tensor.detach().contiguous() for tensor in tensors] for tensors in (weights, biases))
    return _kernel("conv_stack_pack")(weights, biases)


def _refuse_prepared(operator: dispatch.Operator, device: torch.device, records: bool) -> NoReturn:
    reason = dispatch.gap(operator, "cpu", device, records) or "the reference is forced, or a transform is looking"
    raise NotImplementedError(
        f"{operator.name}: state must not be prepared where the cpu backend doesn't serve, here: {reason}"
    )


def wavenet_step(
    x_t: torch.Tensor,
    state: StackRing,
    parameters: Callable[[], StackParameters],
    dilations: Sequence[int],
    sizes: tuple[int, int, int],
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """One position through all layers of a `WaveNetStack`: x_t (B, C), condition (B, L 2C) -> skip_t (B, S); the
    state is updated in place, or gets new tensors where a gradient is recorded. `parameters` gives those of the dilated
    and of the 1x1 convolution of each layer, one after the other; sizes: C, K and S."""
    channels, taps, skips = sizes
    return _stack_step(
        WAVENET,
        reference.wavenet_step,
        x_t,
        state,
        parameters,
        (dilations, taps, skips),
        (taps - 1) * sum(dilations) * channels,
        (condition,),
        2 * channels * len(dilations),
    )


def tcn_step(
    x_t: torch.Tensor,
    state: StackRing,
    parameters: Callable[[], StackParameters],
    dilations: Sequence[int],
    taps: int,
    channels: Sequence[int],
) -> torch.Tensor:
    """One position through all blocks of a `TCNStack`: x_t (B, channels[0]) -> y_t (B, channels[-1]); the state is
    updated in place, or gets new tensors where a gradient is recorded. `parameters` gives for each block those of its
    first convolution, of the 1x1 one where the numbers of channels around it differ, and of its second convolution."""
    return _stack_step(
        TCN,
        reference.tcn_step,
        x_t,
        state,
        parameters,
        (dilations, taps, channels),
        (taps - 1) * sum(d * (channels[i] + channels[i + 1]) for i, d in enumerate(dilations)),
    )


def _kernel(name: str) -> Callable[..., torch.Tensor]:
    return getattr(torch.ops.s2s, name).default


def _stack_step(
    operator: dispatch.Operator,
    definition: Callable[..., tuple[torch.Tensor, list[torch.Tensor]]],
    x_t: torch.Tensor,
    state: StackRing,
    parameters: Callable[[], StackParameters],
    options: tuple[Any, ...],
    elements: int,
    conditions: tuple[torch.Tensor | None, ...] = (),
    condition_size: int = 0,
) -> torch.Tensor:
    """A step of a stack by its kernel, whose arguments end with `conditions` and `options`, or by its definition.
    `elements` are those of a row of the state's rings."""
    name, ring, packed = operator.name, getattr(state, "ring", None), getattr(state, "packed", None)
    weights, biases = parameters() if packed is None else ([], [])
    if ring is not None and dispatch.is_plain(x_t, ring, packed, *weights[:1], *conditions):
        try:  # the kernel's own checks cost less than these in Python
            return _kernel(name)(x_t, ring, state.position, weights, biases, packed, *conditions, *options)
        except RuntimeError:  # before anything is written; what follows says it in the words of an operator
            pass
    if packed is not None:
        weights, biases = parameters()
    checks.tensor(name, "x_t", x_t)
    x_t, packed, *conditions = checks.autocast(x_t, packed, *conditions)  # type: ignore[assignment]
    if packed is None:
        weights, biases = list(checks.autocast(*weights)), list(checks.autocast(*biases))  # type: ignore[arg-type]
    checks.data(name, "x_t", x_t, 2, "(B, C)")
    batch = x_t.shape[0]
    held = weights[0] if packed is None else packed
    checks.like(name, "x_t", x_t, held, "the weights", (batch, weights[0].shape[1]), "(B, C)")
    elements_held = sum(autograd.packed_elements(*weight.shape) for weight in weights)
    checks.like(name, "state", packed, x_t, "x_t", (elements_held,), "prepared by this stack: packed weights")
    for condition in conditions:
        checks.like(name, "condition", condition, x_t, "x_t", (batch, condition_size), "(B, L 2C)")
    ring = ring_of(name, state, x_t)
    checks.like(name, "state", ring, x_t, "x_t", (batch, elements), "rings (B, the sum of (K-1) dilation C)")
    records = recording(x_t, ring, *conditions, *weights, *biases)
    backend = dispatch.choose(operator, x_t.device, records)
    transformed = dispatch.transformed(x_t, ring, *conditions, *weights, *biases)
    if backend == "reference" or transformed:
        if packed is not None:
            _refuse_prepared(operator, x_t.device, records)
        y, states = definition(x_t, state.ordered(), weights, biases, options[0], *conditions)
        state.replace(states, in_place=not (records or transformed))
        return y
    if packed is not None:
        weights, biases = [], []
    weights, biases = ([tensor.contiguous() for tensor in tensors] for tensors in (weights, biases))
    return _kernel(name)(x_t, ring, state.position, weights, biases, packed, *conditions, *options)


def ring_of(name: str, state: Any, x_t: torch.Tensor) -> torch.Tensor:
    """The ring of a streaming state; TypeError where it is none. Under autocast the state takes the autocast dtype,
    once."""
    ring = getattr(state, "ring", None)
    if not isinstance(ring, torch.Tensor):
        checks.wrong_type(name, "state", "a ConvState", type(state).__name__)
    if ring.dtype != x_t.dtype and ring.is_floating_point() and torch.is_autocast_enabled(x_t.device.type):
        ring = state.ring = ring.to(x_t.dtype)
    return ring


def recording(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _parameters(
    name: str,
    x: torch.Tensor,
    channels: int,
    weight: Any,
    bias: torch.Tensor | None,
    dilation: Any,
    groups: Any,
    activation: Any,
    data: str = "x",
) -> int:
    """Checks what a convolution and its step share; returns the number of channels of the result."""
    _positive(name, "dilation", dilation)
    _positive(name, "groups", groups)
    checks.choice(name, "activation", activation, autograd.ACTIVATIONS)
    if channels % groups:
        checks.wrong_value(name, "groups", f"a divisor of C_in = {channels}", groups)
    checks.tensor(name, "weight", weight)
    if weight.dim() != 3 or weight.shape[2] < 1:
        checks.wrong_value(name, "weight", "(C_out, C_in / groups, K) with K >= 1", tuple(weight.shape))
    outputs, _, taps = weight.shape
    checks.like(name, "weight", weight, x, data, (outputs, channels // groups, taps), "(C_out, C_in / groups, K)")
    if outputs % groups:
        checks.wrong_value(name, "groups", f"a divisor of C_out = {outputs}", groups)
    checks.like(name, "bias", bias, x, data, (outputs,), "(C_out,)")
    if activation not in autograd.GATES:
        return outputs
    if outputs % 2:
        checks.wrong_value(name, "weight", f"of an even C_out under {activation}", tuple(weight.shape))
    return outputs // 2


def _positive(name: str, argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        checks.wrong_type(name, argument, "an integer", type(value).__name__)
    if value < 1:
        checks.wrong_value(name, argument, "at least 1", value)
