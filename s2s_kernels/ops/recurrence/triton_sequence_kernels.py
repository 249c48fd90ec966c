"""A whole sequence of a recurrence in one kernel, on a GPU, where the recurrent weights fit into a program.

A program takes a tile of rows from the first step to the last. The weights stay in its registers or its shared memory,
the states in registers, so a step has no launch and no barrier beyond the program: its time is a chain of a product of
16 rows (HMMA on every architecture: a tile is too small for the units of whole warp groups), the gates, and the
exchange of the new h between the warps. Predicted for 16 rows, H = 128, half precision: 4 H H products a row, 2^20 for
the tile, 1 us at half of what HMMA makes on a multiprocessor (1024 a cycle), and half of that again for the chain of
gates: 1.5 us a step forward, 2 us backward, against about 5 us of two launches. Inputs are asked for a step ahead. What
is read and written is that of `triton_step_forward`, from the few multiprocessors that have rows.
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
    gru_gate_gradients,
    gru_gates,
    is_first,
    lengths_of,
    load_gate,
    load_vector,
    lstm_gate_gradients,
    lstm_gates,
    rnn_gradient,
    rnn_value,
    starts_at,
    state_before,
    store_gates,
    zoned,
    zoned_gradient,
)


@triton.jit
def _weight(weight, down, across, exists, down_stride, across_stride):
    return tl.load(weight + down[:, None] * down_stride + across[None, :] * across_stride, mask=exists, other=0.0)


@triton.jit
def _rows(batch, ROWS: tl.constexpr):
    """The head of this program, its rows among those of all heads, and which of them there are."""
    tiles = tl.cdiv(batch, ROWS)
    program = tl.program_id(0).to(tl.int64)
    row = program % tiles * ROWS + tl.arange(0, ROWS)
    return program // tiles, program // tiles * batch + tl.minimum(row, batch - 1), row < batch


@triton.jit
def _moments(a, b, c, d, fits, SIZE: tl.constexpr, GATES: tl.constexpr):
    """Mean and reciprocal deviation of rows over all their gates, whose columns beyond the units are 0."""
    total = tl.sum(a, 1)
    if GATES > 1:
        total += tl.sum(b, 1) + tl.sum(c, 1)
    if GATES > 3:
        total += tl.sum(d, 1)
    mean = total / SIZE
    squares = _squares(a, mean, fits)
    if GATES > 1:
        squares += _squares(b, mean, fits) + _squares(c, mean, fits)
    if GATES > 3:
        squares += _squares(d, mean, fits)
    return mean, 1.0 / tl.sqrt_rn(squares / SIZE + EPS)


@triton.jit
def _squares(value, mean, fits):
    apart = tl.where(fits[None, :], value - mean[:, None], 0.0)
    return tl.sum(apart * apart, 1)


@triton.jit
def _recurrent(value, mean, scale, norm, bias, unit, fits, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    """What the state adds to a gate, and the normalised product."""
    normal = value
    if norm is not None:
        normal = (value - mean[:, None]) * scale[:, None]
        value = normal * load_vector(norm, unit, fits, NUMBER, UNITS)
    if bias is not None:
        value += load_vector(bias, unit, fits, NUMBER, UNITS)
    return value, normal


@triton.jit
def _inputs(inputs, row, exists, t, length, time, unit, fits, UNITS: tl.constexpr, GATES: tl.constexpr):
    inside = (exists & (t < length) & (t + tl.zeros_like(length) >= 0))[:, None] & fits[None, :]
    at = row * time + t
    a = load_gate(inputs, at, unit, inside, 0, UNITS, GATES)
    b = a
    c = a
    d = a
    if GATES > 1:
        b = load_gate(inputs, at, unit, inside, 1, UNITS, GATES)
        c = load_gate(inputs, at, unit, inside, 2, UNITS, GATES)
    if GATES > 3:
        d = load_gate(inputs, at, unit, inside, 3, UNITS, GATES)
    return a, b, c, d


@kernel
def forward_kernel(
    inputs, weight_hh, bias_hh, h, c, weight_hr, mask, norm_hh, norm_c, norm_b, lengths, reset, seed,
    output, hidden, gates, extra, normed,
    batch: tl.int64, time: tl.int64, zoneout_h: tl.float32, zoneout_c: tl.float32, least_h: tl.int64, least_c: tl.int64,
    CELL: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, GATES: tl.constexpr, REVERSE: tl.constexpr,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, PRECISION: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All steps of inputs (B, T, GATES * UNITS). h (B, WIDTH) and c (B, UNITS), float32, change in place. The rows are
    those of each head, `batch` of them, and so are the weights (heads, GATES * UNITS, WIDTH) and bias_hh. COLUMNS and
    DEPTH are the powers of two that hold UNITS and WIDTH. AHEAD: ask for the inputs a step before they are used."""
    SUMS: tl.constexpr = GATES * UNITS
    head, row, exists = _rows(batch, ROWS)
    weight_hh += head * SUMS * WIDTH
    length = lengths_of(lengths, row, time)
    unit, place = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    fits, fits_h = unit < UNITS, place < WIDTH
    at_h = row[:, None] * WIDTH + place[None, :]
    at_c = row[:, None] * UNITS + unit[None, :]
    within_h, within = exists[:, None] & fits_h[None, :], exists[:, None] & fits[None, :]
    whole = fits_h[:, None] & fits[None, :]
    weight_0 = _weight(weight_hh, place, unit, whole, 1, WIDTH)
    if GATES > 1:
        weight_1 = _weight(weight_hh + UNITS * WIDTH, place, unit, whole, 1, WIDTH)
        weight_2 = _weight(weight_hh + 2 * UNITS * WIDTH, place, unit, whole, 1, WIDTH)
    if GATES > 3:
        weight_3 = _weight(weight_hh + 3 * UNITS * WIDTH, place, unit, whole, 1, WIDTH)
    if bias_hh is not None:
        bias_hh += head * SUMS
    if weight_hr is not None:
        projection = _weight(weight_hr, unit, place, fits[:, None] & fits_h[None, :], 1, UNITS)
    if mask is not None:
        factor = tl.load(mask + at_h, mask=within_h, other=0.0).to(tl.float32)
    state = tl.load(h + at_h, mask=within_h, other=0.0)
    if CELL == LSTM:
        cell_state = tl.load(c + at_c, mask=within, other=0.0)
    kind = weight_hh.dtype.element_ty
    t = (time - 1 if REVERSE else 0) + tl.zeros_like(time)
    if AHEAD:
        next_0, next_1, next_2, next_3 = _inputs(inputs, row, exists, t, length, time, unit, fits, UNITS, GATES)
    for _ in range(time):
        following = t - 1 if REVERSE else t + 1
        if AHEAD:
            in_0, in_1, in_2, in_3 = next_0, next_1, next_2, next_3
            next_0, next_1, next_2, next_3 = _inputs(
                inputs, row, exists, following, length, time, unit, fits, UNITS, GATES
            )  # fmt: skip
        else:
            in_0, in_1, in_2, in_3 = _inputs(inputs, row, exists, t, length, time, unit, fits, UNITS, GATES)
        at = row * time + t
        present = exists & (length > t)
        starts = starts_at(reset, row, present, t, length, time, REVERSE)
        inside_h, inside = present[:, None] & fits_h[None, :], present[:, None] & fits[None, :]
        before = tl.where(starts[:, None], 0.0, state)
        operand = before
        if mask is not None:
            operand = before * factor
        # A row that takes no step may hold anything in its state.
        operand = tl.where(present[:, None], operand, 0.0).to(kind)
        rec_0 = tl.dot(operand, weight_0, input_precision=PRECISION)
        rec_1 = rec_0
        rec_2 = rec_0
        rec_3 = rec_0
        if GATES > 1:
            rec_1 = tl.dot(operand, weight_1, input_precision=PRECISION)
            rec_2 = tl.dot(operand, weight_2, input_precision=PRECISION)
        if GATES > 3:
            rec_3 = tl.dot(operand, weight_3, input_precision=PRECISION)
        mean = tl.zeros((ROWS,), tl.float32)
        scale = tl.zeros((ROWS,), tl.float32)
        if norm_hh is not None:
            mean, scale = _moments(rec_0, rec_1, rec_2, rec_3, fits, SUMS, GATES)
        rec_0, normal_0 = _recurrent(rec_0, mean, scale, norm_hh, bias_hh, unit, fits, 0, UNITS)
        normal_1 = normal_0
        normal_2 = normal_0
        normal_3 = normal_0
        if GATES > 1:
            rec_1, normal_1 = _recurrent(rec_1, mean, scale, norm_hh, bias_hh, unit, fits, 1, UNITS)
            rec_2, normal_2 = _recurrent(rec_2, mean, scale, norm_hh, bias_hh, unit, fits, 2, UNITS)
        if GATES > 3:
            rec_3, normal_3 = _recurrent(rec_3, mean, scale, norm_hh, bias_hh, unit, fits, 3, UNITS)
        if normed is not None:
            line = normed + at * (2 * SUMS + 16)
            tl.store(line + SUMS, scale, mask=present)
            _store_normal(line, normal_0, unit, inside, 0, UNITS)
            if GATES > 1:
                _store_normal(line, normal_1, unit, inside, 1, UNITS)
                _store_normal(line, normal_2, unit, inside, 2, UNITS)
            if GATES > 3:
                _store_normal(line, normal_3, unit, inside, 3, UNITS)
        if CELL == LSTM:
            cell_before = tl.where(starts[:, None], 0.0, cell_state)
            i, f, g, o, cell = lstm_gates(in_0 + rec_0, in_1 + rec_1, in_2 + rec_2, in_3 + rec_3, cell_before)
            if gates is not None:
                store_gates(i, f, g, o, gates, at, unit, inside, UNITS, GATES)
            kept = zoned(cell, cell_before, zoneout_c, least_c, seed, at, 0, STREAM_C, ZONE_C, ROWS, COLUMNS)
            cell_state = tl.where(present[:, None], kept, cell_state)
            if extra is not None:
                store_gates(kept, kept, kept, kept, extra, at, unit, inside, UNITS, 1)
            shown = cell
            if norm_c is not None:
                cell = tl.where(fits[None, :], cell, 0.0)
                mean, scale = _moments(cell, cell, cell, cell, fits, UNITS, 1)
                if normed is not None:
                    tl.store(line + SUMS + 1, scale, mask=present)
                    tl.store(line + SUMS + 2, mean, mask=present)
                shown, _ = _recurrent(cell, mean, scale, norm_c, norm_b, unit, fits, 0, UNITS)
            new = o * tanh(shown)
        elif CELL == GRU:
            r, z, candidate, new = gru_gates(in_0, in_1, in_2, rec_0, rec_1, rec_2, before)
            if gates is not None:
                store_gates(r, z, candidate, candidate, gates, at, unit, inside, UNITS, GATES)
            if extra is not None:
                store_gates(rec_2, rec_2, rec_2, rec_2, extra, at, unit, inside, UNITS, 1)
        else:
            new = rnn_value(in_0 + rec_0, CELL)
            if gates is not None:
                store_gates(new, new, new, new, gates, at, unit, inside, UNITS, GATES)
        if weight_hr is not None:
            left = tl.where(inside, new, 0.0).to(kind)
            new = tl.dot(left, projection, input_precision=PRECISION)
        new = zoned(new, before, zoneout_h, least_h, seed, at, 0, STREAM_H, ZONE_H, ROWS, DEPTH)
        state = tl.where(inside_h, new, state)
        store_gates(
            tl.where(present[:, None], new, 0.0), new, new, new, output, at, place, within_h, WIDTH, 1
        )  # fmt: skip
        if hidden is not None:
            store_gates(new, new, new, new, hidden, at, place, inside_h, WIDTH, 1)
        t = following
    tl.store(h + at_h, state, mask=within_h)
    if CELL == LSTM:
        tl.store(c + at_c, cell_state, mask=within)


