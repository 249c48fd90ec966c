"""Reads pytest-benchmark's JSON back: one record an entrant, the same one of several processes merged."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = ("ours", "triton", "cuda")  # by choice, and forced


@dataclass
class Record:
    """One entrant of one case.

    Attributes:
        facts: what the harness put beside the times (`extra_info`).
        best: fastest call, in seconds, over all processes.
        medians: of each process, in seconds.
    """

    group: str
    facts: dict[str, Any]
    best: float
    medians: list[float]

    @property
    def median(self) -> float:
        return sorted(self.medians)[len(self.medians) // 2]

    @property
    def fraction_of_limit(self) -> float:
        return self.facts["limit_seconds"] / self.best

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["facts"][name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class Group:
    """All entrants of one case, direction and number of threads."""

    records: dict[str, Record]

    @property
    def ours(self) -> Record:
        return self.records["ours"]

    @property
    def rival(self) -> Record | None:
        """The fastest of the others; what is ours but isn't chosen is no rival."""
        others = [record for name, record in self.records.items() if name not in OURS]
        return min(others, key=lambda record: record.best, default=None)

    @property
    def case(self) -> tuple[str, int, str]:
        """What is called, whatever the threads."""
        return self.ours.row, self.ours.T, self.ours.direction

    @property
    def ratio(self) -> float | None:
        """The fastest rival's time over ours."""
        rival = self.rival
        return None if rival is None else rival.best / self.ours.best


@dataclass
class Results:
    """What some files hold together: the operators' groups in the order measured, and the families' training."""

    groups: list[Group] = field(default_factory=list)
    training: list[Record] = field(default_factory=list)
    machines: list[dict[str, Any]] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    files: int = 0

    def of(self, suite: str, threads: int | None = None) -> list[Group]:
        return [g for g in self.groups if g.ours.suite == suite and threads in (None, g.ours.threads)]

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(group.ours.suite for group in self.groups))

    @property
    def fewest_threads(self) -> int:
        counts = [r.threads for r in [*(group.ours for group in self.groups), *self.training]]
        return min(counts, default=1)

    def rows(self, suite: str) -> list[tuple[Group, Group | None]]:
        """The groups of a suite on the fewest threads, each with the same case on more."""
        groups = self.of(suite)
        fewest = min(group.ours.threads for group in groups)
        wider = {group.case: group for group in groups if group.ours.threads > fewest}
        return [(group, wider.get(group.case)) for group in groups if group.ours.threads == fewest]


def load(paths: Iterable[str | Path]) -> Results:
    """Raises ValueError where a file isn't a result of these benchmarks."""
    results = Results()
    records: dict[tuple[str, str], Record] = {}
    for path in paths:
        content = json.loads(Path(path).read_text())
        if "benchmarks" not in content or "machine_info" not in content:
            raise ValueError(f"{path}: not a JSON file of pytest-benchmark")
        results.machines.append(content["machine_info"])
        results.dates.append(content["datetime"][:19].replace("T", " ") + " UTC")
        results.files += 1
        for entry in content["benchmarks"]:
            facts, stats = entry["extra_info"], entry["stats"]
            if "entrant" not in facts:
                raise ValueError(f"{path}: {entry['name']} says nothing of its entrant: not measured by these suites")
            key = (entry["group"], facts["entrant"])
            if key in records:
                record = records[key]
                record.medians.append(stats["median"])
                if stats["min"] < record.best:
                    record.best, record.facts = stats["min"], facts
            else:
                records[key] = Record(entry["group"], facts, stats["min"], [stats["median"]])
    groups: dict[str, dict[str, Record]] = {}
    for (name, entrant), record in records.items():
        if record.suite == "training":
            results.training.append(record)
        else:
            groups.setdefault(name, {})[entrant] = record
    results.groups = [Group(entrants) for entrants in groups.values() if "ours" in entrants]
    return results


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of a straight line through the points (x, y) in log-log, by least squares."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
