"""Launchers of the Triton kernels of additive attention, under the schemas of csrc/operators.cpp.

Imported by the first call on a CUDA tensor. A call runs some queries at a time, as many as keep the scores within
`PAIRS`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...dispatch import TRITON_DTYPES
from ..triton_common import dense, device_of, dropout_numbers, precision, reduce, strides_of
from .triton_scores import gradient_kernel, scores_kernel
from .triton_softmax import (
    context_kernel,
    product_kernel,
    score_gradient_kernel,
    statistics_kernel,
    value_gradient_kernel,
)

PAIRS = 2**20  # scores in a workspace, unless LEAST queries have more
# Programs among which gradients are split, and the shares of a key's gradient. Constants: the bits must not depend on
# the GPU.
PROGRAMS, SHARES = 1024, 32
UNITS = 32  # of a program, a lane each
LEAST = 16  # queries of a part, unless there are fewer


def hardware_tanh(dtype: torch.dtype) -> bool:
    """Whether the 11 bits of the hardware's tanh suffice: three more than bfloat16 has, none more than float16."""
    return dtype == torch.bfloat16


def _score_tiles(rows: int) -> dict[str, int]:
    # One query is a kernel of its own, for decoding; more are one whatever their number.
    return {"ROWS": 1, "KEYS": 16, "num_warps": 1} if rows == 1 else {"ROWS": 8, "KEYS": 8, "num_warps": 1}


def _gradient_tiles(dtype: torch.dtype) -> dict[str, int]:
    # Many rows, since the sums of keys are in memory; half as many where tanh takes registers of its own. Told the
    # registers, the compiler doesn't spill, on any of the architectures.
    if hardware_tanh(dtype):
        return {"ROWS": 16, "KEYS": 4, "num_warps": 1, "maxnreg": 192}
    return {"ROWS": 8, "KEYS": 4, "num_warps": 1, "maxnreg": 255}


def aligned_rows(tensor: torch.Tensor) -> bool:
    """Whether every line along the last dimension begins where a vector may be loaded."""
    return dense(tensor) and not any(stride % 8 for stride in tensor.stride()[:-1]) and tensor.data_ptr() % 16 == 0


def _context_tiles(dtype: torch.dtype, rows: int) -> dict[str, int]:
    columns, warps = (32, 8) if dtype == torch.float32 else (64, 4)
    return {"ROWS": 16 if rows == 1 else 32, "KEYS": 32, "COLUMNS": columns, "num_warps": warps}


def _value_tiles(dtype: torch.dtype) -> dict[str, int]:
    return _context_tiles(dtype, LEAST)  # the sum is over rows, of which a product needs 32, whatever their number


def _product_tiles(dtype: torch.dtype, rows: int) -> dict[str, int]:
    if dtype == torch.float32:
        return {"ROWS": 16 if rows == 1 else 32, "KEYS": 32, "COLUMNS": 32, "num_warps": 4}
    return {"ROWS": 16 if rows == 1 else 32, "KEYS": 32, "COLUMNS": 128, "num_warps": 4}


def _row_tiles(rows: int) -> dict[str, int]:
    return {"ROWS": 1 if rows == 1 else 4, "KEYS": 128, "num_warps": 4}


