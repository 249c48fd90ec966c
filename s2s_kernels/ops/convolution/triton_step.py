"""One position of a causal convolution on a GPU, from a ring that is updated in place.

The slot of the oldest input is read on the device, so that a CUDA graph of a step can be replayed, and the cost does
not depend on the dilation. Three launches in a row: no program may write a slot that another still reads.
"""

import torch
import triton
import triton.language as tl

from ..triton_common import device_of, kernel, power
from .triton_epilogue import GLU, activate


@triton.jit
def _sums(
    x, ring, weight, bias, output, exists, slot, channels, span, dilation,
    PER_GROUP: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr, OUTPUTS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """bias + the products of a block of outputs, of which each has its group's inputs; the weights of an output lie
    one after the other, taps within channels."""
    total = tl.zeros((OUTPUTS,), tl.float32)
    for begin in range(0, INPUTS * TAPS, PRODUCTS):
        product = begin + tl.arange(0, PRODUCTS)
        channel, tap = product // TAPS, product % TAPS
        counts = exists[:, None] & (product < INPUTS * TAPS)[None, :]
        source = (output // PER_GROUP * INPUTS)[:, None] + channel[None, :]
        at = slot + tap * dilation
        at = tl.where(at < span, at, at - span)[None, :]
        now = (tap == TAPS - 1)[None, :]
        inputs = tl.load(x + source, mask=counts & now, other=0.0)
        if TAPS > 1:
            inputs += tl.load(ring + at * channels + source, mask=counts & (tap < TAPS - 1)[None, :], other=0.0)
        factor = tl.load(weight + output[:, None] * (INPUTS * TAPS) + product[None, :], mask=counts, other=0.0)
        total += tl.sum(inputs.to(tl.float32) * factor.to(tl.float32), axis=1)
    if bias is not None:
        total += tl.load(bias + output, mask=exists, other=0.0).to(tl.float32)
    return total


@kernel
def step_kernel(
    x, ring, position, weight, bias, residual, y,
    channels: tl.int64, span: tl.int64, dilation: tl.int64, residual_b: tl.int64, residual_c: tl.int64,
    RESULTS: tl.constexpr, PER_GROUP: tl.constexpr, INPUTS: tl.constexpr, TAPS: tl.constexpr,
    ACTIVATION: tl.constexpr, OUTPUTS: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """y (B, RESULTS) from x (B, channels), ring (B, span, channels) and weight (outputs, INPUTS, TAPS), contiguous."""
    BLOCKS: tl.constexpr = (RESULTS + OUTPUTS - 1) // OUTPUTS
    program = tl.program_id(0)
    batch, block = (program // BLOCKS).to(tl.int64), program % BLOCKS
    result = (block * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    exists = result < RESULTS
    slot = tl.load(position)
    x += batch * channels
    ring += batch * span * channels
    a = _sums(
        x, ring, weight, bias, result, exists, slot, channels, span, dilation,
        PER_GROUP, INPUTS, TAPS, OUTPUTS, PRODUCTS,
    )  # fmt: skip
    b = a
    if ACTIVATION >= GLU:
        b = _sums(
            x, ring, weight, bias, result + RESULTS, exists, slot, channels, span, dilation,
            PER_GROUP, INPUTS, TAPS, OUTPUTS, PRODUCTS,
        )  # fmt: skip
    value = activate(a, b, ACTIVATION)
    if residual is not None:
        added = tl.load(residual + batch * residual_b + result * residual_c, mask=exists, other=0.0)
        value += added.to(tl.float32)
    tl.store(y + batch * RESULTS + result, value, mask=exists)


@kernel
def push_kernel(x, ring, position, elements: tl.int64, channels: tl.int64, span: tl.int64, BLOCK: tl.constexpr):
    """x (B, channels) in the place of the oldest inputs."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + element, mask=element < elements)
    to = (element // channels * span + tl.load(position)) * channels + element % channels
    tl.store(ring + to, value, mask=element < elements)


@kernel
def advance_kernel(position, span: tl.int64):
    after = tl.load(position) + 1
    tl.store(position, tl.where(after < span, after, 0))


def causal_conv1d_step(
    x_t: torch.Tensor,
    ring: torch.Tensor,
    position: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dilation: int,
    groups: int,
    activation: int,
) -> torch.Tensor:
    (batch, channels), (outputs, inputs, taps) = x_t.shape, weight.shape
    x_t, weight = x_t.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    results = outputs // 2 if activation >= GLU.value else outputs
    span = (taps - 1) * dilation
    y = x_t.new_empty(batch, results)
    products = power(inputs * taps, 1, 128)
    tile = {"OUTPUTS": power(results, 1, min(2048 // products, 64)), "PRODUCTS": products}
    with device_of(x_t):
        if y.numel():
            step_kernel[(batch * triton.cdiv(results, tile["OUTPUTS"]),)](
                x_t, ring, position, weight, bias, residual, y, channels, span, dilation,
                *((0, 0) if residual is None else residual.stride()),
                RESULTS=results, PER_GROUP=outputs // groups, INPUTS=inputs, TAPS=taps, ACTIVATION=activation, **tile,
                num_warps=4,
            )  # fmt: skip
        if span and x_t.numel():
            push_kernel[(triton.cdiv(x_t.numel(), 1024),)](
                x_t, ring, position, x_t.numel(), channels, span, BLOCK=1024, num_warps=4
            )
        if span:
            advance_kernel[(1,)](position, span, num_warps=1)
    return y
