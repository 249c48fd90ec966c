"""Additive (Bahdanau) attention and attention pooling: scores, softmax, dropout and context in one operator."""

import dataclasses
from typing import Any

import torch

from ... import checks, dispatch
from .. import random
from . import autograd

__all__ = ["AdditiveKeys", "additive_attention", "attention_pool", "prepare_additive_keys"]

OPERATOR = dispatch.register("additive_attention", cpu=lambda dtype: None, triton=dispatch.not_in_triton)
POOL = dispatch.register("attention_pool", cpu=lambda dtype: None, triton=dispatch.not_in_triton)


@dataclasses.dataclass(frozen=True, eq=False)
class AdditiveKeys:
    """Keys and values with their per-key work done, made by `prepare_additive_keys` and passed as `key`.

    The tensors given are kept, not copied: changing them afterwards leaves the prepared part behind.

    Attributes:
        key: (B, S, A).
        value: (B, S, Dv).
        lengths: (B,) int64, or None.
        table: what the cpu backend prepared, or None: exponentials of the keys in float32 (float64 for float64).
        outliers: (B, S), the keys whose exponentials are out of range, or None.
    """

    key: torch.Tensor
    value: torch.Tensor
    lengths: torch.Tensor | None
    table: torch.Tensor | None
    outliers: torch.Tensor | None

    def reorder(self, index: torch.Tensor) -> "AdditiveKeys":
        """The same for the rows `index` (B',) of the batch: beams reordered, duplicated or dropped."""
        index = checks.indices("AdditiveKeys.reorder", "index", index, self.key, self.key.shape[0])
        fields = (self.key, self.value, self.lengths, self.table, self.outliers)
        return AdditiveKeys(*(None if t is None else t.index_select(0, index) for t in fields))  # type: ignore[arg-type]


