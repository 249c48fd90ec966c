"""The persistent CUDA C++ recurrences (csrc/cuda/recurrence_plan.h) as an engine: the part of a call that goes through
time. `gap` says what they don't cover; products over all positions at once are the driver's, in either direction.

The driver's products in backward: bias_hh's gradient is the sum over positions of grad_inputs, of a GRU's n rows that
of grad_recurrent; those of weight_hh and recurrent_mask come from grad_recurrent and the state before each position.
"""

import functools
from typing import Any

import torch

from .autograd import CELLS, keeps_gates
from .reference import GATES

# What the kernels read in a product, by the numbers that the C++ side knows them by.
OPERANDS = {torch.bfloat16: 0, torch.float16: 1}
TF32, EXACT = 2, 3

kernels: Any = torch.ops.s2s  # an emulator's in tests

Optional = torch.Tensor | None
Tensors = tuple[Optional, ...]


def machine_of(device: torch.device) -> tuple[int, int, bool]:
    """Multiprocessors, bytes of shared memory that a block may have, and whether there are clusters."""
    facts = torch.cuda.get_device_properties(device)
    return facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9  # type: ignore[attr-defined]


def missing(device: torch.device) -> str | None:
    """Why the kernels don't run on this device at all."""
    if not hasattr(kernels, "recurrence_persistent_forward"):
        return "the CUDA kernels weren't built (nvcc or a CUDA build of torch was missing)"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability is below 8.0"
    return None


