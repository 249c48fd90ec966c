"""python compiled_convolution.py ARCHITECTURE: compiles every launch of some calls of causal convolution, without a
GPU, and prints a line of JSON for each: its resources and the matrix instructions in it."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from s2s_kernels.ops.convolution import triton_kernels, triton_step
from s2s_kernels.ops.convolution.autograd import ACTIVATIONS

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []


def record(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
    launched.append((self, args, kwargs))


def source_of(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ASTSource, dict[str, int]]:
    """What the launch would compile: pointers that torch has aligned, integers of no known value."""
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
            assert parameter.do_not_specialize and parameter.annotation_type == "i64", parameter.name
            signature[parameter.name] = "i64"
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def inspect(compiled: Any, products: bool) -> dict[str, Any]:
    def told(flag: str) -> str:
        return subprocess.run([TOOL, flag, file.name], capture_output=True, text=True, check=True).stdout

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


def call(
    dtype: torch.dtype, channels: int, outputs: int, taps: int, groups: int = 1, activation: str | None = None,
    last: bool = False, extras: bool = False, backward: bool = True, batch: int = 2, frames: int = 300,
) -> None:  # fmt: skip
    dilation, number = 2, ACTIVATIONS.index(activation)
    results = outputs // 2 if activation in ("glu", "gated_tanh") else outputs
    x, weight = torch.randn(batch, channels, frames).to(dtype), torch.randn(outputs, channels // groups, taps).to(dtype)
    if last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    lengths, bias = torch.tensor([frames, 5, 1][:batch]), torch.randn(outputs).to(dtype)
    state = torch.randn(batch, channels, (taps - 1) * dilation).to(dtype)
    residual = torch.randn(batch, results, frames).to(dtype) if extras else None
    condition = torch.randn(batch, outputs, frames).to(dtype) if extras else None
    y, saved = triton_kernels.causal_conv1d_forward(
        x, weight, bias, residual, lengths, state, condition, dilation, groups, number, True, number > 0
    )
    if backward:
        triton_kernels.causal_conv1d_backward(
            y, x, weight, saved if number else None, lengths, state, dilation, groups, number, True, False,
            True, True, True, False, False,
        )  # fmt: skip


def step(dtype: torch.dtype, channels: int, outputs: int, taps: int, activation: str, groups: int = 1) -> None:
    x, ring = torch.randn(3, channels, dtype=dtype), torch.randn(3, (taps - 1) * 5, channels, dtype=dtype)
    weight, bias = torch.randn(outputs, channels // groups, taps, dtype=dtype), torch.randn(outputs, dtype=dtype)
    triton_step.causal_conv1d_step(
        x, ring, torch.tensor(0), weight, bias, None, 5, groups, ACTIVATIONS.index(activation)
    )


def calls() -> Iterator[tuple[torch.dtype, str]]:
    """Makes the calls; yields the dtype and the precision of what they have launched."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        call(dtype, 64, 128, 2, activation="gated_tanh", extras=dtype == torch.bfloat16)
        yield dtype, "highest"
        call(dtype, 96, 96, 4, groups=96, activation="silu", last=dtype == torch.float16)
        step(dtype, 64, 128, 2, "gated_tanh")
        yield dtype, "highest"
    step(torch.bfloat16, 96, 96, 4, "silu", groups=96)
    call(torch.bfloat16, 128, 256, 3, activation="gelu")
    call(torch.bfloat16, 128, 256, 3, activation="glu", backward=False)
    call(torch.bfloat16, 25, 25, 7, activation="relu", backward=False)
    call(torch.bfloat16, 64, 64, 3, groups=2, activation="glu", backward=False)
    yield torch.bfloat16, "highest"
    torch.set_float32_matmul_precision("high")
    call(torch.float32, 64, 64, 3, backward=False)
    yield torch.float32, "high"
    torch.set_float32_matmul_precision("highest")


def main(arch: int) -> None:
    JITFunction.run = record  # type: ignore[method-assign]
    seen = set()
    for dtype, precision in calls():
        for kernel, args, kwargs in launched:
            source, options = source_of(kernel, args, kwargs)
            if (key := (source.hash(), *options.values())) in seen:
                continue
            seen.add(key)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
            facts = {"name": kernel.__name__, "dtype": str(dtype).removeprefix("torch."), "precision": precision}
            print(json.dumps({**facts, **kwargs, **inspect(compiled, "dense" in kernel.__name__)}), flush=True)
        launched.clear()
    # Another batch and length, odd ones too, compile to the same kernels.
    call(torch.bfloat16, 64, 128, 2, activation="gated_tanh", extras=True, batch=3, frames=513)
    call(torch.bfloat16, 128, 256, 3, activation="gelu", batch=1, frames=1001)
    call(torch.float16, 96, 96, 4, groups=96, activation="silu", last=True, batch=3, frames=64)
    for kernel, args, kwargs in launched:
        source, options = source_of(kernel, args, kwargs)
        assert (source.hash(), *options.values()) in seen, f"{kernel.__name__} compiles again for another length"


if __name__ == "__main__":
    main(int(sys.argv[1]))
