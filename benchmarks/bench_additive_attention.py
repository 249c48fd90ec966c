"""Additive attention and attention pooling against their definitions in eager and compiled PyTorch."""

import dataclasses
from typing import Any

import torch

import s2s_kernels as s2s

from . import peers, work
from .harness import Case, Entrant, Grid, Inputs, on_gpu


def some_lengths(batch: int, source: int) -> torch.Tensor:
    """Between half of S and S."""
    share = torch.rand(batch, generator=torch.Generator().manual_seed(13))
    return source // 2 + (share * (source - source // 2)).long() + 1


def share_of(batch: int, source: int) -> float:
    return some_lengths(batch, source).clamp(max=source).double().mean().item() / source


def additive(
    batch: int, queries: int, source: int, width: int, values: int, *, compiled: bool, quick: bool = False
) -> Case:
    """Bahdanau's attention of T queries on S keys, whose ratio stays the same in a row of the grid."""

    def keys_of(time: int) -> int:
        return -(-source * time // queries)

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        keys = keys_of(time)
        query, key = inputs.noise(batch, time, width, scale=0.5), inputs.noise(batch, keys, width, scale=0.5)
        value, weight = inputs.noise(batch, keys, values), inputs.noise(width, scale=width**-0.5)
        lengths = some_lengths(batch, keys).clamp(max=keys).to(inputs.device)
        hidden = torch.arange(keys, device=inputs.device) >= lengths[:, None, None]
        leaves = (query, key, value, weight)
        entrants = {
            "ours": Entrant(lambda: s2s.additive_attention(*leaves, key_lengths=lengths), leaves),
            "eager": Entrant(lambda: peers.additive_attention(*leaves, hidden), leaves),
        }
        if compiled:
            fast = torch.compile(peers.additive_attention)
            entrants["compile"] = Entrant(lambda: fast(*leaves, hidden), leaves)
        return entrants

    def amount(t: int) -> work.Work:
        keys = keys_of(t)
        return work.additive_attention(batch, t, keys, width, values, share_of(batch, keys))

    names = ("ours", "eager", "compile") if compiled else ("ours", "eager")
    row = f"additive attention B{batch} S={round(source / queries, 2):g}T A{width}"
    return Case(row, queries, batch * queries, build, amount, names, quick=quick)


def pool(batch: int, time: int, width: int, attended: int, *, compiled: bool, quick: bool = False) -> Case:
    """Hierarchical attention's weighted sum over T."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        x, weight = inputs.noise(batch, time, width), inputs.noise(attended, width, scale=width**-0.5)
        bias, context = inputs.noise(attended), inputs.noise(attended, scale=attended**-0.5)
        lengths = some_lengths(batch, time).clamp(max=time).to(inputs.device)
        hidden = torch.arange(time, device=inputs.device) >= lengths[:, None]
        leaves = (x, weight, bias, context)
        entrants = {
            "ours": Entrant(lambda: s2s.attention_pool(*leaves, lengths=lengths), leaves),
            "eager": Entrant(lambda: peers.attention_pool(*leaves, hidden), leaves),
        }
        if compiled:
            fast = torch.compile(peers.attention_pool)
            entrants["compile"] = Entrant(lambda: fast(*leaves, hidden), leaves)
        return entrants

    def amount(t: int) -> work.Work:
        present = batch * t * share_of(batch, t)
        return work.simple(2 * present * width * (attended + 1), present * width + batch * width + attended * width)

    names = ("ours", "eager", "compile") if compiled else ("ours", "eager")
    row = f"attention pool B{batch} I{width} A{attended}"
    return Case(row, time, batch * time, build, amount, names, quick=quick)


def for_a_gpu(grid: Grid) -> list[Case]:
    """Sizes that fill one."""
    if grid.device != "cuda":
        return []
    return [
        # One length: torch.compile would begin anew at the second.
        dataclasses.replace(on_gpu(additive(32, 74, 75, 1024, 1024, compiled=True), "GD1", quick=True), varied=False),
        on_gpu(additive(32, 1, 1024, 1024, 1024, compiled=False)),
        on_gpu(pool(256, 512, 512, 512, compiled=False)),
    ]


def cases(grid: Grid) -> list[Case]:
    full = not grid.quick
    # Eager writes (B, T, S, A) out: 4 GiB at T = 1024 with one sequence of this width, which ends the row.
    lengths = grid.lengths(at_most=1024)
    return [
        additive(8, 100, 400, 256, 256, compiled=True, quick=True),
        *(additive(1, time, time, 256, 256, compiled=full, quick=time in (32, 128, 512)) for time in lengths),
        pool(32, 64, 100, 100, compiled=full, quick=True),
        pool(8, 1024, 100, 100, compiled=full),
        *for_a_gpu(grid),
    ]


def test_additive_attention(case: str, direction: str, entrant: str, race: Any) -> None:
    race(case, direction, entrant)
