"""The Triton kernels on CPU tensors, for tests on a machine without a GPU."""

import contextlib
import os
import warnings
from collections.abc import Iterator

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


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, the operators that have Triton kernels run those on CPU tensors, by Triton's interpreter, wherever the
    cpu backend is chosen.

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
        with dispatch.use_backend("cpu"):
            yield
    finally:
        library._destroy()
