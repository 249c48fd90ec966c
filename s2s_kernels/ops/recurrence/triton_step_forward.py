"""What surrounds the product of one step of a recurrence on a GPU, forward.

A step is the library's product W_hh h and one kernel after it: gates, cell, zoneout, and the operand of the next
product; two products and two kernels with a projection. Of B rows of H units the cell's kernel reads and writes about
4 B H (2 gates + 6) bytes, 4 B H gates more where backward is to follow: less than a microsecond for B H up to 2^15 at
3 TB/s, so a step takes what two launches take one after the other, predicted 5 us in a CUDA graph. Under layer
normalisation a program has whole rows, and reads the sums from the cache again for each statistic.
"""

import triton
import triton.language as tl

from ..triton_common import kernel, tanh
from .triton_cells import (
    EPS,
    GRU,
    LSTM,
    STREAM_C,
    STREAM_H,
    gru_gates,
    later,
    lengths_of,
    load_gate,
    load_vector,
    lstm_gates,
    rnn_value,
    starts_at,
    store_gates,
    zoned,
)


@triton.jit
def rows_at(program, lengths, reset, batch, t, time, REVERSE: tl.constexpr, ROWS: tl.constexpr):
    """Of a tile of rows: which, whether they exist, take step t, start a segment there, and start one at the next
    step."""
    row = program * ROWS + tl.arange(0, ROWS)
    exists = row < batch
    row = tl.minimum(row, batch - 1)
    length = lengths_of(lengths, row, time)
    present = exists & (length > t)
    starts = starts_at(reset, row, present, t, length, time, REVERSE)
    parts = starts_at(reset, row, present, later(t, REVERSE), length, time, REVERSE)
    return row, exists, present, starts, parts


