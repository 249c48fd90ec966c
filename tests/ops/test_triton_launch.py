"""Launches that go past Triton's own way to a compiled kernel, without a GPU: what they tell apart and hand on."""

import types

import pytest
import torch
from interpreting import needs_triton

pytestmark = needs_triton


def add_kernel(x, y, count: "tl.int64", scale: "tl.float32", BLOCK: "tl.constexpr", UNIT: "tl.constexpr"):  # noqa: F821
    pass


class Driver:
    device, stream = 0, 10

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + device


@pytest.fixture
def kernel(monkeypatch):
    """A kernel, with what it was compiled for and the launches that went past Triton in its `compiled` and `past`."""
    import triton.language as tl

    from s2s_kernels.ops import triton_launch

    kinds = {"count": tl.int64, "scale": tl.float32, "BLOCK": tl.constexpr, "UNIT": tl.constexpr}
    monkeypatch.setattr(add_kernel, "__annotations__", kinds)
    monkeypatch.setattr(triton_launch.knobs.runtime, "interpret", False)
    made = triton_launch.kernel(add_kernel)
    made.compiled, made.past, made.driver = [], [], Driver()

    def run(*args, grid, warmup, **kwargs):
        made.compiled.append((args, kwargs))
        number = len(made.compiled)
        return types.SimpleNamespace(
            run=lambda *given: made.past.append((number, given)), function=f"function {number}", packed_metadata=()
        )

    monkeypatch.setattr(made, "run", run)
    monkeypatch.setattr(triton_launch, "driver", types.SimpleNamespace(active=made.driver))
    return made


def test_a_known_launch_goes_to_the_compiled_kernel_with_its_own_numbers_and_the_current_stream(kernel):
    x = torch.zeros(8)
    kernel[(3,)](x, None, 5, 0.5, UNIT=True, BLOCK=16, num_warps=4)
    kernel.driver.stream = 20
    kernel[(4, 2)](x, None, 6, 0.25, UNIT=True, BLOCK=16, num_warps=4)
    assert len(kernel.compiled) == 1
    ((number, given),) = kernel.past
    assert number == 1
    assert given == (4, 2, 1, 20, "function 1", (), None, None, None, x, None, 6, 0.25, 16, True)


def test_what_would_be_compiled_anew_is_told_apart(kernel):
    x = torch.zeros(8)
    options = {"BLOCK": 16, "UNIT": True}

    def launch(*tensors, **changes):
        kernel[(1,)](*tensors, 5, 0.5, **{**options, **changes})

    different = [
        lambda: launch(x, x),
        lambda: launch(x, None),
        lambda: launch(x, x.double()),
        lambda: launch(x, x[1:]),
        lambda: launch(x, x, BLOCK=32),
        lambda: launch(x, x, UNIT=1),
        lambda: launch(x, x, num_warps=8),
        lambda: launch(x, x, num_stages=8),
    ]
    for call in different:
        call()
    kernel.driver.device = 1
    launch(x, x)
    assert len(kernel.compiled) == len(different) + 1 and not kernel.past
    kernel.driver.device = 0
    for call in different:
        call()
    launch(x, x[5:])  # as badly aligned as x[1:]
    launch(torch.zeros(3), x)
    assert [number for number, _ in kernel.past] == [*range(1, len(different) + 1), 4, 1]


def test_triton_launches_what_is_observed(kernel):
    from triton import knobs

    x, seen = torch.zeros(8), []

    def launch():
        kernel[(1,)](x, x, 5, 0.5, BLOCK=16, UNIT=True)

    launch()
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        launch()
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(kernel.compiled) == 2 and not kernel.past
    launch()
    assert len(kernel.past) == 1
    kernel.add_pre_run_hook(lambda *args, **kwargs: None)
    launch()
    assert len(kernel.compiled) == 3


def test_a_kernel_without_the_expected_attributes_is_left_to_triton(kernel, monkeypatch):
    found = []
    monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: found.append(1) or object())
    for _ in range(2):
        kernel[(1,)](None, None, 5, 0.5, BLOCK=16, UNIT=True)
    assert found == [1, 1]
