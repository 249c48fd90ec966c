"""Causal convolutions as layers."""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import convolution as ops
from .layer import Layer
from .state import ConvStackState, ConvState


class CausalConv1d(Layer):
    """`nn.Conv1d` that sees the past only: same parameters, same initialisation, output as long as the input.

    Args:
        in_channels, out_channels, kernel_size, groups, bias, device, dtype: as `nn.Conv1d`.
        dilation: distance in positions between neighbouring taps.
        activation: as `causal_conv1d`; a gate halves the channels of the result.

    Parameters: weight (out_channels, in_channels / groups, kernel_size), bias (out_channels,).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        activation: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.dilation, self.groups, self.activation = dilation, groups, activation
        # torch's own layer checks the sizes and draws the weights, so one seed gives the same ones here and there.
        like = nn.Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.weight = like.weight
        self.bias = like.bias

    def forward(
        self,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """x (B, in_channels, T) -> y (B, out_channels, T), or (y, state); arguments as `causal_conv1d`."""
        return ops.causal_conv1d(
            x,
            self.weight,
            self.bias,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            residual=residual,
            lengths=lengths,
            initial_state=initial_state,
            return_state=return_state,
        )

    def initial_state(self, batch: int) -> ConvState:
        """The state before the first position."""
        return ConvState.zeros(
            batch,
            self.in_channels,
            self.kernel_size,
            self.dilation,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )

    def step(self, x_t: torch.Tensor, state: ConvState, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """One position: x_t (B, in_channels) -> y_t; the state is updated in place."""
        return ops.causal_conv1d_step(
            x_t,
            state,
            self.weight,
            self.bias,
            dilation=self.dilation,
            groups=self.groups,
            activation=self.activation,
            residual=residual,
        )

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        text += "" if self.groups == 1 else f", groups={self.groups}"
        text += "" if self.bias is not None else ", bias=False"
        return text if self.activation is None else f"{text}, activation={self.activation!r}"


class GatedCausalConv1d(CausalConv1d):
    """A causal convolution to 2 out_channels, of which one half gates the other: "glu", a * sigmoid(b) (Dauphin et
    al. 2017), or "gated_tanh", tanh(a) * sigmoid(b) (van den Oord et al. 2016).

    Args:
        in_channels, out_channels, kernel_size, dilation: as `CausalConv1d`; out_channels is that of the result.
        gate: "glu" or "gated_tanh".

    Parameters: weight (2 out_channels, in_channels / groups, kernel_size), bias (2 out_channels,).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        dilation: int = 1,
        gate: str = "glu",
        *,
        groups: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if gate not in ("glu", "gated_tanh"):
            raise ValueError(f"GatedCausalConv1d: gate must be 'glu' or 'gated_tanh', got {gate!r}")
        super().__init__(
            in_channels,
            2 * out_channels,
            kernel_size,
            dilation=dilation,
            groups=groups,
            bias=bias,
            activation=gate,
            device=device,
            dtype=dtype,
        )


