"""What surrounds the product of one step of a recurrence on a GPU, backward.

A step is one kernel and the library's product after it, which takes the gradients of the gates back through W_hh; two
of each with a projection. The kernel ends the step after, of which it adds the product, and reads and writes about
4 B H (3 gates + 8) bytes: as long as forward, where launches and not bytes are what a step waits for.
"""

import triton
import triton.language as tl

from ..triton_common import kernel, tanh
from .triton_cells import (
    GRU,
    LSTM,
    STREAM_C,
    STREAM_H,
    gru_gate_gradients,
    is_first,
    later,
    lengths_of,
    load_gate,
    load_vector,
    lstm_gate_gradients,
    rnn_gradient,
    starts_at,
    state_before,
    store_gates,
    zoned_gradient,
)


@triton.jit
def _rows_at(program, lengths, reset, batch, t, time, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile of rows: which, whether they exist, took step t, took it first, started a segment there, and got a
    gradient back from the step after it."""
    row = program * ROWS + tl.arange(0, ROWS)
    exists = row < batch
    row = tl.minimum(row, batch - 1)
    length = lengths_of(lengths, row, time)
    present = exists & (length > t)
    starts = starts_at(reset, row, present, t, length, time, REVERSE)
    after = later(t, REVERSE) + tl.zeros_like(row)
    followed = exists & (after >= 0) & (after < length)
    followed = followed & ~starts_at(reset, row, followed, after, length, time, REVERSE)
    return row, exists, present, is_first(t, length, REVERSE), starts, followed


@triton.jit
def _arrived(product, mask, carry, place, inside, followed):
    """The gradient of h from the steps after it: what has passed the product by, and the product."""
    through = tl.load(product + place, mask=inside & followed[:, None], other=0.0)
    if mask is not None:
        through *= tl.load(mask + place, mask=inside, other=0.0).to(tl.float32)
    return tl.load(carry + place, mask=inside, other=0.0) + through


@triton.jit
def _gradient_of_h(
    grad_output, product, mask, carry, seed, row, at, exists, present, followed, first, grad_b, grad_t, grad_u, t,
    zoneout, least,
    WIDTH: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All of it at step t: the new value's share, the share of the one before, and all that rows keep that took no
    step."""
    column = first + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    arrived = _arrived(product, mask, carry, place, inside, followed)
    grad = tl.where(present[:, None], arrived, 0.0)
    if grad_output is not None:
        source = (row * grad_b + t * grad_t)[:, None] + (column * grad_u)[None, :]
        grad += tl.load(grad_output + source, mask=inside & present[:, None], other=0.0).to(tl.float32)
    new, passed = zoned_gradient(grad, zoneout, least, seed, at, first, STREAM_H, ZONE, ROWS, COLUMNS)
    return new, passed, arrived


@triton.jit
def _keep(passed, arrived, carry, place, inside, present, starts):
    """What the step before gets beside the product."""
    kept = tl.where(present[:, None], tl.where(starts[:, None], 0.0, passed), arrived)
    tl.store(carry + place, kept, mask=inside)


@kernel
def finish_kernel(
    product, mask, carry, lengths, reset, t: tl.int64, batch: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """carry (B, WIDTH) becomes the gradient of the initial state; t: the time before the first step's."""
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row, exists, _, _, _, followed = _rows_at(program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS)
    column = program % TILES * COLUMNS + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    tl.store(carry + place, _arrived(product, mask, carry, place, inside, followed), mask=inside)


@kernel
def project_gradient_kernel(
    grad_output, product, mask, carry, lengths, reset, seed, grad_projected, operand,
    grad_b: tl.int64, grad_t: tl.int64, grad_u: tl.int64, t: tl.int64, batch: tl.int64, time: tl.int64,
    zoneout: tl.float32, least: tl.int64,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of what projection has made at step t, which is also the operand of the product with W_hr."""
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row, exists, present, _, starts, followed = _rows_at(
        program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS
    )  # fmt: skip
    at = row * time + t
    first = program % TILES * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    new, passed, arrived = _gradient_of_h(
        grad_output, product, mask, carry, seed, row, at, exists, present, followed, first, grad_b, grad_t, grad_u, t,
        zoneout, least, WIDTH, ZONE, ROWS, COLUMNS,
    )  # fmt: skip
    _keep(passed, arrived, carry, place, inside, present, starts)
    tl.store(grad_projected + at[:, None] * WIDTH + column[None, :], new, mask=inside)
    tl.store(operand + place, new.to(operand.dtype.element_ty), mask=inside)


@triton.jit
def _lstm_again(
    gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The gates of step t, and the cell before it and, before zoneout, after it."""
    i = load_gate(gates, at, column, inside, 0, UNITS, 4)
    f = load_gate(gates, at, column, inside, 1, UNITS, 4)
    g = load_gate(gates, at, column, inside, 2, UNITS, 4)
    o = load_gate(gates, at, column, inside, 3, UNITS, 4)
    before = state_before(extra, c0, row, column, inside, t, begins, starts, time, UNITS, REVERSE)
    return i, f, g, o, before, f * before + i * g


@triton.jit
def _through_norm(cell, mean, scale, norm_c, norm_b, o, grad, column, fits, inside, UNITS: tl.constexpr):
    """The normalised cell, tanh of what layer normalisation makes of it, the gradient that reaches that, and this
    gradient times the weight."""
    weight = load_vector(norm_c, column, fits, 0, UNITS)
    normal = tl.where(inside, (cell - mean[:, None]) * scale[:, None], 0.0)
    squashed = tanh(normal * weight + load_vector(norm_b, column, fits, 0, UNITS))
    reach = tl.where(inside, grad * o * (1.0 - squashed * squashed), 0.0)
    return normal, squashed, reach, reach * weight


@triton.jit
def _sum_weighted(
    grad, normed, norm, at, column, fits, inside, NUMBER: tl.constexpr, UNITS: tl.constexpr, SUMS: tl.constexpr
):
    """Sums of a gate's gradients times the weights of layer normalisation, plain and times what was normalised."""
    weighted = grad * load_vector(norm, column, fits, NUMBER, UNITS)
    place = at[:, None] * (2 * SUMS + 16) + NUMBER * UNITS + column[None, :]
    normal = tl.load(normed + place, mask=inside, other=0.0)
    return tl.sum(weighted, 1), tl.sum(weighted * normal, 1)


@kernel
def cell_gradient_kernel(
    grad_output, from_projection, product, mask, carry, carry_c, h0, c0, norm_hh, norm_c, norm_b, lengths, reset, seed,
    hidden, gates, extra, normed, grad_inputs, grad_recurrent, operand, grad_norm_c, grad_norm_b,
    grad_b: tl.int64, grad_t: tl.int64, grad_u: tl.int64, t: tl.int64, batch: tl.int64, time: tl.int64,
    zoneout_h: tl.float32, zoneout_c: tl.float32, least_h: tl.int64, least_c: tl.int64,
    CELL: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr, REVERSE: tl.constexpr, ZONE_H: tl.constexpr,
    ZONE_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_inputs, grad_recurrent (B, T, GATES * UNITS) at step t, and the latter as operand (B, GATES * UNITS) of the
    product that takes it to the step before. from_projection: the gradient (B, UNITS) of the cell's output, where there
    is a projection. carry, carry_c (B, ·), and the rows' sums grad_norm_c and grad_norm_b, change in place."""
    WHOLE: tl.constexpr = norm_hh is not None
    TILES: tl.constexpr = 1 if WHOLE else (UNITS + COLUMNS - 1) // COLUMNS
    SUMS: tl.constexpr = GATES * UNITS
    program = tl.program_id(0).to(tl.int64)
    row, exists, present, begins, starts, followed = _rows_at(
        program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS
    )  # fmt: skip
    at = row * time + t
    begin = program % TILES * COLUMNS
    none = tl.zeros((ROWS,), tl.float32)
    mean = none
    scale = none
    direct = none
    slope = none
    if norm_c is not None:
        scale = tl.load(normed + at * (2 * SUMS + 16) + SUMS + 1, mask=present, other=0.0)
        mean = tl.load(normed + at * (2 * SUMS + 16) + SUMS + 2, mask=present, other=0.0)
        for first in range(0, UNITS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            fits = column < UNITS
            inside = present[:, None] & fits[None, :]
            place = row[:, None] * UNITS + column[None, :]
            if from_projection is None:
                grad, _, _ = _gradient_of_h(
                    grad_output, product, mask, carry, seed, row, at, exists, present, followed, first,
                    grad_b, grad_t, grad_u, t, zoneout_h, least_h, UNITS, ZONE_H, ROWS, COLUMNS,
                )  # fmt: skip
            else:
                grad = tl.load(from_projection + place, mask=inside, other=0.0)
            _, _, _, o, _, cell = _lstm_again(
                gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS, REVERSE
            )  # fmt: skip
            normal, _, reach, weighted = _through_norm(
                cell, mean, scale, norm_c, norm_b, o, grad, column, fits, inside, UNITS
            )  # fmt: skip
            direct += tl.sum(weighted, 1)
            slope += tl.sum(weighted * normal, 1)
            so_far = tl.load(grad_norm_c + place, mask=inside, other=0.0)
            tl.store(grad_norm_c + place, so_far + reach * normal, mask=inside)
            so_far = tl.load(grad_norm_b + place, mask=inside, other=0.0)
            tl.store(grad_norm_b + place, so_far + reach, mask=inside)
        direct /= UNITS
        slope /= UNITS
    all_direct = none
    all_slope = none
    for first in range(begin, UNITS if WHOLE else begin + COLUMNS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        fits = column < UNITS
        inside = present[:, None] & fits[None, :]
        within = exists[:, None] & fits[None, :]
        place = row[:, None] * UNITS + column[None, :]
        passed = tl.zeros((ROWS, COLUMNS), tl.float32)
        arrived = passed
        if from_projection is None:
            grad, passed, arrived = _gradient_of_h(
                grad_output, product, mask, carry, seed, row, at, exists, present, followed, first,
                grad_b, grad_t, grad_u, t, zoneout_h, least_h, UNITS, ZONE_H, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            grad = tl.load(from_projection + place, mask=inside, other=0.0)
        if CELL == LSTM:
            i, f, g, o, before, cell = _lstm_again(
                gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS, REVERSE
            )  # fmt: skip
            if norm_c is None:
                squashed = tanh(cell)
                through = grad * o * (1.0 - squashed * squashed)
            else:
                normal, squashed, _, weighted = _through_norm(
                    cell, mean, scale, norm_c, norm_b, o, grad, column, fits, inside, UNITS
                )  # fmt: skip
                through = scale[:, None] * (weighted - direct[:, None] - normal * slope[:, None])
            after = tl.load(carry_c + place, mask=inside, other=0.0)
            renewed, kept = zoned_gradient(
                after, zoneout_c, least_c, seed, at, first, STREAM_C, ZONE_C, ROWS, COLUMNS
            )  # fmt: skip
            a, b, c, d, back = lstm_gate_gradients(i, f, g, o, before, squashed, grad, renewed + through)
            tl.store(carry_c + place, tl.where(starts[:, None], 0.0, back + kept), mask=inside)
            last = c
        elif CELL == GRU:
            r = load_gate(gates, at, column, inside, 0, UNITS, 3)
            z = load_gate(gates, at, column, inside, 1, UNITS, 3)
            candidate = load_gate(gates, at, column, inside, 2, UNITS, 3)
            from_state = load_gate(extra, at, column, inside, 0, UNITS, 1)
            before = state_before(hidden, h0, row, column, inside, t, begins, starts, time, UNITS, REVERSE)
            a, b, c, back = gru_gate_gradients(r, z, candidate, from_state, before, grad)
            d = c
            last = c * r
            passed += back
        else:
            value = load_gate(hidden if gates is None else gates, at, column, inside, 0, UNITS, 1).to(tl.float32)
            a = rnn_gradient(value, grad, CELL)
            b = a
            c = a
            d = a
            last = a
        if from_projection is None:
            _keep(passed, arrived, carry, place, within, present, starts)
        store_gates(a, b, c, d, grad_inputs, at, column, within, UNITS, GATES)
        if grad_recurrent is not None:
            store_gates(a, b, last, d, grad_recurrent, at, column, within, UNITS, GATES)
        if WHOLE:
            sums, slopes = _sum_weighted(a, normed, norm_hh, at, column, fits, inside, 0, UNITS, SUMS)
            all_direct += sums
            all_slope += slopes
            if GATES > 1:
                sums, slopes = _sum_weighted(b, normed, norm_hh, at, column, fits, inside, 1, UNITS, SUMS)
                all_direct += sums
                all_slope += slopes
                sums, slopes = _sum_weighted(last, normed, norm_hh, at, column, fits, inside, 2, UNITS, SUMS)
                all_direct += sums
                all_slope += slopes
            if GATES > 3:
                sums, slopes = _sum_weighted(d, normed, norm_hh, at, column, fits, inside, 3, UNITS, SUMS)
                all_direct += sums
                all_slope += slopes
        else:
            store_gates(a, b, last, d, operand, row, column, within, UNITS, GATES)
    if WHOLE:
        tl.debug_barrier()  # what the tile's threads have written is read by others of them
        scale = tl.load(normed + at * (2 * SUMS + 16) + SUMS, mask=present, other=0.0)
        for first in range(0, SUMS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            fits = column < SUMS
            within = exists[:, None] & fits[None, :]
            to = at[:, None] * SUMS + column[None, :]
            weighted = tl.load(grad_recurrent + to, mask=within, other=0.0) * load_vector(
                norm_hh, column, fits, 0, SUMS
            )
            place = at[:, None] * (2 * SUMS + 16) + column[None, :]
            normal = tl.load(normed + place, mask=within & present[:, None], other=0.0)
            grad = (weighted - all_direct[:, None] / SUMS - normal * (all_slope[:, None] / SUMS)) * scale[:, None]
            tl.store(grad_recurrent + to, grad, mask=within)
            tl.store(operand + row[:, None] * SUMS + column[None, :], grad.to(operand.dtype.element_ty), mask=within)
