"""What costs tanh on a GPU: scores of additive attention, and their gradients.

Both kernels give a lane one unit a of many pairs (i, j): sums over a wait in registers until the end, and sums over i
and j need no other lane. A tanh takes one operation of the special-function unit, which is the bound of the hardware's
own tanh; the accurate one is bound by its multiplications.
"""

import triton
import triton.language as tl

from ..triton_common import kernel, length_of, spread

FINISHED = tl.constexpr(16)  # keys at a time of a sum that has come to its end


@triton.jit
def _reciprocal(x):
    """Of 23 bits, for x neither tiny nor huge: a division guards against those."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x, HARDWARE: tl.constexpr):
    """Of 11 bits if HARDWARE, else within 6 ulp everywhere: a rational function in x^2, after Eigen's. No
    exponential, so nothing overflows, and small x keep their digits. A NaN stays one."""
    if HARDWARE:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        x = tl.clamp(x, -9.0, 9.0, propagate_nan=tl.PropagateNan.ALL)
        square = x * x
        above = tl.fma(square, -2.76076847742355e-16, 2.00018790482477e-13)
        above = tl.fma(square, above, -8.60467152213735e-11)
        above = tl.fma(square, above, 5.12229709037114e-08)
        above = tl.fma(square, above, 1.48572235717979e-05)
        above = tl.fma(square, above, 6.37261928875436e-04)
        above = tl.fma(square, above, 4.89352455891786e-03)
        below = tl.fma(square, 1.19825839466702e-06, 1.18534705686654e-04)
        below = tl.fma(square, below, 2.26843463243900e-03)
        below = tl.fma(square, below, 4.89352518554385e-03)
        return x * above * _reciprocal(below)


@triton.jit
def tanh_slope(x, t, HARDWARE: tl.constexpr):
    """1 - t^2 of t = tanh(x); exactly 0 where t should be 1 but may have been rounded off, unless HARDWARE."""
    slope = tl.fma(-t, t, 1.0)
    return slope if HARDWARE else tl.where(tl.abs(x) >= 9.0, 0.0, slope)


@kernel
def scores_kernel(
    query, key, weight, lengths, scores,
    query_b: tl.int64, query_i: tl.int64, query_a: tl.int64, key_b: tl.int64, key_j: tl.int64, key_a: tl.int64,
    rows: tl.int64, keys: tl.int64,
    WIDTH: tl.constexpr, HARDWARE: tl.constexpr, QUERY_UNIT: tl.constexpr, KEY_UNIT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """scores (B, T, S), contiguous, of the present keys; what lies past a length is left as it was. weight: (A,),
    contiguous."""
    program = tl.program_id(0).to(tl.int64)
    key_tiles, row_tiles = tl.cdiv(keys, KEYS), tl.cdiv(rows, ROWS)
    batch = program // (key_tiles * row_tiles)
    row = (program // key_tiles % row_tiles) * ROWS + tl.arange(0, ROWS)
    start = program % key_tiles * KEYS
    column = start + tl.arange(0, KEYS)
    length = length_of(lengths, batch, keys)
    if start >= length:
        return
    unit = tl.arange(0, UNITS)
    queries = query + batch * query_b + row[:, None] * query_i + spread(unit, query_a, QUERY_UNIT)[None, :]
    at_keys = key + batch * key_b + column[:, None] * key_j + spread(unit, key_a, KEY_UNIT)[None, :]
    total = tl.zeros((KEYS, ROWS, UNITS), tl.float32)
    for first in range(0, WIDTH, UNITS):
        exists = unit < WIDTH - first
        q = tl.load(
            queries + first * spread(1, query_a, QUERY_UNIT), mask=(row < rows)[:, None] & exists[None, :], other=0.0
        )
        k = tl.load(
            at_keys + first * spread(1, key_a, KEY_UNIT), mask=(column < length)[:, None] & exists[None, :], other=0.0
        )
        w = tl.load(weight + first + unit, mask=exists, other=0.0).to(tl.float32)
        sums = q.to(tl.float32)[None, :, :] + k.to(tl.float32)[:, None, :]
        total += w[None, None, :] * tanh(sums, HARDWARE)
    at = scores + (batch * rows + row[None, :]) * keys + column[:, None]
    tl.store(at, tl.sum(total, 2), mask=(row < rows)[None, :] & (column < length)[:, None])


@kernel
def gradient_kernel(
    query, key, weight, grads, lengths, grad_query, grad_key, sums,
    query_b: tl.int64, query_i: tl.int64, query_a: tl.int64, key_b: tl.int64, key_j: tl.int64, key_a: tl.int64,
    batches: tl.int64, rows: tl.int64, keys: tl.int64, parts: tl.int64, begun: tl.int64, ended: tl.int64,
    WIDTH: tl.constexpr, HARDWARE: tl.constexpr, MASKED: tl.constexpr, QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """Gradients of query, key and weight from those of the scores, grads (B, T, S). A program has UNITS units of one
    row of the batch, and one of `parts` parts of its queries.

    grad_query, grad_key: contiguous. sums gets each part's shares of the weight's, (B parts, A), and behind them of the
    keys', (parts, B, S, A); added to what is there where `begun` says by 1 that earlier queries have been here. A share
    of the keys' that is the only one and complete, which `ended` says by 1, is written to grad_key as well. MASKED: a
    pair without a gradient leaves no trace, though its query or key be NaN.
    """
    BLOCKS: tl.constexpr = (WIDTH + UNITS - 1) // UNITS
    program = tl.program_id(0).to(tl.int64)
    unit = program % BLOCKS * UNITS + tl.arange(0, UNITS)
    part, batch = program // BLOCKS % parts, program // (BLOCKS * parts)
    exists = (unit < WIDTH)[None, :]
    length = length_of(lengths, batch, keys)
    tiles = tl.cdiv(rows, ROWS)
    begin, end = tiles * part // parts * ROWS, tl.minimum(tiles * (part + 1) // parts * ROWS, rows)
    queries = query + batch * query_b + spread(unit, query_a, QUERY_UNIT)[None, :]
    at_keys = key + batch * key_b + spread(unit, key_a, KEY_UNIT)[None, :]
    key_sums = sums + (batches * parts + (part * batches + batch) * keys) * WIDTH + unit[None, :]
    w = tl.load(weight + unit, mask=unit < WIDTH, other=0.0).to(tl.float32)
    to_weight = tl.zeros((UNITS,), tl.float32)
    for top in range(begin, end, ROWS):
        row = top + tl.arange(0, ROWS)
        q = tl.load(queries + row[:, None] * query_i, mask=(row < end)[:, None] & exists, other=0.0).to(tl.float32)
        to_query = tl.zeros((ROWS, UNITS), tl.float32)
        of_tile = tl.zeros((UNITS,), tl.float32)  # short sums first: a long one loses digits
        added_to = tl.minimum(top - begin + begun, 1) * length  # keys whose sums have been started
        for start in range(0, length, KEYS):
            column = start + tl.arange(0, KEYS)
            present = (column < length)[:, None]
            k = tl.load(at_keys + column[:, None] * key_j, mask=present & exists, other=0.0).to(tl.float32)
            at = grads + (batch * rows + row[None, :]) * keys + column[:, None]
            g = tl.load(at, mask=present & (row < end)[None, :], other=0.0)[:, :, None]
            x = q[None, :, :] + k[:, None, :]
            t = tanh(x, HARDWARE)
            to_sum, along = g * tanh_slope(x, t, HARDWARE), g * t
            if MASKED:
                to_sum, along = tl.where(g == 0.0, 0.0, to_sum), tl.where(g == 0.0, 0.0, along)
            to_query += tl.sum(to_sum, 0)
            of_tile += tl.sum(tl.sum(along, 0), 0)
            place = key_sums + column[:, None] * WIDTH
            earlier = tl.load(place, mask=(column < added_to)[:, None] & exists, other=0.0)
            tl.store(place, earlier + w[None, :] * tl.sum(to_sum, 1), mask=present & exists)
            tl.debug_barrier()  # the next tile of queries reads what this one has written, perhaps by another lane
        to_weight += of_tile
        if grad_query is not None:
            to = grad_query + (batch * rows + row[:, None]) * WIDTH + unit[None, :]
            tl.store(to, (w[None, :] * to_query).to(grad_query.dtype.element_ty), mask=(row < end)[:, None] & exists)
    if begun == 0:
        for start in range(length, keys, KEYS):
            column = start + tl.arange(0, KEYS)
            nothing = tl.zeros((KEYS, UNITS), tl.float32)
            tl.store(key_sums + column[:, None] * WIDTH, nothing, mask=(column < keys)[:, None] & exists)
    if grad_key is not None:
        tl.debug_barrier()  # as above
        for start in range(0, keys * ended, FINISHED):
            column = start + tl.arange(0, FINISHED)
            here = (column < keys)[:, None] & exists
            total = tl.load(key_sums + column[:, None] * WIDTH, mask=here, other=0.0)
            to = grad_key + (batch * keys + column[:, None]) * WIDTH + unit[None, :]
            tl.store(to, total.to(grad_key.dtype.element_ty), mask=here)
    at = sums + (batch * parts + part) * WIDTH + unit
    earlier = tl.load(at, mask=unit < begun * WIDTH, other=0.0)
    tl.store(at, earlier + to_weight, mask=unit < WIDTH)
