"""What the compiler makes of Triton kernels for an architecture, without a GPU.

python -m s2s_kernels.testing.compilation ARCHITECTURE FILE... compiles the launches of the calls that some files make,
and prints a line of JSON for each: its resources and the matrix instructions in it; with --samples those alone that a
file calls samples. A file has `calls(arch)`, which yields the dtype and the precision of what it has launched since and
whether that is a sample, `again()`, which makes calls of other lengths that must compile to nothing new, PRODUCTS, the
names of the kernels whose instructions are read, and EVERYWHERE, of those that are compiled for each architecture; the
others are for LIGHT only.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent

TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
}  # fmt: skip
TENSOR_CORES = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
LIGHT = 90
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    launched.append((self, args, kwargs))


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the launch would compile: pointers that torch has aligned, integers of no known value."""
    from triton.compiler import ASTSource

    from ..ops.triton_launch import COMPILED_WITH

    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {**COMPILED_WITH, **{name: values.pop(name) for name in OPTIONS if name in values}}
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        else:  # a length in a compilation's key would show here
            assert parameter.do_not_specialize and parameter.annotation_type in ("i64", "fp32"), parameter.name
            signature[parameter.name] = parameter.annotation_type
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def cuda_tool(name: str) -> Path | None:
    """A tool of the CUDA toolkit, or the one inside triton; triton isn't imported."""
    found = shutil.which(name)
    if found is None:
        triton = importlib.util.find_spec("triton")
        for folder in triton.submodule_search_locations or () if triton else ():
            found = shutil.which(name, path=Path(folder) / "backends" / "nvidia" / "bin")
    return None if found is None else Path(found)


def inspect(compiled: Any, products: bool) -> dict[str, Any]:
    tool = cuda_tool("cuobjdump")
    assert tool is not None

    def told(flag: str) -> str:
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = told("-res-usage"), told("-sass") if products else ""
    found = {word: int(re.search(rf"\b{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    operations = sorted(set(re.findall(r"\b(HMMA|HGMMA|UTCHMMA|LDGSTS)\b", sass)))
    return {
        "registers": found["REG"], "stack": found["STACK"], "local": found["LOCAL"],
        "shared": compiled.metadata.shared, "operations": operations,
    }  # fmt: skip


def compile_for(files: Sequence[Path], arch: int, samples: bool) -> list[dict[str, Any]]:
    """What this program prints, from a process of its own: a test's has the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "s2s_kernels.testing.compilation", str(arch), *map(str, files)]
    run = subprocess.run(
        command + ["--samples"] * samples, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def within_limits(kernel: dict[str, Any], arch: int) -> bool:
    return kernel["local"] == kernel["stack"] == 0 and kernel["shared"] <= SHARED[arch]


def on_tensor_cores(kernel: dict[str, Any], arch: int | None = None) -> bool:
    """Whether its products are on those of the architecture, or of any."""
    words = TENSOR_CORES[arch] if arch else [word for words in TENSOR_CORES.values() for word in words]
    return any(word in kernel["operations"] for word in words)


def _imported(file: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(file.stem, file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _compile_calls(calls: ModuleType, arch: int, samples: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    def sources() -> list[tuple[Any, ...]]:
        """Of the launches since, each with what the compiler would tell it apart by."""
        found = []
        for kernel, args, kwargs in launched:
            if arch == LIGHT or kernel.__name__ in calls.EVERYWHERE:
                source, options = source_of(kernel, args, kwargs)
                found.append(((source.hash(), *options.values()), kernel.__name__, kwargs, source, options))
        launched.clear()
        return found

    known, done = set(), set()
    for dtype, precision, sample in calls.calls(arch):
        for key, name, kwargs, source, options in sources():
            known.add(key)
            if key in done or (samples and not sample):
                continue
            done.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            facts = {"file": calls.__name__, "name": name, "dtype": str(dtype).removeprefix("torch.")}
            facts = {**facts, "precision": precision, **kwargs, **inspect(compiled, name in calls.PRODUCTS)}
            print(json.dumps(facts), flush=True)
    calls.again()
    for key, name, *_ in sources():
        assert key in known, f"{name} compiles again for another length"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, choices=SHARED)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--samples", action="store_true")
    options = parser.parse_args()
    from ..ops.triton_launch import Kernel

    Kernel.__getitem__ = lambda self, grid: functools.partial(record, self, grid=grid)  # type: ignore[method-assign]
    for file in options.files:
        _compile_calls(_imported(file), options.arch, options.samples)


if __name__ == "__main__":
    main()
