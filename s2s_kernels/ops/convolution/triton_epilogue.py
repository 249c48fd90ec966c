"""What surrounds the products of a convolution on a GPU: activations, their derivatives, and the writing of results.

Sizes, strides and positions are 64-bit and never specialised, so that one compilation serves every length and batch.
"""

import triton
import triton.language as tl

from ..triton_common import kernel, length_of, sigmoid, spread, tanh

# The numbers of the activations, as the schema passes them; from GLU on they are gates.
NONE = tl.constexpr(0)
RELU = tl.constexpr(1)
SILU = tl.constexpr(2)
GELU = tl.constexpr(3)
TANH = tl.constexpr(4)
GLU = tl.constexpr(5)
GATED_TANH = tl.constexpr(6)

# The dimension of a tensor along which neighbours are neighbours in memory: the compiler must know it to load vectors.
STRIDED = tl.constexpr(0)
TIME = tl.constexpr(1)
CHANNEL = tl.constexpr(2)


@triton.jit
def activate(a, b, ACTIVATION: tl.constexpr):
    """The activation of a; under a gate, of a and its partner b."""
    if ACTIVATION == RELU:
        return tl.where(a <= 0, 0.0, a)  # a NaN passes
    elif ACTIVATION == SILU:
        return a / (1.0 + tl.exp(-a))
    elif ACTIVATION == GELU:
        return 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
    elif ACTIVATION == TANH:
        return tanh(a)
    elif ACTIVATION == GLU:
        return a * sigmoid(b)
    elif ACTIVATION == GATED_TANH:
        return tanh(a) * sigmoid(b)
    else:
        return a


@triton.jit
def sigmoids(x):
    """sigmoid(x) and sigmoid(-x), neither by a difference from 1, which would cancel."""
    decay = tl.exp(-tl.abs(x))
    small, large = decay / (1.0 + decay), 1.0 / (1.0 + decay)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def tanh_slope(x):
    """1 - tanh(x)^2, likewise."""
    decay = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def activate_gradient(grad, a, b, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr):
    """The gradients with respect to a and, under a gate, b. `FROM_OUTPUT`: a is what came out of the activation."""
    if ACTIVATION == RELU:
        return tl.where(a <= 0, 0.0, grad), grad
    elif ACTIVATION == SILU:
        s, rest = sigmoids(a)
        return grad * s * (1.0 + a * rest), grad
    elif ACTIVATION == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * a * a)
        return grad * (0.5 * (1.0 + tl.erf(a * 0.7071067811865476)) + a * density), grad
    elif ACTIVATION == TANH:
        slope = 1.0 - a * a if FROM_OUTPUT else tanh_slope(a)
        return grad * slope, grad
    elif ACTIVATION == GLU:
        s, rest = sigmoids(b)
        return grad * s, grad * a * (s * rest)
    elif ACTIVATION == GATED_TANH:
        s, rest = sigmoids(b)
        return grad * s * tanh_slope(a), grad * tanh(a) * (s * rest)
    else:
        return grad, grad


