"""Models built from `s2s_kernels.nn`, one file a paper.

A language model maps tokens (B, T) int64 to logits (B, T, V): position t gives the scores of token t + 1 and sees no
token after t. The three families in `LANGUAGE_MODELS` have nearly equal numbers of parameters over the same
vocabulary of bytes, so that they can be compared.
"""

from collections.abc import Callable

from torch import nn

from .lstm import LSTMLanguageModel
from .tcn import TCN, TCNLanguageModel
from .transformer import TransformerLanguageModel

LANGUAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm": LSTMLanguageModel,
    "tcn": TCNLanguageModel,
    "transformer": TransformerLanguageModel,
}
MODELS: dict[str, Callable[[], nn.Module]] = {**LANGUAGE_MODELS}

__all__ = ["LANGUAGE_MODELS", "MODELS", "TCN", "LSTMLanguageModel", "TCNLanguageModel", "TransformerLanguageModel"]
