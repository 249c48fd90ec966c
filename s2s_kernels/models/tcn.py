"""Temporal convolutional network (Bai et al. 2018, "An empirical evaluation of generic convolutional and recurrent
networks for sequence modeling", section 3)."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from ..nn import TCNBlock, TCNStack


class TCN(TCNStack):
    """Residual blocks whose dilation doubles: block i has dilation 2^i (section 3.2). Their dilated convolutions are
    weight-normalised.

    Args:
        in_channels: of the input.
        channels: of each block.
        kernel_size: K.
        dropout: probability, in training.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], kernel_size: int = 3, dropout: float = 0.0) -> None:
        super().__init__(in_channels, channels, kernel_size, dropout=dropout)
        for block in self.blocks:
            assert isinstance(block, TCNBlock)
            weight_norm(block.conv1)
            weight_norm(block.conv2)


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
