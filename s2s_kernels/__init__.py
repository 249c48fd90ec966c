"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

import importlib
from typing import Any

from . import nn
from .dispatch import Explanation, explain, use_backend
from .nn.patch import PatchReport, patch, unpatch
from .ops.additive_attention import additive_attention, attention_pool, prepare_additive_keys
from .ops.attention import attention, attention_packed, scaled_dot_product_attention
from .ops.convolution import causal_conv1d, causal_conv1d_step
from .ops.convolution.depthwise import causal_conv1d_fn, causal_conv1d_update
from .ops.recurrence import gru, lstm, rnn

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "PatchReport",
    "additive_attention",
    "attention",
    "attention_packed",
    "attention_pool",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_step",
    "causal_conv1d_update",
    "explain",
    "gru",
    "lstm",
    "nn",
    "patch",
    "prepare_additive_keys",
    "rnn",
    "scaled_dot_product_attention",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """The modules that need an extra are imported where they are first named."""
    if name in ("huggingface", "plot"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
