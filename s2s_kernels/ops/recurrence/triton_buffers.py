"""What the Triton engines of the recurrences allocate, and the numbers they pass, alike."""

import dataclasses
from typing import Any

import torch

from ..random import threshold
from .autograd import CELLS, keeps_gates, normed_row
from .reference import GATES
from .triton_cells import DRAWN, EXPECTED, UNZONED

Optional = torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class Zones:
    """Of h and of c: the probabilities, the words from which a unit is renewed, and what zoneout does."""

    numbers: tuple[float, float, int, int]
    kinds: dict[str, int]

    @staticmethod
    def of(zoneout_h: float, zoneout_c: float, training: bool) -> "Zones":
        kind_h, kind_c = (
            (UNZONED if p == 0 else DRAWN if training else EXPECTED).value for p in (zoneout_h, zoneout_c)
        )
        numbers = zoneout_h, zoneout_c, threshold(zoneout_h), threshold(zoneout_c)
        return Zones(numbers, {"ZONE_H": kind_h, "ZONE_C": kind_c})


def state(initial: Optional, shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """In float32, for the kernels to change."""
    if initial is None:
        return torch.zeros(shape, dtype=torch.float32, device=like.device)
    return initial.to(torch.float32, copy=True).contiguous()


@dataclasses.dataclass(frozen=True)
class Results:
    """What forward gives: the output, the states as they change, and what it saves."""

    output: torch.Tensor
    h: torch.Tensor
    c: Optional
    gates: Optional
    extra: Optional
    hidden: Optional
    normed: Optional

    @staticmethod
    def of(
        inputs: torch.Tensor, width: int, h0: Optional, c0: Optional, cell: int, zoneout_h: float, normed: bool,
        save: bool, dtype: torch.dtype,
    ) -> "Results":  # fmt: skip
        (batch, time, sums), name = inputs.shape, CELLS[cell]
        units = sums // GATES[name]

        def kept(wanted: bool, size: int) -> Optional:
            return inputs.new_empty(batch, time, size) if save and wanted else None

        return Results(
            inputs.new_empty((batch, time, width), dtype=dtype),
            state(h0, (batch, width), inputs),
            state(c0, (batch, units), inputs) if name == "lstm" else None,
            kept(keeps_gates(name, zoneout_h), sums),
            kept(name in ("lstm", "gru"), units),
            kept(dtype != torch.float32, width),
            kept(normed, normed_row(sums)),
        )

    def given(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What an engine's forward returns."""
        c = None if self.c is None else self.c.to(dtype)
        return self.output, self.h.to(dtype), c, self.gates, self.extra, self.hidden, self.normed


@dataclasses.dataclass(frozen=True)
class Gradients:
    """What backward gives; the states' change as it goes."""

    inputs: torch.Tensor
    recurrent: Optional  # where it is another than `inputs`
    h: torch.Tensor
    c: Optional
    projected: Optional
    norm_c: Optional  # a row's
    norm_b: Optional

    @staticmethod
    def of(
        output: torch.Tensor, sums: int, grad_h: Optional, grad_c: Optional, cell: int, projected: bool, normed: bool
    ) -> "Gradients":
        (batch, time, width), name = output.shape, CELLS[cell]
        units = sums // GATES[name]

        def empty(*shape: int) -> torch.Tensor:
            return output.new_empty(shape, dtype=torch.float32)

        norm_c, norm_b = None, None
        if normed and name == "lstm":
            norm_c, norm_b = output.new_zeros((2, batch, units), dtype=torch.float32)
        return Gradients(
            empty(batch, time, sums),
            empty(batch, time, sums) if normed or name == "gru" else None,
            state(grad_h, (batch, width), output),
            state(grad_c, (batch, units), output) if name == "lstm" else None,
            empty(batch, time, width) if projected else None,
            norm_c,
            norm_b,
        )

    def given(self) -> tuple[Any, ...]:
        """What an engine's backward returns."""
        recurrent = self.inputs if self.recurrent is None else self.recurrent
        norms = (None if rows is None else rows.sum(0) for rows in (self.norm_c, self.norm_b))
        return self.inputs, recurrent, self.h, self.c, self.projected, *norms
