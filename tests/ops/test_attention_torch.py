"""torch's own attention as a backend on a GPU, without one: when it is chosen, and what mends its results."""

import contextvars

import pytest
import torch
from interpreting import emulating, interpreted, needs_extension, needs_triton
from torch._subclasses.fake_tensor import FakeTensorMode

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.ops.attention import autograd, builtin

pytestmark = emulating()
INF, NAN = float("inf"), float("nan")


@pytest.fixture
def unforced(monkeypatch):
    """The choice is free, whatever the other tests of this module force."""
    monkeypatch.setattr(dispatch, "_asked", contextvars.ContextVar("unforced", default=(None, False)))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)


def explained(
    *, dtype=torch.bfloat16, heads=32, kv_heads=32, time=8192, source=8192, width=64, value_width=None, **options
):  # fmt: skip
    with FakeTensorMode():
        query = torch.empty(2, heads, time, width, dtype=dtype, device="cuda")
        key = torch.empty(2, kv_heads, source, width, dtype=dtype, device="cuda")
        value = torch.empty(2, kv_heads, source, value_width or width, dtype=dtype, device="cuda")
        for name, option in options.items():
            if callable(option):
                options[name] = option(query)
        return s2s.explain(s2s.attention, query, key, value, **options)


@needs_triton
@needs_extension
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": "bottom-right"},
        {"dtype": torch.float16, "scale": 0.5},
        {"kv_heads": 2, "enable_gqa": True},
        {"source": 9600},
        {"width": 128},
    ],
)
def test_torch_serves_what_it_is_measured_to_win(options, unforced):
    found = explained(**options)
    assert found.backend == "torch" and "torch is preferred" in found.reasons["triton"]


@needs_triton
@needs_extension
@pytest.mark.parametrize(
    "options, reason",
    [
        ({"dtype": torch.float32}, "of bfloat16 and float16"),
        ({"causal": True, "source": 96}, "T = S only"),
        ({"width": 256}, "up to 128"),
        ({"width": 60}, "multiple of 8"),
        ({"value_width": 32}, "D = Dv"),
        ({"time": 0}, "empty"),
        ({"heads": 65536, "kv_heads": 65536}, "up to 65535"),
        ({"source": 2**23}, "32 bits"),
        ({"window": (4, 4)}, "no windows"),
        ({"dropout_p": 0.1}, "another dropout mask"),
        ({"return_lse": True}, "no differentiable lse"),
        ({"softcap": 5.0}, "no softcap"),
        ({"time": 1}, "splits the keys"),
        ({"time": 512, "source": 512}, "so few products"),
        ({"key_lengths": lambda query: query.new_empty(2, dtype=torch.int64)}, "hidden key"),
    ],
)
def test_the_rest_is_left_to_triton_with_a_reason(options, reason, unforced):
    found = explained(**options)
    assert found.backend == "triton" and reason in found.reasons["torch"]


@needs_triton
@needs_extension
def test_what_must_be_deterministic_is_left_to_triton(unforced, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    found = explained()
    assert found.backend == "triton" and "deterministic" in found.reasons["torch"]


SPOILT = [None, ("query", INF), ("key", NAN), ("key", -INF), ("value", NAN), ("value", INF)]


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spoilt", SPOILT, ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_results_are_the_definitions_whatever_comes_in(causal, spoilt, kv_heads):
    torch.manual_seed(0)
    shapes = {"query": (2, 4, 40, 16), "key": (2, kv_heads, 40, 16), "value": (2, kv_heads, 40, 16)}
    leaves = {name: torch.randn(shape, dtype=torch.float16) for name, shape in shapes.items()}
    if spoilt is not None:
        leaves[spoilt[0]][1, 1, 30, 3] = spoilt[1]
    tensors = (*(leaf.requires_grad_() for leaf in leaves.values()), *[None] * 6)
    options = (None, 0 if causal else None, False, 0.0, None, None)
    grad = torch.randn(2, 4, 40, 16, dtype=torch.float16).transpose(1, 2).contiguous().transpose(1, 2)

    def evaluated(function):
        out = function(tensors, options)[0]
        return out, *torch.autograd.grad(out, tensors[:3], grad)

    ours, definition = evaluated(builtin.kernel), evaluated(autograd.reference_of)
    assert definition[0].isnan().any() == (spoilt is not None)
    for one, other in zip(ours, definition, strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one, other, equal_nan=True, rtol=4e-3, atol=4e-3)


@interpreted
def test_each_subset_of_gradients_a_second_backward_and_the_second_derivative():
    torch.manual_seed(0)
    options = (None, None, False, 0.0, 0.3, None)
    tensors = [torch.randn(1, 2, 20, 8, dtype=torch.float16) for _ in range(3)]
    for place in range(3):
        leaves = [x.clone().requires_grad_(n == place) for n, x in enumerate(tensors)]
        out = builtin.kernel((*leaves, *[None] * 6), options)[0]
        first, again = (torch.autograd.grad(out.sum(), leaves[place], retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, again, rtol=0, atol=0)
    leaves = [x.clone().requires_grad_() for x in tensors]

    def penalty(function):
        out = function((*leaves, *[None] * 6), options)[0]
        (grad,) = torch.autograd.grad(out.float().square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.float().square().sum(), leaves)

    for one, other in zip(penalty(builtin.kernel), penalty(autograd.reference_of), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
