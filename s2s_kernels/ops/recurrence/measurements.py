"""What was measured of the recurrences on GPUs: measurements.json, which `python -m benchmarks.choice` makes.

For each device by its name: the versions of torch and cuDNN, for which cells and dtypes cuDNN was seen to keep the
contract, and rows of sizes, the time of measurement, and seconds a call of each backend.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("measurements.json")


@functools.cache
def devices() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text())["devices"]


def known_of(device: torch.device) -> dict[str, Any] | None:
    """What is known of a device; None where nothing is, as where it isn't there at all."""
    if not devices() or not torch.cuda.is_available():
        return None
    return devices().get(_name(device))


@functools.lru_cache(maxsize=64)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def kind(cell: str, dtype: torch.dtype) -> str:
    return f"{cell} {str(dtype).removeprefix('torch.')}"


def keeps_contract(cell: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether cuDNN, in the version at hand, was seen to carry a state of this dtype in float32, to hand NaN on, and to
    keep the tolerance rule."""
    known = known_of(device)
    if known is None or known["cudnn"] != torch.backends.cudnn.version():
        return False
    return kind(cell, dtype) in known["keeps_contract"]
