"""From products of queries and keys to scores and weights on a GPU: what every kernel of attention shares.

The query heads that read one key head lie in one list of rows: row r is query r // GROUP of the r % GROUP-th of them,
so that a tile of rows reads its keys once. Positions are 32-bit (the launcher sees to that), offsets 64-bit.

PACKED: sequences lie one after another within one batch element, (1, H, T of all, D).
"""

import triton
import triton.language as tl

from ..triton_common import is_finite, length_of, spread, tanh

LN2 = tl.constexpr(0.6931471805599453)
LOG2E, LOG2E_REST = tl.constexpr(1.4426950216293335), tl.constexpr(1.92596299e-08)  # their sum is log2(e)

# What a mask or bias varies over: a number's bits.
GIVEN = tl.constexpr(1)
ROWS = tl.constexpr(2)  # queries, or the heads of a group
COLUMNS = tl.constexpr(4)  # keys
UNIT = tl.constexpr(8)  # keys that are neighbours in memory
VECTORS = tl.constexpr(16)  # such keys, a multiple of 16 of them, and strides that are multiples too


@triton.jit
def idle(needed):
    """Whether a kernel that may not be needed, which only the GPU knows, isn't."""
    if needed is None:
        return False
    else:
        return tl.load(needed) == 0


@triton.constexpr_function
def vector_of(pointer):
    """How many elements are loaded at once: 16 bytes of them."""
    return 128 // pointer.dtype.element_ty.primitive_bitwidth


@triton.jit
def divisible(batch, head, row, VECTOR: tl.constexpr):
    """Strides, said to the compiler to be what the launcher has seen to: divisible by VECTOR, and those of rows so
    small that 32 bits hold what a tile of them spans. Offsets of 64 bits would take registers and time of every
    program."""
    return batch // VECTOR * VECTOR, head // VECTOR * VECTOR, row.to(tl.int32) // VECTOR * VECTOR


@triton.jit
def between(starts, sequence, length):
    """Where a packed sequence begins, and of how many of all `length` positions it is, whatever `starts` holds."""
    begin = tl.minimum(tl.maximum(tl.load(starts + sequence), 0), length)
    end = tl.minimum(tl.maximum(tl.load(starts + sequence + 1), begin), length)
    return begin, (end - begin).to(tl.int32)


