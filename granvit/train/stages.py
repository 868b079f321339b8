"""What each stage trains, on what, and with which loss: the method of GranViT (arXiv 2510.21501) as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from granvit import flags
from granvit.questions.prompts import BBOX2CAPTION, GLOBAL_CAPTION, TASKS

GROUPS = ("encoder", "projector", "llm")


@dataclass(frozen=True)
class Stage:
    """One stage of training. The fields after `distill` are what the paper calls hyperparameters.

    The paper uses AdamW at 1e-5, batch 256, one epoch for both stages; betas, weight decay, clipping and the shape of
    the schedule are unknown. Chosen here: betas (0.9, 0.98) and clipping at 1 (usual
    for transformers trained from scratch in few steps), weight decay on matrices only, linear warm-up and then a cosine
    to zero.

    Raises ValueError for unknown groups or tasks, and for numbers out of range.
    """

    name: Annotated[str, flags.hidden()]
    train: tuple[Literal["encoder", "projector", "llm"], ...]
    """Parameter groups that learn: encoder, projector (with region queries and location rows), llm."""
    tasks: tuple[Literal["global_caption", "bbox2caption", "caption2bbox", "chat"], ...]
    """Questions that are asked of each image."""
    global_captions: float = 1.0
    """How often global captions are drawn, against 1 for the other tasks: a long answer, and a small model's time is
    short."""
    box_captions: float = 1.0
    """How often boxes' captions are drawn, where they are one of the tasks."""
    distill: float = 0.0
    """Weight of the self-distillation loss (lambda; 1 in the paper, 0 switches the teacher off)."""
    steps: int | None = 1000
    """0: the run does without this stage. None: `epochs` says how long it is."""
    epochs: int | None = None
    """Passes over the data, in place of `steps`: every image is seen so many times, and the number of steps follows."""
    packs: int | None = 6
    """Sequences of data.capacity tokens of a batch, over all ranks: a multiple of their number. None: `images` says how
    large a batch is."""
    images: int | None = None
    """Images of a step, in place of `packs`, whose number follows from what the data's images and questions measure. It
    is a multiple of 8, as are most numbers of GPUs, or 1, 2 or 4; how many ranks there are has no part in it."""
    accumulate: int = 1
    """Batches a step, one after the other. Tokens weigh the same in all. Where a batch does not fit a rank's memory,
    micro_packs is what helps: it leaves the step as it is."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: weights of linear layers learn by Muon (optimizer.py), at the same rates, the rest by AdamW."""
    learning_rate: float = 1e-5
    projector_learning_rate: float | None = None
    """The projector's own rate; None is learning_rate. A new projector on a trained encoder wants a larger one."""
    warmup_steps: int = 50
    cooldown: float = 1.0
    """Share of the steps after the warm-up over which the rate falls to zero, at the stage's end, by a cosine. 1: all
    of them. 0: it never falls, and the stage may be given more steps after its end (docs/training.md)."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    eval_every: int = 0
    """Steps between evaluations while the stage trains: its loss on test images, and a few questions (see
    granvit.train.heldout). There is one before the first step and after the last, too. 0: none at all."""
    passes: Annotated[int | None, flags.hidden()] = None
    """What `epochs` was where `steps` was counted from it (granvit.train.counting): the data ends with the last one."""

    def __post_init__(self) -> None:
        for field, values, known in (("train", self.train, GROUPS), ("tasks", self.tasks, TASKS)):
            unknown = set(values) - set(known)
            if unknown or not values:
                raise ValueError(f"{self.name}.{field} is {values}; it takes one or more of {', '.join(known)}")
        for field, low in {"steps": 0, "epochs": 1, "packs": 1, "images": 1, "accumulate": 1, "eval_every": 0}.items():
            if getattr(self, field) is not None and getattr(self, field) < low:
                raise ValueError(f"{self.name}.{field} is {getattr(self, field)}; it is at least {low}")
        for field, other in (("steps", "epochs"), ("packs", "images")):
            values = getattr(self, field), getattr(self, other)
            if (values[0] is None) == (values[1] is None):
                raise ValueError(
                    f"{self.name}.{field} is {values[0]}, {self.name}.{other} is {values[1]}; exactly one of them is a "
                    f"number, the other is None (--{self.name}.{field} N --{self.name}.{other} None)"
                )
        for field in ("global_captions", "box_captions", "distill", "learning_rate", "projector_learning_rate",
                      "warmup_steps", "weight_decay"):  # fmt: skip
            value = getattr(self, field)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{self.name}.{field} is {value}; it is finite and at least 0")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{self.name}.betas are {self.betas}; each is at least 0 and below 1")
        if not self.clip > 0:
            raise ValueError(f"{self.name}.clip is {self.clip}; it is above 0 (inf clips nothing)")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"{self.name}.cooldown is {self.cooldown}; it takes a share from 0 to 1")
        if self.distill and "encoder" not in self.train:
            raise ValueError(f"{self.name}.distill is {self.distill}; it is 0 where the encoder is frozen")

    @property
    def runs(self) -> bool:
        """Whether the stage is part of a run."""
        return self.steps != 0

    @property
    def weights(self) -> dict[str, float]:
        """How often each task is drawn."""
        known = {GLOBAL_CAPTION: self.global_captions, BBOX2CAPTION: self.box_captions}
        return {task: known.get(task, 1.0) for task in self.tasks}

    def rate(self, step: int) -> float:
        """The share of the learning rate at `step` (from 1) of `steps`: linear warm-up, all of it until the cooldown,
        then a cosine to zero. Without a warm-up the first step has the whole rate."""
        warmup = max(1, self.warmup_steps)
        if step <= warmup:
            return step / warmup
        falls = self.cooldown * max(0, self.steps - warmup)
        progress = max(0.0, step - (self.steps - falls)) / max(1, falls)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
