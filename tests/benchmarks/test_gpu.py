"""What `make gpu` runs and keeps, as far as it shows without a GPU. No time is asserted."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from recording import recording_case

from benchmarks import (
    bench_additive_attention,
    bench_attention,
    bench_convolution,
    bench_recurrence,
    conftest,
    gpu,
    gpu_bars,
    harness,
    tables,
    tiles,
)  # fmt: skip
from benchmarks.harness import FORWARD, TRAINING, Grid
from s2s_kernels import dispatch
from s2s_kernels.testing import CASES, Draw

ROOT = Path(__file__).parent.parent.parent
# Where the suite runs in several processes, pytest-benchmark would take its own for one of them, and measure nothing.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
STEMS = ("recurrence", "convolution", "attention", "additive_attention", "models")


def test_without_a_gpu_nothing_is_done(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "devices", lambda: 0)
    monkeypatch.setattr(gpu, "command", lambda *a, **k: pytest.fail("something was run"))
    assert gpu.main([]) == 1 and gpu.main(["--present"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert tiles.main([]) == 1 and "nothing was done" in capsys.readouterr().err


def test_what_is_kept_of_a_command_names_no_place_of_the_machine(monkeypatch):
    monkeypatch.setenv("OUT", "/somewhere/out")
    words = [sys.executable, "-c", f"print('{gpu.ROOT}/benchmarks/gpu.py', '/somewhere/out/file')"]
    run = gpu.command(words, 20)
    assert run["output"] == "benchmarks/gpu.py $OUT/file" and run["command"].startswith("python -c")


def test_tiles_are_told_by_their_times(monkeypatch, capsys):
    def took(name, direction, sizes, measure=True):
        if sizes[0] == 128:
            return "OutOfResources: shared memory"
        return float(sizes[1] + sizes[2]) if measure else 0.0

    monkeypatch.setattr(gpu, "devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(2))
    monkeypatch.setattr(tiles, "microseconds", took)
    assert tiles.main(["bias64"]) == 0
    told = capsys.readouterr().out
    assert "bias64, query: now (" in told and "64.0 us (64, 32, 32, 128, 4, 3)" in told
    queries = told[told.index("bias64, query") : told.index("bias64, key")]
    assert queries.index(" 64.0 us") < queries.index(" 96.0 us") and "not compiled, (128," in queries
    with pytest.raises(SystemExit):
        tiles.main(["nothing"])


@pytest.mark.parametrize("kind", tiles.KINDS.values(), ids=tiles.KINDS)
def test_candidates_for_tiles_are_made_of_whole_edges(kind):
    for direction, candidates in kind.candidates.items():
        assert len(set(candidates)) == len(candidates)
        for rows, keys, edge, *_ in candidates:
            assert (rows if direction == "key" else keys) % edge == 0


FORKING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep({})
"""


@pytest.mark.parametrize("seconds, code", [(0, 0), (60, gpu.TIMED_OUT)])
def test_nothing_that_a_step_started_outlives_it(seconds, code, capsys):
    run = gpu.command([sys.executable, "-c", FORKING.format(seconds)], 5, environment={"S2S_BACKEND": "reference"})
    assert run["code"] == code and run["seconds"] < 20 and run.get("timed_out", False) == bool(code)
    assert ("KeyboardInterrupt" in run["output"]) == bool(code)
    assert ("timed out" in capsys.readouterr().err) == bool(code)
    child = Path(f"/proc/{run['output'].split()[0]}/stat")  # a zombie where nobody waits for it
    deadline = time.monotonic() + 5
    while child.exists() and child.read_text().rpartition(") ")[2][0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not child.exists() or child.read_text().rpartition(") ")[2][0] == "Z"


def test_one_sample_of_every_operator_is_run_on_each_backend_that_covers_it():
    served = gpu.samples("cpu", ("cpu", "triton"))
    assert all(backends == ["cpu"] for backends in served.values()) and served.keys() >= {"lstm", "attention_pool"}


def test_each_option_of_the_compiled_kernels_is_run_in_two_dtypes(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "use_backend", lambda name: contextlib.nullcontext())
    gpu.samples("cpu", ("cuda",))
    lines = [line.split("torch.") for line in capsys.readouterr().out.splitlines() if line.startswith("cuda lstm ")]
    ran = [head for head, _ in lines]
    assert ran[::2] == ran[1::2] and len(ran) >= 8
    chosen = [sample for sample in CASES["lstm"].samples if f"cuda lstm {sample.name} " in ran]
    assert {option for sample in chosen for option in sample.build(Draw())[1]} >= gpu.OPTIONS


@pytest.fixture
def told(monkeypatch):
    """What would be run is kept, and nothing run; the answers are these."""
    calls, answers = [], {"code": 0, "seconds": 1.0, "output": 'a warning\n["lstm float16"]'}
    monkeypatch.setattr(gpu, "command", lambda words, limit, **options: calls.append((words, limit)) or dict(answers))
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: f"/bin/{name}")
    monkeypatch.setattr(gpu, "devices", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "facts", lambda: {"gpu": "NVIDIA H100"})
    return calls, answers


