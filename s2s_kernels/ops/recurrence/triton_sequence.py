"""Recurrences on a GPU with one kernel a direction: for hidden sizes of which a program can hold the weights."""

from typing import Any

import torch
import triton

from ..triton_common import device_of, power, precision
from .triton_buffers import Gradients, Results, Zones
from .triton_sequence_kernels import backward_kernel, forward_kernel

Optional = torch.Tensor | None


def _tile(units: int, width: int, dtype: torch.dtype, zones: Zones, *options: Optional) -> dict[str, Any]:
    columns, depth, wide = power(units, 32, 1024), power(width, 32, 1024), dtype == torch.float32
    widest = max(columns, depth)
    plain = not wide and not any(zones.kinds.values()) and all(option is None for option in options)
    # Loads ahead of their step take registers and shared memory, which options, wide tiles and units that fill no
    # vectors need themselves.
    ahead = plain and widest <= 64 and units % 32 == width % 32 == 0
    return {
        "ROWS": 16, "COLUMNS": columns, "DEPTH": depth, "num_warps": 8 if widest > 32 or wide else 4,
        "num_stages": 2 if ahead else 1,
        # Left to itself the compiler may spill for a second program on a multiprocessor. Where the register file is
        # full anyway it does better so.
        "maxnreg": 255 if plain else None,
    }  # fmt: skip


def _heads(weight_hh: torch.Tensor) -> int:
    return weight_hh.shape[0] if weight_hh.dim() == 3 else 1


def forward(
    inputs: torch.Tensor, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional, weight_hr: Optional,
    recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional,
    reset: Optional, seed: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool,
    save: bool, dtype: torch.dtype,
) -> tuple[Any, ...]:  # fmt: skip
    """An engine's forward, as device.py describes it. normed_hh is laid out as by `triton_steps`."""
    (batch, time, sums), width, heads = inputs.shape, weight_hh.shape[-1], _heads(weight_hh)
    r = Results.of(inputs, width, h0, c0, cell, zoneout_h, norm_hh is not None, save, dtype)
    if inputs.numel():
        units, zones = width if weight_hr is None else weight_hr.shape[1], Zones.of(zoneout_h, zoneout_c, training)
        tile = _tile(units, width, dtype, zones, norm_hh, weight_hr, recurrent_mask)
        with device_of(inputs):
            forward_kernel[(heads * triton.cdiv(batch // heads, tile["ROWS"]),)](
                inputs, weight_hh, bias_hh, r.h, r.c, weight_hr, recurrent_mask, norm_hh, norm_c, norm_b, lengths,
                reset, seed, r.output, r.hidden, r.gates, r.extra, r.normed, batch // heads, time, *zones.numbers,
                CELL=cell, UNITS=units, WIDTH=width, GATES=sums // units, REVERSE=reverse, **zones.kinds,
                PRECISION=precision(), AHEAD=tile["COLUMNS"] <= 64, **tile,
            )  # fmt: skip
    return r.given(dtype)


def backward(
    grad_output: Optional, grad_h: Optional, grad_c: Optional, weight_hh: torch.Tensor, h0: Optional, c0: Optional,
    weight_hr: Optional, recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional,
    lengths: Optional, reset: Optional, seed: Optional, output: torch.Tensor, gates: Optional, extra: Optional,
    hidden: Optional, normed_hh: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float,
    training: bool, dtype: torch.dtype,
) -> tuple[Any, ...]:  # fmt: skip
    """An engine's backward, as device.py describes it."""
    (batch, time, width), sums, heads = output.shape, weight_hh.shape[-2], _heads(weight_hh)
    g = Gradients.of(output, sums, grad_h, grad_c, cell, weight_hr is not None, norm_hh is not None)
    if g.inputs.numel():
        units, zones = width if weight_hr is None else weight_hr.shape[1], Zones.of(zoneout_h, zoneout_c, training)
        tile = _tile(units, width, dtype, zones, norm_hh, weight_hr, recurrent_mask)
        with device_of(output):
            backward_kernel[(heads * triton.cdiv(batch // heads, tile["ROWS"]),)](
                grad_output, g.h, g.c, weight_hh, h0, c0, weight_hr, recurrent_mask, norm_hh, norm_c, norm_b, lengths,
                reset, seed, output if hidden is None else hidden, gates, extra, normed_hh, g.inputs, g.recurrent,
                g.projected, g.norm_c, g.norm_b, *((0, 0, 0) if grad_output is None else grad_output.stride()),
                batch // heads, time, *zones.numbers,
                CELL=cell, UNITS=units, WIDTH=width, GATES=sums // units, REVERSE=reverse, **zones.kinds,
                PRECISION=precision(), **tile,
            )  # fmt: skip
    return g.given()
