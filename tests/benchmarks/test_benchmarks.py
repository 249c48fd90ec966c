"""The benchmarks run end to end on tiny shapes, and what they compute about a run is right. No time is asserted."""

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

from benchmarks import (
    bench_additive_attention,
    bench_attention,
    bench_convolution,
    bench_recurrence,
    conftest,
    gpu,
    gpu_bars,
    harness,
    limits,
    report,
    results,
    run,
    tables,
    text,
    tiles,
    work,
)  # fmt: skip
from benchmarks.harness import FORWARD, TRAINING, Case, Entrant, Grid
from benchmarks.results import Group, Record
from s2s_kernels import dispatch
from s2s_kernels.testing import CASES, Draw

ROOT = Path(__file__).parent.parent.parent
# Where the suite runs in several processes, pytest-benchmark would take its own for one of them, and measure nothing.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
STEMS = ("recurrence", "convolution", "attention", "additive_attention", "models")


def collected(*options):
    files = [f"benchmarks/bench_{stem}.py" for stem in STEMS]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *files, *options]
    done = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_suite_has_a_quick_grid_and_a_longer_one():
    quick, longest = collected("--quick"), collected("--longest=16384")
    for stem in STEMS:
        assert quick.count(f"bench_{stem}.py::") >= 10, stem
        assert longest.count(f"bench_{stem}.py::") > quick.count(f"bench_{stem}.py::"), stem
    assert " T16384-" in longest and " T4096-" in longest and " T32-" in longest
    assert " T16384-" not in quick


def test_a_run_ends_with_results_a_page_and_plots(tmp_path):
    sample = tmp_path / "sample.txt"
    sample.write_text("In the beginning was the word, and the word was with care. " * 400)
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--any-load", "--threads", "1", "--budget", "0.001"]
    command += ["--train-seconds", "0.2", "--text", str(sample), "--select", "T32- or test_training"]
    command += ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, check=False, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    page = Path(done.stdout.strip().split("\n")[-1])
    assert page == tmp_path / "out" / "report.html"
    content = page.read_text()
    assert "data:image/png;base64," in content and "http" not in content  # self-contained
    for part in ("benchmarks.run --quick", torch.__version__, "sample.txt", "GFLOP/s"):
        assert part in content, part
    drawn = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert drawn >= {"families_time", "families_memory", "families_parallelism", "training"}
    assert drawn >= {f"{stem}_peers" for stem in STEMS if stem != "models"}

    measured = json.loads((tmp_path / "results" / "quick-1-thread.json").read_text())
    assert "node" not in measured["machine_info"] and measured["machine_info"]["limits"]["flops"] > 1e8
    for entry in measured["benchmarks"]:
        facts = entry["extra_info"]
        assert entry["stats"]["min"] > 0 and entry["stats"]["rounds"] == len(entry["stats"]["data"])
        assert facts["flops"] > 0 and facts["fraction_of_limit"] > 0 and facts["tokens_per_second"] > 0
        assert facts.get("entrant") == "onnxruntime" or facts["peak_bytes"] > 0
        assert len(facts["load_average"]) == 2
    suites = {entry["extra_info"]["suite"] for entry in measured["benchmarks"]}
    assert suites == {*STEMS, "training"}
    trained = [entry["extra_info"] for entry in measured["benchmarks"] if entry["extra_info"]["suite"] == "training"]
    assert {facts["entrant"] for facts in trained} == {"lstm", "tcn", "transformer"}
    assert all(0 < facts["bits_per_character"] < 9 and facts["evaluations"] for facts in trained)


def recording_case(log, time=8, agree=True):
    def build(inputs, length):
        x = inputs.noise(length, 3)

        def entrant(name, result):
            def function():
                log.append((name, length))
                return result(x)

            return Entrant(function, (x,))

        return {"ours": entrant("ours", torch.tanh), "peer": entrant("peer", torch.tanh if agree else torch.exp)}

    return Case("tanh", time, time, build, lambda t: work.simple(t, t), ("ours", "peer"))


