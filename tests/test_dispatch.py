import io
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch

import s2s_kernels
from s2s_kernels import dispatch
from s2s_kernels.dispatch import Operator, choose, explain, use_backend

CPU = torch.device("cpu")
OPERATOR = Operator("double", {"cpu": lambda call: "odd sizes are not covered" if call % 2 else None})
served = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))


@pytest.fixture(autouse=True)
def nothing_forced():
    """These tests say themselves what is forced, whatever S2S_BACKEND is."""
    token = dispatch._asked.set((None, False))
    yield
    dispatch._asked.reset(token)


def double(size, device=CPU):
    return choose(OPERATOR, device, size)


@served
def test_the_kernel_serves_what_it_covers():
    assert (double(4), double(3)) == ("cpu", "reference")


def test_a_device_that_no_backend_knows_uses_the_reference():
    assert double(4, torch.device("meta")) == "reference"


@served
def test_a_forced_backend_serves_or_raises():
    with use_backend("cpu"):
        assert double(4) == "cpu"
        with pytest.raises(
            NotImplementedError, match="double: the forced backend cpu does not cover this call: odd sizes"
        ):
            double(3)
        with pytest.raises(NotImplementedError, match="on meta"):
            double(4, torch.device("meta"))
        with use_backend("reference"):
            assert double(4) == "reference"
    with use_backend("triton"), pytest.raises(NotImplementedError, match="double has no triton kernel"):
        double(4)
    assert double(3) == "reference"


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of .*cpu.* got 'gpu'"), use_backend("gpu"):
        pass


@served
def test_forcing_binds_its_own_thread_only():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(double(4)))
        thread.start()
        thread.join()
    assert seen == ["cpu"] or dispatch._environment is not None


@served
def test_explain_gives_the_choice_and_every_reason():
    explanation = explain(double, 3)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "odd sizes are not covered"
    assert set(explanation.reasons) == set(dispatch.BACKENDS) - {"reference"}
    assert str(explanation).startswith("served by reference\n  not ")
    with use_backend("reference"):
        assert explain(double, 4).reasons["cpu"] == "reference is forced"
    with use_backend("cpu"), pytest.raises(NotImplementedError, match="odd sizes"):
        explain(double, 3)


def test_explain_needs_an_operator():
    with pytest.raises(ValueError, match="called none"):
        explain(abs, -1)
    assert dispatch._asked.get() == (None, False)


@pytest.mark.parametrize("value, expected", [("reference", "reference"), ("nonsense", "ValueError: S2S_BACKEND")])
def test_the_environment_variable(value, expected):
    program = "from s2s_kernels import dispatch as d, use_backend; print(d._asked.get()[0])"
    run = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        env={**os.environ, "S2S_BACKEND": value},
        capture_output=True,
        text=True,
    )
    assert expected in run.stdout + run.stderr


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_gets_the_reference(dynamo):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Module(torch.nn.Module):
        def forward(self, x, weight):
            return s2s_kernels.causal_conv1d(x, weight, dilation=2, activation="relu")

    target = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, about itself
        torch.onnx.export(Module(), (torch.randn(1, 4, 16), torch.randn(4, 4, 3)), target, dynamo=dynamo)
    nodes = onnx.load_from_string(target.getvalue()).graph.node
    assert nodes and all(node.domain in ("", "ai.onnx") for node in nodes)
    assert any(node.op_type == "Relu" for node in nodes)


@pytest.mark.skipif(dispatch.triton_missing is not None, reason=str(dispatch.triton_missing))
def test_the_version_of_triton_is_a_constant_of_a_compilation():
    def add(x):
        return x + dispatch.triton_version()[0]

    assert torch.compile(add, fullgraph=True, backend="eager")(torch.zeros(())) == dispatch.triton_version()[0] >= 3


def test_triton_says_what_it_lacks(monkeypatch):
    operator, device = Operator("double", {"triton": lambda call: None}), torch.device("cuda", 0)
    monkeypatch.setattr(dispatch, "extension_missing", None)
    monkeypatch.setattr(dispatch, "triton_missing", "triton is not installed")
    assert dispatch.gap(operator, "triton", device, 4) == "triton is not installed"
    monkeypatch.setattr(dispatch, "triton_missing", None)
    assert "CUDA tensors" in dispatch.gap(operator, "triton", CPU, 4)

    class Properties:
        major, minor = 7, 5

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert "compute capability 8.0, cuda:0 has 7.5" in dispatch.gap(operator, "triton", device, 4)
    Properties.major = 9
    assert dispatch.gap(operator, "triton", device, 4) is None
    Properties.major, Properties.minor = 10, 0
    for version, lacks in (((3, 7), True), ((3, 8), False), ((4, 0), False)):
        monkeypatch.setattr(dispatch, "triton_version", lambda version=version: version)
        reason = dispatch.gap(operator, "triton", device, 4)
        assert ("triton 3.8" in reason and "cuda:0 has 10.0" in reason) if lacks else reason is None


