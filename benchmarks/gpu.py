"""python -m benchmarks.gpu: everything that needs a CUDA device; on a machine without one it says so and does nothing.

The tests marked gpu; beside them compute-sanitizer, where it is installed, over a sample of every operator on each of
our backends, and what cuDNN keeps of the contract. Then, alone, the benchmark cases that are made for a GPU: in
bfloat16, of recurrences in float16, in float32. All with the machine's facts goes to one JSON file, under $OUT where
that is set, else under benchmarks/results/<GPU>/. Every step runs whatever became of those before it, none longer than
it is given; the exit code tells. `python -m benchmarks.choice FILE` takes from the file by which backend recurrences
run, `python -m benchmarks.tables --gpu FILE` the table of the bars.
"""

import argparse
import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Only the standard library up here: `make gpu` runs this file before anything is installed, to see if there is a GPU.
ROOT = Path(__file__).resolve().parent.parent
TAIL = 3000  # characters of a command's output that are kept
STEPS = ("tests", "sanitizer", "contract", "benchmarks")
TOOLS = ("memcheck", "racecheck", "synccheck")
TIMED_OUT = 124
# Seconds at most of a step; the grid has what --seconds gives it.
TESTS, SANITIZER, CONTRACT, COMPILATION = 300, 280, 200, 100
GRACE = 45  # seconds in which a process of the grid begins, and ends its last case
SHARES = {"bfloat16": 0.6, "float16": 0.2, "float32": 0.2}  # of the grid's time; the bars are in bfloat16
INTERRUPTED = 8  # seconds that an interrupted process has to end by itself
RESERVED = 15  # seconds of --within for what is between the steps
BEGINNING = 15  # in which a process of the grid begins
GRID = 120  # and for the benchmarks, where they come after the tests
# What is kept of pytest-benchmark's JSON.
FACTS = (
    "suite", "row", "entrant", "direction", "T", "dtype", "bar", "limit_seconds", "peak_bytes", "algorithm", "backend",
    "sizes",
)  # fmt: skip
MACHINE = ("processor_name", "cores", "gpu", "torch", "limits", "command")


def devices() -> int:
    """How many CUDA devices the driver sees, without torch."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def facts() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what runs on it."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv"]
    return {
        "gpu": properties.name,
        "count": torch.cuda.device_count(),
        "capability": list(torch.cuda.get_device_capability(0)),
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "driver": command(query, 20)["output"] if shutil.which("nvidia-smi") else None,
        "nvcc": command(["nvcc", "--version"], 20)["output"] if shutil.which("nvcc") else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


LIVE: set[int] = set()  # the processes that run now, each in a session of its own


def end(process: int) -> None:
    """A process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def terminated(*_: Any) -> None:
    for process in list(LIVE):
        end(process)
    sys.exit(128 + signal.SIGTERM)


def interruptible() -> None:
    """In a process that begins: what a shell runs in the background ignores interrupts, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def portable(text: str) -> str:
    """Without the places of this machine: the file may go to others."""
    places = {sys.executable: "python", sys.prefix: "$PREFIX", os.environ.get("OUT"): "$OUT", f"{ROOT}{os.sep}": ""}
    for place, word in places.items():
        text = text.replace(place, word) if place else text
    return text


def command(
    words: Sequence[str], limit: float, show: bool = False, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Runs a command at the root for so many seconds at most, after which it is interrupted, so that pytest says how
    far it came; its exit code, seconds and the end of what it printed. No process that it started outlives it: one
    would disturb the timings that follow."""
    start, kept = time.perf_counter(), [""]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, **(environment or {})}, preexec_fn=interruptible,
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            if show:
                print(line, end="", flush=True)
            kept[0] = (kept[0] + line)[-TAIL:]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    LIVE.add(process.pid)
    try:
        code = process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        code = TIMED_OUT
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPTED)
    LIVE.discard(process.pid)
    end(process.pid)
    process.wait()
    reader.join(5)
    if code == TIMED_OUT:
        print(f"timed out after {limit:.0f} s: {' '.join(words)}", file=sys.stderr, flush=True)
    return {
        "command": portable(" ".join(words)),
        "code": code,
        "seconds": round(time.perf_counter() - start, 1),
        "output": portable(kept[0].strip()),
        **({"timed_out": True} if code == TIMED_OUT else {}),
    }


# What kernels of recurrence have code of their own for.
OPTIONS = {"layer_norm", "weight_hr", "lengths", "reset", "recurrent_mask", "reverse"}


