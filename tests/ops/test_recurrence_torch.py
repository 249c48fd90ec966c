"""torch's own layers as a backend of the recurrences, beside what tests/test_operators.py runs on them; and the choice
between them and ours on CUDA tensors, as far as it shows without any."""

import functools
import gc
import itertools
import json
import math
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import s2s_kernels as s2s
from benchmarks import choice as measured
from s2s_kernels import dispatch
from s2s_kernels.ops.recurrence import OPERATORS, Asked, builtin, cuda_kernels, estimates, measurements
from s2s_kernels.testing import CASES, Draw, compare, evaluate, noise_like, prepare
from s2s_kernels.testing.recurrence import recurrence_sample
from s2s_kernels.testing.recurrent_layers import build, recurrent_layers
from s2s_kernels.testing.twins import pair, same_function

KINDS = ("LSTM", "GRU", "RNN")
GPU = torch.device("cuda", 0)
PLAIN = Asked("lstm", torch.float16, GPU, 16, 1024, 768, 768, 768, False, False, True, None, False)
needs_extension = pytest.mark.skipif(dispatch.extension_missing is not None, reason=str(dispatch.extension_missing))
needs_triton = pytest.mark.skipif(dispatch.triton_missing is not None, reason=str(dispatch.triton_missing))


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


def reason(asked=PLAIN, **changes):
    return builtin.gap(asked._replace(**changes))


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
    if dispatch._forced.get() is None:
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


# cuDNN, by what can be said of it here


@pytest.fixture
def gpu(monkeypatch):
    """As on an H100 with all backends; nothing is run there."""

    class Kernels:
        @staticmethod
        def recurrence_persistent_plan(size, backward, machine):
            return torch.ops.s2s.recurrence_persistent_plan(size, backward, machine)

        @staticmethod
        def recurrence_persistent_resident(plan, operand, backward, device):
            return plan[cuda_kernels.TEAM + 1]

    facts = (132, 227 << 10, True)
    monkeypatch.setattr(builtin, "_taken_by_cudnn", lambda dtype, device: dtype != torch.bfloat16)
    monkeypatch.setattr(cuda_kernels, "kernels", Kernels)
    monkeypatch.setattr(cuda_kernels, "machine_of", lambda device: facts)
    monkeypatch.setattr(cuda_kernels, "missing", lambda device: None)
    monkeypatch.setattr(dispatch, "_not_on", lambda device: None)
    monkeypatch.setattr(estimates.Machine, "of", staticmethod(lambda device: estimates.Machine(*facts, (9, 0))))
    monkeypatch.setattr(dispatch, "triton_missing", None)
    known = {"measured": "2026-01-01", "cudnn": torch.backends.cudnn.version(), "rows": []}
    known["keeps_contract"] = ["lstm float16", "gru float16"]
    monkeypatch.setattr(measurements, "known_of", lambda device: known)
    torch.use_deterministic_algorithms(False)
    estimates.predicted.cache_clear()
    yield known
    estimates.predicted.cache_clear()


def test_the_gaps_of_cudnn(gpu, monkeypatch):
    assert reason() is None and reason(cell="gru") is None
    assert "no measurement" in reason(cell="rnn_tanh") and "no measurement" in reason(
        cell="rnn_relu", dtype=torch.float64
    )
    assert "doesn't take bfloat16" in reason(dtype=torch.bfloat16)
    assert "65535 positions" in reason(time=65536) and "32 bits" in reason(batch=16384, time=65535)
    assert "tf32" in reason(dtype=torch.float32) and reason(dtype=torch.float64) is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert "no measurement" in reason(dtype=torch.float32)
    gpu["keeps_contract"].append("lstm float32")
    assert reason(dtype=torch.float32) is None
    torch.use_deterministic_algorithms(True)
    assert "deterministic" in reason()
    torch.use_deterministic_algorithms(False)
    gpu["cudnn"] = 1
    assert "no measurement" in reason()
    with torch.backends.cudnn.flags(enabled=False):
        assert "switched off" in reason()


