"""torch's own layers as a backend of the recurrences, beside what tests/test_operators.py runs on them."""

import functools
import gc
import itertools
import weakref

import pytest
import torch
from recurring import PLAIN, reason
from torch.utils.checkpoint import checkpoint

import s2s_kernels as s2s
from benchmarks import choice as measured
from s2s_kernels import dispatch
from s2s_kernels.ops.recurrence import measurements
from s2s_kernels.testing import CASES, Draw, compare, evaluate, noise_like, prepare
from s2s_kernels.testing.recurrence import recurrence_sample
from s2s_kernels.testing.recurrent_layers import build, recurrent_layers
from s2s_kernels.testing.twins import pair, same_function

KINDS = ("LSTM", "GRU", "RNN")


@pytest.fixture
def forced():
    with dispatch.use_backend("torch"):
        yield


# What is run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers, bidirectional, batch_first", [(1, False, True), (2, True, False), (3, False, True)])
def test_all_layers_are_one_call_of_torchs(kind, layers, bidirectional, batch_first, forced, monkeypatch):
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first}
    theirs, ours = pair(kind, 5, 4, **options)
    calls, name = [], "rnn_tanh" if kind == "RNN" else kind.lower()
    original = getattr(torch, name)
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    expected = theirs(x)[0]
    monkeypatch.setattr(torch, name, lambda *args: calls.append(args) or original(*args))
    torch.testing.assert_close(ours(x)[0], expected, rtol=0, atol=0)
    assert len(calls) == 1 and calls[0][4] == layers
    monkeypatch.undo()
    same_function(theirs, ours, (x,))


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"bias": False, "proj_size": 3, "bidirectional": True}])
def test_projections(options, forced):
    theirs, ours = pair("LSTM", 5, 4, **options)
    same_function(theirs, ours, (torch.randn(3, 6, 5, dtype=torch.float64),))


def test_dropout_between_layers_is_ours(forced):
    """A call a layer: what torch would drop differs from what the other backends drop."""
    layer = s2s.nn.GRU(5, 4, num_layers=2, dropout=0.5).train()
    x = torch.randn(6, 3, 5)
    torch.manual_seed(3)
    found = layer(x)[0]
    with dispatch.use_backend("reference"):
        torch.manual_seed(3)
        torch.testing.assert_close(found, layer(x)[0])


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("reverse", [False, True])
def test_one_bias_alone(missing, reverse, forced):
    sample = recurrence_sample("lstm", "", 3, 5, 4, 6, state=True, reverse=reverse)
    args, kwargs = sample.build(Draw())
    names = ("x", "weight_ih", "weight_hh", "bias_ih", "bias_hh")
    given = {name: value for name, value in zip(names, args, strict=True) if name != missing}
    assert all(by <= 0 for by in compare(s2s.lstm, ((), {**given, **kwargs}), "torch").values())


def test_heads_are_refused(forced):
    with pytest.raises(NotImplementedError, match="no heads"):
        s2s.rnn(torch.randn(2, 5, 3), torch.randn(4, 3), torch.randn(2, 2, 2))


def test_cells(forced):
    theirs, ours = pair("GRUCell", 5, 4)
    same_function(theirs, ours, (torch.randn(3, 5, dtype=torch.float64),))


def test_saturated_and_not_finite_inputs_as_the_definition(forced):
    for kind, value in itertools.product(("lstm", "gru", "rnn_relu"), (torch.nan, torch.inf, 1e4)):
        args, kwargs = build(Draw(), kind, batch=3, time=6, directions=2)
        args[0][1, 2] = value
        assert all(by <= 0 for by in compare(recurrent_layers, (args, kwargs), "torch").values())


# Derivatives


def drawn_layer(kind="LSTM"):
    layer = getattr(s2s.nn, kind)(3, 4, num_layers=2, batch_first=True, dtype=torch.float64)
    return layer, torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)


def test_a_graph_may_be_gone_through_again(forced):
    layer, x = drawn_layer()
    output = layer(x)[0]
    first = torch.autograd.grad(output.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), x)


