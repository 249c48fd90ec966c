"""Recurrent weights of heads: the matrix they stand for, what reads them as they are, and what is given the matrix."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from recurring import BACKENDS, both_backends, every_cell, needs_extension, sample

from s2s_kernels import dispatch, explain, gru, lstm, use_backend
from s2s_kernels.ops.recurrence import reference
from s2s_kernels.ops.recurrence.reference import GATES, block_diagonal, diagonal_blocks
from s2s_kernels.testing import compare, evaluate, leaves_of, noise_like, prepare


def as_matrix(cell, arguments):
    """The same call with the matrix that its heads stand for."""
    (x, weight_ih, weight_hh, *biases), kwargs = arguments
    return (x, weight_ih, block_diagonal(weight_hh, GATES[cell]), *biases), kwargs


@every_cell
def test_the_matrix_of_heads(cell):
    heads, units, width, gates = 3, 2, 4, GATES[cell]
    weight = torch.randn(heads, gates * units, width)
    matrix = block_diagonal(weight, gates)
    assert matrix.shape == reference.whole_shape(weight) == (gates * heads * units, heads * width)
    for row in range(matrix.shape[0]):
        g, k, i = row // (heads * units), row // units % heads, row % units
        for column in range(matrix.shape[1]):
            inside = column // width == k
            assert matrix[row, column] == (weight[k, g * units + i, column % width] if inside else 0)
    assert torch.equal(diagonal_blocks(matrix, heads, gates), weight)


@every_cell
@both_backends
@pytest.mark.parametrize(
    "options",
    [{}, {"lengths": (3, 0, 5, 1), "reset": 0.3, "reverse": True}, {"recurrent_mask": True, "zoneout": 0.3},
     {"layer_norm": True, "hidden": 16, "scale": 2.0}, {"zoneout": 0.5, "training": True, "lengths": (5, 2, 0, 4)}],
    ids=["plain", "lengths", "mask", "norm", "random"],
)  # fmt: skip
def test_heads_are_the_block_diagonal_matrix(cell, backend, options):
    """Values and gradients, of the blocks those of the matrix's; drawn alike."""
    sizes = {"hidden": 8, "heads": 4, "state": True, "dtype": torch.float64}
    function, arguments = sample(cell, 4, 5, 3, **{**sizes, **options})
    with use_backend(backend):
        found = dict(evaluate(function, prepare(arguments), noise_like))
        expected = dict(evaluate(function, prepare(as_matrix(cell, arguments)), noise_like))
    for (name, value), want in zip(found.items(), expected.values(), strict=True):
        if value.dim() == 3 and value.shape != want.shape:
            want = diagonal_blocks(want, 4, GATES[cell])
        torch.testing.assert_close(value, want, msg=lambda text, name=name: f"{name}: {text}")


@both_backends
def test_heads_are_recurrences_of_their_own(backend):
    """Of one input, side by side."""
    _, ((x, weight_ih, weight_hh, bias_ih, bias_hh), kwargs) = sample(
        "gru", 3, 6, 5, 9, heads=3, state=True, lengths=(6, 2, 5)
    )
    with use_backend(backend):
        output, h_n = gru(x, weight_ih, weight_hh, bias_ih, bias_hh, **kwargs)
        for head in range(3):
            mine = slice(3 * head, 3 * head + 3)
            rows = torch.arange(27).view(3, 9)[:, mine].flatten()
            options = {**kwargs, "h0": kwargs["h0"][:, mine]}
            alone, last = gru(x, weight_ih[rows], weight_hh[head], bias_ih[rows], bias_hh[rows], **options)
            torch.testing.assert_close(output[..., mine], alone)
            torch.testing.assert_close(h_n[:, mine], last)


