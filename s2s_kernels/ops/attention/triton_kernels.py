"""Launchers of the Triton kernels of attention, under the schemas of csrc/operators.cpp.

Imported by the first call on a CUDA tensor.
"""

import dataclasses
import math
from typing import Any

import torch

from ...dispatch import TRITON_DTYPES
from ..triton_common import device_of, power, reduce
from .arguments import TRITON_POSITIONS
from .triton_backward import bias_kernel, key_value_kernel, query_kernel
from .triton_call import Call, kind_of, laid_out
from .triton_forward import combine_kernel, forward_kernel
from .triton_rows import delta_kernel, sequence_sum_kernel, spoilt_kernel
from .triton_tiles import backward_tiles, forward_tiles, widths

# Programs among which a sum over keys, or over what shares a bias, is split. A constant: the bits must not depend on
# the GPU.
PROGRAMS = 128


def _splits(programs: int, most: int) -> int:
    return max(1, min(PROGRAMS // max(programs, 1), most))


def attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, query_lengths: torch.Tensor | None, key_lengths: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None, seed: torch.Tensor | None, left: int | None, right: int | None,
    bottom_right: bool, dropout_p: float, scale: float | None, softcap: float | None, save: bool, save_wide: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    call = _checked(
        "attention_forward", query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed, left,
        right, bottom_right, dropout_p, scale, softcap,
    )  # fmt: skip
    batch, heads, time, _ = query.shape
    columns = value.shape[3]
    out = query.new_empty(batch, heads, time, columns)
    lse = query.new_empty((batch, heads, time), dtype=torch.float32)
    softmax = query.new_empty((2, batch, heads, time) if save else (0,), dtype=torch.float32)
    wide_out = query.new_empty((batch, heads, time, columns) if save_wide else (0,), dtype=torch.float32)
    _forward(call, out, lse, softmax if save else None, wide_out if save_wide else None)
    return out, lse, softmax, wide_out


def attention_packed_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None, seed: torch.Tensor | None, left: int | None,
    right: int | None, bottom_right: bool, dropout_p: float, scale: float | None, softcap: float | None, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    call = _checked(
        "attention_packed_forward", query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed,
        left, right, bottom_right, dropout_p, scale, softcap, packed=True,
    )  # fmt: skip
    time, heads, _ = query.shape
    out = query.new_empty(time, heads, value.shape[2])
    lse = query.new_empty((heads, time), dtype=torch.float32)
    softmax = query.new_empty((2, heads, time) if save else (0,), dtype=torch.float32)
    _forward(call, out, lse, softmax if save else None, None)
    return out, lse, softmax, query.new_empty((0,), dtype=torch.float32)


def _forward(
    call: Call, out: torch.Tensor, lse: torch.Tensor, softmax: torch.Tensor | None, wide_out: torch.Tensor | None
) -> None:
    if not lse.numel():
        return
    query, key, value = call.query, call.key, call.value
    columns = call.columns
    tiles = forward_tiles(call, wide_out is not None)
    programs = call.programs(call.time * call.group, tiles["ROWS"])
    splits = _splits(programs, -(-call.source // (2 * tiles["KEYS"]))) if call.needed is None else 1
    parts = None
    if splits > 1:
        parts = query.new_empty((splits, lse.numel(), columns + 2), dtype=torch.float32)
    with device_of(query):
        forward_kernel[(programs * splits,)](
            query, key, value, call.mask, call.bias, call.slopes, call.query_lengths, call.key_lengths, call.seed,
            call.needed, out, lse, softmax, wide_out, parts,
            *call.strides(), *call.pairs(), call.sequences, key.shape[1], *call.limits(), *call.numbers(), splits,
            **call.options(), **call.grouped(), **tiles,
        )  # fmt: skip
        if parts is not None:
            wide = tiles["COLUMNS"]
            rows = power(1024 // wide, 1, 16)
            combine_kernel[(-(-lse.numel() // rows),)](
                parts, out, lse, softmax, wide_out, splits, call.heads, call.time, lse.numel(),
                VALUE_WIDTH=columns, COLUMNS=wide, ROWS=rows, FOLDED=call.folded, PACKED=call.packed, num_warps=4,
            )  # fmt: skip


def attention_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, softmax: torch.Tensor,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, bias: torch.Tensor | None,
    query_lengths: torch.Tensor | None, key_lengths: torch.Tensor | None, alibi_slopes: torch.Tensor | None,
    seed: torch.Tensor | None, left: int | None, right: int | None, bottom_right: bool, dropout_p: float,
    scale: float | None, softcap: float | None, need_query: bool, need_key: bool, need_value: bool, need_bias: bool,
    need_slopes: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    name = "attention_backward"
    call = _checked(
        name, query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed, left, right, bottom_right,
        dropout_p, scale, softcap,
    )  # fmt: skip
    pairs = ((query, need_query), (key, need_key), (value, need_value), (bias, need_bias), (alibi_slopes, need_slopes))
    return _backward(name, call, pairs, grad_out, grad_lse, out, softmax)


def attention_packed_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, softmax: torch.Tensor,
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor, alibi_slopes: torch.Tensor | None, seed: torch.Tensor | None, left: int | None,
    right: int | None, bottom_right: bool, dropout_p: float, scale: float | None, softcap: float | None,
    need_query: bool, need_key: bool, need_value: bool, need_slopes: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    name = "attention_packed_backward"
    call = _checked(
        name, query, key, value, None, None, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, left, right, bottom_right,
        dropout_p, scale, softcap, packed=True,
    )  # fmt: skip
    pairs = ((query, need_query), (key, need_key), (value, need_value), (None, False), (alibi_slopes, need_slopes))
    grad_query, grad_key, grad_value, _, grad_slopes = _backward(name, call, pairs, grad_out, grad_lse, out, softmax)
    return grad_query, grad_key, grad_value, grad_slopes


def _backward(
    name: str, call: Call, pairs: tuple[tuple[torch.Tensor | None, bool], ...], grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None, out: torch.Tensor, softmax: torch.Tensor,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """pairs: query, key, value, bias and slopes, and whether the gradient of each is wanted."""
    query, value, lse_shape = pairs[0][0], pairs[2][0], call.lse_shape
    assert query is not None and value is not None
    fits = grad_out.shape == out.shape == (*query.shape[:-1], value.shape[-1]) and grad_out.dtype == query.dtype
    fits = fits and softmax.shape == (2, *lse_shape) and softmax.dtype == torch.float32
    fits = fits and out.dtype in (query.dtype, torch.float32)
    fits = fits and (grad_lse is None or (grad_lse.shape == lse_shape and grad_lse.dtype == torch.float32))
    if not (fits and not any(x is None and need for x, need in pairs)):
        raise RuntimeError(f"{name}: the arguments don't fit together: query {tuple(query.shape)}")
    grads: list[torch.Tensor | None]
    if not (softmax.numel() and call.key.numel() and call.value.numel()):
        grads = [x.new_zeros(x.shape) if x is not None and need else None for x, need in pairs]
    else:
        grads = [x.new_empty(x.shape) if x is not None and need else None for x, need in pairs]
        with device_of(query):
            _fill(call, grads, grad_out, grad_lse, out.contiguous(), softmax.contiguous())
    return tuple(
        query.new_empty((0,), dtype=query.dtype if x is None else x.dtype) if grad is None else grad
        for (x, _), grad in zip(pairs, grads, strict=True)
    )


def mend_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, save: bool, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Makes `out`, contiguous, anew if anything in the inputs isn't finite. Returns what `mend_backward` takes:
    softmax, which nothing is in else and without `save`, and whether that is so."""
    left, right, bottom_right, _, scale, softcap = options
    spoilt = query.new_zeros(1, dtype=torch.int32)
    call = _checked(
        "mend_forward", query, key, value, None, None, None, None, None, None, left, right, bottom_right, 0.0, scale,
        softcap,
    )  # fmt: skip
    call = dataclasses.replace(call, needed=spoilt)
    lse = query.new_empty(call.lse_shape, dtype=torch.float32)
    softmax = query.new_empty((2, *call.lse_shape) if save else (0,), dtype=torch.float32)
    with device_of(query):
        for x in (call.query, call.key, call.value):
            batch, heads, time, width = x.shape
            wide = power(width, 1, 1024)
            rows = power(4096 // wide, 1, 64)
            spoilt_kernel[(-(-time // rows) * batch * heads,)](
                x, spoilt, *x.stride()[:3], heads, time, WIDTH=width, WIDE=wide, ROWS=rows, num_warps=4
            )
    _forward(call, out, lse, softmax if save else None, None)
    return softmax, spoilt


def mend_backward(
    grad_out: torch.Tensor, out: torch.Tensor, softmax: torch.Tensor, spoilt: torch.Tensor, query: torch.Tensor,
    key: torch.Tensor, value: torch.Tensor, grad_query: torch.Tensor | None, grad_key: torch.Tensor | None,
    grad_value: torch.Tensor | None, *options: Any,
) -> tuple[()]:  # fmt: skip
    """Makes the gradients of query, key and value, contiguous, anew if `mend_forward` has found reason to."""
    left, right, bottom_right, _, scale, softcap = options
    call = _checked(
        "mend_backward", query, key, value, None, None, None, None, None, None, left, right, bottom_right, 0.0, scale,
        softcap,
    )  # fmt: skip
    with device_of(query):
        grads = [grad_query, grad_key, grad_value, None, None]
        _fill(dataclasses.replace(call, needed=spoilt), grads, grad_out, None, out, softmax)
    return ()


def _fill(
    call: Call, grads: list[torch.Tensor | None], grad_out: torch.Tensor, grad_lse: torch.Tensor | None,
    out: torch.Tensor, softmax: torch.Tensor,
) -> None:  # fmt: skip
    """Fills those of the five gradients that are there."""
    query, key, value, columns = call.query, call.key, call.value, call.columns
    grad_query, grad_key, grad_value, grad_bias, grad_slopes = grads
    grad_out = laid_out(grad_out, call.packed)
    delta = query.new_empty(call.lse_shape, dtype=torch.float32)
    lse_strides = (0, 0, 0) if grad_lse is None else (0, 0, *grad_lse.stride())[-3:]
    options = call.options()
    tensors = (
        query, key, value, grad_out, softmax, delta, call.mask, call.bias, call.slopes, call.query_lengths,
        call.key_lengths, call.seed, call.needed,
    )  # fmt: skip
    strides = (*call.strides(), *grad_out.stride()[:3], *call.pairs())
    sizes = (call.sequences, key.shape[1], *call.limits(), call.factor, *call.numbers())
    slope_sums = None if grad_slopes is None else torch.empty_like(delta)
    elements, value_elements = widths(call)
    if grad_query is not None or slope_sums is not None:
        tiles = backward_tiles(call, "query")
        query_kernel[(call.programs(call.time * call.group, tiles["ROWS"]),)](
            *tensors, grad_lse, out, grad_query, slope_sums, *strides, *sizes, *lse_strides, ELEMENTS=elements,
            **options, **call.grouped(), **tiles,
        )  # fmt: skip
    else:
        wide = power(columns, 1, 1024)
        rows = power(4096 // wide, 1, 64)
        delta_kernel[(-(-call.time // rows) * (delta.numel() // call.time),)](
            grad_out, grad_lse, out, softmax, delta, call.needed, *grad_out.stride()[:3], *lse_strides,
            call.heads, call.time, delta.numel(), VALUE_WIDTH=columns, PACKED=call.packed, WIDE=wide, QUERIES=rows,
            num_warps=power(rows * wide // 256, 1, 4),  # each element of one thread: others would write the same sums
        )  # fmt: skip
    tiles = backward_tiles(call, "key")
    # Both at once have too many sums for the registers where they are wide.
    both = [(grad_key, grad_value)] if max(call.width, columns) <= 128 else [(grad_key, None), (None, grad_value)]
    for into_key, into_value in both:
        if into_key is None and into_value is None:
            continue
        key_value_kernel[(call.programs(call.source, tiles["KEYS"]),)](
            *tensors, into_key, into_value, *strides, *sizes, ELEMENTS=elements,
            VALUE_ELEMENTS=value_elements, **options, **call.grouped(), **tiles,
        )  # fmt: skip
    if grad_slopes is not None:
        assert slope_sums is not None
        if call.packed:
            sums = query.new_empty((call.sequences, call.heads), dtype=torch.float32)
            sequence_sum_kernel[(sums.numel(),)](
                slope_sums, call.query_lengths, sums, call.heads, call.time, BLOCK=1024, num_warps=4
            )
        else:
            sums = slope_sums.sum(2)
        grad_slopes.copy_(sums if grad_slopes.dim() == 2 else sums.sum(0))
    if grad_bias is not None:
        assert call.bias is not None
        if call.bias.shape[3] == 1:
            grad_bias.copy_(_lse_gradient(call.bias, grad_lse, delta, softmax))
        else:
            _bias_gradient(call, call.bias, grad_bias, tensors, strides, sizes, options)


def _lse_gradient(
    bias: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor, softmax: torch.Tensor
) -> torch.Tensor:
    """The gradient of a bias that is the same for all keys, and so moves nothing but lse."""
    moved = delta * 0 if grad_lse is None else delta * 0 + grad_lse
    moved = torch.where(softmax[1] == 0, 0, moved)
    over = [d for d in range(3) if bias.shape[d] == 1]
    return (moved.sum(over, keepdim=True) if over else moved)[..., None]


def _bias_gradient(
    call: Call, bias: torch.Tensor, result: torch.Tensor, tensors: tuple[Any, ...], strides: tuple[Any, ...],
    sizes: tuple[Any, ...], options: dict[str, Any],
) -> None:  # fmt: skip
    batch, heads, time, _ = call.query.shape
    own_batches, own_heads, own_time, source = bias.shape
    tiles = backward_tiles(call, "bias")
    own_rows = own_time > 1 or time == 1
    row_tiles = -(-time // tiles["ROWS"])
    programs = -(-source // tiles["KEYS"]) * (row_tiles if own_rows else 1) * own_batches * own_heads
    shared = batch // own_batches * (heads // own_heads) * (1 if own_rows else row_tiles)
    splits = _splits(programs, shared)
    sums = result if splits == 1 else bias.new_empty((splits, *bias.shape), dtype=torch.float32)
    bias_kernel[(programs * splits,)](
        *tensors, sums, *strides, batch, heads, *sizes[2:], own_batches, own_heads, splits,
        GROUP=call.group, MASK=kind_of(call.mask, 1), BIAS=kind_of(bias, 1), OWN_ROWS=own_rows, **options,
        **{name: size for name, size in tiles.items() if name != "EDGE"},
    )  # fmt: skip
    if splits > 1:
        reduce(sums, result)


def _checked(
    operator: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, query_lengths: torch.Tensor | None, key_lengths: torch.Tensor | None,
    slopes: torch.Tensor | None, seed: torch.Tensor | None, left: int | None, right: int | None, bottom_right: bool,
    dropout_p: float, scale: float | None, softcap: float | None, packed: bool = False,
) -> Call:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    fits = query.dim() == key.dim() == value.dim() == (3 if packed else 4)
    width = columns = sequences = 0
    if fits and packed:
        assert query_lengths is not None and key_lengths is not None
        (time, heads, width), (source, kv_heads, _), columns = query.shape, key.shape, value.shape[2]
        batch, fits = 1, key.shape == (source, kv_heads, width) and value.shape[:2] == key.shape[:2]
        fits = fits and query_lengths.dim() == 1 and query_lengths.shape == key_lengths.shape != (0,)
        fits = fits and query_lengths.dtype == key_lengths.dtype == torch.int64
        sequences = query_lengths.numel() - 1
        fits = fits and (sequences > 0 or time == source == 0)
    elif fits:
        (batch, heads, time, width), (_, kv_heads, source, _), columns = query.shape, key.shape, value.shape[3]
        sequences, fits = batch, key.shape == (batch, kv_heads, source, width) and value.shape[:3] == key.shape[:3]
        fits = fits and all(lengths is None or lengths.shape == (batch,) for lengths in (query_lengths, key_lengths))
    if fits:
        shape = (batch, heads, time, source)
        fits = min(width, columns) >= 1 and max(width, columns) <= 1024
        fits = fits and (heads % kv_heads == 0 if kv_heads else heads == 0)
        fits = fits and query.dtype == key.dtype == value.dtype and query.dtype in TRITON_DTYPES
        fits = fits and max(time * (heads // max(kv_heads, 1)), source) < TRITON_POSITIONS
        for pairs in (mask, bias):
            fits = fits and (
                pairs is None
                or (pairs.dim() == 4 and all(a in (1, b) for a, b in zip(pairs.shape, shape, strict=True)))
            )
        fits = fits and (mask is None or mask.dtype == torch.bool) and (bias is None or bias.dtype in TRITON_DTYPES)
        fits = fits and all(
            lengths is None or lengths.dtype in (torch.int32, torch.int64) for lengths in (query_lengths, key_lengths)
        )
        fits = fits and (
            slopes is None or (slopes.shape in ((heads,), (sequences, heads)) and slopes.dtype == query.dtype)
        )
        fits = fits and (softcap is None or softcap > 0) and min(left or 0, right or 0) >= 0
        fits = fits and 0 <= dropout_p <= 1 and (dropout_p == 0 or seed is not None)
        fits = fits and (seed is None or (seed.shape == (2,) and seed.dtype == torch.int64))
    if not fits:
        given = f"query {tuple(query.shape)} {query.dtype}, key {tuple(key.shape)}, value {tuple(value.shape)}"
        raise RuntimeError(f"{operator}: the arguments don't fit together: {given}")
    return Call(
        laid_out(query, packed), laid_out(key, packed), laid_out(value, packed), width, value.shape[-1],
        None if mask is None else mask.view(torch.uint8), bias, slopes,
        None if query_lengths is None else query_lengths.contiguous(),
        None if key_lengths is None else key_lengths.contiguous(),
        seed.contiguous() if seed is not None and dropout_p > 0 else None, left, right, bottom_right, dropout_p,
        1 / math.sqrt(width) if scale is None else scale, softcap, packed,
    )  # fmt: skip
