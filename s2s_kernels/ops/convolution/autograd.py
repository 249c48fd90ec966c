"""Fake kernels of causal convolution, and the functions that differentiate it."""

import torch

from ... import checks, dispatch
from .. import python_kernels
from ..differentiation import Options, Tensors, differentiable
from . import reference

# The numbers by which the C++ side knows the activations.
ACTIVATIONS: tuple[str | None, ...] = (None, "relu", "silu", "gelu", "tanh", "glu", "gated_tanh")
GATES = ("glu", "gated_tanh")


def _results(activation: int, outputs: int) -> int:
    return outputs // 2 if ACTIVATIONS[activation] in GATES else outputs


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::causal_conv1d_forward")
    def _(x, weight, bias, residual, lengths, initial_state, condition, dilation, groups, activation, causal, save):
        batch, _, time = x.shape
        outputs = weight.shape[0]
        y = x.new_empty(batch, _results(activation, outputs), time)
        wide = torch.promote_types(x.dtype, torch.float32)
        return y, x.new_empty((batch, outputs, time) if save else (0,), dtype=wide)

    @torch.library.register_fake("s2s::causal_conv1d_backward")
    def _(
        grad, x, weight, saved, lengths, initial_state, dilation, groups, activation, causal,
        saved_output, need_x, need_weight, need_bias, need_state, need_condition,
    ):  # fmt: skip
        (batch, channels, time), (outputs, _, taps) = x.shape, weight.shape
        shapes = (
            (need_x, (batch, channels, time)),
            (need_weight, weight.shape),
            (need_bias, (outputs,)),
            (need_state, (batch, channels, (taps - 1) * dilation)),
            (need_condition, (batch, outputs, time)),
        )
        return tuple(x.new_empty(shape if need else (0,)) for need, shape in shapes)

    @torch.library.register_fake("s2s::causal_conv1d_step")
    def _(x_t, ring, position, weight, bias, residual, dilation, groups, activation):
        return x_t.new_empty(x_t.shape[0], _results(activation, weight.shape[0]))

    @torch.library.register_fake("s2s::conv_stack_pack")
    def _(weights, biases):
        return weights[0].new_empty(sum(packed_elements(*weight.shape) for weight in weights))

    @torch.library.register_fake("s2s::wavenet_step")
    def _(x_t, ring, position, weights, biases, packed, condition, dilations, taps, skips):
        return x_t.new_empty(x_t.shape[0], skips)

    @torch.library.register_fake("s2s::tcn_step")
    def _(x_t, ring, position, weights, biases, packed, dilations, taps, channels):
        return x_t.new_empty(x_t.shape[0], channels[-1])


def packed_elements(outputs: int, channels: int, taps: int) -> int:
    """What `conv_stack_pack` makes of one convolution."""
    return (outputs + 15) // 16 * 16 * (channels * taps + 1)


python_kernels.register(f"{__package__}.triton_kernels", "causal_conv1d_forward", "causal_conv1d_backward")
python_kernels.register(f"{__package__}.triton_step", "causal_conv1d_step")


# tensors: x, weight, bias, residual, lengths, initial_state, condition; options: dilation, groups, activation, causal.


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    x, residual = tensors[0], tensors[3]
    dilation, groups, activation, causal = options
    assert x is not None
    saved_output = _output_suffices(x.dtype, activation, residual is not None)
    keep = save and activation is not None and not saved_output
    run = python_kernels.function_of("causal_conv1d_forward", x, tensors, planned=True)
    y, before = run(*tensors, dilation, groups, ACTIVATIONS.index(activation), causal, keep)
    if not save or activation is None:
        return (y,), ()
    return (y,), (y if saved_output else before,)


def _output_suffices(dtype: torch.dtype, activation: str | None, residual: bool) -> bool:
    """Whether the activation's derivative can be had from the result itself, without another buffer of its size."""
    return not residual and (activation == "relu" or (activation == "tanh" and dtype in (torch.float32, torch.float64)))


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    (grad,) = grads
    x, weight, _, residual, lengths, initial_state, condition = tensors
    dilation, groups, activation, causal = options
    assert x is not None and weight is not None
    if grad is None:
        return (None,) * len(tensors)
    need_x, need_weight, need_bias, need_residual, _, need_state, need_condition = needs
    grad_x = grad_weight = grad_bias = grad_residual = grad_state = grad_condition = None
    if need_x or need_weight or need_bias or need_state or need_condition:
        run = python_kernels.function_of("causal_conv1d_backward", x, (*tensors, grad), planned=True)
        grad_x, grad_weight, grad_bias, grad_state, grad_condition = run(
            grad, x, weight, saved[0] if saved else None, lengths, initial_state, dilation, groups,
            ACTIVATIONS.index(activation), causal, _output_suffices(x.dtype, activation, residual is not None),
            need_x, need_weight, need_bias, need_state, need_condition,
        )  # fmt: skip
    if need_residual:
        grad_residual = grad
        if lengths is not None:
            grad_residual = torch.where(_present(lengths, grad.shape[2]), grad, 0)
    if need_condition:
        assert condition is not None and grad_condition is not None
        if condition.shape[2] != grad_condition.shape[2]:
            grad_condition = grad_condition.sum(2, keepdim=True)
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        grad_residual,
        None,
        grad_state if need_state else None,
        grad_condition if need_condition else None,
    )


def _present(lengths: torch.Tensor, time: int) -> torch.Tensor:
    return (torch.arange(time, device=lengths.device) < lengths[:, None])[:, None]


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    x, weight, bias, residual, lengths, initial_state, condition = tensors
    dilation, groups, activation, causal = options
    assert x is not None and weight is not None
    with checks.without_autocast(x):
        y = reference.causal_conv1d(
            x,
            weight,
            bias,
            dilation=dilation,
            groups=groups,
            activation=activation,
            residual=residual,
            lengths=lengths,
            initial_state=initial_state,
            causal=causal,
            condition=condition,
        )
    return (y,)


kernel = differentiable("causal_conv1d", forward=_forward, backward=_backward, reference=reference_of)
