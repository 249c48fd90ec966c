"""Causal convolution against F.pad + conv1d, pad-and-chomp and an eager ring buffer."""

from typing import Any

import torch
import torch.nn.functional as F

import s2s_kernels as s2s

from . import work
from .harness import FORWARD, TRAINING, Case, Entrant, Grid, Inputs, on_gpu
from .peers import RingWaveNet, chomped_conv1d, deterministic_conv1d, padded_conv1d


def convolution(
    grid: Grid,
    label: str,
    batch: int,
    channels: int,
    taps: int,
    dilation: int,
    groups: int = 1,
    quick: tuple[int, ...] = (),
    lengths: list[int] | None = None,
) -> list[Case]:
    """One convolution over T, with as many outputs as inputs. On a GPU F.pad is cuDNN, as it chooses and held to the
    same bits on every run."""
    gpu = grid.device == "cuda"

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        weight = inputs.noise(channels, channels // groups, taps, scale=(channels // groups * taps) ** -0.5)
        bias, x = inputs.noise(channels), inputs.noise(batch, channels, time)
        leaves = (x, weight, bias)
        entrants = {
            "ours": Entrant(lambda: s2s.causal_conv1d(x, weight, bias, dilation=dilation, groups=groups), leaves),
            "F.pad": Entrant(lambda: padded_conv1d(x, weight, bias, dilation, groups), leaves),
            "chomp": Entrant(lambda: chomped_conv1d(x, weight, bias, dilation, groups), leaves),
        }
        if gpu:
            entrants["deterministic"] = Entrant(lambda: deterministic_conv1d(*leaves, dilation, groups), leaves)
        return entrants

    row = f"{label} conv B{batch} C{channels} K{taps} d{dilation}"
    return [
        Case(
            row,
            time,
            batch * time,
            build,
            lambda t: work.convolution(batch, t, channels, channels, taps, groups),
            ("ours", "F.pad", "chomp", *(("deterministic",) if gpu else ())),
            quick=time in quick,
        )
        for time in (lengths or grid.lengths())
    ]


def tcn_block(dilation: int, time: int = 784, quick: bool = False) -> Case:
    """The residual block of a TCN without its weight norm: convolution, ReLU, convolution, ReLU, sum, ReLU."""
    batch, channels, taps = 8, 25, 7

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        w1, w2 = (inputs.noise(channels, channels, taps, scale=(channels * taps) ** -0.5) for _ in range(2))
        b1, b2, x = inputs.noise(channels), inputs.noise(channels), inputs.noise(batch, channels, time)
        leaves = (x, w1, w2, b1, b2)

        def ours() -> torch.Tensor:
            y = s2s.causal_conv1d(x, w1, b1, dilation=dilation, activation="relu")
            return F.relu(s2s.causal_conv1d(y, w2, b2, dilation=dilation, activation="relu", residual=x))

        def theirs(conv: Any) -> torch.Tensor:
            return F.relu(F.relu(conv(F.relu(conv(x, w1, b1, dilation)), w2, b2, dilation)) + x)

        return {
            "ours": Entrant(ours, leaves),
            "F.pad": Entrant(lambda: theirs(padded_conv1d), leaves),
            "chomp": Entrant(lambda: theirs(chomped_conv1d), leaves),
        }

    return Case(
        f"TCN block B{batch} C{channels} K{taps} d{dilation}",
        time,
        batch * time,
        build,
        lambda t: work.chain([work.convolution(batch, t, channels, channels, taps)] * 2),
        ("ours", "F.pad", "chomp"),
        quick=quick,
    )


def wavenet_block(dilation: int, compiled: bool, time: int = 2048) -> Case:
    """Dilated convolution, tanh times sigmoid, one 1x1 convolution to residual and skip; compiling takes a minute."""
    batch, channels, skip = 4, 64, 128

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        x, bias = inputs.noise(batch, channels, time), inputs.noise(2 * channels)
        weight = inputs.noise(2 * channels, channels, 2, scale=(2 * channels) ** -0.5)
        out, out_bias = inputs.noise(channels + skip, channels, 1, scale=channels**-0.5), inputs.noise(channels + skip)
        leaves = (x, weight, bias, out, out_bias)

        def joined(both: torch.Tensor) -> torch.Tensor:
            return torch.cat([both[:, :channels] + x, both[:, channels:]], 1)

        def ours() -> torch.Tensor:
            z = s2s.causal_conv1d(x, weight, bias, dilation=dilation, activation="gated_tanh")
            return joined(s2s.causal_conv1d(z, out, out_bias))

        def composed(
            x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, out_bias: torch.Tensor
        ) -> torch.Tensor:
            a, b = padded_conv1d(x, weight, bias, dilation).chunk(2, 1)
            both = F.conv1d(a.tanh() * b.sigmoid(), out, out_bias)
            return torch.cat([both[:, :channels] + x, both[:, channels:]], 1)

        entrants = {"ours": Entrant(ours, leaves), "F.pad": Entrant(lambda: composed(*leaves), leaves)}
        if compiled:
            fast = torch.compile(composed)
            entrants["compile"] = Entrant(lambda: fast(*leaves), leaves)
        return entrants

    def amount(t: int) -> work.Work:
        gate, both = (
            work.convolution(batch, t, channels, 2 * channels, 2),
            work.convolution(batch, t, channels, channels + skip, 1),
        )
        return work.chain([gate, both])

    row = f"WaveNet block B{batch} C{channels} d{dilation}"
    entrants = ("ours", "F.pad", "compile") if compiled else ("ours", "F.pad")
    return Case(row, time, batch * time, build, amount, entrants, (TRAINING,), quick=True)


def streaming(prepared: bool, batch: int = 1, channels: int = 64, skip: int = 128, steps: int = 64) -> Case:
    """Positions one by one through a WaveNet of 30 layers; T counts them. Packing a prepared state's weights is part of
    its time, as the peer's own layout isn't."""
    dilations = [2**i for i in range(10)] * 3

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        stack = inputs.module(s2s.nn.WaveNetStack(channels, skip, dilations).requires_grad_(False))
        frames = inputs.noise(time, batch, channels, grad=False)

        def ours() -> torch.Tensor:
            state = stack.initial_state(batch, prepared=prepared)
            for frame in frames:
                result, state = stack.step(frame, state)
            return result

        def theirs() -> torch.Tensor:
            ring = RingWaveNet(stack, batch)
            for frame in frames:
                result = ring.step(frame)
            return result

        return {"ours": Entrant(ours), "ring": Entrant(theirs)}

    def amount(t: int) -> work.Work:
        layer = [
            work.convolution(batch, 1, channels, 2 * channels, 2),
            work.convolution(batch, 1, channels, channels + skip, 1),
        ]
        return work.chain(layer * (len(dilations) * t))

    row = f"WaveNet streaming, 30 layers B{batch} C{channels}" + (" prepared" if prepared else "")
    return Case(row, steps, batch * steps, build, amount, ("ours", "ring"), (FORWARD,), quick=True)


def for_a_gpu(grid: Grid) -> list[Case]:
    """Sizes that fill one."""
    if grid.device != "cuda":
        return []
    dense = ((16, 512, 3, 4, 2048), (16, 256, 3, 64, 2048), (8, 64, 3, 16, 1024))
    depthwise = ((16, 2048, 4, 1, 2048), (16, 2048, 4, 64, 2048), (16, 2048, 64, 1, 2048))
    return [
        on_gpu(case, bar, quick=True)
        for label, bar, rows in (("dense", "GC1", dense), ("depthwise", "GC2", depthwise))
        for batch, channels, taps, dilation, time in rows
        for case in convolution(
            grid, label, batch, channels, taps, dilation, channels if label == "depthwise" else 1, lengths=[time]
        )
    ]


def cases(grid: Grid) -> list[Case]:
    return [
        *convolution(grid, "depthwise", 4, 512, 4, 1, 512, quick=(2048,)),
        *convolution(grid, "depthwise", 4, 512, 4, 8, 512, quick=(2048,)),
        *convolution(grid, "dense", 8, 64, 3, 16, quick=(32, 128, 1024, 4096)),
        *convolution(grid, "dense", 1, 256, 3, 1),
        *(tcn_block(dilation, quick=dilation in (1, 16)) for dilation in (1, 4, 16, 64, 128)),
        *(wavenet_block(dilation, compiled=not grid.quick) for dilation in (1, 64)),
        *(streaming(prepared) for prepared in (False, True)),
        *for_a_gpu(grid),
    ]


def test_convolution(case: str, direction: str, entrant: str, race: Any) -> None:
    race(case, direction, entrant)
