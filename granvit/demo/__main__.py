"""granvit demo RUN_OR_MODEL [--before MODEL_OR_ENCODER] [--port N]."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec

from granvit.machine import default_device
from granvit.status import run

NAME = "granvit demo"
MISSING = "the demo needs gradio: pip install 'granvit[demo]'"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="A page to try a model: captions of boxes, boxes of sentences, and maps of the encoder's features. "
        "Only this machine can open it.",
    )
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run, a folder of save_pretrained's, or an encoder (maps alone)"
    )
    parser.add_argument(
        "--before",
        metavar="MODEL_OR_ENCODER",
        help="whose maps stand beside the model's (of a run: its encoder before it was trained)",
    )
    parser.add_argument("--port", type=int, metavar="N", help="the first free one from 7860 on if not given")
    parser.add_argument("--device")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.port is not None and not 0 < options.port < 65536:
        parser.error(f"--port {options.port}: it takes a number from 1 to 65535")
    return options


def demo(options: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        raise ValueError(MISSING)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    from transformers.utils import logging

    from granvit.demo.page import launch
    from granvit.demo.subject import load_subject

    logging.disable_progress_bar()
    subject = load_subject(options.model, options.before, options.device or default_device())
    print(subject.title, *filter(None, [subject.comparison]), sep="\n")
    page, url = launch(subject, options.port)
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    page.block_thread()


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return run(NAME, lambda: demo(options))


if __name__ == "__main__":
    sys.exit(main())
