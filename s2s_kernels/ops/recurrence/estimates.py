"""How long a call on CUDA tensors takes by torch's layers, by the persistent kernels and by Triton's: as measured on
the device where something like the call was, else by a model.

The model counts what goes through time; what all share, the products over all positions at once, is left out. Of the
persistent kernels it is csrc/cuda/recurrence_plan.h's, the one that plans them, fitted to an H100. Of torch's layers it
follows how torch chooses cuDNN's algorithm (ATen's cudnn/RNN.cpp); its standard and its persistent algorithm (2.2 us a
step forward, float16, B = 16, H = 768) and Triton's whole-sequence kernels were measured there too, at a few sizes.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import cuda_kernels, measurements
from .autograd import CELLS
from .reference import GATES

if TYPE_CHECKING:
    from . import Asked

STANDARD, PERSISTENT, SMALL = "standard", "persistent", "persistent of few units"  # cuDNN's algorithms

# Nanoseconds. What the host does for a layer and direction of a call: a library's, and a driver's in Python.
LIBRARY_CALL, DRIVER_CALL = 40_000, 150_000
CUDNN_LAUNCHES = 19_000  # cuDNN's standard algorithm: a product and a pointwise kernel, 18 to 28 us a step
HOST_STEP = 30_000  # triton_steps in eager mode
BARRIER = 1_100  # of a grid through the L2 cache, and the latency of what it read
PROGRAM = 500  # latencies of a step within one program


@dataclasses.dataclass(frozen=True)
class Machine:
    """Multiprocessors, bytes of shared memory of a block, whether there are clusters, compute capability."""

    multiprocessors: int
    shared: int
    clusters: bool
    capability: tuple[int, int]

    @property
    def ghz(self) -> float:
        return 1.7 if self.clusters else 1.4

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(device: torch.device) -> "Machine":
        return Machine(*cuda_kernels.machine_of(device), torch.cuda.get_device_capability(device))


def compared(asked: "Asked", backends: tuple[str, ...]) -> tuple[dict[str, float], str]:
    """Seconds a call by each backend, and where they are from, in words."""
    machine, known = Machine.of(asked.device), measurements.known_of(asked.device)
    row = None if known is None else nearest(asked, known["rows"], backends, machine)
    if known is not None and row is not None:
        where = f"{row['batch']} x {row['time']} of {row['inputs']} -> {row['hidden']}"
        source = f"measured on this device on {row['measured']}, for {where}"
        return {name: row["seconds"][name] * asked.time / row["time"] for name in backends}, source
    times = predicted(asked, backends, machine, torch.get_float32_matmul_precision())
    return {name: time * 1e-9 for name, time in times.items()}, "predicted, as nothing like it was measured here"


def nearest(
    asked: "Asked", rows: Sequence[dict[str, Any]], backends: tuple[str, ...], machine: Machine
) -> dict[str, Any] | None:
    """The row of sizes nearest to a call: of the same kind (float32 products as exact), by the same algorithms of
    cuDNN, all sizes within a factor of 2 and T within 4, with a time for each backend."""
    if asked.heads != 1:
        return None
    precision = torch.get_float32_matmul_precision() if asked.dtype == torch.float32 else None
    dtype = str(asked.dtype).removeprefix("torch.")
    kind = (asked.cell, dtype, asked.layers, asked.directions, asked.recording)
    found, least = None, math.inf
    for row in rows:
        if (row["cell"], row["dtype"], row["layers"], row["directions"], row["recording"]) != kind:
            continue
        if (row["width"] != row["hidden"]) != asked.projected or precision not in (None, row["precision"]):
            continue
        away = [abs(math.log2(getattr(asked, name) / row[name])) for name in ("batch", "inputs", "hidden", "width")]
        away.append(abs(math.log2(asked.time / row["time"])) / 2)
        if max(away) > 1 or sum(away) >= least or not set(backends) <= row["seconds"].keys():
            continue
        other = asked._replace(**{name: row[name] for name in ("batch", "time", "inputs", "hidden", "width")})
        if all(algorithm(asked, machine, b) == algorithm(other, machine, b) for b in (False, True)):
            found, least = row, sum(away)
    return found


@functools.lru_cache(maxsize=1024)
def predicted(asked: "Asked", backends: tuple[str, ...], machine: Machine, precision: str) -> dict[str, float]:
    """Nanoseconds a call by each backend. precision: of float32 products, which the models read themselves."""
    model = {"torch": _torch, "cuda": _cuda, "triton": _triton}
    directions = (False, True) if asked.recording else (False,)
    return {name: sum(model[name](asked, machine, backward) for backward in directions) for name in backends}


def algorithm(asked: "Asked", machine: Machine, backward: bool) -> str:
    """cuDNN's, as torch chooses it for sequences of one length."""
    if asked.projected or asked.dtype == torch.float64:
        return STANDARD
    gated = asked.cell in ("lstm", "gru")
    if asked.hidden <= ((128 if gated else 256) if backward else (192 if gated else 384)):
        return SMALL
    whole = asked.hidden % 128 == asked.inputs % 128 == asked.batch % 8 == 0
    fits = whole and asked.hidden <= 1024 and asked.batch <= 128 and asked.layers == asked.directions == 1
    if asked.cell.startswith("rnn"):
        fits = fits and (asked.batch < 96 or asked.hidden < 896)
    major, minor = machine.capability
    able = major >= 8 and minor != 6 and machine.multiprocessors >= 98
    return PERSISTENT if fits and able and asked.dtype == torch.float16 and asked.cell != "gru" else STANDARD


