"""python -m granvit.data: makes and converts Gran datasets."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 1 after one line on stderr that says what is wrong."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        args.run(args, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", markup=False, style="red")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m granvit.data", description="Make and convert Gran datasets."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    sample = commands.add_parser("sample", help="write the sample set: photographs, scenes, pages of text")
    sample.add_argument("--images", type=int, required=True, help="pictures in both splits together, >= 16")
    sample.add_argument("--output", type=Path, required=True, help="a new or an empty folder")
    sample.add_argument("--seed", type=int, default=0, help="another seed makes other pictures (default: 0)")
    sample.add_argument("--workers", type=int, help="processes (default: one a core)")
    sample.set_defaults(run=_sample)

    convert = commands.add_parser("convert", help="convert another format to a Gran dataset")
    formats = convert.add_subparsers(required=True, metavar="FORMAT")
    jsonl = formats.add_parser("jsonl", help="one JSON object a line, one line an image")
    jsonl.add_argument("file", type=Path, metavar="FILE", help="images lie in its folder or below")
    jsonl.add_argument("--output", type=Path, required=True, help="a new or an empty folder")
    jsonl.add_argument("--split", default="train", help="name of the split that is written (default: train)")
    jsonl.add_argument(
        "--fault-budget",
        type=float,
        default=0.01,
        help="share of lines that may have faults before nothing is written at all (default: 0.01)",
    )
    jsonl.set_defaults(run=_jsonl)
    return parser


# Imports stand in the commands: what they need takes seconds, and --help must not.
def _sample(args: argparse.Namespace, console: Console) -> None:
    from granvit.data.sample import build_sample

    build_sample(args.output, args.images, args.seed, args.workers)
    console.print(f"wrote {args.images} pictures to {args.output}", markup=False)


def _jsonl(args: argparse.Namespace, console: Console) -> None:
    from granvit.data.sources.jsonl import convert_jsonl

    faults = convert_jsonl(args.file, args.output, split=args.split, fault_budget=args.fault_budget)
    console.print(f"wrote {args.output}: {faults.summary()}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
