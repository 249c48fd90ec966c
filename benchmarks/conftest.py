"""Runs the cases of a suite: each entrant is a test, and all entrants of a case are measured together, in interleaved
rounds, when the first of them comes up. pytest-benchmark then gets each entrant's own times, and writes its usual JSON.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from s2s_kernels import machine

from . import harness, limits
from .harness import FORWARD, Case, Grid, Measured, Refused
from .results import OURS
from .work import with_backward

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What this run keeps: its cases by name and direction, their number, the machine's limits.
CASES = pytest.StashKey[dict[tuple[str, str], Case]]()
TOTAL = pytest.StashKey[int]()
LIMITS = pytest.StashKey[limits.Limits]()
# The cases that were skipped or failed: of each its bar, and why.
LOST = pytest.StashKey[dict[str, dict[str, dict[str, str]]]]()
COMPILED = ("ours", "triton", "flex", "compile")  # entrants that may compile when they are first called


class Replay:
    """A clock for pytest-benchmark that passes only while `advance` runs, by the times already measured."""

    __name__ = "replay of interleaved rounds"  # how the results name it

    def __init__(self) -> None:
        self.now = 0.0
        self.pending: list[float] = []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        if self.pending:
            self.now += self.pending.pop(0)


REPLAY = Replay()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("s2s_kernels benchmarks")
    group.addoption("--quick", action="store_true", help="the small grid that `make bench` runs")
    group.addoption("--longest", type=int, default=4096, help="greatest sequence length T (default 4096)")
    group.addoption("--threads", type=int, default=1, help="threads of torch (default 1)")
    group.addoption("--budget", type=float, default=1.0, help="seconds of rounds for each case (default 1)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu")
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32")
    group.addoption("--any-load", action="store_true", help="measure, and mark the result, however busy the machine is")
    group.addoption("--patience", type=float, default=120.0, help="seconds to wait in all for the load to fall")
    group.addoption("--compile", action="store_true", help="only run once what compiles when it is called; no timing")
    group.addoption("--deadline", type=float, default=float("inf"), help="seconds after which no further case begins")
    group.addoption("--text", help="train the model families on this file, not on Python's own documentation")
    group.addoption("--train-seconds", type=float, help="training time of each model family")


def pytest_cmdline_main(config: pytest.Config) -> None:
    """malloc reads its settings when a process starts: begin again with them."""
    if all(os.environ.get(name) == value for name, value in harness.ENVIRONMENT.items()):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.stop_global_capturing()  # which gives the real output back
    sys.stdout.flush()
    command = [sys.executable, "-m", "pytest", *config.invocation_params.args]
    os.execve(sys.executable, command, {**os.environ, **harness.ENVIRONMENT})


def pytest_configure(config: pytest.Config) -> None:
    lost: dict[str, dict[str, dict[str, str]]] = {"skipped": {}, "failed": {}}
    config.stash[LOST] = lost


def grid_of(config: pytest.Config) -> Grid:
    option = config.getoption
    return Grid(option("--quick"), option("--longest"), option("--device"), DTYPES[option("--dtype")])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entrant" not in metafunc.fixturenames:
        return
    grid = grid_of(metafunc.config)
    rows = []
    for case in grid.chosen(metafunc.module.cases(grid)):
        for direction in case.directions:
            metafunc.config.stash.setdefault(CASES, {})[case.name, direction] = case
            rows += [(case.name, direction, name) for name in case.entrants]
    if metafunc.config.getoption("--compile"):  # all directions of a case at once
        once = {(name, entrant): (name, direction, entrant) for name, direction, entrant in rows}
        rows = [row for (_, entrant), row in once.items() if entrant in COMPILED]
    metafunc.parametrize("case, direction, entrant", rows, ids=["-".join(row) for row in rows])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "race" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    if config.getoption("--device") == "cuda":
        cases = config.stash.get(CASES, {})
        in_turns(items, cases)


def in_turns(items: list[pytest.Item], cases: Mapping[tuple[str, str], Case]) -> None:
    """Puts what bars ask for first, of each bar in turn: where time runs out, every bar has had its share of it. The
    entrants of a case stay together."""
    turns: dict[tuple[str, str], int] = {}
    counts: Counter[tuple[str, bool]] = Counter()

    def place(item: pytest.Item) -> tuple[bool, bool, int]:
        asked = item.callspec.params if hasattr(item, "callspec") else {}
        key = asked.get("case", ""), asked.get("direction", "")
        case = cases.get(key)
        if case is None or not case.bar:
            return True, True, 0
        if key not in turns:
            turns[key] = counts[case.bar, case.quick]
            counts[case.bar, case.quick] += 1
        return not case.quick, False, turns[key]

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    raced = [item for item in session.items if "race" in getattr(item, "fixturenames", ())]
    session.config.stash[TOTAL] = len({item.name.rpartition("-")[0] for item in raced})


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """The arena prints its own line for each case."""
    return (report.outcome, "", "") if report.when == "call" and report.passed else None


@dataclass
class Arena:
    """Measures cases, one after another, under the options of this run."""

    config: pytest.Config
    threads: int
    device: str
    dtype: torch.dtype
    budget: float
    any_load: bool
    patience: float
    limits: limits.Limits
    deadline: float
    key: tuple[str, str] | None = None
    outcome: dict[str, Measured] | Exception = field(default_factory=dict)
    loads: tuple[float, float] = (0.0, 0.0)
    count: int = 0

    def results(self, case: Case, direction: str) -> dict[str, Measured]:
        """Those of all entrants, measured when they are first asked for."""
        if self.key != (case.name, direction):
            self.key, self.count = (case.name, direction), self.count + 1
            try:
                if time.monotonic() > self.deadline:
                    raise Refused("the time of this run is up")
                before = self.settle()
                start = time.perf_counter()
                self.outcome = harness.measure(
                    case, direction, device=self.device, dtype=self.dtype, budget=self.budget
                )
                self.loads = (before, harness.load_average())
                if not self.any_load:
                    harness.check_load(self.threads)
                self.tell(case, direction, time.perf_counter() - start)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else repr(error)
                if str(self.outcome) != str(error):  # not the same again for each of many
                    self.say(f"{case.name}, {direction}: {reason}")
                self.outcome = error
        if isinstance(self.outcome, Exception):
            kind = "skipped" if isinstance(self.outcome, Refused) else "failed"
            reason = str(self.outcome).partition("\n")[0] or repr(self.outcome)
            self.config.stash[LOST][kind][f"{case.name}, {direction}"] = {"bar": case.bar, "reason": reason}
        if isinstance(self.outcome, Refused):
            pytest.skip(str(self.outcome))
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def settle(self) -> float:
        """Waits for the load average to fall to the threads used, as long as patience lasts."""
        told = False
        while not self.any_load and harness.load_average() > self.threads + harness.LOAD_MARGIN and self.patience > 0:
            if not told:
                self.say(f"the load average is {harness.load_average():.2f}: waiting until it is {self.threads}")
                told = True
            time.sleep(2)
            self.patience -= 2
        if not self.any_load:
            harness.check_load(self.threads)
        return harness.load_average()

    def say(self, text: str) -> None:
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"[{self.count}/{self.config.stash[TOTAL]}] {text}", flush=True)

    def tell(self, case: Case, direction: str, took: float) -> None:
        assert isinstance(self.outcome, dict)
        best = {name: min(measured.seconds) for name, measured in self.outcome.items()}
        times = ", ".join(f"{name} {value * 1e3:.3f}" for name, value in best.items())
        rivals = [value for name, value in best.items() if name not in OURS]
        ratio = f"  {min(rivals) / best['ours']:.2f}x" if rivals else ""
        self.say(f"{case.name}, {direction}, ms: {times}{ratio}  ({took:.1f} s)")


@pytest.fixture(scope="session")
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    option = request.config.getoption
    threads, device, dtype = option("--threads"), option("--device"), DTYPES[option("--dtype")]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: no CUDA device is available", returncode=2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    measured = limits.measure(threads, device, dtype)
    request.config.stash[LIMITS] = measured
    yield Arena(
        request.config,
        threads,
        device,
        dtype,
        option("--budget"),
        option("--any-load"),
        option("--patience"),
        measured,
        time.monotonic() + option("--deadline"),
    )
    torch.set_num_threads(before)


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Any:
    """race(case, direction, entrant): this entrant's times, measured beside the others', go to pytest-benchmark."""

    def run(name: str, direction: str, entrant: str) -> None:
        case = request.config.stash[CASES][name, direction]
        if request.config.getoption("--compile"):
            grid = grid_of(request.config)
            harness.compile(case, entrant, device=grid.device, dtype=grid.dtype)
            return
        arena = request.getfixturevalue("arena")
        results = arena.results(case, direction)
        record(benchmark, arena, case, direction, entrant, results[entrant])

    return run


def record(benchmark: Any, arena: Arena, case: Case, direction: str, entrant: str, measured: Measured) -> None:
    forward = case.work(case.time).scaled(arena.dtype.itemsize)
    work = forward if direction == FORWARD else with_backward(forward)
    best, least = min(measured.seconds), arena.limits.seconds(work)
    benchmark.group = f"{case.name}, {direction}, {harness.threads_of(arena.threads)}"
    benchmark.extra_info.update(
        suite=benchmark.fullname.partition("::")[0].rpartition("bench_")[2].removesuffix(".py"),
        row=case.row,
        entrant=entrant,
        direction=direction,
        T=case.time,
        tokens=case.tokens,
        threads=arena.threads,
        device=arena.device,
        dtype=str(arena.dtype).removeprefix("torch."),
        flops=work.flops,
        bytes=work.bytes,
        limit_seconds=least,
        fraction_of_limit=least / best,
        tokens_per_second=case.tokens / best,
        peak_bytes=measured.peak_bytes,
        critical_path=work.path,
        average_parallelism=work.parallelism,
        load_average=arena.loads,
        load_exceeded=max(arena.loads) > arena.threads + harness.LOAD_MARGIN,
        lengths=case.lengths(),
        algorithm=measured.algorithm,
        backend=measured.backend,
        **({} if case.sizes is None else {"sizes": case.sizes}),
        **({"bar": case.bar} if case.bar else {}),
    )
    REPLAY.pending = list(measured.seconds)
    benchmark.pedantic(REPLAY.advance, rounds=len(measured.seconds))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    lost: dict[str, dict[str, dict[str, str]]] = config.stash[LOST]
    output_json.update(lost)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The measured limits stand beside pytest-benchmark's facts; the machine's own name is nobody's business."""
    machine_info.pop("node", None)
    machine_info["processor_name"] = machine.processor()
    machine_info["threads"] = config.getoption("--threads")
    machine_info["cores"] = os.cpu_count()
    machine_info["torch"] = torch.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine_info["instruction_set"] = machine.active_isa() if machine.missing is None else None
    measured = config.stash.get(LIMITS, None)
    machine_info["limits"] = measured.as_dict() if measured is not None else None
    machine_info["command"] = os.environ.get("S2S_BENCH_COMMAND") or " ".join(
        ["pytest", *config.invocation_params.args]
    )
