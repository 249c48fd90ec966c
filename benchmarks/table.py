"""The results as a plain table."""

from collections.abc import Iterable, Sequence

from .harness import threads_of
from .results import Group, Results, geometric_mean

# (title, whether it holds text)
COLUMNS = (
    ("case", True),
    ("direction", True),
    ("threads", False),
    ("ours ms", False),
    ("peer ms", False),
    ("fastest peer", True),
    ("ratio", False),
    ("% of limit", False),
    ("MiB ours", False),
    ("MiB peer", False),
    ("tokens/s", False),
)


def cells(results: Results, group: Group) -> tuple[str, ...]:
    """What the columns say of a group."""
    ours, rival, ratio = group.ours, group.rival, group.ratio
    return (
        f"{ours.row} T{ours.T:,}" + ("*" if ours.load_exceeded else ""),
        ours.direction,
        str(ours.threads),
        milliseconds(ours.best),
        "" if rival is None else milliseconds(rival.best),
        "" if rival is None else rival.entrant,
        "" if ratio is None else f"{ratio:.2f}x",
        f"{100 * ours.fraction_of_limit:.0f}",
        f"{ours.peak_bytes / 2**20:.2f}",
        "" if rival is None else f"{rival.peak_bytes / 2**20:.2f}",
        rate(ours.tokens_per_second),
    )


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}" if seconds < 0.1 else f"{seconds * 1e3:.1f}"


def rate(value: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def summary(groups: Sequence[Group]) -> str:
    """The geometric mean of the ratios, one for each number of threads and direction."""
    said = []
    for threads in sorted({group.ours.threads for group in groups}):
        parts = []
        for direction in dict.fromkeys(group.ours.direction for group in groups):
            chosen = [g for g in groups if g.ours.threads == threads and g.ours.direction == direction]
            ratios = [g.ratio for g in chosen if g.ratio is not None]
            if ratios:
                wins = sum(ratio >= 1 for ratio in ratios)
                mean = geometric_mean(ratios)
                parts.append(f"{direction} {mean:.2f}x ({wins} of {len(ratios)} at least as fast)")
        if parts:
            said.append(f"{threads_of(threads)}: {'; '.join(parts)}")
    return "Geometric mean of the ratios to the fastest peer: " + ". ".join(said) + "."


def lines(results: Results) -> Iterable[str]:
    """The table for a terminal, a block for each suite."""
    for suite in results.suites:
        groups = results.of(suite)
        rows = [tuple(name for name, _ in COLUMNS), *(cells(results, group) for group in groups)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        yield ""
        yield suite.replace("_", " ").upper()
        for row in rows:
            parts = [
                value.ljust(width) if wide else value.rjust(width)
                for value, width, (_, wide) in zip(row, widths, COLUMNS, strict=True)
            ]
            yield "  ".join(parts).rstrip()
        yield summary(groups)
    if results.training:
        yield ""
        yield f"TRAINING ON {results.training[0].text}"
        for record in results.training:
            yield (
                f"{record.entrant:12} {record.parameters:>9,} parameters  {record.bits_per_character:.3f} bits per "
                f"character after {record.training_seconds:.0f} s and {record.training_tokens:,} characters"
                f"{'  *' if record.load_exceeded else ''}"
            )
