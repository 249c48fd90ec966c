"""Samples of additive attention and of attention pooling."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.additive_attention import additive_attention, attention_pool, prepare_additive_keys
from .rule import Call, Draw, ErrorSample, OperatorCase, Sample, call


def attention_sample(
    name: str,
    batch: int = 2,
    rows: int = 3,
    keys: int = 4,
    width: int = 3,
    values: int = 2,
    *,
    scale: float = 1.0,
    mask: Sequence[int] | None = None,
    empty_row: bool = False,
    lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    poison: bool = False,
    smooth: bool = True,
    **options: Any,
) -> Sample:
    """A call of additive_attention; `mask` is the shape of a boolean mask, `poison` puts NaN and Inf where lengths or
    the mask's first column hide the keys."""

    def build(draw: Draw) -> Call:
        query, key = draw(batch, rows, width, scale=scale), draw(batch, keys, width, scale=scale)
        # Scores stay near 1 whatever the width: the softmax of large ones multiplies any rounding.
        value, weight = draw(batch, keys, values), draw(width, scale=max(width, 1) ** -0.5)
        arguments = dict(options)
        if mask is not None:
            visible = draw.mask(*mask, p=0.6)
            visible[..., 1] = True
            if empty_row:
                visible[..., :1, :] = False
            if poison:
                visible[..., 0] = False
                key[:, 0], value[:, 0] = float("nan"), float("inf")
            arguments["mask"] = visible
        if lengths is not None:
            arguments["key_lengths"] = draw.tensor(lengths, lengths_dtype)
            for b, length in enumerate(lengths if poison else ()):
                key[b, length:], value[b, length:] = float("inf"), float("nan")
        return call(query, key, value, weight, **arguments)

    return Sample(name, build, smooth and not poison)


def attention_errors(prepared: bool) -> tuple[ErrorSample, ...]:
    def refused(name: str, error: type[Exception], argument: str, change: Callable[[Draw], dict[str, Any]]) -> Any:
        def build(draw: Draw) -> Call:
            values = {"query": draw(2, 3, 4), "key": draw(2, 5, 4), "value": draw(2, 5, 6), "weight": draw(4)}
            return call(**{**values, **change(draw)})

        return ErrorSample(name, build, error, argument)

    shared = (
        refused("rank of key", ValueError, "key", lambda draw: {"key": draw(5, 4)}),
        refused("width of key", ValueError, "key", lambda draw: {"key": draw(2, 5, 3)}),
        refused("key no tensor", TypeError, "key", lambda draw: {"key": 3.0}),
        refused("dtype of key", TypeError, "key", lambda draw: {"key": draw(2, 5, 4).to(torch.int32)}),
        refused("rank of value", ValueError, "value", lambda draw: {"value": draw(2, 5)}),
        refused("keys of value", ValueError, "value", lambda draw: {"value": draw(2, 4, 6)}),
        refused("dtype of value", TypeError, "value", lambda draw: {"value": draw(2, 5, 6).to(torch.int32)}),
        refused("no value", TypeError, "value", lambda draw: {"value": None}),
        refused("weight", ValueError, "weight", lambda draw: {"weight": draw(3)}),
        refused("rank of query", ValueError, "query", lambda draw: {"query": draw(3, 4)}),
        refused("batch", ValueError, "key", lambda draw: {"query": draw(3, 3, 4)}),
        refused("dtype of query", TypeError, "query", lambda draw: {"query": draw(2, 3, 4).long()}),
        refused("lengths above S", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([6, 1])}),
        refused("lengths below 0", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([-1, 1])}),
        refused("size of lengths", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([1])}),
        refused("floating lengths", TypeError, "key_lengths", lambda draw: {"key_lengths": draw(2)}),
        refused("shape of mask", ValueError, "mask", lambda draw: {"mask": draw.mask(4, 5)}),
        refused("rank of mask", ValueError, "mask", lambda draw: {"mask": draw.mask(1, 2, 3, 5)}),
        refused("floating mask", TypeError, "mask", lambda draw: {"mask": draw(3, 5)}),
        refused("dropout", ValueError, "dropout_p", lambda draw: {"dropout_p": 1.5}),
    )
    if prepared:
        return shared
    return (
        *shared,
        refused(
            "value beside prepared keys", ValueError, "value",
            lambda draw: {"key": prepare_additive_keys(draw(2, 5, 4), draw(2, 5, 6))},
        ),
        refused(
            "lengths beside prepared keys", ValueError, "key_lengths",
            lambda draw: {
                "key": prepare_additive_keys(draw(2, 5, 4), draw(2, 5, 6)),
                "value": None,
                "key_lengths": draw.tensor([1, 2]),
            },
        ),
    )  # fmt: skip


