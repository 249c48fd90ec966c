"""Depthwise convolution of lines by few taps, any distance apart: one product of vectors to a tap.

A program has one channel and keeps its weights in registers. A line is read from memory once and by the other taps
from the cache; where positions of all taps begin where a vector may be loaded, it is in vectors.
"""

import triton
import triton.language as tl

from ..triton_common import kernel, length_of
from .triton_epilogue import finish


@triton.jit
def _inputs(line, before, seen, time, low, state_t, WHOLE: tl.constexpr):
    """Inputs of a tap in 32 bits; WHOLE: all of them lie in x."""
    if WHOLE:
        return tl.load(line + seen).to(tl.float32)
    else:
        inputs = tl.load(line + seen, mask=(seen >= 0) & (seen < time), other=0.0)
        if before is not None:
            earlier = tl.load(before + (seen - low) * state_t, mask=(seen >= low) & (seen < 0), other=0.0)
            inputs = tl.where(seen < 0, earlier, inputs)
        return inputs.to(tl.float32)


@triton.jit
def _sum_of_taps(
    line, before, factors, first, seen, here, time, length, low, state_t, step, TAPS: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    a = tl.zeros(seen.shape, tl.float32) + first
    for tap in tl.static_range(TAPS):
        at = seen + tap * step
        counts = here & (at >= low) & (at < length)
        product = _inputs(line, before, at, time, low, state_t, WHOLE) * factors[tap]
        a += product if WHOLE else tl.where(counts, product, 0.0)  # 0 times infinity is no 0
    return a


@triton.jit
def _sum_tiles(
    factors, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles,
    x_b, x_c, state_b, state_c, state_t, condition_b, condition_c, condition_t, residual_b, residual_c, residual_t,
    time, origin, step, low, RESULTS: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr, CLIP: tl.constexpr,
    CONDITION_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr, EVEN: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    VECTORS: tl.constexpr = EVEN and y.dtype.element_ty.primitive_bitwidth == 16
    if EVEN:
        offset = tl.arange(0, POSITIONS)[None, :]
    else:  # a shape of its own: in the other's layout, a thread would load neighbours one by one
        offset = tl.arange(0, 8)[:, None] * (POSITIONS // 8) + tl.arange(0, POSITIONS // 8)[None, :]
    across = tl.zeros((1, 1), tl.int64) + channel
    for index in range(begin, end):
        batch, start = (index // tiles).to(tl.int64), index % tiles * POSITIONS
        length = length_of(lengths, batch, time).to(tl.int32)
        stop = length if CLIP else time
        line, before = x + batch * x_b + channel * x_c, state
        if state is not None:
            before = state + batch * state_b + channel * state_c
        seen = start + origin
        if (seen >= 0) & (start + POSITIONS <= stop) & (seen + POSITIONS + (TAPS - 1) * step <= length):
            a = _sum_of_taps(
                line, None, factors, first, seen + offset, True, time, length, low, state_t, step, TAPS, True
            )  # fmt: skip
        else:
            a = _sum_of_taps(
                line, before, factors, first, seen + offset, start + offset < stop, time, length, low, state_t, step,
                TAPS, False,
            )  # fmt: skip
        finish(
            a, a, across, across < RESULTS, start + offset, start, batch, stop, time,
            condition, condition_b, condition_c, condition_t, residual, residual_b, residual_c, residual_t, saved, y,
            RESULTS, ACTIVATION, CONDITION_UNIT, RESIDUAL_UNIT, VECTORS,
        )  # fmt: skip


@kernel
def line_kernel(
    x, state, weight, bias, condition, residual, lengths, saved, y,
    x_b: tl.int64, x_c: tl.int64, state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    condition_b: tl.int64, condition_c: tl.int64, condition_t: tl.int64,
    residual_b: tl.int64, residual_c: tl.int64, residual_t: tl.int64,
    batches: tl.int64, time: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64, splits: tl.int64,
    RESULTS: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr, REVERSED: tl.constexpr, CLIP: tl.constexpr,
    CONDITION_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """As toeplitz_kernel. The positions of a line and all that taps reach from them fit 32 bits."""
    program = tl.program_id(0)
    channel, split = (program % RESULTS).to(tl.int64), (program // RESULTS).to(tl.int64)
    factors = ()
    for tap in tl.static_range(TAPS):
        place = channel * TAPS + (TAPS - 1 - tap if REVERSED else tap)
        factors = factors + (tl.load(weight + place).to(tl.float32),)  # type: ignore[assignment]
    first = 0.0
    if bias is not None:
        first = tl.load(bias + channel).to(tl.float32)
    tiles = tl.cdiv(time, POSITIONS)
    begin, end = (
        (batches * tiles * split // splits).to(tl.int32),
        (batches * tiles * (split + 1) // splits).to(tl.int32),
    )
    tiles, even = tiles.to(tl.int32), (x_b | x_c | time | origin | step) & 7
    time, origin, step, low = time.to(tl.int32), origin.to(tl.int32), step.to(tl.int32), low.to(tl.int32)
    if even == 0:  # a branch of one kernel, not a kernel for each kind of length
        _sum_tiles(
            factors, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles,
            x_b // 8 * 8, x_c // 8 * 8, state_b, state_c, state_t, condition_b, condition_c, condition_t,
            residual_b, residual_c, residual_t, time // 8 * 8, origin // 8 * 8, step // 8 * 8, low,
            RESULTS, TAPS, ACTIVATION, CLIP, CONDITION_UNIT, RESIDUAL_UNIT, True, POSITIONS,
        )  # fmt: skip
    else:
        _sum_tiles(
            factors, first, x, state, condition, residual, lengths, saved, y, channel, begin, end, tiles,
            x_b, x_c, state_b, state_c, state_t, condition_b, condition_c, condition_t,
            residual_b, residual_c, residual_t, time, origin, step, low,
            RESULTS, TAPS, ACTIVATION, CLIP, CONDITION_UNIT, RESIDUAL_UNIT, False, POSITIONS,
        )  # fmt: skip


@triton.jit
def _taps_products(
    totals, grads, line, before, seen, here, time, length, low, state_t, step,
    TAPS: tl.constexpr, AXIS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    added = ()
    for tap in tl.static_range(TAPS):
        at = seen + tap * step
        counts = here & (at >= low) & (at < length)
        product = _inputs(line, before, at, time, low, state_t, WHOLE) * grads
        if not WHOLE:
            product = tl.where(counts, product, 0.0)
        added = added + (totals[tap] + tl.sum(product, AXIS),)  # type: ignore[assignment]
    return added


@triton.jit
def _line_products(
    grad, x, state, lengths, weight_sums, bias_sums, channel, split, begin, end, tiles, grad_b, grad_c, x_b, x_c,
    state_b, state_c, state_t, time, origin, step, low,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr, EVEN: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    # A tile is laid out so that the sum along an axis is a thread's own: of a vector, or of positions far apart.
    EACH: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if EVEN else 8
    AXIS: tl.constexpr = 1 if EVEN else 0
    if EVEN:
        offset = tl.arange(0, POSITIONS // EACH)[:, None] * EACH + tl.arange(0, EACH)[None, :]
    else:
        offset = tl.arange(0, EACH)[:, None] * (POSITIONS // EACH) + tl.arange(0, POSITIONS // EACH)[None, :]
    of_bias = tl.zeros((POSITIONS // EACH,), tl.float32)
    totals = ()
    for _ in tl.static_range(TAPS):
        totals = totals + (of_bias,)  # type: ignore[assignment]
    for index in range(begin, end):
        batch, start = (index // tiles).to(tl.int64), index % tiles * POSITIONS
        length = length_of(lengths, batch, time).to(tl.int32)
        upstream, line, before = grad + batch * grad_b + channel * grad_c, x + batch * x_b + channel * x_c, state
        if state is not None:
            before = state + batch * state_b + channel * state_c
        seen, here = start + origin, start + offset < length
        grads = tl.load(upstream + (start + offset), mask=start + offset < time, other=0.0).to(tl.float32)
        if lengths is not None:
            grads = tl.where(here, grads, 0.0)
        of_bias += tl.sum(grads, AXIS)
        if (seen >= 0) & (start + POSITIONS <= length) & (seen + POSITIONS + (TAPS - 1) * step <= length):
            totals = _taps_products(
                totals, grads, line, None, seen + offset, True, time, length, low, state_t, step, TAPS, AXIS, True
            )  # fmt: skip
        else:
            totals = _taps_products(
                totals, grads, line, before, seen + offset, here, time, length, low, state_t, step, TAPS, AXIS, False
            )  # fmt: skip
    to = split * OUTPUTS + channel
    for tap in tl.static_range(TAPS):
        total = tl.sum(totals[tap], 0)
        tl.store(weight_sums + to * TAPS + tap, total.to(weight_sums.dtype.element_ty))
    tl.store(bias_sums + to, tl.sum(of_bias, 0).to(bias_sums.dtype.element_ty))


@kernel
def line_weight_kernel(
    grad, x, state, lengths, weight_sums, bias_sums,
    grad_b: tl.int64, grad_c: tl.int64, x_b: tl.int64, x_c: tl.int64,
    state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    batches: tl.int64, time: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64, splits: tl.int64,
    behind: tl.int64,
    OUTPUTS: tl.constexpr, TAPS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """As toeplitz_weight_kernel."""
    program = tl.program_id(0)
    channel, split = (program % OUTPUTS).to(tl.int64), (program // OUTPUTS).to(tl.int64)
    bias_sums += behind
    tiles = tl.cdiv(time, POSITIONS)
    begin, end = (
        (batches * tiles * split // splits).to(tl.int32),
        (batches * tiles * (split + 1) // splits).to(tl.int32),
    )
    tiles, even = tiles.to(tl.int32), (grad_b | grad_c | x_b | x_c | time | origin | step) & 7
    time, origin, step, low = time.to(tl.int32), origin.to(tl.int32), step.to(tl.int32), low.to(tl.int32)
    if even == 0:
        _line_products(
            grad, x, state, lengths, weight_sums, bias_sums, channel, split, begin, end, tiles,
            grad_b // 8 * 8, grad_c // 8 * 8, x_b // 8 * 8, x_c // 8 * 8, state_b, state_c, state_t,
            time // 8 * 8, origin // 8 * 8, step // 8 * 8, low, OUTPUTS, TAPS, True, POSITIONS,
        )  # fmt: skip
    else:
        _line_products(
            grad, x, state, lengths, weight_sums, bias_sums, channel, split, begin, end, tiles,
            grad_b, grad_c, x_b, x_c, state_b, state_c, state_t, time, origin, step, low, OUTPUTS, TAPS, False,
            POSITIONS,
        )  # fmt: skip