@pytest.mark.parametrize("direction", [FORWARD, TRAINING])
def test_rounds_are_interleaved_and_change_the_length(monkeypatch, direction):
    monkeypatch.setattr(harness, "ROUND", 0.0)  # one call a round
    monkeypatch.setattr(harness, "explain", lambda function: harness.Any)
    monkeypatch.setattr(harness.Any, "backend", "cpu", raising=False)
    log = []
    measured = harness.measure(recording_case(log), direction, budget=0.0)
    # No budget: one round at each length, however slow the machine.
    assert [len(m.seconds) for m in measured.values()] == [3, 3]
    assert all(value > 0 for m in measured.values() for value in m.seconds)
    rounds = log[-2 * 3 - 2 : -2]  # the last two calls are watched, not timed
    assert rounds == [(name, length) for length in (8, 7, 6) for name in ("ours", "peer")]


def test_a_peer_that_computes_something_else_is_refused():
    with pytest.raises(AssertionError, match="peer differs from ours"):
        harness.measure(recording_case([], agree=False), FORWARD)


def test_inputs_are_noise_and_are_written_between_rounds():
    inputs = harness.Inputs()
    x = inputs.noise(4, 5)
    linear = inputs.module(torch.nn.Linear(2, 2))
    assert x.requires_grad and (x != 0).all() and any(p is linear.weight for p in inputs.touched)
    version = x._version
    harness.touch(inputs)
    assert x._version == version + 1


def test_a_busy_machine_is_refused(monkeypatch):
    monkeypatch.setattr(harness, "load_average", lambda: 1.4)
    harness.check_load(1)
    monkeypatch.setattr(harness, "load_average", lambda: 1.6)
    harness.check_load(2)
    with pytest.raises(harness.Refused, match=r"1\.60 exceeds the 1 thread used"):
        harness.check_load(1)


def test_peak_memory_counts_what_is_alive_at_once():
    def call():
        a = torch.ones(1000, dtype=torch.float64)
        b = a + 1  # 16,000 bytes alive
        del a
        return b + 1

    peak, algorithm = harness.observe(call, "cpu")
    assert 16000 <= peak < 16100 and "aten::" in algorithm


def test_counts_by_hand():
    lstm = work.recurrence(4, 2, 10, 3, 5, 10)
    assert lstm.flops == 8 * 2 * 10 * 5 * (3 + 5) and lstm.path == 10
    assert work.recurrence(3, 2, 10, 3, 5, 10).flops == 6 * 2 * 10 * 5 * (3 + 5)
    conv = work.convolution(2, 10, 4, 6, 3)
    assert conv.flops == 2 * 2 * 10 * 3 * 4 * 6 and conv.path == 1
    assert conv.bytes == 4 * (2 * 10 * (4 + 6) + 6 * 4 * 3)
    assert work.convolution(2, 10, 4, 4, 3, groups=4).flops == 2 * 2 * 10 * 3 * 4
    assert work.attention(2, 3, 5, 7, 11).flops == 4 * 2 * 3 * 5 * 7 * 11
    both = work.with_backward(lstm)
    assert both.flops == 3 * lstm.flops and both.bytes == 2 * lstm.bytes and both.path == 20
    assert both.parallelism == both.flops / 20
    assert work.with_backward(conv).bytes == conv.bytes + 4 * (2 * 10 * (2 * 4 + 6) + 2 * 6 * 4 * 3)
    assert work.with_backward(conv).scaled(2).bytes == work.with_backward(conv.scaled(2)).bytes
    tangents_of = work.additive_attention(2, 3, 5, 7, 11)
    assert work.with_backward(tangents_of.scaled(2)).phases[1].special == 2 * 3 * 5 * 7
    assert lstm.scaled(2).bytes == lstm.bytes / 2 and lstm.scaled(2).flops == lstm.flops


def test_counts_of_the_models_follow_their_layers():
    from s2s_kernels.models import LANGUAGE_MODELS

    width, time = 128, 16
    amount = {name: work.language_model(name, 1, time, build()) for name, build in LANGUAGE_MODELS.items()}
    assert amount["lstm"].flops == 8 * time * 368 * (128 + 368) + 2 * time * 368 * 256
    assert amount["tcn"].flops == time * (16 * 2 * 3 * width**2 + 2 * width * 256)
    attended = 4 * width * time * (time + 1) / 2
    assert amount["transformer"].flops == 4 * (24 * time * width**2 + attended) + 2 * time * width * 256
    # A step for each position or each layer, and one for the logits.
    assert [amount[name].path for name in ("lstm", "tcn", "transformer")] == [time + 1, 16 + 1, 4 * 5 + 1]


