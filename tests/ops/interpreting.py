"""What the tests of the Triton kernels without a GPU share, beside the fixtures of conftest.py."""

import pytest

from s2s_kernels import dispatch
from s2s_kernels.testing import compare
from s2s_kernels.testing.emulation import unavailable

interpreted = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
needs_triton = pytest.mark.skipif(dispatch.triton_missing is not None, reason=str(dispatch.triton_missing))
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))


def emulating(*fixtures):
    """The marks of a module all of whose tests run the Triton kernels on CPU tensors."""
    # numpy, in which the interpreter computes, warns of what a GPU does in silence.
    quiet = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")
    return [pytest.mark.usefixtures(*(fixtures or ("kernels",))), quiet]


def judging(default=None):
    """A function that asserts that the kernels' results and gradients are as close to the definition's as the contract
    asks, of calls of `default` where it is told no other function."""

    def judge(arguments, function=default, backend="cpu", **options):
        broken = {name: by for name, by in compare(function, arguments, backend, **options).items() if not by <= 0}
        assert not broken, broken

    return judge
