"""granvit plan [quick|smoke|compact|paper] [--config FILE] [--data.path DIR]: a run's costs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from granvit.cost.config import PlanConfig
from granvit.train.arguments import asked_of_run

NAME = "granvit plan"

_USAGE = """What a run costs: GPU hours and what will be seen; then operations of both recipes, ours (an image \
once, its questions packed behind it) and one question a sample in padded batches; memory of a rank; and how the hours \
of a data set of Gran-29M's size grow. The first word picks a preset (quick is the default), or --config a run's \
config.yaml. Nothing is trained or downloaded. What is measured is measured on a dataset's own text and sizes; what is \
assumed is called so."""


def parse(arguments: Sequence[str]) -> PlanConfig:
    """The plan that a command line asks for. Exits with a usage text for what it cannot read; raises ValueError for a
    preset that there is not."""
    return asked_of_run(PlanConfig, arguments, NAME, _USAGE)


def main(arguments: Sequence[str]) -> None:
    plan = parse(arguments)
    from transformers.utils import logging  # --help needs no torch

    from granvit.cost.plan import report

    logging.disable_progress_bar()  # "Loading weights"
    report(plan, Console(markup=False, emoji=False))
