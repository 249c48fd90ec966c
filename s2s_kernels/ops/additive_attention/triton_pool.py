"""Attention pooling on a GPU: Triton kernels and their launchers, under the schemas of csrc/operators.cpp.

The map before tanh is a product on tensor cores, and so is its gradient's way to x. In backward what comes out of
tanh's gradient, (B, T, A), is the gradient of a convolution of one tap, whose kernels make that of the weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ...dispatch import TRITON_DTYPES
from ..convolution.triton_kernels import causal_conv1d_backward
from ..triton_common import dense, device_of, kernel, length_of, power, precision, spread
from .triton_kernels import aligned_rows, hardware_tanh
from .triton_scores import tanh, tanh_slope
from .triton_softmax import aligned

POSITIONS = 64  # of a tile without a product
LINE = 128  # of what runs along a sequence


@triton.jit
def _product(
    left, right, total, position, column, left_t, left_k, right_k, right_n, length,
    SIZE: tl.constexpr, WIDTH: tl.constexpr, LEFT_UNIT: tl.constexpr, K_UNIT: tl.constexpr, N_UNIT: tl.constexpr,
    PRECISION: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """total plus rows of left, (length, SIZE), times right (SIZE, WIDTH)."""
    part = tl.arange(0, REDUCED)
    lefts = left + position[:, None] * left_t + spread(part, left_k, LEFT_UNIT)[None, :]
    rights = right + spread(column, right_n, N_UNIT)[None, :] + spread(part, right_k, K_UNIT)[:, None]
    for first in range(0, SIZE, REDUCED):
        present, exists = (position < length)[:, None], (column < WIDTH)[None, :]
        if SIZE % REDUCED != 0:
            present = present & (part < SIZE - first)[None, :]
            exists = exists & (part < SIZE - first)[:, None]
        a = tl.load(lefts + first * spread(1, left_k, LEFT_UNIT), mask=present, other=0.0)
        b = tl.load(rights + first * spread(1, right_k, K_UNIT), mask=exists, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def _mapped(
    x, weight, bias, batch, position, unit, x_b, x_t, x_i, weight_a, weight_i, length,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, X_UNIT: tl.constexpr, WEIGHT_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """x weight^T + bias of a tile (positions, units)."""
    x_b, x_t, weight_a = aligned(x_b, ALIGNED), aligned(x_t, ALIGNED), aligned(weight_a, ALIGNED)
    total = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    total += tl.load(bias + unit, mask=unit < UNITS, other=0.0).to(tl.float32)[None, :]
    return _product(
        x + batch * x_b, weight, total, position, unit, x_t, x_i, weight_i, weight_a, length,
        WIDTH, UNITS, X_UNIT, WEIGHT_UNIT, False, PRECISION, REDUCED,
    )  # fmt: skip


@kernel
def pool_scores_kernel(
    x, weight, bias, context, lengths, scores,
    x_b: tl.int64, x_t: tl.int64, x_i: tl.int64, weight_a: tl.int64, weight_i: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, HARDWARE: tl.constexpr, X_UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """scores (B, T) of the present positions. bias, context: (A,), contiguous."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(time, POSITIONS)
    batch, start = program // tiles, program % tiles * POSITIONS
    position = start + tl.arange(0, POSITIONS)
    length = length_of(lengths, batch, time)
    if start >= length:
        return
    score = tl.zeros((POSITIONS,), tl.float32)
    for first in range(0, UNITS, COLUMNS):
        unit = first + tl.arange(0, COLUMNS).to(tl.int64)
        total = _mapped(
            x, weight, bias, batch, position, unit, x_b, x_t, x_i, weight_a, weight_i, length,
            WIDTH, UNITS, X_UNIT, WEIGHT_UNIT, ALIGNED, PRECISION, POSITIONS, COLUMNS, REDUCED,
        )  # fmt: skip
        factor = tl.load(context + unit, mask=unit < UNITS, other=0.0).to(tl.float32)[None, :]
        score += tl.sum(tl.where((unit < UNITS)[None, :], tanh(total, HARDWARE) * factor, 0.0), 1)
    tl.store(scores + batch * time + position, score, mask=position < length)


