"""What LSTM, GRU, RNN and their cells refuse, and how they say so."""

import pytest
import torch
from torch.nn.utils import rnn as packing

import s2s_kernels as s2s


def packed(x, lengths):
    return packing.pack_padded_sequence(x, lengths, enforce_sorted=False)


ZEROS = torch.zeros
LSTM_ERRORS = {
    "4-D input": (lambda m: m(ZEROS(1, 2, 3, 4)), ValueError, "Expected input to be 2D or 3D, got 4D"),
    "no tensor": (lambda m: m([1.0]), TypeError, "input"),
    "wrong width": (lambda m: m(ZEROS(5, 3, 7)), ValueError, r"input.*Expected 4, got 7"),
    "wrong dtype": (lambda m: m(ZEROS(5, 3, 4).double()), ValueError, "input dtype.*float64.*weight dtype.*float32"),
    "integers": (lambda m: m(ZEROS(5, 3, 4).long()), ValueError, "input"),
    "no pair": (lambda m: m(ZEROS(5, 3, 4), ZEROS(1, 3, 6)), TypeError, "hx"),
    "three states": (lambda m: m(ZEROS(5, 3, 4), (ZEROS(1, 3, 6),) * 3), TypeError, "hx"),
    "no state": (lambda m: m(ZEROS(5, 3, 4), (None, None)), TypeError, r"hx\[0\]"),
    "h of another batch": (
        lambda m: m(ZEROS(5, 3, 4), (ZEROS(1, 2, 6), ZEROS(1, 3, 6))),
        ValueError,
        r"hx\[0\].*Expected hidden size \(1, 3, 6\), got \[1, 2, 6\]",
    ),
    "c of another width": (lambda m: m(ZEROS(5, 3, 4), (ZEROS(1, 3, 6), ZEROS(1, 3, 5))), ValueError, r"hx\[1\]"),
    "2-D state": (lambda m: m(ZEROS(5, 3, 4), (ZEROS(3, 6), ZEROS(3, 6))), ValueError, r"hx\[0\] should also be 3-D"),
    "3-D state of unbatched": (
        lambda m: m(ZEROS(5, 4), (ZEROS(1, 1, 6), ZEROS(1, 1, 6))),
        ValueError,
        r"unbatched 2-D input, hx\[0\] should also be 2-D",
    ),
    "state of another dtype": (
        lambda m: m(ZEROS(5, 3, 4), (ZEROS(1, 3, 6), ZEROS(1, 3, 6).double())),
        TypeError,
        r"hx\[1\]",
    ),
    "state elsewhere": (
        lambda m: m(ZEROS(5, 3, 4), (ZEROS(1, 3, 6), ZEROS(1, 3, 6, device="meta"))),
        ValueError,
        r"hx\[1\]",
    ),
    "lengths too long": (lambda m: m(ZEROS(5, 3, 4), lengths=torch.tensor([6, 1, 1])), ValueError, "lengths"),
    "lengths of another batch": (lambda m: m(ZEROS(5, 3, 4), lengths=torch.tensor([5, 1])), ValueError, "lengths"),
    "float lengths": (lambda m: m(ZEROS(5, 3, 4), lengths=ZEROS(3)), TypeError, "lengths"),
    "lengths without a batch": (lambda m: m(ZEROS(5, 4), lengths=torch.tensor([5])), ValueError, "lengths"),
    "reset of the other layout": (
        lambda m: m(ZEROS(5, 3, 4), reset=ZEROS(3, 5, dtype=torch.bool)),
        ValueError,
        r"reset must be \(5, 3\)",
    ),
    "float reset": (lambda m: m(ZEROS(5, 3, 4), reset=ZEROS(5, 3)), TypeError, "reset"),
    "lengths beside a PackedSequence": (
        lambda m: m(packed(ZEROS(5, 3, 4), [5, 2, 1]), lengths=torch.tensor([5, 2, 1])),
        ValueError,
        "lengths must be absent beside a PackedSequence",
    ),
    "reset beside a PackedSequence": (
        lambda m: m(packed(ZEROS(5, 3, 4), [5, 2, 1]), reset=ZEROS(5, 3, dtype=torch.bool)),
        ValueError,
        "reset",
    ),
    "packed of another width": (
        lambda m: m(packed(ZEROS(5, 3, 7), [5, 2, 1])),
        ValueError,
        r"input\.data.*Expected 4, got 7",
    ),
    "packed of another dtype": (
        lambda m: m(packed(ZEROS(5, 3, 4).double(), [5, 2, 1])),
        ValueError,
        r"input\.data dtype",
    ),
    "packed 3-D data": (
        lambda m: m(packing.PackedSequence(ZEROS(8, 4, 1), torch.tensor([3, 2, 1, 1, 1]))),
        ValueError,
        r"input\.data must have 2 dimensions",
    ),
    "packed with too little data": (
        lambda m: m(packing.PackedSequence(ZEROS(7, 4), torch.tensor([3, 2, 1, 1, 1]))),
        ValueError,
        r"input\.data.*8.*7",
    ),
    "packed with increasing sizes": (
        lambda m: m(packing.PackedSequence(ZEROS(8, 4), torch.tensor([1, 3, 2, 1, 1]))),
        ValueError,
        r"input\.batch_sizes",
    ),
    "packed with a state of another batch": (
        lambda m: m(packed(ZEROS(5, 3, 4), [5, 2, 1]), (ZEROS(1, 2, 6), ZEROS(1, 2, 6))),
        ValueError,
        r"hx\[0\]",
    ),
}


