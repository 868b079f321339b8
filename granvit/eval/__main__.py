"""granvit eval RUN_OR_MODEL [--data DIR] [--json FILE]: measure a model, beside the floors.

Under torchrun the ranks share the images.

granvit eval probe ENCODER... --data DIR: measure frozen encoders (granvit.eval.probe).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from granvit.data.files import output_fault
from granvit.metrics_log import write_aside
from granvit.status import leads, run

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    import torch

    from granvit.data.loader import GranDataset
    from granvit.world import World

BLIND = {"other image": "other_image", "text alone": "text"}
NAME = "granvit eval"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Caption every box and find every sentence of a data set's images, beside the floors.",
        epilog="`granvit eval probe --help`: frozen encoders, without an LLM.",
    )
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run's folder, or a folder of save_pretrained's"
    )
    parser.add_argument("--data", metavar="DIR", help="a Gran dataset (that of the run)")
    parser.add_argument("--split", default="test", help="the split that is asked about (test)")
    parser.add_argument("--json", metavar="FILE", help="write metrics, floors and every prediction there")
    parser.add_argument("--limit", type=int, metavar="N", help="N images only, spread over the split")
    parser.add_argument("--blind", action="store_true", help="also the model shown another image, and none")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="questions at a time (64)")
    parser.add_argument(
        "--fault-budget", type=float, default=0.01, metavar="SHARE", help="faulty rows allowed (0.01)"
    )
    parser.add_argument(
        "--precision", metavar="float32|bfloat16", help="what the model computes in (as its weights were saved)"
    )
    parser.add_argument("--device", default="auto", help="cpu or cuda (a GPU where there is one)")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name in ("limit", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if options.json and (fault := output_fault(options.json)):
        parser.error(f"--json {options.json}: {fault}")
    return options


def train_split(paths: list[str], options: argparse.Namespace, console: Console) -> GranDataset | None:
    """The split that floors are fitted on, or None, and a line about it, where the data has none."""
    from granvit.data.mixture import open_split

    try:
        return open_split(paths, "train", options.fault_budget)
    except ValueError as error:
        console.print(f"no floors: {error}", style="yellow", soft_wrap=True)
        return None


def measure(options: argparse.Namespace, world: World, device: torch.device) -> None:
    """Evaluate, print the figures and write them down; every rank of a world does it with the others. Raises ValueError
    for what can't be measured, and Failed on ranks where it was another that failed."""
    from transformers.utils.logging import disable_progress_bar

    from granvit.data.loader import spread
    from granvit.data.mixture import open_split
    from granvit.eval.baselines import floors
    from granvit.eval.evaluation import evaluate, readable
    from granvit.eval.loading import find_model, load_model, own_data
    from granvit.eval.metrics import counts
    from granvit.eval.terminal import bars, print_figures

    disable_progress_bar()  # "Loading weights"
    console = Console(markup=False, emoji=False, highlight=False, quiet=not world.leads)

    def data() -> list[str]:
        find_model(options.model)  # first: the sample set may have to be drawn
        return [options.data] if options.data else own_data(options.model)

    paths, ready = world.first(data), []

    def prepare() -> None:
        test = open_split(paths, options.split, options.fault_budget)
        ready.extend((test, *load_model(options.model, device, options.precision)))

    world.each(prepare)
    test, model, processor = ready
    with bars(world.leads) as bar:
        rows = readable(test, spread(len(test), options.limit), world, bar("opening pictures"))
        asked = {"rows": rows, "batch_size": options.batch_size, "world": world}
        evaluation = evaluate(model, processor, test, **asked, progress=bar("answers"))
        blinded = {
            label: evaluate(model, processor, test, blind=blind, **asked, progress=bar(f"answers, {label}")).metrics
            for label, blind in (BLIND.items() if options.blind else ())
        }

    def guess() -> dict[str, dict[str, float]]:
        train = train_split(paths, options, console)
        return floors(train, test, rows=rows) if train is not None else {}

    below, numbers = world.first(guess), counts(evaluation.predictions)
    print_figures(console, {"model": evaluation.metrics} | blinded | below, numbers, options.json)
    if test.faults.counts:
        console.print(f"left out: {test.faults.summary()}", style="yellow", soft_wrap=True)
    if options.json and world.leads:
        result = {
            "model": str(options.model),
            "data": paths[0] if len(paths) == 1 else paths,
            "split": options.split,
            "metrics": evaluation.metrics,
            "blind": blinded,
            "floors": below,
            "counts": numbers,
            "predictions": evaluation.predictions,
        }
        write_aside(Path(options.json), json.dumps(result, indent=1, allow_nan=False))
        console.print(f"written to {options.json}", soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["probe"]:
        from granvit.eval.probe.command import main as probe

        return probe(arguments[1:])
    options = parse(arguments)
    return run(NAME, lambda: measure_here(options), "stopped: nothing was written", quiet=not leads())


def measure_here(options: argparse.Namespace) -> None:
    """`measure` as one of the processes that torchrun has started, or alone."""
    from granvit.world import start, stop

    world, device = start(options.device)
    if not world.leads:  # it would repeat what the first one says
        logging.disable(logging.WARNING)
    try:
        measure(options, world, device)
    finally:
        stop()


if __name__ == "__main__":
    sys.exit(main())
