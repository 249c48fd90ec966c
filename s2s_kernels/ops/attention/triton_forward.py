"""Attention on a GPU: a program makes the results of a tile of rows, block after block of keys with a running softmax
(Milakov and Gimelshein 2018; in blocks: Dao et al. 2022), of all keys that the rows see or of one share of them."""

import triton
import triton.language as tl

from ..triton_common import keep_tile, kernel
from .triton_scores import (
    LN2,
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
    span_of,
    strides_of,
    tile_of,
    vector_of,
    weight,
    wide_product,
)


@triton.jit
def _write(
    sums, peak, total, alive, start, row, exists, out, wide_out, out_row, lse, softmax, count,
    VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """Results of rows from their sums; a row that has no key is 0. start + row: where in (B, H, T); out_row: where in
    out, which the launcher need not have laid out so."""
    column = tl.arange(0, COLUMNS)[None, :]
    alive = alive & (total != 0)  # a NaN passes
    one = tl.full(total.shape, 1.0, tl.float32)
    inverse = tl.where(alive, tl.div_rn(one, total), 0.0)  # a plain division is two units off
    result = sums * inverse[:, None]
    # A value with anything not finite in it spoils the whole row.
    result = tl.where((tl.sum(result * 0.0, 1) == 0.0)[:, None], result, float("nan"))
    result = tl.where(alive[:, None], result, 0.0)
    inside = exists[:, None] & (column < VALUE_WIDTH)
    at = out_row[:, None] + column
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if wide_out is not None:
        tl.store(wide_out + at, result, mask=inside)
    if FOLDED:
        level = peak + tl.log2(total)
        natural = level * LN2
        share = tl.where(alive, 1.0, 0.0)
    else:
        natural = peak + tl.log(total)
        level = peak
        share = inverse
    tl.store(lse + start + row, tl.where(alive, natural, float("-inf")), mask=exists)
    if softmax is not None:
        tl.store(softmax + start + row, tl.where(alive, level, 0.0), mask=exists)
        tl.store(softmax + count + start + row, share, mask=exists)


@kernel
def forward_kernel(
    query, key, value, mask, bias, slopes, query_lengths, key_lengths, seed, needed, out, lse, softmax,
    wide_out, parts,
    query_b: tl.int64, query_h: tl.int64, query_t: tl.int64,
    key_b: tl.int64, key_h: tl.int64, key_s: tl.int64,
    value_b: tl.int64, value_h: tl.int64, value_s: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_t: tl.int64, mask_s: tl.int64,
    bias_b: tl.int64, bias_h: tl.int64, bias_t: tl.int64, bias_s: tl.int64, slope_b: tl.int64, slope_h: tl.int64,
    batches: tl.int64, kv_heads: tl.int64, time: tl.int64, source: tl.int64, left: tl.int64, right: tl.int64,
    scale: tl.float32, softcap: tl.float32, threshold: tl.int64, kept: tl.float32, splits: tl.int64,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SOFTCAP: tl.constexpr, FOLDED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (B, H, T, Dv), PACKED (T, H, Dv), lse (B, H, T) and softmax (2, B, H, T), or with `parts` one share of the
    keys' sums of values (splits, B H T, Dv + 2), each row followed by its greatest score and its sum of weights.

    DENSE: the last dimensions are contiguous. VECTOR: by how many elements strides are divisible. What the options say
    is in triton_scores.py. The width of queries fits into one tile if CHUNK reaches it. needed: (1,), 0 where nothing
    is to be done.
    """
    if idle(needed):
        return
    tile, split, head, batch, sequence = tile_of(
        batches, kv_heads, None if parts is None else splits, time, query_lengths, GROUP, ROWS, PACKED
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
        tile = tl.cdiv(last * GROUP, ROWS) - 1 - tile  # those with the most keys first
    VECTOR: tl.constexpr = vector_of(query)
    query_b, query_h, query_t = divisible(query_b, query_h, query_t, VECTOR)
    key_b, key_h, key_s = divisible(key_b, key_h, key_s, VECTOR)
    value_b, value_h, value_s = divisible(value_b, value_h, value_s, VECTOR)

    left, right = left.to(tl.int32), right.to(tl.int32)
    first_row = tile * ROWS
    i, member, start, place = offsets_of(first_row, query_begin, batch, head, kv_heads, time, ROWS, GROUP)
    present = i < queries
    query, query_offset = rows_of(
        query + query_begin * query_t, first_row, i, member, batch, head, query_b, query_h, query_t, ROWS, GROUP
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

    first_query, last_query = first_row // GROUP, tl.minimum((first_row + ROWS - 1) // GROUP, queries - 1)
    begin, end, whole_begin, whole_end = seen_keys(first_query, last_query, keys, diagonal, left, right, LEFT, RIGHT)
    end = tl.where(first_query < queries, end, 0)
    ALIGNED: tl.constexpr = EDGE if seed is None or EDGE >= 32 else 32  # what keep_tile asks of large blocks
    first, stop, whole_first, whole_stop = edges_of(begin, end, whole_begin, whole_end, EDGE, ALIGNED, MASK + BIAS > 0)
    if parts is not None:
        share = tl.cdiv(stop - first, splits.to(tl.int32))
        first = tl.minimum(first + split * share, stop)
        stop = tl.minimum(first + share, stop)
        whole_first = tl.cdiv(tl.maximum(whole_first, first), ALIGNED // EDGE) * (ALIGNED // EDGE)
        whole_first = tl.minimum(whole_first, stop)
        whole_stop = tl.minimum(tl.maximum(whole_stop, whole_first), stop)
    blocks = (whole_stop - whole_first) * EDGE // KEYS
    whole_stop = whole_first + blocks * (KEYS // EDGE)

    q = None
    if CHUNK >= WIDTH:
        q = load_rows(query, query_offset, present, 0, WIDTH, CHUNK, True)
    PLAIN: tl.constexpr = not SOFTCAP and BIAS == 0 and slopes is None and seed is None  # others lack the registers
    EXACT_WEIGHTS: tl.constexpr = PLAIN and query.dtype.element_ty == tl.float32
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    spoilt = tl.zeros((ROWS,), tl.float32)  # in the end, NaN where the row sees a value that isn't finite
    # What is absent is read as 0; what is hidden is read, and what isn't finite in its value makes NaN of the results.
    HIDES: tl.constexpr = LEFT or RIGHT or MASK + BIAS > 0
    LAST: tl.constexpr = 32 if MASK > 0 and seed is not None else 16  # as triton_tiles has it of others
    for phase in tl.static_range(3 if HIDES else 2):
        # First the blocks in which nothing is hidden, then those before and after them, smaller ones: they take more
        # registers, and less of them is hidden. Last, where anything isn't finite, all blocks again, with values in
        # which everything is.
        column = tl.arange(0, KEYS if phase == 0 else EDGE if phase == 1 else LAST)
        key_offset, value_offset = column * key_s, column * value_s
        before = whole_first - first
        if phase == 0:
            count = blocks
        elif phase == 1:
            count = before + stop - whole_stop
        else:
            clean = tl.sum(tl.sum(sums * 0.0, 1), 0) == 0.0
            count = tl.where(clean, 0, (stop - first) * (EDGE // LAST))
            sums = tl.where(clean, sums, 0.0)
            peak = tl.where(clean, peak, float("-inf"))
            total = tl.where(clean, total, 0.0)
        if phase > 0 or MASK + BIAS == 0:  # noqa: SIM102 - known to the compiler, unlike the next
            if HIDES or count > 0:  # what surrounds a loop takes as long as a block
                for n in tl.range(count, num_stages=1 if phase == 2 else None):
                    if phase == 0:
                        at = whole_first * EDGE + n * KEYS
                    elif phase == 2:
                        at = first * EDGE + n * LAST
                    else:
                        at = tl.where(n < before, first + n, whole_stop + n - before) * EDGE
                    j = at + column
                    keys_at = key + at.to(tl.int64) * key_s
                    if CHUNK >= WIDTH:
                        k = load_rows(keys_at, key_offset, j < keys, 0, WIDTH, CHUNK, phase > 0)
                        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                    else:
                        s = wide_product(
                            query, query_offset, present, keys_at, key_offset, j < keys,
                            WIDTH, CHUNK, PRECISION, ROWS, KEYS if phase == 0 else EDGE if phase == 1 else LAST,
                        )  # fmt: skip
                    s, seen, _ = score(
                        s, i[:, None], j[None, :], present[:, None], keys, source, diagonal,
                        left, right, scale, softcap, slope,
                        mask, mask_row, mask_s, bias, bias_row, bias_s,
                        LEFT, RIGHT, MASK, BIAS, slopes is not None, SOFTCAP, FOLDED, phase == 0,
                    )  # fmt: skip
                    top = tl.max(s, 1)
                    higher = tl.maximum(peak, top * scale if FOLDED else top)
                    level = tl.where(higher == float("-inf"), 0.0, higher)
                    factor = weight(peak, level, 1.0, FOLDED, EXACT_WEIGHTS)
                    p = weight(s, level[:, None], scale, FOLDED, EXACT_WEIGHTS)
                    peak = higher
                    total = total * factor + tl.sum(p, 1)
                    if seed is not None:
                        keep = keep_tile(
                            seed, start + place, at, threshold, ROWS,
                            KEYS if phase == 0 else EDGE if phase == 1 else LAST,
                        )  # fmt: skip
                        p = tl.where(keep, p * kept, 0.0)
                    values_at = value + at.to(tl.int64) * value_s
                    v = load_rows(values_at, value_offset, j < keys, 0, VALUE_WIDTH, COLUMNS, phase > 0)
                    if phase == 2:
                        bad = tl.sum(v.to(tl.float32) * 0.0, 1)
                        spoilt += tl.sum(tl.where(seen, bad[None, :], 0.0), 1)
                        v = finite(v)
                    if wide_out is None:
                        sums = add_product(sums, factor[:, None], p.to(v.dtype), v, PRECISION)
                    else:
                        # A result that keeps its precision must come of weights that do; as three products, a wide
                        # one has no room in the registers.
                        EXACT: tl.constexpr = "ieee" if COLUMNS > 512 else "tf32x3"
                        sums = tl.dot(p, v.to(tl.float32), sums * factor[:, None], input_precision=EXACT)

    exists = i < last
    if HIDES:
        sums = tl.where((spoilt == 0.0)[:, None], sums, float("nan"))
    count = count_of(batches, kv_heads, time, GROUP, PACKED)
    if parts is None:
        out_b, out_h, out_t = strides_of(kv_heads * GROUP, time, VALUE_WIDTH, PACKED)
        out, out_row = rows_of(
            out + query_begin * out_t, first_row, i, member, batch, head, out_b, out_h, out_t, ROWS, GROUP
        )  # fmt: skip
        if wide_out is not None:
            wide_out, out_row = rows_of(
                wide_out + query_begin * out_t, first_row, i, member, batch, head, out_b, out_h, out_t, ROWS, GROUP
            )  # fmt: skip
        _write(
            sums, peak, total, present, start, place, exists, out, wide_out, out_row, lse, softmax, count,
            VALUE_WIDTH, COLUMNS, FOLDED,
        )  # fmt: skip
    else:
        into = parts + (split * count + start) * (VALUE_WIDTH + 2) + place * (VALUE_WIDTH + 2)
        wide = tl.arange(0, COLUMNS)[None, :]
        tl.store(into[:, None] + wide, sums, mask=exists[:, None] & (wide < VALUE_WIDTH))
        tl.store(into + VALUE_WIDTH, peak, mask=exists)
        tl.store(into + VALUE_WIDTH + 1, tl.where(present, total, 0.0), mask=exists)


@kernel
def combine_kernel(
    parts, out, lse, softmax, wide_out, splits: tl.int64, heads: tl.int64, time: tl.int64, count: tl.int64,
    VALUE_WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, FOLDED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The shares' sums brought to their common greatest score and added up, in their order."""
    start, row = tl.program_id(0).to(tl.int64) * ROWS, tl.arange(0, ROWS)
    exists = start + row < count
    column = tl.arange(0, COLUMNS)[None, :]
    inside = exists[:, None] & (column < VALUE_WIDTH)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for split in range(splits):
        at = parts + (split * count + start + row) * (VALUE_WIDTH + 2)
        part = tl.load(at[:, None] + column, mask=inside, other=0.0)
        top = tl.load(at + VALUE_WIDTH, mask=exists, other=float("-inf"))
        higher = tl.maximum(peak, top)
        level = tl.where(higher == float("-inf"), 0.0, higher)
        before, now = weight(peak, level, 1.0, FOLDED, True), weight(top, level, 1.0, FOLDED, True)
        # Not even a NaN of a share may count for nothing.
        sums = sums * before[:, None] + part * now[:, None]
        total = total * before + tl.load(at + VALUE_WIDTH + 1, mask=exists, other=0.0) * now
        peak = higher
    out_row = (start + row) * VALUE_WIDTH
    if PACKED:
        out_row = ((start + row) % time * heads + (start + row) // time) * VALUE_WIDTH
    _write(
        sums, peak, total, exists, start, row, exists, out, wide_out, out_row, lse, softmax, count,
        VALUE_WIDTH, COLUMNS, FOLDED,
    )  # fmt: skip
