"""Samples of attention and of torch's own signature of it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..ops.attention import attention, attention_packed, scaled_dot_product_attention
from .rule import Call, Draw, ErrorSample, OperatorCase, Sample, call


def attention_sample(
    name: str,
    batch: int = 2,
    heads: int = 2,
    time: int = 3,
    source: int = 4,
    width: int = 3,
    value_width: int | None = None,
    *,
    kv_heads: int | None = None,
    mask: Sequence[int] | None = None,
    bias: Sequence[int] | None = None,
    bias_dtype: torch.dtype | None = None,
    bias_hides: float | None = None,
    slopes: Sequence[int] | None = None,
    query_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    lengths_dtype: torch.dtype = torch.int64,
    poison: bool = False,
    whole_numbers: float | None = None,
    value_scale: float = 0.5,
    smooth: bool = True,
    **options: Any,
) -> Sample:
    """A call of attention.

    Args:
        mask, bias, slopes: their shapes. About a third of a mask's elements hide.
        bias_hides: what about a third of a bias's elements are set to.
        whole_numbers: queries and keys are whole numbers of about this size, so that their scores, however large, have
            no rounding error.
        poison: puts NaN and Inf where lengths make queries, keys and values absent, and into every key and value that
            the mask hides from all queries.
    """

    def build(draw: Draw) -> Call:
        groups = kv_heads or heads
        query = draw(batch, heads, time, width, scale=whole_numbers or 0.5)
        key = draw(batch, groups, source, width, scale=whole_numbers or 0.5)
        value = draw(batch, groups, source, value_width or width, scale=value_scale)
        if whole_numbers:
            query, key = query.round(), key.round()
        values = dict(options)
        if groups != heads:
            values["enable_gqa"] = True
        if mask is not None:
            values["mask"] = draw.mask(*mask, p=0.65)
        if bias is not None:
            values["bias"] = draw(*bias, dtype=bias_dtype)
            if bias_hides is not None:
                values["bias"][draw.mask(*bias, p=0.35)] = bias_hides
        if slopes is not None:
            values["alibi_slopes"] = draw(*slopes).abs()
        for argument, lengths, tensors in (
            ("query_lengths", query_lengths, (query,)),
            ("key_lengths", key_lengths, (key, value)),
        ):
            if lengths is not None:
                values[argument] = draw.tensor(lengths, lengths_dtype)
                for row, length in enumerate(lengths if poison else ()):
                    for index, tensor in enumerate(tensors):
                        tensor[row, :, length:] = float("inf" if index else "nan")
        if poison and mask is not None:
            hidden = ~values["mask"].expand(batch, heads, time, source).any(2)
            hidden = hidden.view(batch, groups, heads // groups, source).all(2)
            key[hidden] = float("inf")
            value[hidden] = float("nan")
        return call(query, key, value, **values)

    return Sample(name, build, smooth and not poison)


def attention_errors() -> tuple[ErrorSample, ...]:
    def refused(name: str, error: type[Exception], argument: str, change: Callable[..., Any]) -> ErrorSample:
        def build(draw: Draw) -> Call:
            values = {"query": draw(2, 4, 3, 5), "key": draw(2, 4, 6, 5), "value": draw(2, 4, 6, 5)}
            values.update(change(draw))
            return call(**values)

        return ErrorSample(name, build, error, argument)

    return (
        refused("query no tensor", TypeError, "query", lambda draw: {"query": [1.0]}),
        refused("rank of query", ValueError, "query", lambda draw: {"query": draw(4, 3, 5)}),
        refused("dtype of query", TypeError, "query", lambda draw: {"query": draw(2, 4, 3, 5).long()}),
        refused("no width", ValueError, "query", lambda draw: {"query": draw(2, 4, 3, 0), "key": draw(2, 4, 6, 0)}),
        refused("width of query", ValueError, "query", lambda draw: {"query": draw(2, 4, 3, 1025)}),
        refused("rank of key", ValueError, "key", lambda draw: {"key": draw(4, 6, 5)}),
        refused("dtype of key", TypeError, "key", lambda draw: {"key": draw(2, 4, 6, 5, dtype=torch.int32)}),
        refused("batch of key", ValueError, "key", lambda draw: {"key": draw(3, 4, 6, 5)}),
        refused("width of key", ValueError, "key", lambda draw: {"key": draw(2, 4, 6, 4)}),
        refused("key on another device", ValueError, "key", lambda draw: {"key": draw(2, 4, 6, 5).to("meta")}),
        refused("length of value", ValueError, "value", lambda draw: {"value": draw(2, 4, 7, 5)}),
        refused("rank of value", ValueError, "value", lambda draw: {"value": draw(4, 6, 5)}),
        refused(
            "heads without enable_gqa", ValueError, "key",
            lambda draw: {"key": draw(2, 2, 6, 5), "value": draw(2, 2, 6, 5)},
        ),
        refused(
            "heads that don't divide", ValueError, "key",
            lambda draw: {"key": draw(2, 3, 6, 5), "value": draw(2, 3, 6, 5), "enable_gqa": True},
        ),
        refused("floating mask", TypeError, "mask", lambda draw: {"mask": draw(3, 6)}),
        refused("shape of mask", ValueError, "mask", lambda draw: {"mask": draw.mask(2, 6)}),
        refused("rank of mask", ValueError, "mask", lambda draw: {"mask": draw.mask(1, 2, 4, 3, 6)}),
        refused("boolean bias", TypeError, "bias", lambda draw: {"bias": draw.mask(3, 6)}),
        refused("shape of bias", ValueError, "bias", lambda draw: {"bias": draw(3, 5)}),
        refused("causal", ValueError, "causal", lambda draw: {"causal": "top"}),
        refused("window no pair", TypeError, "window", lambda draw: {"window": 3}),
        refused("window of floats", TypeError, "window", lambda draw: {"window": (1.0, None)}),
        refused("window below 0", ValueError, "window", lambda draw: {"window": (-1, 0)}),
        refused("window past 64 bits", ValueError, "window", lambda draw: {"window": (2**70, 0)}),
        refused("window of a bool", TypeError, "window", lambda draw: {"window": (0, True)}),
        refused("lengths above S", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([7, 1])}),
        refused("lengths above T", ValueError, "query_lengths", lambda draw: {"query_lengths": draw.tensor([4, 1])}),
        refused("lengths below 0", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([-1, 1])}),
        refused("size of lengths", ValueError, "key_lengths", lambda draw: {"key_lengths": draw.tensor([1])}),
        refused("floating lengths", TypeError, "query_lengths", lambda draw: {"query_lengths": draw(2)}),
        refused("dropout above 1", ValueError, "dropout_p", lambda draw: {"dropout_p": 1.5}),
        refused("dropout no number", TypeError, "dropout_p", lambda draw: {"dropout_p": None}),
        refused("scale no number", TypeError, "scale", lambda draw: {"scale": "auto"}),
        refused("softcap 0", ValueError, "softcap", lambda draw: {"softcap": 0.0}),
        refused("shape of slopes", ValueError, "alibi_slopes", lambda draw: {"alibi_slopes": draw(3)}),
        refused("dtype of slopes", TypeError, "alibi_slopes", lambda draw: {"alibi_slopes": draw(4).long()}),
    )  # fmt: skip


def packed_sample(
    name: str,
    times: Sequence[int] = (3, 1, 2),
    sources: Sequence[int] = (4, 2, 3),
    heads: int = 2,
    width: int = 3,
    value_width: int | None = None,
    *,
    kv_heads: int | None = None,
    slopes: Sequence[int] | None = None,
    starts_dtype: torch.dtype = torch.int64,
    smooth: bool = True,
    **options: Any,
) -> Sample:
    """A call of attention_packed; `times` and `sources` are the sequences' lengths, `slopes` a shape."""

    def build(draw: Draw) -> Call:
        groups = kv_heads or heads
        query = draw(sum(times), heads, width, scale=0.5)
        key, value = draw(sum(sources), groups, width, scale=0.5), draw(sum(sources), groups, value_width or width)
        values = dict(options)
        if groups != heads:
            values["enable_gqa"] = True
        if slopes is not None:
            values["alibi_slopes"] = draw(*slopes).abs()
        starts = [[sum(lengths[:b]) for b in range(len(lengths) + 1)] for lengths in (times, sources)]
        return call(query, key, value, *(draw.tensor(x, starts_dtype) for x in starts), **values)

    return Sample(name, build, smooth)


