"""What the tests of the recurrences share."""

import functools

import pytest
import torch

from s2s_kernels import dispatch
from s2s_kernels.ops.recurrence import Asked, builtin, run
from s2s_kernels.ops.recurrence.reference import GATES
from s2s_kernels.testing import Draw, compare
from s2s_kernels.testing.recurrence import recurrence_sample

CELLS = tuple(GATES)
BACKENDS = ("reference", "cpu") if dispatch.extension_missing is None else ("reference",)
both_backends = pytest.mark.parametrize("backend", BACKENDS)
every_cell = pytest.mark.parametrize("cell", CELLS)
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
needs_triton = pytest.mark.skipif(dispatch.triton_missing is not None, reason=str(dispatch.triton_missing))
# A call that torch's own layers could serve on a GPU.
GPU = torch.device("cuda", 0)
PLAIN = Asked("lstm", torch.float16, GPU, 16, 1024, 768, 768, 768, False, False, True, None, False)


def broken(function, arguments, backend="cpu", **options):
    if backend not in BACKENDS:
        pytest.skip(str(dispatch.extension_missing))
    return {name: by for name, by in compare(function, arguments, backend, **options).items() if by > 0}


def sample(cell, *sizes, dtype=torch.float32, **options):
    """A call of `run` without its first argument, and the function that takes it."""
    return functools.partial(run, cell), recurrence_sample(cell, "", *sizes, **options).build(Draw(dtype))


def reason(asked=PLAIN, **changes):
    return builtin.gap(asked._replace(**changes))
