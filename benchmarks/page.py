"""The report as one self-contained HTML page."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from .harness import threads_of
from .plots import TITLE
from .results import Results
from .table import COLUMNS, cells, mebibytes, rate, summary, titles

SECTIONS = {
    "models": "Model families over sequence length",
    "recurrence": "Recurrence: LSTM, GRU, RNN",
    "convolution": "Causal convolution",
    "attention": "Attention",
    "additive_attention": "Additive attention and pooling",
}
METHOD = (
    "Ours and every peer run in one process in interleaved rounds after a warm-up, all from the same weights; their "
    "results are compared before they are timed.",
    "The length changes from round to round (T, T-1, T-2), scaled to T by the analytic work; inputs are noise and are "
    "written between rounds.",
    "Times are the fastest round; ratios are the fastest peer's time over ours. The JSON files hold every round.",
    "The limit of a call is the least time that the measured peak of fused multiply-adds and the measured bandwidth of "
    "the level of memory that holds its data allow. Exponentials and tanh count as nothing, so attention, and above "
    "all additive attention, can't reach it; a recurrence can exceed it, where part of its weights stays in a nearer "
    "level from step to step, or where a tile unit makes its products from bfloat16 planes faster than multiply-adds "
    "can.",
    "Memory is the peak of torch's own allocator over the level before one call; what libraries take beside it isn't "
    "seen.",
    "Point at a row to see in which operations each entrant spent its time. torch.compile, which takes up to a minute "
    "a case, is a rival of one case in the quick grid and of more in the full one.",
    "A case is refused where the load average exceeds the threads used.",
)
CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1f2328; max-width: 1120px; margin: 2.5rem auto;
  padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid #d5d9de; }
p, li { max-width: 52rem; }
p.lead, figcaption, .note { color: #57606a; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1rem 0; }
dt { color: #57606a; } dd { margin: 0; }
figure { margin: 1.2rem 0 1.8rem; } figure img { max-width: 100%; height: auto; }
figcaption { font-size: .88rem; max-width: 52rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .28rem .6rem; text-align: right; border-bottom: 1px solid #e6e8eb; white-space: nowrap; }
th { color: #57606a; font-weight: 600; border-bottom: 1px solid #afb8c1; position: sticky; top: 0; background: #fff; }
th.text, td.text { text-align: left; }
tr:hover td { background: #f6f8fa; }
.better { color: #0b6e4f; font-weight: 600; } .worse { color: #b3400a; font-weight: 600; }
.warning { background: #fff4e5; border-left: 4px solid #d9822b; padding: .6rem 1rem; max-width: 50rem; }
.scroll { overflow-x: auto; }
code { background: #f3f4f6; padding: .1rem .3rem; border-radius: 3px; font-size: .9em; }
details > summary { cursor: pointer; color: #0b57a4; margin: .4rem 0; }
"""


