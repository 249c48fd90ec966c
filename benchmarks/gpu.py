"""python -m benchmarks.gpu: everything that needs a CUDA device; on a machine without one it says so and does nothing.

The tests marked gpu, compute-sanitizer over one sample of every operator where it is installed, the benchmark grid in
float32 and bfloat16 and of the recurrences in float16, what cuDNN keeps of the contract, and the machine's facts: one
JSON file, under $OUT where that is set, else under benchmarks/results/<GPU>/. `python -m benchmarks.choice FILE` takes
from it by which backend recurrences run.
"""

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Only the standard library up here: `make gpu` runs this file before anything is installed, to see if there is a GPU.
ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000  # characters of a command's output that are kept


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
        "driver": command(query)["output"] if shutil.which("nvidia-smi") else None,
        "nvcc": command(["nvcc", "--version"])["output"] if shutil.which("nvcc") else None,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def command(words: Sequence[str], show: bool = False) -> dict[str, Any]:
    """Runs a command at the root; its exit code, seconds and the end of what it printed."""
    start, kept = time.perf_counter(), ""
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if show:
                print(line, end="", flush=True)
            kept = (kept + line)[-TAIL:]
    return {
        "command": " ".join(words),
        "code": process.returncode,
        "seconds": round(time.perf_counter() - start, 1),
        "output": kept.strip(),
    }


def samples() -> int:
    """Runs one sample of every operator on the GPU, forward and backward: what compute-sanitizer watches."""
    import torch

    from s2s_kernels.testing import CASES, Draw, evaluate, noise_like, prepare

    for name, case in CASES.items():
        arguments = prepare(case.samples[0].build(Draw(torch.float32, "cuda")))
        results = dict(evaluate(case.function, arguments, noise_like))
        print(name, *results)
    torch.cuda.synchronize()
    return 0


def sanitizer() -> list[dict[str, Any]] | str:
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    )
    if tool is None:
        return "compute-sanitizer is not installed"
    target = [sys.executable, "-m", "benchmarks.gpu", "--samples"]
    return [
        command([tool, "--tool", name, "--error-exitcode", "9", *target], show=True)
        for name in ("memcheck", "racecheck")
    ]


def kept() -> list[str] | None:
    """For which recurrences cuDNN keeps the contract here; None where the question failed."""
    asked = command([sys.executable, "-m", "benchmarks.choice", "--probe"])
    return json.loads(asked["output"].splitlines()[-1]) if asked["code"] == 0 else None


def grid(folder: Path, longest: int, quick: bool) -> dict[str, Any]:
    """The benchmark suites on the GPU, in float32 and bfloat16, and the layers that cuDNN has other kernels for in
    float16; pytest-benchmark's JSON of each."""
    measured: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16", "float16"):
        target = folder / f"gpu-{dtype}.json"
        suites = ["benchmarks/bench_recurrence.py", "-k", "GPU"] if dtype == "float16" else ["benchmarks"]
        words = [sys.executable, "-m", "pytest", "-q", "--no-header", *suites, "--device=cuda", f"--dtype={dtype}"]
        words += [f"--longest={longest}", f"--benchmark-json={target}", "--benchmark-quiet", "--any-load"]
        run = command([*words, *(["--quick"] if quick else [])], show=True)
        content = json.loads(target.read_text()) if target.exists() and target.stat().st_size else None
        target.unlink(missing_ok=True)
        measured[dtype] = {**run, "results": content}
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--present", action="store_true", help="only say whether there is a CUDA device")
    parser.add_argument("--samples", action="store_true", help="only run one sample of every operator")
    parser.add_argument("--longest", type=int, default=4096, help="greatest sequence length (default 4096)")
    parser.add_argument("--quick", action="store_true", help="the small grid")
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
        return samples()
    known = facts()
    slug = re.sub(r"[^a-z0-9]+", "-", known["gpu"].lower()).strip("-")
    folder = Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "benchmarks" / "results" / slug
    folder.mkdir(parents=True, exist_ok=True)
    outcome: dict[str, Any] = {"facts": known}
    outcome["tests"] = command([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], show=True)
    outcome["sanitizer"] = sanitizer()
    outcome["keeps_contract"] = kept()
    outcome["benchmarks"] = grid(folder, chosen.longest, chosen.quick)
    target = folder / "gpu.json"
    target.write_text(json.dumps(outcome, indent=1) + "\n")
    print(target.resolve())
    codes = [outcome["tests"]["code"], *(run["code"] for run in outcome["benchmarks"].values())]
    codes += [run["code"] for run in outcome["sanitizer"]] if isinstance(outcome["sanitizer"], list) else []
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
