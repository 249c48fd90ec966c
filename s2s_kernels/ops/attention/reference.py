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
    batch, heads, time, _ = query.shape
    visible, distance = visibility(
        batch, time, key.shape[2], query.device, mask=mask, bias=bias, left=left, right=right,
        bottom_right=bottom_right, query_lengths=query_lengths, key_lengths=key_lengths,
    )  # fmt: skip
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)[:, :, None, None]
    return _attention(query, key, value, visible, distance, bias, slopes, dropout_p, keep, scale, softcap)


def attention_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of each sequence by itself: query (T of all, H, D), key (S of all, Hkv, D), value (S of all, Hkv,
    Dv); sequence b is the rows from cu_seqlens[b] up to cu_seqlens[b + 1].

    keep (1, H, T of all, S of all): which weights dropout leaves, its columns counted from the sequence's first key.
    Returns out (T of all, H, Dv) and lse (H, T of all).
    """
    (b_q, i, queries), (b_k, j, keys) = _places(cu_seqlens_q, query.shape[0]), _places(cu_seqlens_k, key.shape[0])
    distance = j - i[:, None]
    if bottom_right:
        distance = distance - (keys - queries)[b_q][:, None]
    visible = b_q[:, None] == b_k
    if left is not None:
        visible = visible & (distance >= -left)
    if right is not None:
        visible = visible & (distance <= right)
    slopes = None
    if alibi_slopes is not None:
        slopes = alibi_slopes[:, None] if alibi_slopes.dim() == 1 else alibi_slopes[b_q].T  # (H, 1 or T of all)
        slopes = slopes[None, :, :, None]
    if keep is not None:
        keep = keep[..., j]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    visible, distance = visible[None, None], distance[None, None]
    out, lse = _attention(query, key, value, visible, distance, None, slopes, dropout_p, keep, scale, softcap)
    return out[0].transpose(0, 1).contiguous(), lse[0]


def _places(starts: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of packed rows: the sequence of each, its place in it, and how long each sequence is."""
    row = torch.arange(rows, device=starts.device)
    sequence = (row[:, None] >= starts[1:]).sum(1)
    return sequence, row - starts[sequence], starts[1:] - starts[:-1]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    distance: torch.Tensor,
    bias: torch.Tensor | None,
    slopes: torch.Tensor | None,
    dropout_p: float,
    keep: torch.Tensor | None,
    scale: float | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` where it is known what is visible; everything that is not a row broadcasts to (B, H, T, S)."""
    (batch, heads, time, width), (_, kv_heads, source, _) = query.shape, key.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    visible = visible.expand(batch, heads, time, source)
    q = query.to(dtype)
    group = heads // kv_heads if kv_heads else 1  # query head h reads key head h // group
    k, v = (
        x.to(dtype)[:, :, None].expand(batch, kv_heads, group, source, x.shape[3]).flatten(1, 2) for x in (key, value)
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
    if slopes is not None:
        scores = scores - torch.where(visible, slopes.to(dtype) * distance.abs().to(dtype), 0)
    alive = visible.any(-1)
    # A row that sees nothing is filled with zeros, so that no NaN arises in it, and its results are put in afterwards.
    hidden = torch.where(alive, -math.inf, 0.0).to(dtype)[..., None]
    scores = torch.where(visible, scores, hidden)
    # Less the greatest score: beside one of 1e38, logsumexp's own result, of which its derivative is made, has no room
    # for the logarithm of how many there are.
    peak = scores.detach().amax(-1, keepdim=True) if source else hidden
    lse = peak[..., 0] + (scores - peak).exp().sum(-1).log()
    lse = torch.where(alive, lse, -math.inf)
    weights = torch.where(visible, torch.softmax(scores, -1), 0)
    # Before dropout: what isn't finite is seen, and spoils the row's gradient too, be its weight dropped or not.
    taint = (weights * torch.where(visible, _taint(v)[:, :, None], 0)).sum(-1, keepdim=True)
    if keep is not None:
        weights = torch.where(keep, weights / (1 - dropout_p), 0) if dropout_p < 1 else weights * 0
    out = weights @ _clean(v) + taint
    return torch.where(alive[..., None], out, 0).to(query.dtype).contiguous(), lse