def packed_errors() -> tuple[ErrorSample, ...]:
    def refused(name: str, error: type[Exception], argument: str, change: Callable[..., Any]) -> ErrorSample:
        def build(draw: Draw) -> Call:
            values = {"query": draw(5, 4, 3), "key": draw(6, 4, 3), "value": draw(6, 4, 3)}
            values.update(cu_seqlens_q=draw.tensor([0, 2, 5]), cu_seqlens_k=draw.tensor([0, 6, 6]))
            values.update(change(draw))
            return call(**values)

        return ErrorSample(name, build, error, argument)

    return (
        refused("query no tensor", TypeError, "query", lambda draw: {"query": [1.0]}),
        refused("rank of query", ValueError, "query", lambda draw: {"query": draw(1, 5, 4, 3)}),
        refused("width of query", ValueError, "query", lambda draw: {"query": draw(5, 4, 1025)}),
        refused("rank of key", ValueError, "key", lambda draw: {"key": draw(6, 3)}),
        refused("dtype of key", TypeError, "key", lambda draw: {"key": draw(6, 4, 3, dtype=torch.int32)}),
        refused("length of value", ValueError, "value", lambda draw: {"value": draw(7, 4, 3)}),
        refused("no width of value", ValueError, "value", lambda draw: {"value": draw(6, 4, 0)}),
        refused("heads", ValueError, "key", lambda draw: {"key": draw(6, 2, 3), "value": draw(6, 2, 3)}),
        refused("no starts", TypeError, "cu_seqlens_q", lambda draw: {"cu_seqlens_q": None}),
        refused("rank of starts", ValueError, "cu_seqlens_q", lambda draw: {"cu_seqlens_q": draw.tensor([[0, 5]])}),
        refused("empty starts", ValueError, "cu_seqlens_q", lambda draw: {"cu_seqlens_q": draw.tensor([])}),
        refused("floating starts", TypeError, "cu_seqlens_k", lambda draw: {"cu_seqlens_k": draw(3)}),
        refused("another batch", ValueError, "cu_seqlens_k", lambda draw: {"cu_seqlens_k": draw.tensor([0, 6])}),
        refused("not from 0", ValueError, "cu_seqlens_q", lambda draw: {"cu_seqlens_q": draw.tensor([1, 2, 5])}),
        refused("descending", ValueError, "cu_seqlens_k", lambda draw: {"cu_seqlens_k": draw.tensor([0, 7, 6])}),
        refused("not to the end", ValueError, "cu_seqlens_k", lambda draw: {"cu_seqlens_k": draw.tensor([0, 2, 5])}),
        refused("causal", ValueError, "causal", lambda draw: {"causal": "top"}),
        refused("window below 0", ValueError, "window", lambda draw: {"window": (-1, 0)}),
        refused("dropout above 1", ValueError, "dropout_p", lambda draw: {"dropout_p": 1.5}),
        refused("softcap 0", ValueError, "softcap", lambda draw: {"softcap": 0.0}),
        refused("shape of slopes", ValueError, "alibi_slopes", lambda draw: {"alibi_slopes": draw(3)}),
    )  # fmt: skip


