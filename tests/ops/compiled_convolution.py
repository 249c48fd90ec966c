"""The calls of causal convolution whose launches are compiled for each architecture."""

from collections.abc import Iterator

import torch

from s2s_kernels.ops.convolution import triton_kernels, triton_step
from s2s_kernels.ops.convolution.autograd import ACTIVATIONS

PRODUCTS = (
    "dense_kernel",
    "dense_weight_kernel",
    "toeplitz_kernel",
    "toeplitz_weight_kernel",
)  # whose instructions are read
EVERYWHERE = (
    *PRODUCTS, "depthwise_kernel", "depthwise_weight_kernel", "line_kernel", "line_weight_kernel", "step_kernel",
)  # fmt: skip


def call(
    dtype: torch.dtype, channels: int, outputs: int, taps: int, groups: int = 1, activation: str | None = None,
    last: bool = False, extras: bool = False, plain: bool = False, backward: bool = True, batch: int = 2,
    frames: int = 300,
) -> None:  # fmt: skip
    dilation, number = 2, ACTIVATIONS.index(activation)
    results = outputs // 2 if activation in ("glu", "gated_tanh") else outputs
    x, weight = torch.randn(batch, channels, frames).to(dtype), torch.randn(outputs, channels // groups, taps).to(dtype)
    if last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    lengths, bias = None if plain else torch.tensor([frames, 5, 1][:batch]), torch.randn(outputs).to(dtype)
    state = None if plain else torch.randn(batch, channels, (taps - 1) * dilation).to(dtype)
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


def calls(arch: int) -> Iterator[tuple[torch.dtype, str, bool]]:
    """Makes the calls; yields the dtype and the precision of what they have launched, and whether that is a sample."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        call(dtype, 64, 128, 2, activation="gated_tanh", extras=dtype == torch.bfloat16)
        yield dtype, "highest", dtype == torch.bfloat16 and arch == 90
        call(dtype, 96, 96, 4, groups=96, activation="silu", last=dtype == torch.float16)
        if dtype == torch.float16:  # short lines, of another kernel
            call(dtype, 96, 96, 4, groups=96, activation="silu", last=True, frames=100)
        if dtype == torch.bfloat16:  # rows that all begin where vectors may be loaded
            call(dtype, 96, 96, 4, groups=96, frames=304, plain=True)
            call(dtype, 96, 96, 4, groups=96, frames=301, plain=True)
        step(dtype, 64, 128, 2, "gated_tanh")
        yield dtype, "highest", dtype == torch.float32 and arch == 90
    step(torch.bfloat16, 96, 96, 4, "silu", groups=96)
    call(torch.bfloat16, 96, 96, 30, groups=96, activation="gelu", extras=True)
    call(torch.bfloat16, 128, 256, 3, activation="gelu")
    call(torch.bfloat16, 96, 96, 64, groups=96, frames=304, plain=True)
    yield torch.bfloat16, "highest", arch != 90
    call(torch.bfloat16, 128, 256, 3, activation="glu", backward=False)
    call(torch.bfloat16, 25, 25, 7, activation="relu", backward=False)
    call(torch.bfloat16, 64, 64, 3, groups=2, activation="glu", backward=False)
    yield torch.bfloat16, "highest", False
    torch.set_float32_matmul_precision("high")
    call(torch.float32, 64, 64, 3, backward=False)
    yield torch.float32, "high", arch == 80
    torch.set_float32_matmul_precision("highest")


def again() -> None:
    """Another batch and length, odd ones too, that compile to the same kernels."""
    call(torch.bfloat16, 64, 128, 2, activation="gated_tanh", extras=True, batch=3, frames=513)
    call(torch.bfloat16, 128, 256, 3, activation="gelu", batch=1, frames=1001)
    call(torch.float16, 96, 96, 4, groups=96, activation="silu", last=True, batch=3, frames=64)
    call(torch.bfloat16, 96, 96, 30, groups=96, activation="gelu", extras=True, batch=1, frames=4097)
    for frames in (1024, 1023):
        call(torch.bfloat16, 96, 96, 4, groups=96, plain=True, batch=3, frames=frames)
