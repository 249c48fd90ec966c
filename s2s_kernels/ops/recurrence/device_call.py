"""A call of a recurrence on CUDA tensors, as device.py and the engines take it."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..random import threshold
from . import choice
from .autograd import CELLS, STREAM_WEIGHT, Unfit, keeps_gates, normed_row
from .device_heads import apart
from .reference import GATES, block_diagonal, whole_shape
from .triton_rows import dropped

Optional = torch.Tensor | None


class Packing(NamedTuple):
    """Where the positions of a packed sequence stand in (B, T), and the other way round."""

    batch: int
    time: int
    to_padded: torch.Tensor  # (B T,)
    to_packed: torch.Tensor  # (N,)

    @staticmethod
    def of(operator: str, lengths: torch.Tensor, positions: int) -> "Packing":
        batch, device = lengths.shape[0], lengths.device
        time = 0
        if batch:
            ordered = (lengths[1:] <= lengths[:-1]).all() & (lengths[-1] >= 0)
            time, total, ordered = torch.stack([lengths[0], lengths.sum(), ordered.to(lengths.dtype)]).tolist()
            if not ordered or total != positions:
                raise RuntimeError(f"{operator}: lengths must be in descending order and sum to {positions}, x's rows")
        times = torch.arange(time, device=device)
        ends = (lengths[:, None] > times).sum(0).cumsum(0)
        starts = F.pad(ends, (1, 0))[:-1]
        padded = starts + torch.arange(batch, device=device)[:, None]
        position = torch.arange(positions, device=device)
        at = torch.searchsorted(ends, position, right=True)
        packed = (position - starts[at]) * time + at if positions else position
        return Packing(batch, time, padded.clamp(max=max(0, positions - 1)).flatten(), packed)

    def pad(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) of (N, ...): past a length stands what is another row's."""
        return values.index_select(0, self.to_padded).view(self.batch, self.time, *values.shape[1:])

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        return values.flatten(0, 1).index_select(0, self.to_packed)


class Call(NamedTuple):
    """What forward and backward share: the tensors as an engine takes them, and its options. heads: of which the rows
    stand apart (`device_heads`) and weight_hh keeps three dimensions; 1 where it is one matrix, made of them or given.
    """

    heads: int
    sizes: choice.Sizes
    packing: Packing | None
    lengths: Optional
    reset: Optional
    weight_hh: torch.Tensor
    h0: Optional
    c0: Optional
    weight_hr: Optional
    mask: Optional
    norm_ih: Optional
    norm_hh: Optional
    norm_c: Optional
    norm_b: Optional
    seed: Optional
    options: dict[str, Any]  # of both directions of an engine

    @property
    def apart(self) -> bool:
        """Whether heads are rows of their own."""
        return self.weight_hh.dim() == 3

    @property
    def engine(self) -> Any:
        return choice.load(choice.engine_of(self.sizes))

    def recurrent(self) -> tuple[Optional, ...]:
        """What an engine takes of the recurrent part, from h0 to seed."""
        return (
            self.h0, self.c0, self.weight_hr, self.mask, self.norm_hh, self.norm_c, self.norm_b, self.lengths,
            self.reset, self.seed,
        )  # fmt: skip

    def padded(self, values: Optional) -> Optional:
        return values if values is None or self.packing is None else self.packing.pad(values)

    def packed(self, values: Optional) -> Optional:
        return values if values is None or self.packing is None else self.packing.pack(values)

    def present(self) -> Optional:
        """Which positions count, (B, T, 1); None where all do."""
        if self.lengths is None:
            return None
        lengths = self.lengths[: self.sizes.batch]
        return (torch.arange(self.sizes.time, device=lengths.device) < lengths[:, None]).unsqueeze(2)