@kernel
def pool_softmax_kernel(weights, lengths, time: tl.int64, LINE: tl.constexpr):
    """Scores (B, T) become weights where they lie; absent positions get 0."""
    batch = tl.program_id(0).to(tl.int64)
    length = length_of(lengths, batch, time)
    line = weights + batch * time
    offset = tl.arange(0, LINE)
    most = tl.full((LINE,), float("-inf"), tl.float32)
    for start in range(0, length, LINE):
        most = tl.maximum(most, tl.load(line + start + offset, mask=offset < length - start, other=float("-inf")))
    largest = tl.max(most, 0)
    total = tl.zeros((LINE,), tl.float32)
    for start in range(0, length, LINE):
        score = tl.load(line + start + offset, mask=offset < length - start, other=float("-inf"))
        total += tl.where(offset < length - start, tl.exp(score - largest), 0.0)
    scale = tl.sum(total, 0)
    for start in range(0, time, LINE):
        score = tl.load(line + start + offset, mask=offset < length - start, other=0.0)
        weight = tl.where(offset < length - start, tl.exp(score - largest) / scale, 0.0)
        tl.store(line + start + offset, weight, mask=offset < time - start)


@kernel
def pool_sum_kernel(
    weights, x, lengths, pooled, x_b: tl.int64, x_t: tl.int64, x_i: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, X_UNIT: tl.constexpr, ALIGNED: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """pooled (B, I): the weighted sum of x."""
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    batch, width = program // BLOCKS, program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    length = length_of(lengths, batch, time)
    offset = tl.arange(0, POSITIONS)
    x_b, x_t = aligned(x_b, ALIGNED), aligned(x_t, ALIGNED)
    inputs = x + batch * x_b + spread(width, x_i, X_UNIT)[None, :]
    total = tl.zeros((POSITIONS, COLUMNS), tl.float32)
    for start in range(0, length, POSITIONS):
        present = offset < length - start
        weight = tl.load(weights + batch * time + start + offset, mask=present, other=0.0)
        here = present[:, None] & (width < WIDTH)[None, :]
        total += weight[:, None] * tl.load(inputs + (start + offset)[:, None] * x_t, mask=here, other=0.0).to(
            tl.float32
        )
    tl.store(pooled + batch * WIDTH + width, tl.sum(total, 0).to(pooled.dtype.element_ty), mask=width < WIDTH)


@kernel
def pool_weight_gradient_kernel(
    x, grad_pooled, grad_weights, lengths, grads,
    x_b: tl.int64, x_t: tl.int64, x_i: tl.int64, grad_b: tl.int64, grad_i: tl.int64, given_b: tl.int64,
    given_t: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, X_UNIT: tl.constexpr, ALIGNED: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grads (B, T): of the weights of present positions."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(time, POSITIONS)
    batch, position = program // tiles, program % tiles * POSITIONS + tl.arange(0, POSITIONS)
    present = position < length_of(lengths, batch, time)
    gradient = tl.zeros((POSITIONS,), tl.float32)
    if grad_pooled is not None:
        width = tl.arange(0, COLUMNS)
        x_b, x_t = aligned(x_b, ALIGNED), aligned(x_t, ALIGNED)
        inputs = x + batch * x_b + position[:, None] * x_t + spread(width, x_i, X_UNIT)[None, :]
        total = tl.zeros((POSITIONS, COLUMNS), tl.float32)
        for first in range(0, WIDTH, COLUMNS):
            exists = width < WIDTH - first
            upstream = tl.load(grad_pooled + batch * grad_b + (first + width) * grad_i, mask=exists, other=0.0)
            here = present[:, None] & exists[None, :]
            value = tl.load(inputs + first * spread(1, x_i, X_UNIT), mask=here, other=0.0).to(tl.float32)
            total += upstream.to(tl.float32)[None, :] * value
        gradient += tl.sum(total, 1)
    if grad_weights is not None:
        gradient += tl.load(grad_weights + batch * given_b + position * given_t, mask=present, other=0.0).to(tl.float32)
    tl.store(grads + batch * time + position, gradient, mask=present)


@kernel
def pool_score_gradient_kernel(weights, grads, lengths, time: tl.int64, LINE: tl.constexpr):
    """The gradients of weights become those of scores where they lie."""
    batch = tl.program_id(0).to(tl.int64)
    length = length_of(lengths, batch, time)
    offset = tl.arange(0, LINE)
    total = tl.zeros((LINE,), tl.float32)
    for start in range(0, length, LINE):
        at, present = batch * time + start + offset, offset < length - start
        total += tl.load(weights + at, mask=present, other=0.0) * tl.load(grads + at, mask=present, other=0.0)
    mean = tl.sum(total, 0)
    for start in range(0, length, LINE):
        at, present = batch * time + start + offset, offset < length - start
        gradient = tl.load(grads + at, mask=present, other=0.0)
        tl.store(grads + at, tl.load(weights + at, mask=present, other=0.0) * (gradient - mean), mask=present)


@kernel
def pool_map_gradient_kernel(
    x, weight, bias, context, lengths, grads, into, sums,
    x_b: tl.int64, x_t: tl.int64, x_i: tl.int64, weight_a: tl.int64, weight_i: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, HARDWARE: tl.constexpr, X_UNIT: tl.constexpr,
    WEIGHT_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, POSITIONS: tl.constexpr,
    COLUMNS: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """From the gradients of scores, grads (B, T): into (B, T, A), those of what enters tanh, 0 where absent; and each
    tile's shares of those of the context and of the bias, sums (2, B tiles, A)."""
    BLOCKS: tl.constexpr = (UNITS + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(time, POSITIONS)
    unit = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    tile = program // BLOCKS
    batch, position = tile // tiles, tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    length = length_of(lengths, batch, time)
    total = _mapped(
        x, weight, bias, batch, position, unit, x_b, x_t, x_i, weight_a, weight_i, length,
        WIDTH, UNITS, X_UNIT, WEIGHT_UNIT, ALIGNED, PRECISION, POSITIONS, COLUMNS, REDUCED,
    )  # fmt: skip
    hidden = tanh(total, HARDWARE)
    g = tl.load(grads + batch * time + position, mask=position < length, other=0.0)[:, None]
    factor = tl.load(context + unit, mask=unit < UNITS, other=0.0).to(tl.float32)[None, :]
    here = (position < length)[:, None] & (unit < UNITS)[None, :]
    before = tl.where(here, g * factor * tanh_slope(total, hidden, False), 0.0)
    to = into + (batch * time + position[:, None]) * UNITS + unit[None, :]
    tl.store(to, before.to(into.dtype.element_ty), mask=(position < time)[:, None] & (unit < UNITS)[None, :])
    shares = sums + tile * UNITS + unit
    tl.store(shares, tl.sum(tl.where(here, g * hidden, 0.0), 0), mask=unit < UNITS)
    tl.store(shares + tl.num_programs(0) // BLOCKS * UNITS, tl.sum(before, 0), mask=unit < UNITS)


@kernel
def pool_input_gradient_kernel(
    into, weight, weights, grad_pooled, lengths, result,
    weight_a: tl.int64, weight_i: tl.int64, grad_b: tl.int64, grad_i: tl.int64, time: tl.int64,
    WIDTH: tl.constexpr, UNITS: tl.constexpr, WEIGHT_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """result (B, T, I): the gradient of x, through the map (into, (B, T, A)) and, where given, through the sum."""
    BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(time, POSITIONS)
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    tile = program // BLOCKS
    batch, position = tile // tiles, tile % tiles * POSITIONS + tl.arange(0, POSITIONS)
    length = length_of(lengths, batch, time)
    total = _product(
        into + batch * time * UNITS, weight, tl.zeros((POSITIONS, COLUMNS), tl.float32), position, column, UNITS, 1,
        aligned(weight_a, ALIGNED), weight_i, length, UNITS, WIDTH, True, False, WEIGHT_UNIT, PRECISION, REDUCED,
    )  # fmt: skip
    if grad_pooled is not None:
        share = tl.load(weights + batch * time + position, mask=position < length, other=0.0)
        upstream = tl.load(grad_pooled + batch * grad_b + column * grad_i, mask=column < WIDTH, other=0.0)
        along = share[:, None] * upstream.to(tl.float32)[None, :]
        total += tl.where((position < length)[:, None], along, 0.0)  # 0 times a NaN is no 0
    to = result + (batch * time + position[:, None]) * WIDTH + column[None, :]
    tl.store(to, total.to(result.dtype.element_ty), mask=(position < time)[:, None] & (column < WIDTH)[None, :])


def _product_tiles(dtype: torch.dtype, results: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"POSITIONS": 64, "COLUMNS": power(results, 16, 32), "REDUCED": 16, "num_warps": 4}
    return {"POSITIONS": 128, "COLUMNS": power(results, 16, 128), "REDUCED": 64, "num_warps": 8, "num_stages": 3}


def _map_tiles(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Any]:
    """What the two kernels that make the hidden layer share."""
    units, width = weight.shape
    return {
        "WIDTH": width, "UNITS": units, "HARDWARE": hardware_tanh(x.dtype), "X_UNIT": dense(x),
        "WEIGHT_UNIT": dense(weight), "ALIGNED": aligned_rows(x) and aligned_rows(weight), "PRECISION": precision(),
        **_product_tiles(x.dtype, units),
    }  # fmt: skip


def attention_pool_forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, context: torch.Tensor, lengths: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("attention_pool_forward", x, weight, bias, context, lengths)
    batch, time, width = x.shape
    pooled = x.new_empty(batch, width)
    weights = x.new_empty((batch, time), dtype=torch.float32)
    with device_of(x):
        if batch and time:
            chosen = _map_tiles(x, weight)
            pool_scores_kernel[(batch * -(-time // chosen["POSITIONS"]),)](
                x, weight, bias.contiguous(), context.contiguous(), lengths, weights,
                *x.stride(), *weight.stride(), time, **chosen,
            )  # fmt: skip
            pool_softmax_kernel[(batch,)](weights, lengths, time, LINE=LINE, num_warps=4)
        if pooled.numel():
            columns = power(width, 16, 64)
            pool_sum_kernel[(batch * -(-width // columns),)](
                weights, x, lengths, pooled, *x.stride(), time, WIDTH=width, X_UNIT=dense(x),
                ALIGNED=aligned_rows(x), POSITIONS=32,
                COLUMNS=columns, num_warps=4,
            )  # fmt: skip
    return pooled, weights


def attention_pool_backward(
    grad_pooled: torch.Tensor | None, grad_weights: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor,
    bias: torch.Tensor, context: torch.Tensor, weights: torch.Tensor, lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check("attention_pool_backward", x, weight, bias, context, lengths)
    (batch, time, width), units = x.shape, weight.shape[0]
    for given, shape in ((grad_pooled, (batch, width)), (grad_weights, (batch, time)), (weights, (batch, time))):
        if given is not None and (given.shape != shape or given.dtype not in TRITON_DTYPES):
            raise RuntimeError(f"attention_pool_backward: expected {shape}, got {tuple(given.shape)} {given.dtype}")
    if not (batch and time):
        return tuple(tensor.new_zeros(tensor.shape) for tensor in (x, weight, bias, context))
    weights = weights.contiguous()
    grads = torch.empty_like(weights)
    into = x.new_empty(batch, time, units)
    chosen = _map_tiles(x, weight)
    tiles = batch * -(-time // chosen["POSITIONS"])
    sums = x.new_empty((2, tiles, units), dtype=torch.float32)
    grad_x = x.new_empty(x.shape)
    of_pooled = (0, 0) if grad_pooled is None else grad_pooled.stride()
    with device_of(x):
        pool_weight_gradient_kernel[(batch * -(-time // POSITIONS),)](
            x, grad_pooled, grad_weights, lengths, grads, *x.stride(), *of_pooled,
            *((0, 0) if grad_weights is None else grad_weights.stride()),
            time, WIDTH=width, X_UNIT=dense(x), ALIGNED=aligned_rows(x), POSITIONS=POSITIONS,
            COLUMNS=power(width, 16, 64), num_warps=4,
        )  # fmt: skip
        pool_score_gradient_kernel[(batch,)](weights, grads, lengths, time, LINE=LINE, num_warps=4)
        if units:
            pool_map_gradient_kernel[(tiles * -(-units // chosen["COLUMNS"]),)](
                x, weight, bias.contiguous(), context.contiguous(), lengths, grads, into, sums,
                *x.stride(), *weight.stride(), time, **chosen,
            )  # fmt: skip
        if width:
            products = _product_tiles(x.dtype, width)
            pool_input_gradient_kernel[(tiles * -(-width // products["COLUMNS"]),)](
                into, weight, weights, grad_pooled, lengths, grad_x, *weight.stride(), *of_pooled, time,
                WIDTH=width, UNITS=units, WEIGHT_UNIT=dense(weight), ALIGNED=aligned_rows(weight),
                PRECISION=precision(), **products,
            )  # fmt: skip
    grad_weight = causal_conv1d_backward(
        into.mT, x.mT, weight[:, :, None], None, lengths, None, 1, 1, 0, True, False, False, True, False, False, False
    )[1]
    grad_context, grad_bias = (shares.sum(0).to(x.dtype) for shares in sums)
    return grad_x, grad_weight[:, :, 0], grad_bias, grad_context


def _check(
    operator: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, context: torch.Tensor,
    lengths: torch.Tensor | None,
) -> None:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    fits = x.dim() == 3 and weight.dim() == 2 and x.dtype == weight.dtype == bias.dtype == context.dtype
    fits = fits and x.dtype != torch.float64 and weight.shape[1] == x.shape[2]
    fits = fits and bias.shape == context.shape == weight.shape[:1]
    fits = fits and (lengths is None or (lengths.shape == x.shape[:1] and lengths.is_contiguous()))
    fits = fits and (lengths is None or lengths.dtype in (torch.int32, torch.int64))
    if not fits:
        raise RuntimeError(
            f"{operator}: the arguments don't fit together: x {tuple(x.shape)} {x.dtype}, "
            f"weight {tuple(weight.shape)} {weight.dtype}, bias {tuple(bias.shape)}, context {tuple(context.shape)}"
        )
