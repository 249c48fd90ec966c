"""Calls of kernels made again as they were made before, without a GPU: what is launched, on which tensors."""

import importlib
import sys
import types

import pytest
import torch
from interpreting import emulating, interpreted, judging, needs_triton

from s2s_kernels.ops import python_kernels
from s2s_kernels.testing import CASES, Draw

pytestmark = [needs_triton, *emulating()[1:]]
judge = judging()


class Driver:
    def get_current_device(self):
        return -1  # as tensors on the CPU have it

    def get_current_stream(self, device):
        return 7


def kernels_of():
    """(module, name, kernel) of those in the launchers' modules, imported as other tests have them."""
    for package in ("attention", "additive_attention", "convolution"):
        importlib.import_module(f"s2s_kernels.ops.{package}.triton_kernels")
    importlib.import_module("s2s_kernels.ops.additive_attention.triton_pool")
    found = [module for name, module in sys.modules.items() if name.startswith("s2s_kernels.ops") and "triton" in name]
    return [
        (module, name, value)
        for module in found
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    ]


@pytest.fixture
def launches(monkeypatch):
    """What was launched, as (function, grid, arguments); kernels compile to their names and constants."""
    from s2s_kernels.ops import triton_launch, triton_plans

    kernels_of()

    made = []

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


def test_operators_beside_the_launches_are_repeated_with_them(launches, kernel):
    from s2s_kernels.ops.triton_plans import planned

    works = []

    def beside(x, other):
        works.append(1)
        both = x.new_zeros(2, *x.shape)
        kernel[(1,)](x.contiguous(), both[1], other, 1, BLOCK=8, num_warps=4)
        both[0].copy_(torch.cat([x[:2] * 2, x[2:]]))
        parts = both.unbind()
        return both, parts[0] + parts[1], None

    for turn in range(5):
        x, other = torch.randn(4, 6).T, torch.randn(3)
        launches.clear()
        both, total, none = planned("beside", beside, (x, other))
        assert len(works) == min(turn + 1, 2) and none is None
        ((_, _, (read, written, given, *_)),) = launches
        assert torch.equal(read, x) and read.is_contiguous() and given is other
        assert written.data_ptr() == both[1].data_ptr() and written.shape == x.shape
        assert torch.equal(both[0], torch.cat([x[:2] * 2, x[2:]])) and both[1].eq(0).all()
        assert torch.equal(total, both[0])


def test_what_is_no_function_of_the_arguments_is_not_repeated(launches, kernel):
    from s2s_kernels.ops.triton_plans import planned

    constant = torch.randn(4)

    def looking(x, other):
        out = x.new_empty(x.shape)
        kernel[(1,)](x, out, other, int(x.sum() > 0), BLOCK=8, num_warps=4)
        return (out,)

    def outside(x, other):
        out = x.new_empty(x.shape)
        kernel[(1,)](x, out, constant, 1, BLOCK=8, num_warps=4)
        return (out,)

    def adding(x, other):
        return (x + constant,)

    for function in (looking, outside, adding):
        works = []

        def counted(*args, function=function, works=works):
            works.append(1)
            return function(*args)

        for turn in range(4):
            planned(function.__name__, counted, (torch.randn(4), torch.randn(3)))
            assert len(works) == turn + 1, function.__name__
    x, works = torch.randn(3), []

    def same(*args):
        works.append(1)
        return (args[0] + args[1],)

    for turn in range(4):  # one that is given twice can't be told from the other
        planned("same", same, (x, x))
        assert len(works) == turn + 1
    for _ in range(4):
        assert torch.equal(planned("same", same, (x, x.clone()))[0], 2 * x)
    assert len(works) == 6