def test_every_step_runs_within_its_time_and_the_exit_code_tells(told, monkeypatch, tmp_path, capsys):
    calls, answers = told
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--within", "1000"]) == 0
    said = [" ".join(words) for words, _ in calls]
    for part in ("-m gpu -n", "--tool memcheck", "--tool racecheck", "--tool synccheck", "benchmarks.choice --probe"):
        assert sum(part in line for line in said) == 1, part
    assert sum("--compile" in line for line in said) == 3
    measured = [(line, limit) for line, (_, limit) in zip(said, calls, strict=True) if "--deadline" in line]
    assert [line.partition("--dtype=")[2].split()[0] for line, _ in measured] == ["bfloat16", "float16", "float32"]
    assert all("-k GPU" in line and limit < 200 for line, limit in measured)
    assert "bench_recurrence.py" in measured[1][0] and "bench_recurrence.py" not in measured[0][0]
    assert sum(float(line.partition("--deadline=")[2].split()[0]) for line, _ in measured) == pytest.approx(200, abs=2)
    outcome = json.loads((tmp_path / "gpu.json").read_text())
    assert outcome["keeps_contract"] == ["lstm float16"] and outcome["sanitizer"]["racecheck"]["code"] == 0

    calls.clear()
    answers |= {"code": gpu.TIMED_OUT, "timed_out": True}
    assert gpu.main(["--within", "500", "--since", str(time.time() - 400)]) == 1
    assert len(calls) == 11 and max(limit for _, limit in calls) <= 100 + gpu.GRACE
    assert max(limit for words, limit in calls if "tests" in words) < 0 < calls[-1][1]
    errors = capsys.readouterr().err
    assert "failed: memcheck: timed out, 1.0 s" in errors and "failed: benchmarks, float32: timed out" in errors
    assert json.loads((tmp_path / "gpu.json").read_text())["keeps_contract"] is None

    calls.clear()
    answers |= {"code": 0}
    assert gpu.main(["--steps", "contract"]) == 0 and len(calls) == 1
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    assert gpu.sanitizer(1.0) == "compute-sanitizer is not installed"


@pytest.fixture
def for_a_gpu(monkeypatch):
    """The cases made for a GPU in a dtype, by suite; nothing is asked of a device."""
    monkeypatch.setattr(bench_recurrence, "able", lambda *layer: ["cuda", "triton"])
    monkeypatch.setattr(bench_attention, "serves", lambda *call: True)
    suites = (bench_recurrence, bench_attention, bench_convolution, bench_additive_attention)
    return lambda dtype: [case for suite in suites for case in suite.for_a_gpu(Grid(device="cuda", dtype=dtype))]


def test_every_bar_of_a_gpu_has_cases_named_for_one(for_a_gpu):
    cases = for_a_gpu(torch.bfloat16)
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.row.startswith("GPU ") and case.time <= 2048 and "loop" not in case.entrants for case in cases)
    assert all(case.bar or not case.quick for case in cases)
    by_bar = {bar: [case for case in cases if case.bar == bar] for bar in ("GR1", "GR4", "GC1", "GC2", "GA1", "GA2")}
    assert all(any(case.quick for case in found) for found in by_bar.values())
    assert {case.bar for case in cases} == {*by_bar, "GD1", ""}
    assert [case.name for case in for_a_gpu(torch.float16) if case.bar == "GR2"] == ["GPU LSTM B16 H768 T1024"]
    for ask in gpu_bars.ASKS:
        if ask.missing:
            continue
        found = [case for case in for_a_gpu(getattr(torch, ask.dtype)) if case.bar == ask.bar]
        rivals = [set(case.entrants) & set(ask.against) for case in found]
        assert found and all(ask.entrant in case.entrants for case in found)
        assert ask.limit or all(rivals) or not ask.against
    compiled = {case.bar for case in cases if "compile" in case.entrants}
    flexible = [case for case in cases if "flex" in case.entrants]
    assert compiled == {"GD1"} and len(flexible) == 4 and all("D128" in case.row for case in flexible)


