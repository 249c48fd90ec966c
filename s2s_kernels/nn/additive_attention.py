"""Attention of encoder-decoder models: Bahdanau's, Luong's, and the pooling of hierarchical attention."""

from typing import Any

import torch
from torch import nn

from .. import checks
from ..ops.additive_attention import AdditiveKeys, additive_attention, attention_pool, prepare_additive_keys
from ..ops.attention import attention
from ..ops.random import draw_seed, keep_mask
from .attention import attention_weights
from .layer import Layer, check_projected, check_width


class AdditiveAttention(Layer):
    """Bahdanau et al. 2014, section A.1.2: a_ij = v . tanh(W s_i + U h_j), weights softmax over j of a_ij, context
    c_i = sum over j of weight_ij h_j.

    Args:
        query_size: width of the queries s.
        key_size: width of the keys h.
        attention_size: A, width of the alignment model.
        bias: whether W has a bias; the paper's has none.
        dropout: probability of dropping a weight in training.

    Parameters: query_projection.weight (A, query_size) [and .bias (A,)], key_projection.weight (A, key_size),
    weight (A,): the paper's W_a, U_a and v_a.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int,
        *,
        bias: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.probability("AdditiveAttention", "dropout", dropout)
        self.dropout = dropout
        self.query_projection = nn.Linear(query_size, attention_size, bias=bias, device=device, dtype=dtype)
        self.key_projection = nn.Linear(key_size, attention_size, bias=False, device=device, dtype=dtype)
        self.weight = _vector(attention_size, device, dtype)

    def prepare(
        self,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        *,
        key_lengths: torch.Tensor | None = None,
    ) -> AdditiveKeys:
        """Does the per-key work once, for decoding step by step: pass the result as `key`.

        Args:
            key: (B, S, key_size); value: (B, S, Dv), the keys if None; key_lengths: (B,).
        """
        value = key if value is None else value
        check_projected("AdditiveAttention", "key", key, "(B, S, key_size)", self.key_projection)
        projected = self.key_projection(key.nan_to_num(0.0, 0.0, 0.0))
        # A mask may hide what isn't finite, which as a factor would come into the gradient of the projection's weight.
        projected = projected + torch.where(key.isfinite().all(-1, keepdim=True), 0.0, torch.nan).to(projected.dtype)
        return prepare_additive_keys(projected, value, key_lengths)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | AdditiveKeys,
        value: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        key_lengths: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> Any:
        """query (B, T, query_size), key (B, S, key_size) or from `prepare`, value (B, S, Dv), the keys if None ->
        context (B, T, Dv), or (context, weights (B, T, S)); other arguments as `additive_attention`."""
        check_projected("AdditiveAttention", "query", query, "(B, T, query_size)", self.query_projection)
        if not isinstance(key, AdditiveKeys):
            check_projected("AdditiveAttention", "key", key, "(B, S, key_size)", self.key_projection)
            value = key if value is None else value
            key = self.key_projection(_seen_only("AdditiveAttention", key, mask, key_lengths, query.shape[1]))
        return additive_attention(
            self.query_projection(query),
            key,
            value,
            self.weight,
            mask=mask,
            key_lengths=key_lengths,
            dropout_p=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )

    def extra_repr(self) -> str:
        return "" if self.dropout == 0 else f"dropout={self.dropout}"


class LuongAttention(Layer):
    """Luong et al. 2015, sections 3.1 and 3.2: the weights of target state h_t over source states h_s, and their
    context.

    Scores (equations 7 and 8): "dot", h_t . h_s; "general", h_t . W_a h_s; "concat", v_a . tanh(W_a [h_t; h_s]);
    "location", row s of W_a h_t, which doesn't look at h_s.

    With a window D the attention is local ("local-p", equations 9 and 10): p_t = S sigmoid(v_p . tanh(W_p h_t)) with
    S the source's length, softmax over the s within [p_t - D, p_t + D] only, and each weight times
    exp(-(s - p_t)^2 / (2 (D/2)^2)). The weights then don't sum to 1.

    Args:
        query_size, key_size: widths of h_t and h_s; equal under "dot".
        score: "dot", "general", "concat" or "location".
        window: D, or None for global attention.
        attention_size: width of W_a under "concat" and of W_p with a window; query_size if None.
        max_length: the longest source under "location".
        dropout: probability of dropping a weight in training.

    Parameters: projection.weight: W_a (key_size, query_size) of "general", (max_length, query_size) of "location";
    query_projection.weight and key_projection.weight, the two halves of W_a, and weight, v_a, of "concat";
    position_projection.weight, W_p, and position_weight, v_p, with a window.
    """

    SCORES = ("dot", "general", "concat", "location")

    def __init__(
        self,
        query_size: int,
        key_size: int,
        score: str = "dot",
        *,
        window: int | None = None,
        attention_size: int | None = None,
        max_length: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if score not in self.SCORES:
            checks.wrong_value("LuongAttention", "score", f"one of {', '.join(self.SCORES)}", repr(score))
        if score == "dot" and query_size != key_size:
            checks.wrong_value("LuongAttention", "key_size", f"query_size = {query_size} under dot", key_size)
        if (score == "location") != (max_length is not None):
            checks.wrong_value("LuongAttention", "max_length", "given with location alone", max_length)
        checks.probability("LuongAttention", "dropout", dropout)
        if window is not None and window < 1:
            checks.wrong_value("LuongAttention", "window", "at least 1", window)
        self.score, self.window, self.dropout = score, window, dropout
        width = query_size if attention_size is None else attention_size

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)

        if score == "general":
            self.projection = linear(query_size, key_size)
        elif score == "location":
            assert max_length is not None
            self.projection = linear(query_size, max_length)
        elif score == "concat":
            self.query_projection, self.key_projection = linear(query_size, width), linear(key_size, width)
            self.weight = _vector(width, device, dtype)
        if window is not None:
            self.position_projection = linear(query_size, width)
            self.position_weight = _vector(width, device, dtype)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        key_lengths: torch.Tensor | None = None,
        return_weights: bool = False,
    ) -> Any:
        """query (B, T, query_size), key (B, S, key_size), value (B, S, Dv), the keys if None, mask broadcastable to
        (B, T, S) with True = attend, key_lengths (B,) -> context (B, T, Dv), or (context, weights (B, T, S) before
        dropout)."""
        value = key if value is None else value
        of_query = of_key = None
        if self.score == "concat":
            of_query, of_key = self.query_projection, self.key_projection
        elif self.score != "dot":
            of_query = self.projection
        check_projected("LuongAttention", "query", query, "(B, T, query_size)", of_query)
        check_projected("LuongAttention", "key", key, "(B, S, key_size)", of_key)
        checks.data("LuongAttention", "value", value, 3, "(B, S, Dv)")
        (batch, rows, _), keys = query.shape, key.shape[1]
        key_lengths = checks.lengths("LuongAttention", "key_lengths", key_lengths, key, batch, keys, "S")
        checks.boolean("LuongAttention", "mask", mask, query, "query")
        if mask is not None:
            mask = checks.broadcast("LuongAttention", "mask", mask, (batch, rows, keys), "(B, T, S)")
        falloff = None
        if self.window is not None:
            within, falloff = self._window(query, keys, key_lengths)
            mask = within if mask is None else within & mask
        dropout = self.dropout if self.training else 0.0
        if self.score == "concat":
            return self._concat(query, key, value, mask, key_lengths, falloff, dropout, return_weights)
        if self.score == "general":
            query = self.projection(query)
        elif self.score == "location":
            if keys > self.projection.out_features:
                longest = self.projection.out_features
                raise ValueError(f"LuongAttention: key must have at most max_length = {longest} positions, got {keys}")
            key = self.projection.weight[:keys].to(query.dtype).expand(batch, -1, -1)
        if key.shape[2] != query.shape[2]:
            checks.wrong_value("LuongAttention", "key", f"of width {query.shape[2]}", tuple(key.shape))
        # The scores are those of dot-product attention with one head and no scale.
        q, k, v = (x[:, None] for x in checks.autocast(query, key, value) if x is not None)
        if mask is not None:
            mask = mask[:, None]

        def attend(v: torch.Tensor, bias: torch.Tensor | None, dropout: float) -> tuple[torch.Tensor, torch.Tensor]:
            return attention(
                q, k, v, mask=mask, bias=bias, key_lengths=key_lengths, dropout_p=dropout, scale=1.0, return_lse=True
            )

        if falloff is None:
            out, lse = attend(v, None, dropout)
        else:
            # softmax(scores) falloff = softmax(scores + log falloff) times the ratio of the two sums.
            out, scaled = attend(v, falloff[:, None], dropout)
            _, lse = attend(v[..., :1], None, 0.0)
            alive = lse != -torch.inf
            out = out * torch.where(alive, scaled - lse, -torch.inf).exp()[..., None].to(out.dtype)
        context = out[:, 0].contiguous()
        if not return_weights:
            return context
        if key_lengths is not None:
            present = torch.arange(keys, device=key.device) < key_lengths[:, None, None, None]
            mask = present if mask is None else mask & present
        weights = attention_weights(q, k, lse, mask, None, 1.0)[:, 0]
        return context, weights if falloff is None else weights * falloff.exp().to(weights.dtype)

    def _window(
        self, query: torch.Tensor, keys: int, key_lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions lie within the window (B, T, S), and the logarithm of their falloff."""
        assert self.window is not None
        wide = torch.promote_types(query.dtype, torch.float32)
        share = torch.sigmoid((self.position_projection(query).tanh() * self.position_weight).sum(-1, dtype=wide))
        length = keys if key_lengths is None else key_lengths[:, None]
        distance = torch.arange(keys, device=query.device) - (length * share)[..., None]
        return distance.abs() <= self.window, -2 * (distance / self.window) ** 2

    def _concat(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        key_lengths: torch.Tensor | None,
        falloff: torch.Tensor | None,
        dropout: float,
        return_weights: bool,
    ) -> Any:
        seen = _seen_only("LuongAttention", key, mask, key_lengths, query.shape[1])
        q, k = self.query_projection(query), self.key_projection(seen)
        if falloff is None:
            return additive_attention(
                q,
                k,
                value,
                self.weight,
                mask=mask,
                key_lengths=key_lengths,
                dropout_p=dropout,
                return_weights=return_weights,
            )
        assert mask is not None  # the window's at least
        _, weights = additive_attention(
            q, k, value[..., :1], self.weight, mask=mask, key_lengths=key_lengths, return_weights=True
        )
        weights = weights * falloff.exp().to(weights.dtype)
        value = _seen_only("LuongAttention", value, mask, key_lengths, query.shape[1]).to(weights.dtype)
        used = weights
        if dropout > 0:
            kept = keep_mask(draw_seed(weights.device), tuple(weights.shape), dropout)
            used = torch.where(kept, weights / (1 - dropout), 0) if dropout < 1 else weights * 0
        # In a product even a weight of 0 would make NaN of what isn't finite: only rows that see such a value get it.
        spoilt = mask.to(value.dtype) @ (~value.isfinite()).to(value.dtype)
        taint = torch.where(spoilt > 0, torch.nan, 0.0).to(value.dtype)
        context = used @ value.nan_to_num(0.0, 0.0, 0.0) + weights.sum(-1, keepdim=True) * taint
        return (context, weights) if return_weights else context

    def extra_repr(self) -> str:
        text = f"score={self.score!r}"
        text += "" if self.window is None else f", window={self.window}"
        return text if self.dropout == 0 else f"{text}, dropout={self.dropout}"


