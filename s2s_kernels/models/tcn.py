"""Temporal convolutional network (Bai et al. 2018, "An empirical evaluation of generic convolutional and recurrent
networks for sequence modeling", section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ..nn import CausalConv1d


class ResidualBlock(nn.Module):
    """Two dilated causal convolutions beside a skip connection (figure 1b): y = relu(x + f(x)), where f is twice
    weight-normalised convolution, ReLU and dropout.

    Args:
        in_channels, channels: of the input and of the result; a 1x1 convolution matches them where they differ.
        kernel_size: K.
        dilation: of both convolutions.
        dropout: probability, in training.
    """

    def __init__(self, in_channels: int, channels: int, kernel_size: int, dilation: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = weight_norm(CausalConv1d(in_channels, channels, kernel_size, dilation=dilation, activation="relu"))
        self.conv2 = weight_norm(CausalConv1d(channels, channels, kernel_size, dilation=dilation, activation="relu"))
        self.dropout = nn.Dropout(dropout)
        self.match = nn.Identity() if in_channels == channels else CausalConv1d(in_channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, T) -> (B, channels, T)."""
        skip, hidden = self.match(x), self.dropout(self.conv1(x))
        if self.training and self.dropout.p > 0:  # dropout stands between the convolution and the sum
            return F.relu(skip + self.dropout(self.conv2(hidden)))
        return F.relu(self.conv2(hidden, residual=skip))


class TCN(nn.Module):
    """Residual blocks whose dilation doubles: block i has dilation 2^i (section 3.2).

    Args:
        in_channels: of the input.
        channels: of each block.
        kernel_size: K.
        dropout: probability, in training.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        sizes = [in_channels, *channels]
        self.blocks = nn.Sequential(
            *(ResidualBlock(sizes[i], sizes[i + 1], kernel_size, 2**i, dropout) for i in range(len(channels)))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, in_channels, T) -> (B, channels[-1], T)."""
        return self.blocks(x)


class TCNLanguageModel(nn.Module):
    """Embedding, TCN, and a linear map to the next token (section 4.6, character-level modelling).

    Args:
        vocabulary: V, number of tokens.
        channels: of the embedding and of every block.
        num_blocks: blocks; a position sees the 1 + 2 (K - 1) (2^num_blocks - 1) tokens up to its own.
        kernel_size: K.
        dropout: probability, in training.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        channels: int = 128,
        num_blocks: int = 8,
        kernel_size: int = 3,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, channels)
        self.tcn = TCN(channels, [channels] * num_blocks, kernel_size, dropout)
        self.output = nn.Linear(channels, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) of the token after each position."""
        hidden = self.tcn(self.embedding(tokens).mT)  # (B, C, T)
        return self.output(hidden.mT)
