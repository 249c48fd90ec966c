"""Fake kernels of additive attention, and the functions that differentiate it."""

import torch

from ... import checks, dispatch
from .. import python_kernels, random
from ..differentiation import Options, Tensors, differentiable
from . import reference

KEY_BLOCK = 128  # keys side by side in a prepared table, whatever the instruction set


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


if dispatch.extension_missing is None:

    @torch.library.register_fake("s2s::additive_attention_prepare")
    def _(key, key_lengths):
        batch, keys, width = key.shape
        blocks = (keys + KEY_BLOCK - 1) // KEY_BLOCK
        table = key.new_empty((batch, blocks, width + width % 2, 2, KEY_BLOCK), dtype=_wide(key))
        return table, key.new_empty((batch, keys), dtype=torch.bool)

    @torch.library.register_fake("s2s::additive_attention_forward")
    def _(query, key, value, weight, mask, key_lengths, seed, table, outliers, dropout_p, return_weights, save):
        (batch, rows, _), keys = query.shape, key.shape[1]
        context = query.new_empty(batch, rows, value.shape[2])
        weights = query.new_empty((batch, rows, keys) if return_weights else (0,))
        return context, weights, query.new_empty((batch, rows, 2) if save else (0,), dtype=_wide(query))

    @torch.library.register_fake("s2s::additive_attention_backward")
    def _(
        grad_context, grad_weights, query, key, value, weight, statistics, mask, key_lengths, seed, table, outliers,
        dropout_p, need_query, need_key, need_value, need_weight,
    ):  # fmt: skip
        needed = ((need_query, query), (need_key, key), (need_value, value), (need_weight, weight))
        return tuple(query.new_empty(t.shape if need else (0,)) for need, t in needed)

    @torch.library.register_fake("s2s::attention_pool_forward")
    def _(x, weight, bias, context, lengths):
        return x.new_empty(x.shape[0], x.shape[2]), x.new_empty(x.shape[:2], dtype=_wide(x))

    @torch.library.register_fake("s2s::attention_pool_backward")
    def _(grad_pooled, grad_weights, x, weight, bias, context, weights, lengths):
        return tuple(x.new_empty(t.shape) for t in (x, weight, bias, context))


python_kernels.register(f"{__package__}.triton_kernels", "additive_attention_forward", "additive_attention_backward")
python_kernels.register(f"{__package__}.triton_pool", "attention_pool_forward", "attention_pool_backward")


# tensors: query, key, value, weight, mask, key_lengths, seed, table, outliers (the last two of prepared keys); options:
# dropout_p, return_weights.


def _forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    run = python_kernels.function_of("additive_attention_forward", tensors[0], tensors, planned=True)
    context, weights, statistics = run(*tensors, *options, save)
    return ((context, weights) if options[1] else (context,)), ((statistics,) if save else ())


def _backward(grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]) -> Tensors:
    if all(grad is None for grad in grads):
        return (None,) * len(tensors)
    grad_context, grad_weights = grads if options[1] else (grads[0], None)
    run = python_kernels.function_of("additive_attention_backward", tensors[0], (*tensors, *grads), planned=True)
    results = run(grad_context, grad_weights, *tensors[:4], saved[0], *tensors[4:], options[0], *needs[:4])
    wanted = (result if need else None for result, need in zip(results, needs[:4], strict=True))
    return (*wanted, *([None] * (len(tensors) - 4)))


def reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition under the kernels' calling convention."""
    query, key, value, weight, mask, key_lengths, seed, _, _ = tensors
    dropout_p, return_weights = options
    assert query is not None and key is not None and value is not None and weight is not None
    visible = reference.visible_positions(query, key, mask, key_lengths)
    keep = None if seed is None else random.keep_mask(seed, tuple(visible.shape), dropout_p)
    with checks.without_autocast(query):
        context, weights = reference.additive_attention(query, key, value, weight, visible, keep, dropout_p)
    return (context, weights) if return_weights else (context,)


kernel = differentiable("additive_attention", forward=_forward, backward=_backward, reference=reference_of)

# tensors: x, weight, bias, context, lengths; options: return_weights.


def _pool_forward(tensors: Tensors, options: Options, save: bool) -> tuple[Tensors, Tensors]:
    x = tensors[0]
    assert x is not None
    pooled, weights = python_kernels.function_of("attention_pool_forward", x, tensors, planned=True)(*tensors)
    return ((pooled, weights.to(x.dtype)) if options[0] else (pooled,)), ((weights,) if save else ())


def _pool_backward(
    grads: Tensors, tensors: Tensors, saved: Tensors, options: Options, needs: tuple[bool, ...]
) -> Tensors:
    if all(grad is None for grad in grads):
        return (None,) * len(tensors)
    grad_pooled, grad_weights = grads if options[0] else (grads[0], None)
    run = python_kernels.function_of("attention_pool_backward", tensors[0], (*tensors, *grads), planned=True)
    results = run(grad_pooled, grad_weights, *tensors[:4], saved[0], tensors[4])
    return (*(result if need else None for result, need in zip(results, needs[:4], strict=True)), None)


def pool_reference_of(tensors: Tensors, options: Options) -> Tensors:
    """The definition of the pooling under the kernels' calling convention."""
    x, weight, bias, context, lengths = tensors
    assert x is not None and weight is not None and bias is not None and context is not None
    with checks.without_autocast(x):
        pooled, weights = reference.attention_pool(x, weight, bias, context, lengths)
    return (pooled, weights) if options[0] else (pooled,)


pool_kernel = differentiable(
    "attention_pool", forward=_pool_forward, backward=_pool_backward, reference=pool_reference_of
)
