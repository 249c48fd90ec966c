"""What the driver of the recurrences needs beside the library's products: tensors over all positions that those
products read, each written in one pass. They move what they read and write, 3 TB/s at best."""

import torch
import triton
import triton.language as tl

from ..triton_common import device_of, keep_tile, kernel, power, tanh
from .triton_cells import EPS, is_first, lengths_of, load_gate, load_vector, starts_at, state_before


@triton.jit
def _position(lengths, reset, batch, time, REVERSE: tl.constexpr):
    """Of this program's position: the row, as a tile of one, its time, and whether the row was there, took its first
    step there, and started a segment there."""
    program = tl.program_id(0).to(tl.int64)
    row = program // time + tl.arange(0, 1)
    t = program % time + tl.zeros_like(row)
    length = lengths_of(lengths, row, time)
    present = (row < batch) & (t < length)
    starts = starts_at(reset, row, present, t, length, time, REVERSE)
    return row, t, present, present & is_first(t, length, REVERSE), starts


@kernel
def recurrent_input_kernel(
    hidden, h0, mask, lengths, reset, result, batch: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, REVERSE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """result (B, T, WIDTH): what W_hh multiplied at each position; zeros where none was."""
    row, t, present, begins, starts = _position(lengths, reset, batch, time, REVERSE)
    at = row * time + t
    for first in range(0, WIDTH, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        within = (column < WIDTH)[None, :]
        inside = present[:, None] & within
        state = state_before(hidden, h0, row, column, inside, t, begins, starts, time, WIDTH, REVERSE)
        if mask is not None:
            state *= tl.load(mask + row[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(result + at[:, None] * WIDTH + column[None, :], state.to(result.dtype.element_ty), mask=within)


@triton.jit
def _cell(
    gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    before = state_before(extra, c0, row, column, inside, t, begins, starts, time, UNITS, REVERSE)
    product = load_gate(gates, at, column, inside, 0, UNITS, 4) * load_gate(gates, at, column, inside, 2, UNITS, 4)
    return load_gate(gates, at, column, inside, 1, UNITS, 4) * before + product


@kernel
def unprojected_kernel(
    gates, extra, c0, norm_c, norm_b, lengths, reset, result, batch: tl.int64, time: tl.int64,
    UNITS: tl.constexpr, REVERSE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """result (B, T, UNITS): an LSTM's h before its projection; zeros where none was."""
    row, t, present, begins, starts = _position(lengths, reset, batch, time, REVERSE)
    at = row * time + t
    mean = tl.zeros((1,), tl.float32)
    squares = tl.zeros((1,), tl.float32)
    if norm_c is not None:
        for first in range(0, UNITS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = present[:, None] & (column < UNITS)[None, :]
            mean += tl.sum(
                _cell(gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS, REVERSE), 1
            )  # fmt: skip
        mean /= UNITS
        for first in range(0, UNITS, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            inside = present[:, None] & (column < UNITS)[None, :]
            cell = _cell(gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS, REVERSE)
            apart = tl.where(inside, cell - mean[:, None], 0.0)
            squares += tl.sum(apart * apart, 1)
    scale = 1.0 / tl.sqrt_rn(squares / UNITS + EPS)
    for first in range(0, UNITS, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        fits = column < UNITS
        inside = present[:, None] & fits[None, :]
        value = _cell(gates, extra, c0, row, at, t, column, inside, begins, starts, time, UNITS, REVERSE)
        if norm_c is not None:
            value = (value - mean[:, None]) * scale[:, None] * load_vector(norm_c, column, fits, 0, UNITS)
            value += load_vector(norm_b, column, fits, 0, UNITS)
        value = load_gate(gates, at, column, inside, 3, UNITS, 4) * tanh(value)
        to = result + at[:, None] * UNITS + column[None, :]
        tl.store(to, value.to(result.dtype.element_ty), mask=fits[None, :])


@kernel
def drop_kernel(
    source, seed, result, rows: tl.int64, columns: tl.int64, source_r: tl.int64, source_c: tl.int64, least: tl.int64,
    factor: tl.float32, STREAM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """result (rows, columns): the source times `factor` where dropout keeps it, else 0."""
    tiles = tl.cdiv(columns, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles * ROWS + tl.arange(0, ROWS)
    first = program % tiles * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    keeps = keep_tile(seed, row, first, least, ROWS, COLUMNS, STREAM) & (least.to(tl.int64) < 4294967296)
    value = tl.load(source + row[:, None] * source_r + column[None, :] * source_c, mask=inside, other=0.0)
    value = tl.where(keeps, value.to(tl.float32) * factor, 0.0)
    tl.store(result + row[:, None] * columns + column[None, :], value.to(result.dtype.element_ty), mask=inside)


def recurrent_input(
    hidden: torch.Tensor, h0: torch.Tensor | None, mask: torch.Tensor | None, lengths: torch.Tensor | None,
    reset: torch.Tensor | None, reverse: bool, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """What W_hh multiplied at each position, (B, T, P), zeros where none was. hidden: the states (B, T, P)."""
    batch, time, width = hidden.shape
    result = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
    if not result.numel():
        return result
    with device_of(hidden):
        recurrent_input_kernel[(batch * time,)](
            hidden, h0, mask, lengths, reset, result, batch, time, WIDTH=width, REVERSE=reverse,
            COLUMNS=power(width, 32, 1024), num_warps=4,
        )  # fmt: skip
    return result


def unprojected(
    gates: torch.Tensor, extra: torch.Tensor, c0: torch.Tensor | None, norm_c: torch.Tensor | None,
    norm_b: torch.Tensor | None, lengths: torch.Tensor | None, reset: torch.Tensor | None, reverse: bool,
    dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """An LSTM's h before its projection, (B, T, H), zeros where none was."""
    batch, time, units = extra.shape
    result = torch.empty(extra.shape, dtype=dtype, device=extra.device)
    if not result.numel():
        return result
    with device_of(extra):
        unprojected_kernel[(batch * time,)](
            gates, extra, c0, norm_c, norm_b, lengths, reset, result, batch, time, UNITS=units, REVERSE=reverse,
            COLUMNS=power(units, 32, 1024), num_warps=4,
        )  # fmt: skip
    return result


def dropped(source: torch.Tensor, seed: torch.Tensor, least: int, factor: float, stream: int) -> torch.Tensor:
    """A matrix, contiguous, of which the elements that `random.keep_mask` doesn't keep are 0, the others multiplied by
    `factor`. least: the word from which it keeps."""
    rows, columns = source.shape
    result = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    with device_of(source):
        drop_kernel[(triton.cdiv(rows, 16) * triton.cdiv(columns, 32),)](
            source, seed, result, rows, columns, *source.stride(), least, factor, STREAM=stream, ROWS=16, COLUMNS=32,
            num_warps=4,
        )  # fmt: skip
    return result
