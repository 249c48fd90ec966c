"""LSTM, GRU and RNN layers against torch's and against loops over time."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import s2s_kernels as s2s
from s2s_kernels.ops.recurrence.builtin import rounds_more
from s2s_kernels.ops.recurrence.reference import block_diagonal

from . import onnx_peer, work
from .harness import FORWARD, TRAINING, Case, Entrant, Grid, Inputs, on_gpu
from .peers import cell_loop, layer_norm_lstm_loop

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LOOPED = 512  # longest T of a loop over time: it costs milliseconds a step
QUICK_ON_A_GPU = ((16, 512, 512), (20, 512, 512))  # (B, H, T)


def pair(inputs: Inputs, kind: str, width: int, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's layer with the same weights, hidden size as input size."""
    theirs = inputs.module(getattr(nn, kind)(width, width, batch_first=True, **options))
    return inputs.module(getattr(s2s.nn, kind)(width, width, batch_first=True, **options), like=theirs), theirs


def layer(grid: Grid, kind: str, batch: int, width: int, quick: tuple[int, ...] = ()) -> list[Case]:
    """One layer over T."""

    def case(time: int, direction: str) -> Case:
        looped = time <= LOOPED and not grid.quick
        with_onnx = direction == FORWARD and kind != "RNN" and grid.device == "cpu" and onnx_peer.available()
        names = ["ours", "torch", *(["loop"] if looped else []), *(["onnxruntime"] if with_onnx else [])]

        def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
            ours, theirs = pair(inputs, kind, width)
            x = inputs.noise(batch, time, width)
            entrants = {
                "ours": Entrant(lambda: ours(x)[0], (x, *ours.parameters())),
                "torch": Entrant(lambda: theirs(x)[0], (x, *theirs.parameters())),
            }
            if looped:
                entrants["loop"] = Entrant(lambda: cell_loop(kind, x, theirs), (x, *theirs.parameters()))
            if with_onnx:
                entrants["onnxruntime"] = Entrant(onnx_peer.recurrence(kind, theirs, x))
            return entrants

        return Case(
            f"{kind} B{batch} H{width}",
            time,
            batch * time,
            build,
            lambda t: work.recurrence(GATES[kind], batch, t, width, width, t),
            tuple(names),
            (direction,),
            time in quick,
        )

    return [case(time, direction) for time in grid.lengths() for direction in (FORWARD, TRAINING)]


def some_lengths(batch: int, time: int) -> torch.Tensor:
    """Between 1 and T, half of it on average; the same for every call."""
    share = torch.rand(batch, generator=torch.Generator().manual_seed(7))
    return (share * time).long() + 1


def with_lengths(kind: str, batch: int = 32, time: int = 256, width: int = 256) -> Case:
    """Sequences of unequal length, against a PackedSequence."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        ours, theirs = pair(inputs, kind, width)
        x, lengths = inputs.noise(batch, time, width), some_lengths(batch, time)

        def packed() -> torch.Tensor:
            p = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(theirs(p)[0], batch_first=True, total_length=time)[0]

        return {
            "ours": Entrant(lambda: ours(x, lengths=lengths)[0], (x, *ours.parameters())),
            "torch packed": Entrant(packed, (x, *theirs.parameters())),
        }

    def amount(t: int) -> work.Work:
        lengths = some_lengths(batch, t)
        return work.recurrence(GATES[kind], 1, int(lengths.sum()), width, width, int(lengths.max()))

    row = f"{kind} lengths B{batch} H{width}"
    tokens = int(some_lengths(batch, time).sum())
    return Case(row, time, tokens, build, amount, ("ours", "torch packed"), (TRAINING,), quick=True)


def layer_norm(batch: int, width: int, time: int = 512) -> Case:
    """Layer-normalised LSTM against a loop over time."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        ours = inputs.module(s2s.nn.LSTM(width, width, batch_first=True, layer_norm=True))
        x = inputs.noise(batch, time, width)
        p = dict(ours.named_parameters())

        def loop() -> torch.Tensor:
            bias = p["bias_ih_l0"] + p["bias_hh_l0"]
            norms = (p["ln_ih_weight_l0"], p["ln_hh_weight_l0"], p["ln_c_weight_l0"], p["ln_c_bias_l0"])
            return layer_norm_lstm_loop(x, p["weight_ih_l0"], p["weight_hh_l0"], bias, *norms)

        leaves = (x, *ours.parameters())
        return {"ours": Entrant(lambda: ours(x)[0], leaves), "loop": Entrant(loop, leaves)}

    return Case(
        f"layer-norm LSTM B{batch} H{width}",
        time,
        batch * time,
        build,
        lambda t: work.recurrence(4, batch, t, width, width, t),
        ("ours", "loop"),
        (TRAINING,),
        quick=True,
        compared=32,  # normalised gates make the state chaotic: a last bit grows to the state's own size in 500 steps
    )


