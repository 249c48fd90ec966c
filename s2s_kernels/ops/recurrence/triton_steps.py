"""Recurrences on a GPU step by step: the library's product and a Triton kernel for each, for every size and option.

The launches of T steps are made without looking at a result, so that a CUDA graph can hold them; a kernel is compiled
once for every T and B. In eager mode a step takes as long as the host needs for its launches, about 30 us.
"""

from typing import Any

import torch
import triton

from ..triton_common import device_of, power
from .products import product
from .triton_buffers import Gradients, Results, Zones
from .triton_step_backward import cell_gradient_kernel, finish_kernel, project_gradient_kernel
from .triton_step_forward import begin_kernel, cell_kernel, project_kernel

Optional = torch.Tensor | None


def _tile(units: int, whole: bool = False) -> dict[str, int]:
    """Of rows and units; `whole`: a program goes through all units of its row."""
    if whole:
        return {"ROWS": 1, "COLUMNS": power(units, 32, 1024), "num_warps": 4}
    return {"ROWS": 4, "COLUMNS": power(units, 32, 64), "num_warps": 4}


def _programs(batch: int, units: int, tile: dict[str, int], whole: bool = False) -> tuple[int]:
    return (triton.cdiv(batch, tile["ROWS"]) * (1 if whole else triton.cdiv(units, tile["COLUMNS"])),)


def forward(
    inputs: torch.Tensor, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional, weight_hr: Optional,
    recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional,
    reset: Optional, seed: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool,
    save: bool, dtype: torch.dtype,
) -> tuple[Any, ...]:  # fmt: skip
    """An engine's forward, as device.py describes it. normed_hh: the normalised products of all gates, then their
    reciprocal deviation, and the cell's and its mean."""
    (batch, time, sums), width, whole = inputs.shape, weight_hh.shape[1], norm_hh is not None
    r = Results.of(inputs, width, h0, c0, cell, zoneout_h, whole, save, dtype)
    if not inputs.numel():
        return r.given(dtype)
    units = width if weight_hr is None else weight_hr.shape[1]
    operand, sums_hh = inputs.new_empty((batch, width), dtype=dtype), inputs.new_empty(batch, sums)
    unprojected = None if weight_hr is None else inputs.new_empty((batch, units), dtype=dtype)
    sums_hr = None if weight_hr is None else inputs.new_empty(batch, width)
    tile, line, zones = _tile(units, whole), _tile(width), Zones.of(zoneout_h, zoneout_c, training)
    zoneout, _, least, _ = zones.numbers
    with device_of(inputs):
        begin_kernel[_programs(batch, width, line)](
            r.h, operand, recurrent_mask, lengths, reset, time - 1 if reverse else 0, batch, time,
            WIDTH=width, REVERSE=reverse, **line,
        )  # fmt: skip
        for t in reversed(range(time)) if reverse else range(time):
            product(operand, weight_hh.t(), sums_hh)
            cell_kernel[_programs(batch, units, tile, whole)](
                inputs, None, sums_hh, bias_hh, r.h, r.c, operand, unprojected, recurrent_mask, norm_hh, norm_c,
                norm_b, lengths, reset, seed, r.output, r.hidden, r.gates, r.extra, r.normed,
                t, batch, time, *zones.numbers,
                CELL=cell, UNITS=units, GATES=sums // units, REVERSE=reverse, **zones.kinds, **tile,
            )  # fmt: skip
            if weight_hr is not None and unprojected is not None:
                product(unprojected, weight_hr.t(), sums_hr)
                project_kernel[_programs(batch, width, line)](
                    sums_hr, r.h, operand, recurrent_mask, lengths, reset, seed, r.output, r.hidden,
                    t, batch, time, zoneout, least,
                    WIDTH=width, REVERSE=reverse, ZONE=zones.kinds["ZONE_H"], **line,
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
    (batch, time, width), sums, whole = output.shape, weight_hh.shape[0], norm_hh is not None
    g = Gradients.of(output, sums, grad_h, grad_c, cell, weight_hr is not None, whole)
    if not g.inputs.numel():
        return g.given()
    units = width if weight_hr is None else weight_hr.shape[1]
    operand, through = output.new_empty((batch, sums), dtype=dtype), torch.empty_like(g.h)
    projected = None if weight_hr is None else output.new_empty((batch, width), dtype=dtype)
    from_projection = None if weight_hr is None else torch.empty((batch, units), device=output.device)
    tile, line, zones = _tile(units, whole), _tile(width), Zones.of(zoneout_h, zoneout_c, training)
    zoneout, _, least, _ = zones.numbers
    strides = (0, 0, 0) if grad_output is None else grad_output.stride()
    states = output if hidden is None else hidden
    with device_of(output):
        for t in range(time) if reverse else reversed(range(time)):
            if weight_hr is not None and projected is not None:
                project_gradient_kernel[_programs(batch, width, line)](
                    grad_output, through, recurrent_mask, g.h, lengths, reset, seed, g.projected, projected,
                    *strides, t, batch, time, zoneout, least,
                    WIDTH=width, REVERSE=reverse, ZONE=zones.kinds["ZONE_H"], **line,
                )  # fmt: skip
                product(projected, weight_hr, from_projection)
            cell_gradient_kernel[_programs(batch, units, tile, whole)](
                grad_output, from_projection, through, recurrent_mask, g.h, g.c, h0, c0, norm_hh, norm_c, norm_b,
                lengths, reset, seed, states, gates, extra, normed_hh, g.inputs, g.recurrent, operand, g.norm_c,
                g.norm_b, *strides, t, batch, time, *zones.numbers,
                CELL=cell, UNITS=units, GATES=sums // units, REVERSE=reverse, **zones.kinds, **tile,
            )  # fmt: skip
            product(operand, weight_hh, through)
        finish_kernel[_programs(batch, width, line)](
            through, recurrent_mask, g.h, lengths, reset, time if reverse else -1, batch, time,
            WIDTH=width, REVERSE=reverse, **line,
        )  # fmt: skip
    return g.given()


def step(
    inputs: torch.Tensor, bias_ih: Optional, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional,
    cell: int,
) -> list[torch.Tensor]:  # fmt: skip
    """One step of rows (B, gates * H) of inputs without an option: h and, of an LSTM, c after it."""
    (batch, sums), units, dtype = inputs.shape, weight_hh.shape[1], weight_hh.dtype
    r = Results.of(inputs.unsqueeze(1), units, h0, c0, cell, 0.0, False, False, dtype)
    if inputs.numel():
        sums_hh = torch.zeros_like(inputs) if h0 is None else product(h0, weight_hh.t())
        tile, zones = _tile(units), Zones.of(0.0, 0.0, False)
        operand = torch.empty_like(r.output)
        with device_of(inputs):
            cell_kernel[_programs(batch, units, tile)](
                inputs, bias_ih, sums_hh, bias_hh, r.h, r.c, operand, *(None,) * 8, r.output, *(None,) * 4,
                0, batch, 1, *zones.numbers,
                CELL=cell, UNITS=units, GATES=sums // units, REVERSE=False, **zones.kinds, **tile,
            )  # fmt: skip
    return [r.output.squeeze(1)] if r.c is None else [r.output.squeeze(1), r.c.to(dtype)]