@pytest.mark.parametrize("name", LSTM_ERRORS)
def test_errors_name_the_argument(name):
    call, error, message = LSTM_ERRORS[name]
    with pytest.raises(error, match=message):
        call(s2s.nn.LSTM(4, 6))


CONSTRUCTION_ERRORS = {
    "hidden_size 0": (lambda: s2s.nn.LSTM(4, 0), ValueError, "hidden_size"),
    "float input_size": (lambda: s2s.nn.LSTM(4.0, 6), TypeError, "input_size"),
    "dropout 2": (lambda: s2s.nn.GRU(4, 6, 2, dropout=2), ValueError, "dropout"),
    "projection too wide": (lambda: s2s.nn.LSTM(4, 6, proj_size=6), ValueError, "proj_size"),
    "projection of a GRU": (lambda: s2s.nn.GRU(4, 6, proj_size=3), ValueError, "proj_size"),
    "projection of an RNN": (lambda: s2s.nn.RNN(4, 6, proj_size=3), ValueError, "proj_size"),
    "unknown argument": (lambda: s2s.nn.RNN(4, 6, gates=3), TypeError, "gates"),
    "nonlinearity": (lambda: s2s.nn.RNN(4, 6, nonlinearity="sin"), ValueError, "nonlinearity"),
    "nonlinearity of a cell": (lambda: s2s.nn.RNNCell(4, 6, nonlinearity="sin"), ValueError, "nonlinearity"),
    "zoneout 2": (lambda: s2s.nn.LSTM(4, 6, zoneout=2.0), ValueError, "zoneout"),
    "zoneout of three": (lambda: s2s.nn.LSTM(4, 6, zoneout=(0.1, 0.1, 0.1)), ValueError, "zoneout"),
    "pair of zoneout for a GRU": (lambda: s2s.nn.GRU(4, 6, zoneout=(0.1, 0.1)), ValueError, "zoneout"),
    "zoneout of a cell": (lambda: s2s.nn.GRUCell(4, 6, zoneout=-0.1), ValueError, "zoneout"),
    "recurrent_dropout": (lambda: s2s.nn.LSTM(4, 6, recurrent_dropout=-1), ValueError, "recurrent_dropout"),
    "weight_dropout": (lambda: s2s.nn.LSTM(4, 6, weight_dropout=1.5), ValueError, "weight_dropout"),
    "positional option": (lambda: s2s.nn.LSTM(4, 6, 1, True, True, 0.0, False, 0, None, None, True), TypeError, ""),
}


@pytest.mark.parametrize("name", CONSTRUCTION_ERRORS)
def test_construction_errors_name_the_argument(name):
    build, error, message = CONSTRUCTION_ERRORS[name]
    with pytest.raises(error, match=message):
        build()
