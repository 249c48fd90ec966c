"""The persistent CUDA recurrences without a GPU: their source on the host, behind the engine's two functions, against
the definition in float64."""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_recurrence import FIELDS, FLAGS, Layout, build, emulated
from torch.overrides import TorchFunctionMode

from s2s_kernels.ops.random import keep_mask
from s2s_kernels.ops.recurrence import cuda_kernels, reference
from s2s_kernels.ops.recurrence.autograd import CELLS, STREAM_C, STREAM_H
from s2s_kernels.testing import Draw
from s2s_kernels.testing.compilation import SHARED, cuda_tool

SOURCES = Path(__file__).parents[1] / "csrc"
LSTM, GRU, TANH, RELU = range(4)
BF16, F16, F32, TF32 = torch.bfloat16, torch.float16, torch.float32, "tf32"
GRID, CLUSTER = Layout(), Layout(cluster=True)


@pytest.fixture(scope="module", autouse=True)
def library():
    try:
        return build()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    cell: int = LSTM
    kind: Any = F32
    batch: int = 3
    time: int = 4
    hidden: int = 11
    layout: Layout = GRID
    lengths: tuple[int, ...] | None = None
    index: torch.dtype = torch.int64
    reset: bool = False
    reverse: bool = False
    state: bool = True
    bias: bool = True
    mask: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    training: bool = False
    wanted: tuple[str, ...] = ("output", "h", "c")  # of which there is a gradient
    normed: bool = False
    projected: int | None = None

    @property
    def dtype(self):
        return F32 if self.kind == TF32 else self.kind

    @property
    def width(self):
        return self.projected or self.hidden

    def gap(self, device):
        projected = self.projected is not None
        return cuda_kernels.gap(self.hidden, self.width, self.cell, self.dtype, device, projected, self.normed)

    def arguments(self):
        """The engine's tensors, in the order of its parameters; absent positions hold NaN."""
        draw, rows = Draw(self.dtype), reference.GATES[CELLS[self.cell]] * self.hidden
        inputs = draw(self.batch, self.time, rows, dtype=F32)
        weight = draw(rows, self.width, scale=0.7 * (self.width + 1) ** -0.5)
        bias = draw(rows, scale=0.5, dtype=F32) if self.bias and (self.cell == GRU or self.normed) else None
        h0 = draw(self.batch, self.width) if self.state else None
        c0 = draw(self.batch, self.hidden) if self.state and self.cell == LSTM else None
        weight_hr = draw(self.width, self.hidden, scale=(self.hidden + 1) ** -0.5) if self.projected else None
        mask = 2 * draw.mask(self.batch, self.width).to(self.dtype) if self.mask else None
        norms = [1 + draw(rows, scale=0.3, dtype=F32) if self.normed else None]
        for middle in (1, 0):
            known = self.normed and self.cell == LSTM
            norms.append(middle + draw(self.hidden, scale=0.3, dtype=F32) if known else None)
        lengths = reset = None
        if self.lengths is not None:
            lengths = torch.tensor(self.lengths, dtype=self.index)
            inputs[torch.arange(self.time) >= lengths.unsqueeze(1)] = torch.nan
        if self.reset:
            reset = draw.mask(self.batch, self.time, p=0.4)
        seed = torch.tensor([123456789012345, -5]) if self.training else None
        return inputs, weight, bias, h0, c0, weight_hr, mask, *norms, lengths, reset, seed

    def options(self):
        h, c = self.zoneout
        options = {"cell": self.cell, "reverse": self.reverse, "zoneout_h": h, "zoneout_c": c}
        return {**options, "training": self.training, "dtype": self.dtype}

    def gradients(self):
        draw = Draw(self.dtype, seed=1)
        sizes = {"output": (self.batch, self.time, self.width), "h": (self.batch, self.width)}
        sizes |= {"c": (self.batch, self.hidden)} if self.cell == LSTM else {}
        return {name: draw(*size) if name in self.wanted else None for name, size in sizes.items()}


