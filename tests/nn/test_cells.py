"""LSTMCell, GRUCell and RNNCell: torch's numbers, parameters and interface, one step of their layers."""

import pytest
import torch
from torch import nn

import s2s_kernels as s2s
from s2s_kernels.testing import Draw, outputs_of
from s2s_kernels.testing.twins import pair, same_function

CELLS = ("LSTMCell", "GRUCell", "RNNCell")


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cell_parameters_are_torchs(kind, bias):
    torch.manual_seed(5)
    theirs = getattr(nn, kind)(4, 6, bias)
    torch.manual_seed(5)
    ours = getattr(s2s.nn, kind)(4, 6, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert repr(ours) == repr(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batched", "unbatched"])
@pytest.mark.parametrize("given_state", [True, False])
def test_cells_equal_torch(kind, bias, batch, given_state):
    draw = Draw(torch.float64)
    theirs, ours = pair(kind, 4, 6, bias=bias)
    h, c = draw(*batch, 6), draw(*batch, 6)
    state = (h, c) if kind == "LSTMCell" else h
    if kind == "RNNCell":
        theirs.nonlinearity = ours.nonlinearity = "relu"
    same_function(theirs, ours, (draw(*batch, 4), state) if given_state else (draw(*batch, 4),))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch", [1, 3, 4, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decoding_without_a_gradient(kind, batch, dtype):
    """Steps that ask for nothing but themselves: of its layer's values, and the same bits whenever they are made."""
    draw = Draw(dtype)
    cell = getattr(s2s.nn, kind)(19, 37, dtype=dtype)
    layer = getattr(s2s.nn, kind.removesuffix("Cell"))(19, 37, dtype=dtype)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()}, strict=True)
    x = draw(6, batch, 19)
    runs = []
    with torch.no_grad():
        for _ in range(2):
            state, steps = None, []
            for step in x:
                state = cell(step, state)
                steps.append(outputs_of(state)[0])
            runs.append([*steps, *outputs_of(state)])
            cell(x[0])  # an odd number of steps between the two
        output, final = layer(x)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    if dtype != torch.bfloat16:  # whose layer carries a wider state from step to step
        torch.testing.assert_close(torch.stack(runs[0][:6]), output)
        for a, b in zip(runs[0][6:], outputs_of(final), strict=True):
            torch.testing.assert_close(a, b[0])
    recorded = outputs_of(cell(x[0], state))
    with torch.no_grad():
        for a, b in zip(outputs_of(cell(x[0], state)), recorded, strict=True):
            torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_step_of_its_layer(kind):
    draw = Draw(torch.float64)
    options = {"layer_norm": True, "zoneout": 0.25, "dtype": torch.float64}
    cell, layer = getattr(s2s.nn, kind)(4, 6, **options), getattr(s2s.nn, kind.removesuffix("Cell"))(4, 6, **options)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()}, strict=True)
    x, state = draw(4, 3, 4), None
    for module in (cell, layer):
        module.eval()
        for name, parameter in module.named_parameters():
            if name.startswith("ln_"):
                nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name) % 7))
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()}, strict=True)
    for t in range(4):
        state = cell(x[t], state)
    _, final = layer(x)
    for a, b in zip(outputs_of(state), outputs_of(final), strict=True):
        torch.testing.assert_close(a, b[0])
    cell.train()
    torch.manual_seed(3)
    first = outputs_of(cell(x[0]))
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, outputs_of(cell(x[0])), strict=True))


ZEROS = torch.zeros


def replaced(cell, name, value):
    setattr(cell, name, nn.Parameter(value.detach()))
    return cell


CELL_ERRORS = {
    "3-D input": (lambda m, s: m(ZEROS(1, 2, 4)), ValueError, "input to be 1D or 2D"),
    "wrong width": (lambda m, s: m(ZEROS(3, 5)), ValueError, "input.*Expected 4, got 5"),
    "wrong dtype": (lambda m, s: m(ZEROS(3, 4).half()), ValueError, "input dtype"),
    "no tensor": (lambda m, s: m(None), TypeError, "input"),
    "state of another batch": (lambda m, s: m(ZEROS(3, 4), s(2, 6)), ValueError, "hx"),
    "state of another width": (lambda m, s: m(ZEROS(3, 4), s(3, 5)), ValueError, "hx"),
    "state without a batch": (lambda m, s: m(ZEROS(3, 4), s(6)), ValueError, "hx"),
    "state with a batch": (lambda m, s: m(ZEROS(4), s(1, 6)), ValueError, "hx"),
    "state of another dtype": (lambda m, s: m(ZEROS(3, 4), s(3, 6, dtype=torch.float64)), TypeError, "hx"),
    "state elsewhere": (lambda m, s: m(ZEROS(3, 4), s(3, 6, device="meta")), ValueError, "hx"),
    "weight of another shape": (
        lambda m, s: replaced(m, "weight_hh", ZEROS(7, 6))(ZEROS(3, 4)),
        ValueError,
        "weight_hh",
    ),
    "weight of another dtype": (
        lambda m, s: replaced(m, "weight_hh", m.weight_hh.double())(ZEROS(3, 4)),
        TypeError,
        "weight_hh",
    ),
}


@pytest.mark.parametrize("name", CELL_ERRORS)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("records", [True, False])
def test_cell_errors_name_the_argument(kind, name, records):
    """Of a step without a gradient too, which has a call of its own."""
    call, error, message = CELL_ERRORS[name]

    def state(*shape, **options):
        h = ZEROS(*shape, **options)
        return (h, h) if kind == "LSTMCell" else h

    with torch.set_grad_enabled(records), pytest.raises(error, match=message):
        call(getattr(s2s.nn, kind)(4, 6), state)
