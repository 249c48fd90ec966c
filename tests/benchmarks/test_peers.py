"""The rivals compute what ours compute: a comparison with something else would say nothing."""

import pytest
import torch
from torch import nn

import s2s_kernels as s2s
from benchmarks import onnx_peer, peers
from benchmarks.twins import from_built_ins
from s2s_kernels.models import LANGUAGE_MODELS


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def close(a, b):
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cell_loops(kind):
    module, x = getattr(nn, kind)(3, 5, batch_first=True), noise(2, 7, 3)
    close(peers.cell_loop(kind, x, module), module(x)[0])


def test_layer_norm_loop():
    layer, x = s2s.nn.LSTM(3, 5, batch_first=True, layer_norm=True), noise(2, 7, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * noise(*parameter.shape))
    p = dict(layer.named_parameters())
    norms = (p["ln_ih_weight_l0"], p["ln_hh_weight_l0"], p["ln_c_weight_l0"], p["ln_c_bias_l0"])
    bias = p["bias_ih_l0"] + p["bias_hh_l0"]
    close(peers.layer_norm_lstm_loop(x, p["weight_ih_l0"], p["weight_hh_l0"], bias, *norms), layer(x)[0])


@pytest.mark.parametrize("dilation, groups", [(1, 1), (3, 1), (2, 4)])
def test_causal_convolutions(dilation, groups):
    x, weight, bias = noise(2, 4, 9), noise(8, 4 // groups, 3), noise(8)
    ours = s2s.causal_conv1d(x, weight, bias, dilation=dilation, groups=groups)
    close(peers.padded_conv1d(x, weight, bias, dilation, groups), ours)
    close(peers.chomped_conv1d(x, weight, bias, dilation, groups), ours)


def test_ring_wavenet():
    stack, x = s2s.nn.WaveNetStack(4, 6, (1, 2, 4, 1)).requires_grad_(False), noise(2, 4, 12)
    ring = peers.RingWaveNet(stack, 2)
    stepped = torch.stack([ring.step(frame) for frame in x.unbind(2)], 2)
    close(stepped, stack(x))


def test_attentions():
    query, key, value, bias = noise(2, 3, 5, 4), noise(2, 3, 7, 4), noise(2, 3, 7, 4), noise(1, 3, 5, 7)
    close(peers.naive_attention(query, key, value, bias), s2s.attention(query, key, value, bias=bias))
    query, key, value, weight = noise(2, 5, 4), noise(2, 7, 4), noise(2, 7, 3), noise(4)
    lengths = torch.tensor([7, 2])
    hidden = torch.arange(7) >= lengths[:, None]
    ours = s2s.additive_attention(query, key, value, weight, key_lengths=lengths)
    close(peers.additive_attention(query, key, value, weight, hidden[:, None]), ours)
    x, weight, bias, context = noise(2, 7, 4), noise(6, 4), noise(6), noise(6)
    pooled = s2s.attention_pool(x, weight, bias, context, lengths=lengths)
    close(peers.attention_pool(x, weight, bias, context, hidden), pooled)


@pytest.mark.parametrize("name", list(LANGUAGE_MODELS))
def test_models_from_built_ins(name):
    ours, theirs = LANGUAGE_MODELS[name](), from_built_ins(LANGUAGE_MODELS[name]())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert not any(type(module).__module__.startswith("s2s_kernels.nn.recurrence") for module in theirs.modules())
    tokens = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(2))
    close(theirs(tokens), ours(tokens))


@pytest.mark.skipif(not onnx_peer.available(), reason="onnxruntime is not installed")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_onnx_runtime(kind):
    module, x = getattr(nn, kind)(8, 8, batch_first=True), noise(3, 7, 8)
    close(onnx_peer.recurrence(kind, module, x)(), module(x)[0])
