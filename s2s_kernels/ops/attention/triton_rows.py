"""What attention takes of single rows on a GPU, beside the kernels of products."""

import triton.language as tl

from ..triton_common import kernel
from .triton_scores import between, divisible, idle, load_rows, strides_of, vector_of


@kernel
def delta_kernel(
    grad_out, grad_lse, out, softmax, delta, needed, grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int64,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64, heads: tl.int64, time: tl.int64, count: tl.int64,
    VALUE_WIDTH: tl.constexpr, PACKED: tl.constexpr, WIDE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """delta (B, H, T) as query_kernel makes it, where there is no other reason to start that. out is contiguous,
    (B, H, T, Dv), PACKED (T, H, Dv)."""
    if idle(needed):
        return
    grad_b, grad_h, grad_t = divisible(grad_b, grad_h, grad_t, vector_of(grad_out))
    out_b, out_h, out_t = strides_of(heads, time, VALUE_WIDTH, PACKED)
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(time, QUERIES)
    first, lane = program % tiles * QUERIES, program // tiles
    h, b = lane % heads, lane // heads
    line = tl.arange(0, QUERIES)
    exists = first + line < time
    row = lane * time + first
    alive = tl.load(softmax + count + row + line, mask=exists, other=0.0) != 0  # a NaN passes
    d = tl.arange(0, WIDE)[None, :]
    inside = alive[:, None] & (d < VALUE_WIDTH)
    at = grad_out + (b * grad_b + h * grad_h + first * grad_t)
    grad = load_rows(at, line * grad_t, alive, 0, VALUE_WIDTH, WIDE, True).to(tl.float32)
    at = out + (b * out_b + h * out_h + first * out_t) + ((line * out_t)[:, None] + d)
    result = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(grad * result, 1)
    if grad_lse is not None:
        at = grad_lse + (b * lse_b + h * lse_h + first * lse_t) + line * lse_t
        total -= tl.load(at, mask=alive, other=0.0)
    tl.store(delta + row + line, total, mask=exists)


@kernel
def spoilt_kernel(
    x, spoilt, x_b: tl.int64, x_h: tl.int64, x_t: tl.int64, heads: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Sets `spoilt` (1,) if anything in x (B, H, T, D) isn't finite."""
    x_b, x_h, x_t = divisible(x_b, x_h, x_t, vector_of(x))
    program, tiles = tl.program_id(0).to(tl.int64), tl.cdiv(time, ROWS)
    first, lane = program % tiles * ROWS, program // tiles
    line = tl.arange(0, ROWS)
    at = x + (lane // heads * x_b + lane % heads * x_h + first * x_t)
    read = load_rows(at, line * x_t, first + line < time, 0, WIDTH, WIDE, True)
    bad = tl.sum(tl.sum(read.to(tl.float32) * 0.0, 1), 0)
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
