"""The choice among cuDNN and our kernels of recurrences on CUDA tensors, as far as it shows without any."""

import itertools
import json
import math

import pytest
import torch
from recurring import GPU, PLAIN, needs_extension, needs_triton, reason

from benchmarks import choice as measured
from s2s_kernels import dispatch
from s2s_kernels.ops import recurrence
from s2s_kernels.ops.recurrence import OPERATORS, builtin, cuda_kernels, estimates, measurements


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
    known = {"cudnn": torch.backends.cudnn.version(), "rows": []}
    known["keeps_contract"] = ["lstm float16", "gru float16"]
    monkeypatch.setattr(measurements, "known_of", lambda device: known)
    torch.use_deterministic_algorithms(False)
    estimates.predicted.cache_clear()
    yield known
    estimates.predicted.cache_clear()


@needs_extension
def test_no_more_is_laid_over_a_device_than_is_resident(gpu):
    """Row 28: blocks that wait for one another must all be there. A cluster that isn't makes way for the grid."""
    shape = cuda_kernels.Shape(64, 128, 128, 0, torch.bfloat16, False, False)

    def plan(clusters, grids):
        class Kernels(cuda_kernels.kernels):
            @staticmethod
            def recurrence_persistent_resident(plan, operand, backward, device):
                answer = clusters if plan[0] else grids
                if answer is None:
                    raise RuntimeError("invalid cluster size")
                return answer

        return cuda_kernels._plan(Kernels, shape, 1, False, 0, (132, 227 << 10, True), 1)

    whole = plan(99, 0)
    teams = cuda_kernels.TEAM + 1
    assert whole[0] and whole[teams] > 1 and plan(1, 0) == (*whole[:teams], 1, *whole[teams + 1 :])
    for clusters in (0, None):
        grid = plan(clusters, 99)
        assert grid and not grid[0] and grid[teams] > 1
        assert plan(clusters, 1) == (*grid[:teams], 1, *grid[teams + 1 : -1], grid[-1] // grid[teams])
        assert plan(clusters, 0) == ()
        with pytest.raises(RuntimeError, match="cluster size"):
            plan(clusters, None)


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
def test_a_choice_is_known_from_the_call_before(gpu, monkeypatch):
    """While nothing that it depends on has changed."""
    rounds, asked = [], []
    monkeypatch.setattr(builtin, "rounds_more", lambda: bool(rounds))
    original = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *args: asked.append(1) or original(*args))
    recurrence._known.cache_clear()
    for _ in range(3):
        assert recurrence.chosen(PLAIN, True) == "torch" and len(asked) == 1
    assert recurrence.chosen(PLAIN, False) == "torch" and len(asked) == 2
    assert recurrence.chosen(PLAIN._replace(batch=20), True) == "cuda" and len(asked) == 3
    with dispatch.use_backend("triton"):
        assert recurrence.chosen(PLAIN, True) == "triton"
        with dispatch.use_backend("cpu"), pytest.raises(NotImplementedError, match="CPU tensors"):
            recurrence.chosen(PLAIN, True)
    torch.use_deterministic_algorithms(True)
    assert recurrence.chosen(PLAIN, True) == "cuda"
    torch.use_deterministic_algorithms(False)
    with torch.backends.cudnn.flags(enabled=False):
        assert recurrence.chosen(PLAIN, True) == "cuda"
    told = dispatch.explain(lambda: recurrence.chosen(PLAIN, True))
    assert told.backend == "torch"
    assert recurrence.chosen(PLAIN, True) == "torch"
    gpu["keeps_contract"].append("lstm float32")
    single = PLAIN._replace(dtype=torch.float32, hidden=64, width=64, inputs=64)
    assert recurrence.chosen(single, True) == "torch"
    rounds.append(1)
    assert recurrence.chosen(single, True) != "torch"
    recurrence._known.cache_clear()


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
        "benchmarks": {
            "float16": {"results": {"benchmarks": entries, "datetime": "2026-02-03T05:06:07.9+01:00"}},
            "bfloat16": {"results": None},
        },
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
    assert (h100["cudnn"], h100["keeps_contract"]) == (91000, ["lstm float16"])
    (row,) = h100["rows"]
    assert row["measured"] == "2026-02-03 04:06 UTC"
    assert row["seconds"] == {"torch": 3e-3, "cuda": 2e-3, "triton": 4e-3}
    assert (row["time"], row["dtype"], row["recording"], row["hidden"]) == (1000, "float16", False, 768)
    # What is measured anew takes its place, where the libraries are others all of it.
    again = measured.taken({"devices": devices}, result({**TIMES, "cuda": 1e-3}))["devices"]["NVIDIA H100"]
    assert [row["seconds"]["cuda"] for row in again["rows"]] == [1e-3] and again["keeps_contract"] == ["lstm float16"]
    more = result(TIMES, batch=64)
    assert [row["batch"] for row in measured.taken({"devices": devices}, more)["devices"]["NVIDIA H100"]["rows"]] == [
        16,
        64,
    ]
    more["facts"]["cudnn"] += 1
    other = measured.taken({"devices": devices}, more)["devices"]["NVIDIA H100"]
    assert [row["batch"] for row in other["rows"]] == [64] and other["keeps_contract"] == []
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
    where = "measured on this device on 2026-02-03 04:06 UTC, for 16 x 1000 of 768 -> 768"
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
        assert known.keys() == {"torch", "cudnn", "keeps_contract", "rows"}
        for row in known["rows"]:
            assert (
                row["measured"].endswith(" UTC")
                and row["seconds"]
                and all(value > 0 for value in row["seconds"].values())
            )
    if not torch.cuda.is_available():
        assert measurements.known_of(GPU) is None and not measurements.keeps_contract("lstm", torch.float16, GPU)
