"""The results as a plain table."""

from collections.abc import Iterable, Sequence

from .harness import threads_of
from .results import Group, Results, geometric_mean

# (title, whether it holds text); the last two are on more threads
COLUMNS = (
    ("case", True),
    ("direction", True),
    ("ours ms", False),
    ("peer ms", False),
    ("fastest peer", True),
    ("ratio", False),
    ("% of limit", False),
    ("MiB ours", False),
    ("MiB peer", False),
    ("tokens/s", False),
    ("ours ms, more threads", False),
    ("ratio, more threads", False),
)


def titles(rows: Sequence[tuple[Group, Group | None]]) -> list[str]:
    """The columns' titles, with the numbers of threads."""
    counts = sorted({wider.ours.threads for _, wider in rows if wider is not None})
    more = threads_of(counts[0]) if counts else "more threads"
    return [name.replace("more threads", more) for name, _ in COLUMNS]


def mebibytes(size: int | None) -> str:
    """Nothing of memory that isn't torch's, and so isn't known."""
    return "" if size is None else f"{size / 2**20:,.2f}"


def cells(group: Group, wider: Group | None) -> tuple[str, ...]:
    """What the columns say of a group and of the same case on more threads."""
    ours, rival = group.ours, group.rival
    return (
        f"{ours.row} T{ours.T:,}" + ("*" if ours.load_exceeded else ""),
        ours.direction,
        milliseconds(ours.best),
        "" if rival is None else milliseconds(rival.best),
        "" if rival is None else rival.entrant,
        times(group.ratio),
        f"{100 * ours.fraction_of_limit:.0f}",
        mebibytes(ours.peak_bytes),
        "" if rival is None else mebibytes(rival.peak_bytes),
        rate(ours.tokens_per_second),
        "" if wider is None else milliseconds(wider.ours.best),
        "" if wider is None else times(wider.ratio),
    )


def times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


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
        groups = results.rows(suite)
        rows = [tuple(titles(groups)), *(cells(*both) for both in groups)]
        shown = [column for column in range(len(COLUMNS)) if any(row[column] for row in rows[1:])]
        widths = {column: max(len(row[column]) for row in rows) for column in shown}
        yield ""
        yield f"{suite.replace('_', ' ').upper()}, {threads_of(groups[0][0].ours.threads)}"
        for row in rows:
            parts = [row[c].ljust(widths[c]) if COLUMNS[c][1] else row[c].rjust(widths[c]) for c in shown]
            yield "  ".join(parts).rstrip()
        yield summary(results.of(suite))
    if results.training:
        yield ""
        yield f"TRAINING ON {results.training[0].text}"
        for record in results.training:
            yield (
                f"{record.entrant:12} {record.parameters:>9,} parameters  {record.bits_per_character:.3f} bits per "
                f"character after {record.training_seconds:.0f} s and {record.training_tokens:,} characters"
                f"{'  *' if record.load_exceeded else ''}"
            )