def test_the_limit_takes_the_slower_of_arithmetic_and_memory():
    bounds = limits.Limits(1e9, (("L2", 1000.0, 1e9), ("DRAM", float("inf"), 1e8)))
    near, far = work.Phase(10.0, 100.0, 1000.0), work.Phase(10.0, 100.0, 1001.0)
    assert bounds.seconds(work.Work((near,), 1)) == pytest.approx(100 / 1e9)
    assert bounds.seconds(work.Work((far,), 1)) == pytest.approx(100 / 1e8)
    assert bounds.seconds(work.Work((work.Phase(1e3, 1.0, 1.0), far), 1)) == pytest.approx(1e-6 + 1e-6)
    bounds = dataclasses.replace(bounds, special=1e3)
    assert bounds.seconds(work.Work((dataclasses.replace(near, special=7.0),), 1)) == pytest.approx(7e-3)
    assert bounds.as_dict()["special"] == 1e3


def test_the_grid_grows_with_its_longest():
    assert Grid().lengths()[-1] == 4096 and Grid(longest=16384).lengths()[-1] == 16384
    assert Grid(longest=100).lengths() == [32, 64]


def entry(name, entrant, low, **facts):
    known = {
        "suite": "convolution", "row": name, "entrant": entrant, "direction": FORWARD, "T": 32, "tokens": 32,
        "threads": 1, "limit_seconds": 0.5, "load_exceeded": False, "peak_bytes": 1, "tokens_per_second": 1.0,
        "algorithm": "",
    }  # fmt: skip
    stats = {"min": low, "median": 2 * low}
    return {"group": f"{name}, forward", "name": name, "extra_info": {**known, **facts}, "stats": stats}


def write_results(path, *entries):
    machine = {
        "processor_name": "a processor", "cores": 2, "instruction_set": "avx2", "gpu": None, "torch": "2.13",
        "python_version": "3.11", "system": "Linux", "command": "a command", "threads": 1, "limits": None,
    }  # fmt: skip
    path.write_text(
        json.dumps({"machine_info": machine, "datetime": "2026-01-02T03:04:05.6+00:00", "benchmarks": list(entries)})
    )
    return path


def test_processes_are_merged_by_the_fastest_round(tmp_path):
    one = write_results(
        tmp_path / "1.json", entry("conv", "ours", 1.0), entry("conv", "a", 3.0), entry("conv", "b", 5.0)
    )
    two = write_results(
        tmp_path / "2.json", entry("conv", "ours", 2.0), entry("conv", "a", 4.0), entry("conv", "b", 2.5)
    )
    loaded = results.load([one, two])
    (group,) = loaded.groups
    assert group.ours.best == 1.0 and group.ours.medians == [2.0, 4.0] and group.ours.fraction_of_limit == 0.5
    assert group.rival.entrant == "b" and group.ratio == 2.5


def test_other_files_are_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("{}")
    assert report.main([str(tmp_path / "other.json"), "--out", str(tmp_path)]) == 1
    assert "not a JSON file of pytest-benchmark" in capsys.readouterr().err
    assert report.main([str(tmp_path / "missing.json")]) == 1
    empty = write_results(tmp_path / "empty.json")
    assert report.main([str(empty), "--out", str(tmp_path)]) == 1
    assert "nothing was measured" in capsys.readouterr().err


