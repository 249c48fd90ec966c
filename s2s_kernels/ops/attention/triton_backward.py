"""The gradients of attention on a GPU: weights are made again from forward's greatest scores and sums. Those of queries
by tiles of rows, of keys and values by tiles of keys, of a bias by tiles of its own elements: each sum has one order.
"""

import triton
import triton.language as tl

from ..triton_common import is_finite, keep_tile, kernel
from .triton_scores import (
    add_product,
    count_of,
    divisible,
    edges_of,
    finite,
    idle,
    load_rows,
    offsets_of,
    pairs_of,
    rows_of,
    score,
    seen_keys,
    seen_queries,
    span_of,
    strides_of,
    tile_of,
    vector_of,
    weight,
    wide_product,
)


@triton.jit
def _differentiate(
    s, seen, slowed, grad, level, share, delta, scale, keep, kept,
    SOFTCAP: tl.constexpr, FOLDED: tl.constexpr, DROPOUT: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """From scores and the gradients of weights: weights after dropout, the gradients of scores as a bias or slope is
    added to them, and those before the softcap."""
    p = weight(s, level, scale, FOLDED, EXACT)
    if not FOLDED:
        p *= share
    dropped = p
    if DROPOUT:
        grad = tl.where(keep, grad * kept, 0.0)
        dropped = tl.where(keep, p * kept, 0.0)
    grad = p * (grad - delta)
    if not WHOLE:
        grad = tl.where(seen, grad, 0.0)
        dropped = tl.where(seen, dropped, 0.0)
    before = grad
    if SOFTCAP:
        before = grad * (1.0 - slowed * slowed)
        if not WHOLE:
            before = tl.where(seen, before, 0.0)
    return dropped, grad, before


@kernel
def query_kernel(
    query, key, value, grad_out, softmax, delta, mask, bias, slopes, query_lengths, key_lengths, seed, needed,
    grad_lse, out, into, slope_sums,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int64,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_t: tl.int64, bias_s: tl.int64, slope_b: tl.int64, slope_h: tl.int64,
    batches: tl.int64, kv_heads: tl.int64, time: tl.int64, source: tl.int64, left: tl.int64, right: tl.int64,
    factor: tl.float32, scale: tl.float32, softcap: tl.float32, threshold: tl.int64, kept: tl.float32,
    lse_b: tl.int64, lse_h: tl.int64, lse_t: tl.int64,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The gradient of queries (B, H, T, D), PACKED (T, H, D), and of each row's slope (B, H, T); and delta (B, H, T),
    what a weight's gradient counts from, grad_out . out - grad_lse, 0 where a row has no key, which the kernels after
    this one read. out is contiguous. factor: what products are scaled by; scale is that of the exponent. The rest as in
    forward_kernel."""
    if idle(needed):
        return
    tile, _split, head, batch, sequence = tile_of(
        batches, kv_heads, None, time, query_lengths, GROUP, ROWS, PACKED
    )  # fmt: skip
    queries, keys, diagonal, query_begin, key_begin = span_of(
        query_lengths, key_lengths, sequence, time, source, BOTTOM_RIGHT, PACKED
    )  # fmt: skip
    last = time.to(tl.int32)
    if PACKED:
        last = queries
        if tile * ROWS >= last * GROUP:
            return
    if RIGHT:
        tile = tl.cdiv(last * GROUP, ROWS) - 1 - tile
    VECTOR: tl.constexpr = vector_of(query)
    query_b, query_h, query_t = divisible(query_b, query_h, query_t, VECTOR)
    key_b, key_h, key_s = divisible(key_b, key_h, key_s, VECTOR)
    value_b, value_h, value_s = divisible(value_b, value_h, value_s, VECTOR)
    grad_b, grad_h, grad_t = divisible(grad_b, grad_h, grad_t, VECTOR)

    left, right = left.to(tl.int32), right.to(tl.int32)
    first_row = tile * ROWS
    i, member, start, place = offsets_of(first_row, query_begin, batch, head, kv_heads, time, ROWS, GROUP)
    present = i < queries
    query, query_offset = rows_of(
        query + query_begin * query_t, first_row, i, member, batch, head, query_b, query_h, query_t, ROWS, GROUP
    )  # fmt: skip
    grad_out, grad_offset = rows_of(
        grad_out + query_begin * grad_t, first_row, i, member, batch, head, grad_b, grad_h, grad_t, ROWS, GROUP
    )  # fmt: skip
    key += batch * key_b + head * key_h + key_begin * key_s
    value += batch * value_b + head * value_h + key_begin * value_s
    mask_row = None
    bias_row = None
    slope = None
    if MASK:
        mask, mask_row = pairs_of(
            mask, i[:, None], member[:, None], batch, head, mask_b, mask_h, mask_t, MASK, GROUP
        )  # fmt: skip
    if BIAS:
        bias, bias_row = pairs_of(
            bias, i[:, None], member[:, None], batch, head, bias_b, bias_h, bias_t, BIAS, GROUP
        )  # fmt: skip
    if slopes is not None:
        slope = tl.load(slopes + sequence * slope_b + (head * GROUP + member) * slope_h).to(tl.float32)[:, None]
    count = count_of(batches, kv_heads, time, GROUP, PACKED)
    level = tl.load(softmax + start + place, mask=present, other=0.0)
    share = tl.load(softmax + count + start + place, mask=present, other=0.0)
    alive = present & (share != 0)  # a NaN passes
    exists = i < last

    first_query, last_query = first_row // GROUP, tl.minimum((first_row + ROWS - 1) // GROUP, queries - 1)
    begin, end, whole_begin, whole_end = seen_keys(first_query, last_query, keys, diagonal, left, right, LEFT, RIGHT)
    end = tl.where(first_query < queries, end, 0)
    ALIGNED: tl.constexpr = EDGE if seed is None or EDGE >= 32 else 32  # what keep_tile asks of large blocks
    first, stop, whole_first, whole_stop = edges_of(begin, end, whole_begin, whole_end, EDGE, ALIGNED, MASK + BIAS > 0)
    blocks = (whole_stop - whole_first) * EDGE // KEYS
    whole_stop = whole_first + blocks * (KEYS // EDGE)

    q = None
    upstream = None
    if CHUNK >= WIDTH:
        q = load_rows(query, query_offset, present, 0, WIDTH, CHUNK, True)
    out_b, out_h, out_t = strides_of(kv_heads * GROUP, time, VALUE_WIDTH, PACKED)
    out, out_row = rows_of(
        out + query_begin * out_t, first_row, i, member, batch, head, out_b, out_h, out_t, ROWS, GROUP
    )  # fmt: skip
    origin = tl.zeros((ROWS,), tl.float32)
    for first_element in tl.static_range(0, VALUE_WIDTH, VALUE_CHUNK):
        upstream = load_rows(grad_out, grad_offset, alive, first_element, VALUE_WIDTH, VALUE_CHUNK, True)
        element = first_element + tl.arange(0, VALUE_CHUNK)[None, :]
        made = tl.load(out + (out_row[:, None] + element), mask=alive[:, None] & (element < VALUE_WIDTH), other=0.0)
        origin += tl.sum(upstream.to(tl.float32) * made.to(tl.float32), 1)
    if grad_lse is not None:
        lse, lse_row = rows_of(
            grad_lse + query_begin * lse_t, first_row, i, member, batch, head, lse_b, lse_h, lse_t, ROWS, GROUP
        )  # fmt: skip
        origin -= tl.load(lse + lse_row, mask=alive, other=0.0)
    tl.store(delta + start + place, origin, mask=exists)
    sums = tl.zeros((ROWS, ELEMENTS), tl.float32)
    slope_sum = tl.zeros((ROWS,), tl.float32)
    HIDES: tl.constexpr = LEFT or RIGHT or MASK + BIAS > 0  # what is absent is read as 0, what is hidden is read
    for phase in tl.static_range(2):
        column = tl.arange(0, KEYS if phase == 0 else EDGE)
        key_offset, value_offset = column * key_s, column * value_s
        before = whole_first - first
        number = blocks if phase == 0 else before + stop - whole_stop
        if phase == 1 or MASK + BIAS == 0:
            for n in tl.range(number, num_stages=1 if phase == 1 and MASK + BIAS == 0 else None):
                if phase == 0:
                    at = whole_first * EDGE + n * KEYS
                else:
                    at = tl.where(n < before, first + n, whole_stop + n - before) * EDGE
                j = at + column
                keys_at, values_at = key + at.to(tl.int64) * key_s, value + at.to(tl.int64) * value_s
                if CHUNK >= WIDTH:
                    k = load_rows(keys_at, key_offset, j < keys, 0, WIDTH, CHUNK, phase == 1)
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                else:
                    s = wide_product(
                        query, query_offset, present, keys_at, key_offset, j < keys,
                        WIDTH, CHUNK, PRECISION, ROWS, KEYS if phase == 0 else EDGE,
                    )  # fmt: skip
                    k = load_rows(keys_at, key_offset, j < keys, 0, WIDTH, ELEMENTS, phase == 1)
                if VALUE_CHUNK >= VALUE_WIDTH:
                    v = load_rows(values_at, value_offset, j < keys, 0, VALUE_WIDTH, VALUE_CHUNK, phase == 1)
                    grad = tl.dot(upstream, tl.trans(v), input_precision=PRECISION)
                else:
                    grad = wide_product(
                        grad_out, grad_offset, alive, values_at, value_offset, j < keys,
                        VALUE_WIDTH, VALUE_CHUNK, PRECISION, ROWS, KEYS if phase == 0 else EDGE,
                    )  # fmt: skip
                s, seen, slowed = score(
                    s, i[:, None], j[None, :], present[:, None], keys, source, diagonal,
                    left, right, factor, softcap, slope,
                    mask, mask_row, mask_s, bias, bias_row, bias_s,
                    LEFT, RIGHT, MASK, BIAS, slopes is not None, SOFTCAP, FOLDED, phase == 0,
                )  # fmt: skip
                keep = None
                if seed is not None:
                    keep = keep_tile(seed, start + place, at, threshold, ROWS, KEYS if phase == 0 else EDGE)
                _, grad, inner = _differentiate(
                    s, seen, slowed, grad, level[:, None], share[:, None], origin[:, None], scale, keep, kept,
                    SOFTCAP, FOLDED, seed is not None, phase == 0, BIAS == 0 and query.dtype.element_ty == tl.float32,
                )  # fmt: skip
                if slope_sums is not None:
                    slope_sum -= tl.sum(grad * tl.abs(i[:, None] + diagonal - j[None, :]).to(tl.float32), 1)
                if phase == 1 and HIDES:
                    k = finite(k)
                sums = add_product(sums, None, inner.to(k.dtype), k, PRECISION)

    if into is not None:
        into_b, into_h, into_t = strides_of(kv_heads * GROUP, time, WIDTH, PACKED)
        into, into_row = rows_of(
            into + query_begin * into_t, first_row, i, member, batch, head, into_b, into_h, into_t, ROWS, GROUP
        )  # fmt: skip
        element = tl.arange(0, ELEMENTS)[None, :]
        sums = tl.where(alive[:, None], sums * factor, 0.0)
        inside = exists[:, None] & (element < WIDTH)
        tl.store(into + (into_row[:, None] + element), sums.to(into.dtype.element_ty), mask=inside)
    if slope_sums is not None:
        tl.store(slope_sums + start + place, tl.where(alive, slope_sum, 0.0), mask=exists)


@kernel
def key_value_kernel(
    query, key, value, grad_out, softmax, delta, mask, bias, slopes, query_lengths, key_lengths, seed, needed,
    into_key, into_value,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int64,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_t: tl.int64, bias_s: tl.int64, slope_b: tl.int64, slope_h: tl.int64,
    batches: tl.int64, kv_heads: tl.int64, time: tl.int64, source: tl.int64, left: tl.int64, right: tl.int64,
    factor: tl.float32, scale: tl.float32, softcap: tl.float32, threshold: tl.int64, kept: tl.float32,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    ELEMENTS: tl.constexpr, VALUE_ELEMENTS: tl.constexpr,
):  # fmt: skip
    """The gradients of keys (B, Hkv, S, D) and values (B, Hkv, S, Dv), PACKED (S, Hkv, D) and (S, Hkv, Dv), or of one
    of them, over all heads that read them. Tiles of products have keys along their first dimension."""
    if idle(needed):
        return
    tile, _split, head, batch, sequence = tile_of(batches, kv_heads, None, source, key_lengths, 1, KEYS, PACKED)
    queries, keys, diagonal, query_begin, key_begin = span_of(
        query_lengths, key_lengths, sequence, time, source, BOTTOM_RIGHT, PACKED
    )  # fmt: skip
    first_key = tile * KEYS
    last = source.to(tl.int32)
    if PACKED:
        last = keys
        if first_key >= last:
            return
    VECTOR: tl.constexpr = vector_of(query)
    query_b, query_h, query_t = divisible(query_b, query_h, query_t, VECTOR)
    key_b, key_h, key_s = divisible(key_b, key_h, key_s, VECTOR)
    value_b, value_h, value_s = divisible(value_b, value_h, value_s, VECTOR)
    grad_b, grad_h, grad_t = divisible(grad_b, grad_h, grad_t, VECTOR)

    left, right = left.to(tl.int32), right.to(tl.int32)
    line = tl.arange(0, KEYS)
    j = first_key + line
    present = j < keys
    begin_key = first_key.to(tl.int64) + key_begin
    key += batch * key_b + head * key_h + begin_key * key_s
    value += batch * value_b + head * value_h + begin_key * value_s
    key_offset, value_offset = line * key_s, line * value_s
    query += query_begin * query_t
    grad_out += query_begin * grad_t
    count = count_of(batches, kv_heads, time, GROUP, PACKED)

    last_key = tl.minimum(first_key + KEYS, keys) - 1
    begin, end, whole_begin, whole_end = seen_queries(first_key, last_key, queries, diagonal, left, right, LEFT, RIGHT)
    end = tl.where(first_key < keys, end, 0)
    first, stop, whole_first, whole_stop = edges_of(
        begin * GROUP, end * GROUP, whole_begin * GROUP, whole_end * GROUP, EDGE, EDGE, MASK + BIAS > 0
    )
    blocks = (whole_stop - whole_first) * EDGE // ROWS
    whole_stop = whole_first + blocks * (ROWS // EDGE)

    k = None
    v = None
    if CHUNK >= WIDTH:
        k = load_rows(key, key_offset, present, 0, WIDTH, CHUNK, True)
    if into_key is not None and VALUE_CHUNK >= VALUE_WIDTH:
        v = load_rows(value, value_offset, present, 0, VALUE_WIDTH, VALUE_CHUNK, True)
    key_sums = tl.zeros((KEYS, ELEMENTS), tl.float32)
    value_sums = tl.zeros((KEYS, VALUE_ELEMENTS), tl.float32)
    HIDES: tl.constexpr = LEFT or RIGHT or MASK + BIAS > 0  # what is absent is read as 0, what is hidden is read
    for phase in tl.static_range(2):
        before = whole_first - first
        number = blocks if phase == 0 else before + stop - whole_stop
        if phase == 1 or MASK + BIAS == 0:
            for n in tl.range(number, num_stages=1 if phase == 1 and MASK + BIAS == 0 else None):
                if phase == 0:
                    at = whole_first * EDGE + n * ROWS
                else:
                    at = tl.where(n < before, first + n, whole_stop + n - before) * EDGE
                i, member, start, place = offsets_of(
                    at, query_begin, batch, head, kv_heads, time, ROWS if phase == 0 else EDGE, GROUP
                )  # fmt: skip
                queries_at, query_offset = rows_of(
                    query, at, i, member, batch, head, query_b, query_h, query_t, ROWS if phase == 0 else EDGE, GROUP
                )  # fmt: skip
                grads_at, grad_offset = rows_of(
                    grad_out, at, i, member, batch, head, grad_b, grad_h, grad_t, ROWS if phase == 0 else EDGE, GROUP
                )  # fmt: skip
                exists = i < queries
                if phase == 0:
                    level, share = tl.load(softmax + start + place), tl.load(softmax + count + start + place)
                    origin = tl.load(delta + start + place)
                    alive = exists
                else:
                    level = tl.load(softmax + start + place, mask=exists, other=0.0)
                    share = tl.load(softmax + count + start + place, mask=exists, other=0.0)
                    origin = tl.load(delta + start + place, mask=exists, other=0.0)
                    alive = exists & (share != 0)
                slope = None
                mask_at = mask
                mask_row = None
                if MASK:
                    mask_at, mask_row = pairs_of(
                        mask, i[None, :], member[None, :], batch, head, mask_b, mask_h, mask_t, MASK, GROUP
                    )  # fmt: skip
                bias_at = bias
                bias_row = None
                if BIAS:
                    bias_at, bias_row = pairs_of(
                        bias, i[None, :], member[None, :], batch, head, bias_b, bias_h, bias_t, BIAS, GROUP
                    )  # fmt: skip
                if slopes is not None:
                    slope = tl.load(slopes + sequence * slope_b + (head * GROUP + member) * slope_h)
                    slope = slope.to(tl.float32)[None, :]
                if CHUNK >= WIDTH:
                    q = load_rows(queries_at, query_offset, exists, 0, WIDTH, CHUNK, phase == 1)
                    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                else:
                    s = wide_product(
                        key, key_offset, present, queries_at, query_offset, exists,
                        WIDTH, CHUNK, PRECISION, KEYS, ROWS if phase == 0 else EDGE,
                    )  # fmt: skip
                    q = None
                    if into_key is not None:
                        q = load_rows(queries_at, query_offset, exists, 0, WIDTH, ELEMENTS, phase == 1)
                upstream = None
                if into_value is not None or VALUE_CHUNK >= VALUE_WIDTH:
                    upstream = load_rows(grads_at, grad_offset, alive, 0, VALUE_WIDTH, VALUE_ELEMENTS, phase == 1)
                grad = s
                if into_key is not None:
                    if VALUE_CHUNK >= VALUE_WIDTH:
                        grad = tl.dot(v, tl.trans(upstream), input_precision=PRECISION)
                    else:
                        grad = wide_product(
                            value, value_offset, present, grads_at, grad_offset, alive,
                            VALUE_WIDTH, VALUE_CHUNK, PRECISION, KEYS, ROWS if phase == 0 else EDGE,
                        )  # fmt: skip
                s, seen, slowed = score(
                    s, i[None, :], j[:, None], exists[None, :], keys, source, diagonal,
                    left, right, factor, softcap, slope,
                    mask_at, mask_row, mask_s, bias_at, bias_row, bias_s,
                    LEFT, RIGHT, MASK, BIAS, slopes is not None, SOFTCAP, FOLDED, phase == 0,
                )  # fmt: skip
                keep = None
                if seed is not None:
                    keep = keep_tile(seed, start + place, first_key, threshold, ROWS if phase == 0 else EDGE, KEYS)
                    keep = tl.trans(keep)
                p, _, inner = _differentiate(
                    s, seen, slowed, grad, level[None, :], share[None, :], origin[None, :], scale, keep, kept,
                    SOFTCAP, FOLDED, seed is not None, phase == 0, BIAS == 0 and query.dtype.element_ty == tl.float32,
                )  # fmt: skip
                if into_value is not None:
                    value_sums = add_product(value_sums, None, p.to(value.dtype.element_ty), upstream, PRECISION)
                if into_key is not None:
                    if phase == 1 and HIDES:
                        q = finite(q)
                    key_sums = add_product(key_sums, None, inner.to(q.dtype), q, PRECISION)

    exists = j < last
    if into_key is not None:
        into_b, into_h, into_s = strides_of(kv_heads, source, WIDTH, PACKED)
        into_key += batch * into_b + head * into_h + begin_key * into_s
        element = tl.arange(0, ELEMENTS)[None, :]
        key_sums = tl.where(present[:, None], key_sums * factor, 0.0)
        inside = exists[:, None] & (element < WIDTH)
        at = into_key + (line[:, None] * into_s + element)
        tl.store(at, key_sums.to(into_key.dtype.element_ty), mask=inside)
    if into_value is not None:
        into_b, into_h, into_s = strides_of(kv_heads, source, VALUE_WIDTH, PACKED)
        into_value += batch * into_b + head * into_h + begin_key * into_s
        element = tl.arange(0, VALUE_ELEMENTS)[None, :]
        # What isn't finite in values had no part in the products, and has no gradient. Its place is found anew: the
        # loops need the registers that would keep it.
        v = load_rows(value, line.to(tl.int64) * value_s, present, 0, VALUE_WIDTH, VALUE_ELEMENTS, True)
        value_sums = tl.where(present[:, None] & is_finite(v.to(tl.float32)), value_sums, 0.0)
        inside = exists[:, None] & (element < VALUE_WIDTH)
        at = into_value + (line[:, None] * into_s + element)
        tl.store(at, value_sums.to(into_value.dtype.element_ty), mask=inside)


@kernel
def bias_kernel(
    query, key, value, grad_out, softmax, delta, mask, bias, slopes, query_lengths, key_lengths, seed, needed, into,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int64,
    grad_b: tl.int64, grad_h: tl.int64, grad_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_t: tl.int64, bias_s: tl.int64, slope_b: tl.int64, slope_h: tl.int64,
    batches: tl.int64, heads: tl.int64, time: tl.int64, source: tl.int64, left: tl.int64, right: tl.int64,
    factor: tl.float32, scale: tl.float32, softcap: tl.float32, threshold: tl.int64, kept: tl.float32,
    own_batches: tl.int64, own_heads: tl.int64, splits: tl.int64,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr, VALUE_CHUNK: tl.constexpr,
    OWN_ROWS: tl.constexpr,
):  # fmt: skip
    """One split's share of the gradient of a bias (own_batches, own_heads, T or 1, S); into: (splits, ...), contiguous.

    A program makes a tile of it: the sum over the batch and the heads that share it and, where all queries do (not
    OWN_ROWS), over their tiles; of these it takes those whose number is its split's, modulo the splits."""
    if idle(needed):
        return
    VECTOR: tl.constexpr = vector_of(query)
    query_b, query_h, query_t = divisible(query_b, query_h, query_t, VECTOR)
    key_b, key_h, key_s = divisible(key_b, key_h, key_s, VECTOR)
    value_b, value_h, value_s = divisible(value_b, value_h, value_s, VECTOR)
    grad_b, grad_h, grad_t = divisible(grad_b, grad_h, grad_t, VECTOR)
    # Counts of tiles are below 2^31, as that of forward's programs is.
    program = tl.program_id(0)
    key_tiles, row_tiles = tl.cdiv(source, KEYS).to(tl.int32), tl.cdiv(time, ROWS).to(tl.int32)
    own_batch_count, own_head_count = own_batches.to(tl.int32), own_heads.to(tl.int32)
    first_key = program % key_tiles * KEYS
    rest = program // key_tiles
    own_tile = 0
    if OWN_ROWS:
        own_tile, rest = rest % row_tiles, rest // row_tiles
    own_head, rest = rest % own_head_count, rest // own_head_count
    own_batch, split = rest % own_batch_count, rest // own_batch_count

    left, right = left.to(tl.int32), right.to(tl.int32)
    line, column = tl.arange(0, ROWS), tl.arange(0, KEYS)
    j = first_key + column
    key += first_key.to(tl.int64) * key_s
    value += first_key.to(tl.int64) * value_s
    query_offset, grad_offset, key_offset, value_offset = (
        line * query_t,
        line * grad_t,
        column * key_s,
        column * value_s,
    )
    # Where every tile is seen, there is no condition, and the loop can ask for the next one's rows.
    WHOLE: tl.constexpr = not (LEFT or RIGHT) and query_lengths is None and key_lengths is None
    several_heads = heads.to(tl.int32) // own_head_count
    several = several_heads * (batches.to(tl.int32) // own_batch_count)
    if not OWN_ROWS:
        several *= row_tiles
    total = tl.zeros((ROWS, KEYS), tl.float32)
    for n in range(split, several, splits.to(tl.int32)):
        tile, shared = own_tile, n
        if not OWN_ROWS:
            tile, shared = n % row_tiles, n // row_tiles
        head = (own_head + shared % several_heads).to(tl.int64)
        batch = (own_batch + shared // several_heads).to(tl.int64)
        queries, keys, diagonal, _query_begin, _key_begin = span_of(
            query_lengths, key_lengths, batch, time, source, BOTTOM_RIGHT, False
        )  # fmt: skip
        first_query = tile * ROWS
        last_query = tl.minimum(first_query + ROWS, queries) - 1
        begin, end, _whole_begin, _whole_end = seen_keys(
            first_query, last_query, keys, diagonal, left, right, LEFT, RIGHT
        )
        reached = (first_query < queries) & (begin < end) & (begin < first_key + KEYS) & (end > first_key)
        if WHOLE or reached:
            i = first_query + line
            exists, present = i < queries, j < keys
            queries_at = query + batch * query_b + head * query_h + first_query.to(tl.int64) * query_t
            grads_at = grad_out + batch * grad_b + head * grad_h + first_query.to(tl.int64) * grad_t
            keys_at, values_at = key + batch * key_b, value + batch * value_b
            keys_at += head // GROUP * key_h
            values_at += head // GROUP * value_h
            place = (batch * heads + head) * time + i
            count = batches * heads * time
            level = tl.load(softmax + place, mask=exists, other=0.0)
            share = tl.load(softmax + count + place, mask=exists, other=0.0)
            origin = tl.load(delta + place, mask=exists, other=0.0)
            alive = exists & (share != 0)
            i_down = i[:, None]
            mask_at = mask
            mask_row = None
            slope = None
            if MASK:
                mask_at, mask_row = pairs_of(mask, i_down, 0, batch, head, mask_b, mask_h, mask_t, MASK, 1)
            bias_at, bias_row = pairs_of(bias, i_down, 0, batch, head, bias_b, bias_h, bias_t, BIAS, 1)
            if slopes is not None:
                slope = tl.load(slopes + batch * slope_b + head * slope_h).to(tl.float32)
            s = wide_product(
                queries_at, query_offset, exists, keys_at, key_offset, present,
                WIDTH, CHUNK, PRECISION, ROWS, KEYS,
            )  # fmt: skip
            grad = wide_product(
                grads_at, grad_offset, alive, values_at, value_offset, present,
                VALUE_WIDTH, VALUE_CHUNK, PRECISION, ROWS, KEYS,
            )  # fmt: skip
            s, seen, slowed = score(
                s, i[:, None], j[None, :], exists[:, None], keys, source, diagonal, left, right, factor, softcap, slope,
                mask_at, mask_row, mask_s, bias_at, bias_row, bias_s,
                LEFT, RIGHT, MASK, BIAS, slopes is not None, SOFTCAP, False, False,
            )  # fmt: skip
            keep = None
            if seed is not None:
                keep = keep_tile(seed, place, first_key, threshold, ROWS, KEYS)
            _dropped, grad, _inner = _differentiate(
                s, seen, slowed, grad, level[:, None], share[:, None], origin[:, None], scale, keep, kept,
                SOFTCAP, False, seed is not None, False, False,
            )  # fmt: skip
            total += grad
    line = (split.to(tl.int64) * own_batches + own_batch) * own_heads + own_head
    if OWN_ROWS:
        i = own_tile * ROWS + tl.arange(0, ROWS)
        at = into + (line * time + i)[:, None] * source + j[None, :]
        tl.store(at, total.to(into.dtype.element_ty), mask=(i < time)[:, None] & (j < source)[None, :])
    else:
        tl.store(into + line * source + j, tl.sum(total, 0).to(into.dtype.element_ty), mask=j < source)
