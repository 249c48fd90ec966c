"""Kernels written in Python behind the operators of csrc/operators.cpp, imported on their first call.

Their fakes, derivatives and torch.compile support are those of the operators, whichever device a call is on.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from .. import dispatch

# What is registered, by operator: s2s_kernels.testing runs it on the CPU as well.
KERNELS: dict[str, Callable[..., Any]] = {}
serve_cpu = False  # whether it does now
_library: torch.library.Library | None = None


def register(module: str, *operators: str) -> None:
    """Serves these operators on CUDA tensors by the functions of the same names in `module`."""
    global _library
    if dispatch.extension_missing is not None:  # it brings the schemas
        return
    if _library is None:
        _library = torch.library.Library("s2s", "IMPL")
    for operator in operators:
        KERNELS[operator] = _deferred(module, operator)
        _library.impl(operator, KERNELS[operator], "CUDA")


def _deferred(module: str, name: str) -> Callable[..., Any]:
    home: ModuleType | None = None

    def call(*args: Any) -> Any:
        nonlocal home
        if home is None:
            home = importlib.import_module(module)
        return getattr(home, name)(*args)

    return call


def function_of(
    operator: str, first: torch.Tensor | None, tensors: Sequence[torch.Tensor | None], planned: bool = False
) -> Callable[..., Any]:  # fmt: skip
    """What makes a call of an operator: on CUDA tensors that nothing else looks at the kernel itself, which saves a
    long list of arguments the way through the dispatcher and back into Python. For calls without a gradient to record,
    as those inside a Function are. planned: whether a call like an earlier one is made as that was, as triton_plans.py
    has it."""
    if first is not None and first.is_cuda and dispatch.untouched(tensors):
        return _planned(operator) if planned else KERNELS[operator]
    return getattr(torch.ops.s2s, operator).default  # type: ignore[no-any-return]


@functools.cache
def _planned(operator: str) -> Callable[..., Any]:
    from .triton_plans import planned

    kernel = KERNELS[operator]
    return lambda *args: planned(operator, kernel, args)
