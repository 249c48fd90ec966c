"""What the compiler makes of Triton kernels for an architecture, without a GPU.

python -m s2s_kernels.testing.compilation FILE ARCHITECTURE compiles every launch of the calls that a file makes, and
prints a line of JSON for each: its resources and the matrix instructions in it. The file has `calls(arch)`, which
yields the dtype and the precision of what it has launched since, `again()`, which makes calls of other lengths that
must compile to nothing new, and PRODUCTS, the names of the kernels whose instructions are read.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent

TYPES = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip
TENSOR_CORES = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",)}
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    launched.append((self, args, kwargs))


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """What the launch would compile: pointers that torch has aligned, integers of no known value."""
    from triton.compiler import ASTSource

    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    options = {name: values.pop(name) for name in OPTIONS if name in values}
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


def inspect(compiled: Any, products: bool) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

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


def compile_for(calls: Path, arch: int) -> list[dict[str, Any]]:
    """What this program prints, from a process of its own: a test's has the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-m", "s2s_kernels.testing.compilation", str(calls), str(arch)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def within_limits(kernel: dict[str, Any], arch: int) -> bool:
    return kernel["local"] == kernel["stack"] == 0 and kernel["shared"] <= SHARED[arch]


def on_tensor_cores(kernel: dict[str, Any], arch: int | None = None) -> bool:
    """Whether its products are on those of the architecture, or of any."""
    words = TENSOR_CORES[arch] if arch else [word for words in TENSOR_CORES.values() for word in words]
    return any(word in kernel["operations"] for word in words)


def main(calls: ModuleType, arch: int) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    JITFunction.run = record  # type: ignore[method-assign]
    seen = set()
    for dtype, precision in calls.calls(arch):
        for kernel, args, kwargs in launched:
            source, options = source_of(kernel, args, kwargs)
            if (key := (source.hash(), *options.values())) in seen:
                continue
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            facts = {"name": kernel.__name__, "dtype": str(dtype).removeprefix("torch."), "precision": precision}
            products = kernel.__name__ in calls.PRODUCTS
            print(json.dumps({**facts, **kwargs, **inspect(compiled, products)}), flush=True)
        launched.clear()
    calls.again()
    for kernel, args, kwargs in launched:
        source, options = source_of(kernel, args, kwargs)
        assert (source.hash(), *options.values()) in seen, f"{kernel.__name__} compiles again for another length"


if __name__ == "__main__":
    specification = importlib.util.spec_from_file_location("calls", sys.argv[1])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    main(module, int(sys.argv[2]))