def regularised(label: str, batch: int = 16, time: int = 256, width: int = 256, **options: Any) -> Case:
    """What a regulariser costs beside our plain layer."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        plain = inputs.module(s2s.nn.LSTM(width, width, batch_first=True))
        ours = inputs.module(s2s.nn.LSTM(width, width, batch_first=True, **options), like=plain)
        x = inputs.noise(batch, time, width)
        return {
            "ours": Entrant(lambda: ours(x)[0], (x, *ours.parameters())),
            "ours plain": Entrant(lambda: plain(x)[0], (x, *plain.parameters())),
        }

    return Case(
        f"LSTM {label} B{batch} H{width}",
        time,
        batch * time,
        build,
        lambda t: work.recurrence(4, batch, t, width, width, t),
        ("ours", "ours plain"),
        (TRAINING,),
        agree=False,
    )


def of_heads(kind: str, heads: int, batch: int = 8, time: int = 256, width: int = 512) -> Case:
    """Block-diagonal recurrent weights beside the matrix that has them, of our plain layer."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        ours = inputs.module(getattr(s2s.nn, kind)(width, width, batch_first=True, heads=heads))
        matrix = getattr(s2s.nn, kind)(width, width, batch_first=True)
        state = {name: value.detach().cpu().float() for name, value in ours.state_dict().items()}
        state["weight_hh_l0"] = block_diagonal(state["weight_hh_l0"], GATES[kind])
        matrix.load_state_dict(state)
        matrix, x = inputs.module(matrix), inputs.noise(batch, time, width)
        return {
            "ours": Entrant(lambda: ours(x)[0], (x, *ours.parameters())),
            "ours matrix": Entrant(lambda: matrix(x)[0], (x, *matrix.parameters())),
        }

    def amount(t: int) -> work.Work:
        return work.recurrence(GATES[kind], batch, t, width, width, t, heads)

    row = f"{kind} {heads} heads B{batch} H{width}"
    return Case(row, time, batch * time, build, amount, ("ours", "ours matrix"))


