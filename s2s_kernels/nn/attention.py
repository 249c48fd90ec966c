"""Multi-head attention as a layer: torch's interface over this package's attention."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import checks
from ..ops.attention import attention
from .layer import Layer, check_width
from .state import AttentionKeys, KVCache

Projection = tuple[torch.Tensor, torch.Tensor | None]  # weight and bias


class MultiheadAttention(Layer):
    """`torch.nn.MultiheadAttention` (Vaswani et al. 2017, section 3.2.2): same constructor, forward, parameters and
    numbers.

    Three things differ. A row whose keys are all masked attends to nothing, and its attention is 0, where torch's is
    NaN. Returned weights are those before dropout. And this is no subclass of torch's layer: `isinstance` tells them
    apart. Besides, forward takes a `KVCache`, for decoding step by step, and `prepare` projects the keys and values of
    an encoder's memory once for all steps.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as
            torch's; embed_dim / num_heads may be up to 1024.

    Parameters: in_proj_weight (3E, E), or q_proj_weight (E, E), k_proj_weight (E, kdim) and v_proj_weight (E, vdim)
    where kdim or vdim isn't E; in_proj_bias (3E,), bias_k and bias_v (1, 1, E), out_proj.weight (E, E), out_proj.bias
    (E,).
    """

    # What an instance of torch's has of its own after its class was changed to this one; older pickles lack some.
    batch_first: bool = False
    _qkv_same_embed_dim: bool = True
    in_proj_weight: torch.Tensor | None
    q_proj_weight: torch.Tensor
    k_proj_weight: torch.Tensor
    v_proj_weight: torch.Tensor
    in_proj_bias: torch.Tensor | None
    bias_k: torch.Tensor | None
    bias_v: torch.Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if size <= 0:
                checks.wrong_value("MultiheadAttention", name, "at least 1", size)
        if embed_dim % num_heads:
            checks.wrong_value("MultiheadAttention", "num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.dropout, self.batch_first, self.add_zero_attn = dropout, batch_first, add_zero_attn
        # torch's own layer draws the weights, so one seed gives the same ones here and there.
        like = nn.MultiheadAttention(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self._qkv_same_embed_dim = like._qkv_same_embed_dim
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_weight", "in_proj_bias"):
            self.register_parameter(name, getattr(like, name))
        self.bias_k, self.bias_v = like.bias_k, like.bias_v
        self.out_proj = like.out_proj

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | AttentionKeys,
        value: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        cache: KVCache | None = None,
        lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As torch's, but for cache and lengths.

        Args:
            query: (T, B, E), or (B, T, E) under batch_first, or (T, E) of a single sequence.
            key, value: (S, B, kdim), (S, B, vdim), laid out as query; or what `prepare` returned, and None.
            key_padding_mask: (B, S), or (S,) of a single sequence: True hides a key, a floating one is added to the
                scores.
            need_weights: also return the weights, of B T S elements: an additional product; leave it out in training.
            attn_mask: (T, S) or (B H, T, S): True hides, a floating one is added to the scores.
            average_attn_weights: return their mean over heads.
            is_causal: says that attn_mask, which must be given too, is the causal mask; means nothing beside a cache.
            cache: a `KVCache(B, num_heads, ..., embed_dim / num_heads)` of the earlier positions' keys and values.
                Those of the S = T new positions are appended to it, in place, and each new position attends to itself
                and all before it: the same as causal attention over the whole sequence. Such a call records no
                gradient (call it under `torch.no_grad()`). Refused beside it: a key_padding_mask, an attn_mask, and
                add_bias_kv or add_zero_attn of the layer, whose additional keys come after the last one.
            lengths: (B,), beside a cache only: how many of the T new positions each row has, the rest being padding
                that is neither kept nor attended to, and that itself attends to nothing; all if None.

        Returns:
            out (as query) and the weights, (B, T, S) or (B, H, T, S), without B of a single sequence; None unless
            need_weights. Beside a cache S is the cache's.
        """
        whole, more_keys = cache is None and lengths is None, self._more_keys
        if whole and isinstance(query, torch.Tensor) and query.is_nested and query is key and key is value:
            return self._forward_nested(query, key_padding_mask, need_weights, attn_mask, average_attn_weights)
        if isinstance(key, AttentionKeys):
            self._check_prepared(query, key, value, key_padding_mask, attn_mask, cache, lengths)
            batched, key_padding_mask = key.batched, key.key_padding_mask
        else:
            batched = self._checked(query, key, value, key_padding_mask, attn_mask)
        if not whole:
            self._check_cache(query, key, key_padding_mask, attn_mask, cache, lengths)  # type: ignore[arg-type]
        elif is_causal and attn_mask is None:
            checks.wrong_value("MultiheadAttention", "attn_mask", "given beside is_causal", None)
        batch_second = batched and not self.batch_first
        if isinstance(key, AttentionKeys):
            of_query, *_ = self._projections(True)
            (q,) = self._heads(F.linear(query if batched else query[None], *of_query), batch_second)
            k, v = key.key, key.value
        else:
            assert value is not None
            if not batched:
                self_attention, same = query is key, key is value
                query = query[None]
                key = query if self_attention else key[None]
                value = key if same else value[None]
                key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
            if key is not query:
                key, value = _without_padding(key, value, key_padding_mask, batch_second)
            q, k, v = self._project(query, key, value, batch_second)
            if cache is None and more_keys:
                k, v = self._with_more_keys(k, v)
        mask = bias = None
        if cache is not None:
            k, v, held = cache.append(k, v, lengths)
            options: dict[str, Any] = {"causal": "bottom-right", "query_lengths": lengths, "key_lengths": held}
            if need_weights:
                mask = _held_before(held, lengths, q.shape[2], k.shape[2])
        else:
            causal = is_causal and key_padding_mask is None and not need_weights
            attn_mask = None if causal else attn_mask
            if attn_mask is not None or key_padding_mask is not None:
                mask, bias = _restrictions(attn_mask, key_padding_mask, q.shape[0], self.num_heads)
                mask, bias = _seen_by_all(mask, bias, more_keys)
            options = {"mask": mask, "bias": bias, "causal": causal}
        options["dropout_p"] = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            out, lse = attention(q, k, v, **options, return_lse=True)
            weights = attention_weights(q, k, lse, mask, bias, self.head_dim**-0.5)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = attention(q, k, v, **options)
        # (B, H, T, D) to the layout of query
        joined = out.permute(2, 0, 1, 3) if batch_second else out.transpose(1, 2)
        result = F.linear(joined.flatten(2), self.out_proj.weight, self.out_proj.bias)
        if not batched:
            result, weights = result[0], None if weights is None else weights[0]
        return result, weights

    def prepare(
        self, key: torch.Tensor, value: torch.Tensor | None = None, key_padding_mask: torch.Tensor | None = None
    ) -> AttentionKeys:
        """Projects keys and values once, for queries that come step by step (an encoder's memory, in a decoder): pass
        the result as `key`, without a value.

        Args:
            key, value, key_padding_mask: as forward's; the keys if value is None.

        Returns:
            an object that the parameters' later changes don't reach; gradients reach key, value and parameters as
            usual.

        Raises:
            TypeError, ValueError: an argument is not as above; the message names it.
        """
        value = key if value is None else value
        batched = self._check_keys(key, value, key_padding_mask)
        if not batched:
            key, value = key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        batch_second = batched and not self.batch_first
        key, value = _without_padding(key, value, key_padding_mask, batch_second)
        _, *projections = self._projections(key is value)
        k, v = self._project_keys(key, value, projections, batch_second)
        return AttentionKeys(*self._with_more_keys(k, v), key_padding_mask, batched)

    def _forward_nested(
        self,
        x: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        need_weights: bool,
        attn_mask: torch.Tensor | None,
        average_attn_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention over a nested tensor, into which `nn.TransformerEncoder` makes a padded batch in evaluation,
        by way of the padded one; the weights are padded."""
        for name, given in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if given is not None:
                checks.wrong_value("MultiheadAttention", name, "None beside a nested query", "a tensor")
        lengths = [sequence.shape[0] for sequence in x.unbind()]
        padded = x.to_padded_tensor(0.0)
        absent = torch.arange(padded.shape[1], device=x.device) >= torch.tensor(lengths, device=x.device)[:, None]
        if not self.batch_first:
            checks.wrong_value("MultiheadAttention", "batch_first", "True for a nested query", False)
        out, weights = self.forward(
            padded, padded, padded, absent, need_weights, average_attn_weights=average_attn_weights
        )
        sequences = [row[:length] for row, length in zip(out, lengths, strict=True)]
        return torch.nested.as_nested_tensor(sequences, layout=x.layout), weights

    def merge_masks(
        self, attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, query: torch.Tensor
    ) -> tuple[torch.Tensor | None, int | None]:
        """The masks in one, and which kind it is (0: of attention, 1: of padding, 2: both or either, expanded to
        (B, H, T, T)): what `nn.TransformerEncoderLayer` asks of its attention on its fast path."""
        if attn_mask is None:
            return key_padding_mask, None if key_padding_mask is None else 1
        batch, time, _ = query.shape
        merged = attn_mask.view(batch, -1, time, time) if attn_mask.dim() == 3 else attn_mask
        merged = merged.expand(batch, self.num_heads, time, time)
        if key_padding_mask is not None:
            merged = merged + key_padding_mask.view(batch, 1, 1, time)
        return merged, 2

    def _check_keys(self, key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None) -> bool:
        """Whether the keys have a batch dimension."""
        refuse = functools.partial(checks.wrong_value, "MultiheadAttention")
        for name, x, size in (("key", key, self.kdim), ("value", value, self.vdim)):
            _check_rows(name, x, size, self.out_proj.weight.dtype)
        if key.shape[:-1] != value.shape[:-1]:
            refuse("value", f"of as many positions as key, {tuple(key.shape[:-1])}", tuple(value.shape[:-1]))
        batched = key.dim() == 3
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask)
            wanted = tuple(key.shape[:-1]) if self.batch_first or not batched else (key.shape[1], key.shape[0])
            if tuple(key_padding_mask.shape) != wanted:
                refuse("key_padding_mask", f"of shape {wanted}", tuple(key_padding_mask.shape))
        return batched

    def _check_queries(
        self, query: torch.Tensor, batched: bool, batch: int, source: int, attn_mask: torch.Tensor | None
    ) -> None:
        """Queries and attn_mask against `source` keys of each of `batch` rows."""
        refuse = functools.partial(checks.wrong_value, "MultiheadAttention")
        _check_rows("query", query, self.embed_dim, self.out_proj.weight.dtype)
        if query.dim() != (3 if batched else 2):
            refuse("key", f"with {query.dim()} dimensions like query", 3 if batched else 2)
        of_batch, of_time = (0, 1) if self.batch_first and batched else (1, 0)
        if batched and query.shape[of_batch] != batch:
            refuse("key", f"of batch size {query.shape[of_batch]}", batch)
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask)
            time = query.shape[of_time]
            wanted = (time, source) if attn_mask.dim() == 2 else (batch * self.num_heads, time, source)
            if tuple(attn_mask.shape) != wanted:
                refuse("attn_mask", f"of shape (T, S) or (B H, T, S), here {wanted}", tuple(attn_mask.shape))

    def _checked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: Any,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
    ) -> bool:
        """Whether the input has a batch dimension."""
        _check_rows("query", query, self.embed_dim, self.out_proj.weight.dtype)
        if query is key and key is value and key_padding_mask is attn_mask is None and self._qkv_same_embed_dim:
            return query.dim() == 3
        batched = self._check_keys(key, value, key_padding_mask)
        of_batch, of_time = (0, 1) if self.batch_first and batched else (1, 0)
        self._check_queries(query, batched, key.shape[of_batch] if batched else 1, key.shape[of_time], attn_mask)
        return batched

    def _check_prepared(
        self,
        query: torch.Tensor,
        keys: AttentionKeys,
        value: Any,
        key_padding_mask: Any,
        attn_mask: torch.Tensor | None,
        cache: Any,
        lengths: Any,
    ) -> None:
        named = {"value": value, "key_padding_mask": key_padding_mask, "cache": cache, "lengths": lengths}
        for name, given in named.items():
            if given is not None:
                checks.wrong_value("MultiheadAttention", name, "None beside prepared keys", type(given).__name__)
        batch, heads, keys_in_all, width = keys.key.shape
        if (heads, width) != (self.num_heads, self.head_dim):
            wanted = f"prepared by a layer of {self.num_heads} heads of width {self.head_dim}"
            checks.wrong_value("MultiheadAttention", "key", wanted, tuple(keys.key.shape))
        self._check_queries(query, keys.batched, batch, keys_in_all - self._more_keys, attn_mask)

    def _check_cache(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        attn_mask: torch.Tensor | None,
        cache: KVCache | None,
        lengths: torch.Tensor | None,
    ) -> None:
        refuse = functools.partial(checks.wrong_value, "MultiheadAttention")
        if cache is None:
            refuse("lengths", "None without a cache", type(lengths).__name__)
        if not isinstance(cache, KVCache):
            checks.wrong_type("MultiheadAttention", "cache", "a KVCache", type(cache).__name__)
        if self.bias_k is not None or self.add_zero_attn:
            refuse("cache", "None in a layer with add_bias_kv or add_zero_attn", "a KVCache")
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                refuse(name, "None beside a cache", "a tensor")
        if query.shape[:-1] != key.shape[:-1]:
            refuse("key", f"of query's positions {tuple(query.shape[:-1])} beside a cache", tuple(key.shape[:-1]))

    def _project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch_second: bool
    ) -> tuple[torch.Tensor, ...]:
        """Queries (B, H, T, D), keys and values (B, H, S, D): in one product what comes from the same tensor."""
        if self.in_proj_weight is not None and query is key and key is value:
            return self._heads(F.linear(query, self.in_proj_weight, self.in_proj_bias), batch_second, 3)
        of_query, *of_keys = self._projections(key is value)
        return (
            *self._heads(F.linear(query, *of_query), batch_second),
            *self._project_keys(key, value, of_keys, batch_second),
        )

    def _project_keys(
        self, key: torch.Tensor, value: torch.Tensor, projections: list[Projection], batch_second: bool
    ) -> tuple[torch.Tensor, ...]:
        """Keys and values (B, H, S, D) by their one or two projections."""
        if len(projections) == 1:
            return self._heads(F.linear(key, *projections[0]), batch_second, 2)
        pairs = zip((key, value), projections, strict=True)
        return tuple(heads for x, of in pairs for heads in self._heads(F.linear(x, *of), batch_second))

    def _projections(self, together: bool) -> list[Projection]:
        """Weight and bias of queries, keys and values; the last two in one if they are wanted together and lie so.
        Split, the parameters get their derivative in one pass; each slice's would be as large as the whole."""
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        sizes = [width, 2 * width] if together and weight is not None else [width] * 3
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if weight is None else weight.split(sizes)
        )
        return list(zip(weights, (None,) * len(sizes) if bias is None else bias.split(sizes), strict=True))

    @property
    def _more_keys(self) -> int:
        """How many keys the layer adds behind those given."""
        return int(self.bias_k is not None) + int(self.add_zero_attn)

    def _with_more_keys(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, self._repeated(bias, x)], 2) for x, bias in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _heads(self, x: torch.Tensor, batch_second: bool, several: int = 1) -> tuple[torch.Tensor, ...]:
        """(B, T, n E), or (T, B, n E), seen as n tensors (B, H, T, D)."""
        if several == 1:  # without unbind, whose derivative is a copy
            heads = x.unflatten(-1, (self.num_heads, self.head_dim))
            return (heads.permute(1, 2, 0, 3) if batch_second else heads.transpose(1, 2),)
        heads = x.unflatten(-1, (several, self.num_heads, self.head_dim))
        return (heads.permute(2, 1, 3, 0, 4) if batch_second else heads.permute(2, 0, 3, 1, 4)).unbind()

    def _repeated(self, bias: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A learned key or value (1, 1, E) as (B, H, 1, D)."""
        heads = bias.to(like.dtype).view(1, self.num_heads, 1, self.head_dim)
        return heads.expand(like.shape[0], -1, -1, -1)


def _without_padding(
    key: torch.Tensor, value: torch.Tensor, key_padding_mask: torch.Tensor | None, batch_second: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with 0 where a boolean mask (B, S) hides them, if a gradient is recorded: a NaN there would come
    through the products that project them into the gradients of the weights."""
    if key_padding_mask is None or key_padding_mask.dtype != torch.bool or not torch.is_grad_enabled():
        return key, value
    hidden = (key_padding_mask.mT if batch_second else key_padding_mask)[..., None]
    seen = key.masked_fill(hidden, 0)
    return seen, seen if key is value else value.masked_fill(hidden, 0)


def _restrictions(
    attn_mask: torch.Tensor | None, key_padding_mask: torch.Tensor | None, batch: int, heads: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """torch's masks as this package's: a boolean mask in which True attends, and a bias, broadcastable to
    (B, H, T, S)."""
    mask = bias = None
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    for given in (attn_mask, key_padding_mask):
        if given is None:
            continue
        if given.dtype == torch.bool:
            mask = ~given if mask is None else mask & ~given
        else:
            bias = given if bias is None else bias + given
    return mask, bias


def _held_before(held: torch.Tensor, new: torch.Tensor | None, time: int, source: int) -> torch.Tensor:
    """Which keys (B, 1, T, S) each query sees of a cache that holds `held` (B,) positions, the last `new` (B,) of them,
    T if None, being the queries'."""
    query, key = (torch.arange(n, device=held.device) for n in (time, source))
    before = held - (time if new is None else new.to(held.device).clamp(0, time))
    return key <= query[:, None] + before[:, None, None, None]


def _seen_by_all(
    mask: torch.Tensor | None, bias: torch.Tensor | None, count: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The restrictions with `count` keys at the end that every row sees."""
    if count == 0:
        return mask, bias
    return (
        None if mask is None else F.pad(mask, (0, count), value=True),
        None if bias is None else F.pad(bias, (0, count)),
    )


def _check_rows(name: str, x: Any, size: int, dtype: torch.dtype) -> None:
    if not isinstance(x, torch.Tensor) or x.is_nested:
        checks.wrong_type("MultiheadAttention", name, "a tensor that isn't nested", type(x).__name__)
    if x.dim() not in (2, 3):
        wanted = "(T, B, E), (B, T, E) or (T, E), like the others"
        checks.wrong_value("MultiheadAttention", name, wanted, tuple(x.shape))
    check_width("MultiheadAttention", name, x, size, dtype)


def _check_mask(name: str, mask: Any) -> None:
    checks.tensor("MultiheadAttention", name, mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        checks.wrong_type("MultiheadAttention", name, "boolean or floating", mask.dtype)


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The weights (B, H, T, S) whose sums of exponentials `attention` returned, in query's dtype, by plain operations:
    softmax(scale q . k + bias). What is hidden gives 0, whatever it holds; a row that sees a NaN has it in its lse.

    Args:
        query, key: (B, H, T, D), (B, H, S, D).
        lse: (B, H, T).
        mask, bias: broadcastable to (B, H, T, S).
    """
    wide = lse.dtype
    # In a product even a factor of 0 makes NaN of what isn't finite.
    q, k = (x.to(wide).nan_to_num(0.0, 0.0, 0.0) for x in (query, key))
    with checks.without_autocast(query):
        scores = (q @ k.mT) * scale
    visible = torch.ones((), dtype=torch.bool, device=query.device) if mask is None else mask
    if bias is not None:
        visible = visible & (bias != -torch.inf)
        scores = scores + torch.where(visible, bias, 0).to(wide)
    alive = (lse != -torch.inf)[..., None]
    shown = visible & alive
    # exp(scores - lse) alone would be off by what lse, far from 0, was rounded by.
    shifted = scores - torch.where(alive, lse.detach()[..., None], 0)
    weights = torch.where(shown, shifted, torch.where(alive, -torch.inf, 0.0).to(wide)).softmax(-1)
    return torch.where(shown, weights, 0).to(query.dtype)
