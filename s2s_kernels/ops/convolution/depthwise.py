"""Depthwise causal convolution under the argument names of the well-known package for it, so that its users need change
no more than an import."""

from typing import Any

import torch
import torch.nn.functional as F

from ... import checks
from . import causal_conv1d

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: torch.Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Depthwise causal convolution of whole sequences.

    Args:
        x: (B, C, T), any strides; float64, float32, bfloat16 or float16.
        weight: (C, K), oldest tap first; taken in x's dtype, as bias is.
        bias: (C,).
        seq_idx: (B, T) integers: a position sees those of its own number only, and a negative number is padding, whose
            result is 0. Made of torch's own operations, one pass a tap. Refused beside a state.
        initial_states: (B, C, K-1), the inputs before position 0, oldest first.
        return_final_states: also return the inputs before position T, in the same form.
        final_states_out: (B, C, K-1) of x's dtype, into which they are written.
        activation: None, "silu" or "swish", which are one.

    Returns:
        y (B, C, T) in x's dtype, contiguous; (y, final states) if `return_final_states`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "causal_conv1d_fn"
    checks.data(name, "x", x, 3, "(B, C, T)")
    batch, channels, time = x.shape
    weight, bias, activation = _parameters(name, x, weight, bias, activation)
    shape = (batch, channels, weight.shape[2] - 1)
    checks.like(name, "initial_states", initial_states, x, "x", shape, "(B, C, K-1)")
    checks.like(name, "final_states_out", final_states_out, x, "x", shape, "(B, C, K-1)")
    if final_states_out is not None and not return_final_states:
        checks.wrong_value(name, "final_states_out", "absent unless return_final_states", "one")
    if seq_idx is not None:
        for argument, given in (
            ("initial_states", initial_states is not None),
            ("return_final_states", return_final_states),
        ):
            if given:
                checks.wrong_value(name, argument, "absent beside seq_idx", "one")
        _integers(name, "seq_idx", seq_idx, x, (batch, time), "(B, T)")
        return _segments(x, weight, bias, seq_idx, activation)
    found = causal_conv1d(
        x, weight, bias, groups=channels, activation=activation, initial_state=initial_states,
        return_state=return_final_states,
    )  # fmt: skip
    if final_states_out is None:
        return found
    y, states = found
    with torch.no_grad():
        final_states_out.copy_(states)
    return y, final_states_out


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next position, or the next few, of sequences whose last inputs are kept; the state is updated in place.

    Args:
        x: (B, C), or (B, C, T).
        conv_state: (B, C, L) of x's dtype, L >= K-1: the last L inputs, oldest first; or a ring, see cache_seqlens.
            Gradients don't flow through it to earlier calls.
        weight, bias, activation: as `causal_conv1d_fn`.
        cache_seqlens: (B,) integers, how many inputs came before: conv_state is then a ring, in which input number i
            has the place i modulo L; T must not exceed L.
        conv_state_indices: (B,) integers, the row of conv_state (N, C, L) that belongs to each row of x; no row twice.

    Returns:
        y in the shape of x.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    name = "causal_conv1d_update"
    checks.tensor(name, "x", x)
    one = x.dim() == 2
    inputs = x.unsqueeze(2) if one else x
    checks.data(name, "x", inputs, 3, "(B, C) or (B, C, T)")
    batch, channels, time = inputs.shape
    weight, bias, activation = _parameters(name, inputs, weight, bias, activation)
    reach = weight.shape[2] - 1
    checks.data(name, "conv_state", conv_state, 3, "(B, C, L)")
    length = conv_state.shape[2]
    rows = conv_state.shape[0] if conv_state_indices is not None else batch
    checks.like(name, "conv_state", conv_state, x, "x", (rows, channels, length), "(B, C, L)")
    if length < reach:
        checks.wrong_value(name, "conv_state", f"at least K-1 = {reach} long", length)
    if cache_seqlens is not None:
        _integers(name, "cache_seqlens", cache_seqlens, x, (batch,), "(B,)")
        if time > length:
            checks.wrong_value(name, "x", f"at most as long as conv_state, {length}, under cache_seqlens", time)
    kept = conv_state.detach()
    if conv_state_indices is not None:
        _integers(name, "conv_state_indices", conv_state_indices, x, (batch,), "(B,)")
        if checks.readable(conv_state_indices) and batch:
            smallest, largest = (int(v) for v in torch.aminmax(conv_state_indices))
            if smallest < 0 or largest >= rows:
                checks.wrong_value(name, "conv_state_indices", f"in [0, {rows})", f"values in [{smallest}, {largest}]")
        kept = kept.index_select(0, conv_state_indices)
    new = inputs.detach()
    if cache_seqlens is None:
        before = kept[:, :, length - reach :].clone()
        after = torch.cat([kept, new], 2)[:, :, time:]
    else:
        at = cache_seqlens.to(torch.int64)[:, None]
        before = kept.gather(2, _places(at + torch.arange(-reach, 0, device=x.device), length, channels))
        after = kept.scatter(2, _places(at + torch.arange(time, device=x.device), length, channels), new)
    y = causal_conv1d(inputs, weight, bias, groups=channels, activation=activation, initial_state=before)
    with torch.no_grad():
        if conv_state_indices is None:
            conv_state.copy_(after)
        else:
            conv_state.index_copy_(0, conv_state_indices.to(torch.int64), after)
    return y.squeeze(2) if one else y