def decoding(kind: str, rival: str, batch: int = 1, time: int = 256, width: int = 512) -> Case:
    """A cell step by step, as a decoder calls it, against torch's cell ("torch") or the whole sequence in one call of
    ours ("ours sequence")."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        theirs = inputs.module(getattr(nn, f"{kind}Cell")(width, width))
        ours = inputs.module(getattr(s2s.nn, f"{kind}Cell")(width, width), like=theirs)
        layer = getattr(s2s.nn, kind)(width, width, batch_first=True)
        layer.load_state_dict({f"{name}_l0": value for name, value in theirs.state_dict().items()})
        whole, x = inputs.module(layer), inputs.noise(batch, time, width)

        def loop(cell: Any) -> torch.Tensor:
            state: Any = None
            outputs = []
            for step in x.unbind(1):
                state = cell(step, state)
                outputs.append(state[0] if kind == "LSTM" else state)
            return torch.stack(outputs, 1)

        peers = {
            "torch": Entrant(lambda: loop(theirs), (x, *theirs.parameters())),
            "ours sequence": Entrant(lambda: whole(x)[0], (x, *whole.parameters())),
        }
        return {"ours": Entrant(lambda: loop(ours), (x, *ours.parameters())), rival: peers[rival]}

    return Case(
        f"{kind} cell{'' if rival == 'torch' else ' / sequence'} B{batch} H{width}",
        time,
        batch * time,
        build,
        lambda t: work.recurrence(GATES[kind], batch, t, width, width, t),
        ("ours", rival),
        (FORWARD,),
        quick=True,
    )


def tiny(batch: int = 5, time: int = 3, width: int = 16) -> Case:
    """Three bidirectional layers over three positions: the cost of a call."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        ours, theirs = pair(inputs, "LSTM", width, num_layers=3, bidirectional=True)
        x = inputs.noise(batch, time, width)
        return {
            "ours": Entrant(lambda: ours(x)[0], (x, *ours.parameters())),
            "torch": Entrant(lambda: theirs(x)[0], (x, *theirs.parameters())),
        }

    def amount(t: int) -> work.Work:
        first, other = (work.recurrence(4, batch, t, size, width, t) for size in (width, 2 * width))
        return work.chain([first] * 2 + [other] * 4)

    return Case(
        f"3-layer bidirectional LSTM B{batch} H{width}",
        time,
        batch * time,
        build,
        amount,
        ("ours", "torch"),
        quick=True,
        varied=False,
    )


def on_a_gpu(grid: Grid, kind: str, batch: int, width: int, time: int = 512, **options: Any) -> Case:
    """A layer, or several, beside cuDNN's and each of our backends, forced, from which the choice among them is made.
    In float16 one of the rows is inside the window in which cuDNN keeps the weights on the chip; in bfloat16 it has no
    such window."""
    layers, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    forced = able(kind, width, options, grid.dtype)
    inside = (kind, batch, width, time, options) == ("LSTM", 16, 768, 1024, {})
    bar = {torch.bfloat16: "GR1" if kind != "RNN" else "", torch.float16: "GR2" if inside else ""}.get(grid.dtype, "")

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        ours, theirs = pair(inputs, kind, width, **options)
        x = inputs.noise(batch, time, width)

        def by(backend: str) -> torch.Tensor:
            with s2s.use_backend(backend):
                return ours(x)[0]

        return {
            "ours": Entrant(lambda: ours(x)[0], (x, *ours.parameters())),
            "torch": Entrant(lambda: theirs(x)[0], (x, *theirs.parameters())),
            **{name: Entrant(functools.partial(by, name), (x, *ours.parameters())) for name in forced},
        }

    def amount(t: int) -> work.Work:
        first, other = (work.recurrence(GATES[kind], batch, t, size, width, t) for size in (width, directions * width))
        return work.chain([first] * directions + [other] * (directions * (layers - 1)))

    label = (f" {layers} layers" if layers > 1 else "") + (" bidirectional" if directions > 1 else "")
    row = f"{kind}{label} B{batch} H{width}"
    cell = "rnn_tanh" if kind == "RNN" else kind.lower()
    sizes = {
        "cell": cell, "batch": batch, "inputs": width, "hidden": width, "width": width, "layers": layers,
        "directions": directions, "precision": torch.get_float32_matmul_precision(), "torch rounds": rounds_more(),
    }  # fmt: skip
    case = Case(row, time, batch * time, build, amount, ("ours", "torch", *forced), sizes=sizes)
    return on_gpu(case, bar, quick=inside or (kind != "RNN" and (batch, width, time) in QUICK_ON_A_GPU))


