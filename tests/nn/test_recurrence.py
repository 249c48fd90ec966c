"""LSTM, GRU and RNN: torch's numbers, parameters and interface, and the options beyond it."""

import copy
import pickle

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils import rnn as packing

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.testing import Draw, outputs_of
from s2s_kernels.testing.twins import leaves, pair, same_function

needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
KINDS = ("LSTM", "GRU", "RNN")
SHAPES = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "no bias": {"bias": False},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projected": {"proj_size": 3, "bidirectional": True, "num_layers": 2},
    "projected without bias": {"proj_size": 3, "bias": False},
    "relu": {"nonlinearity": "relu"},
}
OPTIONS = [
    pytest.param(kind, options, id=f"{kind} {name}")
    for kind in KINDS
    for name, options in SHAPES.items()
    if not ("proj_size" in options and kind != "LSTM") and not ("nonlinearity" in options and kind != "RNN")
]


def state_of(layer, batch, draw):
    """A state before the sequence, as this layer takes it."""
    rows = layer.num_layers * (1 + layer.bidirectional)
    shape = () if batch is None else (batch,)
    h = draw(rows, *shape, layer.proj_size or layer.hidden_size)
    return (h, draw(rows, *shape, layer.hidden_size)) if layer.mode == "LSTM" else h


# Parameters and construction.


@pytest.mark.parametrize("kind, options", OPTIONS)
def test_parameters_are_torchs(kind, options):
    torch.manual_seed(5)
    theirs = getattr(nn, kind)(4, 6, **options)
    torch.manual_seed(5)
    ours = getattr(s2s.nn, kind)(4, 6, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for layer in (theirs, ours):
        torch.manual_seed(6)
        layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert [[w.shape for w in ws] for ws in ours.all_weights] == [[w.shape for w in ws] for ws in theirs.all_weights]


@pytest.mark.parametrize("kind, arguments", [
    ("LSTM", (4, 6, 2, False, True, 0.25, True, 3, "cpu", torch.float64)),
    ("GRU", (4, 6, 2, False, True, 0.25, True)),
    ("RNN", (4, 6, 2, "relu", False, True, 0.25, True)),
    ("LSTMCell", (4, 6, False, "cpu", torch.float64)),
    ("GRUCell", (4, 6, False, "cpu", torch.float64)),
    ("RNNCell", (4, 6, False, "relu", "cpu", torch.float64)),
])  # fmt: skip
def test_positional_arguments(kind, arguments):
    ours, theirs = getattr(s2s.nn, kind)(*arguments), getattr(nn, kind)(*arguments)
    assert repr(ours) == repr(theirs)
    assert {n: (p.shape, p.dtype) for n, p in ours.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in theirs.named_parameters()
    }


def test_layer_norm_parameters():
    layer = s2s.nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3, layer_norm=True)
    assert list(layer.state_dict())[: len(nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3).state_dict())] == list(
        nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3).state_dict()
    )
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if n.startswith("ln_")}
    assert shapes == {
        f"ln_{name}_l{index}{suffix}": (size,)
        for index in (0, 1)
        for suffix in ("", "_reverse")
        for name, size in (("ih_weight", 24), ("hh_weight", 24), ("c_weight", 6), ("c_bias", 6))
    }
    layer.reset_parameters()
    assert layer.ln_ih_weight_l1_reverse.eq(1).all() and layer.ln_c_bias_l0.eq(0).all()
    assert {n for n, _ in s2s.nn.GRU(4, 6, layer_norm=True).named_parameters() if n.startswith("ln_")} == {
        "ln_ih_weight_l0", "ln_hh_weight_l0",
    }  # fmt: skip
    assert {n for n, _ in s2s.nn.LSTMCell(4, 6, layer_norm=True).named_parameters() if n.startswith("ln_")} == {
        "ln_ih_weight", "ln_hh_weight", "ln_c_weight", "ln_c_bias",
    }  # fmt: skip


def test_representation_of_the_options():
    layer = s2s.nn.LSTM(4, 6, layer_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4)
    assert repr(layer) == ("LSTM(4, 6, layer_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, weight_dropout=0.4)")
    assert repr(s2s.nn.GRUCell(4, 6, layer_norm=True, zoneout=0.1)) == "GRUCell(4, 6, layer_norm=True, zoneout=0.1)"


