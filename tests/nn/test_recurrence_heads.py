"""LSTM, GRU and RNN whose recurrent weights are of heads."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import s2s_kernels as s2s
from s2s_kernels.ops.recurrence.reference import block_diagonal, diagonal_blocks
from s2s_kernels.testing.twins import leaves

KINDS = ("LSTM", "GRU", "RNN")


def pair(kind, heads=3, **options):
    """torch's layer, whose recurrent weights are 0 off the blocks, and ours of the same seed."""
    torch.manual_seed(1)
    theirs = getattr(nn, kind)(5, 6, **options, dtype=torch.float64)
    torch.manual_seed(1)
    ours = getattr(s2s.nn, kind)(5, 6, **options, dtype=torch.float64, heads=heads)
    for name, parameter in theirs.named_parameters():
        if name.startswith("weight_hh"):
            gates = parameter.shape[0] // 6
            with torch.no_grad():
                parameter.copy_(block_diagonal(diagonal_blocks(parameter, heads, gates), gates))
    return theirs, ours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True, "num_layers": 2}],
    ids=str,
)
def test_equals_torch_with_block_diagonal_weights(kind, options):
    theirs, ours = pair(kind, **options)
    (x,) = leaves((torch.randn(4, 4, 5, dtype=torch.float64),))
    expected, found = theirs(x), ours(x)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found[0])
    wanted = torch.autograd.grad(expected[0], (x, *theirs.parameters()), upstream)
    grads = torch.autograd.grad(found[0], (x, *ours.parameters()), upstream)
    for (name, parameter), grad, want in zip([("x", x), *ours.named_parameters()], grads, wanted, strict=True):
        if name.startswith("weight_hh"):
            assert parameter.shape == (3, want.shape[0] // 3, 2)
            want = diagonal_blocks(want, 3, want.shape[0] // 6)
        torch.testing.assert_close(grad, want)


def test_projection_and_packed_sequences():
    theirs, ours = pair("LSTM", heads=2, proj_size=4)
    x, lengths = torch.randn(6, 3, 5, dtype=torch.float64), torch.tensor([6, 2, 4])
    torch.testing.assert_close(ours(x), theirs(x))
    theirs, ours = pair("GRU")
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    (expected, last), (found, h_n) = theirs(packed), ours(packed)
    torch.testing.assert_close(pad_packed_sequence(found)[0], pad_packed_sequence(expected)[0])
    torch.testing.assert_close(h_n, last)
    torch.testing.assert_close(ours(x, lengths=lengths)[0], pad_packed_sequence(expected)[0])


def test_one_head_is_torchs_layer():
    assert s2s.nn.LSTM(5, 6, heads=1).state_dict().keys() == nn.LSTM(5, 6).state_dict().keys()
    s2s.nn.GRU(5, 6, heads=1).load_state_dict(nn.GRU(5, 6).state_dict(), strict=True)
    assert "heads" not in repr(s2s.nn.LSTM(5, 6)) and "heads=2" in repr(s2s.nn.LSTM(5, 6, heads=2))


@pytest.mark.parametrize("kind", KINDS)
def test_regularisers_copies_and_state(kind):
    options = {"recurrent_dropout": 0.3, "weight_dropout": 0.3, "zoneout": 0.2, "dropout": 0.1, "layer_norm": True}
    layer = getattr(s2s.nn, kind)(5, 6, num_layers=2, heads=2, **options)
    x = torch.randn(4, 3, 5)
    torch.manual_seed(0)
    output = layer(x)[0]
    output.sum().backward()
    assert output.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters())
    with s2s.use_backend("reference"):
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x)[0], output)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    layer.eval()
    for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False).eval()):
        assert twin.heads == 2
        torch.testing.assert_close(twin(x)[0], layer(x)[0], rtol=0, atol=0)
    other = getattr(s2s.nn, kind)(5, 6, num_layers=2, heads=2, **options).eval()
    other.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(other(x)[0], layer(x)[0], rtol=0, atol=0)
    layer.reset_parameters()
    assert not torch.equal(layer.weight_hh_l0, other.weight_hh_l0)


@pytest.mark.parametrize(
    "options, error, words",
    [({"heads": 4}, ValueError, "heads must be a divisor of hidden_size 6, got 4"),
     ({"heads": 0}, ValueError, "heads"), ({"heads": 2.0}, TypeError, "heads must be an integer"),
     ({"heads": True}, TypeError, "heads"),
     ({"heads": 3, "proj_size": 4}, ValueError, "hidden_size 6 and proj_size 4, got 3")],
)  # fmt: skip
def test_errors_name_the_argument(options, error, words):
    with pytest.raises(error, match=f"LSTM: .*{words}"):
        s2s.nn.LSTM(5, 6, **options)


def test_compiles_once_for_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = s2s.nn.LSTM(5, 6, num_layers=2, bidirectional=True, heads=3)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    served, graphs = s2s.explain(layer, torch.randn(4, 3, 5)).backend, None
    for time in (10, 7, 11) if served == "cpu" else (4,):  # no other size
        x = torch.randn(time, 3, 5)
        torch.testing.assert_close(compiled(x)[0], layer(x)[0])
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs
