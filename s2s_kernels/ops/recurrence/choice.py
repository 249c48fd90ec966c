"""Which engine runs the recurrent part of a call on CUDA tensors: by arithmetic, not by measurement so far.

An engine is a module of this package with the `forward` and `backward` that device.py describes. Backward asks again,
so the answer must depend on nothing but what a call says of itself.
"""

import dataclasses
import importlib
from types import ModuleType

import torch


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the choice looks at: cell, a number of autograd.CELLS; B, T, H and P."""

    cell: int
    batch: int
    time: int
    units: int
    width: int
    dtype: torch.dtype
    projected: bool
    normed: bool


def engine_of(sizes: Sizes) -> str:
    """The name of the engine for a call."""
    return "triton_steps"


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")