def test_nothing_is_kept_after_backward(forced, monkeypatch):
    kept, original = [], torch.lstm

    def watched(*args):
        results = original(*args)
        kept.extend(weakref.ref(v) for v in results)
        return results

    monkeypatch.setattr(torch, "lstm", watched)
    layer, x = drawn_layer()
    loss = layer(x)[0].square().sum()
    assert any(reference() is not None for reference in kept)
    loss.backward()
    gc.collect()
    assert kept and all(reference() is None for reference in kept) and loss.grad_fn is not None


@pytest.mark.parametrize("kind", KINDS)
def test_higher_orders_and_transforms_are_the_definitions(kind, forced):
    layer, x = drawn_layer(kind)

    def penalty(x):
        output = layer(x)[0]
        return (output + torch.autograd.grad(output.sum(), x, create_graph=True)[0].sum(2, keepdim=True)).square().sum()

    found = torch.autograd.grad(penalty(x), (x, *layer.parameters()))
    penalty(x).backward()  # the whole graph, to every leaf
    torch.testing.assert_close(x.grad, found[0])
    with dispatch.use_backend("reference"):
        for ours, want in zip(found, torch.autograd.grad(penalty(x), (x, *layer.parameters())), strict=True):
            torch.testing.assert_close(ours, want)

    tangent = torch.randn_like(x)
    _, by_jvp = torch.func.jvp(lambda x: layer(x)[0], (x.detach(),), (tangent,))
    by_vmap = torch.vmap(lambda x: layer(x)[0])(torch.stack([x, 2 * x]).detach())
    by_grad = torch.func.grad(lambda x: layer(x)[0].sum())(x.detach())
    torch.testing.assert_close(by_vmap[1], layer(2 * x)[0])
    torch.testing.assert_close(by_grad, torch.autograd.grad(layer(x)[0].sum(), x)[0])
    step = 1e-6 * tangent
    torch.testing.assert_close(by_jvp, (layer(x + step)[0] - layer(x - step)[0]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_checkpointing(forced):
    layer, x = drawn_layer()
    plain = torch.autograd.grad(layer(x)[0].sum(), (x, *layer.parameters()))
    again = torch.autograd.grad(
        checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).sum(), (x, *layer.parameters())
    )
    for a, b in zip(again, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_changes_in_place_are_noticed(forced):
    layer, x = drawn_layer()
    output = layer(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    wanted = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    output = layer(x)[0]  # a copy, to be contiguous
    with torch.no_grad():
        output.add_(1)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], wanted)
    output = s2s.nn.GRU(3, 4, dtype=torch.float64)(x)[0]
    with torch.no_grad():
        output.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_autocast(forced):
    layer = s2s.nn.GRU(3, 4)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(NotImplementedError, match="in 16 bits"):
        layer(torch.randn(5, 2, 3))


# What is refused, and why


@pytest.mark.parametrize(
    "options, words",
    [
        ({"lengths": torch.tensor([2, 3])}, "no lengths"),
        ({"reset": torch.zeros(2, 5, dtype=torch.bool)}, "no resets"),
        ({"zoneout": 0.1}, "no zoneout"),
        ({"recurrent_mask": torch.ones(2, 4)}, "no recurrent mask"),
        ({"layer_norm": (torch.ones(12), torch.ones(12))}, "no layer normalisation"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_torchs_layers_lack_is_refused_by_name(options, words, forced):
    with pytest.raises(NotImplementedError, match=words):
        s2s.gru(torch.randn(2, 5, 3), torch.randn(12, 3), torch.randn(12, 4), **options)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_bad_input_is_refused_by_name(name, forced):
    for sample in CASES[name].errors:
        args, kwargs = sample.build(Draw())
        with pytest.raises(sample.error, match=rf"\b{sample.argument}\b"):
            CASES[name].function(*args, **kwargs)


def test_regularised_and_packed_layers_are_refused(forced):
    x = torch.randn(5, 2, 3)
    for options, words in (
        ({"weight_dropout": 0.5}, "weight dropout"), ({"recurrent_dropout": 0.5}, "recurrent mask"),
        ({"zoneout": 0.5}, "zoneout"), ({"layer_norm": True}, "layer normalisation"),
    ):  # fmt: skip
        layer = s2s.nn.LSTM(3, 4, **options)
        with pytest.raises(NotImplementedError, match=words):
            layer(x)
        if "dropout" in words or "mask" in words:
            assert layer.eval()(x)[0].shape == (5, 2, 4)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2]))
    with pytest.raises(NotImplementedError, match="no lengths"):
        s2s.nn.LSTM(3, 4)(packed)


def test_the_gaps_of_a_cpu():
    cpu = PLAIN._replace(device=torch.device("cpu"), dtype=torch.float32)
    assert reason(cpu) is None and reason(cpu, dtype=torch.float64) is None
    assert "16 bits" in reason(cpu, dtype=torch.bfloat16)
    assert all("empty" in reason(cpu, **{name: 0}) for name in ("batch", "time", "inputs"))
    assert reason(cpu, projected=True, width=767) is None and "fewer" in reason(cpu, projected=True)


def test_what_torch_keeps_of_the_contract_on_a_cpu():
    """float32; what the gap says of 16 bits is so, beside that they are refused."""
    kept = measured.kept("cpu", (torch.float32, torch.float16, torch.bfloat16))
    assert kept == [f"{cell} float32" for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")]
    for cell, dtype in itertools.product(("lstm", "gru"), (torch.float16, torch.bfloat16)):
        assert not measured.carries(cell, dtype, "cpu", 5, 200)


def test_an_inaccurate_answer_is_seen(monkeypatch):
    original = torch.gru
    monkeypatch.setattr(torch, "gru", lambda *args: tuple(value * (1 + 1e-5) for value in original(*args)))
    assert not measured.accurate("gru", torch.float32, "cpu", 3, 5)
    assert measured.accurate("lstm", torch.float32, "cpu", 3, 5)


def test_a_cpu_is_served_by_torch_only_where_it_is_forced():
    args = torch.randn(2, 5, 3), torch.randn(16, 3), torch.randn(16, 4)
    explanation = dispatch.explain(s2s.lstm, *args)
    if dispatch._asked.get()[0] is None:
        assert explanation.backend != "torch" and "number of threads" in explanation.reasons["torch"]


def test_under_compilation_another_backend_serves(monkeypatch):
    layer = s2s.nn.GRU(3, 4)
    x = torch.randn(5, 2, 3)
    compiled = torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x)[0])
    torch._dynamo.reset()
    with dispatch.use_backend("torch"), pytest.raises(Exception, match="aren't traced"):
        torch.compile(lambda x: layer(x)[0], fullgraph=True, backend="aot_eager")(x)
    torch._dynamo.reset()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "aren't traced" in reason(PLAIN)