def test_what_cudnn_needs_is_harmless():
    layer = s2s.nn.LSTM(4, 6, 2)
    layer.flatten_parameters()
    assert [w is p for w, p in zip(layer._flat_weights, layer.parameters(), strict=True)] == [True] * 8
    layer._flat_weights = [nn.Parameter(w.detach() * 2) for w in layer._flat_weights]
    assert layer._flat_weights[3] is layer.bias_hh_l0
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        s2s.nn.GRU(4, 6, dropout=0.5)


# Numbers.


@pytest.mark.parametrize("kind, options", OPTIONS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("given_state", [True, False])
def test_equals_torch(kind, options, batch_first, given_state):
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, batch_first=batch_first, **options)
    x = draw(3, 5, 4) if batch_first else draw(5, 3, 4)
    same_function(theirs, ours, (x, state_of(theirs, 3, draw)) if given_state else (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_torch_in_float32(kind):
    draw = Draw()
    theirs, ours = pair(kind, 4, 6, 2, dtype=torch.float32, bidirectional=True)
    same_function(theirs, ours, (draw(5, 3, 4), state_of(theirs, 3, draw)))


@pytest.mark.parametrize("kind, options", OPTIONS)
@pytest.mark.parametrize("given_state", [True, False])
def test_unbatched(kind, options, given_state):
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, **options)
    x = draw(5, 4)
    same_function(theirs, ours, (x, state_of(theirs, None, draw)) if given_state else (x,))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_results_can_be_viewed(bidirectional, num_layers):
    layer = s2s.nn.LSTM(4, 6, num_layers, bidirectional=bidirectional)
    output, (h_n, c_n) = layer(torch.ones(5, 3, 4))
    assert output.is_contiguous() and h_n.is_contiguous() and c_n.is_contiguous()


@given(
    kind=st.sampled_from(KINDS),
    num_layers=st.integers(1, 3),
    bias=st.booleans(),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    projected=st.booleans(),
    batched=st.booleans(),
    given_state=st.booleans(),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(2, 9)),
)
def test_equals_torch_over_options(
    kind, num_layers, bias, batch_first, bidirectional, projected, batched, given_state, sizes
):
    draw = Draw(torch.float64)
    batch, time, inputs, hidden = sizes
    options = {"proj_size": hidden // 2} if projected and kind == "LSTM" else {}
    options |= {"bias": bias, "batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(kind, inputs, hidden, num_layers, **options)
    x = draw(time, inputs) if not batched else draw(batch, time, inputs) if batch_first else draw(time, batch, inputs)
    same_function(theirs, ours, (x, state_of(theirs, batch if batched else None, draw)) if given_state else (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_layer_norm_by_torchs_operations(kind):
    draw = Draw(torch.float64)
    layer = getattr(s2s.nn, kind)(4, 6, layer_norm=True, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * draw(*parameter.shape))
    x, h, c, outputs = draw(5, 3, 4), draw.tensor(0.0, torch.float64).expand(3, 6), torch.zeros(3, 6).double(), []

    def normalised(v, weight, bias=None):
        return F.layer_norm(v, v.shape[-1:], weight, bias)

    for t in range(5):
        ih = normalised(x[t] @ layer.weight_ih_l0.t(), layer.ln_ih_weight_l0) + layer.bias_ih_l0
        hh = normalised(h @ layer.weight_hh_l0.t(), layer.ln_hh_weight_l0) + layer.bias_hh_l0
        if kind == "LSTM":
            i, f, g, o = (ih + hh).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * normalised(c, layer.ln_c_weight_l0, layer.ln_c_bias_l0).tanh()
        elif kind == "GRU":
            (r, z, n), (hr, hz, hn) = ih.chunk(3, 1), hh.chunk(3, 1)
            r, z = (r + hr).sigmoid(), (z + hz).sigmoid()
            h = (1 - z) * (n + r * hn).tanh() + z * h
        else:
            h = (ih + hh).tanh()
        outputs.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs))


# Sequences of several lengths.


def packed(x, lengths, batch_first, enforce_sorted=False):
    return packing.pack_padded_sequence(x, lengths, batch_first, enforce_sorted)


def same_packed(ours, theirs):
    assert type(ours) is packing.PackedSequence
    torch.testing.assert_close(ours.data, theirs.data)
    assert torch.equal(ours.batch_sizes, theirs.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("kind, options", OPTIONS)
@pytest.mark.parametrize("lengths", [[2, 5, 1], [5, 5, 3]], ids=["unsorted", "sorted"])
@pytest.mark.parametrize("given_state", [True, False])
def test_packed_sequences(kind, options, lengths, given_state):
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, batch_first=True, **options)
    x = draw(3, 5, 4).requires_grad_()
    state = state_of(theirs, 3, draw) if given_state else None
    inputs = [x, *(leaves(state) if given_state else [])]
    results = [
        layer(packed(x, torch.tensor(lengths), True, enforce_sorted=lengths[0] == 5), state) for layer in (ours, theirs)
    ]
    same_packed(results[0][0], results[1][0])
    for a, b in zip(outputs_of(results[0][1]), outputs_of(results[1][1]), strict=True):
        torch.testing.assert_close(a, b)
    gradients = [
        torch.autograd.grad(
            result[0].data.square().sum() + sum(s.sin().sum() for s in outputs_of(result[1])),
            [*inputs, *layer.parameters()],
        )
        for result, layer in zip(results, (ours, theirs), strict=True)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_equal_packed_sequences(kind, batch_first, dtype):
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, 2, batch_first=batch_first, bidirectional=True)
    lengths = torch.tensor([2, 5, 1], dtype=dtype)
    x = draw(3, 5, 4) if batch_first else draw(5, 3, 4)
    state = state_of(theirs, 3, draw)

    def by_packing(x, state):
        output, final = theirs(packed(x, lengths, batch_first), state)
        return packing.pad_packed_sequence(output, batch_first)[0], final

    by_packing.named_parameters, by_packing.parameters = theirs.named_parameters, theirs.parameters
    same_function(by_packing, ours, (x, state), lengths=lengths)


@given(
    kind=st.sampled_from(KINDS),
    num_layers=st.integers(1, 2),
    batch_first=st.booleans(),
    bidirectional=st.booleans(),
    projected=st.booleans(),
    given_state=st.booleans(),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    gap=st.integers(0, 2),
)
def test_lengths_and_packed_sequences_over_options(
    kind, num_layers, batch_first, bidirectional, projected, given_state, lengths, gap
):
    draw = Draw(torch.float64)
    options = {"proj_size": 2} if projected and kind == "LSTM" else {}
    options |= {"batch_first": batch_first, "bidirectional": bidirectional}
    theirs, ours = pair(kind, 3, 5, num_layers, **options)
    batch, time, lengths = len(lengths), max(lengths) + gap, torch.tensor(lengths)
    x = draw(batch, time, 3) if batch_first else draw(time, batch, 3)
    state = state_of(theirs, batch, draw) if given_state else None
    expected, final = theirs(packed(x, lengths, batch_first), state)
    result, ours_final = ours(packed(x, lengths, batch_first), state)
    same_packed(result, expected)
    padded = packing.pad_packed_sequence(expected, batch_first, total_length=time)[0]
    by_lengths, last = ours(x, state, lengths=lengths)
    torch.testing.assert_close(by_lengths, padded)
    for a, b, c in zip(outputs_of(ours_final), outputs_of(last), outputs_of(final), strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_a_sequence_of_length_0_and_what_lies_beyond_a_length():
    draw = Draw(torch.float64)
    layer = s2s.nn.GRU(4, 6, 2, batch_first=True, bidirectional=True, dtype=torch.float64)
    x, h0, lengths = draw(3, 5, 4), draw(4, 3, 6), torch.tensor([3, 0, 5])
    clean = layer(x, h0, lengths=lengths)
    x[0, 3:] = float("nan")
    x[1] = float("inf")
    output, h_n = layer(x.requires_grad_(), h0, lengths=lengths)
    assert torch.equal(output, clean[0]) and torch.equal(h_n, clean[1])
    assert output[1].eq(0).all() and output[0, 3:].eq(0).all() and torch.equal(h_n[:, 1], h0[:, 1])
    gradient = torch.autograd.grad(output.sum() + h_n.sum(), x)[0]
    assert gradient.isfinite().all() and gradient[1].eq(0).all() and gradient[0, 3:].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_reset_parts_a_sequence(kind, batch_first):
    draw = Draw(torch.float64)
    layer = getattr(s2s.nn, kind)(4, 6, 2, batch_first=batch_first, bidirectional=True, dtype=torch.float64)
    whole, reset = draw(3, 7, 4), torch.zeros(3, 7, dtype=torch.bool)
    reset[:, 4] = True
    if not batch_first:
        whole, reset = whole.transpose(0, 1), reset.t()
    time = 1 if batch_first else 0
    parts = [layer(part)[0] for part in (whole.narrow(time, 0, 4), whole.narrow(time, 4, 3))]
    torch.testing.assert_close(layer(whole, reset=reset)[0], torch.cat(parts, time))


def test_unbatched_lengths_and_reset():
    draw = Draw(torch.float64)
    layer = s2s.nn.LSTM(4, 6, dtype=torch.float64)
    x, reset = draw(5, 4), torch.tensor([False, False, True, False, False])
    ours = outputs_of(layer(x, lengths=torch.tensor(4), reset=reset))
    batched = outputs_of(layer(x[:, None], lengths=torch.tensor([4]), reset=reset[:, None]))
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(ours, batched, strict=True))


def test_empty_batch_and_no_time():
    """Row 10."""
    layer = s2s.nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True)
    output, (h_n, c_n) = layer(torch.zeros(0, 5, 4))
    assert output.shape == (0, 5, 12) and h_n.shape == c_n.shape == (4, 0, 6)
    h0, c0 = Draw()(4, 3, 6), Draw(seed=1)(4, 3, 6)
    output, (h_n, c_n) = layer(torch.zeros(3, 0, 4), (h0, c0))
    assert output.shape == (3, 0, 12) and torch.equal(h_n, h0) and torch.equal(c_n, c0)


@pytest.mark.parametrize("kind", KINDS)
def test_sliced_state(kind):
    """Row 38: hx no longer contiguous after a slice of the batch."""
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, 2)
    state = state_of(theirs, 5, draw)
    state = tuple(s[:, 1:4] for s in state) if kind == "LSTM" else state[:, 1:4]
    same_function(theirs, ours, (draw(5, 3, 4), state))


