"""granvit train [quick|smoke|compact|paper|adapt|sft] [--output DIR] [--any.field value], and other commands.

    granvit train adapt --encoder RUN --llm NAME_OR_FOLDER [--llm.lora 16]
    granvit train sft --model RUN_OR_EXPORT --data.path DIR
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection
from functools import partial
from itertools import zip_longest
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, NamedTuple

import tyro

from granvit.status import leads, read, run
from granvit.train.arguments import split_arguments
from granvit.train.console import closing_words, log_handler, say
from granvit.train.folder import finished
from granvit.train.help import print_help
from granvit.train.presets import PRESETS, TrainConfig
from granvit.train.transfer import adapt_config, check_adapt, check_sft, sft_config

NAME = "granvit train"


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration that a command line asks for. Exits with a usage text for what it cannot read; raises
    ValueError for a word that it doesn't know, and for what a command lacks."""
    preset, default, rest = split_arguments(arguments)
    if preset not in PRESETS and preset not in STARTS:
        known = f"presets {', '.join(PRESETS)}; commands {', '.join((*STARTS, *COMMANDS))}"
        raise ValueError(f"there is no {preset!r}; {known}")
    check = None
    if default is None:  # else it was a run once, and lacks nothing
        default = PRESETS.get(preset) or STARTS[preset].default(_value(rest, STARTS[preset].flag))
        check = STARTS[preset].check if preset in STARTS else None
    if {"-h", "--help"} & set(rest):
        print_help(preset, default, _USAGE)
        raise SystemExit(0)
    rest = ["--help" if word == "--help-all" else word for word in rest]
    config = read(
        NAME,
        lambda: tyro.cli(TrainConfig, args=rest, default=default, prog=f"{NAME} {preset}", description=_USAGE),
    )
    if check:
        check(config, {word.removeprefix("--").partition("=")[0] for word in rest if word.startswith("--")})
    return config


def _value(arguments: list[str], flag: str) -> str | None:
    """What stands behind a flag, under either of its names; None where it is not given."""
    given = None
    for word, following in zip_longest(arguments, arguments[1:]):
        name, equals, value = word.partition("=")
        if name in (f"--{flag}", f"--model.{'whole' if flag == 'model' else flag}"):
            given = value if equals else following
    return given


class Start(NamedTuple):
    """A command that is a run whose configuration begins with what lies at a path.

    check: raises ValueError for a configuration that lacks something; it gets the flags that were given, too.
    """

    flag: str
    default: Callable[[str | None], TrainConfig]
    check: Callable[[TrainConfig, Collection[str]], None]


STARTS = {"adapt": Start("encoder", adapt_config, check_adapt), "sft": Start("model", sft_config, check_sft)}


_USAGE = """Train GranViT through its stages. The first word picks a preset (quick is the default) or a \
command: adapt is stage 2 with another --llm on the frozen --encoder of a run, sft goes on with a --model on \
conversations, plan says what a run costs, rehearse goes through one of many GPUs without them, replay looks into a \
dump. Under torchrun every rank runs it. SIGTERM and Ctrl-C save the run; exit code 75 or 130: give it again."""


def run_preset(arguments: list[str]) -> None:
    config = parse(arguments)
    folder = Path(config.output)
    if finished(folder, config):
        for line in [f"{folder} is finished", *closing_words(folder)] if leads() else ():
            say(line)
        return
    if leads():
        say(f"{NAME} {config.preset}: loading PyTorch and transformers; the run's folder is {folder}")
    from granvit.train.run import train

    train(config)


def run_replay(arguments: list[str]) -> None:
    read(NAME, lambda: tyro.cli(replay, args=arguments, prog=f"{NAME} replay"))


def replay(dump: Annotated[Path, tyro.conf.Positional], device: str = "auto") -> None:
    """Take the step again that made a run stop for not being finite, and print where that began.

    Args:
        dump: RUN/faults/STAGE-STEP.
        device: Where it is taken.
    """
    resolve_name("granvit.train.replay:replay")(dump, device)  # by its name: --help needs no torch


def run_plan(arguments: list[str]) -> None:
    resolve_name("granvit.cost.command:main")(arguments)  # by its name: what a run costs stands above the trainer


def run_rehearsal(arguments: list[str]) -> int:
    return resolve_name("granvit.rehearsal.command:main")(arguments)  # by its name, as plan


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "plan": run_plan, "rehearse": run_rehearsal, "replay": run_replay
}  # fmt: skip
"""What the first word may be besides a preset's name; each takes the other words, and may return an exit status."""


def main() -> int:
    """Runs the command of sys.argv and returns its exit status (granvit.status)."""
    logging.basicConfig(level=logging.INFO if leads() else logging.WARNING, handlers=[log_handler()])
    arguments = sys.argv[1:]
    word = arguments[0] if arguments else ""
    work = partial(COMMANDS[word], arguments[1:]) if word in COMMANDS else partial(run_preset, arguments)
    if word in COMMANDS:
        return run("granvit plan" if word == "plan" else f"{NAME} {word}", work)
    return run(NAME, work, "stopped at once; the same command goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    sys.exit(main())
