"""LSTM language model (Zaremba et al. 2014, "Recurrent neural network regularization", sections 3.1 and 3.2)."""

import torch
from torch import nn

from ..nn import LSTM


class LSTMLanguageModel(nn.Module):
    """Embedding, stacked LSTM layers, and a linear map to the next token.

    Dropout falls on the connections between layers only, never on the recurrent ones (equation 4 of the paper).

    Args:
        vocabulary: V, number of tokens.
        embedding_size: width of the embedding.
        hidden_size: H, units of each layer.
        num_layers: layers.
        dropout: probability, in training.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        embedding_size: int = 128,
        hidden_size: int = 368,
        num_layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding_size)
        self.dropout = nn.Dropout(dropout)
        between = dropout if num_layers > 1 else 0.0
        self.lstm = LSTM(embedding_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.output = nn.Linear(hidden_size, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) of the token after each position."""
        hidden, _ = self.lstm(self.dropout(self.embedding(tokens)))  # (B, T, H)
        return self.output(self.dropout(hidden))
