"""A step of a stage as one rank of many takes it, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from granvit.cost.peak import Peak, peak_of, watched
from granvit.cost.shapes import on_meta
from granvit.data.collate import Batch, Read, join
from granvit.data.loader import GranDataset
from granvit.model import GranViTConfig, GranViTProcessor
from granvit.rehearsal.collectives import Collective
from granvit.rehearsal.config import RehearsalConfig
from granvit.rehearsal.ranks import LoneRank, end_reductions, lone_rank
from granvit.train.loop import Phase
from granvit.train.parallel.meta import OnGPU
from granvit.train.parallel.sharing import choose
from granvit.train.presets import TrainConfig
from granvit.train.run import Run
from granvit.train.stages import Stage
from granvit.train.tensors import model_tensors

META = torch.device("meta")
STEPS = 2
"""The first is another than the rest: what is gathered once, is gathered in it."""


class RankRun(Run):
    """A run's stages without its folder: what makes a phase, and that alone."""

    def __init__(
        self, config: TrainConfig, splits: Mapping[str, GranDataset], processor: GranViTProcessor, world: LoneRank
    ) -> None:
        self.config, self.splits, self.processor, self.world, self.device = config, splits, processor, world, META


@dataclass(frozen=True)
class Taken:
    """The steps that one rank took. collectives: of each step, in their order. said: see `LoneRank`. tensors: those of
    its checkpoint. final: those of the stage's last one. peak: when its device's memory is fullest, in the last step.
    why: the ranks share the model so."""

    collectives: list[list[Collective]]
    said: tuple[Tensor, ...]
    tensors: Mapping[str, Tensor]
    final: Mapping[str, Tensor]
    peak: Peak
    why: str


def take_steps(
    asked: RehearsalConfig, run: RankRun, stage: Stage, shapes: GranViTConfig, rank: int, blank: bool = False,
    heard: tuple[Tensor, ...] = (),
) -> Taken:  # fmt: skip
    """STEPS steps of a stage on this rank, by the run's own code. blank: no image is left in its second one, as where
    all of its pictures are faulty."""
    config = run.config
    with lone_rank(rank, asked.ranks, asked.local, heard) as world, OnGPU(config.dtype):
        run = RankRun(config, run.splits, run.processor, world)
        run.hollow = run.model = on_meta(shapes, config.model.lora, config.dtype)
        run.sharing = choose(config, run.model, world, int(1e9 * asked.device_gb))
        phase = run.new_phase(stage)
        phase.model.train()
        end_reductions(phase.root)
        phase.step = 1  # numbers of a first step are read, and meta has none
        live, collectives, batches = watched(phase), [], phase.batches()
        for number in range(STEPS):
            world.recorder.collectives = []
            live.peak.clear()  # DDP's buckets count from the first step's end
            given = phase.feed.step([_empty(phase)] * stage.accumulate) if blank and number else next(batches)
            with live, world.recorder:
                phase.take(given)
            collectives.append(world.recorder.collectives)
        final = model_tensors(phase.model) if stage.cooldown else phase.tensors(whole=True)
        return Taken(collectives, tuple(world.said), phase.tensors(), final, peak_of(live), run.sharing.why)


def _empty(phase: Phase) -> Batch:
    """A rank's batch without an image."""
    loader = phase.loader
    rows = Read([[] for _ in range(phase.stage.packs // phase.world.ranks)], [], [], [])
    return join([rows], loader.processor, loader.capacity, loader.crops)
