"""What holds for every layer alike: copying, saving, moving, compiling, threads and processes. Rows 32, 36, 37 of the edge cases."""

import copy
import io
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import s2s_kernels as s2s
from s2s_kernels.testing import outputs_of


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


LAYERS = {
    "LSTM": (lambda: s2s.nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True), lambda: (noise(2, 6, 5),)),
    "LSTM with every option": (
        lambda: s2s.nn.LSTM(
            5, 7, 2, batch_first=True, layer_norm=True, zoneout=0.1, recurrent_dropout=0.1, weight_dropout=0.1
        ),
        lambda: (noise(2, 6, 5),),
    ),
    "LSTM with projections": (lambda: s2s.nn.LSTM(5, 7, proj_size=3), lambda: (noise(6, 2, 5),)),
    "GRU": (lambda: s2s.nn.GRU(5, 7, 2, bidirectional=True), lambda: (noise(6, 2, 5),)),
    "RNN": (lambda: s2s.nn.RNN(5, 7, nonlinearity="relu"), lambda: (noise(6, 2, 5),)),
    "LSTMCell": (lambda: s2s.nn.LSTMCell(5, 7), lambda: (noise(2, 5),)),
    "GRUCell": (lambda: s2s.nn.GRUCell(5, 7), lambda: (noise(2, 5),)),
    "RNNCell": (lambda: s2s.nn.RNNCell(5, 7), lambda: (noise(2, 5),)),
    "CausalConv1d": (lambda: s2s.nn.CausalConv1d(4, 6, 3, dilation=2, activation="relu"), lambda: (noise(2, 4, 9),)),
    "GatedCausalConv1d": (lambda: s2s.nn.GatedCausalConv1d(4, 6, 3, 2, gate="gated_tanh"), lambda: (noise(2, 4, 9),)),
    "WaveNetStack": (lambda: s2s.nn.WaveNetStack(4, 6, (1, 2, 4)), lambda: (noise(2, 4, 9),)),
    "MultiheadAttention": (
        lambda: s2s.nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: (noise(2, 6, 8), noise(2, 5, 8), noise(2, 5, 8)),
    ),
    "AdditiveAttention": (lambda: s2s.nn.AdditiveAttention(4, 6, 5), lambda: (noise(2, 3, 4), noise(2, 7, 6))),
    "LuongAttention": (lambda: s2s.nn.LuongAttention(4, 6, score="general"), lambda: (noise(2, 3, 4), noise(2, 7, 6))),
    "AttentionPool": (lambda: s2s.nn.AttentionPool(4, 5), lambda: (noise(2, 7, 4),)),
}
EVERY = [pytest.param(build, inputs, id=name) for name, (build, inputs) in LAYERS.items()]


def same(a, b):
    for x, y in zip(outputs_of(a), outputs_of(b), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("build, inputs", EVERY)
def test_copies_and_round_trips(build, inputs):
    layer = build().eval()
    expected = layer(*inputs())
    same(copy.deepcopy(layer)(*inputs()), expected)
    same(pickle.loads(pickle.dumps(layer))(*inputs()), expected)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    same(torch.load(buffer, weights_only=False)(*inputs()), expected)
    other = build().eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    same(other(*inputs()), expected)
    assert repr(layer).startswith(type(layer).__name__)


@pytest.mark.parametrize("build, inputs", EVERY)
def test_other_dtypes_and_devices(build, inputs):
    layer = build().eval()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for output in outputs_of(layer.to(dtype)(*(v.to(dtype) for v in inputs()))):
            assert output.dtype == dtype and output.isfinite().all()
    real = outputs_of(layer.float()(*inputs()))
    meta = outputs_of(layer.to("meta")(*(v.to("meta") for v in inputs())))
    assert [o.shape for o in meta] == [o.shape for o in real]
    with torch.device("meta"):
        assert all(p.is_meta for p in build().parameters())
    factory = {name: type(p) for name, p in layer.named_parameters()}
    assert factory and set(factory.values()) == {torch.nn.Parameter}


@pytest.mark.parametrize("build, inputs", EVERY)
def test_compiles_whole(build, inputs):
    torch._dynamo.reset()
    layer = build().eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for a, b in zip(outputs_of(compiled(*inputs())), outputs_of(layer(*inputs())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("build, inputs", EVERY)
def test_every_parameter_gets_a_gradient(build, inputs):
    layer = build().train()
    sum(o.sum() for o in outputs_of(layer(*inputs()))).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("build, inputs", EVERY)
def test_many_threads_at_once(build, inputs):
    layer = build().eval()
    expected = layer(*inputs())
    with ThreadPoolExecutor(16) as pool:
        for result in pool.map(lambda _: layer(*inputs()), range(64)):
            same(result, expected)


@pytest.mark.parametrize("build, inputs", EVERY)
def test_scripting_is_refused_with_advice(build, inputs):
    with pytest.raises(Exception, match="unpatch"):
        torch.jit.script(build())


def in_worker(index):
    torch.manual_seed(0)
    layer = s2s.nn.GRU(5, 7)
    return layer(noise(6, 2, 5))[0].detach().numpy()


def test_after_fork():
    """The parent has used its thread pool before the fork, as a training loop with DataLoader workers has."""
    torch.manual_seed(0)
    expected = s2s.nn.GRU(5, 7)(noise(6, 2, 5))[0].detach().numpy()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for result in pool.map(in_worker, range(4)):
            assert (result == expected).all()


def test_two_processes_load_at_once():
    program = "import torch, s2s_kernels as s; print(s.nn.RNN(2, 3)(torch.zeros(4, 1, 2))[0].shape)"
    running = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0].strip() for p in running] == ["torch.Size([4, 1, 3])"] * 2