def packed_by_length(draw: Draw, time: int) -> Call:
    return call(
        draw(time + 2, 4, 9), draw(time + 3, 2, 9), draw(time + 3, 2, 6), draw.tensor([0, 2, time + 2]),
        draw.tensor([0, 3, time + 3]), causal="bottom-right", window=(4, None), alibi_slopes=draw(4).abs(),
        enable_gqa=True, return_lse=True,
    )  # fmt: skip


def sdpa_errors() -> tuple[ErrorSample, ...]:
    def refused(name: str, error: type[Exception], argument: str, change: Callable[..., Any]) -> ErrorSample:
        def build(draw: Draw) -> Call:
            values = {"query": draw(2, 4, 3, 5), "key": draw(2, 4, 6, 5), "value": draw(2, 4, 6, 5)}
            values.update(change(draw))
            return call(**values)

        return ErrorSample(name, build, error, argument)

    return (
        refused("rank of query", ValueError, "query", lambda draw: {"query": draw(5)}),
        refused("no heads", ValueError, "key", lambda draw: {"key": draw(6, 5), "enable_gqa": True}),
        refused("leading dimensions", ValueError, "key", lambda draw: {"key": draw(3, 4, 6, 5)}),
        refused("integral mask", TypeError, "attn_mask", lambda draw: {"attn_mask": draw(3, 6).long()}),
        refused("wider mask", ValueError, "attn_mask", lambda draw: {"attn_mask": draw.mask(7, 2, 4, 3, 6)}),
        refused("dropout below 0", ValueError, "dropout_p", lambda draw: {"dropout_p": -0.5}),
        refused("dropout no number", TypeError, "dropout_p", lambda draw: {"dropout_p": "a"}),
        refused("is_causal no bool", TypeError, "is_causal", lambda draw: {"is_causal": "bottom-right"}),
    )


