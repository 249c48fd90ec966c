"""Convolution of one input channel to an output on a GPU: no matrix product, each tile is read and written once."""

import triton
import triton.language as tl

from ..triton_common import kernel, length_of, spread
from .triton_dense import bias_share
from .triton_epilogue import CHANNEL, GLU, TIME, finish


@triton.jit
def _all_taps(
    x, weight, source, exists, first, offset, x_c, x_t, step, total,
    weight_t: tl.constexpr, TAPS: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    """total plus the products of one input channel (`source`) to an output, at first + offset and the taps that follow;
    weight: of each output's first tap."""
    tile = x + spread(source, x_c, X_UNIT == CHANNEL) + spread(offset, x_t, X_UNIT == TIME)
    for tap in tl.range(TAPS, loop_unroll_factor=TAPS if TAPS <= 8 else 4):
        inputs = tl.load(tile + (first + tap * step) * spread(1, x_t, X_UNIT == TIME), mask=exists, other=0.0)
        total += inputs.to(tl.float32) * tl.load(weight + tap * weight_t, mask=exists, other=0.0).to(tl.float32)
    return total


@triton.jit
def some_taps(
    x, state, weight, source, exists, seen, low, length, x_c, x_t, state_c, state_t, step, total,
    weight_t: tl.constexpr, TAPS: tl.constexpr, X_UNIT: tl.constexpr,
):  # fmt: skip
    """The same where not all positions have all taps, or have some from the state."""
    across = spread(source, x_c, X_UNIT == CHANNEL)
    for tap in range(TAPS):
        at = seen + tap * step
        counts = exists & (at >= low) & (at < length)
        inputs = tl.load(x + across + spread(at, x_t, X_UNIT == TIME), mask=counts & (at >= 0), other=0.0)
        if state is not None:
            earlier = state + source * state_c + (at - low) * state_t
            inputs = tl.where(at < 0, tl.load(earlier, mask=counts & (at < 0), other=0.0), inputs)
        factor = tl.load(weight + tap * weight_t, mask=exists, other=0.0).to(tl.float32)
        total += tl.where(counts, inputs.to(tl.float32) * factor, 0.0)  # 0 times infinity is no 0
    return total


@triton.jit
def _whole_tile(
    x, weight, channel, exists, first, offset, x_c, x_t, step, a, b,
    RESULTS: tl.constexpr, MULTIPLE: tl.constexpr, TAPS: tl.constexpr, GATE: tl.constexpr, BACKWARD: tl.constexpr,
    X_UNIT: tl.constexpr,
):  # fmt: skip
    if BACKWARD:
        for one in range(MULTIPLE):
            source = channel * MULTIPLE + one
            of_last_tap = weight + source * TAPS + (TAPS - 1)
            a = _all_taps(x, of_last_tap, source, exists, first, offset, x_c, x_t, step, a, -1, TAPS, X_UNIT)
    else:
        source = channel // MULTIPLE
        a = _all_taps(x, weight + channel * TAPS, source, exists, first, offset, x_c, x_t, step, a, 1, TAPS, X_UNIT)
        if GATE:
            partner = channel + RESULTS
            source = partner // MULTIPLE
            b = _all_taps(x, weight + partner * TAPS, source, exists, first, offset, x_c, x_t, step, b, 1, TAPS, X_UNIT)
    return a, b


@kernel
def depthwise_kernel(
    x, state, weight, bias, condition, residual, lengths, saved, y,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    condition_b: tl.int64, condition_c: tl.int64, condition_t: tl.int64,
    residual_b: tl.int64, residual_c: tl.int64, residual_t: tl.int64,
    time: tl.int64, begin: tl.int64, end: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64,
    RESULTS: tl.constexpr, MULTIPLE: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr, CLIP: tl.constexpr, X_UNIT: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    CONDITION_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """As dense_kernel, with MULTIPLE outputs to an input channel; weight: (outputs, TAPS), contiguous. BACKWARD: the
    inputs are the gradients of outputs, MULTIPLE to a result, and the taps run backwards. EVEN: all positions that
    begin, origin and step make are multiples of 8; else vectors of results would only scatter the loads of inputs."""
    GATE: tl.constexpr = ACTIVATION >= GLU
    BLOCKS: tl.constexpr = (RESULTS + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    tiles = tl.cdiv(end - begin, POSITIONS)
    block, rest = program % BLOCKS, (program // BLOCKS).to(tl.int64)
    batch, tile = rest // tiles, rest % tiles * POSITIONS
    start = begin + tile
    length = length_of(lengths, batch, time)
    stop = tl.minimum(end, length) if CLIP else end

    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[:, None].to(tl.int64)
    offset = tl.arange(0, POSITIONS)[None, :]
    exists = channel < RESULTS
    if ALIGNED:
        x_b, x_t = x_b // 8 * 8, x_t // 8 * 8
    if state is not None:
        state += batch * state_b
    a = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    b = a
    if bias is not None:
        a += tl.load(bias + channel, mask=channel < RESULTS, other=0.0).to(tl.float32)
        if GATE:
            b += tl.load(bias + RESULTS + channel, mask=channel < RESULTS, other=0.0).to(tl.float32)
    whole = (start + origin >= 0) & (start + POSITIONS <= stop)
    whole = whole & (start + POSITIONS - 1 + origin + (TAPS - 1) * step < length)
    if whole:
        first = start + origin
        even = x_b % 8 + x_c % 8 if EVEN else 1
        if even == 0:  # a branch of one kernel, not a kernel for each kind of length
            a, b = _whole_tile(
                x + batch * (x_b // 8 * 8), weight, channel, exists, first // 8 * 8, offset, x_c // 8 * 8, x_t,
                step // 8 * 8, a, b, RESULTS, MULTIPLE, TAPS, GATE, BACKWARD, X_UNIT,
            )  # fmt: skip
        else:
            a, b = _whole_tile(
                x + batch * x_b, weight, channel, exists, first, offset, x_c, x_t, step, a, b,
                RESULTS, MULTIPLE, TAPS, GATE, BACKWARD, X_UNIT,
            )  # fmt: skip
    elif start < stop:
        seen = start + offset + origin
        here = exists & (start + offset < stop)
        x += batch * x_b
        if BACKWARD:
            for one in range(MULTIPLE):
                source = channel * MULTIPLE + one
                a = some_taps(
                    x, None, weight + source * TAPS + (TAPS - 1), source, here, seen, low, length,
                    x_c, x_t, 0, 0, step, a, -1, TAPS, X_UNIT,
                )  # fmt: skip
        else:
            a = some_taps(
                x, state, weight + channel * TAPS, channel // MULTIPLE, here, seen, low, length,
                x_c, x_t, state_c, state_t, step, a, 1, TAPS, X_UNIT,
            )  # fmt: skip
            if GATE:
                partner = channel + RESULTS
                b = some_taps(
                    x, state, weight + partner * TAPS, partner // MULTIPLE, here, seen, low, length,
                    x_c, x_t, state_c, state_t, step, b, 1, TAPS, X_UNIT,
                )  # fmt: skip
    finish(
        a, b, channel, exists, tile + offset, tile, batch, stop - begin, end - begin,
        condition, condition_b, condition_c, condition_t, residual, residual_b, residual_c, residual_t, saved, y,
        RESULTS, ACTIVATION, CONDITION_UNIT, RESIDUAL_UNIT,
        (EVEN or (not BACKWARD and X_UNIT != TIME)) and y.dtype.element_ty.primitive_bitwidth == 16,
    )  # fmt: skip


@kernel
def depthwise_weight_kernel(
    grad, x, state, lengths, sums,
    grad_b: tl.int64, grad_c: tl.int64, grad_t: tl.int64, x_b: tl.int64, x_c: tl.int64, x_t: tl.int64,
    state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    batches: tl.int64, time: tl.int64, chunk: tl.int64, rows: tl.int64, origin: tl.int64, step: tl.int64,
    low: tl.int64, splits: tl.int64, bias_chunk: tl.int64, bias_rows: tl.int64,
    OUTPUTS: tl.constexpr, MULTIPLE: tl.constexpr, TAPS: tl.constexpr, GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr, SEVERAL: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    BIAS_CHANNELS: tl.constexpr, BIAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """One split's share of the gradient of SEVERAL taps of the weight; sums: (splits, OUTPUTS, TAPS). The bias: as in
    dense_weight_kernel."""
    BLOCKS: tl.constexpr = (OUTPUTS + CHANNELS - 1) // CHANNELS
    TAP_BLOCKS: tl.constexpr = (TAPS + SEVERAL - 1) // SEVERAL
    program = tl.program_id(0)
    beyond = program - splits * (TAP_BLOCKS * BLOCKS)
    if beyond >= 0:
        bias_share(
            grad, lengths, sums + splits * (OUTPUTS * TAPS), beyond.to(tl.int32), grad_b, grad_c, grad_t,
            batches, time, bias_chunk, bias_rows, OUTPUTS, GRAD_UNIT, BIAS_CHANNELS, BIAS_POSITIONS,
        )  # fmt: skip
        return
    taps = program % TAP_BLOCKS * SEVERAL + tl.arange(0, SEVERAL)
    output = (program // TAP_BLOCKS % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    split = (program // (TAP_BLOCKS * BLOCKS)).to(tl.int64)
    first = split // rows * chunk

    if ALIGNED:
        x_b, x_t, grad_b, grad_t = x_b // 8 * 8, x_t // 8 * 8, grad_b // 8 * 8, grad_t // 8 * 8
    offset = tl.arange(0, POSITIONS)
    exists = (output < OUTPUTS)[:, None]
    tap, source = taps[:, None, None], (output // MULTIPLE)[None, :, None]
    shift = origin + tap * step
    grads = grad + spread(output, grad_c, GRAD_UNIT == CHANNEL)[:, None]
    inputs_of = x + spread(source, x_c, X_UNIT == CHANNEL)
    total = tl.zeros((SEVERAL, CHANNELS, POSITIONS), tl.float32)
    for batch in range(split % rows, batches, rows):
        length = length_of(lengths, batch, time)
        stop = tl.minimum(first + chunk, length)
        for start in range(first, stop, POSITIONS):
            position = start + offset
            present = exists & (position < stop)[None, :]
            at = grads + batch * grad_b + spread(position, grad_t, GRAD_UNIT == TIME)[None, :]
            upstream = tl.load(at, mask=present, other=0.0).to(tl.float32)[None, :, :]
            seen = position[None, None, :] + shift
            counts = present[None, :, :] & (tap < TAPS) & (seen >= low) & (seen < length)
            at = inputs_of + batch * x_b + spread(seen, x_t, X_UNIT == TIME)
            inputs = tl.load(at, mask=counts & (seen >= 0), other=0.0)
            if state is not None:
                at = state + batch * state_b + source * state_c + (seen - low) * state_t
                inputs = tl.where(seen < 0, tl.load(at, mask=counts & (seen < 0), other=0.0), inputs)
            total += tl.where(counts, upstream * inputs.to(tl.float32), 0.0)
    place = (split * OUTPUTS + output)[None, :] * TAPS + taps[:, None]
    tl.store(sums + place, tl.sum(total, 2), mask=(taps < TAPS)[:, None] & (output < OUTPUTS)[None, :])
