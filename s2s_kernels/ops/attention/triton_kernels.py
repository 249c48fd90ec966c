"""Launchers of the Triton kernels of attention, under the schemas of csrc/operators.cpp.

Imported by the first call on a CUDA tensor. The tiles have not been measured on a GPU yet.
"""

import dataclasses
import math
from typing import Any

import torch

from ..triton_common import dense, device_of, dropout_numbers, power, precision, reduce
from . import TRITON_POSITIONS
from . import triton_scores as scores
from .triton_backward import bias_kernel, delta_kernel, drop_kernel, key_value_kernel, query_kernel
from .triton_forward import combine_kernel, forward_kernel

# Programs among which a sum over keys, or over what shares a bias, is split. A constant: the bits must not depend on
# the GPU.
PROGRAMS = 128
LOG2E = math.log2(math.e)


def _kind(tensor: torch.Tensor | None, group: int) -> int:
    """What a mask or bias varies over, and how the kernels read it."""
    if tensor is None:
        return 0
    batch, head, row, column = _pair_strides(tensor)
    kind = scores.GIVEN.value
    if row or (head and group > 1):
        kind |= scores.ROWS.value
    if column:
        kind |= scores.COLUMNS.value
    if column == 1:
        kind |= scores.UNIT.value
        if not any(size % 16 for size in (batch, head, row, tensor.shape[3])):
            kind |= scores.VECTORS.value
    return kind


