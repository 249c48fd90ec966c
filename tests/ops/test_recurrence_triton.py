"""The recurrences on CUDA tensors without a GPU: the values of their Triton engines by Triton's interpreter."""

import os
from types import SimpleNamespace

import emulated_recurrence
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreting import emulating, interpreted, judging, needs_extension, needs_triton
from serving import not_emulated

import s2s_kernels as s2s
from s2s_kernels import dispatch
from s2s_kernels.ops import recurrence
from s2s_kernels.ops.recurrence import autograd, run
from s2s_kernels.ops.recurrence.reference import GATES
from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare, to_device
from s2s_kernels.testing.layouts import noise_sliced, noise_transposed, ones_expanded, sliced, transposed
from s2s_kernels.testing.recurrence import recurrence_sample
from s2s_kernels.testing.rule import call

THOROUGH = os.environ.get("S2S_HYPOTHESIS") == "thorough"
STEPS, SEQUENCE = ENGINES = ("triton_steps", "triton_sequence")
CELLS = ("lstm", "gru", "rnn")
pytestmark = emulating()
judge = judging()
emulated_cuda = pytest.mark.skipif(not_emulated("cuda") is not None, reason=str(not_emulated("cuda")))


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    from s2s_kernels.ops.recurrence import choice

    monkeypatch.setattr(choice, "engine_of", lambda sizes: request.param)
    return request.param


def named(cell, name):
    return next(sample for sample in CASES[cell].samples if sample.name == name)


def samples(chosen=None):
    return [
        pytest.param(cell, sample, id=f"{cell}-{sample.name}")
        for cell in CELLS
        for sample in CASES[cell].samples
        if THOROUGH or chosen is None or sample.name in chosen
    ]


@interpreted
def test_the_driver_runs_and_so_does_each_engine(monkeypatch):
    from s2s_kernels.ops.recurrence import choice, device, triton_sequence, triton_steps

    called = []

    def watch(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: called.append(module.__name__) or original(*a, **k))

    watch(device, "recurrence_forward")
    modules = {STEPS: triton_steps, SEQUENCE: triton_sequence}
    for name, module in modules.items():
        watch(module, "forward")
        watch(module, "backward")
        monkeypatch.setattr(choice, "engine_of", lambda sizes, name=name: name)
        called.clear()
        x = torch.randn(1, 2, 3, requires_grad=True)
        s2s.gru(x, torch.randn(6, 3), torch.randn(6, 2))[0].sum().backward()
        assert called == [device.__name__, module.__name__, module.__name__]


only_the_sequence = pytest.mark.parametrize("engine", [SEQUENCE], indirect=True)


@interpreted
@only_the_sequence
@pytest.mark.parametrize("cell, sample", samples())
def test_values_and_gradients_by_the_engine_that_float32_is_not_given(cell, sample, engine):
    """tests/test_operators.py runs the other."""
    judge(sample.build(Draw()), CASES[cell].function)


HALVES = ("projection", "everything", "poisoned", "tails", "relu", "heads")


@interpreted
@pytest.mark.parametrize("cell, sample", samples(HALVES))
def test_values_and_gradients_in_16_bits(cell, sample, engine):
    judge(sample.build(Draw(torch.float16)), CASES[cell].function)


@interpreted
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_several_tiles_of_units_under_layer_normalisation(cell):
    """More units than a program of the step's kernels takes at once, of which it needs the sums."""
    from s2s_kernels.ops.recurrence import triton_steps

    original = triton_steps._tile
    sample = recurrence_sample(cell, "", 3, 2, hidden=70, layer_norm=True, state=True, lengths=(2, 1, 0), poison=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_steps, "_tile", lambda *a: {**original(*a), "COLUMNS": 32})
        judge(sample.build(Draw()), CASES[cell.partition("_")[0]].function)


