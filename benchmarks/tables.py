"""python -m benchmarks.tables [--check] [--bars FILE…] [--gpu FILE…]: the generated tables of README.md.

The table of operators asks `explain` which backend serves each sample; the table of bars is made from the files that
the outside measurement of the bars wrote, kept as benchmarks/results/<machine>/bars-<threads>.json. `--bars` takes
such files in, with this machine's facts and today's date; `--gpu` those of `make gpu`, one or the parts of one GPU's,
from which the table of the bars on a GPU is made. `--check` writes nothing and fails where README.md differs.
"""

import argparse
import datetime
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import s2s_kernels
from s2s_kernels import dispatch, explain, machine
from s2s_kernels.testing import CASES, Draw, OperatorCase, prepare

from . import gpu, gpu_bars
from .harness import threads_of
from .run import ROOT, machine_folder

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WORK = {
    "R1": "GRU and RNN, small batches",
    "R2": "LSTM over batch, length and width",
    "R3": "LSTM forward, one sequence",
    "R4": "LSTM and GRU with lengths, against PackedSequence",
    "R5": "layer-norm LSTM, against a cell loop",
    "R6": "tiny 3-layer bidirectional LSTM",
    "R7": "weight drop, recurrent dropout, zoneout, against our plain LSTM",
    "C1": "depthwise causal convolution; forward against a clone of its input",
    "C2": "TCN residual block",
    "C3": "dense dilated convolution",
    "C4": "WaveNet gated block",
    "C5": "WaveNet streaming, 30 layers, 64 steps",
    "A1": "attention, T up to 64",
    "A2": "causal attention, T = 128 to 512",
    "A3": "attention with key lengths",
    "A4": "attention in a window of 256",
    "A5": "attention with dropout; with a learned bias",
    "A6": "decoding with grouped heads; with a bfloat16 cache",
    "A7": "attention at T = 1024",
    "D1": "additive attention",
}


def operators() -> list[str]:
    """The table of operators: each backend, direction and dtypes, and what goes to the reference."""
    rows = ["| operator | backend | forward | forward and backward | left to the reference |", "|---|---|---|---|---|"]
    for name, case in CASES.items():
        if not hasattr(s2s_kernels, name):  # a second form of an operator, for the tests
            continue
        label = f"`{name}`"
        for backend in backends(case):
            if dispatch.DEVICE.get(backend, "cpu") != "cpu":
                cells = ["on CUDA tensors"] * 2 + [""]
            else:
                asked = [served(case, backend, recording) for recording in (False, True)]
                reasons = dict.fromkeys(reason for _, gaps in asked for reason in gaps)
                cells = [*(", ".join(dtypes) or "none" for dtypes, _ in asked), "; ".join(reasons)]
                if backend == "torch" and not any(dtypes for dtypes, _ in asked):
                    cells = ["plain calls on CUDA tensors, where it is faster"] * 2 + [""]
            rows.append(f"| {' | '.join([label, backend, *cells])} |".replace("|  |", "| |"))
            label = ""
        rows.append(
            f"| {label} | reference | all dtypes | all dtypes, any order of gradient | |".replace("|  |", "| |")
        )
    return rows


def backends(case: OperatorCase) -> list[str]:
    """Those that have code for an operator, besides the reference."""
    args, kwargs = case.samples[0].build(Draw(torch.float32))
    with dispatch.use_backend("reference"):
        reasons = explain(case.function, *args, **kwargs).reasons
    return [backend for backend, reason in reasons.items() if "has no" not in reason]


def served(case: OperatorCase, backend: str, recording: bool) -> tuple[list[str], list[str]]:
    """The dtypes in which a backend serves any of the samples, and its reasons where it doesn't serve one."""
    dtypes, reasons = [], []
    for dtype in DTYPES:
        chosen = False
        for sample in case.samples:
            args, kwargs = prepare(sample.build(Draw(dtype)), wanted=lambda _: recording)
            explanation = explain(case.function, *args, **kwargs)
            chosen |= explanation.backend == backend
            reason = explanation.reasons.get(backend)
            # Where another kernel is preferred, nothing is left to the reference.
            if reason is not None and explanation.backend == "reference":
                reasons.append(reason)
        if chosen:
            dtypes.append(str(dtype).removeprefix("torch."))
    return dtypes, reasons


