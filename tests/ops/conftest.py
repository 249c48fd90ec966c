"""The Triton kernels on CPU tensors, for the modules of tests that ask for them."""

import pytest
import torch

from s2s_kernels.testing.emulation import emulated, unavailable


@pytest.fixture(scope="module")
def kernels():
    """Every test of the module runs the Triton kernels on CPU tensors, by Triton's interpreter."""
    if unavailable() is not None:
        yield
        return
    with emulated():
        yield


@pytest.fixture(scope="module")
def real_tiles(kernels):
    """Attention is made in 16 bits with the tiles of a GPU, in float32 with larger ones, which the interpreter takes no
    longer for. Yields the real ones."""
    if unavailable() is not None:
        yield
        return
    from s2s_kernels.ops.attention import triton_kernels

    names = ("forward_tiles", "backward_tiles")
    chosen = {name: getattr(triton_kernels, name) for name in names}

    def larger(name):
        def tiles(call, *rest):
            found = chosen[name](call, *rest)
            if call.query.dtype == torch.float32:
                found |= {size: 2 * found[size] for size in ("KEYS", "EDGE")}
            return found

        return tiles

    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(triton_kernels, name, larger(name))
        yield chosen


@pytest.fixture
def products(monkeypatch, real_tiles):
    """A list to which each product of attention's kernels, with the tiles of a GPU, adds the elements that it makes."""
    from triton.runtime import interpreter

    from s2s_kernels.ops.attention import triton_kernels

    for name, tiles in real_tiles.items():
        monkeypatch.setattr(triton_kernels, name, tiles)
    counted = []
    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        counted.append(a.data.shape[0] * b.data.shape[1])
        return original(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    return counted