def _pair_strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(stride if size != 1 else 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What the kernels of both directions are told alike."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    bias: torch.Tensor | None
    slopes: torch.Tensor | None
    query_lengths: torch.Tensor | None
    key_lengths: torch.Tensor | None
    seed: torch.Tensor | None
    left: int | None
    right: int | None
    bottom_right: bool
    dropout_p: float
    factor: float
    softcap: float | None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def time(self) -> int:
        return self.query.shape[2]

    @property
    def source(self) -> int:
        return self.key.shape[2]

    @property
    def group(self) -> int:
        return self.heads // self.key.shape[1] if self.key.shape[1] else 1

    @property
    def folded(self) -> bool:
        """Whether the scale, and a factor that makes exp of exp2, are applied within the exponent: in 16 bits, where
        nothing is added to scores, and their order is that of the products."""
        plain = self.bias is None and self.slopes is None and self.softcap is None
        return plain and self.query.dtype != torch.float32 and self.factor > 0

    @property
    def hides(self) -> bool:
        return self.mask is not None or self.bias is not None

    @property
    def busy(self) -> bool:
        """Whether more than products and what hides takes registers."""
        return self.softcap is not None or self.slopes is not None or self.seed is not None

    def pairs(self) -> tuple[Any, ...]:
        slopes = (0, 0) if self.slopes is None else self.slopes.stride()
        return (*_pair_strides(self.mask), *_pair_strides(self.bias), *((0, 0, *slopes)[-2:]))

    def limits(self) -> tuple[Any, ...]:
        """Sizes, the window, and what else is no constant of a compilation."""
        far = self.time + self.source
        sides = (far if side is None else min(side, far) for side in (self.left, self.right))
        return (self.time, self.source, *sides)

    def numbers(self) -> tuple[Any, ...]:
        softcap = self.softcap if self.softcap is not None else 0.0
        return self.factor * LOG2E if self.folded else self.factor, softcap, *dropout_numbers(self.dropout_p)

    def options(self, *others: torch.Tensor) -> dict[str, Any]:
        """Constants of a compilation."""
        tensors = (self.query, self.key, self.value, *others)
        dense_all, vector = all(t.stride(3) == 1 or t.shape[3] == 1 for t in tensors), 16 // self.query.element_size()
        aligned = dense_all and all(t.stride(d) % vector == 0 for t in tensors for d in range(3))
        return {
            "WIDTH": self.query.shape[3], "VALUE_WIDTH": self.value.shape[3], "LEFT": self.left is not None,
            "RIGHT": self.right is not None, "BOTTOM_RIGHT": self.bottom_right, "SOFTCAP": self.softcap is not None,
            "DENSE": dense_all, "VECTOR": vector if aligned else 1,
            "PRECISION": precision(),
        }  # fmt: skip

    def grouped(self) -> dict[str, Any]:
        group = self.group
        return {
            "GROUP": group, "MASK": _kind(self.mask, group), "BIAS": _kind(self.bias, group), "FOLDED": self.folded,
        }  # fmt: skip


def generation(x: torch.Tensor) -> int:
    """The major compute capability: from 9 on a program has twice the shared memory."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 8


def _tiles(rows: int, keys: int, edge: int, chunk: int, warps: int, stages: int) -> dict[str, int]:
    return {"ROWS": rows, "KEYS": keys, "EDGE": edge, "CHUNK": chunk, "num_warps": warps, "num_stages": stages}


# Sizes with which the compiler doesn't spill, on any of the architectures.
def _forward_tiles(call: _Call, wide_out: bool) -> dict[str, int]:
    width, columns = power(call.query.shape[3], 16, 1024), power(call.value.shape[3], 16, 1024)
    most, major = max(width, columns), generation(call.query)
    if call.query.dtype == torch.float32 or wide_out:
        tiles = _tiles(64, 32, 16, 32, 8, 2) if most <= 128 else _tiles(max(16, 8192 // most), 32, 16, 32, 8, 2)
    elif most > 256:
        tiles = _tiles(32 if most <= 512 else 16, 32, 16, 64, 8, 2)
    elif most > 128:
        tiles = _tiles(128, 64, 16, 256, 8, 2) if major == 9 and not call.busy else _tiles(64, 32, 16, 256, 8, 2)
    elif call.hides:
        edge = 64 if most <= 64 else 32
        tiles = _tiles(128, 32, 16, 128, 8, 2) if call.busy else _tiles(64, edge, edge, 128, 8, 2)
    elif call.busy:
        tiles = _tiles(128, 64, 32, 128, 8, 2) if major >= 9 else _tiles(128, 32, 16, 128, 8, 2)
    else:
        tiles = _tiles(128, 128, 32, 128, 8, 2) if major >= 9 or most <= 64 else _tiles(128, 32, 16, 128, 8, 2)
    rows = call.time * call.group  # a few, as in decoding, or some: not a compilation for each number of queries
    if rows <= 16 and most <= 256:
        keys = 32 if tiles["CHUNK"] == 32 else 128 if most <= 128 else 64
        tiles = _tiles(16, keys, 32, tiles["CHUNK"], 4, 2)
    elif rows <= 16:
        tiles |= {"ROWS": 16}
    elif rows <= 64 and tiles["ROWS"] > 64:
        tiles |= {"ROWS": 64}
    return {**tiles, "CHUNK": min(width, tiles["CHUNK"]), "COLUMNS": columns}


def _backward_tiles(call: _Call, direction: str) -> dict[str, int]:
    width, columns = power(call.query.shape[3], 16, 1024), power(call.value.shape[3], 16, 1024)
    most, major = max(width, columns), generation(call.query)
    if call.query.dtype == torch.float32:
        rows = 32 if most <= 64 or direction == "bias" else 16
        tiles = _tiles(rows, 32 if direction == "key" and most <= 256 else rows, 16, 32, 8, 2)
    elif direction == "bias":
        tiles = _tiles(64, 64 if major >= 9 else 32, 16, 64, 8, 2)
    elif most > 128:
        rows = 16 if most > 512 else 32 if most > 256 or major < 9 else 64
        tiles = _tiles(rows, rows, 16, 64, 8, 2)
    elif direction == "query":
        if call.busy:
            tiles = _tiles(64 if major == 9 else 32, 32, 16, 128, 8, 2)
        else:
            tiles = _tiles(128 if major >= 9 else 64, 64, 16, 128, 8, 2)
    elif call.busy:
        tiles = _tiles(32, 64, 16, 128, 8, 2)
    else:
        tiles = _tiles(64 if most <= 64 else 32, 128 if most <= 64 or major >= 9 else 64, 16, 128, 8, 2)
    return {**tiles, "CHUNK": min(width, tiles["CHUNK"]), "VALUE_CHUNK": min(columns, tiles["CHUNK"])}


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
    results = (out, lse, softmax if save else None, wide_out if save_wide else None)
    if not lse.numel():
        return out, lse, softmax, wide_out
    tiles = _forward_tiles(call, save_wide)
    programs = -(-time * call.group // tiles["ROWS"]) * batch * key.shape[1]
    splits = _splits(programs, -(-call.source // (2 * tiles["KEYS"])))
    parts = None
    if splits > 1:
        parts = query.new_empty((splits, lse.numel(), columns + 2), dtype=torch.float32)
    with device_of(query):
        forward_kernel[(programs * splits,)](
            query, key, value, call.mask, bias, alibi_slopes, call.query_lengths, call.key_lengths, call.seed, *results,
            parts, *query.stride(), *key.stride(), *value.stride(), *call.pairs(),
            batch, key.shape[1], *call.limits(), *call.numbers(), splits, **call.options(), **call.grouped(), **tiles,
        )  # fmt: skip
        if parts is not None:
            wide = tiles["COLUMNS"]
            rows = power(1024 // wide, 1, 16)
            combine_kernel[(-(-lse.numel() // rows),)](
                parts, *results, splits, lse.numel(), VALUE_WIDTH=columns, COLUMNS=wide, ROWS=rows,
                FOLDED=call.folded, num_warps=4,
            )  # fmt: skip
    return out, lse, softmax, wide_out


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
    batch, heads, time, _ = query.shape
    fits = grad_out.shape == out.shape == (batch, heads, time, value.shape[3]) and grad_out.dtype == query.dtype
    fits = fits and softmax.shape == (2, batch, heads, time) and softmax.dtype == torch.float32
    fits = fits and (grad_lse is None or grad_lse.shape == (batch, heads, time))
    if not (fits and (bias is not None or not need_bias) and (alibi_slopes is not None or not need_slopes)):
        raise RuntimeError(f"{name}: the arguments don't fit together: query {tuple(query.shape)}")
    grads: list[torch.Tensor | None] = [None] * 5
    pairs = ((query, need_query), (key, need_key), (value, need_value), (bias, need_bias), (alibi_slopes, need_slopes))
    if not (softmax.numel() and key.numel() and value.numel()):
        grads = [x.new_zeros(x.shape) if x is not None and need else None for x, need in pairs]
    else:
        with device_of(query):
            grads = _backward(call, grad_out, grad_lse, out.contiguous(), softmax.contiguous(), *(n for _, n in pairs))
    return tuple(
        query.new_empty((0,), dtype=query.dtype if x is None else x.dtype) if grad is None else grad
        for (x, _), grad in zip(pairs, grads, strict=True)
    )


def _backward(
    call: _Call, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, out: torch.Tensor, softmax: torch.Tensor,
    need_query: bool, need_key: bool, need_value: bool, need_bias: bool, need_slopes: bool,
) -> list[torch.Tensor | None]:  # fmt: skip
    query, key, value = call.query, call.key, call.value
    batch, heads, time, width = query.shape
    kv_heads, columns = key.shape[1], value.shape[3]
    rows = batch * heads * time
    delta = query.new_empty((batch, heads, time), dtype=torch.float32)
    wide = power(columns, 1, 1024)
    lines = power(2048 // wide, 1, 64)
    delta_kernel[(-(-rows // lines),)](
        grad_out, grad_lse, out, softmax, delta, *grad_out.stride(),
        *((0, 0, 0) if grad_lse is None else grad_lse.stride()), heads, time, rows,
        VALUE_WIDTH=columns, DENSE=dense(grad_out), WIDE=wide, QUERIES=lines, num_warps=4,
    )  # fmt: skip
    tensors = (
        query, key, value, grad_out, softmax, delta, call.mask, call.bias, call.slopes, call.query_lengths,
        call.key_lengths, call.seed,
    )  # fmt: skip
    strides = (*query.stride(), *key.stride(), *value.stride(), *grad_out.stride(), *call.pairs())
    sizes = (batch, kv_heads, *call.limits(), call.factor, *call.numbers())
    options = call.options(grad_out)
    grad_query = query.new_empty(query.shape) if need_query else None
    slope_sums = torch.empty_like(delta) if need_slopes else None
    if grad_query is not None or slope_sums is not None:
        tiles = _backward_tiles(call, "query")
        programs = -(-time * call.group // tiles["ROWS"]) * batch * kv_heads
        query_kernel[(programs,)](
            *tensors, grad_query, slope_sums, *strides, *sizes, ELEMENTS=power(width, 16, 1024),
            **options, **call.grouped(), **tiles,
        )  # fmt: skip
    grad_key = key.new_empty(key.shape) if need_key else None
    grad_value = value.new_empty(value.shape) if need_value else None
    tiles = _backward_tiles(call, "key")
    programs = -(-call.source // tiles["KEYS"]) * batch * kv_heads
    # Both at once have too many sums for the registers where they are wide.
    both = [(grad_key, grad_value)] if max(width, columns) <= 128 else [(grad_key, None), (None, grad_value)]
    for into_key, into_value in both:
        if into_key is None and into_value is None:
            continue
        key_value_kernel[(programs,)](
            *tensors, into_key, into_value, *strides, *sizes, ELEMENTS=power(width, 16, 1024),
            VALUE_ELEMENTS=power(columns, 16, 1024), **options, **call.grouped(), **tiles,
        )  # fmt: skip
    if grad_value is not None:
        count = batch * kv_heads * call.source
        drop_kernel[(-(-count // lines),)](
            value, grad_value, *value.stride(), kv_heads, call.source, count,
            VALUE_WIDTH=columns, DENSE=dense(value), WIDE=wide, LINES=lines, num_warps=4,
        )  # fmt: skip
    grad_slopes = None
    if slope_sums is not None:
        assert call.slopes is not None
        sums = slope_sums.sum(2)
        grad_slopes = (sums if call.slopes.dim() == 2 else sums.sum(0)).to(call.slopes.dtype)
    grad_bias = None
    if need_bias:
        assert call.bias is not None
        if call.bias.shape[3] == 1:
            grad_bias = _lse_gradient(call.bias, grad_lse, delta, softmax)
        else:
            grad_bias = _bias_gradient(call, call.bias, tensors, strides, sizes, options)
    return [grad_query, grad_key, grad_value, grad_bias, grad_slopes]


def _lse_gradient(
    bias: torch.Tensor, grad_lse: torch.Tensor | None, delta: torch.Tensor, softmax: torch.Tensor
) -> torch.Tensor:
    """The gradient of a bias that is the same for all keys, and so moves nothing but lse."""
    moved = delta * 0 if grad_lse is None else delta * 0 + grad_lse
    moved = torch.where(softmax[1] == 0, 0, moved)
    over = [d for d in range(3) if bias.shape[d] == 1]
    return (moved.sum(over, keepdim=True) if over else moved)[..., None].to(bias.dtype)


def _bias_gradient(
    call: _Call, bias: torch.Tensor, tensors: tuple[Any, ...], strides: tuple[Any, ...], sizes: tuple[Any, ...],
    options: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    batch, heads, time, _ = call.query.shape
    own_batches, own_heads, own_time, source = bias.shape
    tiles = _backward_tiles(call, "bias")
    own_rows = own_time > 1 or time == 1
    row_tiles = -(-time // tiles["ROWS"])
    programs = -(-source // tiles["KEYS"]) * (row_tiles if own_rows else 1) * own_batches * own_heads
    shared = batch // own_batches * (heads // own_heads) * (1 if own_rows else row_tiles)
    splits = _splits(programs, shared)
    result = bias.new_empty(bias.shape)
    dtype = torch.promote_types(bias.dtype, torch.float32)
    sums = result if splits == 1 else bias.new_empty((splits, *bias.shape), dtype=dtype)
    bias_kernel[(programs * splits,)](
        *tensors, sums, *strides, batch, heads, *sizes[2:], own_batches, own_heads, splits,
        GROUP=call.group, MASK=_kind(call.mask, 1), BIAS=_kind(bias, 1), OWN_ROWS=own_rows, **options,
        **{name: size for name, size in tiles.items() if name != "EDGE"},
    )  # fmt: skip
    return result if splits == 1 else reduce(sums, result)


def _checked(
    operator: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    bias: torch.Tensor | None, query_lengths: torch.Tensor | None, key_lengths: torch.Tensor | None,
    slopes: torch.Tensor | None, seed: torch.Tensor | None, left: int | None, right: int | None, bottom_right: bool,
    dropout_p: float, scale: float | None, softcap: float | None,
) -> _Call:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    fits = query.dim() == key.dim() == value.dim() == 4
    if fits:
        (batch, heads, time, width), (_, kv_heads, source, _) = query.shape, key.shape
        shape = (batch, heads, time, source)
        fits = key.shape == (batch, kv_heads, source, width) and value.shape[:3] == key.shape[:3]
        fits = fits and min(width, value.shape[3]) >= 1 and max(width, value.shape[3]) <= 1024
        fits = fits and (heads % kv_heads == 0 if kv_heads else heads == 0)
        fits = fits and query.dtype == key.dtype == value.dtype != torch.float64
        fits = fits and max(time * heads, source) < TRITON_POSITIONS
        for pairs in (mask, bias):
            fits = fits and (
                pairs is None
                or (pairs.dim() == 4 and all(a in (1, b) for a, b in zip(pairs.shape, shape, strict=True)))
            )
        fits = fits and (mask is None or mask.dtype == torch.bool)
        for lengths in (query_lengths, key_lengths):
            fits = fits and (lengths is None or lengths.shape == (batch,))
        fits = fits and (slopes is None or slopes.shape in ((heads,), (batch, heads)))
        fits = fits and (softcap is None or softcap > 0) and min(left or 0, right or 0) >= 0
        fits = fits and 0 <= dropout_p <= 1 and (dropout_p == 0 or (seed is not None and seed.shape == (2,)))
    if not fits:
        raise RuntimeError(
            f"{operator}: the arguments don't fit together: query {tuple(query.shape)} {query.dtype}, "
            f"key {tuple(key.shape)}, value {tuple(value.shape)}"
        )
    return _Call(
        query, key, value, None if mask is None else mask.view(torch.uint8), bias, slopes,
        None if query_lengths is None else query_lengths.contiguous(),
        None if key_lengths is None else key_lengths.contiguous(),
        seed.contiguous() if seed is not None and dropout_p > 0 else None, left, right, bottom_right, dropout_p,
        1 / math.sqrt(query.shape[3]) if scale is None else scale, softcap,
    )  # fmt: skip