@pytest.mark.parametrize("kind", ["plain", "lengths", "mask and bias", "wide heads"])
def test_attention_launches_the_same_again(launches, monkeypatch, kind):
    from s2s_kernels.ops import triton_common, triton_launch, triton_plans
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

    rest = (None, 0, False, 0, None, None)
    needs = (True, True, True, kind == "mask and bias", False)

    def planned(name, *args):
        return triton_plans.planned(name, getattr(triton_kernels, name), args)

    for _ in range(2):
        given = tensors()
        out, _, softmax, _ = planned("attention_forward", *given, *rest, True, False)
        planned("attention_backward", torch.randn_like(out), None, out, softmax, *given, *rest, *needs)
    given = tensors()
    args = *given, *rest, True, False
    _, expected = drawn(lambda: triton_kernels.attention_forward(*args), launches)
    (out, _, softmax, _), seen = drawn(lambda: planned("attention_forward", *args), launches)
    assert seen == expected and launches[0][2][0] is given[0]
    assert any(x is out for x in launches[-1][2]) and any(x is softmax for x in launches[-1][2])
    args = torch.randn_like(out), None, out, softmax, *given, *rest, *needs
    _, expected = drawn(lambda: triton_kernels.attention_backward(*args), launches)
    grads, seen = drawn(lambda: planned("attention_backward", *args), launches)
    assert seen == expected and launches[0][2][3] is args[0]
    for grad, need in zip(grads, needs, strict=True):
        assert (grad.numel() > 0) == need
        assert not need or any(any(x is grad for x in args) for _, _, args in launches)


@pytest.fixture
def repeating(monkeypatch):
    """Calls on CPU tensors go through the plans, whose launches are the interpreter's; yields the plans."""
    from s2s_kernels.ops import triton_launch, triton_plans

    kernels = kernels_of()
    interpreters = {value.fn: value for _, _, value in kernels}

    class Compiled:
        packed_metadata = ()

        def __init__(self, kernel):
            self.function = kernel

        @staticmethod
        def run(x, y, z, stream, kernel, metadata, *args):
            interpreters[kernel.fn][(x, y, z)](*args[3:])

    def run(self, *args, grid, warmup, **kwargs):
        interpreters[self.fn][grid](*args, **{name: kwargs[name] for name in self._constants})
        return Compiled(self)

    monkeypatch.setattr(triton_launch.Kernel, "run", run)
    monkeypatch.setattr(triton_launch, "driver", types.SimpleNamespace(active=Driver()))
    monkeypatch.setattr(triton_plans, "_plans", {})
    with monkeypatch.context() as patch:
        patch.setattr(triton_launch.knobs.runtime, "interpret", False)
        made = {fn: triton_launch.kernel(fn) for fn in interpreters}
    for module, name, value in kernels:
        monkeypatch.setattr(module, name, made[value.fn])

    def function_of(operator, first, tensors, planned=False):
        assert planned
        kernel = python_kernels.KERNELS[operator]
        return lambda *args: triton_plans.planned(operator, kernel, args)

    monkeypatch.setattr(python_kernels, "function_of", function_of)
    return triton_plans._plans


REPEATED = {
    "attention": ("plain", "lse", "everything", "dropout"),
    "attention_packed": ("plain", "everything"),
    "additive_attention": None,
    "attention_pool": None,
    "causal_conv1d": None,
}


@interpreted
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls_compute_what_they_are_asked(name, kernels, repeating):
    from s2s_kernels.ops.triton_plans import Plan

    case, wanted = CASES[name], REPEATED[name]
    samples = [s for s in case.samples if s.name in wanted] if wanted else case.samples[:4]
    assert samples
    for sample in samples:
        for seed in range(4):
            judge(sample.build(Draw(seed=seed)), case.function)
    assert sum(isinstance(plan, Plan) for plan in repeating.values()) >= 2 * len(samples) - 1


@interpreted
def test_what_mends_another_kernel_s_results_is_repeated(kernels, repeating):
    """It writes into tensors that it is given."""
    from s2s_kernels.ops.attention import triton_kernels
    from s2s_kernels.ops.triton_plans import Plan, planned

    def at_once(name, function, args):
        return function(*args)

    options = (None, 0, False, 0, None, None)
    for seed in range(5):
        draw = Draw(torch.float16, seed=seed)
        query, key, value, grad = (draw(1, 2, 20, 16) for _ in range(4))
        value[0, 1, 7, 3] = float("inf") if seed != 3 else 1.0
        results = []
        for call in (at_once, planned):
            out, grads = torch.full_like(query, 9.0), [torch.full_like(query, 9.0) for _ in range(3)]
            args = query, key, value, out, True, *options
            softmax, spoilt = call("mend_forward", triton_kernels.mend_forward, args)
            args = grad, out, softmax, spoilt, query, key, value, *grads, *options
            assert call("mend_backward", triton_kernels.mend_backward, args) == ()
            assert bool(out.eq(9.0).all()) == bool(grads[0].eq(9.0).all()) == (seed == 3)
            results.append([out, *grads])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    assert sum(isinstance(plan, Plan) for plan in repeating.values()) == 2
