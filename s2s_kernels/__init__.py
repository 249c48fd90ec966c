"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

from . import nn
from .dispatch import Explanation, explain, use_backend
from .ops.attention import attention, scaled_dot_product_attention
from .ops.convolution import causal_conv1d, causal_conv1d_step

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "explain",
    "nn",
    "scaled_dot_product_attention",
    "use_backend",
]