@pytest.mark.parametrize("bias, projection", [(True, 0), (False, 0), (True, 2)])
def test_weights_are_laid_into_one_buffer(bias, projection, monkeypatch):
    """As torch's layers do; copies, so that the caller's stay where they are."""
    layer = torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True, bias=bias, proj_size=projection)
    weights, calls = list(layer.parameters()), []
    monkeypatch.setattr(torch.backends.cudnn.rnn, "get_cudnn_mode", {"LSTM": 2}.get)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: calls.append(args))
    options = {"count": 2, "directions": 2, "inputs": 3, "hidden": 4, "projection": projection}
    copies = builtin._flattened("lstm", weights, **options)
    ((given, *rest),) = calls
    assert given == copies and rest == [2 + 2 * bias + (projection > 0), 3, 2, 4, projection, 2, False, True]
    for copy, weight in zip(copies, weights, strict=True):
        assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr() and not copy.requires_grad
    buffer = torch.randn(100)
    shared = [buffer[:48].view(16, 3), buffer[48:]]
    assert [v.data_ptr() for v in builtin._flattened("lstm", shared, **options)] == [v.data_ptr() for v in shared]
    assert len(calls) == 1


@needs_extension
@pytest.mark.parametrize("machine", [(132, 227 << 10, True), (108, 163 << 10, False)])
def test_the_model_of_time_is_that_of_the_plans(machine):
    """The operator against the header, built by another compiler's command."""
    emulation = pytest.importorskip("emulated_recurrence")
    try:
        library = emulation.Emulated()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    for batch, hidden, cell, operand, backward in itertools.product(
        (1, 16, 300), (33, 768), range(4), range(4), (0, 1)
    ):
        size = (batch, 1, hidden, hidden, cell, operand, 0, 0, 0, 0)
        plan = torch.ops.s2s.recurrence_persistent_plan(size, backward, machine)
        assert plan == library.planned(size, backward, machine)
        if plan:
            step = torch.ops.s2s.recurrence_persistent_step(size, backward, machine, plan)
            teams, rows = plan[cuda_kernels.TEAM + 1 : cuda_kernels.TEAM + 3]
            turns = math.ceil(math.ceil(batch / rows) / teams)
            assert step == pytest.approx(1000 * turns * library.modelled_step(size, backward, plan, machine[2]))


@needs_extension
@pytest.mark.parametrize(
    "size, machine, plan",
    [((1,) * 9, (1, 1, 0), (1,) * 15), ((1, 1, 8, 8, 4, 0, 0, 0, 0, 0), (1, 1, 0), (1,) * 15),
     ((1, 1, 8, 8, 0, 4, 0, 0, 0, 0), (1, 1, 0), (1,) * 15), ((1, 1, 8, 8, 0, 0, 0, 0, 0, 0), (1, 1), (1,) * 15),
     ((1, 1, 8, 8, 0, 0, 0, 0, 0, 0), (1, 1, 0), (1,) * 14), ((1, 1, 8, 8, 0, 0, 0, 0, 0, 0), (1, 1, 0), (0,) * 15)],
)  # fmt: skip
def test_the_model_of_time_checks_what_it_gets(size, machine, plan):
    with pytest.raises(RuntimeError, match="recurrence_persistent: "):
        torch.ops.s2s.recurrence_persistent_step(size, False, machine, plan)


def test_cudnns_algorithms():
    h100, a30 = estimates.Machine(132, 0, True, (9, 0)), estimates.Machine(56, 0, False, (8, 0))

    def found(machine=h100, backward=False, **changes):
        return estimates.algorithm(PLAIN._replace(**changes), machine, backward)

    assert found() == found(batch=128) == found(backward=True) == estimates.PERSISTENT
    standard = (
        {"batch": 20}, {"batch": 136}, {"hidden": 770}, {"inputs": 100}, {"layers": 2}, {"directions": 2},
        {"dtype": torch.float32}, {"cell": "gru"}, {"machine": a30}, {"projected": True}, {"hidden": 1152},
    )  # fmt: skip
    assert {found(**changes) for changes in standard} == {estimates.STANDARD}
    assert found(hidden=192) == found(hidden=128, backward=True) == found(hidden=64, layers=3) == estimates.SMALL
    assert found(hidden=192, backward=True) == found(hidden=128, dtype=torch.float64) == estimates.STANDARD
    assert found(cell="rnn_tanh", hidden=384) == found(cell="rnn_relu", hidden=256, backward=True) == estimates.SMALL
    assert found(cell="rnn_tanh", hidden=896, batch=96) == estimates.STANDARD


def chosen(asked):
    return dispatch.choose(OPERATORS["lstm"], GPU, asked)


