"""Which engine runs the recurrent part of a call on CUDA tensors: by arithmetic. What was measured decides among
backends, before (measurements.py).

An engine is a module of this package with the `forward` and `backward` that device.py describes. Backward asks again: a
call's own sizes and its device must decide, or engines that lay out alike what they save.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
import triton

from ..triton_common import power, precision
from .autograd import CELLS
from .reference import GATES


class Sizes(NamedTuple):
    """What the choice looks at: cell, a number of autograd.CELLS; B, T, H and P. plain: without a mask, zoneout,
    projection and layer normalisation. shared: bytes of shared memory that a program can have. cuda: whether the cuda
    backend was chosen, by its own `gap`, for the call."""

    cell: int
    batch: int
    time: int
    units: int
    width: int
    dtype: torch.dtype
    projected: bool
    plain: bool
    shared: int
    cuda: bool = False


def _holds_weights(sizes: Sizes) -> bool:
    """Whether triton_sequence compiles without spilling and within shared memory, onto tensor cores: the limits are
    those at which it was seen to, for compute capability 8.0, 9.0 and 10.0."""
    gates, size = GATES[CELLS[sizes.cell]], sizes.dtype.itemsize
    columns, depth = (power(count, 32, 1 << 20) for count in (sizes.units, sizes.width))
    weights, line, widest = gates * columns * depth * size, 16 * max(columns, depth) * size, max(columns, depth)
    if 2 * line + weights * (2 if sizes.projected else 1) > sizes.shared:
        return False
    if sizes.dtype == torch.float32:
        return sizes.plain and weights <= 48 << 10 and precision() == "tf32"
    if sizes.plain:
        return weights <= 128 << 10 and widest <= 128
    # These keep more of a row, and units that fill no vectors take registers for their addresses.
    whole = sizes.units % 32 == sizes.width % 32 == 0
    return whole and weights <= 96 << 10 and widest <= (64 if sizes.projected else 128)


# The first that serves a call does.
ENGINES: tuple[tuple[str, Callable[[Sizes], bool]], ...] = (
    ("cuda_kernels", lambda sizes: sizes.cuda),
    ("triton_sequence", _holds_weights),
    ("triton_steps", lambda sizes: True),
)


def engine_of(sizes: Sizes) -> str:
    """The name of the engine for a call."""
    return next(name for name, serves in ENGINES if serves(sizes))


@functools.cache
def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Of a program, in bytes. Kernels on the CPU are emulated, which has no limit."""
    if device.type != "cuda":
        return 1 << 30
    index = torch.cuda.current_device() if device.index is None else device.index
    return triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