class ProductOfTF32(torch.autograd.Function):
    """a @ b of tf32's operands, in backward too, as eager torch multiplies on a GPU where that is allowed."""

    @staticmethod
    def rounded(tensor):
        bits = tensor.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.mm(ProductOfTF32.rounded(a), ProductOfTF32.rounded(b))

    @staticmethod
    def backward(ctx, grad):
        a, b = map(ProductOfTF32.rounded, ctx.saved_tensors)
        grad = ProductOfTF32.rounded(grad)
        return torch.mm(grad, b.t()), torch.mm(a.t(), grad)


class ProductsOfTF32(TorchFunctionMode):
    """Of matrices; the input product, of a batch of them, is not the engine's."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__) and args[0].dim() == 2:
            return ProductOfTF32.apply(*args)
        return function(*args, **kwargs or {})


def defined(case, arguments, gradients, dtype):
    """Results and gradients by the definition, whose input product has the identity as its weights, not normalised."""
    inputs, *_, lengths, reset, seed = arguments
    names = ("inputs", "weight_hh", "bias_hh", "h0", "c0", "weight_hr", "recurrent_mask", "norm_hh", "norm_c", "norm_b")
    leaves = {
        name: None if tensor is None else tensor.to(dtype).clone().requires_grad_()
        for name, tensor in zip(names, arguments, strict=False)
    }
    update = [None, None]
    for place, (p, stream) in enumerate(zip(case.zoneout, (STREAM_H, STREAM_C), strict=True)):
        if case.training and p > 0:
            update[place] = keep_mask(seed, (case.batch, case.time, (case.width, case.hidden)[place]), p, stream)
    norms = [None, *(leaves[name] for name in ("norm_hh", "norm_c", "norm_b"))]
    results = reference.recurrence(
        CELLS[case.cell], leaves["inputs"], torch.eye(inputs.shape[2], dtype=dtype), leaves["weight_hh"], None,
        leaves["bias_hh"], leaves["h0"], leaves["c0"], lengths=lengths, reset=reset, reverse=case.reverse,
        weight_hr=leaves["weight_hr"], recurrent_mask=leaves["recurrent_mask"], zoneout=case.zoneout,
        update=tuple(update), layer_norm=norms,
    )  # fmt: skip
    named = {name: result for name, result in zip(("output", "h", "c"), results, strict=True) if result is not None}
    loss = sum((named[name].to(dtype) * grad.to(dtype)).sum() for name, grad in gradients.items() if grad is not None)
    given = {name: tensor for name, tensor in leaves.items() if tensor is not None}
    found = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    wanted = {f"grad {name}": grad for name, grad in zip(given, found, strict=True) if grad is not None}
    return {name: tensor.detach() for name, tensor in {**named, **wanted}.items()}


def before(case, values, initial, lengths, reset):
    """What each position found of values (B, T, width): those of the step before, or the initial ones (B, width)."""
    found = torch.zeros_like(values)
    for row in range(case.batch):
        length = case.time if lengths is None else min(max(int(lengths[row]), 0), case.time)
        state = torch.zeros(values.shape[2]) if initial is None else initial[row].to(values.dtype)
        for t in reversed(range(length)) if case.reverse else range(length):
            flag = t + 1 if case.reverse else t
            if reset is not None and flag < length and reset[row, flag]:
                state = torch.zeros_like(state)
            found[row, t], state = state, values[row, t]
    return found


def moved(tensors, device):
    return tuple(tensor if tensor is None else tensor.to(device) for tensor in tensors)


def engine(case, arguments, gradients, device="cpu"):
    """What the engine returns, and the gradients that the driver makes of it."""
    _, weight, bias, h0, c0, weight_hr, mask, norm_hh, norm_c, norm_b, lengths, reset, _ = arguments
    there = moved(arguments, device)
    results = cuda_kernels.forward(*there, **case.options(), save=True)
    gradients = moved((gradients["output"], gradients["h"], gradients.get("c")), device)
    saved = (results[0], *results[3:])
    grads = cuda_kernels.backward(*gradients, there[1], *there[3:], *saved, **case.options())
    assert (grads[1] is grads[0]) == (case.cell != GRU and not case.normed)
    output, h_n, c_n, gates, extra, hidden, _ = moved(results, "cpu")
    grad_inputs, grad_recurrent, grad_h0, grad_c0, grad_projected, grad_norm_c, grad_norm_b = moved(grads, "cpu")
    found = {"output": output, "h": h_n, "c": c_n, "grad inputs": grad_inputs}
    seen = before(case, output if hidden is None else hidden, h0, lengths, reset)
    multiplied = (seen if mask is None else seen * mask.unsqueeze(1)).double()
    found["grad weight_hh"] = torch.einsum("btg,bth->gh", grad_recurrent.double(), multiplied)
    grad_sums = grad_inputs.double()
    if case.cell == GRU:
        n = 2 * case.hidden
        grad_n = grad_sums[..., n:] * gates[..., : case.hidden] if case.normed else grad_recurrent[..., n:]
        grad_sums = torch.cat([grad_sums[..., :n], grad_n], dim=2)
    if bias is not None:
        found["grad bias_hh"] = grad_sums.sum((0, 1))
    if norm_hh is not None:
        normal = torch.nn.functional.layer_norm(multiplied @ weight.double().T, norm_hh.shape, eps=reference.EPS)
        found["grad norm_hh"] = (grad_sums * normal).sum((0, 1))
    if mask is not None:
        found["grad recurrent_mask"] = torch.einsum("btg,gh,bth->bh", grad_recurrent, weight.float(), seen)
    if weight_hr is not None:
        i, f, g, o = gates.double().chunk(4, 2)
        c = f * before(case, extra.double(), c0, lengths, reset) + i * g
        if norm_c is not None:
            c = torch.nn.functional.layer_norm(c, c.shape[2:], norm_c.double(), norm_b.double(), eps=reference.EPS)
        found["grad weight_hr"] = torch.einsum("btp,bth->ph", grad_projected.double(), o * c.tanh())
    found |= {"grad norm_c": grad_norm_c, "grad norm_b": grad_norm_b}
    found |= {"grad h0": None if h0 is None else grad_h0, "grad c0": None if c0 is None else grad_c0}
    return {name: result for name, result in found.items() if result is not None}


def check(case, device="cpu"):
    arguments, gradients = case.arguments(), case.gradients()
    exact = defined(case, arguments, gradients, torch.float64)
    with ProductsOfTF32() if case.kind == TF32 else contextlib.nullcontext():
        eager = defined(case, arguments, gradients, case.dtype)
    if case.kind == TF32:
        torch.set_float32_matmul_precision("high")
    try:
        found = engine(case, arguments, gradients, device)
    finally:
        torch.set_float32_matmul_precision("highest")
    eps = 2.0**-10 if case.kind == TF32 else torch.finfo(case.dtype).eps
    for name, wanted in exact.items():
        result = found[name].double()
        assert result.shape == wanted.shape and found[name].is_contiguous(), name
        if wanted.numel() == 0:
            continue
        rounding = (eager[name].double() - wanted).abs().max()
        error = (result - wanted).abs().max()
        assert error <= 2 * rounding + 4 * eps * max(1, wanted.abs().max()), (name, error, rounding)
    return found


# A cell, and whether it is normalised and projected.
EACH_KIND = [
    *((cell, {}) for cell in (LSTM, GRU, RELU)),
    *((cell, {"normed": True}) for cell in (LSTM, GRU, RELU)),
    (LSTM, {"projected": 24}), (LSTM, {"normed": True, "projected": 24}),
]  # fmt: skip
RAGGED = tuple(range(4)) * 8 + (3, 3, 1)
CASES = [
    *(
        Case(f"{CELLS[cell]}-{str(kind).removeprefix('torch.')}-{name}", cell, kind, layout=layout)
        for cell in (LSTM, GRU, TANH, RELU)
        for kind in (BF16, F16, F32, TF32)
        for name, layout in (("grid", GRID), ("cluster", CLUSTER))
    ),
    *(
        Case(f"{CELLS[cell]}-{name}", cell, kind, layout=layout, **options)
        for cell in (LSTM, GRU, TANH, RELU)
        for name, kind, layout, options in (
            ("lengths", F32, GRID, {"lengths": (2, 0, 4)}),
            ("lengths-reverse", BF16, CLUSTER, {"lengths": (1, 4, 3), "index": torch.int32, "reverse": True}),
            ("reset", F32, CLUSTER, {"reset": True}),
            ("reset-reverse", F32, GRID, {"reset": True, "reverse": True, "lengths": (4, 2, 3)}),
            ("mask", F32, GRID, {"mask": True, "reset": True}),
            ("zoneout", F32, GRID, {"zoneout": (0.3, 0.4 * (cell == LSTM)), "training": True, "lengths": (3, 4, 1)}),
            ("zoneout-eval", BF16, CLUSTER, {"zoneout": (0.3, 0.4 * (cell == LSTM)), "reset": True}),
            ("bare", F32, GRID, {"state": False, "bias": False, "wanted": ("output",)}),
            ("state-alone", F32, GRID, {"wanted": ("h",)}),
        )
    ),
    Case("all-zoned", zoneout=(1.0, 1.0), training=True),
    Case("cell-alone", wanted=("c",), zoneout=(0.0, 0.5), training=True),
    Case(
        "everything", GRU, BF16, lengths=(4, 1, 3), reset=True, reverse=True, mask=True, zoneout=(0.2, 0.0),
        training=True,
    ),
    # Layer normalisation and projection.
    *(
        Case(f"{CELLS[cell]}-normed-{str(kind).removeprefix('torch.')}-{name}", cell, kind, layout=layout, normed=True)
        for cell in (LSTM, GRU, TANH)
        for kind in (BF16, F16, F32, TF32)
        for name, layout in (("grid", GRID), ("cluster", CLUSTER))
    ),
    *(
        Case(f"{CELLS[cell]}-normed-{name}", cell, kind, layout=layout, normed=True, **options)
        for cell in (LSTM, GRU, RELU)
        for name, kind, layout, options in (
            ("lengths", F32, GRID, {"lengths": (2, 0, 4)}),
            ("lengths-reverse", BF16, CLUSTER, {"lengths": (1, 4, 3), "index": torch.int32, "reverse": True}),
            ("reset", F32, CLUSTER, {"reset": True, "mask": True}),
            ("reset-reverse", F32, GRID, {"reset": True, "reverse": True, "lengths": (4, 2, 3)}),
            ("zoneout", F32, GRID, {"zoneout": (0.3, 0.4 * (cell == LSTM)), "training": True, "lengths": (3, 4, 1)}),
            ("zoneout-eval", BF16, CLUSTER, {"zoneout": (0.3, 0.4 * (cell == LSTM)), "reset": True}),
            ("bare", F32, GRID, {"state": False, "bias": False, "wanted": ("output",)}),
            ("warps-share-k", BF16, Layout(units=16, warps_k=2), {"hidden": 37, "batch": 5, "time": 3}),
            ("tiles-in-turn", F32, Layout(units=4), {"batch": 35, "hidden": 9, "lengths": RAGGED, "reset": True}),
            ("passes", F32, Layout(cluster=True, rows=48), {"batch": 35, "hidden": 9, "time": 3, "lengths": RAGGED}),
        )
    ),
    Case("normed-one-unit", hidden=1, layout=Layout(units=1), normed=True),
    Case("normed-many-blocks", GRU, hidden=41, batch=2, time=3, layout=Layout(units=2), normed=True),
    Case("normed-idle-block", kind=F16, hidden=20, time=3, layout=CLUSTER, normed=True),
    Case("normed-teams", kind=BF16, batch=35, hidden=9, time=3, layout=Layout(teams=2), normed=True),
    *(
        Case(f"projected-{str(kind).removeprefix('torch.')}-{name}", LSTM, kind, layout=layout, projected=5)
        for kind in (BF16, F16, F32, TF32)
        for name, layout in (("grid", GRID), ("cluster", CLUSTER))
    ),
    *(
        Case(f"projected-{'normed-' if normed else ''}{name}", LSTM, kind, layout=layout, normed=normed, **options)
        for normed in (False, True)
        for name, kind, layout, options in (
            ("lengths", F32, GRID, {"lengths": (2, 0, 4), "projected": 3}),
            ("lengths-reverse", BF16, CLUSTER, {"lengths": (1, 4, 3), "reverse": True, "projected": 7}),
            ("reset-mask", F32, CLUSTER, {"reset": True, "mask": True, "projected": 6}),
            ("reset-reverse", F32, GRID, {"reset": True, "reverse": True, "lengths": (4, 2, 3), "projected": 1}),
            ("zoneout", F32, GRID, {"zoneout": (0.3, 0.4), "training": True, "lengths": (3, 4, 1), "projected": 6}),
            ("zoneout-eval", BF16, CLUSTER, {"zoneout": (0.3, 0.4), "reset": True, "projected": 6}),
            ("bare", F32, GRID, {"state": False, "wanted": ("output",), "projected": 4}),
            ("as-wide", F16, GRID, {"projected": 11}),
            ("wider", F32, CLUSTER, {"projected": 21}),
            ("warps", BF16, Layout(units=40, warps_k=2), {"hidden": 70, "batch": 2, "time": 3, "projected": 35}),
            ("tiles-in-turn", F32, Layout(units=4), {"batch": 35, "hidden": 9, "lengths": RAGGED, "projected": 4}),
            ("passes", F32, Layout(rows=48), {"batch": 35, "hidden": 9, "time": 3, "reset": True, "projected": 4}),
            ("teams", TF32, Layout(cluster=True, teams=2), {"batch": 35, "hidden": 9, "time": 3, "projected": 4}),
            ("whole-vectors", F32, Layout(units=4), {"hidden": 24, "projected": 12}),
        )
    ),
    Case("projected-no-time", time=0, projected=4),
    Case("normed-no-time", time=0, normed=True),
    Case("normed-no-rows", batch=0, lengths=(), normed=True),
    Case("normed-nothing-present", lengths=(0, 0, 0), normed=True, layout=CLUSTER),
    # How the work is laid over blocks.
    Case("one-unit", hidden=1, layout=Layout(units=1)),
    Case("odd-units", hidden=13, layout=Layout(units=5)),
    Case("whole-vectors", hidden=24, layout=Layout(units=4)),
    Case("one-block", GRU, hidden=7, layout=Layout(units=8)),
    Case("warps-share-k", kind=BF16, hidden=70, batch=2, time=3, layout=Layout(units=40, warps_k=2)),
    Case("warps-share-k-unevenly", hidden=33, time=3, layout=Layout(units=16, warps_k=2)),
    Case("rows-of-warps", GRU, F16, hidden=33, time=3, layout=Layout(cluster=True, units=40)),
    Case("passes", batch=35, hidden=9, time=3, layout=Layout(units=8, rows=48), lengths=RAGGED),
    Case("tiles-in-turn", batch=35, hidden=9, time=3, layout=Layout(units=16), lengths=RAGGED),
    Case("tiles-in-turn-cluster", batch=35, hidden=9, time=3, layout=Layout(cluster=True), reset=True),
    *(
        Case(f"staged-{name}", cell, kind, 35, 3, 19, Layout(units=13, rows=48, staged=True), reset=True, **options)
        for name, cell, kind, options in (
            ("plain", LSTM, BF16, {}), ("exact", GRU, F32, {}), ("lengths", LSTM, TF32, {"lengths": RAGGED}),
            ("normed", GRU, F32, {"normed": True}), ("projected", LSTM, F16, {"projected": 7}),
            ("wider", LSTM, F32, {"projected": 70, "normed": True}),
        )
    ),
    Case("teams", kind=BF16, batch=35, hidden=9, time=3, layout=Layout(teams=2), mask=True),
    Case("teams-of-clusters", TANH, batch=35, hidden=9, time=3, layout=Layout(cluster=True, teams=2)),
    Case("four-of-a-cluster", kind=BF16, hidden=27, time=3, layout=Layout(cluster=True)),
    Case("idle-block", kind=F16, hidden=20, time=3, layout=Layout(cluster=True)),
    Case("no-time", time=0),
    Case("one-step", time=1, layout=CLUSTER),
    Case("no-rows", batch=0, lengths=()),
    Case("nothing-present", lengths=(0, 0, 0)),
    Case("clamped", lengths=(-3, 9, 2)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_the_definition(case):
    with emulated(case.layout):
        check(case)


LARGE = [
    Case(
        f"{CELLS[cell]}{'-normed' * normed}{'-projected' * projected}-{str(kind).removeprefix('torch.')}-{hidden}",
        cell, kind, 37, 33, hidden, reset=True, normed=normed, projected=hidden // 3 if projected else None,
    )
    for cell, normed, projected in (
        (LSTM, False, False), (GRU, False, False), (RELU, False, False), (LSTM, True, False), (GRU, True, False),
        (LSTM, False, True), (LSTM, True, True),
    )
    for kind in (F16, F32, TF32)
    for hidden in (256, 517, 768, 1024)
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=lambda case: case.name)
def test_equals_the_definition_on_a_gpu(case):
    device = torch.device("cuda", torch.cuda.current_device())
    reason = case.gap(device)
    if reason is not None:
        pytest.skip(reason)
    check(case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
def test_a_graph_holds_a_call(normed):
    case = Case("", LSTM, BF16, 5, 9, 100, lengths=(9, 0, 3, 4, 9), reset=True, normed=normed)
    arguments = moved(case.arguments(), "cuda")
    reason = case.gap(arguments[0].device)
    if reason is not None:
        pytest.skip(reason)
    eager = cuda_kernels.forward(*arguments, **case.options(), save=False)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda_kernels.forward(*arguments, **case.options(), save=False)[0]
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("cell, options", EACH_KIND)
@pytest.mark.parametrize("layout", [Layout(warps_k=2, units=16), Layout(cluster=True, warps_k=2, units=16)])
def test_the_same_bits_on_every_run(cell, options, layout):
    case = Case("", cell, BF16, batch=5, hidden=37, layout=layout, lengths=(4, 2, 0, 1, 3), **options)
    with emulated(layout):
        first, second = (engine(case, case.arguments(), case.gradients()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_absent_positions_are_zero():
    case = Case("", GRU, F16, lengths=(2, 0, 4), layout=CLUSTER)
    with emulated(case.layout):
        found = engine(case, case.arguments(), case.gradients())
    absent = torch.arange(case.time) >= torch.tensor(case.lengths).unsqueeze(1)
    assert not found["output"][absent].any() and not found["grad inputs"][absent].any()


def test_nothing_is_saved_unless_asked_for():
    case = Case("", kind=BF16)
    with emulated(GRID):
        assert cuda_kernels.forward(*case.arguments(), **case.options(), save=False)[3:] == (None,) * 4


@pytest.mark.parametrize("machine", [(8, 40 << 10, True), (8, 40 << 10, False), (2, 99 << 10, False)])
@pytest.mark.parametrize("cell, options", EACH_KIND)
def test_plans_of_small_machines(cell, options, machine):
    """The layouts that are chosen, not those of the other tests."""
    case = Case("", cell, BF16, batch=18, time=2, hidden=40, **options)
    with emulated(machine=machine):
        check(case)


@pytest.mark.parametrize("layout", [GRID, CLUSTER])
@pytest.mark.parametrize("distance", [10.0, 1e4])
def test_a_row_far_from_zero(distance, layout):
    """Layer normalisation of sums with a mean many deviations away: no square of it is subtracted from another."""
    case = Case("", GRU, hidden=19, batch=2, time=2, layout=layout, normed=True)
    arguments = list(case.arguments())
    arguments[1] = arguments[1] + distance  # every gate's sum moves by as much
    arguments[3] = arguments[3] + 1
    exact = defined(case, arguments, case.gradients(), torch.float64)
    eager = defined(case, arguments, case.gradients(), F32)
    with emulated(layout):
        found = engine(case, arguments, case.gradients())
    for name in ("output", "h"):
        assert (found[name] - exact[name]).abs().max() <= 2 * (eager[name] - exact[name]).abs().max() + 1e-6


H100, A100 = (132, 227 << 10, True), (108, 163 << 10, False)


@pytest.mark.parametrize("machine", [H100, A100, (4, 99 << 10, True)])
@pytest.mark.parametrize("operand", range(4))
def test_plans_stay_within_the_machine(machine, operand):
    sms, limit, clusters = machine
    found = 0
    with emulated() as emulator:
        for hidden in (1, 33, 256, 512, 770, 1024, 1536, 2048):
            for batch in (1, 16, 128, 1000):
                for (cell, options), backward in itertools.product(EACH_KIND, (False, True)):
                    width = -(-hidden // 3) if "projected" in options else hidden
                    kind = (options.get("normed", False), "projected" in options)
                    size = (batch, 0, hidden, width, cell, operand, 0, 0, *kind)
                    plan = dict(zip(FIELDS, emulator.planned(size, backward, machine), strict=False))
                    if not plan:
                        continue
                    found += 1
                    assert plan["team"] * plan["teams"] <= sms and plan["shared_bytes"] <= limit
                    assert plan["units"] * plan["team"] >= hidden and plan["width_units"] * plan["team"] >= width
                    assert plan["warps_m"] * plan["warps_k"] <= 8 and plan["project_m"] * plan["project_k"] <= 8
                    assert not plan["cluster"] or (clusters and plan["team"] in (1, 2, 4, 8, 16))
                    assert plan["extended"] == any(kind)
    assert found > 20


def test_the_modelled_step():
    """Beside what was measured on an H100: blocks of a team, and microseconds a step, forward and backward."""
    measured = (
        (16, 768, 768, False, False, (96, 3.0), (96, 4.0)),
        (16, 512, 512, True, False, (32, 9.8), (32, 8.5)),
        (16, 768, 256, False, True, (96, 5.4), (96, 6.7)),
        (128, 768, 768, False, False, (32, 11.9), (64, 14.5)),
        (128, 256, 256, False, False, (16, 3.5), (16, 3.7)),
        (1, 512, 512, False, False, (64, 2.5), (32, 2.9)),
    )
    with emulated() as emulator:
        for batch, hidden, width, normed, projected, *directions in measured:
            for backward, (blocks, microseconds) in enumerate(directions):
                size = (batch, 1024, hidden, width, LSTM, 0, 0, 0, normed, projected)
                plan = emulator.planned(size, backward, H100)
                modelled = emulator.modelled_step(size, backward, plan, True)
                assert (plan[FIELDS.index("team")], modelled) == (blocks, pytest.approx(microseconds, rel=0.2)), size


def test_gap():
    def told(hidden=768, cell=LSTM, dtype=BF16, machine=H100, projected=None, normed=False):
        case = Case("", cell, dtype, hidden=hidden, projected=projected, normed=normed)
        with emulated(machine=machine):
            return case.gap(torch.device("cpu"))

    assert told() is None and told(dtype=F32) is None and told(hidden=1) is None
    assert "float64" in told(dtype=torch.float64)
    assert told(projected=256) is None and told(normed=True) is None and told(projected=256, normed=True) is None
    assert "4 gates of 4096 units)" in told(hidden=4096)
    assert "4 gates of 4096 units, projected to 2048)" in told(hidden=4096, projected=2048)
    assert "3 gates of 2048 units" in told(hidden=2048, cell=GRU, dtype=F32)
    assert told(hidden=1024, machine=A100) is None


def test_a_traced_call_asks_too():
    def asks(x, weight):
        width = weight.shape[1]
        reason = cuda_kernels.gap(weight.shape[0] // 4, width, LSTM, x.dtype, x.device, True, True)
        return x + (0 if reason is None else 1)

    x = torch.zeros(3)
    with emulated(machine=H100):
        traced = torch.compile(asks, fullgraph=True, backend="eager", dynamic=True)
        assert not traced(x, x.new_empty(32, 8)).any() and traced(x, x.new_empty(4 << 12, 4096)).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gap_without_the_kernels(monkeypatch):
    """Whether this process could have them or not."""
    monkeypatch.setattr(cuda_kernels, "kernels", types.SimpleNamespace())
    assert "weren't built" in Case("").gap(torch.device("cuda", 0))
    built = types.SimpleNamespace(recurrence_persistent_forward=None)
    monkeypatch.setattr(cuda_kernels, "kernels", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in Case("").gap(torch.device("cuda", 0))


def test_an_uncovered_call_is_refused():
    case = Case("")
    with emulated(machine=(1, 8 << 10, False)), pytest.raises(NotImplementedError, match="4 gates of 11 units"):
        cuda_kernels.forward(*case.arguments(), **case.options(), save=False)


def test_the_thread_sanitizer(tmp_path):
    """Silent, and not blind: whichever synchronisation the emulator forgets, the kernels are caught."""
    program = tmp_path / "races"
    command = ["g++", *FLAGS, "-O1", "-g", "-fsanitize=thread", "-Wno-tsan"]
    probe = subprocess.run([*command, "-x", "c++", "-", "-o", program], input="int main() {}", text=True, check=False)
    if probe.returncode or subprocess.run([program], check=False, capture_output=True).returncode:
        pytest.skip("this g++ has no working thread sanitizer")
    subprocess.run([*command, SOURCES / "recurrence_races.cpp", "-o", program], check=True)
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    races = dict.fromkeys(("block", "cluster", "grid"), "data race")
    for forgotten, sign in {"nothing": None, **races, "copies": "not finite"}.items():
        run = subprocess.run([program, forgotten], check=False, env=environment, capture_output=True, text=True)
        told = run.stdout + run.stderr
        assert [each for each in ("data race", "not finite") if each in told] == ([sign] if sign else []), told[:4000]
        assert (run.returncode == 0) == (sign is None), (forgotten, told[:4000])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.skipif(cuda_tool("cuobjdump") is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize("operand", ["bfloat16", "float16", "tf32", "float32"])
@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_compiles_without_spills_and_onto_tensor_cores(arch, operand, tmp_path):
    """Within the registers of a block of 256 threads, of which a multiprocessor holds one."""
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", cubin]
    subprocess.run([*command, f"-DOPERAND={operand}", SOURCES / "recurrence_kernels.cu"], check=True)

    def told(flag):
        return subprocess.run([cuda_tool("cuobjdump"), flag, cubin], capture_output=True, text=True, check=True).stdout

    used = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", told("-res-usage"))
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s+Function : |\Z)", told("-sass"), re.DOTALL))
    assert len(used) == 8 and code.keys() == {name for name, *_ in used}
    for name, registers, stack, shared, local in used:
        assert (
            256 * int(registers) <= 1 << 16
            and int(stack) == int(local) == 0
            and int(shared) <= SHARED[int(arch.rstrip("a"))]
        )
        words = set(re.findall(r"\b(HMMA|FFMA|LDGSTS|LDL|STL)\b", code[name]))
        if arch == "80" and re.search("OperandE.ELb1E", name):  # no clusters there: nothing but a trap
            continue
        assert {"LDGSTS", "FFMA" if operand == "float32" else "HMMA"} <= words and not words & {"LDL", "STL"}, name
