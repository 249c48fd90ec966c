"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

from . import nn
from .dispatch import Explanation, explain, use_backend
from .ops.additive_attention import additive_attention, attention_pool, prepare_additive_keys
from .ops.convolution import causal_conv1d, causal_conv1d_step

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "additive_attention",
    "attention_pool",
    "causal_conv1d",
    "causal_conv1d_step",
    "explain",
    "nn",
    "prepare_additive_keys",
    "use_backend",
]
