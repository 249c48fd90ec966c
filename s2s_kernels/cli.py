"""python -m s2s_kernels info | check | models"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import __version__, dispatch, machine


def gather() -> dict[str, Any]:
    """What `info` prints, as plain data."""
    try:
        isa = machine.active_isa()
    except RuntimeError as error:
        isa = f"unknown: {error}"
    facts: dict[str, Any] = {
        "versions": {
            "s2s_kernels": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "processor": {
            "name": machine.processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "instruction_set": isa,
            "caches": machine.cache_sizes(),
        },
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none is available",
        "build": machine.missing or machine._machine.build(),
    }
    facts["operators"] = {
        name: {backend: available(name, backend) for backend in dispatch.BACKENDS} for name in dispatch.OPERATORS
    }
    return facts


def available(operator: str, backend: str) -> str:
    """ "available", or why this operator (or, where it has no registered name, anything) has no such backend in this
    process."""
    if backend == "reference":
        return "available"
    if operator in dispatch.OPERATORS and backend not in dispatch.OPERATORS[operator].gaps:
        return f"{operator} has no {backend} kernel"
    return dispatch.unavailable(backend) or "available"


def info(as_json: bool) -> int:
    """Prints versions, processor, GPU, and each operator and backend: available, or why not."""
    facts = gather()
    if as_json:
        print(json.dumps(facts, indent=2))
        return 0
    for section in ("versions", "processor", "gpu", "build"):
        value = facts[section]
        text = ", ".join(f"{key} {item}" for key, item in value.items() if item) if isinstance(value, dict) else value
        print(f"{section:10} {text}")
    width = max(map(len, facts["operators"]), default=0)
    for name, backends in facts["operators"].items():
        usable = [backend for backend, state in backends.items() if state == "available"]
        print(f"\n{name:{width}}  {', '.join(usable)}")
        for backend, state in backends.items():
            if state != "available":
                print(f"{'':{width}}  not {backend}: {state}")
    return 0


def check() -> int:
    """Judges every available kernel against the float64 reference over all samples; 1 where one is wrong."""
    from .testing import CASES, Draw, compare

    start, failures, counted, ours = time.perf_counter(), 0, 0, 0
    for name, case in CASES.items():
        for backend in ("cpu", "cuda", "triton", "torch"):
            if available(name, backend) != "available":
                continue
            device = dispatch.DEVICE.get(backend, "cpu")
            wrong, judged, uncovered = [], 0, 0
            for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
                for sample in case.samples:
                    arguments = sample.build(Draw(dtype, device))
                    try:
                        excesses = compare(case.function, arguments, backend)
                    except NotImplementedError:
                        uncovered += 1
                        continue
                    judged += 1
                    wrong += [
                        f"{sample.name}, {dtype}, {part}: {by:.3g} too far" for part, by in excesses.items() if by > 0
                    ]
            if not judged:
                continue
            failures, counted = failures + len(wrong), counted + judged
            ours += judged if backend != "torch" else 0  # torch's own layers are there where nothing was built
            state = "FAILED" if wrong else "ok"
            print(f"{state:6} {name} on {backend}: {judged} calls judged, {uncovered} not covered")
            for line in wrong:
                print(f"       {line}")
    print(f"{counted} calls judged, {failures} wrong, {time.perf_counter() - start:.1f} s")
    if not ours:
        print(f"no kernel is available: {dispatch.extension_missing}")
    return 1 if failures or not ours else 0


def models() -> int:
    """Prints each model with its number of parameters."""
    from .models import MODELS

    width = max(map(len, MODELS))
    for name, build in MODELS.items():
        with torch.device("meta"):
            parameters = {id(p): p.numel() for p in build().parameters()}
        print(f"{name:{width}}  {sum(parameters.values()):>14,}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m s2s_kernels", description="Facts, self-test and models of s2s_kernels."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    info_parser = commands.add_parser(
        "info", help="versions, processor, GPU; each operator and backend: available, or why not"
    )
    info_parser.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("check", help="every available kernel against float64; exit code 1 where one is wrong")
    commands.add_parser("models", help="each model and its number of parameters")
    chosen = parser.parse_args(arguments)
    if chosen.command == "info":
        return info(chosen.json)
    return check() if chosen.command == "check" else models()


if __name__ == "__main__":
    sys.exit(main())
