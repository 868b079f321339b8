"""granvit eval probe ENCODER... --data DIR [--json FILE] [--picture FILE.png]"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from granvit.data.files import output_fault
from granvit.machine import default_device
from granvit.status import run

NAME = "granvit eval probe"

COLUMNS = {
    "linear": "linear_top1", "linear top-5": "linear_top5", "kNN": "knn_top1", "kNN top-5": "knn_top5",
    "R@1": "retrieval_r1", "R@5": "retrieval_r5", "mAP": "retrieval_map",
}  # fmt: skip
SURE = ("linear_top1", "knn_top1")
"""Metrics whose interval the table shows."""

LONGEST = 18  # letters of an encoder's name that the table shows, from its end
CLASSES = 8  # that a table's title names


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="What frozen features of boxes tell of labels: linear probe, nearest neighbours and retrieval.",
    )
    parser.add_argument(
        "encoders", nargs="+", metavar="[NAME=]ENCODER",
        help="a run, an export, or a checkpoint (folder or hub name) of SigLIP2, DINOv2, CLIP...; random:ENCODER: the "
        "same with random weights",
    )  # fmt: skip
    parser.add_argument("--data", required=True, metavar="DIR", help="a Gran dataset with a split train")
    parser.add_argument("--split", default="test", help="the split that is asked about (test)")
    parser.add_argument("--json", metavar="FILE", help="write every figure there")
    parser.add_argument("--picture", metavar="FILE.png", help="draw bars and nearest regions there")
    parser.add_argument(
        "--limit", type=int, default=10000, metavar="N", help="images of either split, spread over it (10000)"
    )
    parser.add_argument(
        "--min-regions", type=int, default=20, metavar="N", help="training regions that make a label a class (20)"
    )
    parser.add_argument(
        "--max-patches", type=int, metavar="N", help="patches an image, for all encoders (each as it was trained)"
    )
    parser.add_argument(
        "--fault-budget", type=float, default=0.01, metavar="SHARE", help="faulty rows allowed (0.01)"
    )
    parser.add_argument("--device")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)

    options.device = options.device or default_device()
    for name in ("limit", "min_regions", "max_patches"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("json", "picture"):
        path = getattr(options, name)
        if path and (fault := output_fault(path)):
            parser.error(f"--{name} {path}: {fault}")
    if options.picture and Path(options.picture).suffix.lower() not in (".png", ".pdf", ".svg"):
        parser.error(f"--picture {options.picture}: it takes a name that ends in .png, .pdf or .svg")
    return options


def table(result: dict[str, Any], target: str) -> Table:
    """Encoders and grids down, metrics across, in per cent; a top-1 with half its 95 % interval. At most 80 columns."""
    about = result["targets"][target]
    names = list(about["classes"])
    shown = ", ".join(name[:20] for name in names[:CLASSES]) + (", ..." if len(names) > CLASSES else "")
    title = (
        f"{target}: {len(names)} classes ({shown}); {about['train']:,} training and {about['test']:,} "
        f"{result['split']} regions"
    )
    rows = [row for row in result["rows"] if row["target"] == target]
    columns = {label: name for label, name in COLUMNS.items() if any(name in row["metrics"] for row in rows)}
    out = Table(title=Text(title), box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    out.add_column("per cent", no_wrap=True)
    out.add_column("grid")
    for label, name in columns.items():
        out.add_column(label, justify="right", no_wrap=name in SURE, min_width=5)
    last = None
    for row in rows:
        name = row["encoder"]
        cells = [cell(row, metric) for metric in columns.values()]
        short = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
        out.add_row(Text(short if name != last else ""), row["grid"], *cells)
        last = name
    out.add_row("chance", "", *(cell({"metrics": result["chance"][target]}, metric) for metric in columns.values()))
    return out


def cell(row: dict[str, Any], metric: str) -> str:
    if metric not in row["metrics"]:
        return ""
    text = f"{100 * row['metrics'][metric]:.1f}"
    if metric in SURE and "intervals" in row:
        low, high = row["intervals"][metric]
        text += f" ±{50 * (high - low):.1f}"
    return text


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return run(NAME, lambda: measure(options))


def measure(options: argparse.Namespace) -> None:
    """Probe, print the tables and write down what is asked for. Raises ValueError for what can't be measured."""
    from transformers.utils import logging

    from granvit.data.loader import GranDataset
    from granvit.eval.loading import check_device
    from granvit.eval.probe.probing import probe

    console = Console(markup=False, emoji=False)
    logging.disable_progress_bar()
    check_device(options.device)
    train, test = (GranDataset(options.data, name, options.fault_budget) for name in ("train", options.split))
    result = probe(
        options.encoders, train, test, options.limit, options.min_regions, options.max_patches, options.device
    )
    if options.picture:
        from granvit.eval.probe.picture import draw

        draw(result, test).savefig(options.picture, dpi=150)
    for target in result["targets"]:
        console.print(table(result, target))
    counts = result["counts"]
    console.print(
        f"{counts['train']['images']:,} training and {counts['test']['images']:,} {options.split} images; a class has "
        f"{options.min_regions} training regions or more; text regions are left out "
        f"({counts['train']['text_left_out']:,} and {counts['test']['text_left_out']:,}); ± half a 95 % interval over "
        "images"
    )
    for dataset in (train, test):
        if dataset.faults.counts:
            console.print(f"left out of {dataset.split}: {dataset.faults.summary()}", style="yellow")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
        console.print(f"written to {options.json}")