@needs_extension
@needs_triton
def test_the_faster_backend_is_chosen_by_the_model(gpu):
    """Inside the window in which cuDNN keeps the weights on the chip it is as fast as ours is predicted to be; outside
    it is not."""
    assert chosen(PLAIN) == "torch" and estimates.compared(PLAIN, ("torch",))[0]["torch"] == pytest.approx(
        2.29e-3, 0.01
    )
    for changes in ({"batch": 20}, {"layers": 2}, {"directions": 2}, {"beyond": "resets"}, {"dtype": torch.bfloat16}):
        assert chosen(PLAIN._replace(**changes)) == "cuda", changes
    assert chosen(PLAIN._replace(hidden=4096, width=4096, batch=20)) == "torch"  # 30 us of the host's a step otherwise
    assert chosen(PLAIN._replace(dtype=torch.float64)) == "torch"  # the other takes none
    projected = PLAIN._replace(projected=True, plain=False, width=256, beyond="resets")
    assert chosen(projected) == "cuda"
    assert chosen(projected._replace(hidden=4096, width=2048)) == "triton"  # the other can't hold the weights
    # Of few units a program holds the weights, of heads each those of one: with lengths too, but not beside a mask.
    few = PLAIN._replace(hidden=128, width=128, inputs=128, beyond="lengths", batch=1)
    heads = PLAIN._replace(heads=12, beyond="heads")
    for asked in (few, heads):
        times = estimates.compared(asked, ("cuda", "triton"))[0]
        steps = estimates.compared(asked._replace(plain=False, heads=1), ("triton",))[0]
        assert times["triton"] < 0.2 * steps["triton"]
    assert times["cuda"] == estimates.compared(PLAIN, ("cuda",))[0]["cuda"]
    with dispatch.use_backend("cuda"):
        assert chosen(PLAIN) == "cuda"
    told = dispatch._explain(OPERATORS["lstm"], GPU, PLAIN._replace(batch=20), None)
    assert told.backend == "cuda"
    assert told.reasons["torch"] == told.reasons["triton"]
    assert told.reasons["torch"].startswith("predicted, as nothing like it was measured here: torch 19.")
    told = dispatch._explain(OPERATORS["lstm"], GPU, PLAIN, None)
    assert told.reasons["cuda"] == told.reasons["triton"] + "; it serves under torch.compile"
    recording = estimates.compared(PLAIN._replace(recording=True), ("torch", "cuda", "triton"))[0]
    forward = estimates.compared(PLAIN, ("torch", "cuda", "triton"))[0]
    assert all(recording[name] > 1.9 * forward[name] for name in forward)


@needs_extension
@needs_triton
def test_a_compiled_call_compares_nothing(gpu, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(estimates, "compared", lambda *args: pytest.fail("sizes were looked at"))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: False)
    assert chosen(PLAIN) == "cuda"


@needs_extension
@needs_triton
def test_nothing_is_compared_where_there_is_nothing_to_do(gpu, monkeypatch):
    monkeypatch.setattr(estimates, "compared", lambda *args: pytest.fail("sizes were looked at"))
    for name in ("batch", "time", "inputs"):
        assert chosen(PLAIN._replace(**{name: 0})) == "cuda"


def result(entrants, dtype="float16", **changes):
    """A result of make gpu, as benchmarks/gpu.py writes it, with these best seconds."""
    sizes = {"cell": "lstm", "batch": 16, "inputs": 768, "hidden": 768, "width": 768, "layers": 1, "directions": 1}
    sizes |= {"precision": "highest", "torch rounds": True, **changes}
    facts = {"T": 1000, "dtype": dtype, "direction": "forward", "sizes": sizes}
    entries = [
        {"group": str(changes), "extra_info": {**facts, "entrant": name}, "stats": {"min": seconds}}
        for name, seconds in entrants.items()
    ]
    entries.append({"group": "another", "extra_info": {"entrant": "torch"}, "stats": {"min": 1.0}})
    machine = {"gpu": "NVIDIA H100", "date": "2026-02-03", "torch": "2.11", "cudnn": 91000}
    return {
        "facts": machine,
        "benchmarks": {"float16": {"results": {"benchmarks": entries}}, "bfloat16": {"results": None}},
    }


TIMES = {"ours": 1e-3, "torch": 3e-3, "cuda": 2e-3, "triton": 4e-3}