def test_bars_come_first_on_a_gpu():
    case = recording_case([])
    cases = {"other": case, "bar": dataclasses.replace(case, bar="GC1"), "first": harness.on_gpu(case, "GA1", True)}
    config = types.SimpleNamespace(stash=pytest.Stash(), getoption={"--device": "cuda"}.get)
    config.stash[conftest.CASES] = {(name, FORWARD): case for name, case in cases.items()}
    items = [
        types.SimpleNamespace(name=name, callspec=types.SimpleNamespace(params={"case": name, "direction": FORWARD}))
        for name in ("other", "bar", "first", "bar", "first")
    ]
    items.append(types.SimpleNamespace(name="another suite's"))
    conftest.pytest_collection_modifyitems(config, items)
    assert [item.name for item in items] == ["first", "first", "bar", "bar", "other", "another suite's"]


def test_every_bar_has_its_turn_on_a_gpu():
    case, bars = recording_case([]), ["GA1"] * 3 + ["GR1"] * 2 + ["GD1"]
    cases = {(f"{bar} {n}", FORWARD): harness.on_gpu(case, bar, True) for n, bar in enumerate(bars)}
    items = [
        types.SimpleNamespace(name=name, callspec=types.SimpleNamespace(params={"case": name, "direction": direction}))
        for name, direction in cases
        for _ in ("ours", "torch")
    ]
    conftest.in_turns(items, cases)
    assert [item.name[:3] for item in items[::2]] == ["GA1", "GR1", "GD1", "GA1", "GR1", "GA1"]
    assert [item.name for item in items[::2]] == [item.name for item in items[1::2]]


@pytest.mark.parametrize("kind", ["dense", "lengths", "bias", "causal"])
def test_attention_of_a_gpu_runs_here_too(kind, monkeypatch):
    monkeypatch.setattr(bench_attention, "serves", lambda *call: False)
    case = bench_attention.on_a_gpu(Grid(), kind, 1, 8, 6, 9, bar="GA1", count=2)
    measured = harness.measure(case, TRAINING, budget=0.0)
    assert measured.keys() == {"ours", "sdpa"} and case.row.endswith("S9 D8")
    harness.compile(case, "ours", device="cpu", dtype=torch.float32)


def test_a_gpus_grid_measures_the_choice_among_backends(monkeypatch):
    monkeypatch.setattr(bench_recurrence, "able", lambda *layer: [])
    chosen = [case for case in bench_recurrence.for_a_gpu(Grid(device="cuda")) if case.sizes is not None]
    assert len(chosen) > 20
    for case in chosen:
        assert case.entrants[:2] == ("ours", "torch")
        facts = {"cell", "batch", "inputs", "hidden", "width", "layers", "directions", "precision", "torch rounds"}
        assert case.sizes.keys() == facts
        assert f"B{case.sizes['batch']} H{case.sizes['hidden']}" in case.row
    kinds = {(case.sizes["cell"], case.sizes["layers"], case.sizes["directions"]) for case in chosen}
    assert {("lstm", 1, 1), ("gru", 2, 2), ("rnn_tanh", 1, 1), ("lstm", 2, 1), ("gru", 1, 2)} <= kinds
    measured = harness.measure(dataclasses.replace(chosen[0], time=2), FORWARD, budget=0.0)
    assert measured.keys() == set(chosen[0].entrants)


