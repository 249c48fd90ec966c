"""The equality rule itself: it must catch what it is there to catch."""

import pytest
import torch

import s2s_kernels
from s2s_kernels import dispatch
from s2s_kernels.testing import call, compare, emulation, excess

EXACT = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)
NAN = float("nan")


def judged(ours, eager, exact=EXACT):
    return excess(torch.tensor(ours), torch.tensor(eager), exact)


def test_the_bound_is_twice_eagers_error_and_four_eps():
    step = 4 * torch.finfo(torch.float32).eps * 3
    assert judged([1.0, -3.0, 0.5], [1.0, -3.0, 0.5]) <= 0
    assert judged([1.0, -3.0 - 0.7 * step, 0.5], [1.0, -3.0, 0.5]) <= 0
    assert judged([1.0, -3.0 - 1.3 * step, 0.5], [1.0, -3.0, 0.5]) > 0
    assert judged([1.0 + 1.9e-3, -3.0, 0.5], [1.0, -3.0, 0.501]) <= 0
    assert judged([1.0 + 2.2e-3, -3.0, 0.5], [1.0, -3.0, 0.501]) > 0


@pytest.mark.parametrize("place", [NAN, float("inf")])
def test_nan_and_inf_must_stand_in_the_same_places(place):
    exact = torch.tensor([1.0, place], dtype=torch.float64)
    assert judged([1.0, place], [1.0, place], exact) <= 0
    assert judged([1.0, 2.0], [1.0, place], exact) > 0
    assert judged([place, place], [1.0, place], exact) > 0


def test_shape_matters():
    assert excess(torch.zeros(2), torch.zeros(3), torch.zeros(3).double()) > 0


def test_a_wrong_gradient_is_caught():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return grad

    x = torch.randn(4)
    assert max(compare(torch.square, call(x)).values()) <= 0
    seen = iter([Halved.apply, torch.square, torch.square])
    broken = compare(lambda x: next(seen)(x), call(x))
    assert broken["output 0"] <= 0 and broken["gradient 0 (4,)"] > 0


@pytest.mark.skipif(emulation.unavailable() is not None, reason=str(emulation.unavailable()))
def test_emulation_ends_where_it_was_asked_for(monkeypatch):
    x, weight = torch.randn(2, 3, 40), torch.randn(4, 3, 3)
    with dispatch.use_backend("cpu"):
        before = s2s_kernels.causal_conv1d(x, weight)
        with emulation.emulated():
            torch.testing.assert_close(s2s_kernels.causal_conv1d(x, weight), before)
        assert torch.equal(s2s_kernels.causal_conv1d(x, weight), before)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), emulation.emulated():
        pass
