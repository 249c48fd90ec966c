"""Attention of sequences of different lengths that lie one after another, without padding."""

import functools
import itertools
from typing import Any, NamedTuple

import torch

from ... import checks, dispatch
from .. import python_kernels
from ..differentiation import Options, Tensors, differentiable
from ..random import draw_seed, keep_mask
from . import arguments, reference
from .autograd import gradients, saves_wide

# tensors: query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed.
# options: left, right, bottom_right, dropout_p, scale, softcap.


class Call(NamedTuple):
    """What a gap function looks at."""

    tensors: Tensors
    options: Options


def _triton_gap(call: Call) -> str | None:
    query, key = call.tensors[:2]
    assert query is not None and key is not None
    return arguments.triton_gap(query, *query.shape[:2], *key.shape[:2])


OPERATOR = dispatch.register("attention_packed", cpu=lambda call: None, triton=_triton_gap)


def attention_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    dropout_p: float = 0,  # not 0.0, which torch.compile would trace as an input, in a second compilation
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """`attention` of B sequences of different lengths, packed one after another (the layout of Dao 2023); no row sees
    another sequence.

    Args:
        query: (T of all, H, D), any strides; float64, float32, bfloat16 or float16; D from 1 to 1024.
        key: (S of all, Hkv, D).
        value: (S of all, Hkv, Dv), Dv from 1 to 1024.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32 or int64, on the CPU or beside query; sequence b is the rows from
            element b up to element b + 1. They begin at 0, never descend, and end at the number of rows.
        causal: True hides from query i of a sequence its keys after i; "bottom-right" those after i + S - T, S and T
            being the sequence's own.
        window: (left, right): query i at key i + o, o being 0 or that difference, sees the keys from i + o - left to
            i + o + right inclusive; None = unbounded.
        dropout_p: the probability that a weight is dropped; applied whenever it is above 0.
        scale: of the scores, 1 / sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap) before restrictions.
        alibi_slopes: (H,) or (B, H), in query's dtype: slope * |i + o - j| is subtracted.
        enable_gqa: lets Hkv divide H; query head h reads key head h // (H / Hkv).
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        out (T of all, H, Dv), contiguous, in query's dtype; (out, lse) if `return_lse`, lse (H, T of all) float32
        (float64 for float64) and differentiable. A row that sees no key is 0, its lse -inf.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: `attention` of each sequence by itself, and `torch.cat` of the results.
    """
    name = "attention_packed"
    checks.tensor(name, "query", query)
    query, key, value, alibi_slopes = checks.autocast(query, key, value, alibi_slopes)  # type: ignore[assignment]
    checks.data(name, "query", query, 3, "(T, H, D)")
    heads = query.shape[1]
    arguments.width(name, "query", query, "D")
    for argument, given, layout in (("key", key, "(S, Hkv, D)"), ("value", value, "(S, Hkv, Dv)")):
        checks.tensor(name, argument, given)
        if given.dim() != 3:
            checks.wrong_value(name, argument, layout, tuple(given.shape))
    source, kv_heads, _ = key.shape
    checks.like(name, "key", key, query, "query", (source, kv_heads, query.shape[2]), "(S, Hkv, D)")
    checks.like(name, "value", value, query, "query", (source, kv_heads, value.shape[2]), "(S, Hkv, Dv)")
    arguments.width(name, "value", value, "Dv")
    if kv_heads != heads:
        arguments.groups(name, key, heads, kv_heads, enable_gqa)
    batch = _batch(name, cu_seqlens_q)
    cu_seqlens_q = _starts(name, "cu_seqlens_q", cu_seqlens_q, query, batch, query.shape[0])
    cu_seqlens_k = _starts(name, "cu_seqlens_k", cu_seqlens_k, query, batch, source)
    left, right, bottom_right = arguments.restrictions(name, causal, window)
    arguments.numbers(name, dropout_p, scale, softcap)
    if alibi_slopes is not None:
        arguments.slopes(name, alibi_slopes, query, batch, heads)
    tensors: Tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
    options = (left, right, bottom_right, dropout_p, scale, softcap)
    backend = dispatch.choose(OPERATOR, query.device, Call(tensors, options))
    tensors = (*tensors, draw_seed(query.device) if dropout_p > 0 else None)
    use_reference = backend == "reference" or dispatch.transformed(*tensors)
    out, lse = (reference_of if use_reference else kernel)(tensors, options)
    return (out, lse) if return_lse else out


