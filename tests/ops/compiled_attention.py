"""The calls of attention whose launches are compiled for each architecture."""

from collections.abc import Iterator
from typing import Any

import torch

from s2s_kernels.ops.attention import triton_kernels, triton_tiles

PRODUCTS = ("forward_kernel", "query_kernel", "key_value_kernel", "bias_kernel")  # whose instructions are read
EVERYWHERE = PRODUCTS

BUSY = {"kv_heads": 4, "slopes": True, "softcap": 5.0, "dropout_p": 0.1}
EVERYTHING = {**BUSY, "lengths": True, "mask": True, "bias": torch.bfloat16}


def call(
    dtype: torch.dtype, width: int, *, batch: int = 2, heads: int = 8, kv_heads: int = 8, time: int = 320,
    source: int = 320, causal: bool = True, lengths: bool = False, mask: bool = False, bias: torch.dtype | None = None,
    slopes: bool = False, softcap: float | None = None, dropout_p: float = 0.0, backward: bool = True,
    packed: bool = False,
) -> None:  # fmt: skip
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    tensors = (noise(batch, heads, time, width), *(noise(batch, kv_heads, source, width) for _ in range(2)))
    rest: tuple[Any, ...] = (
        noise(heads) if slopes else None, torch.tensor([1, 2]) if dropout_p else None,
        None, 0 if causal else None, False, dropout_p, None, softcap,
    )  # fmt: skip
    if packed:
        tensors = tuple(x.transpose(1, 2).flatten(0, 1) for x in tensors)
        starts = (torch.arange(batch + 1) * time, torch.arange(batch + 1) * source)
        out, lse, softmax, _ = triton_kernels.attention_packed_forward(*tensors, *starts, *rest, backward)
        if backward:
            saved, needs = (out, softmax), (True, True, True, slopes)
            grads = noise(*out.shape), torch.randn(lse.shape)
            triton_kernels.attention_packed_backward(*grads, *saved, *tensors, *starts, *rest, *needs)
        return
    arguments: tuple[Any, ...] = (
        *tensors, torch.ones(batch, 1, time, source, dtype=torch.bool) if mask else None,
        None if bias is None else torch.randn(1, heads, time, source).to(bias),
        torch.full((batch,), time) if lengths else None, torch.full((batch,), source) if lengths else None, *rest,
    )  # fmt: skip
    wide = backward and bias is not None and bias.itemsize > dtype.itemsize
    out, lse, softmax, wide_out = triton_kernels.attention_forward(*arguments, backward, wide)
    if backward:
        needs = (True, True, True, bias is not None, slopes)
        saved = (wide_out if wide else out, softmax)
        triton_kernels.attention_backward(noise(*out.shape), torch.randn(lse.shape), *saved, *arguments, *needs)


def calls(arch: int) -> Iterator[tuple[torch.dtype, str, bool]]:
    """Makes the calls, some for one architecture only; yields the dtype and the precision of what they launched, and
    whether that is a sample."""
    triton_tiles.generation = lambda x: arch // 10
    call(torch.bfloat16, 64)
    yield torch.bfloat16, "highest", arch == 90
    call(torch.bfloat16, 128, **EVERYTHING)
    yield torch.bfloat16, "highest", arch == 80
    call(torch.bfloat16, 128, heads=32, time=1, source=4096, causal=False, lengths=True, backward=False)
    yield torch.bfloat16, "highest", arch == 90
    call(torch.bfloat16, 64, packed=True)
    yield torch.bfloat16, "highest", True
    call(torch.bfloat16, 128, packed=True, **BUSY)
    call(torch.bfloat16, 128, packed=True, heads=32, batch=2, time=1, source=4096, backward=False)
    yield torch.bfloat16, "highest", False
    if arch == 90:
        for width in (64, 128, 256):
            call(torch.bfloat16, width, kv_heads=2, lengths=True)
            call(torch.bfloat16, width, bias=torch.bfloat16, causal=False)
            call(torch.bfloat16, width, kv_heads=2, lengths=True, bias=torch.bfloat16, mask=True)
        call(torch.bfloat16, 512, kv_heads=2, lengths=True)
        call(torch.bfloat16, 512, kv_heads=2, lengths=True, bias=torch.bfloat16, mask=True)
        yield torch.bfloat16, "highest", False
    if arch == 100:
        call(torch.bfloat16, 128)
        yield torch.bfloat16, "highest", True
    call(torch.float32, 1024)
    yield torch.float32, "highest", arch == 80
    call(torch.float32, 128, packed=True, **BUSY)
    yield torch.float32, "highest", False
    if arch == 80:
        call(torch.float16, 64, bias=torch.float32)
        yield torch.float16, "highest", True
        call(torch.float32, 64)
        yield torch.float32, "highest", True
    torch.set_float32_matmul_precision("high")
    call(torch.float32, 64, backward=False)
    yield torch.float32, "high", arch == 90
    torch.set_float32_matmul_precision("highest")


def again() -> None:
    """Another batch and length, odd ones too, that compile to the same kernels."""
    call(torch.bfloat16, 64, batch=1, time=1001, source=777)
    call(torch.bfloat16, 128, batch=1, time=640, source=1024, **EVERYTHING)
    call(torch.bfloat16, 128, heads=32, time=1, source=3001, causal=False, lengths=True, backward=False)
    call(torch.bfloat16, 64, packed=True, batch=3, time=201, source=177)
    call(torch.bfloat16, 128, packed=True, batch=1, time=640, source=1024, **BUSY)
    call(torch.bfloat16, 128, packed=True, heads=32, batch=1, time=1, source=3001, backward=False)
