"""How many steps and sequences a stage's `epochs` and `images` come to on a dataset.

Both follow from the lengths of the data's images and questions, the configuration and the seed alone, and not from how
many ranks there are: a run goes on with the same numbers on any.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from granvit.data.batches import PackLoader
from granvit.data.lengths import measure
from granvit.data.loader import GranDataset
from granvit.data.planning import packs_of
from granvit.metrics_log import read_json, write_aside
from granvit.train.presets import TrainConfig
from granvit.train.stages import Stage

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor


def order_arguments(config: TrainConfig, stage: Stage) -> dict[str, Any]:
    """Those arguments of a stage's PackLoader that say which images and questions stand in which sequence."""
    return {
        "capacity": config.data.capacity,
        "packs": stage.packs,
        "questions": config.data.questions_per_image,
        "seed": order_seed(config, stage),
        "epochs": stage.passes,
        "weights": None if stage.name == config.sft.name and config.data.chat else config.data.weights,
    }


def order_seed(config: TrainConfig, stage: Stage) -> int:
    return zlib.crc32(f"{config.seed} {stage.name}".encode())


def needs_counting(config: TrainConfig) -> bool:
    """Whether a stage says epochs or images, whose steps and packs are not known yet."""
    return any(map(_uncounted, (config.warmup, *config.stages)))


def _uncounted(stage: Stage) -> bool:
    return stage.runs and None in (stage.steps, stage.packs)


def counted(
    config: TrainConfig, data_of: Callable[[Stage], GranDataset], processor: GranViTProcessor, known: Path | None = None
) -> TrainConfig:
    """The configuration with all stages' `steps` and `packs` known. What was counted is kept in the file `known`, since
    it takes a while for millions of images. Raises ValueError where nothing can be asked."""
    if not needs_counting(config):
        return config
    counts = read_json(known) if known is not None and known.exists() else {}
    stages = {}
    for stage in (config.warmup, *config.stages):
        if _uncounted(stage):
            if stage.name not in counts:
                counts[stage.name] = _count(config, stage, data_of(stage), processor)
            stages[stage.name] = with_counts(stage, **counts[stage.name])
    if known is not None:
        write_aside(known, json.dumps(counts, indent=1))
    return replace(config, **stages)


def check_ranks(config: TrainConfig, ranks: int) -> None:
    """Raises ValueError where so many ranks can't share a stage's sequences evenly."""
    for stage in (config.warmup, *config.stages):
        if stage.runs and stage.packs % ranks:
            name = stage.name
            raise ValueError(
                f"{name}: {stage.packs} sequences a batch ({name}.packs, or what {name}.images come to) are no "
                f"multiple of {ranks} ranks; give a multiple, --{name}.packs N --{name}.images None, or other images"
            )


def with_counts(stage: Stage, steps: int, packs: int) -> Stage:
    """The stage with these numbers in place of `epochs` and `images`."""
    return replace(stage, steps=steps, packs=packs, passes=stage.epochs or stage.passes, epochs=None, images=None)


def _count(config: TrainConfig, stage: Stage, data: GranDataset, processor: GranViTProcessor) -> dict[str, int]:
    packs, steps = stage.packs, stage.steps
    if packs is None:
        lengths = measure(data, processor, sorted(stage.weights))
        questions, seed = config.data.questions_per_image, order_seed(config, stage)
        images = stage.images / stage.accumulate
        packs = packs_of(images, lengths, stage.weights, config.data.capacity, questions, seed)
    if steps is None:
        arguments = order_arguments(config, replace(stage, packs=packs, images=None)) | {"epochs": stage.epochs}
        batches = PackLoader(data, processor, stage.weights, **arguments, workers=0).steps
        steps = -(-batches // stage.accumulate)
    return {"steps": steps, "packs": packs}
