"""What generation carries from one step to the next."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .. import checks


class KVCache:
    """The keys and values that attention has seen, in buffers allocated once, with a length per row; each `append`
    updates it in place.

    Decoding a chunk of T new positions, T = 1 included, is
    ``key, value, lengths = cache.append(key, value)`` and
    ``attention(query, key, value, key_lengths=lengths, causal="bottom-right")``: the same as causal attention over the
    whole sequence. Shapes never change, so that torch.compile compiles once, and a CUDA graph can hold a step.

    No gradient is recorded through a cache: `append` refuses keys and values that ask for one, so decode under
    `torch.no_grad()`.

    Args:
        batch: B.
        kv_heads: Hkv, the heads of keys and values, which grouped heads of queries share.
        max_length: S, the most positions that a row can hold.
        head_dim: D.
        dtype, device: of the buffers.

    Attributes:
        key, value: (B, Hkv, S, D).
        lengths: (B,) int64 beside them, how many positions each row holds. What lies past them is no content.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        for name, size in (("batch", batch), ("max_length", max_length)):
            if checks.integer("KVCache", name, size) < 0:
                checks.wrong_value("KVCache", name, "at least 0", size)
        for name, size in (("kv_heads", kv_heads), ("head_dim", head_dim)):
            if checks.integer("KVCache", name, size) <= 0:
                checks.wrong_value("KVCache", name, "at least 1", size)
        self.key = torch.zeros(batch, kv_heads, max_length, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.key.device)

    def append(
        self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Writes T new positions of each row behind those it holds.

        Args:
            key, value: (B, Hkv, T, D), T at most S.
            lengths: (B,) int32 or int64, on the CPU or beside the cache: how many of the T each row has, all if None.
                The rest is not kept. Attention over such a chunk takes them as its query_lengths.

        Returns:
            the attributes key, value (B, Hkv, S, D) and lengths (B,), for attention's key_lengths: the cache's own
            tensors, which the next append changes.

        Raises:
            TypeError, ValueError: an argument is not as above, or a row would be longer than S; the cache is as it was.
                What can't be read without waiting (on a GPU, in a compiled graph) isn't refused: lengths are clamped,
                and that there is room is asserted on the device under S2S_DEBUG=1.
            NotImplementedError: a gradient is to be recorded.
        """
        name, (batch, heads, capacity, width) = "KVCache.append", self.key.shape
        checks.data(name, "key", key, 4, "(B, Hkv, T, D)")
        time = key.shape[2]
        checks.like(name, "key", key, self.key, "the cache", (batch, heads, time, width), "(B, Hkv, T, D)")
        checks.like(name, "value", value, self.key, "the cache", (batch, heads, time, width), "(B, Hkv, T, D)")
        if time > capacity:
            checks.wrong_value(name, "key", f"of at most S = {capacity} positions", tuple(key.shape))
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise NotImplementedError(f"{name}: no gradient is recorded through a cache: call it under torch.no_grad()")
        lengths = checks.lengths(name, "lengths", lengths, self.key, batch, time)
        if lengths is not None:
            lengths = lengths.clamp(0, time)  # those that the check couldn't read
        total = self.lengths + (time if lengths is None else lengths)
        self._check_space(name, total, batch)
        rows, steps = (torch.arange(n, device=self.key.device) for n in (batch, time))
        # Distinct slots, even of positions that a row doesn't have and that may lie past the end: those get back what
        # they hold.
        slots = (self.lengths[:, None] + steps).remainder(capacity)  # (B, T)
        for buffer, new in ((self.key, key), (self.value, value)):
            new = new.transpose(1, 2)  # (B, T, Hkv, D)
            if lengths is not None:
                new = torch.where((steps < lengths[:, None])[:, :, None, None], new, buffer[rows[:, None], :, slots])
            buffer[rows[:, None], :, slots] = new.detach()
        self.lengths.copy_(total)
        return self.key, self.value, self.lengths

    def crop(self, length: int | torch.Tensor) -> None:
        """Forgets each row's positions from `length`, an int or (B,) int32 or int64, on; a shorter row stays as it
        is."""
        batch, _, capacity, _ = self.key.shape
        if isinstance(length, torch.Tensor):
            limit = checks.lengths("KVCache.crop", "length", length, self.key, batch, capacity, "S")
            self.lengths.copy_(torch.minimum(self.lengths, limit.clamp(min=0)))  # type: ignore[union-attr]
            return
        if checks.integer("KVCache.crop", "length", length) < 0:
            checks.wrong_value("KVCache.crop", "length", "at least 0", length)
        self.lengths.clamp_(max=length)

    def reorder(self, index: torch.Tensor) -> "KVCache":
        """A new cache whose row i is a copy of row index[i]; index (B',) may repeat or leave out rows (beam search)."""
        index = checks.indices("KVCache.reorder", "index", index, self.key, self.key.shape[0])
        return self._of(*(x.index_select(0, index) for x in (self.key, self.value, self.lengths)))

    def to(self, *args: Any, **kwargs: Any) -> "KVCache":
        """A cache with `Tensor.to` of the keys and values, and the lengths beside them."""
        key, value = self.key.to(*args, **kwargs), self.value.to(*args, **kwargs)
        lengths = self.lengths.to(key.device)
        return self._of(key, value, lengths if key is self.key else lengths.clone())

    def __repr__(self) -> str:
        names = ("batch", "kv_heads", "max_length", "head_dim")
        sizes = ", ".join(f"{name}={size}" for name, size in zip(names, self.key.shape, strict=True))
        return f"{type(self).__name__}({sizes}, dtype={self.key.dtype}, device={self.key.device})"

    def _check_space(self, name: str, total: torch.Tensor, batch: int) -> None:
        capacity = self.key.shape[2]
        if not checks.readable(total):
            checks.assure(lambda: total <= capacity, f"{name}: the cache is full")
        elif batch and (longest := int(total.max())) > capacity:
            checks.wrong_value(
                name, "key", f"of positions for which there is room in S = {capacity}", f"{longest} in all"
            )

    def _of(self, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> "KVCache":
        other = object.__new__(type(self))
        other.key, other.value, other.lengths = key, value, lengths
        return other


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionKeys:
    """Keys and values of `nn.MultiheadAttention`, projected once by its `prepare` for queries that come step by step,
    and passed as `key`. Later changes of parameters don't reach them.

    Attributes:
        key, value: (B, H, S, D), with the learned key and the one of zeros of a layer that adds them.
        key_padding_mask: (B, S) without those, as given to `prepare`, or None.
        batched: whether they were given with a batch dimension.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_padding_mask: torch.Tensor | None
    batched: bool

    def reorder(self, index: torch.Tensor) -> "AttentionKeys":
        """The same for the rows `index` (B',) of the batch: beams reordered, duplicated or dropped."""
        index = checks.indices("AttentionKeys.reorder", "index", index, self.key, self.key.shape[0])
        key, value = (x.index_select(0, index) for x in (self.key, self.value))
        mask = self.key_padding_mask
        return AttentionKeys(key, value, None if mask is None else mask.index_select(0, index), self.batched)


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
        checks.data("ConvState", "state", state, 3, "(B, C, (K-1) dilation)")
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
        index = checks.indices("ConvState.reorder", "index", index, self.ring, self.ring.shape[0])
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
        index = checks.indices("ConvStackState.reorder", "index", index, self.ring, self.ring.shape[0])
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
