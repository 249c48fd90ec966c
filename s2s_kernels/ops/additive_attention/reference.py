"""The definition of additive attention: plain PyTorch, differentiable any number of times."""

import torch


def visible_positions(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, key_lengths: torch.Tensor | None
) -> torch.Tensor:
    """Which keys each row may attend to (B, T, S)."""
    (batch, rows, _), keys = query.shape, key.shape[1]
    visible = torch.ones(batch, rows, keys, dtype=torch.bool, device=query.device)
    if key_lengths is not None:
        visible = visible & (torch.arange(keys, device=query.device) < key_lengths[:, None, None])
    return visible if mask is None else visible & mask


def masked_softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Softmax over the visible positions of the last dimension; hidden ones, and rows without any, give 0."""
    if scores.shape[-1] == 0:
        return scores
    empty = ~visible.any(-1, keepdim=True)
    scores = torch.where(visible, scores, -torch.inf)
    return torch.where(visible, torch.where(empty, 0, scores).softmax(-1), 0)


def additive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weight: torch.Tensor,
    visible: torch.Tensor,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Context (B, T, Dv) and weights (B, T, S) before dropout; `keep` (B, T, S) says which weights dropout leaves."""
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    query, key, value, weight = (t.to(wide) for t in (query, key, value, weight))
    # Selecting before each step, not multiplying by 0 after it: what is hidden may be NaN.
    sums = torch.where(visible[..., None], query[:, :, None] + key[:, None], 0)
    weights = masked_softmax((sums.tanh() * weight).sum(-1), visible)
    used = weights
    if keep is not None:
        used = torch.where(keep, weights * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0), 0)
    context = torch.where(visible[..., None], used[..., None] * value[:, None], 0).sum(2)
    return context.to(dtype), weights.to(dtype)


def attention_pool(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    context: torch.Tensor,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled (B, I) and weights (B, T)."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    if lengths is not None:
        present = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    x = torch.where(present[..., None], x, 0).to(wide)
    scores = (x @ weight.to(wide).mT + bias.to(wide)).tanh() @ context.to(wide)
    weights = masked_softmax(scores, present)
    return (weights[..., None] * x).sum(1).to(dtype), weights.to(dtype)
