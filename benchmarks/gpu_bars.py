"""The bars on a GPU, and the table of what `make gpu` measured of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import FORWARD, TRAINING
from .results import OURS, geometric_mean

SDPA = ("sdpa", "sdpa cudnn", "sdpa flash", "sdpa efficient")
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Ask:
    """One line of the table: what is asked of the cases of a bar.

    Attributes:
        at_least: of each case: its rival's time over ours, or the share of the machine's limit.
        against: the entrants whose fastest is the rival; none: all that aren't ours.
        mean: of the ratios' geometric mean.
        entrant: which of ours.
        limit: whether the limit is asked for.
        missing: why it isn't measured at all.
    """

    bar: str
    work: str
    at_least: float
    against: tuple[str, ...] = ()
    directions: tuple[str, ...] = (FORWARD, TRAINING)
    mean: float | None = None
    entrant: str = "ours"
    dtype: str = "bfloat16"
    limit: bool = False
    missing: str | None = None

    @property
    def asked(self) -> str:
        each = said(self.at_least, self.limit)
        return each if self.mean is None else f"mean {said(self.mean, self.limit)}, each {each}"


ASKS = (
    Ask("GR1", "LSTM and GRU where cuDNN keeps no weights on the chip, against torch's layers", 1.0, mean=2.0),
    Ask("GR2", "LSTM in float16 where it does", 1.0, dtype="float16"),
    Ask("GR3", "against FlashRNN's fused kernel", 1.7, missing="FlashRNN can't be installed beside this torch"),
    Ask("GR4", "lengths, and 1 % of resets, against our plain layer", 1 / 1.03),
    Ask("GC1", "dense dilated convolution, against cuDNN", 1.2, ("F.pad", "chomp"), (TRAINING,)),
    Ask("GC1", "against cuDNN's deterministic algorithms", 5.0, ("deterministic",), (TRAINING,)),
    Ask("GC2", "depthwise convolution: share of a copy's bandwidth", 0.9, limit=True),
    Ask("GA1", "attention: key lengths, a learned bias, T ≠ S, short, wide; against SDPA's fastest", 1.5, SDPA),
    Ask("GA2", "long dense and causal attention, our kernel against cuDNN", 0.8, ("sdpa cudnn",), entrant="triton"),
    Ask("GA2", "the backend that is chosen, against SDPA's fastest (0.03: noise)", 0.97, SDPA),
    Ask("GD1", "additive attention, against eager PyTorch", 5.0, ("eager",), (TRAINING,)),
    Ask("GD1", "against torch.compile", 2.0, ("compile",), (TRAINING,)),
    Ask("GD1", "share of what the units for tangents can", 0.5, limit=True),
)


def said(value: float, limit: bool) -> str:
    return f"{100 * value:.0f} %" if limit else f"{value:.2f}x"


def cases_of(results: dict[str, Any]) -> list[dict[str, tuple[float, dict[str, Any]]]]:
    """By entrant its fastest round and facts, of each case and direction in pytest-benchmark's JSON."""
    groups: dict[str, dict[str, tuple[float, dict[str, Any]]]] = {}
    for entry in results["benchmarks"]:
        facts = entry["extra_info"]
        groups.setdefault(entry["group"], {})[facts["entrant"]] = (entry["stats"]["min"], facts)
    return list(groups.values())


def value_of(ask: Ask, case: dict[str, tuple[float, dict[str, Any]]]) -> float | None:
    """What a case reaches; None where its rivals weren't there, or its limit wasn't kept."""
    seconds, facts = case[ask.entrant]
    if ask.limit:
        limit = facts.get("limit_seconds")
        return None if limit is None else limit / seconds
    rivals = [time for name, (time, _) in case.items() if name in ask.against or not (ask.against or name in OURS)]
    return min(rivals) / seconds if rivals else None


def line(ask: Ask, results: dict[str, Any] | None) -> str:
    """A row of the table."""
    cells = [NOT_MEASURED] * 2 + [""]
    if ask.missing:
        cells = [ask.missing, "", ""]
    elif results is not None:
        found: dict[str, list[float]] = {direction: [] for direction in ask.directions}
        for case in cases_of(results):
            if ask.entrant in case:
                _, facts = case[ask.entrant]
                if facts.get("bar") == ask.bar and facts["direction"] in found:
                    value = value_of(ask, case)
                    found[facts["direction"]] += [] if value is None else [value]
        cells = [("" if direction not in found else spread(ask, found[direction])) for direction in (FORWARD, TRAINING)]
        cells.append(holding(ask, [value for values in found.values() for value in values], results))
    return f"| {' | '.join([ask.bar, ask.work, ask.asked, *cells])} |".replace("|  |", "| |").replace("|  |", "| |")


def spread(ask: Ask, values: Sequence[float]) -> str:
    if not values:
        return NOT_MEASURED
    ends = list(dict.fromkeys(said(value, ask.limit) for value in (min(values), max(values))))
    return " to ".join(ends) + (f", mean {said(geometric_mean(values), ask.limit)}" if ask.mean else "")


def holding(ask: Ask, values: Sequence[float], results: dict[str, Any]) -> str:
    """How many cases hold, and how many were lost."""
    parts = [f"{sum(value >= ask.at_least for value in values)} of {len(values)}"] if values else []
    if ask.mean is not None and values:
        parts.append(f"the mean {'holds' if geometric_mean(values) >= ask.mean else 'does not'}")
    for kind, word in (("failed", "failed"), ("skipped", "not reached")):
        lost = [key for key, case in results.get(kind, {}).items() if case["bar"] == ask.bar]
        lost = [key for key in lost if key.endswith(tuple(f", {direction}" for direction in ask.directions))]
        parts += [f"{len(lost)} {word}"] if lost else []
    return ", ".join(parts)


def table(files: Iterable[Path]) -> list[str]:
    """One for each GPU; without any result, what there is to measure."""
    outcomes: list[dict[str, Any] | None] = [json.loads(file.read_text()) for file in sorted(files)]
    lines: list[str] = []
    for outcome in outcomes or [None]:
        head = "Not measured yet: `make gpu` does it, on a machine with a CUDA device."
        if outcome is not None:
            facts = outcome["facts"]
            head = f"{facts['gpu']}; torch {facts['torch']}, cuDNN {facts['cudnn']}. `make gpu`, {facts['date']}."
            notes = dict.fromkeys(run["note"] for run in outcome["benchmarks"].values() if run.get("note"))
            head += "".join(f" {note}" for note in notes)
        lines += [
            *([""] if lines else []),
            head,
            "",
            "| bar | work | asked | forward | forward and backward | cases that hold |",
            "|---|---|---|---|---|---|",
        ]
        for ask in ASKS:
            run = {} if outcome is None else outcome["benchmarks"].get(ask.dtype) or {}
            lines.append(line(ask, run.get("results")))
    return lines