# On a GPU


def roundings(arguments):
    """By how many roundings of the largest value torch's layers differ from the definition, in float64 both."""
    runs = []
    for backend in ("torch", "reference"):
        with dispatch.use_backend(backend):
            runs.append(list(evaluate(recurrent_layers, prepare(arguments), noise_like)))
    return max(
        float((ours - exact).abs().max() / exact.abs().max().clamp(min=1)) / torch.finfo(torch.float64).eps
        for (_, ours), (_, exact) in zip(*runs, strict=True)
    )


def judge_by_roundings(cell, device, batch, hidden):
    """The tolerance rule asks of float64 to sum in the definition's order: eager is exact by its meaning, so that 4
    roundings are left. Another order of the batch times 9 products of a weight's gradient, or of the units times 9 of a
    state's, may differ by as many roundings as a fraction of its terms."""
    with measured.unquestioned():
        for arguments in measured.calls(cell, torch.float64, device, batch, hidden):
            assert roundings(arguments) < 512


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_float64_differs_by_the_order_of_sums_alone(cell):
    judge_by_roundings(cell, "cpu", 7, 96)


keeps = functools.cache(measured.keeps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch, hidden", [(24, 384), (8, 96), (7, 300), (2, 9)])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_cudnn_on_a_gpu(cell, batch, hidden, dtype):
    """Where it is said to keep the contract, it does so at other sizes of the same algorithms as well."""
    torch.use_deterministic_algorithms(False)
    if dtype == torch.float64:
        judge_by_roundings(cell, "cuda", batch, hidden)
        return
    if not keeps(cell, dtype, "cuda"):
        pytest.skip(f"cuDNN doesn't keep the contract for {measurements.kind(cell, dtype)} here: `explain` says so")
    assert measured.accurate(cell, dtype, "cuda", batch, hidden)
