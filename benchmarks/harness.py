"""Interleaved measurement: every entrant of a case in one process, A B A B, under the same conditions.

- Warm-up first, every entrant at every length; then rounds, each entrant once a round, as many calls of it as fill
  `ROUND` seconds.
- The length changes from round to round (T, T-1, T-2), so that nothing prepared for one length serves the next; a time
  is scaled to T by the analytic work.
- Every leaf is written between rounds, so that nothing remembered from the last call can serve; no input is zero.
- The load average is recorded. A case during which it exceeds the threads used, by more than `LOAD_MARGIN` for the
  sampling and the system itself, is refused.
- Peak memory is that of torch's allocator, over the level before one call: on the CPU from the allocator's events in
  torch's profiler (what libraries take outside the allocator, such as oneDNN's scratchpads, isn't seen), on a GPU from
  its own counter.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from s2s_kernels import explain

from .work import Work

# Page faults alone moved one operator from 6.5 ms to 35 ms: both sides keep what they got from the system.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}
# torch.compile would otherwise start a process for each core, and raise the load that the next case is judged by.
ENVIRONMENT = {**MALLOC, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
ROUND = 0.01  # seconds of calls of one entrant in a round
SLOW = 0.3  # seconds beyond which one call is warm-up enough
ROUNDS = (6, 30)  # at least, at most
LOAD_MARGIN = 0.5
FORWARD, TRAINING = "forward", "forward+backward"


@dataclass(frozen=True)
class Entrant:
    """A function to time and the leaves whose gradients a backward pass must give."""

    function: Callable[[], torch.Tensor]
    leaves: Sequence[torch.Tensor] = ()


class Inputs:
    """Seeded noise on one device. Everything made here is written between rounds."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)
        self.touched: list[torch.Tensor] = []

    def noise(self, *shape: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        """A leaf of normal noise."""
        tensor = (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)
        self.touched.append(tensor.requires_grad_(grad))
        return tensor

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 noise in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def module(self, module: nn.Module, like: nn.Module | None = None) -> Any:
        """A module on this device, with the weights of another of the same names where one is given."""
        module = module.to(self.device, self.dtype)
        if like is not None:
            module.load_state_dict(like.state_dict(), strict=True)
        self.touched.extend(module.parameters())
        return module


@dataclass(frozen=True)
class Case:
    """A call at one shape, ours and its peers'.

    Attributes:
        row: what is called and every size but T; cases of one row differ in T alone.
        time: T.
        tokens: positions that one call handles.
        build: (inputs, T) -> the entrants by name, ours first. The same seed gives every length the same weights.
        work: T -> the work of a forward pass.
        entrants: the names that `build` gives.
        directions: FORWARD, TRAINING or both.
        quick: whether the quick grid has it.
        agree: whether all entrants must give the same result: not with random dropout.
        compared: leading positions (B, T, ...) that must agree, where rounding errors grow over time without bound.
        varied: whether T changes between rounds.
        sizes: what a table of its kind finds it by.
        bar: which of the bars on a GPU it belongs to; gpu_bars.py has them.
    """

    row: str
    time: int
    tokens: int
    build: Callable[[Inputs, int], dict[str, Entrant]]
    work: Callable[[int], Work]
    entrants: tuple[str, ...]
    directions: tuple[str, ...] = (FORWARD, TRAINING)
    quick: bool = False
    agree: bool = True
    compared: int | None = None
    varied: bool = True
    sizes: dict[str, Any] | None = None
    bar: str = ""

    @property
    def name(self) -> str:
        return f"{self.row} T{self.time}"

    def lengths(self) -> tuple[int, ...]:
        return (self.time, self.time - 1, self.time - 2) if self.varied and self.time > 4 else (self.time,)


def on_gpu(case: Case, bar: str = "", quick: bool = False) -> Case:
    """The case as one of those that are made for a GPU, which the names tell."""
    return replace(case, row=f"GPU {case.row}", bar=bar, quick=quick)


@dataclass(frozen=True)
class Grid:
    """Which cases to make: the quick ones only, or all up to a longest T."""

    quick: bool = False
    longest: int = 4096
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def lengths(self, *, at_most: int | None = None) -> list[int]:
        """32 … longest, every fourfold."""
        top = self.longest if at_most is None else min(at_most, self.longest)
        return [t for t in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384) if t <= top]

    def chosen(self, cases: Iterable[Case]) -> list[Case]:
        return [case for case in cases if case.time <= self.longest and (case.quick or not self.quick)]


