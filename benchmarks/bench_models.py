"""The three model families over sequence length, against the same models from torch's own layers; and what each
family learns from a real text in the same training time."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from s2s_kernels.models import LANGUAGE_MODELS
from s2s_kernels.training import Trainer

from . import harness, text, work
from .conftest import REPLAY, Arena
from .harness import TRAINING, Case, Entrant, Grid, Inputs
from .twins import from_built_ins

QUICK = (32, 128, 512, 1024, 2048)
TURNS = 8  # in which the families train, one after another
HELD_OUT = 2**15  # tokens of an evaluation, at most
# The better of two on the default text after 80 steps: 2e-3 and 4e-3, for the LSTM 4e-3 and 8e-3.
LEARNING_RATE = {"lstm": 8e-3, "tcn": 4e-3, "transformer": 4e-3}


def family(grid: Grid, name: str, batch: int = 1) -> list[Case]:
    """A language model of bytes over T: logits, and all gradients from noise on them."""

    def build(inputs: Inputs, time: int) -> dict[str, Entrant]:
        torch.manual_seed(0)
        ours = inputs.module(LANGUAGE_MODELS[name]())
        theirs = inputs.module(from_built_ins(LANGUAGE_MODELS[name]()), like=ours)
        tokens = inputs.integers(0, 256, batch, time)
        return {
            "ours": Entrant(lambda: ours(tokens), tuple(ours.parameters())),
            "torch": Entrant(lambda: theirs(tokens), tuple(theirs.parameters())),
        }

    with torch.device("meta"):
        model = LANGUAGE_MODELS[name]()
    return [
        Case(
            f"{name} model B{batch}",
            time,
            batch * time,
            build,
            lambda t: work.language_model(name, batch, t, model),
            ("ours", "torch"),
            quick=time in QUICK,
        )
        for time in grid.lengths()
    ]


def cases(grid: Grid) -> list[Case]:
    return [case for name in LANGUAGE_MODELS for case in family(grid, name)]


def test_models(case: str, direction: str, entrant: str, race: Any) -> None:
    race(case, direction, entrant)


@dataclass
class School:
    """All families trained on one text, in turns."""

    trainers: dict[str, Trainer]
    peak_bytes: dict[str, int | None]
    text: str
    loads: tuple[float, float]


@pytest.fixture(scope="module")
def school(request: pytest.FixtureRequest, arena: Arena) -> School:
    option = request.config.getoption
    budget = option("--train-seconds") or (40.0 if option("--quick") else 300.0)
    try:
        before = arena.settle()
    except harness.Refused as busy:
        pytest.skip(str(busy))
    training, held_out = text.split(text.load(option("--text")).to(arena.device))
    trainers, peaks = {}, {}
    for name, build in LANGUAGE_MODELS.items():
        torch.manual_seed(0)
        model = build().to(arena.device)
        # Watched on a copy, and run there once before: neither warm-up nor the watching counts as training.
        rehearsal, trainers[name] = (
            Trainer(each, training, held_out[:HELD_OUT], learning_rate=LEARNING_RATE[name])
            for each in (copy.deepcopy(model), model)
        )
        rehearsal.step()
        peaks[name] = harness.observe(rehearsal.step, arena.device)[0]
    for turn in range(TURNS):
        for name, trainer in trainers.items():
            study(arena, name, trainer, budget, turn)
    file = option("--text") and Path(option("--text")).name
    return School(trainers, peaks, file or "pydoc_data.topics", (before, harness.load_average()))


def study(arena: Arena, name: str, trainer: Trainer, budget: float, turn: int) -> None:
    """One turn of a family; a turn that earlier ones have used up is left out."""
    until = budget * (turn + 1) / TURNS
    if trainer.history.seconds < until:
        trainer.run(seconds=until)
        bits = trainer.evaluate()
        seen = trainer.history.tokens / 1e6
        arena.say(f"{name}: {bits:.3f} bits per character after {trainer.history.seconds:.1f} s and {seen:.2f} M")


@pytest.mark.parametrize("family_name", list(LANGUAGE_MODELS))
@pytest.mark.benchmark(timer=REPLAY)
def test_training(family_name: str, school: School, arena: Arena, benchmark: Any) -> None:
    trainer = school.trainers[family_name]
    history, parameters = trainer.history, sum(p.numel() for p in trainer.model.parameters())
    tokens = trainer.batch * trainer.context
    forward = work.language_model(family_name, trainer.batch, trainer.context, trainer.model)
    least = arena.limits.seconds(work.with_backward(forward))
    exceeded = max(school.loads) > arena.threads + harness.LOAD_MARGIN
    if exceeded and not arena.any_load:
        pytest.skip(f"the load average {max(school.loads):.2f} exceeds the {harness.threads_of(arena.threads)} used")
    seconds = history.step_seconds
    benchmark.group = f"training on {school.text}, {harness.threads_of(arena.threads)}"
    benchmark.extra_info.update(
        suite="training",
        row=f"{family_name} training step B{trainer.batch}",
        entrant=family_name,
        direction=TRAINING,
        T=trainer.context,
        tokens=tokens,
        threads=arena.threads,
        device=arena.device,
        dtype="float32",
        flops=3 * forward.flops,
        limit_seconds=least,
        fraction_of_limit=least / min(seconds),
        tokens_per_second=tokens / min(seconds),
        peak_bytes=school.peak_bytes[family_name],
        load_average=school.loads,
        load_exceeded=exceeded,
        text=school.text,
        parameters=parameters,
        learning_rate=trainer.learning_rate,
        training_seconds=history.seconds,
        training_tokens=history.tokens,
        evaluations=history.evaluations,
        bits_per_character=history.evaluations[-1][2],
    )
    REPLAY.pending = list(seconds)
    benchmark.pedantic(REPLAY.advance, rounds=len(seconds))