def samples(device: str = "cuda", backends: Sequence[str] = ("cuda", "triton")) -> dict[str, list[str]]:
    """Runs one sample of every operator, forward and backward, on each of these backends that covers one, and of the
    kernels that needn't be compiled first also one with each of OPTIONS, in bfloat16 too, for their tensor cores: what
    compute-sanitizer watches. Returns the backends that ran."""
    import torch

    from s2s_kernels.dispatch import use_backend
    from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare

    served: dict[str, list[str]] = {name: [] for name in CASES}
    for backend in backends:
        for name, case in CASES.items():
            compiled = backend == "cuda"
            missing = set(OPTIONS) if compiled else set()
            for sample in case.samples:
                _, given = sample.build(Draw(torch.float32, device))
                if backend in served[name] and not missing & given.keys():
                    continue
                for dtype in (torch.float32, torch.bfloat16) if compiled else (torch.float32,):
                    arguments = prepare(sample.build(Draw(dtype, device)))
                    try:
                        with use_backend(backend):
                            results = dict(evaluate(case.function, arguments, noise_like))
                    except NotImplementedError:
                        break
                    print(backend, name, sample.name, dtype, *results, flush=True)
                else:
                    missing -= given.keys()
                    if backend not in served[name]:
                        served[name].append(backend)
    if device == "cuda":
        torch.cuda.synchronize()
    return served


