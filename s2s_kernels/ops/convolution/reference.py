"""The definition of causal convolution: plain PyTorch, differentiable any number of times."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def padding(kernel_size: int, dilation: int, causal: bool) -> tuple[int, int]:
    """How many positions before and after the sequence the taps reach."""
    span = (kernel_size - 1) * dilation
    left = span if causal else span // 2
    return left, span - left


def activate(u: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The activation along channels (dimension 1); the gates halve them: a is the first half, b the second."""
    if activation is None:
        return u
    if activation == "gelu":
        return F.gelu(u)
    if activation == "glu":
        return F.glu(u, dim=1)
    if activation == "gated_tanh":
        a, b = u.chunk(2, dim=1)
        return torch.tanh(a) * torch.sigmoid(b)
    return {"relu": torch.relu, "silu": F.silu, "tanh": torch.tanh}[activation](u)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    causal: bool = True,
    condition: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[b, :, t] = activation(bias + sum_k weight[:, :, k] x[b, :, t - left + k dilation] + condition[b, :, t]) +
    residual[b, :, t], over the taps that fall on a present position; 0 where t is absent. condition (B, C_out,
    T or 1) is what a WaveNet layer is conditioned on."""
    (batch, channels, time), (outputs, _, taps) = x.shape, weight.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    left, right = padding(taps, dilation, causal)
    position = torch.arange(-left, time + right, device=x.device)  # of the padded sequence
    present = (position < time) & (position >= (0 if initial_state is None else -left))
    if lengths is not None:
        present = present & (position < lengths[:, None])
    present = present.expand(batch, left + time + right)[:, None]
    before = x.new_zeros(batch, channels, left) if initial_state is None else initial_state
    padded = torch.cat([before, x, x.new_zeros(batch, channels, right)], dim=2)
    # A product with an absent position is dropped rather than zeroed beforehand alone: 0 times an infinite weight is
    # no zero.
    padded = torch.where(present, padded, 0).to(dtype).unflatten(1, (groups, channels // groups))
    weight = weight.to(dtype).unflatten(0, (groups, outputs // groups))
    u = x.new_zeros((), dtype=dtype) if bias is None else bias.to(dtype)[:, None]
    u = u.expand(batch, outputs, time)
    for k in range(taps):
        window = slice(k * dilation, k * dilation + time)
        product = torch.einsum("bgct,goc->bgot", padded[..., window], weight[..., k]).flatten(1, 2)
        u = u + torch.where(present[..., window], product, 0)
    here = present[..., left : left + time]
    if condition is not None:
        u = u + torch.where(here, condition, 0).to(dtype)
    y = activate(u, activation)
    if residual is not None:
        y = y + residual.to(dtype)
    if lengths is not None:
        y = torch.where(here, y, 0)
    return y.to(x.dtype).contiguous()


def final_state(
    x: torch.Tensor, span: int, lengths: torch.Tensor | None = None, initial_state: torch.Tensor | None = None
) -> torch.Tensor:
    """The `span` inputs before position T, or before position `length`, oldest first: (B, C_in, span)."""
    batch, channels, time = x.shape
    before = x.new_zeros(batch, channels, span) if initial_state is None else initial_state
    if lengths is None:
        return torch.cat([before[:, :, time:], x[:, :, torch.sym_max(time - span, 0) :]], dim=2)
    padded = torch.cat([before, x], dim=2)
    index = lengths[:, None] + torch.arange(span, device=x.device)
    return padded.gather(2, index[:, None].expand(batch, channels, span))


def causal_conv1d_step(
    x_t: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: torch.Tensor | None = None,
    condition: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One position: x_t (B, C_in) after the inputs `state` (B, C_in, span) gives y_t (B, C_out) and the next state."""

    def column(value: torch.Tensor | None) -> torch.Tensor | None:
        return None if value is None else value[:, :, None]

    x = x_t[:, :, None]
    y = causal_conv1d(
        x,
        weight,
        bias,
        dilation=dilation,
        groups=groups,
        activation=activation,
        residual=column(residual),
        initial_state=state,
        condition=column(condition),
    )
    return y[:, :, 0], final_state(x, state.shape[2], None, state)


def wavenet_step(
    x_t: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    dilations: Sequence[int],
    condition: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One position through a stack of WaveNet layers: the sum of their skip outputs (B, S), and the next states.
    weights and biases: those of conv and of W of each layer, one after the other.

    u = conv(x) + condition, z = tanh(u[:C]) sigmoid(u[C:]), [r, s] = W z + b, x = x + r, skip = skip + s (van den
    Oord et al. 2016)."""
    channels = x_t.shape[1]
    skip: torch.Tensor | None = None
    following = []
    for layer, dilation in enumerate(dilations):
        rows = slice(layer * 2 * channels, (layer + 1) * 2 * channels)
        z, state = causal_conv1d_step(
            x_t,
            states[layer],
            weights[2 * layer],
            biases[2 * layer],
            dilation=dilation,
            activation="gated_tanh",
            condition=None if condition is None else condition[:, rows],
        )
        both = causal_conv1d(z[:, :, None], weights[2 * layer + 1], biases[2 * layer + 1])[:, :, 0]
        x_t = x_t + both[:, :channels]
        skip = both[:, channels:] if skip is None else skip + both[:, channels:]
        following.append(state)
    assert skip is not None
    return skip, following


def tcn_step(
    x_t: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    biases: list[torch.Tensor],
    dilations: Sequence[int],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One position through a stack of TCN blocks: the last one's result, and the next states, two a block. weights and
    biases: those of a block's first convolution, of the 1x1 one where its result has other channels, and of its second.

    y = relu(match(x) + relu(conv2(relu(conv1(x))))), match being the identity or the 1x1 convolution (Bai et al.
    2018)."""
    parameters = iter(zip(weights, biases, strict=True))
    before, following = iter(states), []

    def convolve(x: torch.Tensor, dilation: int, residual: torch.Tensor | None = None) -> torch.Tensor:
        y, state = causal_conv1d_step(
            x, next(before), *next(parameters), dilation=dilation, activation="relu", residual=residual
        )
        following.append(state)
        return y

    for dilation in dilations:
        hidden = convolve(x_t, dilation)
        if hidden.shape[1] != x_t.shape[1]:
            weight, bias = next(parameters)
            x_t = causal_conv1d(x_t[:, :, None], weight, bias)[:, :, 0]
        x_t = torch.relu(convolve(hidden, dilation, x_t))
    return x_t, following