def write(path: Path, results: Results, pictures: Sequence[tuple[str, str, Path]]) -> None:
    """Writes the page; the pictures are put inside it."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>s2s_kernels: benchmarks</title><style>{CSS}</style>",
        "<h1>s2s_kernels: benchmarks</h1>",
        *head(results),
    ]
    for suite in [name for name in SECTIONS if name in results.suites or (name == "models" and results.training)]:
        parts.append(f"<h2 id={suite}>{SECTIONS[suite]}</h2>")
        groups = results.of(suite)
        if groups:
            parts.append(f"<p>{text(summary(groups))}</p>")
        parts += [figure(caption, file) for section, caption, file in pictures if section == suite]
        if suite == "models" and results.training:
            parts.append(training_table(results))
        if groups:
            opened = " open" if suite != "models" else ""
            parts.append(f"<details{opened}><summary>All {len(results.rows(suite))} cases</summary>")
            parts.append(f"{table(results, suite)}</details>")
    parts.append("<h2 id=method>How this was measured</h2><ul>")
    parts += [f"<li>{text(line)}</li>" for line in METHOD]
    parts.append("</ul></html>\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def text(value: object) -> str:
    return html.escape(str(value))


def head(results: Results) -> Iterable[str]:
    yield "<p class=lead>Ours beside what torch offers and what users write, on this machine.</p><dl>"
    for name, value in facts(results).items():
        yield f"<dt>{text(name)}</dt><dd>{text(value)}</dd>"
    yield "</dl>"
    for warning in warnings(results):
        yield f"<p class=warning>{text(warning)}</p>"


def facts(results: Results) -> dict[str, str]:
    """Machine, versions, limits, date and command, in words."""
    machine = results.machines[0]
    named = {
        "machine": f"{machine['processor_name']}, {machine['cores']} cores, {machine['instruction_set']}",
        "GPU": machine["gpu"] or "",
        "software": f"torch {machine['torch']}, Python {machine['python_version']}, {machine['system']}",
        "measured": " to ".join(dict.fromkeys((min(results.dates), max(results.dates)))),
        "command": machine["command"],
        "results": f"{results.files} file{'' if results.files == 1 else 's'}; the fastest round of all counts",
    }
    for other in results.machines:
        if other["limits"]:
            rates = [f"{other['limits']['flops'] / 1e9:,.0f} GFLOP/s"]
            rates += [f"{name} {level['rate'] / 1e9:,.0f} GB/s" for name, level in other["limits"]["levels"].items()]
            named[f"limits, {threads_of(other['threads'])}"] = ", ".join(rates)
    return {name: value for name, value in named.items() if value}


def warnings(results: Results) -> Iterable[str]:
    records = [record for group in results.groups for record in group.records.values()] + results.training
    busy = sum(record.load_exceeded for record in records)
    if busy:
        yield (
            f"{busy} of {len(records)} measurements were taken while the load average exceeded the threads used "
            "(--any-load): they are marked with *, and not to be quoted."
        )
    if len({machine["processor_name"] for machine in results.machines}) > 1:
        yield "The result files come from different machines."
    if results.files and max((len(record.medians) for record in records), default=0) == 1:
        yield "Every case was measured in one process. A claim needs two: run again, and give both files to the report."


def figure(caption: str, path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return (
        f"<figure><img alt='{text(caption)}' src='data:image/png;base64,{encoded}'>"
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def table(results: Results, suite: str) -> str:
    both = results.rows(suite)
    shown = [column for column in range(len(COLUMNS)) if any(cells(*pair)[column] for pair in both)]
    names = titles(both)
    head = "".join(f"<th{' class=text' if COLUMNS[c][1] else ''}>{text(names[c])}</th>" for c in shown)
    rows = []
    for group, wider in both:
        values, row = cells(group, wider), []
        for column in shown:
            kind = "text" if COLUMNS[column][1] else ""
            judged = {"ratio": group, "ratio, more threads": wider}.get(COLUMNS[column][0])
            ratio = None if judged is None else judged.ratio
            if ratio is not None:
                kind = "better" if ratio >= 1 else "worse"
            row.append(f"<td class='{kind}'>{text(values[column])}</td>")
        ran = "; ".join(f"{name}: {record.algorithm}" for name, record in group.records.items())
        rows.append(f"<tr title='{text(ran)}'>{''.join(row)}</tr>")
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"


def training_table(results: Results) -> str:
    names = (
        "family",
        "parameters",
        "bits per character",
        "after",
        "characters seen",
        "characters/s",
        "peak MiB a step",
    )
    head = "".join(f"<th{' class=text' if name == 'family' else ''}>{name}</th>" for name in names)
    rows = []
    for r in results.training:
        values = (
            f"{r.parameters:,}",
            f"{r.bits_per_character:.3f}",
            f"{r.training_seconds:.0f} s, {threads_of(r.threads)}",
            f"{r.training_tokens:,}",
            rate(r.training_tokens / r.training_seconds),
            mebibytes(r.peak_bytes),
        )
        body = "".join(f"<td>{text(value)}</td>" for value in values)
        rows.append(f"<tr><td class=text>{TITLE[r.entrant]}</td>{body}</tr>")
    return f"<div class=scroll><table><tr>{head}</tr>{''.join(rows)}</table></div>"