def prepare_additive_keys(
    key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None = None
) -> AdditiveKeys:
    """Does the per-key work of `additive_attention` once, for decoding step by step.

    On a GPU there is none to do: a step is bound by reading the keys, and what could be prepared is larger than they.

    Args:
        key: (B, S, A), projected already; float64, float32, bfloat16 or float16, any strides.
        value: (B, S, Dv).
        key_lengths: (B,) int32 or int64, on the CPU or beside key.

    Returns:
        an object to pass as `key`, with `value=None` and no `key_lengths`. Gradients reach key and value as usual.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "prepare_additive_keys"
    for label, tensor in (("key", key), ("value", value)):
        checks.tensor(name, label, tensor)
    key, value = checks.autocast(key, value)  # type: ignore[assignment]
    checks.data(name, "key", key, 3, "(B, S, A)")
    batch, keys, _ = key.shape
    _same_keys(name, value, key, "key", batch, keys)
    key_lengths = checks.lengths(name, "key_lengths", key_lengths, key, batch, keys, "S")
    table = outliers = None
    if dispatch.choose(OPERATOR, key.device, key.dtype) == "cpu" and not dispatch.transformed(key, value):
        table, outliers = torch.ops.s2s.additive_attention_prepare(key.detach(), key_lengths)
    return AdditiveKeys(key, value, key_lengths, table, outliers)


def additive_attention(
    query: torch.Tensor,
    key: torch.Tensor | AdditiveKeys,
    value: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    dropout_p: float = 0,  # not 0.0, which torch.compile would trace as an input, in a second compilation
    return_weights: bool = False,
) -> Any:
    """Additive attention (Bahdanau et al. 2014, section A.1.2): score(i, j) = weight . tanh(query_i + key_j), softmax
    over j.

    Args:
        query: (B, T, A), projected already, biases folded in; float64, float32, bfloat16 or float16, any strides.
        key: (B, S, A), projected already; or what `prepare_additive_keys` returned.
        value: (B, S, Dv); None beside prepared keys.
        weight: (A,).
        mask: boolean, broadcastable to (B, T, S), True = attend.
        key_lengths: (B,) int32 or int64, on the CPU or beside query: keys at or past it are absent. None beside
            prepared keys.
        dropout_p: probability of dropping a weight, applied whenever it is above 0.
        return_weights: also return the weights, before dropout.

    Returns:
        context (B, T, Dv); (context, weights (B, T, S)) if `return_weights`. A row that may attend to nothing gives 0.
        A key that is hidden from a row never affects that row, whatever it holds. No buffer of B T S A elements
        exists, nor one of B T S unless the weights are asked for; on a GPU a workspace of scores grows to 8 MiB.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: ``(torch.tanh(query[:, :, None] + key[:, None]) @ weight).softmax(-1) @ value``
    """
    name = "additive_attention"
    if mask is None and type(dropout_p) in (int, float) and dropout_p == 0 and checks.are_read(key_lengths):
        inputs = (query, key, value, weight, None, key_lengths, None, None, None)
        made = dispatch.directly(autograd.kernel, inputs, (0.0, bool(return_weights)), triton=True)
        if made is not None:
            return made if return_weights else made[0]
    checks.tensor(name, "query", query)
    table = outliers = None
    if isinstance(key, AdditiveKeys):
        for label, given in (("value", value), ("key_lengths", key_lengths)):
            if given is not None:
                checks.wrong_value(name, label, "None beside prepared keys", type(given).__name__)
        prepared = key
        key, value, key_lengths = prepared.key, prepared.value, prepared.lengths
        table, outliers = prepared.table, prepared.outliers
    for label, tensor in (("key", key), ("value", value), ("weight", weight)):
        checks.tensor(name, label, tensor)
    dtype = key.dtype
    query, key, value, weight = checks.autocast(query, key, value, weight)  # type: ignore[assignment]
    assert value is not None
    if key.dtype != dtype:  # cast by autocast: the table is of other numbers
        table = outliers = None
    checks.data(name, "query", query, 3, "(B, T, A)")
    batch, rows, width = query.shape
    if key.dim() != 3:
        checks.wrong_value(name, "key", "(B, S, A)", tuple(key.shape))
    keys = key.shape[1]
    checks.like(name, "key", key, query, "query", (batch, keys, width), "(B, S, A)")
    _same_keys(name, value, query, "query", batch, keys)
    checks.like(name, "weight", weight, query, "query", (width,), "(A,)")
    checks.boolean(name, "mask", mask, query, "query")
    if mask is not None:
        mask = checks.broadcast(name, "mask", mask, (batch, rows, keys), "(B, T, S)")
    key_lengths = checks.lengths(name, "key_lengths", key_lengths, query, batch, keys, "S")
    checks.probability(name, "dropout_p", dropout_p)
    backend = dispatch.choose(OPERATOR, query.device, query.dtype)
    # A constant where there is no dropout: under torch.compile the argument may be a number that varies.
    probability, seed = (float(dropout_p), random.draw_seed(query.device)) if dropout_p > 0 else (0.0, None)
    tensors = (query, key, value, weight, mask, key_lengths, seed, table, outliers)
    served_by_reference = backend == "reference" or dispatch.transformed(*tensors)
    serve = autograd.reference_of if served_by_reference else autograd.kernel
    results = serve(tensors, (probability, bool(return_weights)))
    return results if return_weights else results[0]


def attention_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    context: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    return_weights: bool = False,
) -> Any:
    """Attention pooling of a sequence (Yang et al. 2016, equations 5-7): softmax over t of
    context . tanh(weight x_t + bias), then the weighted sum of x.

    Args:
        x: (B, T, I); float64, float32, bfloat16 or float16, any strides.
        weight: (A, I).
        bias: (A,).
        context: (A,).
        lengths: (B,) int32 or int64, on the CPU or beside x: positions at or past it are absent.
        return_weights: also return the weights.

    Returns:
        pooled (B, I); (pooled, weights (B, T)) if `return_weights`. A sequence of length 0 gives 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Equivalent to: ``((x @ weight.mT + bias).tanh() @ context).softmax(1)[:, None] @ x``, without the middle dimension.
    """
    name = "attention_pool"
    if checks.are_read(lengths):
        inputs = (x, weight, bias, context, lengths)
        made = dispatch.directly(autograd.pool_kernel, inputs, (bool(return_weights),), triton=True)
        if made is not None:
            return made if return_weights else made[0]
    for label, tensor in (("x", x), ("weight", weight), ("bias", bias), ("context", context)):
        checks.tensor(name, label, tensor)
    x, weight, bias, context = checks.autocast(x, weight, bias, context)  # type: ignore[assignment]
    checks.data(name, "x", x, 3, "(B, T, I)")
    batch, time, width = x.shape
    if weight.dim() != 2:
        checks.wrong_value(name, "weight", "(A, I)", tuple(weight.shape))
    units = weight.shape[0]
    checks.like(name, "weight", weight, x, "x", (units, width), "(A, I)")
    checks.like(name, "bias", bias, x, "x", (units,), "(A,)")
    checks.like(name, "context", context, x, "x", (units,), "(A,)")
    lengths = checks.lengths(name, "lengths", lengths, x, batch, time)
    backend = dispatch.choose(POOL, x.device, x.dtype)
    tensors = (x, weight, bias, context, lengths)
    served_by_reference = backend == "reference" or dispatch.transformed(*tensors)
    serve = autograd.pool_reference_of if served_by_reference else autograd.pool_kernel
    results = serve(tensors, (bool(return_weights),))
    return results if return_weights else results[0]


def _same_keys(
    name: str, value: torch.Tensor, reference: torch.Tensor, reference_name: str, batch: int, keys: int
) -> None:
    """Checks a value (B, S, Dv) of any Dv."""
    if value.dim() != 3:
        checks.wrong_value(name, "value", "(B, S, Dv)", tuple(value.shape))
    checks.like(name, "value", value, reference, reference_name, (batch, keys, value.shape[2]), "(B, S, Dv)")
