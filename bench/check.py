"""python bench/check.py [--results DIR]: lists the rows that fall short of their aims, and what could not be measured.

Reads the newest rows of each device in the results' folder (rows.py). It always ends with 0: a missed aim is a finding,
not a failure.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rows import results_folder


def all_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of every file that holds a comparison's: a list of objects that name an operator and a provider."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, list):
            rows += [row for row in content if {"operator", "provider", "device"} <= set(row)]
    return rows


def shortfalls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that failed, and rows below their aim."""
    return [row for row in rows if "failed" in row or not row.get("reached", True)]


def table(rows: list[dict[str, Any]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for head in ("operator", "mode", "workload", "provider", "figure", "aim", "device", "commit"):
        made.add_column(head, overflow="fold")
    for row in rows:
        aim = row.get("aim")
        name = aim and aim["figure"]
        figure = row.get("failed") or (f"{name} {row[name]:.3g}" if name in row else f"no {name}")
        cells = [figure, f"{name} {aim['least']:.3g}" if aim else "", row["device"], row["commit"]]
        made.add_row(row["operator"], row["mode"], row["workload"], row["provider"], *cells)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, help="the folder (GRANVIT_BENCH_RESULTS, or bench/results)")
    folder = parser.parse_args(argv).results or results_folder()
    rows = all_rows(folder)
    short = shortfalls(rows)
    # Into a file or a pipe as wide as the rows are: a line each.
    console = Console(width=None if Console().is_terminal else 400, highlight=False)
    if short:
        console.print(table(short))
    aimed, failed = sum("aim" in row for row in rows), sum("failed" in row for row in rows)
    reached = sum(row.get("reached", False) for row in rows)
    console.print(f"{folder}: {len(rows)} rows; {reached} of {aimed} aims reached; {failed} rows could not be measured")


if __name__ == "__main__":
    main()
