"""Scaled dot-product attention with every restriction of the contract, and torch's own signature of it."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ... import checks, dispatch
from ..random import draw_seed
from . import arguments, autograd, builtin
from .packed import attention_packed

__all__ = ["attention", "attention_packed", "scaled_dot_product_attention"]


class Call(NamedTuple):
    """What the gap functions look at: the tensors and options as autograd.py orders them."""

    tensors: autograd.Tensors
    options: autograd.Options
    with_lse: bool


def _torch_gap(call: Call) -> str | None:
    """Why torch's own kernels don't serve a call: they'd break the contract, or hardly win."""
    tensors, (left, right, _, dropout_p, _, softcap) = call.tensors, call.options
    query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes = tensors
    assert query is not None and key is not None and value is not None
    if mask is not None or bias is not None or query_lengths is not None or key_lengths is not None:
        return "torch's kernel lets what is not finite in a hidden key reach the rows that don't see it"
    if query.is_cuda and (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        return "torch's kernel isn't traced: what mends its results is started from Python"
    if left is not None or (right is not None and not (query.is_cuda and right == 0)):
        return "torch's kernel has no windows and no bottom-right diagonal, and its causal mask skips only large blocks"
    if alibi_slopes is not None or softcap is not None:
        return "torch's kernel has no slopes and no softcap"
    if dropout_p > 0:
        return "torch's kernel draws another dropout mask than the other backends"
    if call.with_lse:
        return "torch's kernel has no differentiable lse"
    if query.is_cuda:
        mended = dispatch.gap(OPERATOR, "triton", query.device, call)
        if mended is not None:
            return f"what isn't finite makes other results of torch's kernel, and Triton's can't mend them: {mended}"
        return builtin.gap(query, key, value, right is not None)
    return (
        "torch's kernel has no second derivative; where it was measured it was at most 15 % faster forward and 6 % "
        "with backward, on long dense sequences, and nowhere on a processor with AVX-512"
    )


def _triton_gap(call: Call) -> str | None:
    query, key, bias = call.tensors[0], call.tensors[1], call.tensors[4]
    assert query is not None and key is not None
    return arguments.triton_gap(query, query.shape[2], query.shape[1], key.shape[2], key.shape[1], bias)


def _torch_deferral(call: Call) -> str | None:
    query, key = call.tensors[:2]
    assert query is not None and key is not None
    return builtin.deferral(query, key)


OPERATOR = dispatch.register(
    "attention", {"torch": _torch_deferral}, cpu=lambda call: None, triton=_triton_gap, torch=_torch_gap
)
# The same kernels under torch's signature, which passes its calls on.
dispatch.register("scaled_dot_product_attention", OPERATOR.deferrals, **OPERATOR.gaps)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    causal: bool | str = False,
    window: tuple[int | None, int | None] | None = None,
    query_lengths: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0,  # not 0.0, which torch.compile would trace as an input, in a second compilation
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
) -> Any:
    """Scaled dot-product attention (Vaswani et al. 2017); every restriction given holds at once.

    Args:
        query: (B, H, T, D), any strides; float64, float32, bfloat16 or float16; D from 1 to 1024.
        key: (B, Hkv, S, D).
        value: (B, Hkv, S, Dv), Dv from 1 to 1024.
        mask: boolean, broadcastable to (B, H, T, S), True = attend; a broadcast is never expanded.
        bias: of any floating dtype, broadcastable to (B, H, T, S), added to the scores; its gradient has its own
            shape. -inf hides a key, the least finite number does not.
        causal: True hides from query i the keys after i; "bottom-right" those after i + S - T (with lengths:
            key_length - query_length, a missing one counting as S or T).
        window: (left, right): query i at key i + o, o being 0 or that difference, sees the keys from i + o - left to
            i + o + right inclusive; None = unbounded.
        query_lengths, key_lengths: (B,) int32 or int64, on the CPU or beside query. What lies at or past them is
            absent: never read, and 0 in the result.
        dropout_p: the probability that a weight is dropped; applied whenever it is above 0.
        scale: of the scores, 1 / sqrt(D) if None.
        softcap: scores become softcap * tanh(score / softcap) before bias and restrictions (Gemma 2, 2024).
        alibi_slopes: (H,) or (B, H), in query's dtype: slope * |i + o - j| is subtracted (Press et al. 2022).
        enable_gqa: lets Hkv divide H (Ainslie et al. 2023); query head h reads key head h // (H / Hkv).
        return_lse: also return the logarithm of the softmax's denominator.

    Returns:
        out (B, H, T, Dv), contiguous, in query's dtype; (out, lse) if `return_lse`, lse (B, H, T) float32 (float64 for
        float64) and differentiable. A row that sees no key is 0, its lse -inf. A row that sees a key or value with
        anything not finite in it is NaN; one that doesn't see it is untouched by it, and so is its gradient.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: ``softmax((query @ key.mT) * scale + bias, -1) @ value``
    """
    name = "attention"
    given = (query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes)
    results = _as_given(given, causal, window, dropout_p, scale, softcap, enable_gqa)
    if results is not None:
        return results if return_lse else results[0]
    checks.tensor(name, "query", query)
    query, key, value, bias, alibi_slopes = checks.autocast(query, key, value, bias, alibi_slopes)  # type: ignore[assignment]
    checks.data(name, "query", query, 4, "(B, H, T, D)")
    batch, heads, time, _ = query.shape
    arguments.width(name, "query", query, "D")
    kv_heads, source = _key_and_value(name, query, key, value)
    if kv_heads != heads:
        arguments.groups(name, key, heads, kv_heads, enable_gqa)
    shape = (batch, heads, time, source)
    # What isn't given isn't asked about: a small call takes as long as its checks.
    if mask is not None:
        checks.boolean(name, "mask", mask, query, "query")
        mask = _four(name, "mask", mask, shape)
    if bias is not None:
        bias = _four(name, "bias", _floating(name, "bias", bias, query), shape)
    left, right, bottom_right = arguments.restrictions(name, causal, window)
    if query_lengths is not None:
        query_lengths = checks.lengths(name, "query_lengths", query_lengths, query, batch, time)
    if key_lengths is not None:
        key_lengths = checks.lengths(name, "key_lengths", key_lengths, query, batch, source, "S")
    arguments.numbers(name, dropout_p, scale, softcap)
    if alibi_slopes is not None:
        arguments.slopes(name, alibi_slopes, query, batch, heads)
    tensors = (query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes)
    out, lse = attend(tensors, (left, right, bottom_right, dropout_p, scale, softcap), return_lse)
    return (out, lse) if return_lse else out


