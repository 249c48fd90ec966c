"""Fake kernels of attention, and the functions that differentiate it."""

import functools

import torch

from ... import checks, dispatch
from .. import python_kernels
from ..differentiation import Options, Tensors, differentiable
from ..random import keep_mask
from . import reference

# tensors: query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed; mask and bias have four
# dimensions, each of size 1 or that of (B, H, T, S).
# options: left, right, bottom_right, dropout_p, scale, softcap.


def saves_wide(query: torch.Tensor, save: bool) -> bool:
    """Whether forward keeps results of 16 bits as they were before they were rounded, unasked: the cpu backend does."""
    return save and query.is_cpu and query.itemsize == 2 and not python_kernels.serve_cpu


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::attention_forward")
    def _(
        query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed, left, right, bottom_right,
        dropout_p, scale, softcap, save, save_wide,
    ):  # fmt: skip
        batch, heads, time, _ = query.shape
        wide = torch.promote_types(query.dtype, torch.float32)
        save_wide = save_wide or saves_wide(query, save)
        return (
            query.new_empty(batch, heads, time, value.shape[3]),
            query.new_empty((batch, heads, time), dtype=wide),
            query.new_empty((2, batch, heads, time) if save else (0,), dtype=wide),
            query.new_empty((batch, heads, time, value.shape[3]) if save_wide else (0,), dtype=wide),
        )

    @torch.library.register_fake("s2s::attention_backward")
    def _(
        grad_out, grad_lse, out, softmax, query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed,
        left, right, bottom_right, dropout_p, scale, softcap, need_query, need_key, need_value, need_bias, need_slopes,
    ):  # fmt: skip
        pairs = (
            (query, need_query), (key, need_key), (value, need_value), (bias, need_bias), (alibi_slopes, need_slopes),
        )  # fmt: skip
        return tuple(
            x.new_empty(x.shape) if need else query.new_empty((0,), dtype=query.dtype if x is None else x.dtype)
            for x, need in pairs
        )


python_kernels.register(f"{__package__}.triton_kernels", "attention_forward", "attention_backward")


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    query, bias = tensors[0], tensors[4]
    assert query is not None
    # The gradient of a bias wider than 16 bits needs out as it was before it was rounded to them.
    save_wide = save and bias is not None and query.itemsize == 2 and bias.itemsize > 2
    run = python_kernels.function_of("attention_forward", query, tensors, planned=True)
    out, lse, softmax, wide_out = run(*tensors, *options, save, save_wide)
    return (out, lse), (out if wide_out.dim() == 1 else wide_out, softmax) if save else ()


def gradients(
    operator: str, order: tuple[int, ...], grads: Tensors, tensors: Tensors, saved: Tensors, options: Options,
    needs: tuple[bool, ...],
) -> Tensors:  # fmt: skip
    """Those of the tensors; `order`: the places of what the operator of backward has gradients of."""
    (grad_out, grad_lse), (out, softmax), query = grads, saved, tensors[0]
    assert out is not None and query is not None
    if grad_out is None and grad_lse is None:
        return (None,) * len(tensors)
    if grad_out is None:
        grad_out = query.new_zeros(()).expand(out.shape)
    wanted = [needs[place] for place in order]
    run = python_kernels.function_of(operator, query, (*tensors, *grads, *saved), planned=True)
    found = run(grad_out, grad_lse, out, softmax, *tensors, *options, *wanted)
    result: list[torch.Tensor | None] = [None] * len(tensors)
    for place, need, grad in zip(order, wanted, found, strict=True):
        result[place] = grad if need else None
    return tuple(result)


_backward = functools.partial(gradients, "attention_backward", (0, 1, 2, 4, 7))


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    query, key, value, mask, bias, query_lengths, key_lengths, alibi_slopes, seed = tensors
    left, right, bottom_right, dropout_p, scale, softcap = options
    assert query is not None and key is not None and value is not None
    keep = None
    if seed is not None:
        keep = keep_mask(seed, (*query.shape[:3], key.shape[2]), dropout_p)
    with checks.without_autocast(query):
        return reference.attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            left=left,
            right=right,
            bottom_right=bottom_right,
            query_lengths=query_lengths,
            key_lengths=key_lengths,
            alibi_slopes=alibi_slopes,
            dropout_p=dropout_p,
            keep=keep,
            scale=scale,
            softcap=softcap,
        )


kernel = differentiable("attention", forward=_forward, backward=_backward, reference=reference_of)
