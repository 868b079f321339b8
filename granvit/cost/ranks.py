"""A rank's share of a stage: its sequences, how the ranks share the model, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from granvit.cost.config import PlanConfig
from granvit.cost.flops import Picture
from granvit.cost.peak import Peak, peak
from granvit.cost.reading import Reading
from granvit.cost.shapes import on_meta
from granvit.data.batches import LANE_BYTES, PREFETCH_BYTES
from granvit.model import GranViTConfig
from granvit.train.parallel.sharing import Sharing, choose
from granvit.train.stages import Stage
from granvit.world import World


@dataclass(frozen=True)
class Rank:
    """One of `world.ranks`. sequences: that it takes through forward and backward at once. host: bytes of the host's
    memory that its loader takes, at most."""

    world: World
    sharing: Sharing
    sequences: int
    peak: Peak
    host: int


def rank_of(plan: PlanConfig, config: GranViTConfig, stage: Stage, reading: Reading) -> Rank:
    """A rank of the planned run in this stage. Its micro-batch is the fullest of those that `reading` holds."""
    run = plan.run
    ranks = _divisor(reading.packs, plan.ranks or (128 if run.preset == "paper" else 1))
    world = World(0, ranks, _divisor(ranks, plan.node))
    sharing = choose(run, on_meta(config, run.model.lora, run.dtype), world, int(plan.device_gb * 1e9))
    packs = reading.packs // ranks
    parts = -(-packs // run.micro_packs) if run.micro_packs else 1
    sequences = -(-packs // parts)
    several = parts * stage.accumulate > 1
    fullest = peak(run, stage, config, _fullest(reading.rows, sequences), world, sharing, several)
    datasets = max(1, len(run.data.paths))
    return Rank(world, sharing, sequences, fullest, packs * datasets * LANE_BYTES + PREFETCH_BYTES)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most so large."""
    return max(n for n in range(1, min(number, most) + 1) if number % n == 0)


def _fullest(rows: Sequence[Sequence[Picture]], number: int) -> list[Sequence[Picture]]:
    """Of all runs of so many rows the one with most tokens and patches, those of crops too; rows again where there are
    too few."""
    rows = list(rows) * -(-number // len(rows))
    sizes = [sum(p.length + p.patches + sum(p.crops) for p in row) for row in rows]
    start = max(range(0, len(rows) - number + 1, number), key=lambda start: sum(sizes[start : start + number]))
    return rows[start : start + number]
