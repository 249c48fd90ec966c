"""The random numbers of `random.py` inside Triton kernels: the same words, bit for bit."""

import triton
import triton.language as tl


@triton.jit
def kept(seed, row, column, limit):
    """Which elements survive dropout; limit: of the 2^32 words, how many drop one. row, column: 64-bit, broadcastable
    to each other."""
    key, stream = tl.load(seed), tl.load(seed + 1)
    first = (column // 32 * 8 + column % 8 + row * 0).to(tl.uint32)
    low, high = (row + column * 0).to(tl.uint32), ((row + column * 0) >> 32).to(tl.uint32)
    words = tl.philox(key, first, low, high, (stream + row * 0 + column * 0).to(tl.uint32))
    place = column // 8 % 4
    word = tl.where(place < 2, tl.where(place == 0, words[0], words[1]), tl.where(place == 2, words[2], words[3]))
    return word.to(tl.int64) >= limit


@triton.jit
def dropped(weights, seed, row, column, limit):
    """Weights after dropout."""
    scale = 4294967296.0 / (tl.full((), 4294967296, tl.int64) - limit).to(tl.float32)
    return tl.where(kept(seed, row, column, limit), weights * scale, 0.0)
