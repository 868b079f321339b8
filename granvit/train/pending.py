"""Steps that were launched, and what the host is still to learn of them: their losses stay on the device until they are
read, those of many steps at once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from granvit.train.feed import MicroBatch
from granvit.train.guard import Spikes, Streak
from granvit.train.stages import Stage
from granvit.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launched:
    """A step. line: what the host knows of its line for the log. numbers: what the device knows of it, [] each, of this
    rank, by name; none where no image could be read. parts, finite: its micro-batches without their tensors, and of
    each which answer tokens' losses are finite, bool [A] on the device."""

    line: dict[str, Any]
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    parts: tuple[MicroBatch, ...] = ()
    finite: tuple[Tensor, ...] = ()


class Pending:
    """The steps of a stage since the last reading. What is noticed of losses when they are read goes to `spikes` and
    `streak`, and to the log."""

    def __init__(self, stage: Stage, spikes: Spikes, streak: Streak, world: World) -> None:
        self.stage, self.spikes, self.streak, self.world = stage, spikes, streak, world
        self._steps: list[Launched] = []

    def add(self, step: Launched) -> None:
        self._steps.append(step)

    def read(self) -> list[dict[str, Any]]:
        """The lines of the steps, in their order, up to the one that makes the streak too long. Waits for the device.
        All ranks call it at the same step."""
        steps, self._steps = self._steps, []
        flat = [number.double() for step in steps for number in step.numbers.values()]
        values = iter(fetch(torch.stack(flat)) if flat else ())
        known = [dict(zip(step.numbers, islice(values, len(step.numbers)), strict=True)) for step in steps]
        shares = [numbers[name] for numbers in known if numbers for name in ("loss_caption", "loss_distill")]
        totals = iter(self.world.total(*shares) if shares else ())
        lines = []
        for step, numbers in zip(steps, known, strict=True):
            if numbers:
                numbers |= {"loss_caption": next(totals), "loss_distill": next(totals)}
                lines.append(step.line | self._noticed(step, numbers))
            else:
                lines.append(step.line)
            if self.streak.over:
                break
        return lines

    def _noticed(self, step: Launched, numbers: dict[str, float]) -> dict[str, Any]:
        """What a step's line has besides what the host knew."""
        taken, norm, name = numbers.pop("taken"), numbers["grad_norm"], f"{self.stage.name} step {step.line['step']}"
        loss = numbers["loss_caption"] + self.stage.distill * numbers["loss_distill"]
        self.streak.add(bool(taken))
        if not taken:
            suspects = self._suspects(step)
            if self.world.leads:  # all ranks have the same to say
                log.warning("%s: loss %.4g, gradient norm %.4g; the step is skipped, its images: %s",
                            name, loss, norm, ", ".join(suspects))  # fmt: skip
            return {"skipped": True}
        if self.spikes.add(loss):  # each rank names its own images
            ids = dict.fromkeys(image for part in step.parts for image in part.ids)
            log.warning("%s: the loss jumped to %.4g; images: %s", name, loss, ", ".join(ids))
        return {"loss": loss} | numbers

    def _suspects(self, step: Launched) -> list[str]:
        """Ids of the images of all ranks with an answer whose loss is not finite; of all images if none has one."""
        pairs = [(part, finite) for part, finite in zip(step.parts, step.finite, strict=True) if part.ids]
        blamed = [image for part, finite in pairs for image in part.non_finite(finite)]
        ranks = self.world.gather((blamed, [image for part, _ in pairs for image in part.ids]))
        ids = [i for some, _ in ranks for i in some] or [i for _, every in ranks for i in every]
        return list(dict.fromkeys(ids))  # small data comes up several times in a step


def fetch(numbers: Tensor) -> list[float]:
    """Numbers [N] of the device. Here a run's host waits for it."""
    return numbers.tolist()
