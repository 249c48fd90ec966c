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
    """What a stack of dilated causal convolutions carries: one ring a convolution, in one tensor, updated in place by
    each step.

    A prepared state holds the stack's weights too, in the order in which the steps of the cpu backend read them, which
    makes those faster: later changes of parameters don't reach a prepared state. A step with one raises
    NotImplementedError where the reference would serve: a gradient to record, a transform of torch.func.

    Attributes:
        ring: (B, the sum of all spans times channels), the rings one after the other, each (span, channels).
        position: () int64 beside it, how many inputs came since the rings began.
        spans: (K-1) dilation of each ring.
        channels: of each ring.
        packed: (N,), the weights and biases that a prepared state holds; None where steps read the parameters.
    """

    def __init__(
        self,
        ring: torch.Tensor,
        position: torch.Tensor,
        spans: Sequence[int],
        channels: Sequence[int],
        packed: torch.Tensor | None = None,
    ) -> None:
        self.ring, self.position, self.spans, self.channels = ring, position, tuple(spans), tuple(channels)
        self.packed = packed

    @classmethod
    def zeros(
        cls,
        batch: int,
        spans: Sequence[int],
        channels: Sequence[int],
        packed: torch.Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ConvStackState":
        """The state before the first position."""
        elements = sum(span * width for span, width in zip(spans, channels, strict=True))
        ring = torch.zeros(batch, elements, dtype=dtype, device=device)
        return cls(ring, torch.zeros((), dtype=torch.int64, device=ring.device), spans, channels, packed)

    def ordered(self) -> list[torch.Tensor]:
        """For each ring its inputs before the next position, oldest first: (B, C, (K-1) dilation)."""
        sizes = list(zip(self.spans, self.channels, strict=True))
        rings = self.ring.split([span * channels for span, channels in sizes], dim=1)
        return [
            ordered(ring.unflatten(1, size), self.position).transpose(1, 2).contiguous()
            for ring, size in zip(rings, sizes, strict=True)
        ]

    def reorder(self, index: torch.Tensor) -> "ConvStackState":
        """A new state whose row i is a copy of row index[i]; index (B',) may repeat or leave out rows (beam search).
        Both hold the same packed weights."""
        ring = self.ring.index_select(0, index)
        return type(self)(ring, self.position.clone(), self.spans, self.channels, self.packed)

    def replace(self, states: Sequence[torch.Tensor], in_place: bool) -> None:
        """Takes what `ordered` would give after the step; with new tensors where the old ones must survive."""
        ring = torch.cat([state.transpose(1, 2).flatten(1) for state in states], dim=1)
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
