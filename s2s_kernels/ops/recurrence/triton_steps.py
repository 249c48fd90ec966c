"""Recurrences on a GPU step by step: the library's product and a Triton kernel for each, for every size and option.

The launches of T steps are made without looking at a result, so that a CUDA graph can hold them; a kernel is compiled
once for every T and B. In eager mode a step takes as long as the host needs for its launches, about 30 us.
"""

from typing import Any

import torch
import triton

from ..random import threshold
from ..triton_common import device_of, power
from .autograd import CELLS, keeps_gates, normed_row
from .products import product
from .reference import GATES
from .triton_cells import DRAWN, EXPECTED, UNZONED
from .triton_step_backward import cell_gradient_kernel, finish_kernel, project_gradient_kernel
from .triton_step_forward import begin_kernel, cell_kernel, project_kernel

Optional = torch.Tensor | None


def zone(p: float, training: bool) -> int:
    return (UNZONED if p == 0 else DRAWN if training else EXPECTED).value


def _tile(units: int, whole: bool) -> dict[str, int]:
    """Of rows and units; `whole`: a program goes through all units of its row."""
    if whole:
        return {"ROWS": 1, "COLUMNS": power(units, 32, 1024), "num_warps": 4}
    return {"ROWS": 4, "COLUMNS": power(units, 32, 64), "num_warps": 4}


def _programs(batch: int, units: int, tile: dict[str, int], whole: bool = False) -> tuple[int]:
    return (triton.cdiv(batch, tile["ROWS"]) * (1 if whole else triton.cdiv(units, tile["COLUMNS"])),)


