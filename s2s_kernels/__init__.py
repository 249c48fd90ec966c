"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

from . import nn
from .dispatch import Explanation, explain, use_backend
from .nn.patch import PatchReport, patch, unpatch
from .ops.convolution import causal_conv1d, causal_conv1d_step
from .ops.recurrence import gru, lstm, rnn

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "PatchReport",
    "causal_conv1d",
    "causal_conv1d_step",
    "explain",
    "gru",
    "lstm",
    "nn",
    "patch",
    "rnn",
    "unpatch",
    "use_backend",
]
