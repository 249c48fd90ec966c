"""The Triton kernels on CPU tensors, for tests on a machine without a GPU."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .. import dispatch
from ..ops import python_kernels


def unavailable() -> str | None:
    """Why the Triton kernels can't be emulated in this process; None where they can."""
    if dispatch.extension_missing is not None or dispatch.triton_missing is not None:
        return dispatch.extension_missing or dispatch.triton_missing
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 was not set before triton was imported"
    return None


def _coarse_tanh(x: np.ndarray) -> np.ndarray:
    # As far off as the hardware's may be, by 2^-11 of the value, up or down by the last bit of the argument.
    wrong = 1.0 + (x.view(np.uint32) % 2 * 2.0 - 1.0) * 2.0**-11
    return (np.tanh(x.astype(np.float64)) * wrong).astype(np.float32)


# The instructions of a GPU that the kernels name, of which the interpreter knows none.
INSTRUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "tanh.approx.f32 $0, $1;": _coarse_tanh,
    "rcp.approx.ftz.f32 $0, $1;": lambda x: np.float32(1) / x,
}


class _Result:
    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def get_result(self, index: int) -> Any:
        assert index == 0
        return self.handle


def _inline_assembly(builder: Any, code: str, constraints: str, values: Any, *rest: Any) -> _Result:
    (value,) = values
    return _Result(type(value)(INSTRUCTIONS[code](value.data), value.dtype.scalar))


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Triton's interpreter with those instructions, and without making triton.language its own again at each call of a
    function by a kernel, where it has done so for the kernel: that took longer than the rest."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    originals = InterpreterBuilder.create_inline_asm, InterpretedFunction.__call__, interpreter._patch_lang_tensor

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            return originals[1](self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    def with_index(tensor: Any, scope: Any) -> None:
        originals[2](tensor, scope)
        # The interpreter of triton 3.6 has int() of an array of one element, which numpy takes no more since 2.4.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    InterpreterBuilder.create_inline_asm, InterpretedFunction.__call__ = _inline_assembly, call
    interpreter._patch_lang_tensor = with_index
    try:
        yield
    finally:
        InterpreterBuilder.create_inline_asm, InterpretedFunction.__call__, interpreter._patch_lang_tensor = originals


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, the operators that have Triton kernels run those on CPU tensors, by Triton's interpreter, wherever the
    cpu backend is chosen, which is forced; the triton backend takes CPU tensors too, where it is forced.

    The interpreter rounds bfloat16 products wrongly and knows no float64 kernel: for float32 and float16 only.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(f"emulated: {reason}")
    library = torch.library.Library("s2s", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that kernels are replaced, which is the point
            for operator, kernel in python_kernels.KERNELS.items():
                library.impl(operator, kernel, "CPU", allow_override=True)
        python_kernels.serve_cpu = True
        dispatch.emulated.add("triton")
        with dispatch.use_backend("cpu"), _interpreter():
            yield
    finally:
        dispatch.emulated.discard("triton")
        python_kernels.serve_cpu = False
        library._destroy()