def _state(initial: Optional, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """In float32, for the kernels to change."""
    if initial is None:
        return torch.zeros(shape, dtype=torch.float32, device=like.device)
    return initial.to(torch.float32, copy=True)


def forward(
    inputs: torch.Tensor, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional, weight_hr: Optional,
    recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional,
    reset: Optional, seed: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool,
    save: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, Optional, Optional, Optional, Optional, Optional]:  # fmt: skip
    """An engine's forward, as device.py describes it. normed_hh: as the kernels of `triton_step_forward` lay it out."""
    (batch, time, sums), width, name = inputs.shape, weight_hh.shape[1], CELLS[cell]
    gates_count = GATES[name]
    units = sums // gates_count

    def kept(wanted: bool, size: int) -> Optional:
        return inputs.new_empty(batch, time, size) if save and wanted else None

    gates = kept(keeps_gates(name, zoneout_h), sums)
    extra = kept(name in ("lstm", "gru"), units)
    hidden = kept(dtype != torch.float32, width)
    normed = kept(norm_hh is not None, normed_row(sums))
    output = inputs.new_empty((batch, time, width), dtype=dtype)
    h = _state(h0, (batch, width), inputs)
    c = _state(c0, (batch, units), inputs) if name == "lstm" else None
    if inputs.numel():
        operand, sums_hh = inputs.new_empty((batch, width), dtype=dtype), inputs.new_empty(batch, sums)
        unprojected = None if weight_hr is None else inputs.new_empty((batch, units), dtype=dtype)
        sums_hr = None if weight_hr is None else inputs.new_empty(batch, width)
        whole = norm_hh is not None
        tile, line, weight = _tile(units, whole), _tile(width, False), weight_hh.t()
        zone_h, zone_c = zone(zoneout_h, training), zone(zoneout_c, training)
        least_h, least_c = threshold(zoneout_h), threshold(zoneout_c)
        with device_of(inputs):
            begin_kernel[_programs(batch, width, line)](
                h, operand, recurrent_mask, lengths, reset, time - 1 if reverse else 0, batch, time,
                WIDTH=width, REVERSE=reverse, **line,
            )  # fmt: skip
            for t in reversed(range(time)) if reverse else range(time):
                product(operand, weight, sums_hh)
                cell_kernel[_programs(batch, units, tile, whole)](
                    inputs, None, sums_hh, bias_hh, h, c, operand, unprojected, recurrent_mask, norm_hh, norm_c,
                    norm_b, lengths, reset, seed, output, hidden, gates, extra, normed,
                    t, batch, time, zoneout_h, zoneout_c, least_h, least_c,
                    CELL=cell, UNITS=units, GATES=gates_count, REVERSE=reverse, ZONE_H=zone_h, ZONE_C=zone_c, **tile,
                )  # fmt: skip
                if weight_hr is not None and unprojected is not None:
                    product(unprojected, weight_hr.t(), sums_hr)
                    project_kernel[_programs(batch, width, line)](
                        sums_hr, h, operand, recurrent_mask, lengths, reset, seed, output, hidden,
                        t, batch, time, zoneout_h, least_h,
                        WIDTH=width, REVERSE=reverse, ZONE=zone_h, **line,
                    )  # fmt: skip
    return output, h.to(dtype), None if c is None else c.to(dtype), gates, extra, hidden, normed


def backward(
    grad_output: Optional, grad_h: Optional, grad_c: Optional, weight_hh: torch.Tensor, h0: Optional, c0: Optional,
    weight_hr: Optional, recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional,
    lengths: Optional, reset: Optional, seed: Optional, output: torch.Tensor, gates: Optional, extra: Optional,
    hidden: Optional, normed_hh: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float,
    training: bool, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Optional, Optional, Optional, Optional]:  # fmt: skip
    """An engine's backward, as device.py describes it."""
    (batch, time, width), sums, name = output.shape, weight_hh.shape[0], CELLS[cell]
    gates_count, whole = GATES[name], norm_hh is not None
    units = sums // gates_count

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return output.new_empty(shape, dtype=dtype)

    carry = _state(grad_h, (batch, width), output)
    carry_c = _state(grad_c, (batch, units), output) if name == "lstm" else None
    grad_inputs = empty(batch, time, sums)
    apart = name == "gru" or whole
    grad_recurrent = empty(batch, time, sums) if apart else None
    rows_c, rows_b, grad_projected = None, None, None
    if norm_c is not None:
        rows_c, rows_b = output.new_zeros((2, batch, units), dtype=torch.float32)
    if weight_hr is not None:
        grad_projected = empty(batch, time, width)
    if grad_inputs.numel():
        operand, through = empty(batch, sums, dtype=dtype), empty(batch, width)
        projected = None if weight_hr is None else empty(batch, width, dtype=dtype)
        from_projection = None if weight_hr is None else empty(batch, units)
        tile, line = _tile(units, whole), _tile(width, False)
        zone_h, zone_c = zone(zoneout_h, training), zone(zoneout_c, training)
        least_h, least_c = threshold(zoneout_h), threshold(zoneout_c)
        strides = (0, 0, 0) if grad_output is None else grad_output.stride()
        states = output if hidden is None else hidden
        with device_of(output):
            for t in range(time) if reverse else reversed(range(time)):
                if weight_hr is not None and projected is not None:
                    project_gradient_kernel[_programs(batch, width, line)](
                        grad_output, through, recurrent_mask, carry, lengths, reset, seed, grad_projected, projected,
                        *strides, t, batch, time, zoneout_h, least_h,
                        WIDTH=width, REVERSE=reverse, ZONE=zone_h, **line,
                    )  # fmt: skip
                    product(projected, weight_hr, from_projection)
                cell_gradient_kernel[_programs(batch, units, tile, whole)](
                    grad_output, from_projection, through, recurrent_mask, carry, carry_c, h0, c0, norm_hh, norm_c,
                    norm_b, lengths, reset, seed, states, gates, extra, normed_hh, grad_inputs, grad_recurrent,
                    operand, rows_c, rows_b, *strides, t, batch, time, zoneout_h, zoneout_c, least_h, least_c,
                    CELL=cell, UNITS=units, GATES=gates_count, REVERSE=reverse, ZONE_H=zone_h, ZONE_C=zone_c, **tile,
                )  # fmt: skip
                product(operand, weight_hh, through)
            finish_kernel[_programs(batch, width, line)](
                through, recurrent_mask, carry, lengths, reset, time if reverse else -1, batch, time,
                WIDTH=width, REVERSE=reverse, **line,
            )  # fmt: skip
    return (
        grad_inputs,
        grad_inputs if grad_recurrent is None else grad_recurrent,
        carry,
        carry_c,
        grad_projected,
        None if rows_c is None else rows_c.sum(0),
        None if rows_b is None else rows_b.sum(0),
    )


def step(
    inputs: torch.Tensor, bias_ih: Optional, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional,
    cell: int,
) -> list[Any]:  # fmt: skip
    """One step of rows (B, gates * H) of inputs without an option: h and, of an LSTM, c after it."""
    (batch, sums), units, dtype = inputs.shape, weight_hh.shape[1], weight_hh.dtype
    lstm = CELLS[cell] == "lstm"
    h = _state(h0, (batch, units), inputs)
    c = _state(c0, (batch, units), inputs) if lstm else None
    output, operand = (inputs.new_empty((batch, units), dtype=dtype) for _ in range(2))
    if inputs.numel():
        sums_hh = torch.zeros_like(inputs) if h0 is None else product(h0, weight_hh.t())
        tile = _tile(units, False)
        with device_of(inputs):
            cell_kernel[_programs(batch, units, tile)](
                inputs, bias_ih, sums_hh, bias_hh, h, c, operand, *(None,) * 7, None, output, *(None,) * 4,
                0, batch, 1, 0.0, 0.0, 0, 0,
                CELL=cell, UNITS=units, GATES=sums // units, REVERSE=False, ZONE_H=0, ZONE_C=0, **tile,
            )  # fmt: skip
    return [output] if c is None else [output, c.to(dtype)]