def attention_by_length(draw: Draw, time: int) -> Call:
    query, key, value = draw(2, 4, time, 7), draw(2, 2, time + 3, 7), draw(2, 2, time + 3, 6)
    return call(
        query, key, value, bias=draw(1, 4, time, time + 3), causal="bottom-right", window=(4, None),
        key_lengths=draw.tensor([time, 2]), alibi_slopes=draw(4).abs(), enable_gqa=True, return_lse=True,
    )  # fmt: skip


def sdpa_sample(name: str, *shapes: Sequence[int], mask: Sequence[int] | None = None, **options: Any) -> Sample:
    """A call under torch's signature; `mask` is the shape of a boolean one."""

    def build(draw: Draw) -> Call:
        tensors = [draw(*shape, scale=0.5) for shape in shapes]
        return call(*tensors, **options) if mask is None else call(*tensors, draw.mask(*mask, p=0.65), **options)

    return Sample(name, build)


def sdpa_by_length(draw: Draw, time: int) -> Call:
    return call(draw(2, 4, time, 8), draw(2, 1, time, 8), draw(4, time, 8), draw(4, 1, time), is_causal=True)


CASES = {
    "attention": OperatorCase(
        attention,
        (
            attention_sample("plain"),
            attention_sample("widths", width=5, value_width=2, return_lse=True),
            attention_sample("one query", time=1, source=5, kv_heads=1),
            attention_sample("no queries", time=0, return_lse=True, smooth=False),
            attention_sample("no keys", source=0, return_lse=True, smooth=False),
            attention_sample("empty batch", batch=0, slopes=(2,), return_lse=True, smooth=False),
            attention_sample("grouped heads", heads=4, kv_heads=2),
            attention_sample("mask of keys", mask=(2, 1, 1, 4)),
            attention_sample("mask of pairs", mask=(3, 4), return_lse=True),
            attention_sample("mask and causal", mask=(2, 3, 4), causal=True),
            attention_sample("bias", bias=(2, 2, 3, 4)),
            attention_sample("bias over the batch", bias=(1, 2, 3, 4), return_lse=True),
            attention_sample("bias over heads", bias=(2, 1, 3, 4), heads=4, kv_heads=2),
            attention_sample("bias of keys", bias=(2, 1, 1, 4)),
            attention_sample("bias of queries", bias=(2, 3, 1)),
            attention_sample("bias that hides", bias=(3, 4), bias_hides=float("-inf"), smooth=False, return_lse=True),
            attention_sample("bias of the least number", bias=(1, 1, 3, 4), bias_hides=torch.finfo(torch.float16).min),
            attention_sample("bias of float64", bias=(2, 4, 1, 4), heads=4, bias_dtype=torch.float64),
            attention_sample("bias of bfloat16", bias=(2, 1, 4), bias_dtype=torch.bfloat16, smooth=False),
            attention_sample("causal", time=4, source=4, causal=True),
            attention_sample("causal, more queries", time=5, source=3, causal="bottom-right"),
            attention_sample(
                "lse of empty rows", 3, time=5, source=3, causal="bottom-right", key_lengths=(3, 0, 2), smooth=False,
                return_lse=True,
            ),
            attention_sample("causal, more keys", time=3, source=5, causal="bottom-right"),
            attention_sample("window", time=5, source=5, window=(1, 2)),
            attention_sample("window, causal", time=4, source=5, window=(1, None), causal=True),
            attention_sample("key lengths", 3, key_lengths=(4, 0, 1)),
            attention_sample("query lengths", query_lengths=(3, 1), lengths_dtype=torch.int32),
            attention_sample(
                "both lengths, bottom right", 3, time=4, query_lengths=(4, 3, 2), key_lengths=(2, 4, 0),
                causal="bottom-right", window=(2, None),
            ),
            attention_sample("slopes", slopes=(2,), causal="bottom-right"),
            attention_sample("slopes by batch", slopes=(2, 2), key_lengths=(3, 4), query_lengths=(3, 2)),
            attention_sample("softcap, scale", softcap=1.5, scale=0.7),
            attention_sample("dropout", dropout_p=0.4, return_lse=True),
            attention_sample("dropout of all", dropout_p=1.0, return_lse=True),
            attention_sample(
                "everything", 3, 4, 4, 5, 3, 2, kv_heads=2, mask=(3, 1, 4, 5), bias=(4, 1, 5), causal="bottom-right",
                window=(3, 1), query_lengths=(4, 2, 0), key_lengths=(5, 3, 1), dropout_p=0.3, scale=0.9, softcap=2.0,
                slopes=(3, 4),
            ),
            attention_sample(
                "poisoned", 3, time=70, source=90, width=9, query_lengths=(70, 1, 33), key_lengths=(1, 90, 65),
                poison=True, return_lse=True,
            ),
            attention_sample(
                "poisoned, masked", 2, 4, 17, 70, kv_heads=2, mask=(2, 1, 1, 70), causal="bottom-right", poison=True
            ),
            attention_sample("poisoned, one query", 2, 4, 1, 70, kv_heads=2, key_lengths=(3, 67), poison=True),
            attention_sample(
                "large scores", time=20, source=70, width=16, whole_numbers=8.0, value_scale=0.02, smooth=False
            ),
            attention_sample("tails", 1, 3, 65, 129, 65, 7, smooth=False, return_lse=True),
            attention_sample("tails, causal", 1, 2, 70, 131, 33, causal=True, dropout_p=0.1, smooth=False),
            attention_sample("tails, window", 1, 2, 150, 190, 16, window=(40, 3), causal="bottom-right", smooth=False),
            attention_sample(
                "tails, everything", 2, 4, 67, 140, 20, 36, kv_heads=2, mask=(67, 140), bias=(4, 67, 140),
                slopes=(4,), softcap=5.0, key_lengths=(140, 77), value_scale=0.02, smooth=False,
                return_lse=True,
            ),
            attention_sample("single width", 1, 1, 7, 66, 1, 1, smooth=False),
            attention_sample("several blocks", 1, 2, 200, 260, 24, causal="bottom-right", smooth=False),
            attention_sample("one query, many keys", 1, 8, 1, 600, 32, kv_heads=2, smooth=False, return_lse=True),
        ),
        attention_errors(),
        attention_by_length,
    ),
    "attention_packed": OperatorCase(
        attention_packed,
        (
            packed_sample("plain"),
            packed_sample("lse", value_width=2, return_lse=True),
            packed_sample("no sequences", (), (), slopes=(2,), return_lse=True, smooth=False),
            packed_sample("empty sequences", (0, 3, 0, 2, 0), (2, 0, 0, 3, 1), return_lse=True, smooth=False),
            packed_sample("queries of at most one", (1, 0, 1, 0), (3, 4, 0, 2), return_lse=True, smooth=False),
            packed_sample("one query each", (1, 1), (70, 5), 4, kv_heads=2, dropout_p=0.3, smooth=False),
            packed_sample("causal", causal=True, starts_dtype=torch.int32),
            packed_sample("causal, bottom right", (4, 2), (3, 5), causal="bottom-right", return_lse=True, smooth=False),
            packed_sample("window", (5, 3), (5, 4), window=(1, 1)),
            packed_sample("slopes by sequence", slopes=(3, 2), causal="bottom-right"),
            packed_sample("dropout", dropout_p=0.4, return_lse=True),
            packed_sample(
                "everything", (4, 2, 1), (5, 3, 2), 4, 3, 2, kv_heads=2, causal="bottom-right", window=(3, 1),
                dropout_p=0.3, scale=0.9, softcap=2.0, slopes=(4,), return_lse=True,
            ),
            packed_sample("tails", (65, 1, 33), (129, 3, 70), 3, 33, 7, causal="bottom-right", smooth=False),
            packed_sample("several blocks", (70, 150), (260, 131), 2, 16, kv_heads=1, dropout_p=0.1, smooth=False),
        ),
        packed_errors(),
        packed_by_length,
    ),
    "scaled_dot_product_attention": OperatorCase(
        scaled_dot_product_attention,
        (
            sdpa_sample("plain", (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 3)),
            sdpa_sample("two dimensions", (3, 4), (5, 4), (5, 4), mask=(3, 5)),
            sdpa_sample("three dimensions", (2, 3, 4), (1, 5, 4), (5, 4), (3, 5), is_causal=True),
            sdpa_sample(
                "five dimensions", (2, 1, 2, 3, 4), (3, 1, 5, 4), (2, 3, 2, 5, 4), mask=(3, 1, 1, 5), is_causal=True
            ),
            sdpa_sample(
                "grouped heads", (2, 4, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4), scale=0.3, is_causal=True, enable_gqa=True
            ),
            sdpa_sample("dropout", (2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4), dropout_p=0.5),
        ),
        sdpa_errors(),
        sdpa_by_length,
    ),
}  # fmt: skip