@triton.jit
def tile_of(
    batches, kv_heads, splits, length, starts, GROUP: tl.constexpr, SIZE: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """Of a program: its tile of SIZE rows, GROUP to a position; its share of what is split, if anything is, its head,
    and its batch element. PACKED: the element is the only one, and the last result the sequence that lies in it.

    How many tiles a packed sequence has is known on the device alone. It is given those from that of its first row plus
    its own number on: as many as it may need, with at most one too many, whatever the others' lengths.
    """
    # There are fewer than 2^31 programs, and divisions of 64 bits are long: a program of a few blocks feels them.
    program = tl.program_id(0)
    tiles = tl.cast(length * GROUP // SIZE + batches if PACKED else tl.cdiv(length * GROUP, SIZE), tl.int32)
    tile, rest = program % tiles, program // tiles
    split = 0
    if splits is not None:
        count = splits.to(tl.int32)
        split, rest = rest % count, rest // count
    count = kv_heads.to(tl.int32)
    head, batch = (rest % count).to(tl.int64), (rest // count).to(tl.int64)
    sequence = batch
    if PACKED:
        last = batches - 1
        while sequence < last:
            middle = (sequence + last + 1) // 2
            reached = tl.load(starts + middle) * GROUP // SIZE + middle <= tile
            sequence, last = tl.where(reached, middle, sequence), tl.where(reached, last, middle - 1)
        tile = tl.maximum(tile - tl.load(starts + sequence) * GROUP // SIZE - sequence, 0).to(tl.int32)
    return tile, split, head, batch, sequence


@triton.jit
def span_of(
    query_lengths, key_lengths, sequence, time, source, BOTTOM_RIGHT: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """How many queries and keys are present, the key at which query 0 stands, and where both begin. PACKED: what are
    lengths else says where sequences begin."""
    if PACKED:
        query_begin, queries = between(query_lengths, sequence, time)
        key_begin, keys = between(key_lengths, sequence, source)
    else:
        queries = length_of(query_lengths, sequence, time).to(tl.int32)
        keys = length_of(key_lengths, sequence, source).to(tl.int32)
        query_begin, key_begin = 0, 0
    return queries, keys, keys - queries if BOTTOM_RIGHT else 0, query_begin, key_begin


@triton.jit
def count_of(batches, kv_heads, time, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """The number of all rows."""
    return (1 if PACKED else batches) * kv_heads * GROUP * time


@triton.jit
def offsets_of(first, begin, batch, head, kv_heads, time, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Of rows from `first` on, in a sequence that begins at `begin`: their queries, their heads within the group, and
    where they lie in (B, H, T), as one number and what each row adds to it. Without a group that is 32-bit and known to
    the compiler."""
    row = first + tl.arange(0, ROWS)
    i, member = row // GROUP, row % GROUP
    if GROUP == 1:
        return i, member, (batch * kv_heads + head) * time + begin + first, tl.arange(0, ROWS)
    else:
        return i, member, (batch * kv_heads + head) * GROUP * time + begin, member * time + i


@triton.jit
def strides_of(heads, length, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Those of a contiguous result (B, heads, length, WIDTH), or if PACKED (length, heads, WIDTH)."""
    if PACKED:
        return 0, WIDTH, heads * WIDTH
    else:
        return heads * length * WIDTH, length * WIDTH, WIDTH


@triton.jit
def rows_of(base, first, i, member, batch, head, b, h, t, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """A pointer to a tensor and what each row adds to it, in 32 bits if t has those and there is no group."""
    if GROUP == 1:
        return base + batch * b + head * h + tl.cast(first, tl.int64) * t, tl.arange(0, ROWS) * t
    else:
        begin = first // GROUP
        base += batch * b + head * GROUP * h + tl.cast(begin, tl.int64) * t
        return base, tl.cast(member, tl.int64) * h + (i - begin) * t


@triton.jit
def seen_keys(first, last, keys, diagonal, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Of queries first..last: the interval of keys that one of them sees, and of those that all of them see."""
    begin, end, whole_begin, whole_end = 0, keys, 0, keys
    if LEFT:
        begin, whole_begin = tl.maximum(first + diagonal - left, 0), tl.maximum(last + diagonal - left, 0)
    if RIGHT:
        end = tl.minimum(keys, last + diagonal + right + 1)
        whole_end = tl.minimum(keys, first + diagonal + right + 1)
    return begin, end, whole_begin, whole_end


@triton.jit
def seen_queries(first, last, queries, diagonal, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Of keys first..last: the interval of queries that see one of them, and of those that see all of them."""
    begin, end, whole_begin, whole_end = 0, queries, 0, queries
    if RIGHT:
        begin, whole_begin = tl.maximum(first - diagonal - right, 0), tl.maximum(last - diagonal - right, 0)
    if LEFT:
        end = tl.minimum(queries, last - diagonal + left + 1)
        whole_end = tl.minimum(queries, first - diagonal + left + 1)
    return begin, end, whole_begin, whole_end


@triton.jit
def edges_of(
    begin, end, whole_begin, whole_end, EDGE: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Blocks of EDGE: first..stop reach into begin..end; of these whole_first..whole_stop lie in the interval
    whole_begin..whole_end, where nothing is hidden, from a multiple of ALIGNED on. A mask or bias hides anywhere."""
    first = begin // EDGE
    stop = tl.where(begin < end, tl.cdiv(tl.maximum(end, 0), EDGE), first)
    if MASKED:
        return first, stop, first, first
    else:
        whole_first = tl.minimum(tl.cdiv(whole_begin, ALIGNED) * (ALIGNED // EDGE), stop)
        whole_stop = tl.maximum(tl.minimum(tl.maximum(whole_end, 0) // EDGE, stop), whole_first)
        return first, stop, whole_first, whole_stop


@triton.jit
def load_rows(
    base, offset, present, first, SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Elements first..first + WIDTH of some rows of SIZE, as the launcher lays them out: contiguous, and up to a whole
    vector followed by zeros. 0 past their end and, if MASKED, where not present."""
    VECTOR: tl.constexpr = vector_of(base)
    END: tl.constexpr = (SIZE + VECTOR - 1) // VECTOR * VECTOR
    element = first + tl.arange(0, WIDTH)
    at = base + offset[:, None] + element[None, :]
    if MASKED and END % WIDTH != 0:
        return tl.load(at, mask=present[:, None] & (element < END)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=present[:, None], other=0.0)
    elif END % WIDTH != 0:
        return tl.load(at, mask=(element < END)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def add_product(sums, factor, a, b, PRECISION: tl.constexpr):
    """sums * factor + a b, without a factor if that is None. In float32 multiplied whole, the terms of a product are
    summed by themselves first: one chain of all terms rounds more than the definition's own products."""
    if a.dtype == tl.float32 and PRECISION == "ieee":
        if factor is None:  # as a sum, the compiler would take it for where the product's chain begins
            return tl.fma(sums, tl.full(sums.shape, 1.0, tl.float32), tl.dot(a, b, input_precision=PRECISION))
        else:
            return tl.fma(sums, tl.broadcast_to(factor, sums.shape), tl.dot(a, b, input_precision=PRECISION))
    elif factor is None:
        return tl.dot(a, b, sums, input_precision=PRECISION)
    else:
        return tl.dot(a, b, sums * factor, input_precision=PRECISION)


@triton.jit
def wide_product(
    a, a_offset, a_present, b, b_offset, b_present, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """The products (A, B) of rows too wide for one tile, CHUNK elements at a time."""
    sums = tl.zeros((A, B), tl.float32)
    for first in range(0, SIZE, CHUNK):
        left = load_rows(a, a_offset, a_present, first, SIZE, CHUNK, True)
        right = load_rows(b, b_offset, b_present, first, SIZE, CHUNK, True)
        sums = add_product(sums, None, left, tl.trans(right), PRECISION)
    return sums


@triton.jit
def finite(x):
    """x with 0 in place of what is not finite, which even a weight of 0 would make NaN of."""
    return tl.where(is_finite(x), x, tl.zeros_like(x))


@triton.jit
def pairs_of(base, i, member, batch, head, b, h, t, KIND: tl.constexpr, GROUP: tl.constexpr):
    """A pointer to a mask or bias and what each row adds to it."""
    STEP: tl.constexpr = 16 if VECTORS & KIND else 1
    b, h, t = b // STEP * STEP, h // STEP * STEP, t // STEP * STEP
    if GROUP == 1:
        return base + batch * b + head * h, i * t
    else:
        return base + batch * b + head * GROUP * h, member * h + i * t


@triton.jit
def _load_pairs(base, row, column, stride, row_exists, source, KIND: tl.constexpr):
    at = base
    exists = column < (source // 16 * 16 if VECTORS & KIND else source)
    if ROWS & KIND:
        at += row
    if COLUMNS & KIND:
        at += spread(column, stride, UNIT & KIND)
    if ROWS & KIND and COLUMNS & KIND:
        return tl.load(at, mask=row_exists & exists, other=0)
    elif ROWS & KIND:
        return tl.load(at, mask=row_exists, other=0)
    elif COLUMNS & KIND:
        return tl.load(at, mask=exists, other=0)
    else:
        return tl.load(at + tl.zeros_like(column), mask=exists, other=0)


@triton.jit
def score(
    product, i, j, row_exists, keys, source, diagonal, left, right, scale, softcap, slope,
    mask, mask_row, mask_s, bias, bias_row, bias_s,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, SLOPES: tl.constexpr,
    SOFTCAP: tl.constexpr, FOLDED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Scores, -inf where hidden; where seen; and tanh(score / softcap).

    Queries i and keys j are laid out along either dimension; mask_row and bias_row are offsets of queries. WHOLE:
    nothing is hidden. FOLDED: a score is the product alone, its scale is applied by `weight`.
    """
    s = tl.fma(product, tl.zeros_like(product), product)  # what is not finite gives NaN, be it an infinity
    slowed = s
    if not FOLDED:
        s *= scale
    if SOFTCAP:
        slowed = tanh(s / softcap)
        s = softcap * slowed
    if SLOPES:
        s -= slope * tl.abs(i + diagonal - j).to(tl.float32)
    seen = j < keys
    if not WHOLE:
        seen = seen & row_exists
        if LEFT:
            seen = seen & (j >= i + diagonal - left)
        if RIGHT:
            seen = seen & (j <= i + diagonal + right)
        if MASK:
            seen = seen & (_load_pairs(mask, mask_row, j, mask_s, row_exists, source, MASK) != 0)
        if BIAS:
            b = _load_pairs(bias, bias_row, j, bias_s, row_exists, source, BIAS)
            seen = seen & (b != float("-inf"))
            s += b.to(tl.float32)
        s = tl.where(seen, s, float("-inf"))
    return s, seen, slowed


@triton.jit
def weight(s, level, scale, FOLDED: tl.constexpr, EXACT: tl.constexpr):
    """exp(s - level). FOLDED: s has yet to be scaled, by a scale that makes exp of exp2. EXACT: in float32, where what
    the argument of exp2 loses by its rounding, some 1e-7 for each e-fold, counts."""
    if FOLDED:
        return tl.exp2(tl.fma(s, scale, -level))
    elif EXACT:
        x = s - level
        power = x * LOG2E
        lost = tl.where(power == float("-inf"), 0.0, tl.fma(x, LOG2E, -power) + x * LOG2E_REST)
        result = tl.exp2(power)
        return tl.fma(result, lost * LN2, result)
    else:
        return tl.exp(s - level)