@interpreted
@pytest.mark.parametrize("layout", [transposed, sliced])
@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell, layout):
    args, kwargs = named(cell, "everything").build(Draw())

    def laid(value):
        return layout(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    kwargs = {name: tuple(map(laid, v)) if isinstance(v, tuple) else laid(v) for name, v in kwargs.items()}
    judge((tuple(map(laid, args)), kwargs), CASES[cell].function)


@interpreted
@only_the_sequence
@pytest.mark.parametrize("upstream", [ones_expanded, noise_transposed, noise_sliced])
def test_any_strides_of_the_incoming_gradient(upstream, engine):
    judge(named("lstm", "projection").build(Draw()), s2s.lstm, upstream=upstream)


def weight_drop(cell, p, packed=False):
    def function(x, weight_ih, weight_hh, bias_ih, bias_hh, h0, lengths):
        c0 = {"c0": 2 * h0} if cell == "lstm" else {}
        options = {"lengths": lengths, "weight_dropout": p, "packed": packed, "reverse": packed}
        return run(cell, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, **c0, **options)

    return function


def packed_call(cell, lengths, dtype=torch.float32, hidden=5):
    draw, rows = Draw(dtype), GATES[cell] * hidden
    lengths = torch.tensor(lengths, dtype=torch.int64)
    x = draw(int(lengths.sum()), 3)
    return (
        x,
        draw(rows, 3),
        draw(rows, hidden, scale=0.4),
        draw(rows),
        draw(rows),
        draw(len(lengths), hidden),
        lengths,
    )


@interpreted
@pytest.mark.parametrize("lengths, p", [((4, 2, 2, 0), 0.5), ((3,), 1.0), ((2, 1), 0.0), ((0, 0), 0.0), ((), 0.5)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_packed_sequences_and_weight_drop(cell, lengths, p):
    judge((packed_call(cell, lengths), {}), weight_drop(cell, p, packed=True))


@interpreted
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_packed_sequences_in_16_bits(cell, engine):
    judge((packed_call(cell, (3, 2), torch.float16), {}), weight_drop(cell, 0.25, packed=True))


@interpreted
def test_packed_raw_calls_are_checked():
    x, *weights, h0, lengths = packed_call("gru", (3, 2))
    none = None

    def forward(lengths):
        rest = (none,) * 7
        return torch.ops.s2s.recurrence_forward(
            x, *weights, h0, *rest, lengths, none, none, 1, False, 0.0, 0.0, False, 0.0,
            True, 0, 0,
        )  # fmt: skip

    assert forward(lengths)[0].shape == (5, 5)
    for wrong in ([2, 3], [3, 1], [6, -1]):
        with pytest.raises(RuntimeError, match="lengths must be in descending order"):
            forward(torch.tensor(wrong))


@interpreted
@pytest.mark.parametrize("zoneout", [0.0, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_the_limits_of_zoneout(zoneout, training, engine):
    args, kwargs = named("lstm", "zoneout in training").build(Draw())
    kwargs.update(zoneout=(zoneout, zoneout), training=training)
    judge((args, kwargs), s2s.lstm)


def layered(draw, hidden, **options):
    torch.manual_seed(3)
    layer = s2s.nn.LSTM(4, hidden, num_layers=2, bidirectional=True, batch_first=True, dtype=draw.dtype, **options)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, lengths, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"lengths": lengths})

    x = draw(3, 4, 4)
    x[1, 2:] = float("nan")
    return function, ((x, torch.tensor([4, 2, 0]), *(p.detach() for p in parameters)), {})


@interpreted
@pytest.mark.parametrize("options", [{"weight_dropout": 0.5, "dropout": 0.5}, {"zoneout": 0.2, "layer_norm": True}])
def test_layers(options):
    """One call for each layer and direction, as on CUDA tensors."""
    function, arguments = layered(Draw(), 3, **options)
    judge(arguments, function)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cell", autograd.CELLS)
def test_one_of_a_stack_without_the_checks_of_a_call(cell, dtype, monkeypatch):
    """Its results are those of `run`, which names what doesn't fit."""
    draw, none, rows = Draw(dtype), None, 6 * GATES[cell]
    weights = [draw(rows, 5, scale=0.3), draw(rows, 6, scale=0.3), draw(rows), draw(rows)]
    x, h0, c0 = draw(3, 4, 5).requires_grad_(), draw(3, 6), draw(3, 6) if cell == "lstm" else none
    lengths, reset = torch.tensor([4, 0, 2]), draw.mask(3, 4, p=0.4)
    backend = ["triton"]
    monkeypatch.setattr(recurrence, "chosen", lambda asked, untouched: backend[0])

    def found(*weights):
        tensors = (x, *weights, h0, c0, *(none,) * 6, lengths, reset, none)
        return recurrence.one_of_a_stack(cell, tensors, True, False)

    results = found(*weights)
    expected = run(cell, x, *weights, h0, c0, lengths=lengths, reset=reset, reverse=True)
    for actual, wanted in zip(results, expected, strict=True):
        assert actual is wanted is none or torch.equal(actual, wanted)
    (grad,), (wanted,) = (torch.autograd.grad(output[0].sum(), [x]) for output in (results, expected))
    assert torch.equal(grad, wanted)
    assert found(*weights[:3], draw(rows - 1)) is none and found(weights[0], weights[1][0], *weights[2:]) is none
    backend[0] = "torch"
    assert found(*weights) is none


@interpreted
def test_what_nothing_looks_at_needs_no_dispatcher():
    from torch.utils.flop_counter import FlopCounterMode

    from s2s_kernels.ops import python_kernels

    x, on_gpu = torch.ones(2), SimpleNamespace(is_cuda=True)
    operator, kernel = torch.ops.s2s.recurrence_forward.default, python_kernels.KERNELS["recurrence_forward"]
    assert python_kernels.function_of("recurrence_forward", on_gpu, (x, None)) is kernel
    assert python_kernels.function_of("recurrence_forward", x, (x, None)) is operator
    with FlopCounterMode(display=False):
        assert python_kernels.function_of("recurrence_forward", on_gpu, (x, None)) is operator


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cell", autograd.CELLS)
def test_step(cell, dtype):
    draw, rows = Draw(dtype), 7 * GATES[cell]
    weights = draw(rows, 5, scale=0.3), draw(rows, 7, scale=0.3)
    for batch, biased, started in ((3, True, True), (5, False, False), (0, True, True)):
        x = draw(batch, 5)
        biases = (draw(rows), draw(rows)) if biased else (None, None)
        h = draw(batch, 7) if started else None
        c = draw(batch, 7) if started and cell == "lstm" else None
        found = torch.ops.s2s.recurrence_step(x, *weights, *biases, h, c, autograd.CELLS.index(cell))
        with s2s.use_backend("reference"):
            options = {"c0": c} if cell == "lstm" else {}
            _, *expected = run(cell, x.unsqueeze(1), *weights, *biases, h, **options)
        for actual, wanted in zip(found, expected, strict=False):
            torch.testing.assert_close(actual, wanted)
        assert len(found) == (2 if cell == "lstm" else 1)


@interpreted
def test_a_cell_steps_by_that(monkeypatch):
    from s2s_kernels.ops.recurrence import device

    called, original = [], device.recurrence_step
    monkeypatch.setattr(device, "recurrence_step", lambda *a: called.append(1) or original(*a))
    cell, x = s2s.nn.LSTMCell(3, 4), torch.randn(2, 3)
    with torch.no_grad():
        found = cell(x, cell(x))
    assert called == [1, 1]
    torch.testing.assert_close(found, cell(x, cell(x)))


@interpreted
def test_the_same_bits_on_every_run(engine):
    arguments = named("lstm", "poisoned, reverse").build(Draw(torch.float16))
    runs = [dict(evaluate(s2s.lstm, prepare(arguments), noise_like)) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@st.composite
def calls(draw):
    cell = draw(st.sampled_from(["lstm", "gru", "rnn_tanh"]))
    batch, time = draw(st.integers(0, 18)), draw(st.integers(0, 4))
    rows = st.lists(st.integers(0, time), min_size=batch, max_size=batch)
    hidden = draw(st.sampled_from([1, 5, 33]))
    options = {
        "lengths": draw(st.none() | rows), "reset": draw(st.sampled_from([None, 0.4])),
        "state": draw(st.booleans()) or time == 0,  # else the definition has no gradient
        "recurrent_mask": draw(st.booleans()), "bias": draw(st.booleans()), "reverse": draw(st.booleans()),
        "zoneout": draw(st.sampled_from([0.0, 0.3])), "training": draw(st.booleans()),
        "projected": draw(st.sampled_from([None, 3])) if cell == "lstm" else None,
    }  # fmt: skip
    sample = recurrence_sample(cell, "", batch, time, 3, hidden, poison=options["lengths"] is not None, **options)
    noise = Draw(draw(st.sampled_from([torch.float32, torch.float16])), seed=draw(st.integers(0, 1000)))
    return CASES[cell.partition("_")[0]].function, sample.build(noise), draw(st.sampled_from(ENGINES))


@interpreted
@settings(max_examples=max(5, settings().max_examples // 4))
@given(calls())
def test_any_call_equals_the_definition(call):
    from s2s_kernels.ops.recurrence import choice

    function, arguments, name = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "engine_of", lambda sizes: name)
        judge(arguments, function)


@interpreted
def test_lengths_out_of_range_are_clamped_in_the_kernels(engine):
    """On a GPU nothing waits for the lengths, so the kernels take any."""
    draw, none = Draw(), None
    x, weights = draw(2, 3, 4), (draw(12, 4), draw(12, 4, scale=0.4), draw(12), draw(12))

    def forward(lengths):
        rest = (none,) * 8
        return torch.ops.s2s.recurrence_forward(
            x, *weights, *rest, lengths, none, none, 1, False, 0.0, 0.0, False, 0.0, False, 0, 0
        )

    for out, inside in zip(forward(torch.tensor([99, -5])), forward(torch.tensor([3, 0])), strict=True):
        assert torch.equal(out, inside)


@interpreted
def test_raw_calls_are_checked_and_keep_to_their_fakes():
    draw, none = Draw(torch.float16), None
    x, weights, h0 = draw(2, 3, 4), (draw(12, 4), draw(12, 4), draw(12), draw(12)), draw(2, 4)
    norms = (draw(12), draw(12), none, none)
    good = (x, *weights, h0, none, none, none, *norms, torch.tensor([3, 2]), none, none)
    options = (1, False, 0.0, 0.0, False, 0.0, False, 0)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.s2s.recurrence_forward, (*good, *options, 1), test_utils=tests)
    output, h_n, *saved = torch.ops.s2s.recurrence_forward(*good, *options, 1)
    backward = (output, h_n, none, *good[:3], *good[5:], *saved, *options, 0b11000111111)
    torch.library.opcheck(torch.ops.s2s.recurrence_backward, backward, test_utils=tests)
    step = (x[:, 0], *weights, h0, none, 1)
    torch.library.opcheck(torch.ops.s2s.recurrence_step, step, test_utils=tests)
    wrong = {
        0: draw(2, 3, 5),
        1: draw(9, 4),
        2: draw(12, 3),
        4: draw(11),
        5: draw(3, 4),
        9: draw(4),
        13: torch.tensor([1]),
    }
    for place, value in wrong.items():
        with pytest.raises(RuntimeError, match="recurrence: the arguments don't fit together"):
            torch.ops.s2s.recurrence_forward(*good[:place], value, *good[place + 1 :], *options, 1)
    with pytest.raises(RuntimeError, match="recurrence_step: "):
        torch.ops.s2s.recurrence_step(x, *step[1:])


@emulated_cuda
def test_the_cuda_backend_runs_its_engine(monkeypatch):
    from s2s_kernels.ops.recurrence import cuda_kernels

    calls = []
    for name in ("forward", "backward"):
        original = getattr(cuda_kernels, name)
        monkeypatch.setattr(cuda_kernels, name, lambda *a, f=original, n=name, **k: calls.append(n) or f(*a, **k))
    with emulated_recurrence.emulated(), dispatch.use_backend("cuda"):
        s2s.gru(torch.randn(1, 2, 3, requires_grad=True), torch.randn(6, 3), torch.randn(6, 2))[0].sum().backward()
    assert calls == ["forward", "backward"]


@emulated_cuda
@pytest.mark.parametrize("streams", [False, True])
def test_directions_with_the_cuda_engine(streams, monkeypatch):
    """Where each has a stream of its own, both share the device, in backward too."""
    from s2s_kernels.ops.recurrence import choice, cuda_kernels, layers, stack

    sharing, plan_of = [], cuda_kernels.plan_of
    monkeypatch.setattr(choice, "engine_of", lambda sizes: "cuda_kernels")
    monkeypatch.setattr(cuda_kernels, "plan_of", lambda *call: sharing.append((call[1], *call[3:])) or plan_of(*call))
    for module in (recurrence, stack):
        monkeypatch.setattr(module, "chosen", lambda *call: "cuda" if dispatch.asked()[0] == "cpu" else "reference")
    monkeypatch.setattr(stack, "_has_streams", lambda x: streams)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: True))
    monkeypatch.setattr(layers, "_on_another_stream", lambda begun, given, call: call())
    function, arguments = layered(Draw(), 9, dropout=0.5)
    with emulated_recurrence.emulated(machine=(2, 96 << 10, False)):
        judge(arguments, function)
        tensors = (*(v.detach() for v in arguments[0][:1] + arguments[0][2:6]), *(None,) * 11)
        recurrence.one_of_a_stack("lstm", tensors, False, False, "cuda", 3)
    count = 1 + streams
    assert {call for call in sharing if len(call) > 1} == {(False, count), (True, count), (False, 3)}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cell, time", [("gru", 5), ("lstm", 0)])
def test_heads_without_padding(cell, time, dtype, engine):
    """A packed sequence, whose heads don't stand apart, and no positions at all."""
    (args, kwargs), lengths = (
        recurrence_sample(cell, "", 3, time, 4, 6, heads=3, state=True).build(Draw(dtype)),
        [5, 3, 1],
    )
    if time:
        args = (torch.randn(sum(lengths), 4).to(args[0][0]), *args[1:])
        kwargs = {**kwargs, "lengths": torch.tensor(lengths), "packed": True}
    judge(call(*args, **kwargs), lambda *args, **kwargs: tuple(v for v in run(cell, *args, **kwargs) if v is not None))


@interpreted
@pytest.mark.parametrize("heads, launches", [(1, 2), (5, 10)])
def test_a_program_holds_one_head(heads, launches, monkeypatch):
    from s2s_kernels.ops.recurrence import choice, triton_sequence

    monkeypatch.setattr(choice, "engine_of", lambda sizes: "triton_sequence" if sizes.units == 10 // heads else "")
    grids, kernel = [], triton_sequence.forward_kernel

    class Watched:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(triton_sequence, "forward_kernel", Watched())
    sample = recurrence_sample("gru", "", 18, 2, 3, 10, heads=heads, lengths=[2, 1] * 9, reverse=True)
    judge(sample.build(Draw()), s2s.gru)
    assert grids and set(grids) == {(launches,)}


@interpreted
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu"])
def test_packed_and_normalised_sequences_with_the_cuda_engine(cell, monkeypatch):
    """What it saves is packed between its forward and backward, and padded with what is another row's."""
    emulated_recurrence = pytest.importorskip("emulated_recurrence")
    from s2s_kernels.ops.recurrence import choice

    def function(x, weight_ih, weight_hh, bias_ih, bias_hh, h0, lengths):
        norms = (1 + bias_ih, 1 + bias_hh, *((h0[0], h0[1]) if cell == "lstm" else ()))
        c0 = {"c0": 2 * h0} if cell == "lstm" else {}
        return run(
            cell, x, weight_ih, weight_hh, bias_ih, bias_hh, h0, **c0, lengths=lengths, packed=True, layer_norm=norms
        )  # fmt: skip

    monkeypatch.setattr(choice, "engine_of", lambda sizes: "cuda_kernels")
    with emulated_recurrence.emulated():
        judge((packed_call(cell, (4, 2, 2, 0)), {}), function)


def test_the_choice_of_an_engine():
    pytest.importorskip("triton")
    from s2s_kernels.ops.recurrence.choice import Sizes, engine_of

    def chosen(cell, hidden, dtype=torch.bfloat16, projected=False, plain=True, shared=227 << 10, cuda=False):
        number = autograd.CELLS.index(cell)
        plain = plain and not projected
        return engine_of(Sizes(number, 8, 99, hidden, hidden, dtype, projected, plain, shared, cuda))

    assert chosen("lstm", 128, cuda=True) == chosen("gru", 1000, cuda=True) == "cuda_kernels"
    assert chosen("lstm", 128) == chosen("gru", 100) == chosen("gru", 128, plain=False) == SEQUENCE
    assert chosen("lstm", 64, projected=True) == chosen("rnn_tanh", 5) == SEQUENCE
    assert chosen("lstm", 128, plain=False) == chosen("lstm", 129) == chosen("rnn_tanh", 256) == STEPS
    assert chosen("lstm", 128, shared=99 << 10) == chosen("lstm", 128, projected=True) == STEPS
    assert chosen("lstm", 20, plain=False) == chosen("gru", 64, torch.float32) == STEPS
    torch.set_float32_matmul_precision("medium")
    try:
        assert chosen("gru", 64, torch.float32) == chosen("lstm", 32, torch.float32) == SEQUENCE
        assert chosen("lstm", 64, torch.float32) == chosen("lstm", 32, torch.float32, plain=False) == STEPS
    finally:
        torch.set_float32_matmul_precision("highest")


@needs_extension
@needs_triton
def test_tensors_on_a_gpu_are_served_by_triton():
    """As far as fake ones show it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), dispatch.use_backend("triton"):
        x, weights = torch.randn(2, 8, 5, device="cuda"), [torch.randn(12, 5, device="cuda")]
        weights.append(torch.randn(12, 3, device="cuda"))
        assert s2s.explain(s2s.lstm, x, *weights).backend == "triton"
        if not torch.cuda.is_available():  # kernels of a CPU build of torch aren't there
            with dispatch.use_backend("cuda"), pytest.raises(NotImplementedError, match="CUDA"):
                s2s.lstm(x, *weights)
        with pytest.raises(NotImplementedError, match="float32, bfloat16 and float16"):
            s2s.lstm(x.double(), *(weight.double() for weight in weights))
        output, h_n, c_n = s2s.lstm(x, *weights, lengths=torch.tensor([1, 2]))
        assert output.shape == (2, 8, 3) and h_n.shape == c_n.shape == (2, 3) and c_n.device.type == "cuda"


# On a GPU, beside what tests/test_operators.py runs there


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [5, 64, 128, 200])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_each_engine_on_a_gpu(cell, hidden, dtype):
    options = {"lengths": (9, 0, 4, *[9] * 30), "reset": 0.2, "state": True, "poison": True, "reverse": True}
    for extra in ({}, {"recurrent_mask": True, "zoneout": 0.3, "training": True}):
        sample = recurrence_sample(cell, "", 33, 9, 24, hidden, **options, **extra)
        arguments = to_device(sample.build(Draw(dtype)), "cuda")
        judge(arguments, CASES[cell.partition("_")[0]].function, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_layer_on_a_gpu_waits_for_nothing(kind):
    layer = getattr(s2s.nn, kind)(16, 256, num_layers=2, device="cuda", dtype=torch.float16)
    x, lengths = torch.randn(5, 3, 16, device="cuda", dtype=torch.float16, requires_grad=True), torch.tensor([5, 0, 2])
    try:
        for mode in ("default", "error"):  # the first call compiles, and makes plans
            torch.cuda.set_sync_debug_mode(mode)
            layer(x, lengths=lengths)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_compiles_once_for_all_lengths_and_repeats_its_bits():
    from s2s_kernels.ops.recurrence import triton_sequence_kernels, triton_step_forward

    draw = Draw(torch.bfloat16, "cuda")
    for hidden, kernel in ((64, triton_sequence_kernels.forward_kernel), (160, triton_step_forward.cell_kernel)):
        weights = (draw(4 * hidden, 24), draw(4 * hidden, hidden, scale=0.1), draw(4 * hidden), draw(4 * hidden))
        counts = []
        for batch, time in ((4, 70), (3, 64), (17, 51), (1, 16)):
            arguments = (draw(batch, time, 24), *weights), {"lengths": torch.arange(batch) * time // batch}
            first, again = (dict(evaluate(s2s.lstm, prepare(arguments), noise_like)) for _ in range(2))
            assert all(torch.equal(value, again[name]) for name, value in first.items())
            counts.append(len(kernel.device_caches[torch.cuda.current_device()][0]))
        assert counts == counts[:1] * 4
        with torch.cuda.stream(torch.cuda.Stream()):
            whole = s2s.lstm(*arguments[0], **arguments[1])[0]
        torch.cuda.synchronize()
        assert torch.equal(whole, torch.compile(s2s.lstm, fullgraph=True)(*arguments[0], **arguments[1])[0])


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 200, 768])
def test_directions_side_by_side_on_a_gpu(hidden, monkeypatch):
    """Many times over, without a pause: memory that is used again too early would show. Against the same calls one
    after the other."""
    from s2s_kernels.ops.recurrence import layers

    layer = s2s.nn.LSTM(24, hidden, num_layers=3, bidirectional=True, batch_first=True, device="cuda")
    x = torch.randn(8, 60, 24, device="cuda", requires_grad=True)

    def results():
        output, states = layer(x * 1)
        grads = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
        return [output.detach(), *(state.detach() for state in states), *grads]

    runs = [results() for _ in range(10)]
    monkeypatch.setattr(layers, "_on_another_stream", lambda begun, given, call: call())
    for run_ in runs:
        assert all(map(torch.equal, run_, results()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_cell_steps_on_a_gpu_as_with_gradients(kind, dtype):
    cell = getattr(s2s.nn, f"{kind}Cell")(24, 40, device="cuda", dtype=dtype)
    x, expected = torch.randn(3, 24, device="cuda", dtype=dtype), None
    for _ in range(3):
        expected = cell(x, expected)
    with torch.no_grad():
        found = None
        for _ in range(3):
            found = cell(x, found)
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [32, 160])
def test_a_gpu_replays_a_sequence_from_a_graph(hidden):
    draw = Draw(torch.float32, "cuda")
    weights = (draw(3 * hidden, 24), draw(3 * hidden, hidden, scale=0.1))
    x, graph = draw(2, 9, 24), torch.cuda.CUDAGraph()
    with torch.no_grad():
        s2s.gru(x, *weights)  # compiles
        with torch.cuda.graph(graph):
            output, h_n = s2s.gru(x, *weights)
        x.copy_(draw(2, 9, 24))
        graph.replay()
        expected = s2s.gru(x, *weights)
    assert torch.equal(output, expected[0]) and torch.equal(h_n, expected[1])