def attention_by_length(draw: Draw, time: int) -> Call:
    return call(
        draw(2, 3, 7),  # no size of its own equals a length of the tests: torch.compile takes equal sizes for one
        draw(2, time, 7),
        draw(2, time, 4),
        draw(7),
        mask=draw.mask(3, 1),
        key_lengths=draw.tensor([time, 2]),
        return_weights=True,
    )


def with_prepared_keys(query: Any, key: Any, value: Any, weight: Any, **options: Any) -> Any:
    """additive_attention by way of prepared keys."""
    keys = prepare_additive_keys(key, value, options.pop("key_lengths", None))
    return additive_attention(query, keys, None, weight, **options)


def pool_sample(
    name: str,
    batch: int = 2,
    time: int = 4,
    width: int = 3,
    units: int = 2,
    *,
    scale: float = 1.0,
    lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    poison: bool = False,
    smooth: bool = True,
    **options: Any,
) -> Sample:
    """A call of attention_pool; `poison` puts NaN where lengths make positions absent."""

    def build(draw: Draw) -> Call:
        x, arguments = draw(batch, time, width, scale=scale), dict(options)
        if lengths is not None:
            arguments["lengths"] = draw.tensor(lengths, lengths_dtype)
            for b, length in enumerate(lengths if poison else ()):
                x[b, length:] = float("nan")
        weight, contexts = draw(units, width, scale=max(width, 1) ** -0.5), draw(units, scale=max(units, 1) ** -0.5)
        return call(x, weight, draw(units), contexts, **arguments)

    return Sample(name, build, smooth and not poison)


def pool_errors() -> tuple[ErrorSample, ...]:
    def refused(name: str, error: type[Exception], argument: str, change: Callable[[Draw], dict[str, Any]]) -> Any:
        def build(draw: Draw) -> Call:
            values = {"x": draw(2, 5, 3), "weight": draw(4, 3), "bias": draw(4), "context": draw(4)}
            return call(**{**values, **change(draw)})

        return ErrorSample(name, build, error, argument)

    return (
        refused("rank of x", ValueError, "x", lambda draw: {"x": draw(5, 3)}),
        refused("x no tensor", TypeError, "x", lambda draw: {"x": [1.0]}),
        refused("dtype of x", TypeError, "x", lambda draw: {"x": draw(2, 5, 3).long()}),
        refused("rank of weight", ValueError, "weight", lambda draw: {"weight": draw(4)}),
        refused("width of weight", ValueError, "weight", lambda draw: {"weight": draw(4, 2)}),
        refused("dtype of weight", TypeError, "weight", lambda draw: {"weight": draw(4, 3).to(torch.int32)}),
        refused("bias", ValueError, "bias", lambda draw: {"bias": draw(3)}),
        refused("context", ValueError, "context", lambda draw: {"context": draw(1, 4)}),
        refused("lengths above T", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([6, 1])}),
        refused("lengths below 0", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([-1, 1])}),
        refused("size of lengths", ValueError, "lengths", lambda draw: {"lengths": draw.tensor([1])}),
        refused("floating lengths", TypeError, "lengths", lambda draw: {"lengths": draw(2)}),
    )