def _batch(name: str, starts: Any) -> int:
    checks.tensor(name, "cu_seqlens_q", starts)
    if starts.dim() != 1 or starts.shape[0] == 0:
        checks.wrong_value(name, "cu_seqlens_q", "(B + 1,)", tuple(starts.shape))
    return starts.shape[0] - 1


def _starts(name: str, argument: str, starts: Any, query: torch.Tensor, batch: int, rows: int) -> torch.Tensor:
    """Checks where sequences begin, in values where they can be read; int64 beside query."""
    checks.tensor(name, argument, starts)
    if starts.dtype not in (torch.int32, torch.int64):
        checks.wrong_type(name, argument, "an int32 or int64 tensor", starts.dtype)
    if tuple(starts.shape) != (batch + 1,):
        checks.wrong_value(name, argument, f"(B + 1,) = ({batch + 1},)", tuple(starts.shape))
    if starts.device.type != "cpu" and starts.device != query.device:
        checks.wrong_value(name, argument, f"on the CPU or on {query.device}", starts.device)
    if checks.readable(starts):
        values = starts.tolist()
        if values[0] != 0 or values[-1] != rows or any(a > b for a, b in itertools.pairwise(values)):
            checks.wrong_value(name, argument, f"ascending from 0 to the number of rows, {rows}", values)
    else:
        checks.assure(
            lambda: torch.cat([starts[:1] == 0, starts[-1:] == rows, starts.diff() >= 0]),
            f"{name}: {argument} must ascend from 0 to the number of rows",
        )
    return starts.to(device=query.device, dtype=torch.int64)


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::attention_packed_forward")
    def _(
        query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, left, right, bottom_right, dropout_p, scale,
        softcap, save,
    ):  # fmt: skip
        time, heads, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        return (
            query.new_empty(time, heads, value.shape[2]),
            query.new_empty((heads, time), dtype=wide),
            query.new_empty((2, heads, time) if save else (0,), dtype=wide),
            query.new_empty((time, heads, value.shape[2]) if saves_wide(query, save) else (0,), dtype=wide),
        )

    @torch.library.register_fake("s2s::attention_packed_backward")
    def _(
        grad_out, grad_lse, out, softmax, query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed, left,
        right, bottom_right, dropout_p, scale, softcap, need_query, need_key, need_value, need_slopes,
    ):  # fmt: skip
        pairs = ((query, need_query), (key, need_key), (value, need_value), (alibi_slopes, need_slopes))
        return tuple(x.new_empty(x.shape) if need else query.new_empty((0,)) for x, need in pairs)


python_kernels.register(f"{__package__}.triton_kernels", "attention_packed_forward", "attention_packed_backward")


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    run = python_kernels.function_of("attention_packed_forward", tensors[0], tensors, planned=True)
    out, lse, softmax, wide_out = run(*tensors, *options, save)
    return (out, lse), (out if wide_out.dim() == 1 else wide_out, softmax) if save else ()


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, seed = tensors
    left, right, bottom_right, dropout_p, scale, softcap = options
    assert query is not None and key is not None and value is not None
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    keep = None
    if seed is not None:
        keep = keep_mask(seed, (1, query.shape[1], query.shape[0], key.shape[0]), dropout_p)
    with checks.without_autocast(query):
        return reference.attention_packed(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            left=left,
            right=right,
            bottom_right=bottom_right,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            keep=keep,
            scale=scale,
            softcap=softcap,
        )


kernel = differentiable(
    "attention_packed",
    forward=_forward,
    backward=functools.partial(gradients, "attention_packed_backward", (0, 1, 2, 5)),
    reference=reference_of,
)
