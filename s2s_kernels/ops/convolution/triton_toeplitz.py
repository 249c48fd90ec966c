"""Depthwise convolution of 16-bit lines as products on tensor cores.

A row of a tile is a block of BLOCK neighbouring positions of one channel; its results are the inputs that it sees,
BLOCK + HEAD of them, times a Toeplitz matrix of the weights, which serves every block of the channel. The inputs are
read in vectors whatever the taps. A product with 0 carries what isn't finite to where it isn't seen: the sums of such
a tile are found again tap by tap.
"""

import triton
import triton.language as tl

from ..triton_common import is_finite, kernel, length_of
from .triton_depthwise import some_taps
from .triton_epilogue import TIME, finish

FAR = tl.constexpr(2**20)  # more than any tap reaches


@triton.jit
def _aligned_down(origin):
    return (origin + FAR) // 8 * 8 - FAR


@triton.jit
def _window(x, state, lengths, seen, state_t, time, length, low, EVEN: tl.constexpr):
    """Inputs at positions of one line, 0 where absent. EVEN: the line and all of `seen`'s rows are aligned."""
    if EVEN:
        inputs = tl.load(x + seen, mask=(seen >= 0) & (seen < time // 8 * 8), other=0.0)
        if lengths is not None:
            inputs = tl.where(seen < length, inputs, 0.0)
    else:
        inputs = tl.load(x + seen, mask=(seen >= 0) & (seen < length), other=0.0)
    if state is not None:
        before = tl.load(state + (seen - low) * state_t, mask=(seen >= low) & (seen < 0), other=0.0)
        inputs = tl.where(seen < 0, before, inputs)
    return inputs


@triton.jit
def _line_of(x, batch, channel, x_b, x_c, EVEN: tl.constexpr):
    """A line of x. EVEN says to the compiler what has been seen: it begins where a vector may be loaded."""
    if EVEN:
        return x + batch * (x_b // 8 * 8) + channel * (x_c // 8 * 8)
    else:
        return x + batch * x_b + channel * x_c


@triton.jit
def _matrix(weight, lag, step, TAPS: tl.constexpr, REVERSED: tl.constexpr):
    """The weight of the tap at each distance from the first one's input."""
    tap = lag // step
    place = TAPS - 1 - tap if REVERSED else tap
    return tl.load(weight + place, mask=(lag >= 0) & (lag % step == 0) & (tap < TAPS), other=0.0)


@triton.jit
def _make_tiles(
    main, head, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles, base,
    x_b, x_c, state_b, state_c, state_t, condition_b, condition_c, condition_t, residual_b, residual_c, residual_t,
    time, low, RESULTS: tl.constexpr, ACTIVATION: tl.constexpr, CLIP: tl.constexpr, CONDITION_UNIT: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Writes tiles begin..end; returns 0 times the sums, added up: NaN where one isn't finite."""
    row, place, ahead = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :], tl.arange(0, HEAD)[None, :]
    across = tl.zeros((1, 1), tl.int64) + channel
    nothing = tl.zeros((ROWS, BLOCK), tl.float32)
    for index in range(begin, end):
        batch, start = (index // tiles).to(tl.int64), (index % tiles).to(tl.int64) * (ROWS * BLOCK)
        length = length_of(lengths, batch, time)
        seen = start + base + row * BLOCK
        line, before = _line_of(x, batch, channel, x_b, x_c, EVEN), state
        if state is not None:
            before = _line_of(state, batch, channel, state_b, state_c, False)
        inputs = _window(line, before, lengths, seen + place, state_t, time, length, low, EVEN)
        others = _window(line, before, lengths, seen + BLOCK + ahead, state_t, time, length, low, EVEN)
        a = tl.dot(others, head, tl.dot(inputs, main, first))
        nothing += a * 0.0
        finish(
            a, a, across, across < RESULTS, start + row * BLOCK + place, start, batch, length if CLIP else time, time,
            condition, condition_b, condition_c, condition_t, residual, residual_b, residual_c, residual_t, saved, y,
            RESULTS, ACTIVATION, CONDITION_UNIT, RESIDUAL_UNIT, EVEN,
        )  # fmt: skip
    return nothing


@kernel
def toeplitz_kernel(
    x, state, weight, bias, condition, residual, lengths, saved, y,
    x_b: tl.int64, x_c: tl.int64, state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    condition_b: tl.int64, condition_c: tl.int64, condition_t: tl.int64,
    residual_b: tl.int64, residual_c: tl.int64, residual_t: tl.int64,
    batches: tl.int64, time: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64, splits: tl.int64,
    RESULTS: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr, REVERSED: tl.constexpr, CLIP: tl.constexpr,
    CONDITION_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """As depthwise_kernel for x dense in time, one output to an input channel and all T results. A program has one
    channel, and one of `splits` parts of the tiles of all rows of the batch. REVERSED: the taps run backwards."""
    program = tl.program_id(0)
    channel, split = program % RESULTS, (program // RESULTS).to(tl.int64)
    base = _aligned_down(origin)
    place, ahead = tl.arange(0, BLOCK), tl.arange(0, HEAD)
    line = weight + channel * TAPS
    lag, apart = (base - origin).to(tl.int32) - place[None, :], step.to(tl.int32)
    main = _matrix(line, place[:, None] + lag, apart, TAPS, REVERSED)
    head = _matrix(line, BLOCK + ahead[:, None] + lag, apart, TAPS, REVERSED)
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    if bias is not None:
        first += tl.load(bias + channel).to(tl.float32)
    tiles = tl.cdiv(time, ROWS * BLOCK).to(tl.int32)
    begin = (batches * tiles * split // splits).to(tl.int32)
    end = (batches * tiles * (split + 1) // splits).to(tl.int32)
    if x_b % 8 + x_c % 8 + time % 8 == 0:  # a branch of one kernel, not a kernel for each kind of length
        nothing = _make_tiles(
            main, head, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles, base,
            x_b, x_c, state_b, state_c, state_t, condition_b, condition_c, condition_t, residual_b, residual_c,
            residual_t, time, low, RESULTS, ACTIVATION, CLIP, CONDITION_UNIT, RESIDUAL_UNIT, True, ROWS, BLOCK, HEAD,
        )  # fmt: skip
    else:
        nothing = _make_tiles(
            main, head, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles, base,
            x_b, x_c, state_b, state_c, state_t, condition_b, condition_c, condition_t, residual_b, residual_c,
            residual_t, time, low, RESULTS, ACTIVATION, CLIP, CONDITION_UNIT, RESIDUAL_UNIT, False, ROWS, BLOCK, HEAD,
        )  # fmt: skip
    if tl.sum(tl.sum(nothing, 1), 0) != 0.0:
        tl.debug_barrier()  # what has been written is written again, perhaps by other lanes
        forward: tl.constexpr = -1 if REVERSED else 1
        first_tap: tl.constexpr = TAPS - 1 if REVERSED else 0
        across = tl.zeros((1, 1), tl.int64) + channel
        start_of_tile = tl.arange(0, BLOCK)[None, :]
        for part in range(begin.to(tl.int64) * ROWS, end.to(tl.int64) * ROWS):
            batch, start = part // (tiles * ROWS), part % (tiles * ROWS) * BLOCK
            length = length_of(lengths, batch, time)
            stop = length if CLIP else time
            at = start + start_of_tile
            from_state = state
            if state is not None:
                from_state = state + batch * state_b
            a = tl.zeros((1, BLOCK), tl.float32)
            if bias is not None:
                a += tl.load(bias + channel).to(tl.float32)
            a = some_taps(
                x + batch * x_b, from_state, weight + across * TAPS + first_tap, across, at < stop, at + origin, low,
                length, x_c, 1, state_c, state_t, step, a, forward, TAPS, TIME,
            )  # fmt: skip
            finish(
                a, a, across, across < RESULTS, at, start, batch, stop, time, condition, condition_b, condition_c,
                condition_t, residual, residual_b, residual_c, residual_t, saved, y,
                RESULTS, ACTIVATION, CONDITION_UNIT, RESIDUAL_UNIT, False,
            )  # fmt: skip


@triton.jit
def _products(
    grad, x, state, lengths, channel, begin, end, tiles, base, grad_b, grad_c, x_b, x_c, state_b, state_c, state_t,
    time, low, EVEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Of the gradients of blocks and their inputs, and the sum of the gradients."""
    row, place, ahead = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK)[None, :], tl.arange(0, HEAD)[None, :]
    main = tl.zeros((BLOCK, BLOCK), tl.float32)
    head = tl.zeros((BLOCK, HEAD), tl.float32)
    of_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for index in range(begin, end):
        batch, start = (index // tiles).to(tl.int64), (index % tiles).to(tl.int64) * (ROWS * BLOCK)
        length = length_of(lengths, batch, time)
        at = start + row * BLOCK
        line, before = _line_of(x, batch, channel, x_b, x_c, EVEN), state
        if state is not None:
            before = _line_of(state, batch, channel, state_b, state_c, False)
        upstream = _line_of(grad, batch, channel, grad_b, grad_c, EVEN)
        grads = _window(upstream, None, lengths, at + place, 0, time, length, 0, EVEN)
        inputs = _window(line, before, lengths, at + base + place, state_t, time, length, low, EVEN)
        others = _window(line, before, lengths, at + base + BLOCK + ahead, state_t, time, length, low, EVEN)
        turned = tl.trans(grads)
        main = tl.dot(turned, inputs, main)
        head = tl.dot(turned, others, head)
        of_bias += grads.to(tl.float32)
    return main, head, tl.sum(tl.sum(of_bias, 1), 0)


@kernel
def toeplitz_weight_kernel(
    grad, x, state, lengths, weight_sums, bias_sums,
    grad_b: tl.int64, grad_c: tl.int64, x_b: tl.int64, x_c: tl.int64,
    state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    batches: tl.int64, time: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64, splits: tl.int64,
    behind: tl.int64,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr, LAGS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """One split's share of the gradients of the weight, (splits, OUTPUTS, TAPS), and of the bias, (splits, OUTPUTS),
    `behind` elements further on. The products of a block's gradients and its inputs are summed over all blocks; a
    tap's lie on a diagonal."""
    program = tl.program_id(0)
    channel, split = program % OUTPUTS, (program // OUTPUTS).to(tl.int64)
    base = _aligned_down(origin)
    tiles = tl.cdiv(time, ROWS * BLOCK).to(tl.int32)
    begin = (batches * tiles * split // splits).to(tl.int32)
    end = (batches * tiles * (split + 1) // splits).to(tl.int32)
    if grad_b % 8 + grad_c % 8 + x_b % 8 + x_c % 8 + time % 8 == 0:
        main, head, of_bias = _products(
            grad, x, state, lengths, channel, begin, end, tiles, base, grad_b, grad_c, x_b, x_c, state_b, state_c,
            state_t, time, low, True, ROWS, BLOCK, HEAD,
        )  # fmt: skip
    else:
        main, head, of_bias = _products(
            grad, x, state, lengths, channel, begin, end, tiles, base, grad_b, grad_c, x_b, x_c, state_b, state_c,
            state_t, time, low, False, ROWS, BLOCK, HEAD,
        )  # fmt: skip
    tap = tl.arange(0, LAGS)
    lag = tl.arange(0, BLOCK)[:, None] + (origin - base).to(tl.int32) + tap[None, :] * step.to(tl.int32)
    counts = (tap < TAPS)[None, :]
    near = tl.gather(main, tl.minimum(lag, BLOCK - 1), 1)
    far = tl.gather(head, tl.minimum(tl.maximum(lag - BLOCK, 0), HEAD - 1), 1)
    of_taps = tl.sum(tl.where(counts, tl.where(lag < BLOCK, near, far), 0.0), 0)
    if tl.min(is_finite(of_taps).to(tl.int32), 0) == 0:
        of_taps = tl.zeros((LAGS,), tl.float32)
        place = tl.arange(0, BLOCK)
        for one in range(TAPS):
            total = tl.zeros((BLOCK,), tl.float32)
            for part in range(begin.to(tl.int64) * ROWS, end.to(tl.int64) * ROWS):
                batch, at = part // (tiles * ROWS), part % (tiles * ROWS) * BLOCK + place
                length, seen = length_of(lengths, batch, time), at + origin + one * step
                line, before = _line_of(x, batch, channel, x_b, x_c, False), state
                if state is not None:
                    before = _line_of(state, batch, channel, state_b, state_c, False)
                inputs = _window(line, before, lengths, seen, state_t, time, length, low, False).to(tl.float32)
                upstream = _line_of(grad, batch, channel, grad_b, grad_c, False)
                grads = _window(upstream, None, lengths, at, 0, time, length, 0, False).to(tl.float32)
                total += tl.where((at < length) & (seen >= low) & (seen < length), grads * inputs, 0.0)
            of_taps += tl.where(tap == one, tl.sum(total, 0), 0.0)
    to = split * OUTPUTS + channel
    tl.store(weight_sums + to * TAPS + tap, of_taps.to(weight_sums.dtype.element_ty), mask=tap < TAPS)
    tl.store(bias_sums + behind + to, of_bias.to(bias_sums.dtype.element_ty))
