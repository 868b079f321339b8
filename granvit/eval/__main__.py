"""python -m granvit.eval RUN_OR_MODEL --data DIR [--json FILE]: measure a model, beside the floors.

python -m granvit.eval probe ENCODER... --data DIR: measure frozen encoders (granvit.eval.probe).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from granvit.data.files import output_fault
from granvit.machine import default_device
from granvit.questions.prompts import CAPTION2BBOX

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    from granvit.data.loader import GranDataset

BLIND = {"other image": "other_image", "text alone": "text"}
SOURCES = 5  # that the tables show, of the hundreds that a dataset may have
LONGEST = 24  # letters of a source's name that they show


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m granvit.eval",
        description="Caption every box and find every sentence of a data set's images, beside the floors.",
        epilog="`python -m granvit.eval probe --help`: frozen encoders, without an LLM.",
    )
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run's folder, or a folder of save_pretrained's"
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="a Gran dataset")
    parser.add_argument("--split", default="test", help="the split that is asked about (test)")
    parser.add_argument("--json", metavar="FILE", help="write metrics, floors and every prediction there")
    parser.add_argument("--limit", type=int, metavar="N", help="N images only, spread over the split")
    parser.add_argument("--blind", action="store_true", help="also the model shown another image, and none")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (64)")
    parser.add_argument(
        "--fault-budget", type=float, default=0.01, metavar="SHARE", help="faulty rows allowed (0.01)"
    )
    parser.add_argument("--device")
    options = parser.parse_args(arguments)

    options.device = options.device or default_device()
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.json and (fault := output_fault(options.json)):
        parser.error(f"--json {options.json}: {fault}")
    return options


def train_split(options: argparse.Namespace, console: Console) -> GranDataset | None:
    """The split that floors are fitted on, or None, said aloud, where the dataset has none."""
    from granvit.data.loader import GranDataset

    try:
        return GranDataset(options.data, "train", options.fault_budget)
    except ValueError as error:
        console.print(f"no floors: {error}", style="yellow")
        return None


def frequent_sources(asked: Mapping[str, int]) -> list[str]:
    """The sources that most questions are about, at most SOURCES, the most frequent first. asked: see
    `metrics.counts`."""
    total: Counter[str] = Counter()
    for name, number in asked.items():
        source, slash, _ = name.rpartition("/")
        total[source] += number if slash else 0
    return [source for source, number in total.most_common(SOURCES) if number]


def table(
    title: str, names: Iterable[str], columns: dict[str, dict[str, float]], sources: Iterable[str] | None = None
) -> Table:
    """Metrics down, the model and what it is to be compared with across; fractions in per cent. sources: those that
    have rows, in this order; None: all."""
    names = sorted(names)
    columns = {label: column for label, column in columns.items() if column.keys() & set(names)}
    out = Table(title=title)
    out.add_column("", no_wrap=True)
    for label in columns:
        words = label.replace("_", " ")
        style = "bold" if label == "model" else "dim"
        out.add_column(words, justify="right", style=style, min_width=max(5, *map(len, words.split())))
    by_source: dict[str, list[str]] = {"": []}
    for name in names:
        by_source.setdefault(name.rpartition("/")[0], []).append(name)
    for source in by_source if sources is None else ["", *sources]:
        out.add_section()
        for name in by_source.get(source, []):
            scale, digits = (1, 2) if name.endswith("cider") else (100, 1)
            values = (column.get(name) for column in columns.values())
            shown = name if len(source) <= LONGEST else f"{source[: LONGEST - 1]}…{name[len(source) :]}"
            out.add_row(
                Text(shown), *("" if value is None else f"{scale * value:.{digits}f}" for value in values)
            )
    return out


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["probe"]:
        from granvit.eval.probe.command import main as probe

        return probe(arguments[1:])
    options = parse(arguments)
    from granvit.data.loader import GranDataset
    from granvit.eval.baselines import floors
    from granvit.eval.evaluation import evaluate
    from granvit.eval.loading import check_device, load_model
    from granvit.eval.metrics import counts, is_attribute, is_of_size

    console = Console(width=max(120, Console().width), markup=False, emoji=False)  # the tables have up to eight columns
    try:
        check_device(options.device)
        test = GranDataset(options.data, options.split, options.fault_budget)
        model, processor = load_model(options.model, options.device)
        evaluation = evaluate(model, processor, test, limit=options.limit, batch_size=options.batch_size)
        blinded = {
            label: evaluate(
                model, processor, test, blind=blind, limit=options.limit, batch_size=options.batch_size
            ).metrics
            for label, blind in (BLIND.items() if options.blind else ())
        }
        train = train_split(options, console)
        below = floors(train, test, options.limit) if train is not None else {}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    columns = {"model": evaluation.metrics} | blinded | below
    attributes = [name for name in evaluation.metrics if is_attribute(name)]
    sizes = [name for name in evaluation.metrics if is_of_size(name)]
    boxes = [name for name in evaluation.metrics if CAPTION2BBOX in name and name not in sizes]
    captions = [name for name in evaluation.metrics if name not in {*attributes, *sizes, *boxes}]
    asked = counts(evaluation.predictions)
    shown = frequent_sources(asked)
    console.print(table("Captions of boxes (per cent; CIDEr as it is, 10 at most)", captions, columns, shown))
    if attributes:
        console.print(table("Attributes that captions name right (per cent)", attributes, columns, shown))
    console.print(table("Boxes of sentences (per cent)", boxes, columns, shown))
    console.print(table("The same by the object's size (per cent)", sizes, columns, shown))
    hidden = len({name.rpartition("/")[0] for name in asked} - {""}) - len(shown)
    if hidden:
        where = options.json or "the file of --json"
        console.print(f"and {hidden:,} more sources, of fewer questions each; {where} holds all of them")
    console.print(
        "asked: " + ", ".join(f"{name} {number}" for name, number in asked.items() if "/" not in name)
    )
    if test.faults.counts:
        console.print(f"left out: {test.faults.summary()}", style="yellow")
    if options.json:
        result = {
            "model": str(options.model),
            "data": str(options.data),
            "split": options.split,
            "metrics": evaluation.metrics,
            "blind": blinded,
            "floors": below,
            "counts": asked,
            "predictions": evaluation.predictions,
        }
        Path(options.json).write_text(json.dumps(result, indent=1), encoding="utf-8")
        console.print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