class WaveNetStack(Layer):
    """Gated dilated layers with residual and skip connections (van den Oord et al. 2016, "WaveNet").

    Layer l: u = conv_l(x) + condition_l; z = tanh(u[:C]) * sigmoid(u[C:]); [r, s] = W_l z + b_l; x = x + r;
    skip = skip + s.

    Args:
        channels: C, of x.
        skip_channels: S, of the result.
        dilations: one a layer.
        kernel_size: K, taps of each dilated convolution.

    Parameters: conv.{l}.weight (2C, C, K), conv.{l}.bias (2C,), out.{l}.weight (C+S, C, 1), out.{l}.bias (C+S,).
    """

    def __init__(
        self,
        channels: int,
        skip_channels: int,
        dilations: Sequence[int],
        kernel_size: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not dilations:
            raise ValueError("WaveNetStack: dilations must name at least one layer, got none")
        self.channels, self.skip_channels, self.kernel_size = channels, skip_channels, kernel_size
        self.dilations = tuple(dilations)

        def layer(outputs: int, taps: int, dilation: int, activation: str | None) -> CausalConv1d:
            return CausalConv1d(
                channels, outputs, taps, dilation=dilation, activation=activation, device=device, dtype=dtype
            )

        self.conv = nn.ModuleList(layer(2 * channels, kernel_size, d, "gated_tanh") for d in self.dilations)
        self.out = nn.ModuleList(layer(channels + skip_channels, 1, 1, None) for _ in self.dilations)

    def forward(self, x: torch.Tensor, condition: torch.Tensor | None = None) -> torch.Tensor:
        """x (B, C, T), condition (B, L 2C, T or 1) -> the sum of the skip outputs (B, S, T)."""
        skip: torch.Tensor | None = None
        for index, (conv, out) in enumerate(zip(self.conv, self.out, strict=True)):
            assert isinstance(conv, CausalConv1d)
            rows = slice(index * 2 * self.channels, (index + 1) * 2 * self.channels)
            z = ops.conditioned_conv1d(
                x,
                conv.weight,
                conv.bias,
                None if condition is None else condition[:, rows],
                dilation=conv.dilation,
                activation="gated_tanh",
            )
            both = out(z)
            x = x + both[:, : self.channels]
            skip = both[:, self.channels :] if skip is None else skip + both[:, self.channels :]
        assert skip is not None
        return skip.contiguous()

    def initial_state(self, batch: int, *, prepared: bool = False) -> ConvStackState:
        """The state before the first position.

        Args:
            prepared: it also holds the weights as they are now, for faster steps: later changes of parameters don't
                reach a prepared state (see `ConvStackState`).

        Raises:
            NotImplementedError: prepared where the cpu backend doesn't serve the stack.
        """
        weight = next(self.parameters())
        spans = [(self.kernel_size - 1) * dilation for dilation in self.dilations]
        packed = ops.pack_stack(ops.WAVENET, *self._in_order()) if prepared else None
        return ConvStackState.zeros(
            batch, spans, [self.channels] * len(spans), packed, dtype=weight.dtype, device=weight.device
        )

    def step(
        self, x_t: torch.Tensor, state: ConvStackState, condition: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ConvStackState]:
        """One position through all layers: x_t (B, C), condition (B, L 2C) -> (skip_t (B, S), state), the state
        updated in place."""
        sizes = (self.channels, self.kernel_size, self.skip_channels)
        return ops.wavenet_step(x_t, state, self._in_order, self.dilations, sizes, condition), state

    def _in_order(self) -> ops.StackParameters:
        return _parameters([layer for pair in zip(self.conv, self.out, strict=True) for layer in pair])

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.skip_channels}, dilations={self.dilations}, kernel_size={self.kernel_size}"


class TCNBlock(Layer):
    """Two dilated causal convolutions beside a skip connection (Bai et al. 2018, "An empirical evaluation of generic
    convolutional and recurrent networks for sequence modeling", figure 1b): y = relu(x + f(x)), where f is twice
    convolution, ReLU and dropout.

    Args:
        in_channels, channels: of the input and of the result; a 1x1 convolution matches them where they differ.
        kernel_size: K.
        dilation: of both convolutions.
        dropout: probability, in training.

    Parameters: conv1.weight (channels, in_channels, K), conv1.bias, conv2.weight (channels, channels, K), conv2.bias;
    match.weight (channels, in_channels, 1), match.bias where there is one.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        dilation: int,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def layer(inputs: int, taps: int, **options: Any) -> CausalConv1d:
            return CausalConv1d(inputs, channels, taps, device=device, dtype=dtype, **options)

        self.conv1 = layer(in_channels, kernel_size, dilation=dilation, activation="relu")
        self.conv2 = layer(channels, kernel_size, dilation=dilation, activation="relu")
        self.dropout = nn.Dropout(dropout)
        self.match = nn.Identity() if in_channels == channels else layer(in_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, T) -> (B, channels, T)."""
        skip, hidden = self.match(x), self.dropout(self.conv1(x))
        if self.training and self.dropout.p > 0:  # dropout stands between the convolution and the sum
            return F.relu(skip + self.dropout(self.conv2(hidden)))
        return F.relu(self.conv2(hidden, residual=skip))

    def in_order(self) -> list[nn.Module]:
        """The convolutions in the order in which a step uses them."""
        conv1, conv2, match = self.conv1, self.conv2, self.match
        return [conv1, conv2] if isinstance(match, nn.Identity) else [conv1, match, conv2]


