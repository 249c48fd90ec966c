"""What generation carries from one step to the next."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

Parameters = Callable[[], tuple[list[torch.Tensor], list[torch.Tensor], bool]]
StepWeights = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor | None]


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
    each step; and from its second step on a copy of the stack's weights in the order in which steps read them.

    A step sees that weights changed, and takes them as they are, when an operation in place changed any of them (an
    optimizer, `load_state_dict`) or when all of them lie elsewhere (`to`, `vector_to_parameters`). It can't see what is
    written through `parameter.data`, nor that a single parameter was put in another's place: after these call
    `forget_weights`, or begin with a new state.

    Attributes:
        ring: (B, the sum of all spans times channels), the rings one after the other, each (span, channels).
        position: () int64 beside it, how many inputs came since the rings began.
        spans: (K-1) dilation of each ring.
        channels: of each ring.
    """

    def __init__(
        self, ring: torch.Tensor, position: torch.Tensor, spans: Sequence[int], channels: Sequence[int]
    ) -> None:
        self.ring, self.position, self.spans, self.channels = ring, position, tuple(spans), tuple(channels)
        self._weights = _PackedWeights()

    @classmethod
    def zeros(
        cls,
        batch: int,
        spans: Sequence[int],
        channels: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "ConvStackState":
        """The state before the first position."""
        elements = sum(span * width for span, width in zip(spans, channels, strict=True))
        ring = torch.zeros(batch, elements, dtype=dtype, device=device)
        return cls(ring, torch.zeros((), dtype=torch.int64, device=ring.device), spans, channels)

    def ordered(self) -> list[torch.Tensor]:
        """For each ring its inputs before the next position, oldest first: (B, C, (K-1) dilation)."""
        sizes = list(zip(self.spans, self.channels, strict=True))
        rings = self.ring.split([span * channels for span, channels in sizes], dim=1)
        return [
            ordered(ring.unflatten(1, size), self.position).transpose(1, 2).contiguous()
            for ring, size in zip(rings, sizes, strict=True)
        ]

    def reorder(self, index: torch.Tensor) -> "ConvStackState":
        """A new state whose row i is a copy of row index[i]; index (B',) may repeat or leave out rows (beam search)."""
        other = type(self)(self.ring.index_select(0, index), self.position.clone(), self.spans, self.channels)
        other._weights = self._weights
        return other

    def replace(self, states: Sequence[torch.Tensor], in_place: bool) -> None:
        """Takes what `ordered` would give after the step; with new tensors where the old ones must survive."""
        ring = torch.cat([state.transpose(1, 2).flatten(1) for state in states], dim=1)
        if in_place:
            self.ring.copy_(ring)
            self.position.zero_()
        else:
            self.ring, self.position = ring, torch.zeros_like(self.position)

    def weights_of_step(self, mark: torch.Tensor, parameters: Parameters) -> StepWeights:
        """The weights and biases of a step's kernel as they lie and None, or empty lists and all of them packed. `mark`
        is one of them; `parameters` gives them, and whether they are modules' own."""
        return self._weights.find(mark, parameters)

    def forget_weights(self) -> None:
        """Makes the next step take the weights as they are."""
        self._weights = _PackedWeights()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weights": _PackedWeights()}  # the copy of a stack has other parameters


class _PackedWeights:
    """A stack's weights and biases packed for its steps, and what tells that they changed."""

    def __init__(self) -> None:
        self.data: torch.Tensor | None = None
        self.mark: torch.Tensor | None = None
        self.address = 0
        self.versions: list[int] = []
        self.aliases: list[torch.Tensor] = []  # share the parameters' memory and count its versions

    def find(self, mark: torch.Tensor, parameters: Parameters) -> StepWeights:
        if self.data is not None:
            same = mark is self.mark and mark.data_ptr() == self.address
            if same and [alias._version for alias in self.aliases] == self.versions:
                return [], [], self.data
            self.data, self.aliases, self.versions = None, [], []
        weights, biases, own = parameters()
        tensors = weights + biases
        if not own or any(tensor.is_inference() or not tensor.is_contiguous() for tensor in tensors):
            return weights, biases, None
        versions = [tensor._version for tensor in tensors]
        if versions == self.versions:  # two steps found the same: a third is to be expected
            self.aliases = [tensor.detach() for tensor in tensors]
            self.mark, self.address = mark, mark.data_ptr()
            self.data = torch.ops.s2s.conv_stack_pack(weights, biases)
            return [], [], self.data
        self.versions = versions
        return weights, biases, None


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
