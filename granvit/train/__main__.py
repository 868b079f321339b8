"""python -m granvit.train [smoke|compact|paper] [--output DIR] [--any.field value]"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import tyro
from rich.logging import RichHandler

from granvit.train.presets import PRESETS, TrainConfig, load_config


def parse(arguments: list[str]) -> TrainConfig:
    """The configuration that a command line asks for. Exits with a usage text for what it cannot read."""
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    preset = arguments[0] if arguments and not arguments[0].startswith("-") else "smoke"
    rest = arguments[1:] if arguments and not arguments[0].startswith("-") else list(arguments)
    if preset not in PRESETS:
        raise SystemExit(f"granvit.train: no preset {preset!r}; there are {', '.join(PRESETS)}")
    default = PRESETS[preset]
    if "--config" in rest:
        at = rest.index("--config")
        if at + 1 == len(rest):
            raise SystemExit("granvit.train: --config takes the path of a run's config.yaml")
        default = load_config(Path(rest[at + 1]))
        rest = rest[:at] + rest[at + 2 :]
    return tyro.cli(
        TrainConfig, args=rest, default=default, prog=f"python -m granvit.train {preset}", description=_USAGE
    )


_USAGE = """Train GranViT through both stages. The first word picks a preset (smoke, compact, paper), --config FILE
reloads a run's config.yaml, and the same command again goes on where the run was."""


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    try:
        config = parse(sys.argv[1:])
        from granvit.train.run import train

        train(config)
    except (ValueError, OSError) as error:
        raise SystemExit(f"granvit.train: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("granvit.train: stopped; the same command goes on from the last checkpoint") from None


if __name__ == "__main__":
    main()
