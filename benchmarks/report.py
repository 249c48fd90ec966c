"""python -m benchmarks.report RESULTS.json… [--out FOLDER]: a table here, one HTML page and PNG plots in the folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import page, plots, results, table


def write(files: Sequence[str | Path], out: Path) -> Path:
    """Prints the table, draws the plots, writes the page; returns its path.

    Raises:
        OSError: a file can't be read.
        ValueError: a file isn't a result of these benchmarks, or nothing was measured.
    """
    loaded = results.load(files)
    if not loaded.groups and not loaded.training:
        raise ValueError("nothing was measured: " + ", ".join(map(str, files)))
    for line in table.lines(loaded):
        print(line)
    for warning in page.warnings(loaded):
        print(f"\n{warning}")
    out.mkdir(parents=True, exist_ok=True)
    target = out / "report.html"
    page.write(target, loaded, plots.draw(loaded, out))
    return target.resolve()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="+", metavar="RESULTS.json", help="JSON of pytest-benchmark")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the page and the plots (default out)")
    chosen = parser.parse_args(arguments)
    try:
        target = write(chosen.files, chosen.out)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"\n{target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
