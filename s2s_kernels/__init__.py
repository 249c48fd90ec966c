"""Kernel-level performance toolkit for attention and recurrence in PyTorch."""

__version__ = "0.1.0"