@triton.jit
def _write(
    value, a, b, channel, exists, at, first, batch, present, time, saved, y,
    RESULTS: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    OUTPUTS: tl.constexpr = RESULTS * 2 if GATE else RESULTS
    line = y + (batch * RESULTS + channel) * time
    tl.store(line + at, value.to(y.dtype.element_ty), mask=exists & (at < time))
    if saved is not None:
        # Not by the length itself, which would break up the vectors.
        read_later = exists & (at < tl.where(first < present, time, 0))
        line = saved + (batch * OUTPUTS + channel) * time
        if GATE:
            tl.store(line + RESULTS * time + at, b, mask=read_later)
        tl.store(line + at, a, mask=read_later)


@triton.jit
def finish(
    a, b, channel, exists, at, first, batch, present, time,
    condition, condition_b, condition_c, condition_t, residual, residual_b, residual_c, residual_t, saved, y,
    RESULTS: tl.constexpr, ACTIVATION: tl.constexpr, CONDITION_UNIT: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    VECTORS: tl.constexpr,
):  # fmt: skip
    """Writes a tile of results from the sums a (under a gate: a and b), which may be laid out either way round.

    channel, at: the channel and position of each element, broadcastable to the tile; channels that `exists` and
    positions below `time` are written, those from `present` on as 0. first: the least position. y, saved: contiguous.
    VECTORS: whether to have code for a time that lets rows begin where a vector may be stored, besides the other; a
    line of 32-bit results is written at full width without.
    """
    GATE: tl.constexpr = ACTIVATION >= GLU
    here = exists & (at < present)
    if condition is not None:
        from_a = condition + batch * condition_b + spread(channel, condition_c, CONDITION_UNIT == CHANNEL)
        from_a += spread(at, condition_t, CONDITION_UNIT == TIME)
        a += tl.load(from_a, mask=here, other=0.0).to(tl.float32)
        if GATE:
            b += tl.load(from_a + RESULTS * condition_c, mask=here, other=0.0).to(tl.float32)
    value = activate(a, b, ACTIVATION)
    if residual is not None:
        from_residual = residual + batch * residual_b + spread(channel, residual_c, RESIDUAL_UNIT == CHANNEL)
        from_residual += spread(at, residual_t, RESIDUAL_UNIT == TIME)
        value += tl.load(from_residual, mask=here, other=0.0).to(tl.float32)
    value = tl.where(here, value, 0.0)
    if VECTORS:
        if time % 8 == 0:  # a branch of one kernel, not a kernel for each kind of length
            _write(value, a, b, channel, exists, at, first, batch, present, time // 8 * 8, saved, y, RESULTS, GATE)
        else:
            _write(value, a, b, channel, exists, at, first, batch, present, time, saved, y, RESULTS, GATE)
    else:
        _write(value, a, b, channel, exists, at, first, batch, present, time, saved, y, RESULTS, GATE)


@kernel
def finish_kernel(
    u, residual, lengths, y,
    residual_b: tl.int64, residual_c: tl.int64, residual_t: tl.int64, time: tl.int64,
    RESULTS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL_UNIT: tl.constexpr,
    CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Activation and residual of sums that lie in memory: for a gate whose halves belong to different groups."""
    BLOCKS: tl.constexpr = (RESULTS + CHANNELS - 1) // CHANNELS
    GATE: tl.constexpr = ACTIVATION >= GLU
    OUTPUTS: tl.constexpr = RESULTS * 2 if GATE else RESULTS
    program = tl.program_id(0)
    tiles = tl.cdiv(time, POSITIONS)
    block, batch = program % BLOCKS, (program // BLOCKS // tiles).to(tl.int64)
    first = program // BLOCKS % tiles * POSITIONS
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[:, None].to(tl.int64)
    at = (first + tl.arange(0, POSITIONS))[None, :]
    present = length_of(lengths, batch, time)
    here = (channel < RESULTS) & (at < present)
    place = u + (batch * OUTPUTS + channel) * time + at
    a = tl.load(place, mask=here, other=0.0)
    b = tl.load(place + RESULTS * time, mask=here, other=0.0) if GATE else a
    finish(
        a, b, channel, channel < RESULTS, at, first, batch, present, time,
        None, 0, 0, 0, residual, residual_b, residual_c, residual_t, None, y,
        RESULTS, ACTIVATION, STRIDED, RESIDUAL_UNIT, y.dtype.element_ty.primitive_bitwidth == 16,
    )  # fmt: skip


@triton.jit
def _activation_gradient(
    grad, saved, into, channel, at, first, batch, present, time, grad_b, grad_c, grad_t, into_b, into_c, into_t,
    RESULTS: tl.constexpr, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    GRAD_UNIT: tl.constexpr, INTO_UNIT: tl.constexpr,
):  # fmt: skip
    GATE: tl.constexpr = ACTIVATION >= GLU
    OUTPUTS: tl.constexpr = RESULTS * 2 if GATE else RESULTS
    inside = (channel < RESULTS) & (at < time)
    read, here = (channel < RESULTS) & (at < tl.where(first < present, time, 0)), at < present
    across = grad + batch * grad_b + spread(channel, grad_c, GRAD_UNIT == CHANNEL)
    upstream = tl.load(across + spread(at, grad_t, GRAD_UNIT == TIME), mask=read, other=0.0).to(tl.float32)
    if ACTIVATION == NONE:
        a = upstream
        b = upstream
    else:
        place = saved + (batch * OUTPUTS + channel) * time + at
        a = tl.load(place, mask=read, other=0.0).to(tl.float32)
        b = tl.load(place + RESULTS * time, mask=read, other=0.0) if GATE else a
    grad_a, grad_b_half = activate_gradient(upstream, a, b, ACTIVATION, FROM_OUTPUT)
    to = into + batch * into_b + spread(channel, into_c, INTO_UNIT == CHANNEL) + spread(at, into_t, INTO_UNIT == TIME)
    tl.store(to, tl.where(here, grad_a, 0.0).to(into.dtype.element_ty), mask=inside)
    if GATE:
        tl.store(to + RESULTS * into_c, tl.where(here, grad_b_half, 0.0).to(into.dtype.element_ty), mask=inside)


@kernel
def activation_gradient_kernel(
    grad, saved, lengths, into,
    grad_b: tl.int64, grad_c: tl.int64, grad_t: tl.int64, into_b: tl.int64, into_c: tl.int64, into_t: tl.int64,
    time: tl.int64,
    RESULTS: tl.constexpr, ACTIVATION: tl.constexpr, FROM_OUTPUT: tl.constexpr,
    GRAD_UNIT: tl.constexpr, INTO_UNIT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The gradient of what enters the activation, 0 where a position is absent."""
    BLOCKS: tl.constexpr = (RESULTS + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0)
    tiles = tl.cdiv(time, POSITIONS)
    block, batch = program % BLOCKS, (program // BLOCKS // tiles).to(tl.int64)
    first = program // BLOCKS % tiles * POSITIONS
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[:, None].to(tl.int64)
    at = (first + tl.arange(0, POSITIONS))[None, :]
    present = length_of(lengths, batch, time)
    even = time % 8 + grad_b % 8 + into_b % 8
    even += (grad_c if GRAD_UNIT == TIME else grad_t) % 8 + (into_c if INTO_UNIT == TIME else into_t) % 8
    if even == 0:  # as in finish
        _activation_gradient(
            grad, saved, into, channel, at, first, batch, present, time // 8 * 8,
            grad_b // 8 * 8, grad_c // 8 * 8 if GRAD_UNIT == TIME else grad_c,
            grad_t if GRAD_UNIT == TIME else grad_t // 8 * 8,
            into_b // 8 * 8, into_c // 8 * 8 if INTO_UNIT == TIME else into_c,
            into_t if INTO_UNIT == TIME else into_t // 8 * 8,
            RESULTS, ACTIVATION, FROM_OUTPUT, GRAD_UNIT, INTO_UNIT,
        )  # fmt: skip
    else:
        _activation_gradient(
            grad, saved, into, channel, at, first, batch, present, time,
            grad_b, grad_c, grad_t, into_b, into_c, into_t,
            RESULTS, ACTIVATION, FROM_OUTPUT, GRAD_UNIT, INTO_UNIT,
        )  # fmt: skip
