"""What generation carries from one step to the next."""

from collections.abc import Sequence

import torch


class ConvState:
    """The inputs that a causal convolution still sees: a ring and its position, updated in place by each step.

    Args:
        state: (B, C, (K-1) dilation), the inputs before the next position, oldest first: what
            `causal_conv1d(..., return_state=True)` returns. It is copied.

    Attributes:
        ring: (B, (K-1) dilation, C).
        position: () int64 beside it, the slot of the oldest input, which the next step overwrites.
    """

    def __init__(self, state: torch.Tensor) -> None:
        if state.dim() != 3:
            raise ValueError(f"ConvState: state must be (B, C, (K-1) dilation), got {tuple(state.shape)}")
        self.ring = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        self.position = torch.zeros((), dtype=torch.int64, device=state.device)

    @classmethod
    def zeros(
        cls,
        batch: int,
        channels: int,
        kernel_size: int,
        dilation: int = 1,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ConvState":
        """The state before the first position."""
        return cls(torch.zeros(batch, channels, (kernel_size - 1) * dilation, dtype=dtype, device=device))

    def ordered(self) -> torch.Tensor:
        """The inputs before the next position, oldest first: (B, C, (K-1) dilation)."""
        return ordered(self.ring, self.position).transpose(1, 2).contiguous()

    def reorder(self, index: torch.Tensor) -> "ConvState":
        """A new state whose row i is a copy of row index[i]; index (B',) may repeat or leave out rows (beam search)."""
        return _like(self, self.ring.index_select(0, index), self.position.clone())

    def advance(self, x_t: torch.Tensor, in_place: bool) -> None:
        """Puts the input x_t (B, C) in the place of the oldest one; with new tensors where the old ones must
        survive."""
        self.ring, self.position = advanced(self.ring, self.position, x_t, in_place)


class ConvStackState:
    """What a stack of dilated causal convolutions carries: one ring a layer, in one tensor, updated in place by each
    step.

    Attributes:
        ring: (B, the sum of all (K-1) dilation, C), the layers' rings one after the other.
        position: () int64 beside it, how many inputs came since the rings began.
        spans: (K-1) dilation of each layer.
    """

    def __init__(self, ring: torch.Tensor, position: torch.Tensor, spans: tuple[int, ...]) -> None:
        self.ring, self.position, self.spans = ring, position, spans

    @classmethod
    def zeros(
        cls,
        batch: int,
        channels: int,
        kernel_size: int,
        dilations: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ConvStackState":
        """The state before the first position."""
        spans = tuple((kernel_size - 1) * dilation for dilation in dilations)
        ring = torch.zeros(batch, sum(spans), channels, dtype=dtype, device=device)
        return cls(ring, torch.zeros((), dtype=torch.int64, device=ring.device), spans)

    def ordered(self) -> list[torch.Tensor]:
        """For each layer its inputs before the next position, oldest first: (B, C, (K-1) dilation)."""
        rings = self.ring.split(self.spans, dim=1)
        return [ordered(ring, self.position).transpose(1, 2).contiguous() for ring in rings]

    def reorder(self, index: torch.Tensor) -> "ConvStackState":
        """A new state whose row i is a copy of row index[i]; index (B',) may repeat or leave out rows (beam search)."""
        return type(self)(self.ring.index_select(0, index), self.position.clone(), self.spans)

    def replace(self, states: Sequence[torch.Tensor], in_place: bool) -> None:
        """Takes what `ordered` would give after the step; with new tensors where the old ones must survive."""
        ring = torch.cat([state.transpose(1, 2) for state in states], dim=1)
        if in_place:
            self.ring.copy_(ring)
            self.position.zero_()
        else:
            self.ring, self.position = ring, torch.zeros_like(self.position)


def ordered(ring: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A ring (B, span, C) unrolled, oldest first."""
    span = ring.shape[1]
    slots = position + torch.arange(span, device=ring.device)
    return ring.index_select(1, slots % max(span, 1))


def advanced(
    ring: torch.Tensor, position: torch.Tensor, x_t: torch.Tensor, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A ring (B, span, C) and its position after the input x_t (B, C)."""
    span = ring.shape[1]
    if span == 0:
        return ring, position
    if not in_place:
        return torch.cat([ordered(ring, position)[:, 1:], x_t[:, None]], dim=1), torch.zeros_like(position)
    ring.index_copy_(1, position[None], x_t[:, None])
    position.add_(1).remainder_(span)
    return ring, position


def _like(state: ConvState, ring: torch.Tensor, position: torch.Tensor) -> ConvState:
    other = object.__new__(type(state))
    other.ring, other.position = ring, position
    return other
