"""lstm, gru and rnn: literal values, torch's own layers, what lengths, reset and the regularisers mean, drawn calls."""

import functools

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from recurring import BACKENDS, CELLS, both_backends, broken, every_cell, sample
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from s2s_kernels import dispatch, gru, lstm, rnn, use_backend
from s2s_kernels.ops.recurrence import run
from s2s_kernels.ops.recurrence.reference import GATES
from s2s_kernels.testing import Draw, call, leaves_of, noise_like, prepare
from s2s_kernels.testing.recurrence import CASES


def column(*values):
    """One row, one unit: (1, T, 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1)


def running_sum(*values, **options):
    """A relu RNN whose weights are 1 adds up what it sees."""
    one = torch.ones(1, 1, dtype=torch.float64)
    output, h_n = rnn(column(*values), one, one, nonlinearity="relu", **options)
    return output.flatten().tolist(), h_n.item()


# Literal values


@both_backends
def test_running_sum(backend):
    with use_backend(backend):
        assert running_sum(1, 2, 3) == ([1, 3, 6], 6)
        assert running_sum(1, 2, 3, reverse=True) == ([6, 5, 3], 6)
        assert running_sum(1, 2, 3, h0=torch.full((1, 1), 10.0, dtype=torch.float64)) == ([11, 13, 16], 16)
        assert running_sum(1, -5, 3) == ([1, 0, 3], 3)


@both_backends
def test_lengths(backend):
    with use_backend(backend):
        assert running_sum(1, 2, float("nan"), lengths=torch.tensor([2])) == ([1, 3, 0], 3)
        assert running_sum(1, 2, float("nan"), lengths=torch.tensor([2]), reverse=True) == ([3, 2, 0], 3)
        start = torch.full((1, 1), 7.0, dtype=torch.float64)
        assert running_sum(1, 2, lengths=torch.tensor([0]), h0=start) == ([0, 0], 7)
        assert running_sum(1, 2, lengths=torch.tensor([0])) == ([0, 0], 0)


@both_backends
def test_reset_parts_the_neighbours_in_either_direction(backend):
    start = torch.full((1, 1), 10.0, dtype=torch.float64)

    def flags(*values):
        return torch.tensor([values], dtype=torch.bool)

    with use_backend(backend):
        assert running_sum(1, 2, 3, 4, reset=flags(0, 0, 1, 0), h0=start) == ([11, 13, 3, 7], 7)
        assert running_sum(1, 2, 3, 4, reset=flags(1, 0, 0, 0), h0=start) == ([1, 3, 6, 10], 10)
        assert running_sum(1, 2, 3, 4, reset=flags(0, 0, 1, 0), h0=start, reverse=True) == ([3, 2, 17, 14], 3)
        # In reverse nothing comes after position 0, and h_n is taken before its flag acts.
        assert running_sum(1, 2, reset=flags(1, 0), reverse=True) == ([3, 2], 3)
        # A flag where there is nothing says nothing: h0 reaches the last present position.
        short = torch.tensor([2])
        assert running_sum(1, 2, 3, reset=flags(0, 0, 1), h0=start, reverse=True, lengths=short) == ([13, 12, 0], 13)
        assert running_sum(1, 2, 3, reset=flags(0, 0, 1), h0=start, lengths=short) == ([11, 13, 0], 13)


@both_backends
def test_gates_that_see_nothing(backend):
    """Without weights every sigmoid is a half and every tanh 0."""
    x, zero = torch.randn(1, 3, 2), torch.zeros
    with use_backend(backend):
        output, h_n = gru(x, zero(3, 2), zero(3, 1), h0=torch.ones(1, 1))
        assert output.flatten().tolist() == [0.5, 0.25, 0.125] and h_n.item() == 0.125
        output, h_n, c_n = lstm(x, zero(4, 2), zero(4, 1), c0=torch.ones(1, 1))
        assert c_n.item() == 0.125
        torch.testing.assert_close(output.flatten(), 0.5 * torch.tensor([0.5, 0.25, 0.125]).tanh())
        assert torch.equal(h_n, output[:, -1])


@both_backends
def test_zoneout_in_evaluation_is_the_expectation(backend):
    with use_backend(backend):
        assert running_sum(1, 2, zoneout=0.5) == ([0.5, 1.5], 1.5)
        assert running_sum(1, 2, zoneout=1.0) == ([0, 0], 0)


# Against torch's own layers


@every_cell
@pytest.mark.parametrize("projected", [0, 2])
def test_equals_torch(cell, projected):
    if projected and cell != "lstm":
        return
    kind, _, nonlinearity = cell.partition("_")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {"proj_size": projected} if projected else {}
    theirs = getattr(torch.nn, kind.upper())(3, 5, batch_first=True, dtype=torch.float64, bidirectional=True, **options)
    x = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 6, 1, 3])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    states = [torch.randn(2, 4, projected or 5, dtype=torch.float64, requires_grad=True)]
    if cell == "lstm":
        states.append(torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True))
    wanted, last = theirs(packed, tuple(states) if cell == "lstm" else states[0])
    wanted = pad_packed_sequence(wanted, batch_first=True)[0]
    last = last if cell == "lstm" else (last,)
    outputs, finals = [], []
    for direction, suffix in enumerate(("", "_reverse")):
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
        parameters = [getattr(theirs, f"{name}_l0{suffix}") for name in names]
        extra = {"weight_hr": getattr(theirs, f"weight_hr_l0{suffix}")} if projected else {}
        output, *final = run(
            cell, x, *parameters, *(s[direction] for s in states), lengths=lengths, reverse=direction == 1, **extra
        )
        outputs.append(output)
        finals.append([f for f in final if f is not None])
    ours = [torch.cat(outputs, dim=2), *(torch.stack(pair) for pair in zip(*finals, strict=True))]
    leaves = [x, *states, *theirs.parameters()]
    for a, b in zip(ours, [wanted, *last], strict=True):
        torch.testing.assert_close(a, b)
    grads = [
        torch.autograd.grad([*values], leaves, [noise_like(v, i) for i, v in enumerate(values)])
        for values in (ours, (wanted, *last))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_norm_equals_a_loop_of_cells():
    x, w_ih, w_hh, bias = torch.randn(2, 5, 3), torch.randn(16, 3), torch.randn(16, 4), torch.randn(16)
    norms = tuple(torch.randn(n) for n in (16, 16, 4, 4))
    h = c = torch.zeros(2, 4)
    for t in range(5):
        gates = F.layer_norm(x[:, t] @ w_ih.t(), (16,), norms[0]) + F.layer_norm(h @ w_hh.t(), (16,), norms[1]) + bias
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * F.layer_norm(c, (4,), norms[2], norms[3]).tanh()
    output, h_n, c_n = lstm(x, w_ih, w_hh, bias, layer_norm=norms)
    torch.testing.assert_close(h_n, h)
    torch.testing.assert_close(c_n, c)
    torch.testing.assert_close(output[:, -1], h)


# Layer normalisation: its samples are not among the smooth ones


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_layer_norm_first_and_second_order(cell):
    function, arguments = sample(cell, 2, 2, 2, 3, dtype=torch.float64, layer_norm=True, state=True)
    prepared = prepare(arguments)
    leaves = leaves_of(prepared)
    count = len(prepared[0])

    def of(*tensors):
        states = {"h0": tensors[count]} | ({"c0": tensors[count + 1]} if cell == "lstm" else {})
        norms = tensors[count + len(states) :]
        return tuple(o for o in function(*tensors[:count], **states, layer_norm=norms) if o is not None)

    assert torch.autograd.gradcheck(of, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(of, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_layer_norm_of_any_strides_and_subsets(cell):
    function, (args, kwargs) = sample(cell, 3, 4, 5, 9, layer_norm=True, lengths=(2, 4, 0), reset=0.3)

    def sliced(value):
        outer = value.new_full((*value.shape[:-1], 2 * value.shape[-1] + 1), float("nan"))
        outer[..., 1::2] = value
        return outer[..., 1::2]

    strided = call(*map(sliced, args), **{**kwargs, "layer_norm": tuple(map(sliced, kwargs["layer_norm"]))})
    assert not broken(function, strided)
    for chosen in range(len(leaves_of(prepare(strided)))):
        assert not broken(function, strided, wanted=lambda index, chosen=chosen: index == chosen)


# Regularisers


@every_cell
@both_backends
def test_zoneout_of_everything_or_nothing(cell, backend):
    """Row 23."""
    function, (args, kwargs) = sample(cell, 3, 4, state=True)
    with use_backend(backend):
        plain = function(*args, **kwargs)
        for a, b in zip(function(*args, **kwargs, zoneout=0.0, training=True), plain, strict=True):
            assert a is b is None or torch.equal(a, b)
        output, h_n, c_n = function(*args, **kwargs, zoneout=1.0, training=True)
        assert torch.equal(h_n, kwargs["h0"]) and torch.equal(output, h_n[:, None].expand_as(output))
        assert c_n is None or torch.equal(c_n, kwargs["c0"])


@every_cell
def test_zoneout_keeps_units_at_its_rate(cell):
    function, (args, kwargs) = sample(cell, 4, 50, 3, 40, state=True)
    output = function(*args, **kwargs, zoneout=0.3, training=True)[0]
    kept = (output == torch.cat([kwargs["h0"][:, None], output[:, :-1]], dim=1)).float().mean()
    # A relu that stays at 0 looks kept.
    assert kept > 0.28 and (cell == "rnn_relu" or kept < 0.32)


@every_cell
def test_seeds_reproduce(cell):
    function, arguments = sample(cell, 3, 4, 3, 33)
    options = {"zoneout": 0.4, "training": True, "weight_dropout": 0.3}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        prepared = prepare(arguments)
        output = function(*prepared[0], **prepared[1], **options)[0]
        runs.append([output, *torch.autograd.grad(output.sum(), leaves_of(prepared))])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][0], runs[2][0])


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_weight_dropout(cell, dtype, p):
    function, arguments = sample(cell, 2, 3, 3, 35, dtype=dtype, state=True)
    assert not broken(functools.partial(function, weight_dropout=p), arguments)


@every_cell
@both_backends
def test_weight_dropout_of_everything_is_no_recurrence(cell, backend):
    function, (args, kwargs) = sample(cell, 2, 3)
    x, weight_ih, weight_hh, *biases = args
    with use_backend(backend):
        dropped = function(*args, **kwargs, weight_dropout=1.0)
        without = function(x, weight_ih, torch.zeros_like(weight_hh), *biases, **kwargs)
    for a, b in zip(dropped, without, strict=True):
        assert a is b is None or torch.equal(a, b)


@both_backends
def test_weight_dropout_drops_at_its_rate_and_keeps_the_sum(backend):
    """A relu RNN of one step from h0 = 1 shows the sums of the rows of its recurrent weights."""
    one = torch.ones(1, 256)
    with use_backend(backend):
        h_n = run("rnn_relu", one[:, None, :1], torch.zeros(256, 1), torch.ones(256, 256), h0=one, weight_dropout=0.25)[
            1
        ]
    assert (h_n * 0.75).sub(192).abs().max() < 40
    assert abs(float(h_n.mean()) - 256) < 2
    torch.testing.assert_close(h_n * 0.75, (h_n * 0.75).round(), rtol=1e-5, atol=0)


def test_recurrent_mask_only_touches_the_product():
    function, (args, kwargs) = sample("gru", 3, 5, state=True)
    mask = torch.tensor([0.0, 2.0]).expand(3, 2)
    weight_hh = args[2] * mask[0]
    masked = function(*args, **kwargs, recurrent_mask=mask)
    for a, b in zip(masked[:2], function(*args[:2], weight_hh, *args[3:], **kwargs)[:2], strict=True):
        torch.testing.assert_close(a, b)


# Edge cases by number


@every_cell
def test_long_sequences(cell):
    """Row 9: the whole equals two halves that pass on their state, in value and gradient."""
    time = 70_000
    function, (args, _) = sample(cell, 1, time, 2, 3, dtype=torch.float64, scale=0.5)
    args = prepare((args, {}))[0]
    whole = function(*args)
    half = time // 2 + 1
    first, *state = function(args[0][:, :half], *args[1:])
    second, *state = function(args[0][:, half:], *args[1:], *(s for s in state if s is not None))
    assert torch.equal(torch.cat([first, second], dim=1), whole[0])
    for a, b in zip(state, whole[1:], strict=True):
        assert a is b is None or torch.equal(a, b)
    upstream = torch.randn_like(first)
    pieces = torch.autograd.grad([first, second], args, [upstream, upstream[:, : time - half]])
    both = torch.cat([upstream, upstream[:, : time - half]], dim=1)
    for a, b in zip(pieces, torch.autograd.grad(whole[0], args, both), strict=True):
        torch.testing.assert_close(a, b)


@both_backends
@every_cell
def test_nothing_to_do(cell, backend):
    """Row 10."""
    with use_backend(backend):
        for sizes in ((0, 4), (2, 0), (0, 0)):
            function, arguments = sample(cell, *sizes, state=True)
            args, kwargs = prepare(arguments)
            output, h_n, c_n = function(*args, **kwargs)
            assert output.shape == (*sizes, 2) and torch.equal(h_n, kwargs["h0"])
            assert c_n is None or torch.equal(c_n, kwargs["c0"])
            sum(o.sum() for o in (output, h_n, c_n) if o is not None).backward()
            assert torch.equal(kwargs["h0"].grad, torch.ones_like(h_n))


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_absent_positions_never_matter(cell, reverse):
    """Rows 11 and 14: what is absent changes no bit, and gets a gradient of 0."""
    function, (args, kwargs) = sample(cell, 4, 6, state=True, lengths=(3, 0, 6, 1), reset=0.3, reverse=reverse)
    absent = torch.arange(6) >= kwargs["lengths"][:, None]
    results = []
    for content in (0.0, float("nan"), float("inf")):
        x = args[0].masked_fill(absent[..., None], content)
        reset = kwargs["reset"] ^ (absent if content else torch.zeros_like(absent))
        prepared = prepare(((x, *args[1:]), {**kwargs, "reset": reset}))
        output, h_n, _ = function(*prepared[0], **prepared[1])
        assert not output[absent].any()
        grads = torch.autograd.grad([output, h_n], leaves_of(prepared), [noise_like(output, 0), noise_like(h_n, 1)])
        assert not grads[0][absent].any()
        results.append([output, h_n, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_cell
@pytest.mark.parametrize("hidden", [1, 7, 65, 129])
def test_odd_sizes(cell, hidden):
    """Row 12."""
    for batch, time, inputs in ((2, 1, 5), (3, 2, hidden)):
        function, arguments = sample(cell, batch, time, inputs, hidden, state=True)
        assert not broken(function, arguments)


@every_cell
@both_backends
def test_saturated_gates(cell, backend):
    """Row 21."""
    x = torch.tensor([1e4, -1e4]).reshape(1, 2, 1).requires_grad_()
    rows = GATES[cell] * 3
    with use_backend(backend):
        output = run(cell, x, torch.ones(rows, 1), torch.ones(rows, 3))[0]
        (grad,) = torch.autograd.grad(output.sum(), x)
    assert output.isfinite().all() and grad.isfinite().all()


@every_cell
def test_gradient_penalty(cell):
    """Row 30: what depends on a gradient is differentiated too."""
    values = []
    for backend in BACKENDS:
        function, arguments = sample(cell, 2, 3, dtype=torch.float64, state=True)
        prepared = prepare(arguments)
        with use_backend(backend):
            output = function(*prepared[0], **prepared[1])[0]
        (slope,) = torch.autograd.grad(output.sum(), prepared[0][0], create_graph=True)
        values.append(torch.autograd.grad(output.sum() + slope.square().sum(), leaves_of(prepared), allow_unused=True))
    for pair in zip(*values, strict=True):
        torch.testing.assert_close(pair[0], pair[-1])


@every_cell
def test_states_sliced_from_a_batch(cell):
    """Row 38."""
    function, (args, kwargs) = sample(cell, 2, 3, state=True)
    states = {name: torch.stack([value, value])[:, ::2].expand(-1, 2, -1)[0] for name, value in kwargs.items()}
    assert not broken(function, (args, states))
    wide = {name: torch.randn(4, 5)[::2, 1:3] for name in kwargs}
    assert not broken(function, (args, wide))


@every_cell
def test_int32_lengths_unsorted(cell):
    """Row 33."""
    function, arguments = sample(cell, 5, 6, lengths=(2, 6, 0, 5, 2), lengths_dtype=torch.int32, state=True)
    assert not broken(function, arguments)


@every_cell
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "weight_ih", "weight_hh", "h0"])
def test_what_is_not_finite_reaches_what_it_should(cell, value, where):
    """One such element among products of many rows: it reaches what the definition lets it reach, and nothing else
    loses its precision."""
    function, (args, kwargs) = sample(cell, 35, 14, 50, 52, state=True)
    leaves = {"x": args[0], "weight_ih": args[1], "weight_hh": args[2], "h0": kwargs["h0"]}
    leaves[where].view(-1)[7] = value
    assert not broken(function, (args, kwargs))


@every_cell
def test_a_gradient_that_is_no_number(cell):
    function, arguments = sample(cell, 35, 14, 50, 52, state=True)

    def spoiled(*args, **kwargs):
        output, *states = function(*args, **kwargs)
        factor = torch.ones_like(output)
        factor[3, 2, 5] = float("nan")
        return output * factor, *states

    assert not broken(spoiled, arguments)


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("batch, hidden", [(6, 5), (36, 40)])
def test_rows_that_follow_each_other_do_not_meet(cell, reverse, batch, hidden):
    """Short rows fill the time of long ones; what one of them holds, NaN too, never reaches the row after it."""
    lengths = ([9, 2, 3, 4, 7, 1] * 6)[:batch]
    function, (args, kwargs) = sample(cell, batch, 9, 40, hidden, lengths=lengths, state=True, recurrent_mask=True)
    others = torch.arange(batch) % 6 != 2
    runs = []
    for content in (0.5, float("nan")):
        x = args[0].clone()
        x[~others, 1] = content
        prepared = prepare(((x, *args[1:]), kwargs))
        output, *states = function(*prepared[0], **prepared[1], reverse=reverse)
        results = [output, *(state for state in states if state is not None)]
        upstream = [noise_like(result, index) for index, result in enumerate(results)]
        inputs = [prepared[0][0], prepared[1]["h0"], prepared[1]["recurrent_mask"]]
        runs.append([value[others] for value in (*results, *torch.autograd.grad(results, inputs, upstream))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@every_cell
def test_without_a_gradient_the_bits_are_the_same(cell):
    """Nothing is kept then, in blocks of time."""
    function, arguments = sample(cell, 2, 300, 3, 40, lengths=(300, 170), layer_norm=True)
    with torch.no_grad():
        plain = function(*arguments[0], **arguments[1])
    prepared = prepare(arguments)
    for a, b in zip(plain, function(*prepared[0], **prepared[1]), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_time_major_input_is_read_where_it_lies():
    for cell in CELLS:
        function, (args, kwargs) = sample(cell, 3, 5, 4, 6, state=True)
        turned = args[0].transpose(0, 1).contiguous().transpose(0, 1)
        assert not broken(function, ((turned, *args[1:]), kwargs))
        assert not broken(function, ((turned, *args[1:]), {**kwargs, "reverse": True}))


def test_explains():
    (args, kwargs) = CASES["lstm"].samples[0].build(Draw())
    text = str(dispatch.explain(lstm, *args, **kwargs))
    assert text.startswith(f"served by {BACKENDS[-1]}") and "not triton: its kernels take CUDA tensors" in text


# Any call


@st.composite
def drawn_calls(draw, cell, many=False):
    """many: rows and units enough for the products of large batches."""
    if many:
        batch, time = draw(st.integers(11, 40)), draw(st.integers(2, 9))
        inputs, hidden = draw(st.integers(32, 66)), draw(st.integers(32, 66))
    else:
        batch, time = draw(st.integers(0, 5)), draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6]))  # one step has its ways
        inputs, hidden = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    options = {
        "bias": draw(st.booleans()),
        "state": True,
        "reverse": draw(st.booleans()),
        "recurrent_mask": draw(st.booleans()),
        "training": draw(st.booleans()),
        "zoneout": draw(st.sampled_from([0.0, 0.0, 0.2])),
    }
    if draw(st.booleans()):
        options["lengths"] = draw(st.lists(st.integers(0, time), min_size=batch, max_size=batch))
        options["poison"] = draw(st.booleans())
    if draw(st.booleans()):
        options["reset"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if cell == "lstm" and draw(st.booleans()):
        options["projected"] = draw(st.integers(1, 20))
    dropout = draw(st.sampled_from([0.0, 0.0, 0.3]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    function, arguments = sample(cell, batch, time, inputs, hidden, dtype=dtype, **options)
    return functools.partial(function, weight_dropout=dropout), arguments


@every_cell
@given(data=st.data())
def test_any_call(cell, data):
    function, arguments = data.draw(drawn_calls(cell))
    assert not broken(function, arguments)


@every_cell
@given(data=st.data())
def test_any_call_of_many_rows(cell, data):
    function, arguments = data.draw(drawn_calls(cell, many=True))
    assert not broken(function, arguments)
