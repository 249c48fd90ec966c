"""Autograd around a pair of kernels: first order by the kernels, every higher order by the reference.

Functions with `setup_context` cost 40 us more a call (torch binds their arguments through inspect.signature), so the
plain form is used.
"""

from collections.abc import Callable
from typing import Any

import torch

Tensors = tuple[torch.Tensor | None, ...]
Options = tuple[Any, ...]


def differentiable(
    name: str,
    *,
    forward: Callable[[Tensors, Options, bool], tuple[Tensors, Tensors]],
    backward: Callable[[Tensors, Tensors, Tensors, Options, tuple[bool, ...]], Tensors],
    reference: Callable[[Tensors, Options], Tensors],
) -> Callable[[Tensors, Options], Tensors]:
    """Makes one differentiable function of a forward kernel, a backward kernel and the definition.

    Args:
        name: the operator's, for profiles and error messages.
        forward: (tensors, options, save) -> (outputs, saved). `saved` is what backward needs beside the inputs, empty
            if not `save`.
        backward: (grads, tensors, saved, options, needs) -> one gradient (or None) per tensor. A grad is None where
            that output is unused.
        reference: (tensors, options) -> outputs, in plain PyTorch.

    Returns:
        function(tensors, options) -> outputs. `tensors` may hold None, and tensors that take no gradient (lengths,
        masks, seeds);
        `options` holds constants. Without a gradient to record it is the forward kernel alone.
    """

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, options, *tensors):
            outputs, saved = forward(tensors, options, True)
            ctx.options, ctx.count = options, len(tensors)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*tensors, *saved)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            kept = ctx.saved_tensors  # read once: activation checkpointing allows no second time
            tensors, saved = kept[: ctx.count], kept[ctx.count :]
            needs = tuple(ctx.needs_input_grad[1:])
            if torch.is_grad_enabled():  # only under create_graph: someone may differentiate this gradient
                return None, *Backward.apply(ctx.options, needs, len(grads), saved, *grads, *tensors)
            return None, *backward(grads, tensors, saved, ctx.options, needs)

    class Traced(Forward):
        """Forward under torch.compile: torch 2.11 loses the gradient of an output that is saved as well, not that of a
        view of it."""

        @staticmethod
        def forward(ctx, options, *tensors):
            outputs = Forward.forward(ctx, options, *tensors)
            return tuple(output if output is None else output.view_as(output) for output in outputs)

    class Backward(torch.autograd.Function):
        """The backward kernel as a step of its own; its derivative goes through the reference: right, never silently
        wrong. What forward saved comes as one argument, so that autograd looks for no history in it."""

        @staticmethod
        def forward(ctx, options, needs, count, saved, *values):
            grads, tensors = values[:count], values[count:]
            ctx.options, ctx.needs, ctx.count = options, needs, count
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*grads, *tensors)
            return tuple(backward(grads, tensors, saved, options, needs))

        @staticmethod
        def backward(ctx, *upstream):
            higher = torch.is_grad_enabled()
            needs = ctx.needs
            with torch.enable_grad():
                # Views stay attached to the caller's graph, so a third order works too.
                values = [_leaf(value) for value in ctx.saved_tensors]
                grads, tensors = values[: ctx.count], values[ctx.count :]
                outputs = reference(tuple(tensors), ctx.options)
                pairs = [
                    (o, g)
                    for o, g in zip(outputs, grads, strict=True)
                    if o is not None and g is not None and o.requires_grad
                ]
                wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
                first = torch.autograd.grad(
                    [o for o, _ in pairs], wanted, [g for _, g in pairs], create_graph=True, allow_unused=True
                )
                above = [u for u, need in zip(upstream, needs, strict=True) if need]
                used = [
                    (f, u)
                    for f, u in zip(first, above, strict=True)
                    if f is not None and u is not None and f.requires_grad
                ]
                sources = [v for v in values if v is not None and v.requires_grad]
                second = iter(
                    torch.autograd.grad(
                        [f for f, _ in used], sources, [u for _, u in used], create_graph=higher, allow_unused=True
                    )
                    if used
                    else [None] * len(sources)
                )
                result = [next(second) if v is not None and v.requires_grad else None for v in values]
            return None, None, None, None, *result

    Forward.__name__ = Forward.__qualname__ = Traced.__name__ = Traced.__qualname__ = f"{name}_forward"
    Backward.__name__ = Backward.__qualname__ = f"{name}_backward"

    # What Function.apply does beside this is for torch.func, and takes a third of the time.
    record = super(torch.autograd.Function, Forward).apply

    def function(tensors: Tensors, options: Options) -> Tensors:
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    if torch.compiler.is_compiling():
                        return Traced.apply(options, *_each_once(tensors))
                    return record(options, *tensors)
        return forward(tensors, options, False)[0]

    return function


def _each_once(tensors: Tensors) -> list[torch.Tensor | None]:
    """A view in place of a tensor that is there already: torch.compile traces no Function that is given one twice."""
    once: list[torch.Tensor | None] = []
    for tensor in tensors:
        again = tensor is not None and any(tensor is other for other in once)
        once.append(tensor.view_as(tensor) if tensor is not None and again else tensor)
    return once


def _leaf(value: torch.Tensor | None) -> torch.Tensor | None:
    if value is None or not value.is_floating_point():
        return value
    return value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
