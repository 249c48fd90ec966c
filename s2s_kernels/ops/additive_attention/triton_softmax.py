"""What surrounds the scores of additive attention on a GPU: softmax, dropout, the products with values.

Scores of the visible keys, and later their gradients, lie in a workspace (B, T, S) of bounded size: these kernels see
some rows of a call at a time. What is hidden is selected away, never multiplied by 0: it may be NaN.
"""

import triton
import triton.language as tl

from ..triton_common import is_finite, keep_tile, kernel, length_of, spread


@triton.jit
def visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length):
    """Whether each row exists and may attend to each key."""
    here = (row < rows) & (column < length)
    if mask is not None:
        here = here & (tl.load(mask + batch * mask_b + row * mask_i + column * mask_j, mask=here, other=0) != 0)
    return here


@triton.jit
def weights_at(scores, statistics, batch, row, column, rows, keys, visible):
    """Weights before dropout, from scores and what statistics_kernel found; 0 where hidden."""
    score = tl.load(scores + (batch * rows + row) * keys + column, mask=visible, other=0.0)
    most = tl.load(statistics + (batch * rows + row) * 2, mask=row < rows, other=0.0)
    total = tl.load(statistics + (batch * rows + row) * 2 + 1, mask=row < rows, other=1.0)
    return tl.where(visible, tl.exp(score - most) / total, 0.0)


@triton.jit
def aligned(stride, ALIGNED: tl.constexpr):
    """Says to the compiler what the launcher has seen: rows begin where a vector may be loaded."""
    return stride // 8 * 8 if ALIGNED else stride


@triton.jit
def _statistics(
    scores, mask, batch, row, offset, mask_b, mask_i, mask_j, rows, keys, length, ROWS: tl.constexpr, KEYS: tl.constexpr
):
    """The largest visible score and the sum of exponentials of each row (ROWS, 1), 0 and 0 where nothing is visible."""
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    seen = tl.zeros((ROWS,), tl.int32)
    for start in range(0, length, KEYS):
        column = start + offset
        visible = visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length)
        score = tl.load(scores + (batch * rows + row) * keys + column, mask=visible, other=float("-inf"))
        most = tl.maximum(most, tl.max(score, 1))
        seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 1))
    most = tl.where(seen == 0, 0.0, most)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, length, KEYS):
        column = start + offset
        visible = visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length)
        score = tl.load(scores + (batch * rows + row) * keys + column, mask=visible, other=0.0)
        total += tl.sum(tl.where(visible, tl.exp(score - most[:, None]), 0.0), 1)
    return most[:, None], total[:, None]


@kernel
def statistics_kernel(
    scores, mask, lengths, statistics, weights,
    mask_b: tl.int64, mask_i: tl.int64, mask_j: tl.int64, rows: tl.int64, keys: tl.int64,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The largest visible score and the sum of exponentials of each row, (B, T, 2), 0 and 0 where nothing is visible,
    and the weights before dropout; each where given."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    batch, row = program // tiles, (program % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    length = length_of(lengths, batch, keys)
    offset = tl.arange(0, KEYS)[None, :]
    most, total = _statistics(scores, mask, batch, row, offset, mask_b, mask_i, mask_j, rows, keys, length, ROWS, KEYS)
    if statistics is not None:
        at = statistics + (batch * rows + row) * 2
        tl.store(at, most, mask=row < rows)
        tl.store(at + 1, total, mask=row < rows)
    if weights is not None:
        for start in range(0, keys, KEYS):
            column = start + offset
            visible = visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length)
            score = tl.load(scores + (batch * rows + row) * keys + column, mask=visible, other=0.0)
            weight = tl.where(visible, tl.exp(score - most) / total, 0.0)
            to = weights + (batch * rows + row) * keys + column
            tl.store(to, weight.to(weights.dtype.element_ty), mask=(row < rows) & (column < keys))


@triton.jit
def _add_strays(total, used, visible, v, finite, COUNT: tl.constexpr):
    """total (M, C) + used (M, COUNT) v (COUNT, C), of the elements of v alone that aren't finite: a product would carry
    them into lines from which they are hidden."""
    place = tl.arange(0, COUNT)
    for one in range(COUNT):
        across, down = (place == one)[None, :], (place == one)[:, None] & ~finite
        w = tl.sum(tl.where(across, used, 0.0), 1)[:, None]
        sees = tl.max((across & visible).to(tl.int32), 1)[:, None] != 0
        line = tl.sum(tl.where(down, v.to(tl.float32), 0.0), 0)[None, :]
        total += tl.where(sees & (tl.max(down.to(tl.int32), 0)[None, :] != 0), w * line, 0.0)
    return total


