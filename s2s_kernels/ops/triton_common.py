"""What the Triton kernels of several operators share, and their launchers.

Sizes, strides and positions are 64-bit and never specialised, so that one compilation serves every length and batch.
"""

import contextlib

import torch
import triton
import triton.language as tl

from .random import threshold
from .triton_launch import kernel

REDUCED = 256  # elements of a program of reduce_kernel
# How torch names the precision of float32 products, and the way the tensor cores keep it: not at all, in three
# products, in one.
PRECISION = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}


@triton.jit
def spread(index, stride, UNIT: tl.constexpr):
    """index times stride; a stride known to be 1 is left out, so that the compiler sees neighbours."""
    if UNIT:
        return index
    else:
        return index * stride


@triton.jit
def length_of(lengths, batch, time):
    """How many positions of a row are present: its length, in [0, T] whatever the tensor holds."""
    if lengths is None:
        return time
    else:
        return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), time)


@triton.jit
def tanh(x):
    """A series near 0, where the exponential form cancels."""
    square = x * x
    series = x + x * square * (
        -0.333333333333 + square * (0.133333333333 + square * (-0.0539682539683 + square * 0.0218694885362))
    )
    decay = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -magnitude, magnitude))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def keep_tile(seed, row, first, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STREAM: tl.constexpr = 0):
    """Which elements of columns first..first + COLUMNS of some rows dropout keeps, as `random.keep_mask` draws them.

    row: (ROWS,) int64; first: a multiple of 32, or of COLUMNS where that is 8 or 16; threshold: the least word that is
    kept.
    """
    # 32 columns are four words of eight neighbouring counters.
    COUNTERS: tl.constexpr = COLUMNS // 4 if COLUMNS >= 32 else 8
    counter = first // 32 * 8 + tl.arange(0, COUNTERS)
    low, high = row.to(tl.uint32), (row >> 32).to(tl.uint32)
    last = (tl.load(seed + 1) + STREAM).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed), counter.to(tl.uint32)[None, :], low[:, None], high[:, None], last)
    least = threshold.to(tl.uint32)
    a, b = (a >= least).to(tl.int8), (b >= least).to(tl.int8)
    c, d = (c >= least).to(tl.int8), (d >= least).to(tl.int8)
    if COLUMNS >= 32:
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, COLUMNS // 32, 8, 4)
        return words.permute(0, 1, 3, 2).reshape(ROWS, COLUMNS) != 0
    else:
        later = first % 32 >= 16
        a, b = tl.where(later, c, a), tl.where(later, d, b)
        if COLUMNS == 16:
            return tl.join(a, b).permute(0, 2, 1).reshape(ROWS, COLUMNS) != 0
        else:
            return tl.where(first % 16 != 0, b, a) != 0


@triton.jit
def is_finite(x):
    return x * 0.0 == 0.0


@triton.jit
def _reduce(sums, result, count, splits, block, BLOCK: tl.constexpr):
    element = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), sums.dtype.element_ty)
    for split in range(splits):
        total += tl.load(sums + split * count + element, mask=element < count, other=0.0)
    tl.store(result + element, total.to(result.dtype.element_ty), mask=element < count)


@kernel
def reduce_kernel(
    sums, result, other, count: tl.int64, splits: tl.int64, other_count: tl.int64, other_splits: tl.int64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The splits' shares added in their order: the same bits on every run. Where there is another result, its shares
    lie behind these."""
    block = tl.program_id(0).to(tl.int64)
    if other is None:
        _reduce(sums, result, count, splits, block, BLOCK)
    else:
        blocks = tl.cdiv(count, BLOCK)
        if block < blocks:
            _reduce(sums, result, count, splits, block, BLOCK)
        else:
            _reduce(sums + splits * count, other, other_count, other_splits, block - blocks, BLOCK)


def power(size: int, low: int, high: int) -> int:
    """The power of two that holds size, within bounds that are powers of two."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)


def dense(tensor: torch.Tensor) -> bool:
    """Whether neighbours along the last dimension are neighbours in memory."""
    return tensor.stride(-1) == 1


def precision() -> str:
    return PRECISION[torch.get_float32_matmul_precision()]


def dropout_numbers(p: float) -> tuple[int, float]:
    """The least word that is kept, for `keep_tile`, and what the kept are multiplied by."""
    least = threshold(p)
    return min(least, 2**32 - 1), 0.0 if least >= 2**32 else 1 / (1 - p)


def strides_of(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Those of a tensor of three dimensions, 0 where there is none."""
    return (0, 0, 0) if tensor is None else tensor.stride()


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device, which may be another than the tensors'."""
    if x.is_cuda and torch.cuda.current_device() == x.get_device():
        return contextlib.nullcontext()  # a change of device to the same one would take as long as a launch
    return torch.cuda.device_of(x)


def reduce(
    sums: torch.Tensor, result: torch.Tensor, splits: int = 0, other: torch.Tensor | None = None, other_splits: int = 0
) -> torch.Tensor:
    """Fills result with the sum of `splits` shares in sums (0: as many as its first dimension has), which has a dtype
    to sum in; and other, where it has any, with that of the shares behind them."""
    count, other_count = result.numel(), 0 if other is None or not other_splits else other.numel()
    blocks = -(-count // REDUCED) - (-other_count // REDUCED)
    if blocks:
        reduce_kernel[(blocks,)](
            sums, result, other, count, splits or sums.shape[0], other_count, other_splits, BLOCK=REDUCED, num_warps=4
        )
    return result
