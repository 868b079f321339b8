"""The words that train, plan and rehearse share: a preset's name first, and --config FILE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from granvit.status import read
from granvit.train.presets import PRESETS, TrainConfig, load_config

T = TypeVar("T")


def split_arguments(arguments: Sequence[str]) -> tuple[str, TrainConfig | None, list[str]]:
    """The first word ("quick" where there is none before the flags), what the file of --config says (None without it),
    and all other words. Raises ValueError for a --config without a file, and as `load_config` does."""
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    first = words.pop(0) if words and not words[0].startswith("-") else "quick"
    if "--config" not in words:
        return first, None, words
    at = words.index("--config")
    if at + 1 == len(words):
        raise ValueError("--config takes the path of a run's config.yaml")
    return first, load_config(Path(words[at + 1])), words[:at] + words[at + 2 :]


def asked_of_run(kind: Callable[[TrainConfig], T], arguments: Sequence[str], name: str, usage: str) -> T:
    """What a command line asks about a run: `kind`, a configuration whose first field is the run's, with its flags and
    the run's. Exits with a usage text for what it cannot read; raises ValueError for a preset that there is not."""
    preset, config, words = split_arguments(arguments)
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    default = kind(config or PRESETS[preset])
    return read(name, lambda: tyro.cli(kind, args=words, default=default, prog=f"{name} {preset}", description=usage))