def _as_given(
    tensors: tuple[Any, ...],
    causal: Any,
    window: Any,
    dropout_p: Any,
    scale: Any,
    softcap: Any,
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The results where there is nothing random and nothing to convert, and `dispatch.directly` has any; else None."""
    if (
        window is not None
        or (causal is not False and causal is not True and causal != "bottom-right")
        or (scale is not None and type(scale) is not float)
        or (softcap is not None and type(softcap) is not float)
        or type(dropout_p) not in (int, float)
        or dropout_p != 0
    ):
        return None
    query, key, _, mask, bias, query_lengths, key_lengths, _ = tensors
    try:
        as_it_is = (
            (enable_gqa or query.shape[1] == key.shape[1])
            and (mask is None or mask.dim() == 4)
            and (bias is None or bias.dim() == 4)
            and checks.are_read(query_lengths)
            and checks.are_read(key_lengths)
        )
        if query.is_cuda and builtin.may_serve(tensors, causal):
            return None
    except (AttributeError, IndexError, RuntimeError):  # the checks say what is wrong
        return None
    if not as_it_is:
        return None
    options = (None, 0 if causal else None, causal == "bottom-right", 0, scale, softcap)
    return dispatch.directly(autograd.kernel, (*tensors, None), options, triton=True)


def attend(tensors: autograd.Tensors, options: autograd.Options, with_lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses a backend for checked arguments, in the order of autograd.py less the seed, which is drawn here."""
    query = tensors[0]
    assert query is not None
    backend = dispatch.choose(OPERATOR, query.device, Call(tensors, options, with_lse))
    seed = draw_seed(query.device) if options[3] > 0 else None
    tensors = (*tensors, seed)
    if backend == "reference" or dispatch.transformed(*tensors):
        return autograd.reference_of(tensors, options)  # type: ignore[return-value]
    return (builtin if backend == "torch" else autograd).kernel(tensors, options)  # type: ignore[return-value]


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0,  # not 0.0, which torch.compile would trace as an input, in a second compilation
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, argument for argument.

    Args:
        query: (..., T, D), or (..., H, T, D) under `enable_gqa`.
        key: (..., S, D), or (..., Hkv, S, D).
        value: (..., S, Dv), or (..., Hkv, S, Dv); the leading dimensions of all three are broadcast.
        attn_mask: boolean, True = attend, or floating, added to the scores; broadcastable to (..., T, S); or a
            `torch.nn.attention.bias.CausalBias` of T and S. Beside is_causal both hold.
        dropout_p: applied whenever it is above 0.
        is_causal: query i sees the keys up to i.
        scale: 1 / sqrt(D) if None.
        enable_gqa: lets Hkv divide H.

    Returns:
        (..., T, Dv), contiguous. A row that sees no key is 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "scaled_dot_product_attention"
    for argument, value_of in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, argument, value_of)
        if value_of.dim() < (3 if enable_gqa else 2):
            layout = "(..., H, T, D)" if enable_gqa else "(..., T, D)"
            checks.wrong_value(name, argument, layout, tuple(value_of.shape))
    if not isinstance(is_causal, bool):
        checks.wrong_type(name, "is_causal", "True or False", repr(is_causal))
    causal: bool | str = is_causal
    if _is_causal_bias(attn_mask):
        causal = _diagonal(name, attn_mask, query.shape[-2], key.shape[-2], is_causal)
        attn_mask = None
    query, key, value, attn_mask = checks.autocast(query, key, value, attn_mask)  # type: ignore[assignment]
    inner = 3 if enable_gqa else 2
    leading = _broadcast_shapes(name, [x.shape[:-inner] for x in (query, key, value)])
    query, key, value = (
        x if x.shape[:-inner] == leading else x.expand(*leading, *x.shape[-inner:]) for x in (query, key, value)
    )
    heads = query.shape[-3] if query.dim() > 2 else 1
    whole = query.shape[:-2]
    mask = bias = None
    if attn_mask is not None:
        checks.tensor(name, "attn_mask", attn_mask)
        if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
            checks.wrong_type(name, "attn_mask", "a boolean or floating tensor", attn_mask.dtype)
        checks.broadcast(name, "attn_mask", attn_mask, (*whole, query.shape[-2], key.shape[-2]), "(..., T, S)")
        attn_mask = attn_mask[(None,) * (len(whole) + 2 - attn_mask.dim())]
        if len(whole) > 2 and any(size != 1 for size in attn_mask.shape[:-3]):
            attn_mask = attn_mask.expand(*whole[:-1], *attn_mask.shape[-3:])
        attn_mask = _ranked(attn_mask)
        if attn_mask.dtype == torch.bool:
            mask = attn_mask
        else:
            bias = attn_mask
    out = attention(
        _ranked(query),
        _ranked(key),
        _ranked(value),
        mask=mask,
        bias=bias,
        causal=causal,
        dropout_p=dropout_p,
        scale=scale,
        enable_gqa=enable_gqa and heads != key.shape[-3],
    )
    return out if len(whole) == 2 else out.reshape(*whole, query.shape[-2], value.shape[-1])


