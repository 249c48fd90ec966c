"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

from .dispatch import Explanation, explain, use_backend

__version__ = "0.1.0"

__all__ = ["Explanation", "explain", "use_backend"]