@kernel
def context_kernel(
    scores, statistics, value, mask, lengths, seed, context,
    value_b: tl.int64, value_j: tl.int64, value_v: tl.int64, mask_b: tl.int64, mask_i: tl.int64, mask_j: tl.int64,
    rows: tl.int64, keys: tl.int64, first_row: tl.int64, threshold: tl.int64, kept: tl.float32,
    VALUES: tl.constexpr, VALUE_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights after dropout times values, and the statistics that statistics_kernel finds, where given: each program
    finds those of its rows. The rows at hand are those from `first_row` on of all B T of a call, by which dropout
    counts."""
    # Bytes that decide about an operand, a mask's or dropout's, have the compiler lay out as many of it side by side as
    # it would of bytes: a product over 16 of 16 bits is then wrong.
    tl.static_assert(KEYS >= 32)
    BLOCKS: tl.constexpr = (VALUES + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    width = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    batch = program // (BLOCKS * tiles)
    row = (program // BLOCKS % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    counted = first_row + batch * rows + program // BLOCKS % tiles * ROWS + tl.arange(0, ROWS)
    length = length_of(lengths, batch, keys)
    value_b, value_j = aligned(value_b, ALIGNED), aligned(value_j, ALIGNED)
    values = value + batch * value_b + spread(width, value_v, VALUE_UNIT)[None, :]
    line = tl.arange(0, KEYS)[None, :]
    most, sum_of_row = _statistics(
        scores, mask, batch, row, line, mask_b, mask_i, mask_j, rows, keys, length, ROWS, KEYS
    )
    if statistics is not None:
        at = statistics + (batch * rows + row) * 2
        tl.store(at, most, mask=row < tl.where(program % BLOCKS == 0, rows, 0))
        tl.store(at + 1, sum_of_row, mask=row < tl.where(program % BLOCKS == 0, rows, 0))
    scale = 1.0 / sum_of_row
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, length, KEYS):
        column = start + tl.arange(0, KEYS)
        visible = visible_at(mask, batch, row, column[None, :], mask_b, mask_i, mask_j, rows, length)
        score = tl.load(scores + (batch * rows + row) * keys + column[None, :], mask=visible, other=0.0)
        used = tl.where(visible, tl.exp(score - most) * scale, 0.0)
        if seed is not None:
            keep = keep_tile(seed, counted, start, threshold, ROWS, KEYS)
            used = tl.where(keep, used * kept, 0.0)
        inside = (column < length)[:, None] & (width < VALUES)[None, :]
        v = tl.load(values + column[:, None] * value_j, mask=inside, other=0.0)
        if mask is not None:
            finite = is_finite(v)
            if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
                total = _add_strays(total, used, visible, v, finite, KEYS)
                v = tl.where(finite, v, 0.0)
        total = tl.dot(used.to(v.dtype), v.to(value.dtype.element_ty), total, input_precision=PRECISION)
    to = context + (batch * rows + row) * VALUES + width[None, :]
    tl.store(to, total.to(context.dtype.element_ty), mask=(row < rows) & (width < VALUES)[None, :])


@kernel
def product_kernel(
    grad, value, lengths, products,
    grad_b: tl.int64, grad_i: tl.int64, grad_v: tl.int64, value_b: tl.int64, value_j: tl.int64, value_v: tl.int64,
    rows: tl.int64, keys: tl.int64, behind: tl.int64,
    VALUES: tl.constexpr, GRAD_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """products (B, T, S), `behind` elements further on: what the gradient of the context says of each pair's weight
    after dropout. A NaN stays with its row or key."""
    program = tl.program_id(0).to(tl.int64)
    key_tiles, row_tiles = tl.cdiv(keys, KEYS), tl.cdiv(rows, ROWS)
    batch = program // (key_tiles * row_tiles)
    row = program // key_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    start = program % key_tiles * KEYS
    column = start + tl.arange(0, KEYS)
    length = length_of(lengths, batch, keys)
    if start >= length:
        return
    width = tl.arange(0, COLUMNS)
    grad_b, grad_i = aligned(grad_b, ALIGNED), aligned(grad_i, ALIGNED)
    value_b, value_j = aligned(value_b, ALIGNED), aligned(value_j, ALIGNED)
    grads = grad + batch * grad_b + row[:, None] * grad_i + spread(width, grad_v, GRAD_UNIT)[None, :]
    values = value + batch * value_b + column[None, :] * value_j + spread(width, value_v, VALUE_UNIT)[:, None]
    total = tl.zeros((ROWS, KEYS), tl.float32)
    for first in range(0, VALUES, COLUMNS):
        exists = width < VALUES - first
        left = tl.load(
            grads + first * spread(1, grad_v, GRAD_UNIT), mask=(row < rows)[:, None] & exists[None, :], other=0.0
        )
        right = tl.load(
            values + first * spread(1, value_v, VALUE_UNIT),
            mask=exists[:, None] & (column < length)[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    to = products + behind + (batch * rows + row[:, None]) * keys + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < length)[None, :])


@triton.jit
def _weight_gradient_at(
    products, grad_weights, seed, batch, row, counted, start, column, grad_b, grad_i, grad_j, rows, keys, threshold,
    kept, visible, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of weights before dropout."""
    gradient = tl.zeros_like(visible.to(tl.float32))
    if products is not None:
        gradient = tl.load(products + (batch * rows + row) * keys + column, mask=visible, other=0.0)
        if seed is not None:
            keep = keep_tile(seed, counted, start, threshold, ROWS, KEYS)
            gradient = tl.where(keep, gradient * kept, 0.0)
    if grad_weights is not None:
        at = grad_weights + batch * grad_b + row * grad_i + column * grad_j
        gradient += tl.load(at, mask=visible, other=0.0).to(tl.float32)
    return gradient


@kernel
def score_gradient_kernel(
    scores, statistics, products, grad_weights, mask, lengths, seed,
    mask_b: tl.int64, mask_i: tl.int64, mask_j: tl.int64, grad_b: tl.int64, grad_i: tl.int64, grad_j: tl.int64,
    rows: tl.int64, keys: tl.int64, first_row: tl.int64, threshold: tl.int64, kept: tl.float32, behind: tl.int64,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Puts the gradients of the present keys' scores in their place, 0 where a key is hidden. products: as of
    product_kernel."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    batch, row = program // tiles, (program % tiles * ROWS + tl.arange(0, ROWS))[:, None]
    counted = first_row + batch * rows + program % tiles * ROWS + tl.arange(0, ROWS)
    length = length_of(lengths, batch, keys)
    offset = tl.arange(0, KEYS)[None, :]
    if products is not None:
        products += behind
    mean = tl.zeros((ROWS,), tl.float32)
    for start in range(0, length, KEYS):
        column = start + offset
        visible = visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length)
        weight = weights_at(scores, statistics, batch, row, column, rows, keys, visible)
        gradient = _weight_gradient_at(
            products, grad_weights, seed, batch, row, counted, start, column, grad_b, grad_i, grad_j, rows, keys,
            threshold, kept, visible, ROWS, KEYS,
        )  # fmt: skip
        mean += tl.sum(tl.where(visible, weight * gradient, 0.0), 1)
    for start in range(0, length, KEYS):
        column = start + offset
        visible = visible_at(mask, batch, row, column, mask_b, mask_i, mask_j, rows, length)
        weight = weights_at(scores, statistics, batch, row, column, rows, keys, visible)
        gradient = _weight_gradient_at(
            products, grad_weights, seed, batch, row, counted, start, column, grad_b, grad_i, grad_j, rows, keys,
            threshold, kept, visible, ROWS, KEYS,
        )  # fmt: skip
        result = tl.where(visible, weight * (gradient - mean[:, None]), 0.0)
        at = scores + (batch * rows + row) * keys + column
        tl.store(at, result, mask=(row < rows) & (column < length))


@kernel
def value_gradient_kernel(
    scores, statistics, grad, mask, lengths, seed, result,
    grad_b: tl.int64, grad_i: tl.int64, grad_v: tl.int64, mask_b: tl.int64, mask_i: tl.int64, mask_j: tl.int64,
    rows: tl.int64, keys: tl.int64, first_row: tl.int64, threshold: tl.int64, kept: tl.float32, begun: tl.int64,
    VALUES: tl.constexpr, GRAD_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """result (B, S, Dv): weights after dropout, transposed, times the gradient of the context; added to what earlier
    queries have left there if `begun`. Absent keys get 0."""
    tl.static_assert(ROWS >= 32)  # as in context_kernel
    BLOCKS: tl.constexpr = (VALUES + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(keys, KEYS)
    width = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    batch, start = program // (BLOCKS * tiles), program // BLOCKS % tiles * KEYS
    column = (start + tl.arange(0, KEYS))[:, None]
    length = length_of(lengths, batch, keys)
    grad_b, grad_i = aligned(grad_b, ALIGNED), aligned(grad_i, ALIGNED)
    grads = grad + batch * grad_b + spread(width, grad_v, GRAD_UNIT)[None, :]
    to = result + (batch * keys + column) * VALUES + width[None, :]
    inside = (column < keys) & (width < VALUES)[None, :]
    total = tl.load(to, mask=inside & (column < begun * keys), other=0.0).to(tl.float32)
    for top in range(0, tl.where(start < length, rows, 0), ROWS):
        row = top + tl.arange(0, ROWS)
        visible = visible_at(mask, batch, row[None, :], column, mask_b, mask_i, mask_j, rows, length)
        used = weights_at(scores, statistics, batch, row[None, :], column, rows, keys, visible)
        if seed is not None:
            keep = tl.trans(keep_tile(seed, first_row + batch * rows + row, start, threshold, ROWS, KEYS))
            used = tl.where(keep, used * kept, 0.0)
        here = (row < rows)[:, None] & (width < VALUES)[None, :]
        upstream = tl.load(grads + row[:, None] * grad_i, mask=here, other=0.0)
        if mask is not None:
            finite = is_finite(upstream)
            if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
                total = _add_strays(total, used, visible, upstream, finite, ROWS)
                upstream = tl.where(finite, upstream, 0.0)
        total = tl.dot(used.to(upstream.dtype), upstream.to(grad.dtype.element_ty), total, input_precision=PRECISION)
    total = tl.where(column < length, total, 0.0)
    tl.store(to, total.to(result.dtype.element_ty), mask=inside)