def _is_causal_bias(x: Any) -> bool:
    """Whether x is torch's name for a causal mask: a tensor whose elements nobody has set."""
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(x, module.CausalBias)


def _diagonal(name: str, causal_bias: Any, time: int, source: int, is_causal: bool) -> bool | str:
    """What `attention` calls a CausalBias, beside is_causal or not."""
    if (sizes := (causal_bias.seq_len_q, causal_bias.seq_len_kv)) != (time, source):
        checks.wrong_value(name, "attn_mask", f"a CausalBias of (T, S) = {(time, source)}", sizes)
    if causal_bias.variant.name == "UPPER_LEFT" or (is_causal and source >= time):
        return True
    return "bottom-right"


def _ranked(x: torch.Tensor) -> torch.Tensor:
    """x with four dimensions: missing ones put in front, further ones flattened into the first."""
    missing = 4 - x.dim()
    return x if not missing else x[(None,) * missing] if missing > 0 else x.flatten(0, -4)


def _broadcast_shapes(name: str, shapes: Sequence[torch.Size]) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError:
        checks.wrong_value(
            name, "key", "broadcastable with query and value in its leading dimensions", [tuple(s) for s in shapes]
        )


def _key_and_value(name: str, query: torch.Tensor, key: Any, value: Any) -> tuple[int, int]:
    """Checks key and value against query; returns the number of their heads and their length."""
    batch, _, _, width = query.shape
    for argument, given, layout in (("key", key, "(B, Hkv, S, D)"), ("value", value, "(B, Hkv, S, Dv)")):
        checks.tensor(name, argument, given)
        if given.dim() != 4:
            checks.wrong_value(name, argument, layout, tuple(given.shape))
    _, kv_heads, source, _ = key.shape
    checks.like(name, "key", key, query, "query", (batch, kv_heads, source, width), "(B, Hkv, S, D)")
    columns = value.shape[3]
    checks.like(name, "value", value, query, "query", (batch, kv_heads, source, columns), "(B, Hkv, S, Dv)")
    if columns != width:
        arguments.width(name, "value", value, "Dv")
    return kv_heads, source


def _four(name: str, argument: str, value: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A mask or bias with four dimensions, of size 1 where it is broadcast."""
    if value is None:
        return None
    checks.broadcast(name, argument, value, shape, "(B, H, T, S)")
    return value if value.dim() == 4 else value[(None,) * (4 - value.dim())]


def _floating(name: str, argument: str, value: Any, query: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    checks.tensor(name, argument, value)
    if _is_causal_bias(value):
        checks.wrong_type(name, argument, "a tensor with elements (there is `causal`)", type(value).__name__)
    if value.dtype not in checks.DTYPES:
        checks.wrong_type(name, argument, "float64, float32, bfloat16 or float16", value.dtype)
    checks.beside(name, argument, value, query, "query")
    return value