def test_what_is_lost_is_told_and_what_compiles_is_called_once():
    """A run whose time is up before it begins, and one that only compiles."""
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/bench_convolution.py", "-k", "TCN and d16", "-rA"]
    outcomes = {
        "--deadline=-1": ("the time of this run is up", "6 skipped"),
        "--compile": ("d16 T784-forward+backward-ours", "1 passed"),
    }
    for option, (said, outcome) in outcomes.items():
        options = [*command, option, "--any-load"]
        done = subprocess.run(options, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stdout and outcome in done.stdout, done.stdout + done.stderr


def gpu_result(dtype, bar, direction, best, **more):
    """A case of a result of `make gpu`, with the best seconds of its entrants."""
    facts = {"bar": bar, "direction": direction, "dtype": dtype, "limit_seconds": 0.5, **more}
    return [
        {"group": f"{bar} {direction} {best}", "extra_info": {**facts, "entrant": name}, "stats": {"min": seconds}}
        for name, seconds in best.items()
    ]


def test_the_bars_of_a_gpu_become_a_table(tmp_path, monkeypatch):
    assert "Not measured yet" in gpu_bars.table([])[0]
    empty = [line for line in gpu_bars.table([]) if line.startswith("| G")]
    assert len(empty) == len(gpu_bars.ASKS) and all("not measured" in line or "FlashRNN" in line for line in empty)
    entries = [
        *gpu_result("bfloat16", "GR1", FORWARD, {"ours": 1.0, "torch": 4.0, "cuda": 0.5}),
        *gpu_result("bfloat16", "GR1", TRAINING, {"ours": 1.0, "torch": 0.9}),
        *gpu_result("bfloat16", "GC1", TRAINING, {"ours": 1.0, "F.pad": 3.0, "chomp": 1.5, "deterministic": 6.0}),
        *gpu_result("bfloat16", "GC2", FORWARD, {"ours": 0.625, "F.pad": 9.0}),
        *gpu_result("bfloat16", "GA2", FORWARD, {"ours": 1.0, "triton": 2.0, "sdpa": 1.1, "sdpa cudnn": 1.0}),
    ]
    lost = {"case, forward+backward": {"bar": "GC1", "reason": "AssertionError"}}
    late = {"other, forward": {"bar": "GR1", "reason": "the time is up"}}
    results = {"benchmarks": entries, "failed": lost, "skipped": late}
    facts = {"gpu": "NVIDIA H100", "torch": "2.11", "cudnn": 91000, "date": "2026-02-03"}
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    parts = []
    for place, part in enumerate(({"tests": {"code": 0}}, {"benchmarks": {"bfloat16": {"results": results}}})):
        parts.append(tmp_path / f"{place}.json")
        parts[-1].write_text(json.dumps({"facts": facts, **part}))
    kept = tables.take_in_gpu(parts)
    assert kept == tmp_path / "nvidia-h100" / "gpu.json" and json.loads(kept.read_text()).keys() >= {
        "tests",
        "benchmarks",
    }
    lines = gpu_bars.table(tmp_path.glob("*/gpu.json"))
    assert lines[0] == "NVIDIA H100; torch 2.11, cuDNN 91000. `make gpu`, 2026-02-03."
    rows = {line.split(" | ")[0].strip("| "): [] for line in lines if line.startswith("| G")}
    for line in lines:
        if line.startswith("| G"):
            rows[line.split(" | ")[0].strip("| ")].append([cell.strip() for cell in line.split("|")[3:-1]])
    assert rows["GR1"] == [
        ["mean 2.00x, each 1.00x", "4.00x, mean 4.00x", "0.90x, mean 0.90x",
         "1 of 2, the mean does not, 1 not reached"]
    ]  # fmt: skip
    assert rows["GC1"] == [["1.20x", "", "1.50x", "1 of 1, 1 failed"], ["5.00x", "", "6.00x", "1 of 1, 1 failed"]]
    assert rows["GC2"] == [["90 %", "80 %", "not measured", "0 of 1"]]
    assert rows["GA2"][0] == ["0.80x", "0.50x", "not measured", "0 of 1"]
    assert rows["GA2"][1] == ["0.97x", "1.00x", "not measured", "1 of 1"]
    assert rows["GR2"] == [["1.00x", "not measured", "not measured", ""]]
    assert "FlashRNN" in rows["GR3"][0][1]
    parts[0].write_text(json.dumps({"facts": {"gpu": "another"}}))
    with pytest.raises(ValueError, match="not results of one GPU"):
        tables.take_in_gpu(parts)


@pytest.mark.gpu
def test_one_sample_of_every_operator_runs_on_the_gpu():
    served = gpu.samples()
    assert served["lstm"] == served["gru"] == served["rnn"] == ["cuda", "triton"]
    assert all(served.values())


@pytest.mark.gpu
def test_the_units_for_tangents_are_measured():
    from benchmarks import tangents

    numbers = torch.full((2**20,), 0.5, device="cuda")
    tangents.run(numbers)
    expected = torch.tensor(0.5, dtype=torch.float64)
    for _ in range(tangents.ROUNDS):
        expected = expected.tanh()
    torch.testing.assert_close(numbers.cpu().double(), expected.expand(2**20), rtol=0.05, atol=0)
    assert tangents.count(numbers) == numbers.numel() * tangents.ROUNDS
