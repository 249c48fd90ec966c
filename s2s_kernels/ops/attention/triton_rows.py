"""What the gradients of attention take of single rows on a GPU, before and after the kernels of products."""

import triton.language as tl

from ..triton_common import kernel, spread
from .triton_scores import aligned, between, idle


@kernel
def delta_kernel(
    grad_out, grad_lse, out, softmax, delta, needed,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int64, grad_d: tl.int64,
    out_b: tl.int64, out_h: tl.int64, out_t: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, heads: tl.int64, time: tl.int64, count: tl.int64,
    VALUE_WIDTH: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T): what a weight's gradient counts from, grad_out . out - grad_lse; 0 where a row has no key.
    VECTOR: by how many elements the strides of grad_out and out are divisible."""
    if idle(needed):
        return
    grad_b, grad_h, grad_t = aligned(grad_b, grad_h, grad_t, VECTOR)
    out_b, out_h, out_t = aligned(out_b, out_h, out_t, VECTOR)
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(time, QUERIES)
    first, lane = program % tiles * QUERIES, program // tiles
    h, b = lane % heads, lane // heads
    line = tl.arange(0, QUERIES)
    exists = first + line < time
    row = lane * time + first
    alive = tl.load(softmax + count + row + line, mask=exists, other=0.0) != 0  # a NaN passes
    d = tl.arange(0, WIDE)[None, :]
    inside = alive[:, None] & (d < VALUE_WIDTH)
    at = grad_out + (b * grad_b + h * grad_h + first * grad_t) + ((line * grad_t)[:, None] + spread(d, grad_d, DENSE))
    grad = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + (b * out_b + h * out_h + first * out_t) + ((line * out_t)[:, None] + d)
    result = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(grad * result, 1)
    if grad_lse is not None:
        at = grad_lse + (b * lse_b + h * lse_h + first * lse_t) + line * lse_t
        total -= tl.load(at, mask=alive, other=0.0)
    tl.store(delta + row + line, total, mask=exists)


@kernel
def drop_kernel(
    value, grad_value, needed,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int64, value_d: tl.int64,
    heads: tl.int64, source: tl.int64, count: tl.int64,
    VALUE_WIDTH: tl.constexpr, DENSE: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Takes the gradient from what is not finite in values, which had no part in the products. In a kernel of its own:
    in key_value_kernel it would cost registers that the loops need."""
    if idle(needed):
        return
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    j, h, b = line % source, line // source % heads, line // source // heads
    d = tl.arange(0, WIDE)[None, :]
    inside = (line < count)[:, None] & (d < VALUE_WIDTH)
    at = value + (b * value_b + h * value_h + j * value_s)[:, None] + spread(d, value_d, DENSE)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    zero = tl.zeros((LINES, WIDE), grad_value.dtype.element_ty)
    tl.store(grad_value + line[:, None] * VALUE_WIDTH + d, zero, mask=inside & (x * 0.0 != 0.0))


@kernel
def spoilt_kernel(
    x, spoilt, x_b: tl.int64, x_h: tl.int64, x_t: tl.int64, heads: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sets `spoilt` (1,) if anything in x (B, H, T, D) isn't finite. VECTOR: by how many elements its strides are
    divisible; its last dimension is contiguous."""
    x_b, x_h, x_t = aligned(x_b, x_h, x_t, VECTOR)
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(time, ROWS)
    first, lane = program % tiles * ROWS, program // tiles
    line, d = tl.arange(0, ROWS), tl.arange(0, WIDE)[None, :]
    at = x + (lane // heads * x_b + lane % heads * x_h + first * x_t) + ((line * x_t)[:, None] + d)
    inside = (first + line < time)[:, None] & (d < WIDTH)
    bad = tl.sum(tl.sum(tl.load(at, mask=inside, other=0.0).to(tl.float32) * 0.0, 1), 0)
    tl.store(spoilt, 1, mask=bad != 0.0)


@kernel
def sequence_sum_kernel(
    sums, starts, result, heads: tl.int64, time: tl.int64, BLOCK: tl.constexpr
):  # fmt: skip
    """What the rows (H, T) of each packed sequence sum up to, (sequences, H)."""
    program = tl.program_id(0).to(tl.int64)
    head, sequence = program % heads, program // heads
    begin, rows = between(starts, sequence, time)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        total += tl.load(sums + head * time + begin + row, mask=row < rows, other=0.0)
    tl.store(result + program, tl.sum(total))