def able(kind: str, width: int, options: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """Which of our backends for CUDA tensors cover a layer here."""
    if not torch.cuda.is_available():
        return []
    layer, names = getattr(s2s.nn, kind)(width, width, **options, device="cuda", dtype=dtype), []
    for name in ("cuda", "triton"):
        try:
            with s2s.use_backend(name):
                s2s.explain(layer, torch.empty(1, 1, width, device="cuda", dtype=dtype))
        except NotImplementedError:
            continue
        names.append(name)
    return names


def parted(grid: Grid, kind: str, label: str, batch: int = 32, time: int = 512, width: int = 512) -> Case:
    """What lengths or 1 % of resets cost beside our plain layer, of as many steps."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        plain = inputs.module(getattr(s2s.nn, kind)(width, width, batch_first=True))
        x = inputs.noise(batch, time, width)
        if label == "lengths":
            lengths = some_lengths(batch, time)
            lengths[0] = time
            options = {"lengths": lengths.to(inputs.device)}
        else:
            drawn = torch.rand(batch, time, generator=torch.Generator().manual_seed(7))
            options = {"reset": (drawn < 0.01).to(inputs.device)}
        leaves = (x, *plain.parameters())
        return {
            "ours": Entrant(lambda: plain(x, **options)[0], leaves),
            "ours plain": Entrant(lambda: plain(x)[0], leaves),
        }

    case = Case(
        f"{kind} {label} B{batch} H{width}",
        time,
        batch * time,
        build,
        lambda t: work.recurrence(GATES[kind], batch, t, width, width, t),
        ("ours", "ours plain"),
        agree=False,
    )
    return on_gpu(case, "GR4" if grid.dtype == torch.bfloat16 else "", quick=True)


def for_a_gpu(grid: Grid) -> list[Case]:
    if grid.device != "cuda":
        return []
    return [
        *(parted(grid, kind, label) for kind in ("LSTM", "GRU") for label in ("lengths", "resets")),
        *(on_a_gpu(grid, kind, *sizes, **options) for kind, sizes, options in compared()),
    ]


def compared() -> Iterator[tuple[str, tuple[int, ...], dict[str, Any]]]:
    """Where the choice among backends is measured: (B, H) and, where it isn't 512, T."""
    for kind, sizes in (
        ("LSTM", ((1, 512), (16, 64), (16, 128), (16, 256), (16, 512), (16, 768, 1024), (16, 1024), (20, 512))),
        ("LSTM", ((64, 512), (128, 256), (128, 768), (160, 768), (16, 512, 16), (1, 256, 16))),
        ("GRU", ((1, 512), (16, 128), (16, 256), (16, 512), (16, 1024), (128, 512), (16, 512, 16))),
        ("RNN", ((16, 128), (16, 512), (128, 512))),
    ):
        yield from ((kind, size, {}) for size in sizes)
    for kind in ("LSTM", "GRU"):
        yield kind, (16, 512), {"bidirectional": True}
        yield kind, (16, 512), {"num_layers": 2}
        yield kind, (16, 512), {"num_layers": 2, "bidirectional": True}
    yield "LSTM", (16, 512), {"num_layers": 3}
    yield "GRU", (16, 768), {"num_layers": 2, "bidirectional": True}


def cases(grid: Grid) -> list[Case]:
    return [
        *layer(grid, "LSTM", 1, 256, quick=(32, 128, 512, 1024)),
        *layer(grid, "LSTM", 8, 256, quick=(512,)),
        *layer(grid, "LSTM", 32, 256, quick=(64,)),
        *layer(grid, "LSTM", 1, 512),
        *layer(grid, "LSTM", 8, 100),
        *layer(grid, "LSTM", 8, 257),
        *layer(grid, "GRU", 1, 256, quick=(32, 128, 512)),
        *layer(grid, "GRU", 8, 256),
        *layer(grid, "GRU", 1, 128, quick=(64,)),
        *layer(grid, "RNN", 1, 256, quick=(512,)),
        *layer(grid, "RNN", 8, 256),
        with_lengths("LSTM"),
        with_lengths("GRU"),
        layer_norm(8, 256),
        layer_norm(1, 128),
        regularised("weight drop", weight_dropout=0.5),
        regularised("recurrent dropout", recurrent_dropout=0.3),
        regularised("zoneout", zoneout=0.1),
        of_heads("LSTM", 8),
        *(decoding(kind, rival) for kind in GATES for rival in ("torch", "ours sequence")),
        tiny(),
        *for_a_gpu(grid),
    ]


def test_recurrence(case: str, direction: str, entrant: str, race: Any) -> None:
    race(case, direction, entrant)
