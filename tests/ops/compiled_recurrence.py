"""The calls of the recurrences whose launches are compiled for each architecture."""

from collections.abc import Iterator

import torch

from s2s_kernels.ops.recurrence import choice, device
from s2s_kernels.ops.recurrence.autograd import CELLS, keeps_gates
from s2s_kernels.ops.recurrence.reference import GATES

PRODUCTS = ("forward_kernel", "backward_kernel")  # whose instructions are read
EVERYWHERE = (*PRODUCTS, "cell_kernel", "cell_gradient_kernel")


def call(
    dtype: torch.dtype, cell: str, hidden: int, batch: int = 5, time: int = 2, *, engine: str = "triton_steps",
    everything: bool = False, normed: bool = False, projected: int | None = None, reverse: bool = False,
) -> None:  # fmt: skip
    """Forward, backward and a step of one engine."""
    number, rows, width = CELLS.index(cell), GATES[cell] * hidden, projected or hidden
    lstm = cell == "lstm"

    def noise(*shape: int, wanted: bool = True) -> torch.Tensor | None:
        return torch.randn(shape).to(dtype) if wanted else None

    x, weight_ih, weight_hh = noise(batch, time, 24), noise(rows, 24), noise(rows, width)
    assert x is not None and weight_ih is not None and weight_hh is not None
    h0, c0 = noise(batch, width), noise(batch, hidden, wanted=lstm)
    weight_hr = noise(width, hidden, wanted=projected is not None)
    mask = noise(batch, width, wanted=everything)
    norms = (
        *(noise(rows, wanted=normed) for _ in range(2)),
        *(noise(hidden, wanted=normed and lstm) for _ in range(2)),
    )
    lengths, reset = torch.full((batch,), time), torch.zeros(batch, time, dtype=torch.bool)
    seed = torch.tensor([1, 2]) if everything else None
    zones = (0.5, 0.5 if lstm else 0.0) if everything else (0.0, 0.0)
    rest = (number, reverse, *zones, everything, 0.5 if everything else 0.0, False, 0)
    original, choice.engine_of = choice.engine_of, lambda sizes: engine
    try:
        results = device.recurrence_forward(
            x, weight_ih, weight_hh, noise(rows), noise(rows), h0, c0, weight_hr, mask, *norms, lengths, reset, seed,
            *rest, 1,
        )  # fmt: skip
        found = iter(results)
        output, h_n = next(found), next(found)
        c_n = next(found) if lstm else None
        gates = next(found) if keeps_gates(cell, zones[0]) else None
        extra = next(found) if cell in ("lstm", "gru") else None
        states = output if dtype == torch.float32 else next(found)
        kept = (gates, extra, states, next(found) if normed else None)
        given = (x, weight_ih, weight_hh, h0, c0, weight_hr, mask, *norms, lengths, reset, seed)
        leaves = (x, weight_ih, weight_hh, x, x, *given[3:11])
        needs = sum((leaf is not None) << place for place, leaf in enumerate(leaves))
        device.recurrence_backward(output, h_n, c_n, *given, *kept, *rest, needs)
    finally:
        choice.engine_of = original
    if projected is None and not everything:
        device.recurrence_step(x[:, 0], weight_ih, weight_hh, noise(rows), noise(rows), h0, c0, number)


def calls(arch: int) -> Iterator[tuple[torch.dtype, str, bool]]:
    """Makes the calls; yields the dtype and the precision of what they have launched, and whether that is a sample.

    Of the sequence's kernel the heaviest that `choice` names for the shared memory of an architecture."""
    every = {"everything": True, "normed": True}
    call(torch.bfloat16, "lstm", 64, engine="triton_sequence", projected=64, **every)
    yield torch.bfloat16, "highest", arch == 80
    call(torch.float16, "lstm", 128 if arch > 80 else 64, engine="triton_sequence", reverse=True)
    yield torch.float16, "highest", arch == 100
    call(torch.bfloat16, "rnn_relu", 64, engine="triton_sequence")
    call(torch.bfloat16, "gru", 512, reverse=True)
    yield torch.bfloat16, "highest", arch == 90
    call(torch.bfloat16, "lstm", 768, projected=256, **every)
    yield torch.bfloat16, "highest", False
    call(torch.float32, "gru", 512, reverse=True)
    yield torch.float32, "highest", False
    call(torch.float16, "lstm", 512)
    call(torch.float32, "gru", 100, **every)
    call(torch.bfloat16, "rnn_tanh", 300, reverse=True, **every)
    call(torch.bfloat16, "rnn_relu", 300)
    yield torch.bfloat16, "highest", False
    call(torch.float16, "gru", 128 if arch > 80 else 64, engine="triton_sequence", **every)
    call(torch.bfloat16, "rnn_tanh", 128, engine="triton_sequence", **every)
    call(torch.bfloat16, "lstm", 32, engine="triton_sequence", projected=32, **every)
    call(torch.bfloat16, "lstm", 64, engine="triton_sequence", everything=True)
    call(torch.bfloat16, "lstm", 5, engine="triton_sequence")
    call(torch.bfloat16, "lstm", 100 if arch > 80 else 50, engine="triton_sequence")
    yield torch.bfloat16, "highest", False
    torch.set_float32_matmul_precision("medium")
    call(torch.float32, "lstm", 32, engine="triton_sequence")
    call(torch.float32, "gru", 64, engine="triton_sequence")
    yield torch.float32, "medium", False
    torch.set_float32_matmul_precision("highest")


def again() -> None:
    """Another batch and length, odd ones too, that compile to the same kernels."""
    call(torch.float16, "lstm", 512, 1, 3)
    call(torch.bfloat16, "lstm", 768, 64, 5, projected=256, everything=True, normed=True)
    call(torch.float32, "gru", 512, 33, 1, reverse=True)
    call(torch.bfloat16, "rnn_relu", 64, 33, 7, engine="triton_sequence")
