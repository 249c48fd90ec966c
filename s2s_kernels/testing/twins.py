"""Layers beside torch's own: the same weights, the same numbers, the same gradients."""

from typing import Any

import torch
from torch import nn

from .. import nn as layers
from .rule import outputs_of


def pair(kind: str, *sizes: Any, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Module, nn.Module]:
    """torch's layer of that name and ours, with the same weights."""
    torch.manual_seed(1)
    theirs = getattr(nn, kind)(*sizes, **options, dtype=dtype)
    ours = getattr(layers, kind)(*sizes, **options, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def leaves(value: Any) -> list[torch.Tensor]:
    """The floating tensors in a value, which record a gradient from now on."""
    return [v.requires_grad_() for v in outputs_of(value) if v.is_floating_point()]


def same_function(theirs: nn.Module, ours: nn.Module, arguments: tuple[Any, ...], **options: Any) -> None:
    """Equal outputs and, for one upstream gradient, equal gradients of inputs and parameters."""
    inputs = leaves(arguments)
    expected, actual = outputs_of(theirs(*arguments)), outputs_of(ours(*arguments, **options))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    upstream = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in expected]
    floating = [i for i, o in enumerate(expected) if o.is_floating_point()]
    for name, a, b in zip(
        [f"input {i}" for i in range(len(inputs))] + [n for n, _ in theirs.named_parameters()],
        torch.autograd.grad(
            [actual[i] for i in floating], inputs + list(ours.parameters()), [upstream[i] for i in floating]
        ),
        torch.autograd.grad(
            [expected[i] for i in floating], inputs + list(theirs.parameters()), [upstream[i] for i in floating]
        ),
        strict=True,
    ):

        def told(text: str, name: str = name) -> str:
            return f"{name}: {text}"

        torch.testing.assert_close(a, b, msg=told)