def bars(files: Iterable[Path]) -> list[str]:
    """The tables of bars, one for each machine."""
    machines: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(files):
        content = json.loads(file.read_text())
        machines.setdefault(content["machine"], {})[content["threads"]] = content
    lines: list[str] = []
    for name, by_threads in machines.items():
        fewest = by_threads[min(by_threads)]
        said = "; ".join(f"{threads_of(n)}: `{c['command']}`, {c['date']}" for n, c in sorted(by_threads.items()))
        lines += [
            *([""] if lines else []),
            f"{name}; torch {fewest['torch']}. {said}.",
            "",
            "A ratio is the fastest rival's time over ours, from each side's fastest round; a range covers the lines "
            "of a bar. A line holds where its ratio reaches what the bar asks of it.",
            "",
            "| bar | work | asked | " + " | ".join(threads_of(n) for n in sorted(by_threads)) + " | lines that hold |",
            "|---|---|---|" + "---|" * (len(by_threads) + 1),
        ]
        for bar in dict.fromkeys(row["bar"] for row in fewest["rows"]):
            rows = {n: [r for r in c["rows"] if r["bar"] == bar] for n, c in by_threads.items()}
            asked = [r["at_least"] for r in rows[min(by_threads)] if "at_least" in r]
            ratios = [spread([r["ratio"] for r in rows[n] if "ratio" in r]) or "fails" for n in sorted(by_threads)]
            held = [f"{sum(r['ok'] for r in rows[n])} of {len(rows[n])}" for n in sorted(by_threads)]
            work = WORK.get(bar, rows[min(by_threads)][0]["label"])
            lines.append(f"| {bar} | {work} | {spread(asked)} | {' | '.join(ratios)} | {', '.join(held)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """ "1.2x" or "1.2x to 3.4x"; nothing for no value."""
    said = list(dict.fromkeys(f"{value:.2f}x" for value in (min(values), max(values)))) if values else []
    return " to ".join(said)


def take_in(file: Path, command: str) -> Path:
    """Keeps a file of the outside measurement under this machine's results, with its facts."""
    content = json.loads(file.read_text())
    facts = {
        "machine": f"{machine.processor()}, {machine.active_isa()}, {os.cpu_count()} cores",
        "date": datetime.date.fromtimestamp(file.stat().st_mtime).isoformat(),
        "command": command,
    }
    target = machine_folder() / f"bars-{threads_of(content['threads']).replace(' ', '-')}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**facts, **content}, indent=1) + "\n")
    return target


def take_in_gpu(files: Sequence[Path]) -> Path:
    """Keeps what `make gpu` measured under its GPU's results; of a step, or a dtype of the grid, that is in several
    files, the last.

    Raises:
        ValueError: they aren't of one GPU.
    """
    parts = [json.loads(file.read_text()) for file in files]
    names = {part["facts"]["gpu"] for part in parts}
    if len(names) != 1:
        raise ValueError(f"not results of one GPU, but of {', '.join(sorted(names))}")
    target = RESULTS / gpu.slug(names.pop()) / "gpu.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = {name: value for part in parts for name, value in part.items()}
    if "benchmarks" in whole:
        whole["benchmarks"] = {k: run for part in parts for k, run in part.get("benchmarks", {}).items()}
    target.write_text(json.dumps(whole, separators=(",", ":")) + "\n")
    return target


def replaced(readme: str, name: str, lines: Sequence[str]) -> str:
    """README with these lines between its markers of that name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
    if not pattern.search(readme):
        raise ValueError(f"README.md has no markers {begin} and {end}")
    body = "\n".join([begin, *lines, end])
    return pattern.sub(lambda _: body, readme)


def generated(readme: str) -> str:
    """README with every table made anew."""
    readme = replaced(readme, "operators", operators())
    readme = replaced(readme, "gpu-bars", gpu_bars.table(RESULTS.glob("*/gpu.json")))
    return replaced(readme, "bars", bars(RESULTS.glob("*/bars-*.json")))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where README.md differs")
    parser.add_argument("--bars", nargs="+", type=Path, default=[], metavar="FILE", help="files to take in")
    parser.add_argument("--command", default="python speed.py", help="what wrote them (default 'python speed.py')")
    parser.add_argument("--gpu", nargs="+", type=Path, default=[], metavar="FILE", help="gpu.json, or its parts")
    chosen = parser.parse_args(arguments)
    if chosen.gpu:
        print(take_in_gpu(chosen.gpu))
    for file in chosen.bars:
        print(take_in(file, chosen.command))
    readme = README.read_text()
    wanted = generated(readme)
    if wanted == readme:
        return 0
    if chosen.check:
        print("README.md is not what `python -m benchmarks.tables` makes of it", file=sys.stderr)
        return 1
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
