"""What the Triton kernels of the recurrences compute of a tile of rows and units: when a row takes a step, and what the
cells, zoneout and layer normalisation do in it, forward and backward."""

import triton
import triton.language as tl

from ..triton_common import keep_tile, length_of, sigmoid, tanh

# As `autograd.CELLS` numbers them.
LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
TANH = tl.constexpr(2)
RELU = tl.constexpr(3)

# What zoneout does: nothing, the expectation, or a choice by unit.
UNZONED = tl.constexpr(0)
EXPECTED = tl.constexpr(1)
DRAWN = tl.constexpr(2)

# The streams of `autograd` from which it draws.
STREAM_H = tl.constexpr(0)
STREAM_C = tl.constexpr(1)

EPS = tl.constexpr(1e-5)  # of layer normalisation


@triton.jit
def earlier(t, REVERSE: tl.constexpr):
    """The time of the step before."""
    return t + 1 if REVERSE else t - 1


@triton.jit
def later(t, REVERSE: tl.constexpr):
    return t - 1 if REVERSE else t + 1


@triton.jit
def lengths_of(lengths, row, time):
    """How many positions of each row of a tile are present."""
    return tl.zeros_like(row) + length_of(lengths, row, time)


@triton.jit
def starts_at(reset, row, exists, t, length, time, REVERSE: tl.constexpr):
    """Whether no state crosses into step t of rows that take it: in reverse it is the flag of t + 1 that parts the
    two."""
    if reset is None:
        return row < 0
    else:
        flag = (t + 1 if REVERSE else t) + tl.zeros_like(row)
        return tl.load(reset + row * time + flag, mask=exists & (flag >= 0) & (flag < length), other=0) != 0


@triton.jit
def is_first(t, length, REVERSE: tl.constexpr):
    return tl.zeros_like(length) + t == (length - 1 if REVERSE else 0)


@triton.jit
def state_before(
    kept, initial, row, column, inside, t, first, starts, time, WIDTH: tl.constexpr, REVERSE: tl.constexpr
):  # fmt: skip
    """The state that step t saw: kept (B, T, WIDTH) of the step before, initial (B, WIDTH) at the first, else zeros."""
    at = row * time + earlier(t, REVERSE)
    goes_on = inside & (~first & ~starts)[:, None]
    state = tl.load(kept + at[:, None] * WIDTH + column[None, :], mask=goes_on, other=0.0).to(tl.float32)
    if initial is not None:
        begins = inside & (first & ~starts)[:, None]
        state += tl.load(initial + row[:, None] * WIDTH + column[None, :], mask=begins, other=0.0).to(tl.float32)
    return state


@triton.jit
def zoned(
    new, before, p, least, seed, at, first,
    STREAM: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What zoneout makes of a new value. at: the rows' positions; least: the word from which a unit is renewed."""
    if ZONE == UNZONED:
        return new
    elif ZONE == EXPECTED:
        return p * before + (1.0 - p) * new
    else:
        return tl.where(_renewed(seed, at, first, least, ROWS, COLUMNS, STREAM), new, before)


@triton.jit
def zoned_gradient(
    grad, p, least, seed, at, first,
    STREAM: tl.constexpr, ZONE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What of a gradient reaches the new value, and what the one before."""
    if ZONE == UNZONED:
        return grad, tl.zeros((ROWS, COLUMNS), tl.float32)
    elif ZONE == EXPECTED:
        return (1.0 - p) * grad, p * grad
    else:
        renewed = _renewed(seed, at, first, least, ROWS, COLUMNS, STREAM)
        return tl.where(renewed, grad, 0.0), tl.where(renewed, 0.0, grad)


@triton.jit
def _renewed(seed, at, first, least, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STREAM: tl.constexpr):
    # At probability 1 no word is great enough, and that bound needs a bit more than a word has.
    return keep_tile(seed, at, first, least, ROWS, COLUMNS, STREAM) & (least.to(tl.int64) < 4294967296)


@triton.jit
def lstm_gates(i, f, g, o, c):
    """The gates from their sums, and the cell before zoneout."""
    i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
    return i, f, g, o, f * c + i * g


@triton.jit
def lstm_gate_gradients(i, f, g, o, c, squashed, grad, cell):
    """Of the gates' sums and of c before the step. squashed: what o multiplies; grad: of h; cell: of the new cell."""
    grad_i = cell * g * (i * (1.0 - i))
    grad_f = cell * c * (f * (1.0 - f))
    grad_g = cell * i * (1.0 - g * g)
    grad_o = grad * squashed * (o * (1.0 - o))
    return grad_i, grad_f, grad_g, grad_o, cell * f


@triton.jit
def gru_gates(in_r, in_z, in_n, r, z, n, h):
    """The gates from the sums of the inputs and of the state, and h before zoneout."""
    r, z = sigmoid(in_r + r), sigmoid(in_z + z)
    candidate = tanh(in_n + r * n)
    return r, z, candidate, (1.0 - z) * candidate + z * h


@triton.jit
def gru_gate_gradients(r, z, candidate, n, h, grad):
    """Of the inputs' sums, and of h before the step beside the product. n: the state's sum for the candidate."""
    grad_n = grad * (1.0 - z) * (1.0 - candidate * candidate)
    grad_z = grad * (h - candidate) * (z * (1.0 - z))
    grad_r = grad_n * n * (r * (1.0 - r))
    return grad_r, grad_z, grad_n, grad * z


@triton.jit
def rnn_value(total, CELL: tl.constexpr):
    # A NaN passes, as through torch's relu.
    return tl.where(total <= 0, 0.0, total) if CELL == RELU else tanh(total)


@triton.jit
def rnn_gradient(value, grad, CELL: tl.constexpr):
    return tl.where(value <= 0, 0.0, grad) if CELL == RELU else grad * (1.0 - value * value)


@triton.jit
def load_gate(
    source, place, column, inside, NUMBER: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr
):  # fmt: skip
    """The tile of a gate of rows (GATES * UNITS), float32."""
    at = place[:, None] * (GATES * UNITS) + NUMBER * UNITS + column[None, :]
    return tl.load(source + at, mask=inside, other=0.0)


@triton.jit
def load_vector(source, column, fits, NUMBER: tl.constexpr, UNITS: tl.constexpr):
    """A gate's part of a vector for all rows, as float32 (1, units)."""
    return tl.load(source + NUMBER * UNITS + column, mask=fits, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_gates(
    a, b, c, d, to, place, column, inside, UNITS: tl.constexpr, GATES: tl.constexpr
):  # fmt: skip
    """Tiles of as many gates as there are into rows (GATES * UNITS), in the dtype of those."""
    at = place[:, None] * (GATES * UNITS) + column[None, :]
    kind = to.dtype.element_ty
    tl.store(to + at, a.to(kind), mask=inside)
    if GATES > 1:
        tl.store(to + at + UNITS, b.to(kind), mask=inside)
        tl.store(to + at + 2 * UNITS, c.to(kind), mask=inside)
    if GATES > 3:
        tl.store(to + at + 3 * UNITS, d.to(kind), mask=inside)
