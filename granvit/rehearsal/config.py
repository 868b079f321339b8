"""What a rehearsal is asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import tyro

from granvit.cost.config import PlanConfig
from granvit.train.presets import TrainConfig


@dataclass(frozen=True)
class RehearsalConfig:
    """A run, and the machines that it is rehearsed for."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    ranks: int = 8
    """Processes of the run, each with a GPU."""
    node: int = 8
    """Of those, the ones on one machine."""
    device_gb: float = 80.0
    """Memory of a GPU, in 10^9 bytes."""
    batches: int = 200
    """Batches of each stage, of all ranks, that are planned."""
    images: float = PlanConfig.images
    """Images of the data set where data.path is empty (Gran-29M's)."""
    regions: float = PlanConfig.regions
    """And its regions."""

    def __post_init__(self) -> None:
        for name in ("ranks", "node", "device_gb", "batches", "images", "regions"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it is above 0, and finite")
        if self.ranks > self.node and self.ranks % self.node:
            raise ValueError(f"ranks is {self.ranks}; it is a multiple of node, {self.node}, or below it")

    @property
    def local(self) -> int:
        """Ranks on one machine."""
        return min(self.node, self.ranks)

    @property
    def plan(self) -> PlanConfig:
        """The assumptions on data, as `granvit plan` makes them."""
        return PlanConfig(self.run, images=self.images, regions=self.regions, ranks=self.ranks)
