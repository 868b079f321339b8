"""granvit export RUN_OR_CHECKPOINT [--output DIR] [--push-to-hub OWNER/NAME]: a model, at any time.

A run that is under way gives what its newest checkpoint holds; RUN/checkpoints/STAGE-STEP is that checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from granvit.status import run

# --help needs neither torch nor transformers, which take seconds to import: functions import them.
if TYPE_CHECKING:
    from granvit.model import GranViT, GranViTProcessor

NAME = "granvit export"

FORMATS = {
    "granvit": "the whole model, for GranViT.from_pretrained and `granvit predict`",
    "encoder": "the vision encoder and its image processor, for plain transformers",
    "lfm2-vl": "the whole model as a Lfm2VlForConditionalGeneration, for plain transformers and what serves it",
}


@dataclass(frozen=True)
class Source:
    """What a path means. run: the folder of the run (of one seed) that wrote it; None: a model that no run is known of.
    checkpoint: of it; None: its export."""

    path: Path
    run: Path | None
    checkpoint: Path | None = None

    def load(self) -> tuple[GranViT, GranViTProcessor]:
        """The model and its processor. Raises ValueError for a folder that holds none, and for a run whose
        configuration or data can't be read any more."""
        from granvit.eval.loading import load_model

        return load_model(self.path) if self.checkpoint is None else _from_checkpoint(self.checkpoint)


def find_source(path: str | Path) -> Source:
    """Of a run (finished, or as its newest checkpoint has it), a checkpoint or a folder of save_pretrained's. Raises
    ValueError for a run without a checkpoint."""
    from granvit.train.folder import config_of
    from granvit.train.retention import checkpoints_of

    path = Path(path)
    if (path / "manifest.json").is_file():
        return Source(path, path.resolve().parent.parent, path)
    finished = (path / "export" / "config.json").is_file()
    if finished or not (path / "checkpoints").is_dir():
        runs = (path, path.resolve().parent)  # of RUN, and of RUN/export
        return Source(path, next((run for run in runs if (run / "metrics.jsonl").is_file()), None))
    config = config_of(path)
    for stage in (*reversed(config.stages), config.warmup):
        if written := checkpoints_of(path / "checkpoints", stage.name):
            return Source(written[-1], path, written[-1])
    raise ValueError(f"the run {path} has no checkpoint yet")


def _from_checkpoint(checkpoint: Path) -> tuple[GranViT, GranViTProcessor]:
    import torch

    from granvit.train.build import build
    from granvit.train.checkpoint import load
    from granvit.train.folder import config_folder, config_of, same_data
    from granvit.train.optimizer import freeze
    from granvit.train.splits import open_splits, with_data
    from granvit.train.tensors import beginning, learnt_tensors, model_tensors

    checkpoint = checkpoint.resolve()  # it may be the link to the best one
    phase, seed = checkpoint.name.partition("-")[0], checkpoint.parent.parent.name
    run = config_folder(checkpoint.parent.parent)
    config, texts = config_of(run), None
    if not (config.model.whole or config.model.llm):  # only then is the tokenizer made of the data's text
        splits = open_splits(with_data(config))
        if (run / "data.json").is_file():
            same_data(run / "data.json", splits)
        texts = splits["train"] if "train" in splits else splits["chat"]
    torch.manual_seed(int(seed.removeprefix("seed-")) if seed.startswith("seed-") else config.seed)
    model, processor = build(config.model, texts, getattr(torch, config.precision))
    tensors = model_tensors(model)
    if not checkpoint.name.endswith("-final"):
        if (began := beginning(checkpoint.parent, phase)) is not None:
            load(began, tensors, subset=True)
        stages = {stage.name: stage for stage in (config.warmup, *config.stages)}
        freeze(model.groups(), stages[phase].train)
        tensors = learnt_tensors(model)
    load(checkpoint, tensors, subset=True)  # it holds a teacher and moments too
    return model.eval(), processor


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description="Write the model of a run, finished or under way, to a folder.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:9}{text}" for name, text in FORMATS.items()),
    )
    parser.add_argument(
        "model", metavar="RUN_OR_CHECKPOINT", help="a run, RUN/checkpoints/STAGE-STEP, or a folder of save_pretrained's"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="a folder that is not there yet, or is empty")
    parser.add_argument(
        "--push-to-hub", metavar="OWNER/NAME", help="a repository of the hub that it goes to, too or without --output"
    )
    parser.add_argument("--private", action="store_true", help="make that repository private, if it is a new one")
    parser.add_argument("--license", metavar="ID", help="the model's, as the hub names it (apache-2.0), for its card")
    parser.add_argument("--format", choices=FORMATS, default="granvit", help="see below (granvit)")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not (options.output or options.push_to_hub):
        parser.error("give --output DIR, --push-to-hub OWNER/NAME, or both")
    if options.private and not options.push_to_hub:
        parser.error("--private is of a repository: give --push-to-hub OWNER/NAME")
    if options.output:
        _check_output(parser, options.output)
    return options


def _check_output(parser: argparse.ArgumentParser, folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        parser.error(f"--output {folder}: it is there already; give a new or an empty folder")
    for parent in folder.resolve().parents:
        if (parent / "config.yaml").is_file():  # what lies in RUN/export is taken for what the run itself wrote
            parser.error(f"--output {folder}: it is in the folder of a run, {parent}; give another")


def export(options: argparse.Namespace) -> None:
    from granvit.hub import check_repository, check_token

    if options.push_to_hub:
        check_repository(options.push_to_hub)
        check_token()
    source = find_source(options.model)
    said = f"{source.path} as {options.format} in"
    with contextlib.nullcontext(options.output) if options.output else tempfile.TemporaryDirectory() as folder:
        _write(source, Path(folder), options)
        if options.output:
            print(said, options.output, flush=True)  # before the upload, which may fail
        if options.push_to_hub:
            print(said, _push(folder, options))


def _push(folder: str | Path, options: argparse.Namespace) -> str:
    from granvit.hub import push

    try:
        return push(folder, options.push_to_hub, "model", options.private)
    except OSError as error:
        if not options.output:
            raise
        again = shlex.join(["hf", "upload", options.push_to_hub, str(folder), ".", *["--private"] * options.private])
        raise OSError(f"{error}\n{folder} is written; `{again}` sends it") from error


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    return run(NAME, lambda: export(options))


def _write(source: Source, folder: Path, options: argparse.Namespace) -> None:
    from transformers.utils import logging

    from granvit.model.formats import save
    from granvit.train.card import write_card

    logging.disable_progress_bar()
    save(*source.load(), folder, options.format)
    write_card(folder, options.format, source.run, source.checkpoint, options.license, options.push_to_hub)


if __name__ == "__main__":
    sys.exit(main())