def sanitizer(limit: float) -> dict[str, Any] | str:
    """The tools side by side; each a minute's compilation, mostly, which they share through triton's cache."""
    folder = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"
    found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=str(folder))
    if found is None:
        return "compute-sanitizer is not installed"

    def run(tool: str) -> dict[str, Any]:
        words = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu", "--samples"]
        # What torch's cache of memory holds would count as valid.
        return command(words, limit, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    return dict(zip(TOOLS, side_by_side([functools.partial(run, tool) for tool in TOOLS]), strict=True))


def kept(limit: float) -> dict[str, Any]:
    """For which recurrences cuDNN keeps the contract here."""
    asked = command([sys.executable, "-m", "benchmarks.choice", "--probe"], limit)
    return {**asked, "kept": json.loads(asked["output"].splitlines()[-1]) if asked["code"] == 0 else None}


def tests(limit: float) -> dict[str, Any]:
    # Two cores are left for what runs beside them.
    processes = str(max(1, min(14, (os.cpu_count() or 1) - 2)))
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", processes, "--dist=worksteal", "tests"]
    return command(words, limit, show=True)


def side_by_side(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def suite(dtype: str, quick: bool, *options: str) -> list[str]:
    """The command that runs the cases made for a GPU; in float16 those of the recurrences alone, for which cuDNN has
    other kernels."""
    files = ["benchmarks/bench_recurrence.py"] if dtype == "float16" else ["benchmarks"]
    words = [sys.executable, "-m", "pytest", "-q", "--no-header", *files, "-k", "GPU", "--device=cuda"]
    return [*words, f"--dtype={dtype}", "--any-load", *(["--quick"] if quick else []), *options]


def shares_of(dtypes: Sequence[str]) -> dict[str, float]:
    """Of all the time of the grid."""
    whole = sum(SHARES[dtype] for dtype in dtypes)
    return {dtype: SHARES[dtype] / whole for dtype in dtypes}


def compilation(limit: float, quick: bool, shares: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Calls everything that compiles once, in many processes, so that the grid's finds it in the caches on disk."""
    from .harness import ENVIRONMENT

    cores = min(14, os.cpu_count() or 1)

    def run(dtype: str) -> dict[str, Any]:
        processes = str(max(1, round(cores * shares[dtype])))
        return command(suite(dtype, quick, "--compile", "-n", processes), limit, environment=ENVIRONMENT)

    return dict(zip(shares, side_by_side([functools.partial(run, dtype) for dtype in shares]), strict=True))


def grid(
    folder: Path, seconds: float, budget: float, quick: bool, shares: Mapping[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """pytest-benchmark's JSON in each dtype, measured in so many seconds in all."""
    from .harness import ENVIRONMENT

    for dtype, share in shares.items():
        target = folder / f"gpu-{dtype}.json"
        options = [f"--budget={budget}", f"--deadline={share * seconds:.0f}", f"--benchmark-json={target}"]
        words = suite(dtype, quick, *options, "--benchmark-quiet")
        run = command(words, share * seconds + GRACE, show=True, environment=ENVIRONMENT)
        content = json.loads(target.read_text()) if target.exists() and target.stat().st_size else None
        target.unlink(missing_ok=True)
        yield dtype, {**run, "results": content and trimmed(content)}


def trimmed(results: dict[str, Any]) -> dict[str, Any]:
    """What of pytest-benchmark's JSON the tables read."""
    return {
        "datetime": results["datetime"],
        "machine_info": {name: results["machine_info"].get(name) for name in MACHINE},
        "benchmarks": [
            {
                "group": entry["group"],
                "extra_info": {name: entry["extra_info"][name] for name in FACTS if name in entry["extra_info"]},
                "stats": {name: float(f"{entry['stats'][name]:.5g}") for name in ("min", "median", "rounds")},
            }
            for entry in results["benchmarks"]
        ],
        **{kind: results.get(kind, {}) for kind in ("skipped", "failed")},
    }


def failures(outcome: dict[str, Any]) -> list[str]:
    """The steps that failed, in words."""
    found = outcome.get("sanitizer")
    runs = {
        "tests": outcome.get("tests"),
        "contract": outcome.get("contract"),
        **(found if isinstance(found, dict) else {}),
        **{f"compilation, {dtype}": run for dtype, run in outcome.get("compilation", {}).items()},
        **{f"benchmarks, {dtype}": run for dtype, run in outcome.get("benchmarks", {}).items()},
    }
    return [
        f"{name}: " + ("timed out" if run.get("timed_out") else f"exit code {run['code']}") + f", {run['seconds']} s"
        for name, run in runs.items()
        if run is not None and run["code"]
    ]


def slug(name: str) -> str:
    """Of a GPU: the folder of its results."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(chosen: argparse.Namespace, known: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    """The steps that were asked for: what is known after each of them, so that a run that is cut off leaves it."""
    began = chosen.since or time.time()

    def left() -> float:
        return chosen.within - (time.time() - began) - RESERVED

    benchmarks = "benchmarks" in chosen.steps
    until = left() - GRID * benchmarks  # what the others have, all beside one another

    outcome: dict[str, Any] = {"facts": known}
    beside: dict[str, Callable[[], Any]] = {
        "tests": lambda: tests(min(TESTS, until)),
        "sanitizer": lambda: sanitizer(min(SANITIZER, until)),
        "contract": lambda: kept(min(CONTRACT, until)),
    }
    asked = [step for step in beside if step in chosen.steps]
    if asked:
        outcome |= zip(asked, side_by_side([beside[step] for step in asked]), strict=True)
    if "contract" in outcome:
        outcome["keeps_contract"] = outcome["contract"].pop("kept")
    yield outcome
    if benchmarks:
        shares = shares_of(chosen.dtypes)
        outcome["compilation"] = compilation(min(COMPILATION, left() / 2), chosen.quick, shares)
        outcome["benchmarks"] = {}
        seconds = max(0.0, min(chosen.seconds, left() - BEGINNING * len(shares)))
        for dtype, measured in grid(folder, seconds, chosen.budget, chosen.quick, shares):
            outcome["benchmarks"][dtype] = measured
            yield outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--present", action="store_true", help="only say whether there is a CUDA device")
    parser.add_argument("--samples", action="store_true", help="only run the samples that compute-sanitizer watches")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--seconds", type=float, default=200.0, help="of measuring, in all (default 200)")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of rounds for each case (default 0.15)")
    parser.add_argument("--quick", action="store_true", help="the small grid: some cases of each bar")
    parser.add_argument(
        "--dtypes", nargs="+", choices=SHARES, default=list(SHARES), help="of the grid", metavar="DTYPE"
    )
    parser.add_argument("--within", type=float, default=510.0, help="seconds for everything (default 510)")
    parser.add_argument("--since", type=float, help="from when they count, in seconds of the epoch (default: now)")
    chosen = parser.parse_args(arguments)
    if not devices():
        print("gpu: this machine has no CUDA device: nothing was done", file=sys.stderr)
        return 1
    if chosen.present:
        return 0
    import torch

    if not torch.cuda.is_available():
        print(f"gpu: torch {torch.__version__} can't use the CUDA device: nothing was done", file=sys.stderr)
        return 1
    if chosen.samples:
        samples()
        return 0
    signal.signal(signal.SIGTERM, terminated)
    known = facts()
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / slug(known["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    target, failed = folder / "gpu.json", []
    for outcome in measure(chosen, known, folder):
        target.write_text(json.dumps(outcome, separators=(",", ":")) + "\n")
        failed = failures(outcome)
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    print(target.resolve())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