def contiguous(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.contiguous()


def wide(tensor: Optional) -> Optional:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def call_of(
    operator: str, x: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, biases: tuple[Optional, ...],
    h0: Optional, c0: Optional, weight_hr: Optional, mask: Optional, norms: tuple[Optional, ...], lengths: Optional,
    reset: Optional, seed: Optional, cell: int, reverse: bool, zoneout_h: float, zoneout_c: float, training: bool,
    weight_dropout: float, packed: bool, cuda: int,
) -> Call:  # fmt: skip
    check(operator, x, weight_ih, weight_hh, biases, h0, c0, weight_hr, mask, norms, lengths, reset, cell, packed)
    drawn = weight_dropout > 0 or (training and max(zoneout_h, zoneout_c) > 0)
    if drawn and (seed is None or seed.shape != (2,) or seed.dtype != torch.int64):
        raise Unfit(f"{operator}: seed must be two numbers of int64")
    packing = None
    if packed:
        assert lengths is not None
        packing = Packing.of(operator, lengths, x.shape[0])
        batch, time = packing.batch, packing.time
    else:
        batch, time, _ = x.shape
    rows, width = whole_shape(weight_hh)
    gates = GATES[CELLS[cell]]
    plain = zoneout_h == zoneout_c == 0 and weight_hr is mask is norms[0] is None
    shared = choice.shared_memory(x.device)
    sizes = choice.Sizes(
        cell, batch, time, rows // gates, width, x.dtype, weight_hr is not None, plain, shared, cuda > 0
    )
    heads = 1
    if weight_hh.dim() == 3:
        heads = weight_hh.shape[0]
        own = sizes._replace(units=sizes.units // heads, width=width // heads)
        # A kernel for the whole sequence holds a head's weights. What takes a step at a time takes all heads' at once.
        if not packed and choice.engine_of(own) == "triton_sequence":
            sizes = own
            h0, c0, mask = (None if v is None else apart(v, heads) for v in (h0, c0, mask))
            lengths = None if lengths is None else lengths.repeat(heads)
            reset = None if reset is None else reset.repeat(heads, 1)
        else:
            heads, weight_hh = 1, block_diagonal(weight_hh, gates)
    if weight_dropout > 0:
        assert seed is not None
        weight_hh = dropped(weight_hh, seed, *dropout(weight_dropout), STREAM_WEIGHT)
    options = {
        "cell": cell, "reverse": reverse, "zoneout_h": zoneout_h, "zoneout_c": zoneout_c, "training": training,
        "dtype": x.dtype,
    }  # fmt: skip
    if cuda:
        options["sharing"] = cuda
    norm_ih, norm_hh, norm_c, norm_b = map(wide, norms)
    return Call(
        heads, sizes, packing, contiguous(lengths), contiguous(reset), weight_hh.contiguous(), contiguous(h0),
        contiguous(c0), contiguous(weight_hr), contiguous(mask), norm_ih, norm_hh, norm_c, norm_b, seed, options,
    )  # fmt: skip


def dropout(p: float) -> tuple[int, float]:
    """The word from which an element is kept, and what it is multiplied by."""
    return threshold(p), 1 / (1 - p) if p < 1 else 1.0


def check(
    operator: str, x: torch.Tensor, weight_ih: torch.Tensor, weight_hh: torch.Tensor, biases: tuple[Optional, ...],
    h0: Optional, c0: Optional, weight_hr: Optional, mask: Optional, norms: tuple[Optional, ...], lengths: Optional,
    reset: Optional, cell: int, packed: bool,
) -> None:  # fmt: skip
    """What a raw call could get wrong about the sizes by which the kernels read."""
    gates = GATES[CELLS[cell]] if 0 <= cell < len(CELLS) else 0
    fits = gates > 0 and x.dim() == (2 if packed or operator == "recurrence_step" else 3)
    ranks = (2, 3) if operator != "recurrence_step" else (2,)
    fits = fits and weight_ih.dim() == 2 and weight_hh.dim() in ranks and weight_ih.shape[1] == x.shape[-1]
    fits = fits and weight_ih.shape[0] == whole_shape(weight_hh)[0] > 0 and weight_ih.shape[0] % gates == 0
    if fits and weight_hh.dim() == 3:  # without what goes across heads
        fits = weight_hh.shape[1] == gates * weight_hh.shape[2]
        fits = fits and all(v is None for v in (weight_hr, *norms))
    fits = fits and x.dtype != torch.float64
    fits = fits and (not packed or (lengths is not None and lengths.dim() == 1 and reset is None))
    if fits:
        batch = lengths.shape[0] if packed and lengths is not None else x.shape[0]
        rows, width = whole_shape(weight_hh)
        units = rows // gates
        fits = width == units if weight_hr is None else weight_hr.shape == (width, units) and CELLS[cell] == "lstm"
        for tensors, shape in (
            ((h0, mask), (batch, width)), ((c0,), (batch, units)), ((*biases, *norms[:2]), (rows,)),
            (norms[2:], (units,)), ((lengths,), (batch,)), ((reset,), x.shape[:2]),
        ):  # fmt: skip
            for tensor in tensors:
                fits = fits and (tensor is None or tensor.shape == shape)
        for tensor in (weight_ih, weight_hh, *biases, h0, c0, weight_hr, mask, *norms):
            fits = fits and (tensor is None or tensor.dtype == x.dtype)
        fits = fits and (lengths is None or lengths.dtype in (torch.int32, torch.int64))
        fits = fits and (reset is None or reset.dtype == torch.bool)
    if not fits:
        raise Unfit(
            f"{operator}: the arguments don't fit together: x {tuple(x.shape)} {x.dtype}, "
            f"weight_ih {tuple(weight_ih.shape)} {weight_ih.dtype}, weight_hh {tuple(weight_hh.shape)}, cell {cell}"
        )


def check_saved(
    call: Call, x: torch.Tensor, weight_hh: torch.Tensor, grads: tuple[Optional, ...], saved: tuple[Optional, ...]
) -> None:  # fmt: skip
    """What a raw call of backward could get wrong beside. grads: of output, h and c. saved: gates, extra, hidden and
    the normalised product, as `autograd`'s fakes have them."""
    (rows, width), positions, name = whole_shape(weight_hh), x.shape[:-1], CELLS[call.options["cell"]]
    units, batch = rows // GATES[name], x.shape[0] if call.packing is None else call.packing.batch
    lstm, heads = name == "lstm", weight_hh.shape[:1] if weight_hh.dim() == 3 else ()

    def kept(size: int, apart: bool = True) -> tuple[int, ...]:
        return (*heads, *positions, size // heads[0]) if heads and apart else (*positions, size)

    gates, extra, hidden, normed = saved
    fits = (gates is not None) == keeps_gates(name, call.options["zoneout_h"])
    fits = fits and (extra is not None) == (name in ("lstm", "gru")) and hidden is not None
    fits = fits and (normed is not None) == (call.norm_hh is not None) and (lstm or grads[2] is None)
    for tensor, shape in (
        (grads[0], (*positions, width)), (grads[1], (batch, width)), (grads[2], (batch, units)), (gates, kept(rows)),
        (extra, kept(units)), (hidden, kept(width, x.dtype != torch.float32)), (normed, kept(normed_row(rows))),
    ):  # fmt: skip
        fits = fits and (tensor is None or (tensor.shape == shape and tensor.is_floating_point()))
    if not fits:
        given = [None if v is None else (tuple(v.shape), v.dtype) for v in (*grads, *saved)]
        raise Unfit(f"recurrence_backward: the arguments don't fit together: x {tuple(x.shape)}, beside it {given}")
