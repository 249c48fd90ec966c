"""Causal Transformer (Vaswani et al. 2017, "Attention is all you need"), decoder only and normalised before each
sublayer (pre-norm), as in Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3."""

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.attention import attention


def sinusoidal_positions(time: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Fixed encodings (T, width) of positions 0 ... T-1 (Vaswani et al. 2017, section 3.5), of the dtype and on the
    device of `like`."""
    position = torch.arange(time, device=like.device, dtype=torch.float32)[:, None]
    rate = torch.exp2(torch.arange(0, width, 2, device=like.device) * (-13.287712379549449 / width))  # 10000^(-i/width)
    angle = position * rate  # (T, width / 2)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).to(like.dtype)


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
        mixed = attention(query, key, value, causal=True, dropout_p=self.dropout.p if self.training else 0.0)
        x = x + self.dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.contract(F.gelu(self.expand(self.norm2(x)))))


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
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(TransformerBlock(width, num_heads, 4 * width, dropout) for _ in range(num_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) of the token after each position."""
        x = self.embedding(tokens)  # (B, T, D)
        x = self.dropout(x + sinusoidal_positions(x.shape[1], x.shape[2], x))
        return self.output(self.norm(self.blocks(x)))