def test_the_table_is_made_by_one_command(tmp_path, monkeypatch, capsys):
    table, given = tmp_path / "measurements.json", tmp_path / "gpu.json"
    table.write_text('{"devices": {"another": {"rows": []}}}')
    given.write_text(json.dumps({**result(TIMES), "keeps_contract": ["lstm float16"]}))
    monkeypatch.setattr(measurements, "FILE", table)
    assert measured.main([str(given)]) == 0 and capsys.readouterr().out.strip() == str(table)
    devices = json.loads(table.read_text())["devices"]
    assert devices.keys() == {"another", "NVIDIA H100"}
    h100 = devices["NVIDIA H100"]
    assert (h100["measured"], h100["cudnn"], h100["keeps_contract"]) == ("2026-02-03", 91000, ["lstm float16"])
    (row,) = h100["rows"]
    assert row["seconds"] == {"torch": 3e-3, "cuda": 2e-3, "triton": 4e-3}
    assert (row["time"], row["dtype"], row["recording"], row["hidden"]) == (1000, "float16", False, 768)
    with pytest.raises(ValueError, match="not a result"):
        measured.taken({"devices": {}}, {})
    with pytest.raises(ValueError, match="no case"):
        measured.taken({"devices": {}}, {**result({}), "benchmarks": {}})
    if not torch.cuda.is_available():
        assert measured.main(["--probe"]) == 1 and "no CUDA device" in capsys.readouterr().err


@needs_extension
@needs_triton
def test_what_was_measured_decides_before_the_model(gpu):
    gpu["rows"] = measured.taken({"devices": {}}, result(TIMES))["devices"]["NVIDIA H100"]["rows"]
    assert chosen(PLAIN) == "cuda"
    told = dispatch._explain(OPERATORS["lstm"], GPU, PLAIN, None).reasons
    where = "measured on this device on 2026-01-01, for 16 x 1000 of 768 -> 768"
    assert told["torch"] == f"{where}: torch 3.07 ms, cuda 2.05 ms, triton 4.1 ms"
    gpu["rows"][0]["seconds"]["torch"] = 1e-3
    assert chosen(PLAIN) == chosen(PLAIN._replace(batch=8, time=256)) == "torch"
    far = ({"batch": 64}, {"time": 100}, {"recording": True}, {"layers": 2}, {"cell": "gru"}, {"batch": 20})
    for changes in far:
        asked = PLAIN._replace(**changes)
        assert estimates.compared(asked, ("torch", "cuda"))[1].startswith("predicted"), changes
    del gpu["rows"][0]["seconds"]["triton"]  # not a time for each
    assert estimates.compared(PLAIN, ("torch", "cuda", "triton"))[1].startswith("predicted")
    assert estimates.compared(PLAIN, ("torch", "cuda"))[1].startswith("measured")
    nearer = {**gpu["rows"][0], "batch": 24, "seconds": {"torch": 9.0, "cuda": 8.0}}
    gpu["rows"].append(nearer)
    assert estimates.compared(PLAIN._replace(batch=32), ("torch", "cuda"))[0]["cuda"] == 8.0 * 1.024
    assert estimates.compared(PLAIN._replace(batch=8), ("torch", "cuda"))[0]["cuda"] == pytest.approx(2e-3 * 1.024)


@needs_extension
@needs_triton
def test_float32_is_compared_where_it_is_rounded_alike(gpu, monkeypatch):
    asked = PLAIN._replace(dtype=torch.float32)
    monkeypatch.setattr(builtin, "rounds_more", lambda: False)

    def rows(rounds, precision):
        outcome = result(TIMES, "float32", precision=precision, **{"torch rounds": rounds})
        gpu["rows"] = measured.taken({"devices": {}}, outcome)["devices"]["NVIDIA H100"]["rows"]
        return gpu["rows"][0]

    assert rows(True, "highest")["seconds"].keys() == {"cuda", "triton"}
    assert estimates.compared(asked, ("torch", "cuda"))[1].startswith("predicted")
    assert estimates.compared(asked, ("cuda", "triton"))[1].startswith("measured")
    assert "torch rounds" not in rows(False, "high") and gpu["rows"][0]["seconds"].keys() == {"torch", "cuda", "triton"}
    assert estimates.compared(asked, ("torch", "cuda"))[1].startswith("predicted")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert estimates.compared(asked, ("torch", "cuda"))[1].startswith("measured")


def test_the_table_in_the_package_is_well_formed():
    for known in measurements.devices().values():
        assert known.keys() == {"measured", "torch", "cudnn", "keeps_contract", "rows"}
        for row in known["rows"]:
            assert row["seconds"] and all(value > 0 for value in row["seconds"].values())
    if not torch.cuda.is_available():
        assert measurements.known_of(GPU) is None and not measurements.keeps_contract("lstm", torch.float16, GPU)


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