def test_a_marked_measurement_is_told(tmp_path, capsys):
    file = write_results(tmp_path / "1.json", entry("conv", "ours", 1.0, load_exceeded=True), entry("conv", "a", 3.0))
    assert report.main([str(file), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "conv T32*" in printed and "3.00x" in printed and "1 of 2 measurements" in printed


def test_three_lengths_make_a_curve(tmp_path, capsys):
    entries = [entry("conv", name, t / 10, T=t, row="conv") for t in (32, 64, 128) for name in ("ours", "a", "b")]
    for each in entries:
        each["group"] += str(each["extra_info"]["T"])
    assert report.main([str(write_results(tmp_path / "1.json", *entries)), "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html",
        "convolution_peers.png",
        "convolution_lengths.png",
    }
    assert capsys.readouterr().out.strip().endswith("report.html")


def test_exponents_by_hand():
    assert results.exponent([(t, 7 * t**1.5) for t in (10, 100, 1000)]) == pytest.approx(1.5)
    assert results.geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2.0)


def test_a_group_without_a_peer_has_no_ratio():
    group = Group({"ours": Record("g", {}, 1.0, [1.0])})
    assert group.rival is None and group.ratio is None


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


def test_what_is_kept_of_a_result_is_small(tmp_path):
    whole = json.loads(write_results(tmp_path / "1.json", entry("conv", "ours", 1.0, load_average=(1, 2))).read_text())
    whole["benchmarks"][0]["stats"] |= {"data": [1.0] * 100, "rounds": 100}
    whole["skipped"] = {"case, forward": {"bar": "", "reason": "late"}}
    small = gpu.trimmed(whole)
    assert small["skipped"] == whole["skipped"] and small["failed"] == {}
    (kept,) = small["benchmarks"]
    assert kept["stats"] == {"min": 1.0, "median": 2.0, "rounds": 100}
    assert kept["extra_info"]["entrant"] == "ours" and "load_average" not in kept["extra_info"]


def test_the_text_is_pythons_own_or_a_file(tmp_path):
    tokens = text.load()
    assert len(tokens) > 300_000 and tokens.dtype == torch.int64 and tokens.min() >= 0 and tokens.max() < 256
    training, held_out = text.split(tokens)
    assert len(held_out) == len(tokens) // 10 and len(training) + len(held_out) == len(tokens)
    (tmp_path / "own.txt").write_bytes(b"abc")
    assert text.load(str(tmp_path / "own.txt")).tolist() == [97, 98, 99]
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        text.load(str(tmp_path / "empty.txt"))


def bars_file(path, threads, ratio):
    row = {"bar": "R3", "label": "LSTM fwd", "ours_s": [1, 1], "rival": "torch", "rival_s": [1, 1], "at_least": 1.3}
    rows = [{**row, "ratio": ratio, "ok": ratio >= 1.3}, {**row, "ratio": 2.0, "ok": True}]
    rows.append({"bar": "C3", "label": "error", "error": "missing", "ok": False})
    path.write_text(json.dumps({"torch": "2.13", "threads": threads, "rows": rows}))
    return path


def test_bars_become_a_table_with_machine_date_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "machine_folder", lambda: tmp_path / "results")
    for threads, ratio in ((1, 1.1), (2, 1.5)):
        kept = tables.take_in(bars_file(tmp_path / "bars.json", threads, ratio), "speed.py --json bars.json")
        assert kept.name == f"bars-{threads}-thread{'' if threads == 1 else 's'}.json"
    lines = tables.bars((tmp_path / "results").glob("*.json"))
    head = lines[0]
    assert "cores" in head and "`speed.py --json bars.json`" in head and "1 thread:" in head and "-" in head
    assert "| R3 | LSTM forward, one sequence | 1.30x | 1.10x to 2.00x | 1.50x to 2.00x | 1 of 2, 2 of 2 |" in lines
    assert any(line.startswith("| C3 |") and "fails" in line and "0 of 1" in line for line in lines)
    readme = "a\n<!-- bars:begin -->\nold\n<!-- bars:end -->\nb\n"
    assert tables.replaced(readme, "bars", ["new"]) == "a\n<!-- bars:begin -->\nnew\n<!-- bars:end -->\nb\n"
    with pytest.raises(ValueError, match="no markers"):
        tables.replaced(readme, "operators", [])


def test_the_folder_of_results_names_the_machine(monkeypatch):
    monkeypatch.setattr(run.machine, "processor", lambda: "Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz")
    monkeypatch.setattr(run.os, "cpu_count", lambda: 12)
    assert run.machine_folder().name == "intel-core-i7-9750h-12-cores"


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