# Dropout and its relatives.


def test_dropout_between_layers():
    torch.manual_seed(0)
    layer = s2s.nn.GRU(4, 6, 2, dropout=1.0, dtype=torch.float64)
    x = Draw(torch.float64)(5, 3, 4)
    torch.testing.assert_close(layer(x)[1][1], s2s.gru(torch.zeros(3, 5, 6).double(), *layer.all_weights[1])[1])
    layer.dropout = 0.5
    torch.manual_seed(1)
    first = layer(x)[0]
    assert not torch.equal(first, layer(x)[0])
    torch.manual_seed(1)
    assert torch.equal(first, layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    with pytest.warns(UserWarning, match="num_layers"):
        last = s2s.nn.GRU(4, 6, dropout=1.0)
    assert last(x.float())[0].ne(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_is_one_mask_a_sequence(kind):
    draw = Draw(torch.float64)
    layer = getattr(s2s.nn, kind)(4, 6, batch_first=True, recurrent_dropout=0.5, dtype=torch.float64)
    x = draw(3, 7, 4)
    torch.manual_seed(2)
    output = layer(x)[0]
    torch.manual_seed(2)
    mask = F.dropout(torch.ones(3, 6, dtype=torch.float64), 0.5)
    function = getattr(s2s, kind.lower())
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(output, function(x, *layer.all_weights[0], recurrent_mask=mask)[0])
    layer.eval()
    torch.testing.assert_close(layer(x)[0], function(x, *layer.all_weights[0])[0])
    layer.recurrent_dropout = 1.0
    layer.train()
    w_ih, w_hh, b_ih, b_hh = layer.all_weights[0]
    torch.testing.assert_close(layer(x)[0], function(x, w_ih, torch.zeros_like(w_hh), b_ih, b_hh)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_weight_dropout_of_every_weight(kind):
    layer = getattr(s2s.nn, kind)(4, 6, weight_dropout=1.0, dtype=torch.float64)
    x, (w_ih, w_hh, b_ih, b_hh) = Draw(torch.float64)(5, 3, 4), layer.all_weights[0]
    function = getattr(s2s, kind.lower())
    without = function(x.transpose(0, 1), w_ih, torch.zeros_like(w_hh), b_ih, b_hh)[0]
    torch.testing.assert_close(layer(x)[0].transpose(0, 1), without)
    layer.eval()
    torch.testing.assert_close(layer(x)[0].transpose(0, 1), function(x.transpose(0, 1), w_ih, w_hh, b_ih, b_hh)[0])


def test_weight_dropout_draws_one_mask_a_call():
    """h_1 counts, for each unit, the weights that were kept."""
    layer = s2s.nn.RNN(1, 128, nonlinearity="relu", bias=False, batch_first=True, weight_dropout=0.25)
    with torch.no_grad():
        layer.weight_ih_l0.zero_()
        layer.weight_hh_l0.fill_(1.0)
    x, h0 = torch.zeros(4, 1, 1), torch.ones(1, 4, 128)
    torch.manual_seed(4)
    counts = layer(x, h0)[1][0] * 0.75
    assert all(torch.equal(row, counts[0]) for row in counts)
    torch.testing.assert_close(counts, counts.round())
    assert abs(counts[0].mean() - 96) < 3  # the mean of 128 counts has a standard deviation of 0.43
    assert 3.5 < counts[0].std() < 6.5  # 4.9
    torch.manual_seed(4)
    assert torch.equal(layer(x, h0)[1][0] * 0.75, counts)
    assert not torch.equal(layer(x, h0)[1][0] * 0.75, counts)
    (gradient,) = torch.autograd.grad(layer(x, h0)[1].sum(), layer.weight_hh_l0)
    values, frequency = gradient.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 4 / 0.75]))
    assert abs(frequency[0] / gradient.numel() - 0.25) < 0.02


