"""The plots of a report, one function a picture."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .harness import FORWARD, TRAINING, threads_of
from .results import Group, Record, Results, exponent
from .table import rate

# Okabe and Ito's colours, which differ for every kind of colour vision.
FAMILY = {"lstm": "#D55E00", "tcn": "#009E73", "transformer": "#0072B2"}
TITLE = {"lstm": "LSTM", "tcn": "TCN", "transformer": "Transformer"}
OURS, PEERS = "#0072B2", ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#8a8f98"
FITTED_FROM = 512  # below it the cost of calls hides how the work grows
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#e3e5e8",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.dpi": 110,
    "savefig.dpi": 140,
}

Pick = Callable[[Record], float]


def draw(results: Results, folder: Path) -> list[tuple[str, str, Path]]:
    """Draws every picture that the results can fill: (section, caption, path)."""
    made: list[tuple[str, str, Path]] = []
    with plt.rc_context(STYLE):
        for section, caption, name, figure in pictures(results):
            path = folder / f"{name}.png"
            figure.savefig(path)
            plt.close(figure)
            made.append((section, caption, path))
    return made


def pictures(results: Results) -> Iterable[tuple[str, str, str, Figure]]:
    threads = results.fewest_threads
    models = results.of("models", threads)
    if models:
        yield (
            "models",
            f"Time per token over sequence length, batch 1, {threads_of(threads)}. Solid: ours; dashed: the same model "
            f"from torch's own layers. The exponent a of time per token ∝ T^a is fitted over T ≥ {FITTED_FROM}.",
            "families_time",
            families(models, lambda r: r.best / r.tokens * 1e6, "time per token, µs", fitted=True),
        )
        yield (
            "models",
            "Peak memory of one call over the level before it, as torch's allocator sees it.",
            "families_memory",
            families(models, lambda r: r.peak_bytes / 2**20, "peak memory, MiB"),
        )
        yield (
            "models",
            "Average parallelism: floating-point operations over the length of the critical path, analytic. It is what "
            "a wide machine could do at once.",
            "families_parallelism",
            parallelism(models),
        )
    if results.training:
        yield (
            "models",
            "Bits per character on held-out text against training time; every family trains in turns on the same "
            "threads.",
            "training",
            training(results.training),
        )
    for suite in results.suites:
        if suite == "models":
            continue
        groups = results.of(suite, threads)
        rows = [row for row in by_row(groups).values() if len({g.ours.T for g in row}) >= 3]
        yield (
            suite,
            f"Left: time of the fastest peer over ours, {threads_of(threads)}; right of the line at 1 ours is faster. "
            "Right: fraction of what this machine's arithmetic and memory allow; grey, the fastest peer.",
            f"{suite}_peers",
            against_peers(groups),
        )
        if rows:
            yield (
                suite,
                f"Time per token over sequence length, {threads_of(threads)}.",
                f"{suite}_lengths",
                over_lengths(rows),
            )


def by_row(groups: Iterable[Group]) -> dict[tuple[str, str], list[Group]]:
    """Groups that differ in T alone, by (row, direction)."""
    rows: dict[tuple[str, str], list[Group]] = {}
    for group in groups:
        rows.setdefault((group.ours.row, group.ours.direction), []).append(group)
    return rows


def length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    shown = sorted(set(lengths))
    axes.set_xticks(shown, [f"{t:,}" for t in shown])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sequence length T")


def log_axis(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade where they have room."""
    low, high = axis.get_view_interval()
    span = high / low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 2000 else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())


def families(groups: Sequence[Group], pick: Pick, label: str, fitted: bool = False) -> Figure:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for axes, direction in zip(panels, (FORWARD, TRAINING), strict=True):
        lengths: list[int] = []
        for (row, way), line in by_row(groups).items():
            if way != direction:
                continue
            name = row.split()[0]
            for entrant in ("ours", "torch"):
                points = sorted((g.records[entrant].T, pick(g.records[entrant])) for g in line if entrant in g.records)
                points = [(t, value) for t, value in points if value > 0]
                if not points:
                    continue
                lengths += [t for t, _ in points]
                text = f"{TITLE[name]}, {entrant}"
                tail = [point for point in points if point[0] >= FITTED_FROM]
                if fitted and len(tail) >= 2:
                    text += f": a = {exponent(tail):+.2f}"
                ours = entrant == "ours"
                axes.plot(
                    *zip(*points, strict=True),
                    color=FAMILY[name],
                    linestyle="-" if ours else (0, (4, 3)),
                    linewidth=2.0 if ours else 1.3,
                    marker="o",
                    markerfacecolor=FAMILY[name] if ours else "white",
                    label=text,
                )
        axes.set_yscale("log")
        length_axis(axes, lengths or [1])
        axes.set_title(direction)
        axes.legend(fontsize=8)
    panels[0].set_ylabel(label)
    log_axis(panels[0].yaxis)
    return figure