@both_backends
def test_a_projection_crosses_heads(backend):
    """Each head sees its part of the projected state."""
    arguments = sample("lstm", 2, 4, 3, 8, heads=2, projected=6, state=True, dtype=torch.float64)[1]
    with use_backend(backend):
        for found, want in zip(
            lstm(*arguments[0], **arguments[1]), lstm(*as_matrix("lstm", arguments)[0], **arguments[1]), strict=True
        ):
            torch.testing.assert_close(found, want)
    (args, kwargs), wrong = arguments, torch.randn(2, 16, 2)
    with pytest.raises(ValueError, match=r"lstm: weight_hh must be .*heads"):
        lstm(args[0], args[1], wrong.double(), **kwargs)


@both_backends
def test_weight_dropout_is_the_matrixs(backend):
    function, arguments = sample("lstm", 2, 4, 3, 8, heads=2, dtype=torch.float64)
    with use_backend(backend):
        results = []
        for given in (arguments, as_matrix("lstm", arguments)):
            torch.manual_seed(5)
            results.append(function(*given[0], **given[1], weight_dropout=0.5)[0])
    torch.testing.assert_close(*results)


@needs_extension
def test_the_matrix_is_made_only_where_heads_meet(monkeypatch):
    made, original = [], reference.block_diagonal
    monkeypatch.setattr(reference, "block_diagonal", lambda *args: made.append(args) or original(*args))

    def ran(cell, **options):
        function, arguments = sample(cell, 3, 4, 5, 8, heads=4, state=True, **options)
        made.clear()
        with use_backend("cpu"):
            list(evaluate(function, prepare(arguments), noise_like))
        return bool(made)

    lengths = {"lengths": (4, 0, 2), "reset": 0.3}
    assert (
        not ran("lstm", **lengths)
        and not ran("gru", recurrent_mask=True, reverse=True)
        and not ran("rnn_tanh", zoneout=0.3)
    )
    assert not ran("lstm", dtype=torch.bfloat16)
    assert ran("lstm", layer_norm=True) and ran("lstm", projected=4) and ran("gru", zoneout=0.3, training=True)


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_heads_round_the_gradient_of_x_once(dtype):
    function, arguments = sample("lstm", 3, 5, 40, 64, heads=32, dtype=dtype)
    worst = compare(function, arguments, "cpu")
    assert all(by <= 0 for by in worst.values()), worst
    prepared = prepare(arguments)
    x = leaves_of(prepared)[0]
    with use_backend("cpu"):
        output = function(*prepared[0], **prepared[1])[0]
        (found,) = torch.autograd.grad(output, x, noise_like(output, 0))
    wide = prepare(arguments, torch.float64)
    output = function(*wide[0], **wide[1])[0]
    (exact,) = torch.autograd.grad(output, leaves_of(wide)[0], noise_like(output, 0).to(dtype).double())
    assert (found.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@needs_extension
def test_the_operators_pass_opcheck_and_check_again():
    _, (args, kwargs) = sample("lstm", 3, 4, 3, 6, heads=2, state=True, lengths=(4, 2, 1), dtype=torch.float16)
    x, weight_ih, weight_hh, bias_ih, bias_hh = args
    states, rest = (kwargs["h0"], kwargs["c0"]), (None,) * 6
    options = (0, False, 0.0, 0.0, False, 0.0)

    def forward(x, weight_hh, rest=rest, options=options, packed=False, seed=None):
        return (
            x, weight_ih, weight_hh, bias_ih, bias_hh, *states, *rest, kwargs["lengths"], None, seed, *options, packed,
            False, 2,
        )  # fmt: skip

    operator = torch.ops.s2s.recurrence_forward
    data = x.reshape(-1, 3)[:7]
    torch.library.opcheck(operator.default, forward(x, weight_hh))
    torch.library.opcheck(operator.default, forward(data, weight_hh, packed=True))
    output, h_n, c_n, gates, extra, hidden = operator(*forward(x, weight_hh))
    assert gates.shape == (2, 3, 4, 12) and hidden.shape == (2, 3, 4, 3)

    def backward(gates=gates, hidden=hidden, grad=output, needs=0b1111111):
        return (
            grad, h_n, c_n, x, weight_ih, weight_hh, *states, *rest, kwargs["lengths"], None, None, gates, extra,
            hidden, None, *options, False, False, needs,
        )  # fmt: skip

    torch.library.opcheck(torch.ops.s2s.recurrence_backward.default, backward())
    mask, norm = torch.ones(3, 6, dtype=x.dtype), torch.ones(24, dtype=x.dtype)
    unit = torch.ones(6, dtype=x.dtype)
    for wrong in (
        forward(x, weight_hh[:, :, :2]), forward(x, weight_hh[:0]), forward(x, weight_hh.float()),
        forward(x, weight_hh, rest=(torch.ones(6, 6, dtype=x.dtype), None, None, None, None, None)),
        forward(x, weight_hh, rest=(None, mask[:2], None, None, None, None)),
        forward(x, weight_hh, rest=(None, None, norm, norm, unit, unit)),
        forward(x, weight_hh, options=(0, False, 0.5, 0.0, True, 0.0), seed=torch.zeros(2, dtype=torch.int64)),
        forward(x, weight_hh, options=(0, False, 0.0, 0.0, False, 0.5), seed=torch.zeros(2, dtype=torch.int64)),
        forward(x, weight_hh, options=(9, False, 0.0, 0.0, False, 0.0)), forward(data, weight_hh),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="recurrence: "):
            operator(*wrong)
    for wrong in (
        backward(gates=gates[:1]), backward(gates=gates.transpose(0, 1)), backward(hidden=output.float()),
        backward(grad=output[..., :3]), backward(needs=1 << 7), backward(needs=1 << 8), backward(hidden=None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="recurrence_backward: "):
            torch.ops.s2s.recurrence_backward(*wrong)


def test_explains():
    _, (args, _) = sample("lstm", 3, 4, 3, 6, heads=2)
    explanation = explain(lstm, *args)
    if dispatch._asked.get()[0] is None:
        assert explanation.backend == BACKENDS[-1] and explanation.reasons["torch"] == "torch's layers have no heads"


@pytest.mark.parametrize("backend", [None, "reference"])
def test_compiles_once_for_all_lengths(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(gru, fullgraph=True, dynamic=True, backend=counter)
    times = (5, 7, 9) if backend is None and "cpu" in BACKENDS else (5,)  # no other size, as a symbol stands for each
    with use_backend(backend or BACKENDS[-1]):
        for time in times:
            _, (args, kwargs) = sample("gru", 2, time, 3, 8, heads=4, lengths=(time, 2))
            for found, want in zip(compiled(*args, **kwargs), gru(*args, **kwargs), strict=True):
                torch.testing.assert_close(found, want)
    assert counter.frame_count == 1


@every_cell
@given(data=st.data())
def test_any_call(cell, data):
    draw = data.draw
    batch, time, heads = draw(st.integers(0, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 4))
    options = {name: draw(st.booleans()) for name in ("bias", "reverse", "recurrent_mask", "training")}
    options["state"] = True
    options["zoneout"] = draw(st.sampled_from([0.0, 0.0, 0.2]))
    if draw(st.booleans()):
        options["lengths"] = draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
        options["poison"] = draw(st.booleans())
    if draw(st.booleans()):
        options["reset"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if cell == "lstm" and draw(st.booleans()):
        options["projected"] = heads * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    hidden = heads * draw(st.integers(1, 18))
    function, arguments = sample(
        cell, batch, time, draw(st.integers(1, 20)), hidden, heads=heads, dtype=dtype, **options
    )
    worst = compare(function, arguments, BACKENDS[-1])
    assert all(by <= 0 for by in worst.values()), worst


def test_exports():
    class Wrapper(torch.nn.Module):
        def forward(self, args, kwargs):
            return gru(*args, **kwargs)

    _, (args, kwargs) = sample("gru", 2, 5, 3, 8, heads=4, lengths=(5, 2))
    exported = torch.export.export(Wrapper(), (args, kwargs)).module()
    for found, want in zip(exported(args, kwargs), gru(*args, **kwargs), strict=True):
        torch.testing.assert_close(found, want)
