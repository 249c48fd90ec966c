"""Heads on CUDA tensors as rows of a batch, one head's after the other's: (heads B, ..., units of a head)."""

import torch


def apart(values: torch.Tensor, heads: int, gates: int = 1) -> torch.Tensor:
    """(B, ..., gates H) as (heads B, ..., gates H / heads), contiguous."""
    parts = values.unflatten(-1, (gates, heads, values.shape[-1] // gates // heads)).movedim(-2, 0)
    return parts.reshape(heads * values.shape[0], *values.shape[1:-1], values.shape[-1] // heads)


def together(values: torch.Tensor, heads: int, gates: int = 1) -> torch.Tensor:
    """What `apart` was given."""
    size = values.shape[-1] // gates
    parts = values.unflatten(0, (heads, values.shape[0] // heads)).unflatten(-1, (gates, size)).movedim(0, -2)
    return parts.reshape(values.shape[0] // heads, *values.shape[1:-1], values.shape[-1] * heads)