class AttentionPool(Layer):
    """Yang et al. 2016, equations 5 to 7: u_t = tanh(W h_t + b), weights softmax over t of u_t . u, their sum of h.

    Args:
        input_size: I, width of h.
        attention_size: A, width of u.

    Parameters: weight (A, I), bias (A,), context (A,), the paper's W_w, b_w and u_w.
    """

    def __init__(
        self,
        input_size: int,
        attention_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.attention_size = input_size, attention_size
        like = nn.Linear(input_size, attention_size, device=device, dtype=dtype)
        self.weight, self.bias = like.weight, like.bias
        self.context = _vector(attention_size, device, dtype)

    def forward(self, x: torch.Tensor, *, lengths: torch.Tensor | None = None, return_weights: bool = False) -> Any:
        """x (B, T, I), lengths (B,) -> pooled (B, I), or (pooled, weights (B, T))."""
        checks.data("AttentionPool", "x", x, 3, "(B, T, I)")
        check_width("AttentionPool", "x", x, self.input_size, self.weight.dtype)
        return attention_pool(x, self.weight, self.bias, self.context, lengths=lengths, return_weights=return_weights)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.attention_size}"


def _vector(size: int, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A vector that scores: initialised as a linear map to one output."""
    return nn.Parameter(nn.Linear(size, 1, bias=False, device=device, dtype=dtype).weight.detach()[0].clone())


def _seen_only(
    name: str, x: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor | None, rows: int = 1
) -> torch.Tensor:
    """x (B, S, W) with 0 at the positions that no row sees: a NaN there would come through the product that projects
    them into the gradient of its weight."""
    batch, keys, _ = x.shape
    seen = None
    lengths = checks.lengths(name, "key_lengths", lengths, x, batch, keys, "S")
    if lengths is not None:
        seen = torch.arange(keys, device=x.device) < lengths[:, None]
    checks.boolean(name, "mask", mask, x, "key")
    if mask is not None:
        some = checks.broadcast(name, "mask", mask, (batch, rows, keys), "(B, T, S)").any(1)
        seen = some if seen is None else seen & some
    return x if seen is None else torch.where(seen[..., None], x, 0)
