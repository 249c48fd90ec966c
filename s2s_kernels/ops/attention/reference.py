"""The definition of attention: plain PyTorch, differentiable any number of times."""

import math

import torch


def _clean(x: torch.Tensor) -> torch.Tensor:
    """Zero where x is not finite: in a matrix product even a weight of 0 would make NaN of it."""
    return x.nan_to_num(0.0, 0.0, 0.0)


def _taint(x: torch.Tensor) -> torch.Tensor:
    """NaN for a row with anything in it that is not finite, else 0; its gradient vanishes unless it is NaN itself."""
    return (x * 0).sum(-1)


def visibility(
    batch: int,
    time: int,
    source: int,
    device: torch.device,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    query_lengths: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which query sees which key (broadcastable to (B, H, T, S)), and how far each key lies after the query,
    j - (i + o), (B or 1, 1, T, S). The diagonal o is 0, or under `bottom_right` the number of keys less that of
    queries."""
    i, j = torch.arange(time, device=device)[:, None], torch.arange(source, device=device)
    queries = i.new_full((1,), time) if query_lengths is None else query_lengths
    keys = i.new_full((1,), source) if key_lengths is None else key_lengths
    queries, keys = queries[:, None, None, None], keys[:, None, None, None]
    distance = j - i - (keys - queries if bottom_right else 0)
    visible = (i < queries) & (j < keys)
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    if mask is not None:
        visible = visible & mask
    if bias is not None:
        visible = visible & (bias != -math.inf)
    return visible, distance.expand(visible.shape[0] if bottom_right else 1, 1, time, source)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    query_lengths: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weights = softmax over the visible keys j of cap(scale q_i . k_j) + bias - slope |i + o - j|;
    out_i = sum over j of dropout(weights) v_j. A row that sees nothing gives 0; one that sees anything not finite gives
    NaN; what a row doesn't see never touches it.

    left, right: the window, of which a causal mask is the case right = 0. keep (B, H, T, S): which weights dropout
    leaves. Returns out (B, H, T, Dv) and
    lse (B, H, T), the logarithm of the softmax's denominator.
    """
    (batch, heads, time, width), (_, kv_heads, source, _) = query.shape, key.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    visible, distance = visibility(
        batch, time, source, query.device, mask=mask, bias=bias, left=left, right=right,
        bottom_right=bottom_right, query_lengths=query_lengths, key_lengths=key_lengths,
    )  # fmt: skip
    visible = visible.expand(batch, heads, time, source)
    q = query.to(dtype)
    group = heads // kv_heads if kv_heads else 1  # query head h reads key head h // group
    k, v = (
        x.to(dtype)[:, :, None].expand(batch, kv_heads, group, source, x.shape[3]).flatten(1, 2)
        for x in (key, value)
    )
    scores = _clean(q) @ _clean(k).transpose(2, 3) + torch.where(
        visible, _taint(q)[..., None] + _taint(k)[:, :, None], 0
    )
    scores = scores * (1 / math.sqrt(width) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        if bias.dtype != dtype and bias.dtype == torch.float64:
            # The least finite number of a wider dtype must not become an infinity, which would hide.
            bias = bias.clamp(min=torch.finfo(dtype).min)
        scores = scores + torch.where(visible, bias, 0).to(dtype)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(dtype).expand(batch, heads)[:, :, None, None]
        scores = scores - torch.where(visible, slopes * distance.abs().to(dtype), 0)
    alive = visible.any(-1)
    # A row that sees nothing is filled with zeros, so that no NaN arises in it, and its results are put in afterwards.
    hidden = torch.where(alive, -math.inf, 0.0).to(dtype)[..., None]
    scores = torch.where(visible, scores, hidden)
    lse = torch.where(alive, torch.logsumexp(scores, -1), -math.inf)
    weights = torch.where(visible, torch.softmax(scores, -1), 0)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0) if dropout_p < 1 else weights * 0
    out = weights @ _clean(v) + (weights * torch.where(visible, _taint(v)[:, :, None], 0)).sum(-1, keepdim=True)
    return torch.where(alive[..., None], out, 0).to(query.dtype).contiguous(), lse
