"""The persistent CUDA C++ recurrences (csrc/cuda/recurrence_plan.h) as an engine: the part of a call that goes through
time. `gap` says what they don't cover; products over all positions at once are the driver's, in either direction, but
for the one that layer normalisation's backward begins with.

The driver's products in backward: bias_hh's gradient is the sum over positions of grad_inputs, of a GRU's n rows that
of grad_recurrent, or under layer normalisation of grad_inputs times r; those of weight_hh and recurrent_mask come from
grad_recurrent and the state before each position.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...checks import traced_as_constant
from .autograd import CELLS, keeps_gates, normed_row
from .products import product
from .reference import GATES

# What the kernels read in a product, by the numbers that the C++ side knows them by.
OPERANDS = {torch.bfloat16: 0, torch.float16: 1}
TF32, EXACT = 2, 3
TEAM = 5  # where a plan says how many blocks are a team, and after it how many teams there are; last is the workspace
MODELS_ERROR = 1.1  # of predicted times, by which a plan must be the better one to be taken for it

kernels: Any = torch.ops.s2s  # an emulator's in tests

Optional = torch.Tensor | None
Tensors = tuple[Optional, ...]


@functools.lru_cache(maxsize=64)
def machine_of(device: torch.device) -> tuple[int, int, bool]:
    """Multiprocessors, bytes of shared memory that a block may have, and whether there are clusters."""
    facts = torch.cuda.get_device_properties(device)
    return facts.multi_processor_count, facts.shared_memory_per_block_optin, facts.major >= 9  # type: ignore[attr-defined]


@traced_as_constant
def missing(device: torch.device) -> str | None:
    """Why the kernels don't run on this device at all."""
    if not hasattr(kernels, "recurrence_persistent_forward"):
        return "the CUDA kernels weren't built (nvcc or a CUDA build of torch was missing)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "compute capability is below 8.0"
    return None


def operand(dtype: torch.dtype) -> int:
    if dtype == torch.float32:
        return EXACT if torch.get_float32_matmul_precision() == "highest" else TF32
    return OPERANDS[dtype]


