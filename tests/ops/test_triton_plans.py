"""Calls of kernels made again as they were made before, without a GPU: what is launched, on which tensors."""

import types

import pytest
import torch
from interpreting import needs_triton

pytestmark = needs_triton


@pytest.fixture
def launches(monkeypatch):
    """What was launched, as (function, grid, arguments); kernels compile to their names and constants."""
    from s2s_kernels.ops import triton_launch, triton_plans

    made = []

    class Driver:
        def get_current_device(self):
            return -1  # as tensors on the CPU have it

        def get_current_stream(self, device):
            return 7

    class Compiled:
        packed_metadata = ()

        def __init__(self, kernel, constants):
            self.function = (kernel.__name__, *constants.items())

        @staticmethod
        def run(x, y, z, stream, function, *args):
            made.append((function, (x, y, z), args[4:]))

    def run(self, *args, grid, warmup, **kwargs):
        compiled = Compiled(self, kwargs)
        constants = tuple(kwargs[name] for name in self._constants)
        compiled.run(*(*grid, 1, 1)[:3], 7, compiled.function, (), None, None, None, *args, *constants)
        return compiled

    monkeypatch.setattr(triton_launch.knobs.runtime, "interpret", False)
    monkeypatch.setattr(triton_launch.Kernel, "run", run)
    monkeypatch.setattr(triton_launch, "driver", types.SimpleNamespace(active=Driver()))
    monkeypatch.setattr(triton_plans, "_plans", {})
    return made


def drawn(call, launches):
    """A call's results and launches, with each tensor told by its shape, strides and dtype."""
    launches.clear()
    results = call()
    return results, [
        (function, grid, [(*x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x for x in args])
        for function, grid, args in launches
    ]


@pytest.fixture
def kernel(launches):
    import triton.language as tl

    from s2s_kernels.ops import triton_launch

    def scale_kernel(x, y, other, count: tl.int64, BLOCK: tl.constexpr):
        pass

    return triton_launch.kernel(scale_kernel)


def test_a_call_is_repeated_on_its_own_tensors(launches, kernel):
    from s2s_kernels.ops.triton_plans import planned

    works = []

    def double(x, other, count):
        works.append(count)
        out, between = x.new_empty(x.shape), x.new_empty(3, dtype=torch.float64)
        kernel[(4,)](x, between, None, count, BLOCK=8, num_warps=4)
        kernel[(5, 2)](between, out, other, count + 1, BLOCK=16, num_warps=4)
        return out, None, x.new_empty(0)

    def call(x, other=None, count=3):
        launches.clear()
        return planned("double", double, (x, other, count))

    for turn in range(5):
        x, other = torch.randn(6, 4), torch.randn(2)
        out, none, empty = call(x, other)
        assert works == [3] * min(turn + 1, 2)
        assert out.shape == x.shape and none is None and empty.shape == (0,)
        (_, first, given), (_, second, later) = launches
        assert first == (4, 1, 1) and second == (5, 2, 1)
        assert given[0] is x and given[1] is later[0] and given[2] is None and given[3:] == (3, 8)
        assert later[1] is out and later[2] is other and later[3:] == (4, 16)
        assert given[1].shape == (3,) and given[1].dtype == torch.float64
    for x, other, count in (
        (torch.randn(6, 5), torch.randn(2), 3), (torch.randn(4, 6).T, torch.randn(2), 3), (torch.randn(6, 4), None, 3),
        (torch.randn(6, 4).half(), torch.randn(2), 3), (torch.randn(6, 4), torch.randn(2), 4),
        (torch.randn(25)[1:].view(6, 4), torch.randn(2), 3),
    ):  # fmt: skip
        before = len(works)
        call(x, other, count)
        assert len(works) == before + 1, "one of another kind"


def test_what_does_more_than_launch_is_not_repeated(launches, kernel):
    from s2s_kernels.ops.triton_plans import planned

    def copying(x, other):
        out = x.new_empty(x.shape)
        kernel[(1,)](x.contiguous(), out, other, 1, BLOCK=8, num_warps=4)
        return (out,)

    def filling(x, other):
        out = x.new_zeros(x.shape)
        kernel[(1,)](x, out, other, 1, BLOCK=8, num_warps=4)
        return (out,)

    def slicing(x, other):
        both = x.new_empty(2, *x.shape)
        kernel[(1,)](x, both[1], other, 1, BLOCK=8, num_warps=4)
        return (both,)

    def ignoring(x, other):
        out = x.new_empty(x.shape)
        kernel[(1,)](x, out, None, 1, BLOCK=8, num_warps=4)
        return (out,)

    for function in (copying, filling, slicing, ignoring):
        works = []

        def counted(*args, function=function, works=works):
            works.append(1)
            return function(*args)

        for turn in range(4):
            planned(function.__name__, counted, (torch.randn(4, 6).T, torch.randn(3)))
            assert len(works) == turn + 1, function.__name__
    x = torch.randn(3)
    works = []

    def same(*args):
        works.append(1)
        out = x.new_empty(3)
        kernel[(1,)](args[0], out, args[1], 1, BLOCK=8, num_warps=4)
        return (out,)

    for turn in range(4):  # two that begin at one address can't be told apart
        planned("same", same, (x, x))
        assert len(works) == turn + 1


@pytest.mark.parametrize("kind", ["plain", "lengths", "mask and bias", "wide heads"])
def test_attention_launches_the_same_again(launches, monkeypatch, kind):
    from s2s_kernels.ops import triton_common, triton_launch
    from s2s_kernels.ops.attention import triton_kernels

    for module in (triton_kernels, triton_common):  # in the place of the interpreter's
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, triton_launch.kernel(getattr(module, name).fn))

    def tensors():
        width = 256 if kind == "wide heads" else 64
        query, key, value = torch.randn(2, 4, 33, width), torch.randn(2, 4, 40, width), torch.randn(2, 4, 40, width)
        given = [query, key, value, *[None] * 6]
        if kind == "mask and bias":
            given[3], given[4] = torch.ones(2, 1, 33, 40, dtype=torch.bool), torch.randn(1, 4, 33, 40)
        if kind == "lengths":
            given[6] = torch.tensor([3, 40])
        return tuple(x.bfloat16() if x is not None and x.is_floating_point() else x for x in given)

    options = (None, 0, False, 0, None, None)
    needs = (True, True, True, False, kind == "mask and bias", *[False] * 4)
    for _ in range(2):
        given = tensors()
        out, _, softmax, _ = triton_kernels.planned_forward(given, options, True, False)
        triton_kernels.planned_backward(torch.randn_like(out), None, out, softmax, given, options, needs)
    given = tensors()
    asked = given, options, True, False
    (_, expected), ((out, _, softmax, _), seen) = (
        drawn(lambda make=make: make(*asked), launches)
        for make in (triton_kernels.forward, triton_kernels.planned_forward)
    )
    assert seen == expected and launches[0][2][0] is given[0]
    assert any(x is out for x in launches[-1][2]) and any(x is softmax for x in launches[-1][2])
    asked = torch.randn_like(out), None, out, softmax, given, options, needs
    (_, expected), (grads, seen) = (
        drawn(lambda make=make: make(*asked), launches)
        for make in (triton_kernels.backward, triton_kernels.planned_backward)
    )
    assert seen == expected and launches[0][2][3] is asked[0]
    for grad, need in zip(grads, needs, strict=True):
        assert (grad is not None) == need
        assert grad is None or any(any(x is grad for x in args) for _, _, args in launches)
