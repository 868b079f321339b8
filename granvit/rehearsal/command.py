"""granvit train rehearse [quick|smoke|compact|paper] [--config FILE] --ranks N: a run's dress rehearsal."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.console import Console

from granvit.rehearsal.config import RehearsalConfig
from granvit.train.arguments import asked_of_run

NAME = "granvit train rehearse"

_USAGE = """A run of many ranks, rehearsed on this machine's CPU without weights: data, batches, shapes, sharding, a \
step of each stage on the meta device, collectives and checkpoints are those of the run. What would fail after hours \
fails here, with exit code 1. The first word picks a preset (quick is the default), or --config a run's config.yaml. \
Nothing is trained, downloaded or written."""


def parse(arguments: Sequence[str]) -> RehearsalConfig:
    """The rehearsal that a command line asks for. Exits with a usage text for what it cannot read; raises ValueError
    for a preset that there is not."""
    return asked_of_run(RehearsalConfig, arguments, NAME, _USAGE)


def main(arguments: Sequence[str]) -> int:
    """Rehearses what a command line asks for; returns the exit status."""
    asked = parse(arguments)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns of what a rehearsal does without
    from granvit.rehearsal.rehearse import rehearse  # --help needs no torch

    return rehearse(asked, Console(markup=False, emoji=False, highlight=False))