def test_zoneout():
    draw = Draw(torch.float64)
    layer = s2s.nn.LSTM(4, 64, batch_first=True, zoneout=(0.25, 1.0), dtype=torch.float64)
    x, h0, c0 = draw(8, 1, 4), draw(1, 8, 64), draw(1, 8, 64)
    plain = s2s.lstm(x, *layer.all_weights[0], h0[0], c0[0])
    output, (h_n, c_n) = layer(x, (h0, c0))
    assert torch.equal(c_n, c0) and torch.equal(output[:, 0], h_n[0])
    kept, new = h_n[0] == h0[0], torch.isclose(h_n[0], plain[1])
    assert (kept ^ new).all() and abs(kept.double().mean() - 0.25) < 0.08
    layer.eval()
    output, (h_n, c_n) = layer(x, (h0, c0))
    torch.testing.assert_close(h_n[0], 0.25 * h0[0] + 0.75 * plain[1])
    torch.testing.assert_close(c_n, c0)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_draws_the_same_masks(kind):
    from torch.utils.checkpoint import checkpoint

    layer = getattr(s2s.nn, kind)(
        4, 6, 2, dropout=0.5, zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3, dtype=torch.float64
    )
    x = Draw(torch.float64)(5, 3, 4).requires_grad_()
    gradients = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(7)
        gradients.append(torch.autograd.grad(run(x)[0].square().sum(), [x, *layer.parameters()]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# Where weights come from, and what calls a layer.


def test_parametrised_and_pruned_weights():
    """Row 41."""
    draw = Draw(torch.float64)
    theirs, ours = pair("LSTM", 4, 6, 2)
    cell = s2s.nn.GRUCell(4, 6)
    for layer in (theirs, ours):
        nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")
        layer.parametrizations.weight_hh_l0.original0.data.mul_(2.0)
        prune.l1_unstructured(layer, "weight_ih_l1", amount=0.5)
    x = draw(5, 3, 4)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(ours, backend="aot_eager")(x)[0], theirs(x)[0])
    before = cell(x[0].float())
    nn.utils.parametrizations.weight_norm(cell, "weight_ih")
    torch.testing.assert_close(cell(x[0].float()), before)


def test_functional_call_and_replicas():
    draw = Draw(torch.float64)
    theirs, ours = pair("GRU", 4, 6, 2)
    x, doubled = draw(5, 3, 4), {name: p.detach() * 2 for name, p in ours.named_parameters()}
    expected = torch.func.functional_call(theirs, doubled, (x,))[0]
    torch.testing.assert_close(torch.func.functional_call(ours, doubled, (x,))[0], expected)
    replica = ours._replicate_for_data_parallel()
    for name, value in doubled.items():
        setattr(replica, name, value)
    torch.testing.assert_close(replica(x)[0], expected)


def test_torch_func():
    """Row 43."""
    draw = Draw(torch.float64)
    theirs, ours = pair("GRU", 4, 6)
    x, tangent = draw(5, 3, 4), draw(5, 3, 4)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x,))[0].square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    theirs(x)[0].square().sum().backward()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
    _, slope = torch.func.jvp(lambda x: loss(parameters, x), (x,), (tangent,))
    x.requires_grad_()
    torch.testing.assert_close(slope, (torch.autograd.grad(theirs(x)[0].square().sum(), x)[0] * tangent).sum().detach())


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    """Row 29."""
    layer, x = getattr(s2s.nn, kind)(4, 6, 2, bidirectional=True, recurrent_dropout=0.1), Draw()(5, 3, 4)
    exact = layer.eval()(x)[0]
    for data in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            output = layer.train()(data)[0]
            evaluated = layer.eval()(data)[0]
            assert s2s.nn.GRUCell(4, 6)(data[0]).dtype == torch.bfloat16
        assert output.dtype == evaluated.dtype == torch.bfloat16
        torch.testing.assert_close(evaluated.float(), exact, rtol=0.05, atol=0.02)
        output.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@needs_extension  # the reference's loop is unrolled, so its graph holds for one T only
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5, "zoneout": 0.1}], ids=["plain", "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_once_for_all_lengths(kind, options):
    """Row 26."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = getattr(s2s.nn, kind)(4, 6, 2, batch_first=True, bidirectional=True, **options)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    draw, graphs = Draw(), None
    for time, lengths in ((5, [5, 2, 1]), (7, [1, 0, 7]), (4, [3, 3])):
        x, reset, lengths = draw(len(lengths), time, 4), draw.mask(len(lengths), time), torch.tensor(lengths)
        torch.manual_seed(3)
        ours = compiled(x, lengths=lengths, reset=reset)
        torch.manual_seed(3)
        plain = layer(x, lengths=lengths, reset=reset)
        for a, b in zip(outputs_of(ours), outputs_of(plain), strict=True):
            torch.testing.assert_close(a, b)
        ours[0].sum().backward()
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


@pytest.mark.parametrize("kind", KINDS)
def test_exports(kind):
    draw = Draw()
    layer = getattr(s2s.nn, kind)(4, 6, 2, bidirectional=True).eval()
    x, state = draw(5, 3, 4), state_of(layer, 3, draw)
    exported = torch.export.export(layer, (x, state), {"lengths": torch.tensor([5, 2, 0])}).module()
    lengths = torch.tensor([1, 5, 3])
    for a, b in zip(
        outputs_of(exported(x, state, lengths=lengths)), outputs_of(layer(x, state, lengths=lengths)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_compiles_a_packed_sequence():
    """The batch size of a PackedSequence is data: a graph break, as in torch's layer, not an error."""
    torch._dynamo.reset()
    layer = s2s.nn.GRU(4, 6)
    sequence = packed(Draw()(5, 3, 4), torch.tensor([2, 5, 1]), False)
    output, h_n = torch.compile(layer, backend="aot_eager")(sequence)
    same_packed(output, layer(sequence)[0])
    torch.testing.assert_close(h_n, layer(sequence)[1])


def test_copies_keep_the_options():
    layer = s2s.nn.LSTM(4, 6, 2, zoneout=(0.1, 0.2), layer_norm=True).eval()
    x = Draw()(5, 3, 4)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(other) == repr(layer) and torch.equal(other(x)[0], layer(x)[0])
        assert other.weight_hh_l0 is not layer.weight_hh_l0
