"""Which rank gets which batches: what the run's loaders would plan, without a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

from granvit.cost.config import PlanConfig
from granvit.data.batches import PackLoader
from granvit.data.loader import GranDataset
from granvit.data.planning import Pack
from granvit.model import GranViTProcessor
from granvit.train.counting import counted, order_arguments, with_counts
from granvit.train.presets import TrainConfig
from granvit.train.stages import Stage

STARVED = 0.01
"""The share of batches from which on a rank without an image is a fault: it computes for nothing while others wait."""


@dataclass(frozen=True)
class Planned:
    """batches: that were planned. images: in all of them. fill: share of the sequences' tokens that are used. blank: of
    each rank, the batches in which it has no image."""

    batches: int
    images: int
    fill: float
    blank: tuple[int, ...]

    @property
    def starving(self) -> list[int]:
        """Ranks that have no image in more than a share STARVED of the batches."""
        return [rank for rank, number in enumerate(self.blank) if number > STARVED * self.batches]


def plan_batches(
    config: TrainConfig, stage: Stage, data: GranDataset, processor: GranViTProcessor, ranks: int, limit: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Planned:  # fmt: skip
    """The first `limit` batches of a stage, of all ranks. Raises ValueError as PackLoader does."""
    arguments = order_arguments(config, stage)
    loader = PackLoader(data, processor, stage.weights, **arguments, workers=0)
    if stage.passes is not None:
        loader.steps = stage.steps * stage.accumulate
    lengths, batches, images, tokens, blank = loader.lengths, 0, 0, 0, [0] * ranks

    def length(pack: Pack) -> int:
        return sum(
            int(lengths.image[row]) + sum(int(lengths.question[lengths.starts[row] + n]) for n in numbers)
            for row, numbers in pack
        )

    for packs in islice(loader.plan(), min(limit, stage.steps * stage.accumulate)):
        batches += 1
        images += sum(map(len, packs))
        tokens += sum(map(length, packs))
        for rank in range(ranks):
            blank[rank] += not any(packs[rank::ranks])
        progress(batches)
    fill = tokens / max(1, batches * stage.packs * config.data.capacity)
    return Planned(batches, images, fill, tuple(blank))


def assumed_counts(
    config: TrainConfig, plan: PlanConfig, data: GranDataset, processor: GranViTProcessor
) -> TrainConfig:
    """The configuration with the steps and packs that its `epochs` and `images` come to on a dataset of `plan.images`
    of which `data` is an example, without end."""
    for stage in config.stages:
        one_step = replace(stage, steps=stage.steps or 1, epochs=None)
        known = counted(replace(config, **{stage.name: one_step}), lambda _: data, processor)
        steps, packs = stage.steps, getattr(known, stage.name).packs
        if steps is None:
            sample = plan_batches(config, replace(one_step, packs=packs, images=None, steps=20), data, processor, 1, 20)
            steps = math.ceil(plan.images * stage.epochs / (stage.images or sample.images / 20 * stage.accumulate))
        config = replace(config, **{stage.name: replace(with_counts(stage, steps, packs), passes=None)})
    return config