@triton.jit
def _store_normal(line, value, unit, inside, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    tl.store(line[:, None] + NUMBER * UNITS + unit[None, :], value, mask=inside)


@triton.jit
def _normal(line, unit, inside, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    return tl.load(line[:, None] + NUMBER * UNITS + unit[None, :], mask=inside, other=0.0)


@triton.jit
def _before_norm(weighted, normal, direct, slope, scale):
    """The gradient of what was normalised, from that of the result times the weight, with its means."""
    return (weighted - direct[:, None] - normal * slope[:, None]) * scale[:, None]


@kernel
def backward_kernel(
    grad_output, carry, carry_c, weight_hh, h0, c0, weight_hr, mask, norm_hh, norm_c, norm_b, lengths, reset, seed,
    hidden, gates, extra, normed, grad_inputs, grad_recurrent, grad_projected, grad_norm_c, grad_norm_b,
    grad_b: tl.int64, grad_t: tl.int64, grad_u: tl.int64, batch: tl.int64, time: tl.int64,
    zoneout_h: tl.float32, zoneout_c: tl.float32, least_h: tl.int64, least_c: tl.int64,
    CELL: tl.constexpr, UNITS: tl.constexpr, WIDTH: tl.constexpr, GATES: tl.constexpr, REVERSE: tl.constexpr,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """grad_inputs and grad_recurrent (B, T, GATES * UNITS) of all steps. carry (B, WIDTH) and carry_c (B, UNITS),
    float32, hold the gradients of the states after the last step, and take those of the states before the first."""
    SUMS: tl.constexpr = GATES * UNITS
    head, row, exists = _rows(batch, ROWS)
    weight_hh += head * SUMS * WIDTH
    length = lengths_of(lengths, row, time)
    unit, place = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    fits, fits_h = unit < UNITS, place < WIDTH
    at_h = row[:, None] * WIDTH + place[None, :]
    at_c = row[:, None] * UNITS + unit[None, :]
    within_h, within = exists[:, None] & fits_h[None, :], exists[:, None] & fits[None, :]
    whole = fits[:, None] & fits_h[None, :]
    weight_0 = _weight(weight_hh, unit, place, whole, WIDTH, 1)
    if GATES > 1:
        weight_1 = _weight(weight_hh + UNITS * WIDTH, unit, place, whole, WIDTH, 1)
        weight_2 = _weight(weight_hh + 2 * UNITS * WIDTH, unit, place, whole, WIDTH, 1)
    if GATES > 3:
        weight_3 = _weight(weight_hh + 3 * UNITS * WIDTH, unit, place, whole, WIDTH, 1)
    if weight_hr is not None:
        projection = _weight(weight_hr, place, unit, fits_h[:, None] & fits[None, :], UNITS, 1)
    if mask is not None:
        factor = tl.load(mask + at_h, mask=within_h, other=0.0).to(tl.float32)
    arriving = tl.load(carry + at_h, mask=within_h, other=0.0)
    if CELL == LSTM:
        arriving_c = tl.load(carry_c + at_c, mask=within, other=0.0)
    if norm_c is not None:
        total_norm = tl.zeros((ROWS, COLUMNS), tl.float32)
        total_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    kind = weight_hh.dtype.element_ty
    for step in range(time):
        t = step if REVERSE else time - 1 - step
        at = row * time + t
        present = exists & (length > t)
        begins = is_first(t, length, REVERSE)
        starts = starts_at(reset, row, present, t, length, time, REVERSE)
        inside_h, inside = present[:, None] & fits_h[None, :], present[:, None] & fits[None, :]
        grad = tl.where(inside_h, arriving, 0.0)
        if grad_output is not None:
            source = grad_output + (row * grad_b + t * grad_t)[:, None] + (place * grad_u)[None, :]
            grad += tl.load(source, mask=inside_h, other=0.0).to(tl.float32)
        grad, passed = zoned_gradient(grad, zoneout_h, least_h, seed, at, 0, STREAM_H, ZONE_H, ROWS, DEPTH)
        if weight_hr is not None:
            store_gates(grad, grad, grad, grad, grad_projected, at, place, within_h, WIDTH, 1)
            grad = tl.dot(grad.to(kind), projection, input_precision=PRECISION)
        if CELL == LSTM:
            i = load_gate(gates, at, unit, inside, 0, UNITS, GATES)
            f = load_gate(gates, at, unit, inside, 1, UNITS, GATES)
            g = load_gate(gates, at, unit, inside, 2, UNITS, GATES)
            o = load_gate(gates, at, unit, inside, 3, UNITS, GATES)
            before = state_before(extra, c0, row, unit, inside, t, begins, starts, time, UNITS, REVERSE)
            cell = f * before + i * g
            if norm_c is None:
                squashed = tanh(cell)
                through = grad * o * (1.0 - squashed * squashed)
            else:
                line = normed + at * (2 * SUMS + 16) + SUMS
                scale = tl.load(line + 1, mask=present, other=0.0)
                mean = tl.load(line + 2, mask=present, other=0.0)
                normal = tl.where(inside, (cell - mean[:, None]) * scale[:, None], 0.0)
                weight = load_vector(norm_c, unit, fits, 0, UNITS)
                squashed = tanh(normal * weight + load_vector(norm_b, unit, fits, 0, UNITS))
                reach = tl.where(inside, grad * o * (1.0 - squashed * squashed), 0.0)
                total_norm += reach * normal
                total_bias += reach
                weighted = reach * weight
                direct, slope = tl.sum(weighted, 1) / UNITS, tl.sum(weighted * normal, 1) / UNITS
                through = _before_norm(weighted, normal, direct, slope, scale)
            renewed, kept = zoned_gradient(
                tl.where(inside, arriving_c, 0.0), zoneout_c, least_c, seed, at, 0, STREAM_C, ZONE_C, ROWS, COLUMNS
            )  # fmt: skip
            grad_0, grad_1, grad_2, grad_3, back = lstm_gate_gradients(
                i, f, g, o, before, squashed, grad, renewed + through
            )  # fmt: skip
            back = tl.where(starts[:, None], 0.0, back + kept)
            arriving_c = tl.where(present[:, None], back, arriving_c)
            last = grad_2
        elif CELL == GRU:
            r = load_gate(gates, at, unit, inside, 0, UNITS, GATES)
            z = load_gate(gates, at, unit, inside, 1, UNITS, GATES)
            candidate = load_gate(gates, at, unit, inside, 2, UNITS, GATES)
            from_state = load_gate(extra, at, unit, inside, 0, UNITS, 1)
            before = state_before(hidden, h0, row, unit, inside, t, begins, starts, time, UNITS, REVERSE)
            grad_0, grad_1, grad_2, back = gru_gate_gradients(r, z, candidate, from_state, before, grad)
            grad_3 = grad_2
            last = grad_2 * r
            passed += back
        else:
            value = load_gate(hidden if gates is None else gates, at, unit, inside, 0, UNITS, 1).to(tl.float32)
            grad_0 = rnn_gradient(value, grad, CELL)
            grad_1 = grad_0
            grad_2 = grad_0
            grad_3 = grad_0
            last = grad_0
        store_gates(grad_0, grad_1, grad_2, grad_3, grad_inputs, at, unit, within, UNITS, GATES)
        if norm_hh is not None:
            line = normed + at * (2 * SUMS + 16)
            scale = tl.load(line + SUMS, mask=present, other=0.0)
            normal_0 = _normal(line, unit, inside, 0, UNITS)
            grad_0 *= load_vector(norm_hh, unit, fits, 0, UNITS)
            direct, slope = tl.sum(grad_0, 1), tl.sum(grad_0 * normal_0, 1)
            if GATES > 1:
                normal_1 = _normal(line, unit, inside, 1, UNITS)
                normal_2 = _normal(line, unit, inside, 2, UNITS)
                grad_1 *= load_vector(norm_hh, unit, fits, 1, UNITS)
                last *= load_vector(norm_hh, unit, fits, 2, UNITS)
                direct += tl.sum(grad_1, 1) + tl.sum(last, 1)
                slope += tl.sum(grad_1 * normal_1, 1) + tl.sum(last * normal_2, 1)
            if GATES > 3:
                normal_3 = _normal(line, unit, inside, 3, UNITS)
                grad_3 *= load_vector(norm_hh, unit, fits, 3, UNITS)
                direct += tl.sum(grad_3, 1)
                slope += tl.sum(grad_3 * normal_3, 1)
            direct /= SUMS
            slope /= SUMS
            grad_0 = tl.where(inside, _before_norm(grad_0, normal_0, direct, slope, scale), 0.0)
            if GATES > 1:
                grad_1 = tl.where(inside, _before_norm(grad_1, normal_1, direct, slope, scale), 0.0)
                last = tl.where(inside, _before_norm(last, normal_2, direct, slope, scale), 0.0)
            if GATES > 3:
                grad_3 = tl.where(inside, _before_norm(grad_3, normal_3, direct, slope, scale), 0.0)
        if grad_recurrent is not None:
            store_gates(grad_0, grad_1, last, grad_3, grad_recurrent, at, unit, within, UNITS, GATES)
        product = tl.dot(grad_0.to(kind), weight_0, input_precision=PRECISION)
        if GATES > 1:
            product = tl.dot(grad_1.to(kind), weight_1, product, input_precision=PRECISION)
            product = tl.dot(last.to(kind), weight_2, product, input_precision=PRECISION)
        if GATES > 3:
            product = tl.dot(grad_3.to(kind), weight_3, product, input_precision=PRECISION)
        if mask is not None:
            product *= factor
        arriving = tl.where(present[:, None], tl.where(starts[:, None], 0.0, passed + product), arriving)
    tl.store(carry + at_h, arriving, mask=within_h)
    if CELL == LSTM:
        tl.store(carry_c + at_c, arriving_c, mask=within)
    if norm_c is not None:
        tl.store(grad_norm_c + at_c, total_norm, mask=within)
        tl.store(grad_norm_b + at_c, total_bias, mask=within)
