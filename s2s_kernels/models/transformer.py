"""Causal Transformer (Vaswani et al. 2017, "Attention is all you need"), decoder only and normalised before each
sublayer (pre-norm), as in Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3."""

import torch
import torch.nn.functional as F
from torch import nn

from ..nn import SinusoidalPositions
from ..ops.attention import attention


class TransformerBlock(nn.Module):
    """x = x + attention(norm(x)); x = x + feed_forward(norm(x)).

    Args:
        width: D, of the residual stream.
        num_heads: heads of width D / num_heads.
        feed_forward: width between the two linear maps, with GELU between them.
        dropout: probability on each sublayer's result and on the attention weights, in training.
    """

    def __init__(self, width: int, num_heads: int, feed_forward: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"TransformerBlock: num_heads must divide width, got {num_heads} and {width}")
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, feed_forward), nn.Linear(feed_forward, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, D) -> (B, T, D)."""
        # Three views (B, heads, T, head width) of one product.
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = self.mix(query, key, value, self.dropout.p if self.training else 0.0)
        x = x + self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm2(x)))))

    @staticmethod
    def mix(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float) -> torch.Tensor:
        """Causal attention (B, heads, T, head width)."""
        return attention(query, key, value, causal=True, dropout_p=dropout_p)


class TransformerLanguageModel(nn.Module):
    """Embedding plus sinusoidal positions, blocks, a last layer norm, and a linear map to the next token.

    Args:
        vocabulary: V, number of tokens.
        width: D.
        num_layers: blocks.
        num_heads: heads of each.
        dropout: probability, in training.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = SinusoidalPositions(width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, 4 * width, dropout) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) of the token after each position."""
        x = self.positions(self.embedding(tokens))  # (B, T, D)
        return self.output(self.norm(self.blocks(self.dropout(x))))
