"""The benchmarks run end to end on tiny shapes, and what they compute about a run is right. No time is asserted."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recording import recording_case

from benchmarks import (
    gpu,
    harness,
    limits,
    report,
    results,
    run,
    tables,
    text,
    work,
)  # fmt: skip
from benchmarks.harness import FORWARD, TRAINING, Grid
from benchmarks.results import Group, Record

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
