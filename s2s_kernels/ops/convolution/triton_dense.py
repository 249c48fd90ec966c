"""Dense and grouped convolution on a GPU: matrix products over taps and channels.

A program makes a tile (positions, channels) of results. The gradient of the input is the same product: weights turned
round (`channel` and `output` change places, the taps run backwards) and another origin.
"""

import triton
import triton.language as tl

from ..triton_common import is_finite, kernel, length_of, spread
from .triton_epilogue import CHANNEL, GLU, TIME, finish


@kernel
def dense_kernel(
    x, state, weight, bias, condition, residual, lengths, saved, y, flags,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    condition_b: tl.int64, condition_c: tl.int64, condition_t: tl.int64,
    residual_b: tl.int64, residual_c: tl.int64, residual_t: tl.int64,
    time: tl.int64, begin: tl.int64, end: tl.int64, origin: tl.int64, step: tl.int64, low: tl.int64,
    first_tile: tl.int64, tiles: tl.int64,
    INPUTS: tl.constexpr, RESULTS: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr, ACTIVATION: tl.constexpr,
    TURNED: tl.constexpr, CLIP: tl.constexpr, X_UNIT: tl.constexpr, CONDITION_UNIT: tl.constexpr,
    RESIDUAL_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, EDGE: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, REDUCED: tl.constexpr, FLAGGED: tl.constexpr,
):  # fmt: skip
    """Results at positions begin..end of T inputs: position t sees the inputs at t + origin + k step that are at least
    `low` (below 0 they are the state's) and below the length. TURNED: the taps of the weight run backwards. CLIP:
    positions at or past the length give 0.

    x: (B, GROUPS INPUTS, T); weight: (GROUPS, RESULTS or twice that, TAPS, INPUTS rounded up to REDUCED), contiguous;
    y: (B, GROUPS RESULTS, end - begin), contiguous. A gate has one group.

    Of `tiles` tiles of POSITIONS from `first_tile` on, this makes those whose positions have all taps from x (EDGE 0),
    or the others, EDGE channels at a time: there the products of a tap are kept apart until it is known which of them
    count, since 0 times an infinite weight is no 0. Two kernels, because together they need too many registers.

    With flags, where there is no state, EDGE 0 makes all tiles and takes absent inputs as 0; it says of each tile that
    has any whether a sum isn't finite, and only such tiles are left to the other kernel. flags: (B, tiles of a row,
    GROUPS, blocks of FLAGGED channels).
    """
    GATE: tl.constexpr = ACTIVATION >= GLU
    BLOCKS: tl.constexpr = (RESULTS + CHANNELS - 1) // CHANNELS
    PARTS: tl.constexpr = (INPUTS + REDUCED - 1) // REDUCED if INPUTS > 0 else 1  # of a tap's channels
    ROW: tl.constexpr = TAPS * PARTS * REDUCED
    # Programs that share a tile of the input follow one another.
    program = tl.program_id(0)
    block, group = program % BLOCKS, program // BLOCKS % GROUPS
    rest = (program // (BLOCKS * GROUPS)).to(tl.int64)
    batch, first = rest // tiles, (first_tile + rest % tiles) * POSITIONS
    start = begin + first
    length = length_of(lengths, batch, time)
    stop = tl.minimum(end, length) if CLIP else end
    last = tl.minimum(start + POSITIONS, stop) - 1
    whole = (start + origin >= 0) & ((start >= stop) | (last + origin + (TAPS - 1) * step < length))
    row_of_flags = (batch * tl.cdiv(end - begin, POSITIONS) + first // POSITIONS) * GROUPS + group
    flag = row_of_flags * ((RESULTS + FLAGGED - 1) // FLAGGED) + block * CHANNELS // FLAGGED
    if flags is None:
        if whole == (EDGE > 0):
            return
    elif EDGE > 0:
        if whole:
            return
        if tl.load(flags + flag) == 0:
            return

    offset = tl.arange(0, POSITIONS)
    position = start + offset
    column = block * CHANNELS + tl.arange(0, CHANNELS)
    if ALIGNED:  # says to the compiler what the launcher has seen: rows begin where a vector may be loaded
        x_b, x_t = x_b // 8 * 8, x_t // 8 * 8
    x += batch * x_b + group * INPUTS * spread(1, x_c, X_UNIT == CHANNEL)
    rows = weight + (group * (RESULTS * 2 if GATE else RESULTS) + column).to(tl.int64) * ROW
    exists = (column < RESULTS)[None, :]

    a = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    b = a
    if bias is not None:  # first, so that it takes no registers of its own
        a += tl.load(bias + group * RESULTS + column, mask=column < RESULTS, other=0.0).to(tl.float32)[None, :]
        if GATE:
            b += tl.load(bias + RESULTS + column, mask=column < RESULTS, other=0.0).to(tl.float32)[None, :]
    if EDGE == 0:
        if TURNED:  # from the other end: the weight's taps as they lie
            origin, step = origin + (TAPS - 1) * step, -step
        reduced = tl.arange(0, REDUCED)
        tile = spread(offset, x_t, X_UNIT == TIME)[:, None] + spread(reduced, x_c, X_UNIT == CHANNEL)[None, :]
        x += (start + origin) * spread(1, x_t, X_UNIT == TIME)
        present = (position < stop)[:, None]
        for i in range(tl.where(start < stop, TAPS * PARTS, 0)):
            tap, part = i // PARTS, i % PARTS * REDUCED
            source = x + tap * step * spread(1, x_t, X_UNIT == TIME) + part * spread(1, x_c, X_UNIT == CHANNEL)
            mask = present
            if flags is not None:
                seen = position + origin + tap * step
                mask = present & ((seen >= 0) & (seen < length))[:, None]
            if INPUTS % REDUCED != 0:
                mask = mask & (part + reduced < INPUTS)[None, :]
            inputs = tl.load(source + tile, mask=mask, other=0.0)
            at = rows[None, :] + (i * REDUCED + reduced)[:, None]
            a = tl.dot(inputs, tl.load(at, mask=exists, other=0.0), a, input_precision=PRECISION)
            if GATE:
                b = tl.dot(inputs, tl.load(at + RESULTS * ROW, mask=exists, other=0.0), b, input_precision=PRECISION)
        if flags is not None:
            finite = is_finite(a) & is_finite(b) if GATE else is_finite(a)
            tl.store(flags + flag, tl.max(tl.max((~finite).to(tl.int32), 1), 0))
    else:
        # The taps that see anything from this tile.
        least, most = low - start - POSITIONS + 1 - origin, length - start - origin
        begin_tap = tl.minimum(tl.where(least > 0, tl.cdiv(least, step), 0), TAPS).to(tl.int32)
        end_tap = tl.minimum(tl.where(most > 0, tl.cdiv(most, step), 0), TAPS).to(tl.int32)
        end_tap = tl.where(start < stop, end_tap, 0)
        for tap in tl.range(begin_tap, end_tap, num_stages=1):
            seen = position + origin + tap * step
            counts = (seen >= low) & (seen < length) & (position < stop)
            place = x + spread(seen, x_t, X_UNIT == TIME)
            stride = x_c
            if state is not None:
                before = state + batch * state_b + group * INPUTS * state_c + (seen - low) * state_t
                place = tl.where(seen < 0, before, place)
                stride = tl.where(seen < 0, state_c, x_c)[:, None]
            tap_a = tl.zeros((POSITIONS, CHANNELS), tl.float32)
            tap_b = tap_a
            for part in tl.range(0, INPUTS, EDGE, num_stages=1):
                some = part + tl.arange(0, EDGE)
                inputs = tl.load(
                    place[:, None] + some[None, :] * stride, mask=counts[:, None] & (some < INPUTS)[None, :], other=0.0
                )
                at = rows[None, :] + ((TAPS - 1 - tap if TURNED else tap) * PARTS * REDUCED + some)[:, None]
                tap_a = tl.dot(inputs, tl.load(at, mask=exists, other=0.0), tap_a, input_precision=PRECISION)
                if GATE:
                    tap_b = tl.dot(
                        inputs, tl.load(at + RESULTS * ROW, mask=exists, other=0.0), tap_b, input_precision=PRECISION
                    )
            a += tl.where(counts[:, None], tap_a, 0.0)
            if GATE:
                b += tl.where(counts[:, None], tap_b, 0.0)

    channel = (group * RESULTS + column)[None, :].to(tl.int64)
    finish(
        a, b, channel, exists, (first + offset)[:, None], first, batch, stop - begin, end - begin,
        condition, condition_b, condition_c, condition_t, residual, residual_b, residual_c, residual_t, saved, y,
        GROUPS * RESULTS, ACTIVATION, CONDITION_UNIT, RESIDUAL_UNIT,
        EDGE == 0 and y.dtype.element_ty.primitive_bitwidth == 16,
    )  # fmt: skip


@triton.jit
def _weight_products(
    products, grad, x, x_t, begin, stop, exists_output, exists_input, across_outputs, across_inputs, grad_t,
    GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, PRECISION: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """products plus grad (outputs, positions) times x (positions, inputs) over begin..stop."""
    offset = tl.arange(0, POSITIONS)
    grads = grad + across_outputs[:, None] + spread(offset, grad_t, GRAD_UNIT == TIME)[None, :]
    inputs = x + spread(offset, x_t, X_UNIT == TIME)[:, None] + across_inputs[None, :]
    for start in range(begin, stop, POSITIONS):
        present = offset < stop - start
        left = tl.load(
            grads + start * spread(1, grad_t, GRAD_UNIT == TIME),
            mask=exists_output[:, None] & present[None, :],
            other=0.0,
        )
        right = tl.load(
            inputs + start * spread(1, x_t, X_UNIT == TIME), mask=present[:, None] & exists_input[None, :], other=0.0
        )
        products = tl.dot(left, right, products, input_precision=PRECISION)
    return products


@triton.jit
def bias_share(
    grad, lengths, sums, program, grad_b, grad_c, grad_t, batches, time, chunk, rows,
    OUTPUTS: tl.constexpr, GRAD_UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """One split's share of the gradient of the bias; sums: (splits, OUTPUTS)."""
    BLOCKS: tl.constexpr = (OUTPUTS + CHANNELS - 1) // CHANNELS
    output = program % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    split = (program // BLOCKS).to(tl.int64)
    first = split // rows * chunk
    offset = tl.arange(0, POSITIONS)
    exists = (output < OUTPUTS)[:, None]
    grads = grad + spread(output, grad_c, GRAD_UNIT == CHANNEL)[:, None]
    grads += spread(offset, grad_t, GRAD_UNIT == TIME)[None, :]
    total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
    for batch in range(split % rows, batches, rows):
        stop = tl.minimum(first + chunk, length_of(lengths, batch, time))
        for start in range(first, stop, POSITIONS):
            source = grads + batch * grad_b + start * grad_t
            total += tl.load(source, mask=exists & (offset < stop - start)[None, :], other=0.0).to(tl.float32)
    tl.store(sums + split * OUTPUTS + output, tl.sum(total, 1), mask=output < OUTPUTS)


@kernel
def bias_kernel(
    grad, lengths, sums, grad_b: tl.int64, grad_c: tl.int64, grad_t: tl.int64,
    batches: tl.int64, time: tl.int64, chunk: tl.int64, rows: tl.int64,
    OUTPUTS: tl.constexpr, GRAD_UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    bias_share(
        grad, lengths, sums, tl.program_id(0), grad_b, grad_c, grad_t, batches, time, chunk, rows,
        OUTPUTS, GRAD_UNIT, CHANNELS, POSITIONS,
    )  # fmt: skip


@kernel
def dense_weight_kernel(
    grad, x, state, lengths, sums,
    grad_b: tl.int64, grad_c: tl.int64, grad_t: tl.int64, x_b: tl.int64, x_c: tl.int64, x_t: tl.int64,
    state_b: tl.int64, state_c: tl.int64, state_t: tl.int64,
    batches: tl.int64, time: tl.int64, chunk: tl.int64, rows: tl.int64, origin: tl.int64, step: tl.int64,
    low: tl.int64, splits: tl.int64, bias_chunk: tl.int64, bias_rows: tl.int64,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, TAPS: tl.constexpr,
    GRAD_UNIT: tl.constexpr, X_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, POSITIONS: tl.constexpr,
    BIAS_CHANNELS: tl.constexpr, BIAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """One split's share of the gradient of the weight: rows split % rows, + rows, ... of the batch, and one chunk of
    the time. sums: (splits, GROUPS OUTPUTS, INPUTS, TAPS). A tap is summed over the positions that have it. Programs
    beyond those of all splits make bias_kernel's shares, behind these: each reads the gradient in its own way."""
    ROW_BLOCKS: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    COLUMN_BLOCKS: tl.constexpr = (INPUTS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    beyond = program - splits * (COLUMN_BLOCKS * TAPS * ROW_BLOCKS * GROUPS)
    if beyond >= 0:
        bias_share(
            grad, lengths, sums + splits * (GROUPS * OUTPUTS * INPUTS * TAPS), beyond, grad_b, grad_c, grad_t,
            batches, time, bias_chunk, bias_rows, GROUPS * OUTPUTS, GRAD_UNIT, BIAS_CHANNELS, BIAS_POSITIONS,
        )  # fmt: skip
        return
    column_block, tap = program % COLUMN_BLOCKS, program // COLUMN_BLOCKS % TAPS
    program = program // (COLUMN_BLOCKS * TAPS)
    row_block, group = program % ROW_BLOCKS, program // ROW_BLOCKS % GROUPS
    split = (program // (ROW_BLOCKS * GROUPS)).to(tl.int64)
    first = split // rows * chunk

    output = row_block * ROWS + tl.arange(0, ROWS)
    channel = column_block * COLUMNS + tl.arange(0, COLUMNS)
    across_outputs = spread(output, grad_c, GRAD_UNIT == CHANNEL)
    across_inputs = spread(channel, x_c, X_UNIT == CHANNEL)
    if ALIGNED:
        x_b, x_t, grad_b, grad_t = x_b // 8 * 8, x_t // 8 * 8, grad_b // 8 * 8, grad_t // 8 * 8
    grad += group * OUTPUTS * spread(1, grad_c, GRAD_UNIT == CHANNEL)
    x += group * INPUTS * spread(1, x_c, X_UNIT == CHANNEL)
    shift = origin + tap * step
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for batch in range(split % rows, batches, rows):
        length = length_of(lengths, batch, time)
        begin = tl.maximum(first, low - shift)
        stop = tl.minimum(tl.minimum(first + chunk, length), length - shift)
        if state is not None:
            earlier = state + batch * state_b + group * INPUTS * state_c + (shift - low) * state_t
            products = _weight_products(
                products, grad + batch * grad_b, earlier, state_t, begin, tl.minimum(stop, -shift),
                output < OUTPUTS, channel < INPUTS, across_outputs, channel * state_c, grad_t,
                GRAD_UNIT, 0, PRECISION, POSITIONS,
            )  # fmt: skip
            begin = tl.maximum(begin, -shift)
        products = _weight_products(
            products, grad + batch * grad_b, x + batch * x_b + shift * x_t, x_t, begin, stop,
            output < OUTPUTS, channel < INPUTS, across_outputs, across_inputs, grad_t,
            GRAD_UNIT, X_UNIT, PRECISION, POSITIONS,
        )  # fmt: skip
    row = (split * GROUPS + group) * OUTPUTS + output
    place = (row[:, None] * INPUTS + channel[None, :]) * TAPS + tap
    tl.store(sums + place, products, mask=(output < OUTPUTS)[:, None] & (channel < INPUTS)[None, :])
