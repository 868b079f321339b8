"""The words that train and plan share: a preset's name first, and --config FILE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from granvit.train.presets import TrainConfig, load_config


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
