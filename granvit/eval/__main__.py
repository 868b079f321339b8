"""python -m granvit.eval RUN_OR_MODEL --data DIR [--json FILE]: measure a model, beside the floors.

python -m granvit.eval probe ENCODER... --data DIR: measure frozen encoders (granvit.eval.probe).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from granvit.data.files import output_fault
from granvit.machine import default_device

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    from granvit.data.loader import GranDataset

BLIND = {"other image": "other_image", "text alone": "text"}


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
        console.print(f"no floors: {error}", style="yellow", soft_wrap=True)
        return None


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
    from granvit.eval.metrics import counts
    from granvit.eval.terminal import print_figures

    console = Console(markup=False, emoji=False, highlight=False)
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
    asked = counts(evaluation.predictions)
    print_figures(console, {"model": evaluation.metrics} | blinded | below, asked, options.json)
    if test.faults.counts:
        console.print(f"left out: {test.faults.summary()}", style="yellow", soft_wrap=True)
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
        console.print(f"written to {options.json}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