def parallelism(groups: Sequence[Group]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.2, 4), layout="constrained")
    lengths: list[int] = []
    for (row, direction), line in by_row(groups).items():
        if direction == FORWARD:
            name = row.split()[0]
            points = sorted((g.ours.T, g.ours.average_parallelism) for g in line)
            lengths += [t for t, _ in points]
            axes.plot(*zip(*points, strict=True), color=FAMILY[name], marker="o", label=TITLE[name])
    axes.set_yscale("log")
    length_axis(axes, lengths or [1])
    axes.set_ylabel("operations at once, on average")
    axes.set_title("forward")
    axes.legend()
    return figure


def training(records: Sequence[Record]) -> Figure:
    figure, axes = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    for record in records:
        points = [(seconds, bits) for seconds, _, bits in record.evaluations]
        colour = FAMILY[record.entrant]
        seen = rate(record.training_tokens)
        text = f"{TITLE[record.entrant]}: {record.bits_per_character:.2f} after {seen}"
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=text)
    axes.set_xlabel("training time, s")
    axes.set_ylabel("bits per character, held-out text")
    axes.set_title(records[0].text)
    axes.legend(title="bits per character after characters seen", title_fontsize=8.5, alignment="left")
    return figure


def against_peers(groups: Sequence[Group]) -> Figure:
    """A line for each case, a marker for each direction: ratio to the fastest peer, and fraction of the limit."""
    names = list(dict.fromkeys(f"{g.ours.row} T{g.ours.T:,}" for g in groups))
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(10.5, 1.5 + 0.27 * len(names)),
        layout="constrained",
        sharey=True,
        width_ratios=(3, 2),
    )
    shift = {FORWARD: -0.16, TRAINING: 0.16}
    style: dict[str, dict[str, Any]] = {FORWARD: {"markerfacecolor": "white"}, TRAINING: {}}
    for group in groups:
        ours, rival = group.ours, group.rival
        y = names.index(f"{ours.row} T{ours.T:,}") + shift[ours.direction]
        options = {"marker": "o", "linestyle": "", "color": OURS, **style[ours.direction]}
        if group.ratio is not None:
            left.plot([1, group.ratio], [y, y], color=OURS if group.ratio >= 1 else "#D55E00", linewidth=1, alpha=0.6)
            left.plot([group.ratio], [y], **{**options, "color": OURS if group.ratio >= 1 else "#D55E00"})
        right.plot([100 * ours.fraction_of_limit], [y], **options)
        if rival is not None:
            right.plot([100 * rival.fraction_of_limit], [y], **{**options, "color": GREY, "markersize": 4})
    left.set_xscale("log")
    left.axvline(1, color="#30343b", linewidth=1)
    low, high = left.get_xlim()
    left.set_xlim(min(low, 0.8), max(high, 1.25))
    log_axis(left.xaxis)
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.4, -0.6)
    left.set_xlabel("fastest peer's time / ours")
    left.set_title("ours against the fastest peer")
    right.set_xlim(0, max(100.0, right.get_xlim()[1]))
    right.set_xlabel("% of the measured limit")
    right.set_title("fraction of the limit")
    for direction in dict.fromkeys(g.ours.direction for g in groups):
        right.plot([], [], marker="o", linestyle="", color=OURS, label=f"ours, {direction}", **style[direction])
    right.plot([], [], marker="o", linestyle="", color=GREY, markersize=4, label="fastest peer")
    figure.legend(*right.get_legend_handles_labels(), fontsize=8.5, loc="outside lower right", ncols=3)
    return figure


def over_lengths(rows: Sequence[Sequence[Group]]) -> Figure:
    columns = 2
    lines = -(-len(rows) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(10, 0.4 + 3.3 * lines), layout="constrained", squeeze=False)
    for axes in panels.flat[len(rows) :]:
        axes.set_visible(False)
    for axes, row in zip(panels.flat, rows, strict=False):
        names = list(dict.fromkeys(name for group in row for name in group.records))
        colours = dict(zip([name for name in names if name != "ours"], PEERS * 2, strict=False))
        for name in names:
            records = [group.records[name] for group in row if name in group.records]
            points = sorted((r.T, r.best / r.tokens * 1e6) for r in records)
            ours = name == "ours"
            axes.plot(
                *zip(*points, strict=True),
                marker="o",
                color=OURS if ours else colours[name],
                linewidth=2.2 if ours else 1.4,
                linestyle="-" if ours else (0, (4, 3)),
                markerfacecolor=OURS if ours else "white",
                zorder=3 if ours else 2,
                label=name,
            )
        axes.set_yscale("log")
        length_axis(axes, [group.ours.T for group in row])
        log_axis(axes.yaxis)
        axes.set_ylabel("time per token, µs")
        axes.set_title(f"{row[0].ours.row}, {row[0].ours.direction}")
        axes.legend(fontsize=8)
    return figure