class Shape(NamedTuple):
    """What of a call the plan depends on: B, H and P, a number of autograd.CELLS, and what kind of step it is."""

    batch: int
    hidden: int
    width: int
    cell: int
    dtype: torch.dtype
    normed: bool
    projected: bool

    @staticmethod
    def of(batch: int, weight_hh: torch.Tensor, weight_hr: Optional, norm_hh: Optional, cell: int) -> "Shape":
        rows, width = weight_hh.shape
        normed, projected = norm_hh is not None, weight_hr is not None
        return Shape(batch, rows // GATES[CELLS[cell]], width, cell, weight_hh.dtype, normed, projected)

    def call(self, time: int = 0, reverse: bool = False, training: bool = False) -> list[int]:
        """As the C++ side takes it."""
        return [
            self.batch, time, self.hidden, self.width, self.cell, operand(self.dtype), reverse, training, self.normed,
            self.projected,
        ]  # fmt: skip


@functools.lru_cache(maxsize=256)
def _plan(
    source: Any, shape: Shape, operand: int, backward: bool, index: int, machine: tuple[int, ...], sharing: int
) -> tuple[int, ...]:
    """How the work is laid over the device, no more of it at once than is resident; empty: it doesn't fit. Calls that
    share the device run at once, each on its part of the multiprocessors, where one after the other would take longer.
    """
    call = shape._replace(batch=max(shape.batch, 1)).call()
    multiprocessors, shared, able = machine

    def planned(processors: int, clusters: bool) -> tuple[Sequence[int], float]:
        facts = [processors, shared, int(clusters)]
        plan = source.recurrence_persistent_plan(call, backward, facts)
        return plan, torch.ops.s2s.recurrence_persistent_step(call, backward, facts, plan) if plan else math.inf

    for clusters in (True, False) if able else (False,):
        plan, alone = planned(multiprocessors, clusters)
        if not plan:
            return ()
        if sharing > 1:
            part, beside = planned(multiprocessors // sharing, clusters)
            plan = part if beside * MODELS_ERROR < sharing * alone else plan
        cluster, teams = plan[0], plan[TEAM + 1]
        try:
            resident = source.recurrence_persistent_resident(plan, operand, backward, index)
        except RuntimeError:
            if not cluster:
                raise
            continue  # a part of a GPU may have no cluster of this size
        if resident:
            kept = min(teams, resident)  # each has a part of the workspace
            return (*plan[: TEAM + 1], kept, *plan[TEAM + 2 : -1], plan[-1] // teams * kept)
    return ()


def plan_of(shape: Shape, backward: bool, device: torch.device, sharing: int = 1) -> tuple[int, ...]:
    # Where there is no GPU, emulated kernels have no use for the index.
    index = device.index if device.index is not None else torch.cuda.current_device() if device.type == "cuda" else -1
    return _plan(kernels, shape, operand(shape.dtype), backward, index, machine_of(device), sharing)


def gap(
    hidden: int, width: int, cell: int, dtype: torch.dtype, device: torch.device, projected: bool, normed: bool
) -> str | None:
    """What these kernels don't cover of a call, forward and backward; None where they serve it. Rows of the batch are
    taken in tiles, so that neither B nor T matters."""
    if dtype not in (*OPERANDS, torch.float32):
        return f"the persistent kernels take float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    # As indices, symbolic sizes become constants where a call is traced.
    return missing(device) or _too_large(
        operator.index(hidden), operator.index(width), cell, dtype, device, projected, normed
    )


@traced_as_constant
def _too_large(
    hidden: int, width: int, cell: int, dtype: torch.dtype, device: torch.device, projected: bool, normed: bool
) -> str | None:
    shape = Shape(1, hidden, width, cell, dtype, normed, projected)
    if all(plan_of(shape, backward, device) for backward in (False, True)):
        return None
    what = f"{GATES[CELLS[cell]]} gates of {hidden} units" + (f", projected to {width}" if projected else "")
    return f"the recurrent weights ({what}) don't fit the registers and shared memory of this device"


def _checked(shape: Shape, device: torch.device) -> Shape:
    _assure(kernels, shape, device, torch.get_float32_matmul_precision())
    return shape


@functools.lru_cache(maxsize=256)
def _assure(source: Any, shape: Shape, device: torch.device, precision: str) -> None:
    """NotImplementedError where there is a gap, which is looked for again. source, precision: what it depends on
    besides."""
    reason = gap(shape.hidden, shape.width, shape.cell, shape.dtype, device, shape.projected, shape.normed)
    if reason is not None:
        raise NotImplementedError(reason)


def _wide(tensor: Optional) -> Optional:
    # Told the format, the conversion itself makes it contiguous, but makes nothing of what is float32.
    return None if tensor is None else tensor.to(torch.float32, memory_format=torch.contiguous_format).contiguous()


def _indices(lengths: Optional) -> Optional:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _whole(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.contiguous()


def forward(
    inputs: torch.Tensor, weight_hh: torch.Tensor, bias_hh: Optional, h0: Optional, c0: Optional, weight_hr: Optional,
    recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional, lengths: Optional, reset: Optional,
    seed: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool, save: bool,
    dtype: torch.dtype, sharing: int = 1,
) -> Tensors:  # fmt: skip
    """-> output (B, T, P), h_n (B, P), c_n (B, H), gates (B, T, G), extra (B, T, H), hidden (B, T, P), normed.

    inputs (B, T, G) float32: the input product with its bias, and an LSTM's or RNN's bias_hh.
    normed (B, T, normed_row): the normalised W_hh h, then its reciprocal deviation, and of an LSTM's new cell the mean
    and the reciprocal deviation.
    sharing: how many such calls run on the device at once.
    """
    batch, time, rows = inputs.shape
    shape, name = _checked(Shape.of(batch, weight_hh, weight_hr, norm_hh, cell), inputs.device), CELLS[cell]
    # Backward multiplies what is saved at absent positions by zero, so that it has to be finite; gates and what is kept
    # beside them are read elsewhere only where there is layer normalisation or a projection.
    elsewhere = shape.normed or shape.projected

    def over(width: int, wanted: bool = True, kind: torch.dtype = torch.float32, finite: bool = True) -> Optional:
        fresh = torch.zeros if finite and lengths is not None else torch.empty
        return fresh(batch, time, width, dtype=kind, device=inputs.device) if wanted else None

    output = over(shape.width, kind=dtype)
    h_n = weight_hh.new_empty(batch, shape.width)
    c_n = weight_hh.new_empty(batch, shape.hidden) if name == "lstm" else None
    gates = over(rows, save and keeps_gates(name, zoneout_h), finite=elsewhere)
    extra = over(shape.hidden, save and name in ("lstm", "gru"), finite=elsewhere)
    exact = over(shape.width, save and dtype != torch.float32)
    normed = over(normed_row(rows), save and shape.normed)
    if batch > 0:
        plan = plan_of(shape, False, inputs.device, sharing)
        kernels.recurrence_persistent_forward(
            inputs, weight_hh, _wide(bias_hh), _wide(h0), _wide(c0), weight_hr, _wide(recurrent_mask), norm_hh, norm_c,
            norm_b, _indices(lengths), _whole(reset), _whole(seed), _workspace(plan, inputs), output, h_n, c_n, gates,
            extra, exact, normed, shape.call(time, reverse, training), zoneout_h, zoneout_c, plan,
        )  # fmt: skip
    return output, h_n, c_n, gates, extra, exact, normed


def backward(
    grad_output: Optional, grad_h: Optional, grad_c: Optional, weight_hh: torch.Tensor, h0: Optional, c0: Optional,
    weight_hr: Optional, recurrent_mask: Optional, norm_hh: Optional, norm_c: Optional, norm_b: Optional,
    lengths: Optional, reset: Optional, seed: Optional, output: torch.Tensor, gates: Optional, extra: Optional,
    hidden: Optional, normed_hh: Optional, *, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float,
    training: bool, dtype: torch.dtype, sharing: int = 1,
) -> Tensors:  # fmt: skip
    """-> grad_inputs (B, T, G), grad_recurrent (B, T, G), grad_h0 (B, P), grad_c0 (B, H), grad_projected (B, T, P),
    grad_norm_c (H,), grad_norm_b (H,).
    """
    (batch, time, width), rows, name = output.shape, weight_hh.shape[0], CELLS[cell]
    shape = _checked(Shape.of(batch, weight_hh, weight_hr, norm_hh, cell), output.device)
    states = output if hidden is None else hidden
    fresh = torch.zeros if lengths is not None else torch.empty

    def made(*size: int, wanted: bool = True) -> Optional:
        return fresh(*size, dtype=torch.float32, device=output.device) if wanted else None

    grad_inputs = fresh(batch, time, rows, dtype=torch.float32, device=output.device)
    grad_recurrent = made(batch, time, rows, wanted=name == "gru" and norm_hh is None)
    grad_h0, grad_c0 = made(batch, width), made(batch, shape.hidden, wanted=name == "lstm")
    grad_projected = made(batch, time, width, wanted=shape.projected)
    norms = None if norm_c is None else states.new_zeros(2, batch, shape.hidden)
    normal_product = weight_sums = None
    if normed_hh is not None:
        normal = normed_hh[..., :rows].flatten(0, 1)
        normal_product, weight_sums = product(normal.to(dtype), weight_hh), weight_hh.sum(0, dtype=torch.float32)
    if batch > 0:
        plan = plan_of(shape, True, output.device, sharing)
        grad = torch.zeros_like(states) if grad_output is None else _wide(grad_output)
        kernels.recurrence_persistent_backward(
            grad, _wide(grad_h), _wide(grad_c), weight_hh, _wide(h0), _wide(c0), weight_hr, _wide(recurrent_mask),
            norm_hh, norm_c, norm_b, _indices(lengths), _whole(reset), _whole(seed), states, gates, extra, normed_hh,
            normal_product, weight_sums, _workspace(plan, states), grad_inputs, grad_recurrent, grad_h0, grad_c0,
            grad_projected, None if norms is None else norms[0], None if norms is None else norms[1],
            shape.call(time, reverse, training), zoneout_h, zoneout_c, plan,
        )  # fmt: skip
    if norm_hh is not None and normed_hh is not None:
        grad_recurrent = _through_norm(grad_inputs, gates if name == "gru" else None, norm_hh, normed_hh)
        if lengths is not None:  # what a packed sequence is padded with isn't its own, and may be infinite
            absent = torch.arange(time, device=lengths.device) >= lengths[:, None]
            grad_recurrent.masked_fill_(absent.unsqueeze(2), 0)
    grads = grad_inputs, grad_inputs if grad_recurrent is None else grad_recurrent, grad_h0, grad_c0, grad_projected
    return *grads, *((None, None) if norms is None else norms.sum(1))


def _through_norm(
    grad_inputs: torch.Tensor, gates: Optional, norm_hh: torch.Tensor, normed_hh: torch.Tensor
) -> torch.Tensor:
    """Of W_hh h, from the gradient of the gates' sums; gates: a GRU's, whose reset gate lies between for the last."""
    rows = grad_inputs.shape[-1]
    grad, normal, scale = grad_inputs * norm_hh, normed_hh[..., :rows], normed_hh[..., rows : rows + 1]
    if gates is not None:
        units = rows // 3
        grad[..., 2 * units :] *= gates[..., :units]
    grad -= grad.mean(-1, keepdim=True).addcmul(normal, (grad * normal).mean(-1, keepdim=True))
    return grad.mul_(scale)


def _workspace(plan: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Barriers' counters and exchanged rows, all of them zero."""
    return torch.zeros(plan[-1], dtype=torch.uint8, device=like.device)
