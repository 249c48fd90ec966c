"""python -m benchmarks.run [--quick]: measures this machine and writes the report.

Every suite runs under pytest in a fresh process for each number of threads; --processes repeats that. Results go to
benchmarks/results/<machine>/, the page and the plots to out/.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from s2s_kernels import machine

from . import harness, report

ROOT = Path(__file__).resolve().parent.parent
# The families first: where time runs out, it is not at their cost.
SUITES = ("models", "recurrence", "convolution", "attention", "additive_attention")
QUICK_SECONDS = 420  # of measuring, after which a quick run begins no further case


def machine_folder() -> Path:
    """Where this machine's results go."""
    name = re.sub(r"\((r|tm)\)|cpu|@.*", " ", machine.processor().lower())
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {os.cpu_count()} cores").strip("-")
    return ROOT / "benchmarks" / "results" / slug


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small grid, in under 10 minutes on two cores")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES, metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="numbers of threads (default 1 2)")
    parser.add_argument("--processes", type=int, help="fresh processes for each (default 1 if quick, else 2)")
    parser.add_argument("--longest", type=int, default=4096, help="greatest sequence length (default 4096)")
    parser.add_argument("--budget", type=float, help="seconds of rounds for each case (default 0.25 if quick, else 1)")
    parser.add_argument("--train-seconds", type=float, help="of each family (default 25 if quick, else 300)")
    parser.add_argument("--text", help="train the model families on this file, not on Python's own documentation")
    parser.add_argument("--any-load", action="store_true", help="measure, and mark the result, on a busy machine too")
    parser.add_argument("--select", help="only cases whose name holds this (pytest's -k)")
    parser.add_argument("--results", type=Path, help="folder of the results (default benchmarks/results/<machine>)")
    parser.add_argument("--out", type=Path, default=ROOT / "out", help="folder of the page and the plots (default out)")
    chosen = parser.parse_args(arguments)
    quick = chosen.quick
    chosen.processes = chosen.processes or (1 if quick else 2)
    chosen.budget = chosen.budget or (0.25 if quick else 1.0)
    chosen.train_seconds = chosen.train_seconds or (25.0 if quick else 300.0)
    chosen.threads = [count for count in chosen.threads if count <= (os.cpu_count() or 1)] or [1]
    return chosen


def measure(chosen: argparse.Namespace, threads: int, process: int, target: Path, deadline: float) -> int:
    """One pass over the suites in a process of its own; returns pytest's exit code."""
    files = [f"benchmarks/bench_{suite}.py" for suite in chosen.suites]
    first = threads == chosen.threads[0]
    options = [
        f"--threads={threads}",
        f"--longest={chosen.longest}",
        # More threads are reported beside, not against a bar: fewer rounds do.
        f"--budget={chosen.budget if first else chosen.budget / 2}",
        f"--train-seconds={chosen.train_seconds}",
        f"--benchmark-json={target}",
        "--benchmark-quiet",
        f"--deadline={deadline}",
        *(["--quick"] if chosen.quick else []),
        *(["--any-load"] if chosen.any_load else []),
        *([f"--text={Path(chosen.text).resolve()}"] if chosen.text else []),
        *([f"-k={chosen.select}"] if chosen.select else []),
        # The families train once.
        *([] if first and process == 0 else ["--deselect=benchmarks/bench_models.py::test_training"]),
    ]
    print(f"\n{harness.threads_of(threads)}, process {process + 1} of {chosen.processes}: {target}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *files, *options]
    environment = {**os.environ, **harness.ENVIRONMENT, "S2S_BENCH_COMMAND": chosen.command}
    return subprocess.run(command, check=False, cwd=ROOT, env=environment).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    chosen.command = shlex.join(["python", "-m", "benchmarks.run", *given])
    folder = (chosen.results or machine_folder()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start, codes, files = time.perf_counter(), [], []
    for process in range(chosen.processes):
        for threads in chosen.threads:
            name = f"{'quick' if chosen.quick else 'full'}-{harness.threads_of(threads).replace(' ', '-')}"
            target = folder / f"{name}{f'-{process + 1}' if chosen.processes > 1 else ''}.json"
            target.unlink(missing_ok=True)
            left = QUICK_SECONDS - (time.perf_counter() - start) if chosen.quick else float("inf")
            codes.append(measure(chosen, threads, process, target, left))
            if target.exists() and target.stat().st_size:
                files.append(target)
    try:
        page = report.write(files, chosen.out)
    except ValueError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print(f"\nmeasured in {(time.perf_counter() - start) / 60:.1f} minutes; results in {folder}")
    if any(codes):
        print("some cases failed: see above", file=sys.stderr)
    print(page)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