def _torch(asked: "Asked", machine: Machine, backward: bool) -> float:
    weights = GATES[asked.cell] * asked.hidden * asked.width * asked.dtype.itemsize
    rows = max(1.0, asked.batch / 16)
    match algorithm(asked, machine, backward):
        case "persistent":
            # Through the measured point; the exchange grows with the rows and units that all blocks read.
            step = BARRIER + (2200 - BARRIER) * rows * asked.hidden / 768 * (3.3 if backward else 1)
            steps = float(asked.time)
        case "persistent of few units":
            step = PROGRAM + rows * weights / 128 / machine.ghz * (1.5 if backward else 1)
            steps = asked.time * asked.layers
        case _:  # along the diagonals of layers and time, both directions beside each other
            read = weights * asked.directions * asked.layers / (3200 if machine.clusters else 2600) / machine.ghz
            step = max(CUDNN_LAUNCHES, read) * (1.8 if backward else 1)
            steps = asked.time + asked.layers - 1
    return step * steps + LIBRARY_CALL * asked.layers * asked.directions


def _cuda(asked: "Asked", machine: Machine, backward: bool) -> float:
    shape = cuda_kernels.Shape(
        asked.batch, asked.hidden, asked.width, CELLS.index(asked.cell), asked.dtype, asked.normed, asked.projected
    )
    plan = cuda_kernels.plan_of(shape, backward, asked.device, asked.directions)
    facts = [machine.multiprocessors, machine.shared, int(machine.clusters)]
    step = torch.ops.s2s.recurrence_persistent_step(shape.call(asked.time), backward, facts, list(plan))
    # A second direction, on a stream of its own, runs beside the first where the blocks of both are resident.
    team, teams = plan[cuda_kernels.TEAM : cuda_kernels.TEAM + 2]
    beside = asked.directions == 2 and 2 * team * teams <= machine.multiprocessors
    turns = asked.layers * (1 if beside else asked.directions)
    return asked.time * step * turns + DRIVER_CALL * asked.layers * asked.directions


def _triton(asked: "Asked", machine: Machine, backward: bool) -> float:
    from . import choice  # it imports triton

    units, width = asked.hidden // asked.heads, asked.width // asked.heads
    sizes = choice.Sizes(
        CELLS.index(asked.cell), asked.batch, asked.time, units, width, asked.dtype, asked.projected, asked.plain,
        machine.shared,
    )  # fmt: skip
    calls = asked.layers * asked.directions
    if choice.engine_of(sizes) == "triton_steps":
        return asked.time * HOST_STEP * calls + DRIVER_CALL * calls
    gates = GATES[asked.cell]
    columns, depth = (choice.power(count, 32, 1 << 20) for count in (units, width))
    # Clocks: matrix instructions of 16 x 8 x 16 on four quarters, weights out of shared memory, the cell's arithmetic.
    product = depth / 16 * gates * columns / 8 * (6.4 if machine.clusters else 8) / 4
    read, cell = gates * columns * depth * asked.dtype.itemsize / 128, 16 * columns / 256 * 120
    step = PROGRAM + (product + read + cell) / machine.ghz * (2 if backward else 1)
    # Programs beyond one a multiprocessor take turns; a second direction runs beside the first.
    programs = math.ceil(asked.batch / 16) * asked.heads * asked.directions
    return asked.time * step * asked.layers * math.ceil(programs / machine.multiprocessors) + DRIVER_CALL * calls