class Part(NamedTuple):
    """Some queries of some rows of the batch, of a call whose arguments are these; every tensor is a view of them."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    lengths: torch.Tensor | None
    batch: slice
    rows: slice
    queries: int  # T
    whole: bool  # all there is: a view of it would only take time

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's share of a (B, T, ...) tensor."""
        return tensor if self.whole else tensor[self.batch, self.rows]

    def of_batch(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same of a tensor that has no queries."""
        return tensor if self.whole else tensor[self.batch]

    def sizes(self) -> tuple[int, int]:
        """The number of queries and of keys at hand."""
        return self.query.shape[1], self.key.shape[1]

    def first_row(self) -> int:
        """Of all B T rows."""
        return self.batch.start * self.queries + self.rows.start

    def programs(self, tile: dict[str, int], over: str) -> int:
        """Tiles of rows ("r"), keys ("k") or pairs ("rk")."""
        rows, keys = self.sizes()
        count = self.query.shape[0]
        count *= -(-rows // tile["ROWS"]) if "r" in over else 1
        return count * (-(-keys // tile["KEYS"]) if "k" in over else 1)


def _parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> Iterator[Part]:  # fmt: skip
    """The call in pieces of at most PAIRS scores, those of one row of the batch in the order of the queries."""
    (batch, queries, _), keys = query.shape, key.shape[1]
    several = max(1, PAIRS // max(1, queries * keys))
    rows = max(1, queries)
    if several == 1 and queries * keys > PAIRS:
        rows = max(LEAST, PAIRS // keys // LEAST * LEAST)
    if batch and queries and several >= batch and rows >= queries:
        yield Part(query, key, value, mask, lengths, slice(0, batch), slice(0, queries), queries, True)
        return
    for b in range(0, batch, several):
        chosen = slice(b, min(batch, b + several))
        for first in range(0, queries, rows):
            here = slice(first, min(queries, first + rows))
            yield Part(
                query[chosen, here], key[chosen], value[chosen], None if mask is None else mask[chosen, here],
                None if lengths is None else lengths[chosen], chosen, here, queries, False,
            )  # fmt: skip


def _scores(part: Part, weight: torch.Tensor, to: torch.Tensor) -> None:
    rows, keys = part.sizes()
    tiles = _score_tiles(part.queries)
    if programs := part.programs(tiles, "rk"):
        scores_kernel[(programs,)](
            part.query, part.key, weight, part.lengths, to, *part.query.stride(), *part.key.stride(), rows, keys,
            WIDTH=weight.shape[0], HARDWARE=hardware_tanh(part.query.dtype), QUERY_UNIT=dense(part.query),
            KEY_UNIT=dense(part.key), UNITS=UNITS, **tiles,
        )  # fmt: skip


def additive_attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None, seed: torch.Tensor | None, table: torch.Tensor | None,
    outliers: torch.Tensor | None, dropout_p: float, return_weights: bool, save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`table` and `outliers` are the cpu backend's: here a table would be more bytes to read than the keys."""
    _check("additive_attention_forward", query, key, value, weight, mask, key_lengths, seed)
    (batch, queries, _), keys, values = query.shape, key.shape[1], value.shape[2]
    context = query.new_empty(batch, queries, values)
    weights = query.new_empty((batch, queries, keys) if return_weights else (0,))
    statistics = query.new_empty((batch, queries, 2) if save else (0,), dtype=torch.float32)
    weight, dropout = weight.contiguous(), dropout_numbers(dropout_p)
    scores = query.new_empty(_workspace(queries, keys, batch), dtype=torch.float32)
    lines, products = _row_tiles(queries), _context_tiles(query.dtype, queries)
    with device_of(query):
        for part in _parts(query, key, value, mask, key_lengths):
            rows, _ = part.sizes()
            found = part.of(statistics) if save else None
            of_mask = strides_of(part.mask)
            _scores(part, weight, scores)
            if (return_weights or (save and not values)) and (programs := part.programs(lines, "r")):
                statistics_kernel[(programs,)](
                    scores, part.mask, part.lengths, found, part.of(weights) if return_weights else None,
                    *of_mask, rows, keys, **lines,
                )  # fmt: skip
            if programs := part.programs(products, "r") * -(-values // products["COLUMNS"]):
                context_kernel[(programs,)](
                    scores, found, part.value, part.mask, part.lengths, seed, part.of(context),
                    *part.value.stride(), *of_mask, rows, keys, part.first_row(), *dropout,
                    VALUES=values, VALUE_UNIT=dense(value), ALIGNED=aligned_rows(value), PRECISION=precision(),
                    **products,
                )  # fmt: skip
    return context, weights, statistics


def additive_attention_backward(
    grad_context: torch.Tensor | None, grad_weights: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor,
    value: torch.Tensor, weight: torch.Tensor, statistics: torch.Tensor, mask: torch.Tensor | None,
    key_lengths: torch.Tensor | None, seed: torch.Tensor | None, table: torch.Tensor | None,
    outliers: torch.Tensor | None, dropout_p: float, need_query: bool, need_key: bool, need_value: bool,
    need_weight: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _check("additive_attention_backward", query, key, value, weight, mask, key_lengths, seed)
    (batch, queries, width), keys, values = query.shape, key.shape[1], value.shape[2]
    for given, last in ((grad_context, values), (grad_weights, keys), (statistics, 2)):
        if given is not None and (given.shape != (batch, queries, last) or given.dtype not in TRITON_DTYPES):
            raise RuntimeError(
                f"additive_attention_backward: expected {(batch, queries, last)}, got {tuple(given.shape)} "
                f"{given.dtype}"
            )
    statistics = statistics.contiguous()
    need_scores = need_query or need_key or need_weight
    several = batch * queries * keys > PAIRS and queries * keys > PAIRS
    # In float32 where several parts add to it.
    to_value = torch.float32 if several else value.dtype
    grad_query = query.new_empty(query.shape if need_query else 0)
    grad_key = query.new_empty(key.shape if need_key else 0)
    grad_value = query.new_empty(value.shape if need_value else 0, dtype=to_value)
    grad_weight = query.new_empty(width if need_weight else 0)
    if not queries or grad_context is None:
        grad_value.zero_()
    if not queries or not batch:
        return grad_query, grad_key.zero_(), grad_value, grad_weight.zero_()
    weight, dropout = weight.contiguous(), dropout_numbers(dropout_p)
    pairs = _workspace(queries, keys, batch)
    # Behind the scores is what the gradient of the context says of them.
    scores = query.new_empty(pairs if grad_context is None else 2 * pairs, dtype=torch.float32)
    lines, tiles, columns = _row_tiles(queries), _product_tiles(query.dtype, queries), _value_tiles(query.dtype)
    sums, shares = scores, 1
    of_batches: list[torch.Tensor] = []
    with device_of(query):
        for part in _parts(query, key, value, mask, key_lengths):
            rows, _ = part.sizes()
            begun, found = int(part.rows.start > 0), part.of(statistics)
            of_mask, shared = strides_of(part.mask), (rows, keys, part.first_row(), *dropout)
            _scores(part, weight, scores)
            if grad_context is not None:
                grad = part.of(grad_context)
                of_grad, unit, straight = grad.stride(), dense(grad), aligned_rows(grad_context)
                if need_value and (programs := part.programs(columns, "k") * -(-values // columns["COLUMNS"])):
                    value_gradient_kernel[(programs,)](
                        scores, found, grad, part.mask, part.lengths, seed, part.of_batch(grad_value),
                        *of_grad, *of_mask, *shared, begun,
                        VALUES=values, GRAD_UNIT=unit, ALIGNED=straight, PRECISION=precision(), **columns,
                    )  # fmt: skip
                if need_scores and (programs := part.programs(tiles, "rk")):
                    product_kernel[(programs,)](
                        grad, part.value, part.lengths, scores, *of_grad, *part.value.stride(), rows, keys, pairs,
                        VALUES=values, GRAD_UNIT=unit, VALUE_UNIT=dense(value),
                        ALIGNED=straight and aligned_rows(value), PRECISION=precision(), **tiles,
                    )  # fmt: skip
            if not need_scores:
                continue
            given = None if grad_weights is None else part.of(grad_weights)
            if programs := part.programs(lines, "r"):
                score_gradient_kernel[(programs,)](
                    scores, found, None if grad_context is None else scores, given, part.mask, part.lengths, seed,
                    *of_mask, *strides_of(given), *shared, pairs, **lines,
                )  # fmt: skip
            if not begun:
                shares = _shares(part, width)
                sums = query.new_empty(part.query.shape[0] * shares * (keys + 1) * width, dtype=torch.float32)
            last = part.rows.stop == queries
            of_key = part.of_batch(grad_key) if need_key else None
            _gradients(
                part, weight, scores, part.of(grad_query) if need_query else None, of_key, sums, shares, begun,
                int(last and shares == 1),
            )  # fmt: skip
            if last:
                alone = part.query.shape[0] == batch and need_weight
                of_weight = grad_weight if alone else query.new_empty(width, dtype=torch.float32)
                # A share of the keys' that is the only one is there already.
                reduce(sums, of_weight, part.query.shape[0] * shares, of_key, shares if shares > 1 else 0)
                if not alone:
                    of_batches.append(of_weight)
        if need_weight and of_batches:
            reduce(torch.stack(of_batches), grad_weight, len(of_batches))
    return grad_query, grad_key, grad_value.to(value.dtype) if several else grad_value, grad_weight


def _shares(part: Part, width: int) -> int:
    """Among how many programs the queries of a row of the batch are split."""
    batch, rows, _ = part.query.shape
    return max(1, min(-(-rows // LEAST), SHARES, PROGRAMS // max(1, batch * -(-width // UNITS))))


def _gradients(
    part: Part, weight: torch.Tensor, grads: torch.Tensor, grad_query: torch.Tensor | None,
    grad_key: torch.Tensor | None, sums: torch.Tensor, shares: int, begun: int, ended: int,
) -> None:  # fmt: skip
    (batch, rows, width), keys = part.query.shape, part.key.shape[1]
    if width:
        gradient_kernel[(batch * shares * -(-width // UNITS),)](
            part.query, part.key, weight, grads, part.lengths, grad_query, grad_key, sums,
            *part.query.stride(), *part.key.stride(), batch, rows, keys, shares, begun, ended,
            WIDTH=width, HARDWARE=hardware_tanh(part.query.dtype), MASKED=part.mask is not None,
            QUERY_UNIT=dense(part.query), KEY_UNIT=dense(part.key), UNITS=UNITS, **_gradient_tiles(part.query.dtype),
        )  # fmt: skip


def _workspace(queries: int, keys: int, batch: int) -> int:
    return min(batch * queries * keys, max(PAIRS, LEAST * keys))


def _check(
    operator: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor,
    mask: torch.Tensor | None, lengths: torch.Tensor | None, seed: torch.Tensor | None,
) -> None:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    fits = query.dim() == key.dim() == value.dim() == 3 and query.dtype == key.dtype == value.dtype == weight.dtype
    fits = fits and query.dtype != torch.float64 and key.shape[0] == query.shape[0] == value.shape[0]
    fits = fits and query.shape[2:] == key.shape[2:] == weight.shape and key.shape[1] == value.shape[1]
    fits = fits and (mask is None or (mask.shape == (*query.shape[:2], key.shape[1]) and mask.dtype == torch.bool))
    fits = fits and (lengths is None or (lengths.shape == query.shape[:1] and lengths.is_contiguous()))
    fits = fits and (lengths is None or lengths.dtype in (torch.int32, torch.int64))
    fits = fits and (seed is None or (seed.shape == (2,) and seed.is_contiguous() and seed.dtype == torch.int64))
    if not fits:
        raise RuntimeError(
            f"{operator}: the arguments don't fit together: query {tuple(query.shape)} {query.dtype}, "
            f"key {tuple(key.shape)} {key.dtype}, value {tuple(value.shape)}, weight {tuple(weight.shape)}"
        )