@served
def test_what_surrounds_a_call_keeps_it_from_the_kernel_alone():
    x = torch.ones(3)
    seen = []

    def look(x, *_):
        seen.append(dispatch.at_rest())
        return x

    assert dispatch.at_rest() and dispatch.directly(lambda tensors, _: tensors[0], (x, None), ()) is x
    with use_backend("cpu"):
        assert dispatch.at_rest() and not dispatch.at_rest("triton")
    with use_backend("reference"):
        look(x)
    with torch.autocast("cpu"):
        look(x)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    torch.vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    with pytest.raises(ValueError, match="called none"):
        explain(look, x)
    torch.compile(look, fullgraph=True, backend="eager")(x)
    assert seen == [False] * 7
    assert dispatch.directly(lambda tensors, _: tensors[0], (x.to("meta"),), ()) is None


@served
def test_a_call_that_anything_looks_at_is_not_untouched():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    x, seen = torch.ones(3), []

    def look(x, *_):
        seen.append(dispatch.untouched((None, x)))
        return x

    assert dispatch.untouched((x, None, torch.nn.Parameter(x)))
    with use_backend("reference"):
        assert dispatch.untouched((x,))
    with torch.autocast("cpu"):
        look(x)
    with torch.autograd.forward_ad.dual_level():
        look(x)
    with FlopCounterMode(display=False), torch.profiler.profile():
        look(x)
    with torch.profiler.profile():
        look(x)
    torch.vmap(look)(x)
    torch.jit.trace(look, (x,), check_trace=False)
    torch.compile(look, fullgraph=True, backend="eager")(x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    look(fake)
    assert seen == [False] * 8


def test_what_a_kernel_refuses_is_left_to_the_checks():
    def refuses(tensors, options):
        raise RuntimeError("no")

    assert dispatch.directly(refuses, (torch.ones(3),), ()) is None
    assert dispatch.directly(refuses, ("no tensor",), ()) is None


def test_a_kernel_of_triton_gets_plain_tensors_of_one_gpu_alone(monkeypatch):
    class OnGpu(torch.Tensor):  # as far as anyone asks
        is_cpu, is_cuda, device, number = False, True, torch.device("cuda", 0), 0

        def get_device(self):
            return self.number

    class Elsewhere(OnGpu):
        number = 1

    def call(*tensors):
        return dispatch.directly(lambda tensors, _: "made", tensors, (), triton=True)

    monkeypatch.setattr(dispatch, "extension_missing", None)
    monkeypatch.setattr(dispatch, "triton_missing", None)
    monkeypatch.setattr(dispatch, "_runs_triton", lambda device: True)
    monkeypatch.setattr(dispatch, "_PLAIN", (torch.Tensor, OnGpu, Elsewhere))
    x = torch.ones(3).as_subclass(OnGpu)
    assert call(x, None, x) == "made"
    assert dispatch.directly(lambda tensors, _: "made", (x,), ()) is None  # an operator with other kernels too
    for other in (torch.ones(3), torch.ones(3).as_subclass(Elsewhere), torch.nn.Parameter(torch.ones(3))):
        assert call(x, other) is None
    assert call(torch.ones(3).double().as_subclass(OnGpu)) is None
    with use_backend("triton"):
        assert call(x) == "made"
    with use_backend("cpu"):
        assert call(x) is None
    monkeypatch.setattr(dispatch, "_runs_triton", lambda device: False)
    assert call(x) is None


@served
def test_fresh_memory_of_the_extension_holds_nan():
    """Of the gates that are kept for backward, those past a length are nobody's: they show what fresh memory holds."""
    weights = [torch.ones(shape) for shape in ((8, 3), (8, 2), (8,), (8,))]
    options = (0, 1, True, False, False, 0.0, 0.0, False, False, 1)
    kept = torch.ops.s2s.recurrence_stack_forward(
        torch.ones(1, 3, 3), weights, None, None, torch.tensor([1]), None, *options
    )
    gates = kept[3]
    assert gates.isnan().tolist() == [[[False] * 8, [True] * 8, [True] * 8]]