class TCNStack(Layer):
    """Blocks of dilated causal convolutions, one after the other (Bai et al. 2018): see `TCNBlock`.

    Args:
        in_channels: of the input.
        channels: of each block's result.
        kernel_size: K, taps of each convolution; the 1x1 ones have one.
        dilations: one a block, 2^i for block i if None.
        dropout: probability, in training.

    Parameters: those of `TCNBlock` under blocks.{l}.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernel_size: int = 3,
        dilations: Sequence[int] | None = None,
        dropout: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dilations = tuple(2**i for i in range(len(channels))) if dilations is None else tuple(dilations)
        if not channels or len(self.dilations) != len(channels):
            given = f"{len(channels)} and {len(self.dilations)}"
            raise ValueError(f"TCNStack: channels and dilations must name the same blocks, at least one, got {given}")
        self.channels, self.kernel_size, self.dropout = (in_channels, *channels), kernel_size, dropout
        self.blocks = nn.Sequential(
            *(
                TCNBlock(self.channels[i], width, kernel_size, dilation, dropout, device=device, dtype=dtype)
                for i, (width, dilation) in enumerate(zip(channels, self.dilations, strict=True))
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, T) -> (B, channels[-1], T)."""
        return self.blocks(x)

    def initial_state(self, batch: int, *, prepared: bool = False) -> ConvStackState:
        """The state before the first position.

        Args:
            prepared: it also holds the weights as they are now, for faster steps: later changes of parameters don't
                reach a prepared state (see `ConvStackState`).

        Raises:
            NotImplementedError: prepared where the cpu backend doesn't serve the stack.
        """
        like = next(self.parameters())
        spans = [(self.kernel_size - 1) * dilation for dilation in self.dilations for _ in range(2)]
        channels = [width for pair in zip(self.channels, self.channels[1:], strict=False) for width in pair]
        packed = ops.pack_stack(ops.TCN, *self._in_order()) if prepared else None
        return ConvStackState.zeros(batch, spans, channels, packed, dtype=like.dtype, device=like.device)

    def step(self, x_t: torch.Tensor, state: ConvStackState) -> tuple[torch.Tensor, ConvStackState]:
        """One position through all blocks: x_t (B, in_channels) -> (y_t (B, channels[-1]), state), the state updated in
        place.

        Raises:
            ValueError: there is dropout to apply: a step is one of evaluation.
        """
        if self.training and self.dropout > 0:
            raise ValueError("TCNStack: step must be called in evaluation where dropout > 0, got training")
        return ops.tcn_step(x_t, state, self._in_order, self.dilations, self.kernel_size, self.channels), state

    def _in_order(self) -> ops.StackParameters:
        blocks = cast(Iterable[TCNBlock], self.blocks)
        return _parameters([layer for block in blocks for layer in block.in_order()])

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, dilations={self.dilations}"


def _parameters(layers: list[Any]) -> ops.StackParameters:
    """The weights and biases of convolutions."""
    try:  # ten times as fast as the attribute, and a parametrised weight is no parameter
        parameters = [layer._parameters for layer in layers]
        return [p["weight"] for p in parameters], [p["bias"] for p in parameters]
    except KeyError:
        return [layer.weight for layer in layers], [layer.bias for layer in layers]