def _parameters(
    name: str, x: torch.Tensor, weight: Any, bias: Any, activation: Any
) -> tuple[torch.Tensor, torch.Tensor | None, str | None]:
    """weight (C, 1, K) and bias in x's dtype, and the activation by our name for it; checked."""
    checks.tensor(name, "weight", weight)
    channels = x.shape[1]
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] == 0:
        checks.wrong_value(name, "weight", f"(C, K) with C = {channels}", tuple(weight.shape))
    checks.choice(name, "activation", activation, (None, "silu", "swish"))
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.tensor(name, argument, value)
            if value.dtype not in checks.DTYPES:
                checks.wrong_type(name, argument, "float64, float32, bfloat16 or float16", value.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    weight = weight.to(x.dtype)
    checks.like(name, "weight", weight, x, "x", weight.shape, "(C, K)")
    checks.like(name, "bias", bias, x, "x", (channels,), "(C,)")
    return weight.unsqueeze(1), bias, None if activation is None else "silu"


def _integers(name: str, argument: str, value: Any, x: torch.Tensor, shape: tuple[int, ...], layout: str) -> None:
    checks.tensor(name, argument, value)
    if value.dtype not in (torch.int32, torch.int64):
        checks.wrong_type(name, argument, "an int32 or int64 tensor", value.dtype)
    checks.beside(name, argument, value, x, "x")
    if tuple(value.shape) != shape:
        checks.wrong_value(name, argument, f"{layout} = {shape}", tuple(value.shape))


def _places(positions: torch.Tensor, length: int, channels: int) -> torch.Tensor:
    """Places (B, n) of a ring of this length, for every channel: (B, C, n)."""
    return positions.remainder(max(length, 1))[:, None].expand(-1, channels, -1)


def _segments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor, activation: str | None
) -> torch.Tensor:
    """Only the taps of a position's own segment count; a product that doesn't is dropped, not multiplied by 0."""
    time, taps = x.shape[2], weight.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    with checks.without_autocast(x):
        zero = x.new_zeros((), dtype=wide)
        u = (zero if bias is None else bias.to(wide)[:, None]).expand(x.shape)
        for tap in range(taps):
            shift = min(taps - 1 - tap, time)
            earlier = F.pad(x, (shift, 0))[:, :, :time].to(wide)
            own = F.pad(seq_idx, (shift, 0), value=-1)[:, :time] == seq_idx
            u = u + torch.where(own[:, None], earlier * weight[:, 0, tap, None].to(wide), zero)
        y = u if activation is None else F.silu(u)
        return torch.where(seq_idx[:, None] >= 0, y, zero).to(x.dtype).contiguous()