@dataclass
class Measured:
    """One entrant of one case: seconds a call in each round, scaled to T; peak bytes; what ran."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # None: not torch's memory
    algorithm: str = ""
    backend: str = ""


class Refused(RuntimeError):
    """The machine was busy with something else."""


def load_average() -> float:
    return os.getloadavg()[0]


def check_load(threads: int) -> None:
    """Raises Refused where the load average exceeds the threads used."""
    load = load_average()
    if load > threads + LOAD_MARGIN:
        raise Refused(f"the load average {load:.2f} exceeds the {threads_of(threads)} used; --any-load measures anyway")


def threads_of(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}"


def measure(
    case: Case,
    direction: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    budget: float = 1.0,
) -> dict[str, Measured]:
    """Times all entrants of a case in interleaved rounds for about `budget` seconds.

    Raises:
        AssertionError: an entrant's result differs from ours.
    """
    lengths = case.lengths()
    inputs = {length: Inputs(device, dtype) for length in lengths}
    entrants = {length: case.build(inputs[length], length) for length in lengths}
    if tuple(entrants[case.time]) != case.entrants:
        raise ValueError(f"{case.name}: entrants must be {case.entrants}, build gave {tuple(entrants[case.time])}")
    if case.agree:
        check_agreement(case, entrants[case.time])
    calls = {
        length: {name: caller(entrant, direction) for name, entrant in group.items()}
        for length, group in entrants.items()
    }
    measured = {name: Measured() for name in case.entrants}
    repeats: dict[str, int] = {}
    for length in lengths:
        for name, call in calls[length].items():
            once = seconds(call, 1, device)  # with compilation, where there is something to compile
            if once < SLOW or "compile" in name:
                once = seconds(call, 1, device)
            repeats[name] = max(1, min(1000, int(ROUND / max(once, 1e-7))))
    work = {length: case.work(length).flops for length in lengths}
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for count in range(ROUNDS[1]):
            elapsed = time.perf_counter() - start
            enough = ROUNDS[0] if elapsed < 6 * budget else len(lengths)
            if count >= enough and elapsed > budget:
                break
            length = lengths[count % len(lengths)]
            for name, call in calls[length].items():
                touch(inputs[length])
                took = seconds(call, repeats[name], device)
                measured[name].seconds.append(took * work[case.time] / work[length])
    finally:
        gc.enable()
    for name, call in calls[case.time].items():
        measured[name].peak_bytes, measured[name].algorithm = observe(call, device)
    measured["ours"].backend = explain(entrants[case.time]["ours"].function).backend
    return measured


def compile(case: Case, entrant: str, *, device: str, dtype: torch.dtype) -> None:
    """Runs one entrant of a case once in each direction, so that what it compiles is in the caches on disk."""
    for length in case.lengths():  # alignment can ask for kernels of their own
        made = case.build(Inputs(device, dtype), length)[entrant]
        for direction in case.directions:
            caller(made, direction)()
    synchronize(device)


def check_agreement(case: Case, entrants: dict[str, Entrant]) -> None:
    """A speed is worth nothing where the results differ."""
    with torch.no_grad():
        part = slice(None) if case.compared is None else (slice(None), slice(case.compared))
        ours = entrants["ours"].function()[part]
        tolerance = 2e-3 if ours.dtype in (torch.float32, torch.float64) else 5e-2
        for name, entrant in entrants.items():
            theirs = entrant.function()[part]
            assert theirs.shape == ours.shape, f"{case.name}: {name} gives {theirs.shape}, ours {ours.shape}"
            worst = ((theirs.float() - ours.float()).abs().max() / ours.float().abs().max()).item()
            assert worst < tolerance, f"{case.name}: {name} differs from ours by {worst:.2e} of the largest value"


def caller(entrant: Entrant, direction: str) -> Callable[[], Any]:
    """What is timed: a forward pass without gradients, or a forward and backward pass with fixed upstream noise."""
    if direction == FORWARD:

        def forward() -> Any:
            with torch.no_grad():
                return entrant.function()

        return forward
    upstream = torch.randn_like(entrant.function())
    leaves = [leaf for leaf in entrant.leaves if leaf.requires_grad]

    def both() -> Any:
        return torch.autograd.grad(entrant.function(), leaves, upstream)

    return both


def touch(inputs: Inputs) -> None:
    with torch.no_grad():
        for tensor in inputs.touched:
            tensor.mul_(1.0)


def seconds(call: Callable[[], Any], repeats: int, device: str) -> float:
    """Wall time of one of so many calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def observe(call: Callable[[], Any], device: str) -> tuple[int | None, str]:
    """Peak bytes of one call over the level before it, and the operations in which it spends most of its time."""
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=device == "cpu") as profiled:
        result = call()
        synchronize(device)
    del result
    assert profiled.profiler is not None and profiled.profiler.kineto_results is not None
    events = profiled.profiler.kineto_results.events()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() - before, dominant(events)
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak or None, dominant(events)


def dominant(events: Iterable[Any], count: int = 2) -> str:
    """The operations with most time of their own, their children's left out, that fill a tenth of the call or more."""
    own: dict[str, int] = {}
    stacks: dict[int, list[tuple[int, str]]] = {}
    total = 0
    spans = [e for e in events if e.name() != "[memory]" and "::" in e.name()]
    for event in sorted(spans, key=lambda e: (e.start_ns(), -e.duration_ns())):
        stack = stacks.setdefault(event.start_thread_id(), [])
        while stack and stack[-1][0] <= event.start_ns():
            stack.pop()
        own[event.name()] = own.get(event.name(), 0) + event.duration_ns()
        if stack:
            own[stack[-1][1]] -= event.duration_ns()
        else:
            total += event.duration_ns()
        stack.append((event.start_ns() + event.duration_ns(), event.name()))
    best = sorted(own, key=lambda name: -own[name])[:count]
    return ", ".join(name for name in best if own[name] >= 0.1 * total)