def pool_by_length(draw: Draw, time: int) -> Call:
    lengths = draw.tensor([time, 2])
    return call(draw(2, time, 4), draw(3, 4), draw(3), draw(3), lengths=lengths, return_weights=True)


CASES = {
    "additive_attention": OperatorCase(
        additive_attention,
        (
            attention_sample("plain"),
            attention_sample("weights", return_weights=True),
            attention_sample("one row, one key, one unit", 1, 1, 1, 1, 1, return_weights=True),
            attention_sample("mask", mask=(2, 3, 4), return_weights=True),
            attention_sample("mask of a padded batch, lengths", mask=(2, 1, 4), lengths=(3, 4)),
            attention_sample("a row without keys", mask=(3, 4), empty_row=True, return_weights=True),
            attention_sample("lengths", 3, lengths=(2, 0, 4), lengths_dtype=torch.int32),
            attention_sample("dropout", rows=4, keys=5, dropout_p=0.4, return_weights=True),
            attention_sample("everything", 3, mask=(3, 4), lengths=(2, 0, 4), dropout_p=0.3, return_weights=True),
            attention_sample("no keys", keys=0, return_weights=True, smooth=False),
            attention_sample("no rows", rows=0, return_weights=True, smooth=False),
            attention_sample("empty batch", batch=0, return_weights=True, smooth=False),
            attention_sample("no width, no values", width=0, values=0, return_weights=True, smooth=False),
            attention_sample("all dropped", dropout_p=1.0, smooth=False),
            attention_sample("tails", 2, 4, 135, 7, 9, lengths=(40, 131), return_weights=True, smooth=False),
            attention_sample("tails, odd units", 1, 5, 129, 65, 1, mask=(5, 129), dropout_p=0.2, smooth=False),
            attention_sample("one query", 2, 1, 70, 33, 17, smooth=False),
            attention_sample("numbers of 5", 2, 6, 40, 64, 3, scale=5.0, return_weights=True, smooth=False),
            attention_sample("numbers of 50", 2, 6, 40, 64, 3, scale=50.0, return_weights=True, smooth=False),
            attention_sample("poisoned", 3, 5, 140, 6, 4, lengths=(3, 0, 129), return_weights=True, poison=True),
            attention_sample("poisoned under a mask", 2, 5, 140, 6, 4, mask=(5, 140), dropout_p=0.1, poison=True),
        ),
        attention_errors(prepared=False),
        attention_by_length,
    ),
    "prepared additive_attention": OperatorCase(
        with_prepared_keys,
        (
            attention_sample("plain", return_weights=True),
            attention_sample("one query", 3, 1, 150, 9, 4, lengths=(150, 0, 129), smooth=False),
            attention_sample("numbers of 50", 2, 4, 40, 64, 3, scale=50.0, smooth=False),
            attention_sample("poisoned", 3, 5, 140, 6, 4, mask=(5, 140), lengths=(3, 0, 129), poison=True),
        ),
        attention_errors(prepared=True),
        attention_by_length,
    ),
    "attention_pool": OperatorCase(
        attention_pool,
        (
            pool_sample("plain"),
            pool_sample("weights", return_weights=True),
            pool_sample("lengths", 3, lengths=(2, 0, 4), return_weights=True),
            pool_sample("int32 lengths", lengths=(4, 1), lengths_dtype=torch.int32),
            pool_sample("no positions", time=0, return_weights=True, smooth=False),
            pool_sample("empty batch", batch=0, return_weights=True, smooth=False),
            pool_sample("no width, no units", width=0, units=0, return_weights=True, smooth=False),
            pool_sample("tails", 3, 100, 35, 19, lengths=(100, 7, 20), return_weights=True, smooth=False),
            pool_sample("saturated", 2, 9, 7, 5, scale=1e4, smooth=False),
            pool_sample("poisoned", 3, 140, 6, 5, lengths=(3, 0, 129), return_weights=True, poison=True),
        ),
        pool_errors(),
        pool_by_length,
    ),
}