def operand(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return EXACT if torch.get_float32_matmul_precision() == "highest" else TF32
    return OPERANDS[dtype]


@functools.lru_cache(maxsize=256)
def _plan(
    source: Any, batch: int, hidden: int, cell: int, operand: int, backward: bool, index: int, machine: tuple[int, ...]
) -> tuple[int, ...]:
    """How the work is laid over the device, no more of it at once than is resident; empty: it doesn't fit."""
    size = (batch, 0, hidden, cell, operand, 0, 0)
    for clusters in (True, False) if machine[2] else (False,):
        plan = source.recurrence_persistent_plan(size, backward, [machine[0], machine[1], int(clusters)])
        if not plan:
            return ()
        cluster, team, teams = plan[0], plan[2], plan[3]
        resident = source.recurrence_persistent_resident(plan, operand, backward, index)
        if cluster and resident:
            return (*plan[:3], min(teams, resident), *plan[4:])
        if not cluster:
            return tuple(plan) if resident >= teams and team else ()
    return ()


def plan_of(
    batch: int, hidden: int, cell: int, dtype: torch.dtype, backward: bool, device: torch.device
) -> tuple[int, ...]:
    # Where there is no GPU, emulated kernels have no use for the index.
    index = device.index if device.index is not None else torch.cuda.current_device() if device.type == "cuda" else -1
    return _plan(kernels, max(batch, 1), hidden, cell, operand(dtype), backward, index, machine_of(device))


def gap(hidden: int, cell: int, dtype: torch.dtype, device: torch.device, projected: bool, normed: bool) -> str | None:
    """What these kernels don't cover of a call, forward and backward; None where they serve it. Rows of the batch are
    taken in tiles, so that neither B nor T matters."""
    if dtype not in (*OPERANDS, torch.float32):
        return f"the persistent kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if projected:
        return "the persistent kernels don't project h"
    if normed:
        return "the persistent kernels don't normalise"
    return missing(device) or _too_large(hidden, cell, dtype, device)


def _too_large(hidden: int, cell: int, dtype: torch.dtype, device: torch.device) -> str | None:
    if all(plan_of(1, hidden, cell, dtype, backward, device) for backward in (False, True)):
        return None
    what = f"{GATES[CELLS[cell]]} gates of {hidden} units"
    return f"the recurrent weights ({what}) don't fit the registers and shared memory of this device"


# A traced call takes their answers for constants, as `torch.compiler.assume_constant_result` would have it, which
# imports the compiler.
missing._dynamo_marked_constant = _too_large._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _checked(inputs: torch.Tensor, weight_hh: torch.Tensor, cell: int, dtype: torch.dtype, options: Tensors) -> None:
    weight_hr, norm_hh = options
    hidden = weight_hh.shape[0] // GATES[CELLS[cell]]
    reason = gap(hidden, cell, dtype, inputs.device, weight_hr is not None, norm_hh is not None)
    if reason is not None:
        raise NotImplementedError(reason)


def _wide(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _indices(lengths: Optional) -> Optional:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _whole(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.contiguous()


def forward(
    inputs: torch.Tensor, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional, weight_hr: Optional,
    recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional, reset: Optional,
    seed: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool, save: bool,
    dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """-> output (B, T, H), h_n (B, H), c_n (B, H), gates (B, T, G), extra (B, T, H), hidden (B, T, H), normed.

    inputs (B, T, G) float32: the input product with its bias, and an LSTM's or RNN's bias_hh.
    """
    _checked(inputs, weight_hh, cell, dtype, (weight_hr, norm_hh))
    (batch, time, rows), hidden, name = inputs.shape, weight_hh.shape[1], CELLS[cell]
    # Backward multiplies what is saved at absent positions by zero, so that it has to be finite.
    fresh = torch.zeros if lengths is not None else torch.empty

    def over(width: int, wanted: bool = True, kind: torch.dtype = torch.float32) -> Optional:
        return fresh(batch, time, width, dtype=kind, device=inputs.device) if wanted else None

    output = over(hidden, kind=dtype)
    h_n = inputs.new_empty(batch, hidden)
    c_n = inputs.new_empty(batch, hidden) if name == "lstm" else None
    gates = over(rows, save and keeps_gates(name, zoneout_h))
    extra = over(hidden, save and name in ("lstm", "gru"))
    exact = over(hidden, save and dtype != torch.float32)
    if batch > 0:
        plan = plan_of(batch, hidden, cell, dtype, False, inputs.device)
        kernels.recurrence_persistent_forward(
            inputs, weight_hh, _wide(bias_hh), _wide(h0), _wide(c0), _wide(recurrent_mask), _indices(lengths),
            _whole(reset), _whole(seed), _workspace(plan, inputs), output, h_n, c_n, gates, extra, exact,
            [batch, time, hidden, cell, operand(dtype), reverse, training], zoneout_h, zoneout_c, plan,
        )  # fmt: skip
    return output, h_n.to(dtype), None if c_n is None else c_n.to(dtype), gates, extra, exact, None


def backward(
    grad_output: Optional, grad_h: Optional, grad_c: Optional, weight_hh: torch.Tensor, h0: Optional, c0: Optional,
    weight_hr: Optional, recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional,
    lengths: Optional, reset: Optional, seed: Optional, output: torch.Tensor, gates: Optional, extra: Optional,
    hidden: Optional, normed_hh: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float,
    training: bool, dtype: torch.dtype,
) -> Tensors:  # fmt: skip
    """-> grad_inputs (B, T, G), grad_recurrent (B, T, G), grad_h0 (B, H), grad_c0 (B, H), and three that are None."""
    _checked(output, weight_hh, cell, dtype, (weight_hr, norm_hh))
    (batch, time, units), rows, name = output.shape, weight_hh.shape[0], CELLS[cell]
    states = output if hidden is None else hidden
    fresh = torch.zeros if lengths is not None else torch.empty

    def made(*shape: int, wanted: bool = True) -> Optional:
        return fresh(*shape, dtype=torch.float32, device=output.device) if wanted else None

    grad_inputs = made(batch, time, rows)
    grad_recurrent = made(batch, time, rows, wanted=name == "gru")
    grad_h0, grad_c0 = made(batch, units), made(batch, units, wanted=name == "lstm")
    if batch > 0:
        plan = plan_of(batch, units, cell, dtype, True, output.device)
        grad = torch.zeros_like(states) if grad_output is None else _wide(grad_output)
        kernels.recurrence_persistent_backward(
            grad, _wide(grad_h), _wide(grad_c), weight_hh, _wide(h0), _wide(c0), _wide(recurrent_mask),
            _indices(lengths), _whole(reset), _whole(seed), states, gates, extra, _workspace(plan, states),
            grad_inputs, grad_recurrent,
            grad_h0, grad_c0, [batch, time, units, cell, operand(dtype), reverse, training], zoneout_h, zoneout_c, plan,
        )  # fmt: skip
    return grad_inputs, grad_inputs if grad_recurrent is None else grad_recurrent, grad_h0, grad_c0, None, None, None


def _workspace(plan: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Barriers' counters and exchanged rows, all of them zero."""
    return torch.zeros(plan[-1], dtype=torch.uint8, device=like.device)