@triton.jit
def statistics(sums, row, exists, SIZE: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Mean and reciprocal deviation of rows of SIZE sums."""
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, SIZE, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < SIZE)[None, :]
        total += tl.sum(tl.load(sums + row[:, None] * STRIDE + column[None, :], mask=inside, other=0.0), 1)
    mean = total / SIZE
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, SIZE, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (column < SIZE)[None, :]
        value = tl.load(sums + row[:, None] * STRIDE + column[None, :], mask=inside, other=0.0)
        apart = tl.where(inside, value - mean[:, None], 0.0)
        squares += tl.sum(apart * apart, 1)
    return mean, 1.0 / tl.sqrt_rn(squares / SIZE + EPS)


@triton.jit
def _recurrent(
    product, bias, norm, normed, row, at, column, fits, inside, mean, scale,
    NUMBER: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr,
):  # fmt: skip
    """What the state adds to a gate: its product, normalised if it is to be, and its bias."""
    value = load_gate(product, row, column, inside, NUMBER, UNITS, GATES)
    if norm is not None:
        value = (value - mean[:, None]) * scale[:, None]
        if normed is not None:
            place = at[:, None] * (2 * GATES * UNITS + 16) + NUMBER * UNITS + column[None, :]
            tl.store(normed + place, value, mask=inside)
        value *= load_vector(norm, column, fits, NUMBER, UNITS)
    if bias is not None:
        value += load_vector(bias, column, fits, NUMBER, UNITS)
    return value


@triton.jit
def _inputs(
    inputs, bias, at, column, fits, inside, NUMBER: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr
):  # fmt: skip
    value = load_gate(inputs, at, column, inside, NUMBER, UNITS, GATES)
    if bias is not None:
        value += load_vector(bias, column, fits, NUMBER, UNITS)
    return value


@triton.jit
def _put_operand(state, operand, mask, place, inside, parts):
    """What the next product multiplies."""
    if mask is not None:
        state *= tl.load(mask + place, mask=inside, other=0.0).to(tl.float32)
    state = tl.where(parts[:, None], 0.0, state)
    tl.store(operand + place, state.to(operand.dtype.element_ty), mask=inside)


@triton.jit
def _put_state(
    new, h, operand, mask, seed, output, hidden, row, at, exists, present, starts, parts, first, zoneout, least,
    WIDTH: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The new h of a tile wherever it goes; zeros are the output of rows that take no step."""
    column = first + tl.arange(0, COLUMNS)
    fits = (column < WIDTH)[None, :]
    inside = present[:, None] & fits
    place = row[:, None] * WIDTH + column[None, :]
    if ZONE:
        before = tl.load(h + place, mask=inside & ~starts[:, None], other=0.0)
        new = zoned(new, before, zoneout, least, seed, at, first, STREAM_H, ZONE, ROWS, COLUMNS)
    tl.store(h + place, new, mask=inside)
    to = at[:, None] * WIDTH + column[None, :]
    shown = tl.where(present[:, None], new, 0.0)
    tl.store(output + to, shown.to(output.dtype.element_ty), mask=exists[:, None] & fits)
    if hidden is not None:
        tl.store(hidden + to, new, mask=inside)
    _put_operand(new, operand, mask, place, inside, parts)


@kernel
def begin_kernel(
    h, operand, mask, lengths, reset, t: tl.int64, batch: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The operand of the first step, at t, from h (B, WIDTH)."""
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row, exists, _, starts, _ = rows_at(program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS)
    column = program % TILES * COLUMNS + tl.arange(0, COLUMNS)
    inside = exists[:, None] & (column < WIDTH)[None, :]
    place = row[:, None] * WIDTH + column[None, :]
    _put_operand(tl.load(h + place, mask=inside, other=0.0), operand, mask, place, inside, starts)


@kernel
def project_kernel(
    product, h, operand, mask, lengths, reset, seed, output, hidden,
    t: tl.int64, batch: tl.int64, time: tl.int64, zoneout: tl.float32, least: tl.int64,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The state from what projection has made of the cell's output, product (B, WIDTH)."""
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row, exists, present, starts, parts = rows_at(program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS)
    first = program % TILES * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = present[:, None] & (column < WIDTH)[None, :]
    new = load_gate(product, row, column, inside, 0, WIDTH, 1)
    _put_state(
        new, h, operand, mask, seed, output, hidden, row, row * time + t, exists, present, starts, parts, first,
        zoneout, least, WIDTH, ZONE, ROWS, COLUMNS,
    )  # fmt: skip


@kernel
def cell_kernel(
    inputs, bias_ih, product, bias_hh, h, c, operand, unprojected, mask, norm_hh, norm_c, norm_b, lengths, reset, seed,
    output, hidden, gates, extra, normed,
    t: tl.int64, batch: tl.int64, time: tl.int64, zoneout_h: tl.float32, zoneout_c: tl.float32,
    least_h: tl.int64, least_c: tl.int64,
    CELL: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr, REVERSE: tl.constexpr, ZONE_H: tl.constexpr,
    ZONE_C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Step t of inputs (B, T, GATES * UNITS) with product (B, GATES * UNITS), which it overwrites where the cell is
    normalised. h and c (B, ·) change in place where a row takes the step. unprojected: takes the place of h where a
    projection is to follow."""
    WHOLE: tl.constexpr = norm_hh is not None
    TILES: tl.constexpr = 1 if WHOLE else (UNITS + COLUMNS - 1) // COLUMNS
    SUMS: tl.constexpr = GATES * UNITS
    program = tl.program_id(0).to(tl.int64)
    row, exists, present, starts, parts = rows_at(program // TILES, lengths, reset, batch, t, time, REVERSE, ROWS)
    at = row * time + t
    begin = program % TILES * COLUMNS
    mean = tl.zeros((ROWS,), tl.float32)
    scale = mean
    if WHOLE:
        mean, scale = statistics(product, row, present, SUMS, SUMS, ROWS, COLUMNS)
        if normed is not None:
            tl.store(normed + at * (2 * SUMS + 16) + SUMS, scale, mask=present)
    for first in range(begin, UNITS if WHOLE else begin + COLUMNS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        fits = column < UNITS
        inside = present[:, None] & fits[None, :]
        place = row[:, None] * UNITS + column[None, :]
        new = _inputs(inputs, bias_ih, at, column, fits, inside, 0, UNITS, GATES)
        rec = _recurrent(
            product, bias_hh, norm_hh, normed, row, at, column, fits, inside, mean, scale, 0, UNITS, GATES
        )  # fmt: skip
        if GATES > 1:
            in_1 = _inputs(inputs, bias_ih, at, column, fits, inside, 1, UNITS, GATES)
            rec_1 = _recurrent(
                product, bias_hh, norm_hh, normed, row, at, column, fits, inside, mean, scale, 1, UNITS, GATES
            )  # fmt: skip
            in_2 = _inputs(inputs, bias_ih, at, column, fits, inside, 2, UNITS, GATES)
            rec_2 = _recurrent(
                product, bias_hh, norm_hh, normed, row, at, column, fits, inside, mean, scale, 2, UNITS, GATES
            )  # fmt: skip
        if CELL == LSTM:
            in_3 = _inputs(inputs, bias_ih, at, column, fits, inside, 3, UNITS, GATES)
            rec_3 = _recurrent(
                product, bias_hh, norm_hh, normed, row, at, column, fits, inside, mean, scale, 3, UNITS, GATES
            )  # fmt: skip
            before = tl.load(c + place, mask=inside & ~starts[:, None], other=0.0)
            i, f, g, o, cell = lstm_gates(new + rec, in_1 + rec_1, in_2 + rec_2, in_3 + rec_3, before)
            if gates is not None:
                store_gates(i, f, g, o, gates, at, column, inside, UNITS, GATES)
            kept = zoned(cell, before, zoneout_c, least_c, seed, at, first, STREAM_C, ZONE_C, ROWS, COLUMNS)
            tl.store(c + place, kept, mask=inside)
            if extra is not None:
                tl.store(extra + at[:, None] * UNITS + column[None, :], kept, mask=inside)
            if norm_c is None:
                new = o * tanh(cell)
            else:
                # In the place of the sums of i and f, of which nobody else reads these.
                spare = row[:, None] * SUMS + column[None, :]
                tl.store(product + spare, cell, mask=inside)
                tl.store(product + spare + UNITS, o, mask=inside)
        elif CELL == GRU:
            before = tl.load(h + place, mask=inside & ~starts[:, None], other=0.0)
            r, z, candidate, new = gru_gates(new, in_1, in_2, rec, rec_1, rec_2, before)
            if gates is not None:
                store_gates(r, z, candidate, candidate, gates, at, column, inside, UNITS, GATES)
            if extra is not None:
                tl.store(extra + at[:, None] * UNITS + column[None, :], rec_2, mask=inside)
        else:
            new = rnn_value(new + rec, CELL)
            if gates is not None:
                store_gates(new, new, new, new, gates, at, column, inside, UNITS, GATES)
        if norm_c is None:
            if unprojected is None:
                _put_state(
                    new, h, operand, mask, seed, output, hidden, row, at, exists, present, starts, parts, first,
                    zoneout_h, least_h, UNITS, ZONE_H, ROWS, COLUMNS,
                )  # fmt: skip
            else:
                tl.store(unprojected + place, new.to(unprojected.dtype.element_ty), mask=inside)
    if norm_c is not None:
        tl.debug_barrier()  # what the tile's threads have written is read by others of them
        mean, scale = statistics(product, row, present, UNITS, SUMS, ROWS, COLUMNS)
        if normed is not None:
            tl.store(normed + at * (2 * SUMS + 16) + SUMS + 1, scale, mask=present)
            tl.store(normed + at * (2 * SUMS + 16) + SUMS + 2, mean, mask=present)
        for first in range(0, UNITS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            fits = column < UNITS
            inside = present[:, None] & fits[None, :]
            spare = row[:, None] * SUMS + column[None, :]
            value = (tl.load(product + spare, mask=inside, other=0.0) - mean[:, None]) * scale[:, None]
            value = value * load_vector(norm_c, column, fits, 0, UNITS) + load_vector(norm_b, column, fits, 0, UNITS)
            new = tl.load(product + spare + UNITS, mask=inside, other=0.0) * tanh(value)
            if unprojected is None:
                _put_state(
                    new, h, operand, mask, seed, output, hidden, row, at, exists, present, starts, parts, first,
                    zoneout_h, least_h, UNITS, ZONE_H, ROWS, COLUMNS,
                )  # fmt: skip
            else:
                place = row[:, None] * UNITS + column[None, :]
                tl.store(unprojected + place, new.to(unprojected.dtype.element_ty), mask=inside)
