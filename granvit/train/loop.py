"""The training loop of one phase: batches in, updated parameters and checkpoints out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from granvit.data.batches import Batch
from granvit.train.checkpoint import Checkpoints, load
from granvit.train.distill import Teacher, feature_statistics
from granvit.train.metrics_log import MetricsLog
from granvit.train.stages import GROUPS, Stage

log = logging.getLogger(__name__)


def freeze(groups: dict[str, list[nn.Parameter]], train: Iterable[str]) -> None:
    """Let the groups in `train` learn and no others."""
    for name in GROUPS:
        for parameter in groups[name]:
            parameter.requires_grad_(name in train)
            if name not in train:
                parameter.grad = None


def make_optimizer(groups: dict[str, list[nn.Parameter]], stage: Stage) -> torch.optim.AdamW:
    """AdamW over the stage's groups; vectors (norms, biases) are not decayed."""
    parameters = []
    for name in stage.train:
        rate = stage.learning_rate
        if name == "projector" and stage.projector_learning_rate is not None:
            rate = stage.projector_learning_rate
        for decay, members in (
            (stage.weight_decay, [p for p in groups[name] if p.ndim >= 2]),
            (0.0, [p for p in groups[name] if p.ndim < 2]),
        ):
            if members:
                parameters.append({"params": members, "lr": rate, "rate": rate, "weight_decay": decay})
    # fused: one pass over each tensor; a quarter of the time of the default on a CPU
    return torch.optim.AdamW(parameters, betas=stage.betas, fused=True)


class Phase:
    """One stage of a run on its way: what a checkpoint has to hold is here."""

    def __init__(
        self, model: nn.Module, stage: Stage, checkpoints: Checkpoints, metrics: MetricsLog, alpha: float
    ) -> None:
        self.model, self.stage, self.checkpoints, self.metrics = model, stage, checkpoints, metrics
        groups = model.groups()
        freeze(groups, stage.train)
        self.trained = [p for name in stage.train for p in groups[name]]
        self.optimizer = make_optimizer(groups, stage)
        self.teacher = Teacher(model.encoder, alpha) if stage.distill > 0 else None
        self.step = 0

    def resume(self, device: torch.device) -> bool:
        """Take up the phase's newest checkpoint. True if the phase is over."""
        path = self.checkpoints.newest(self.stage.name)
        if path is None:
            return False
        state = load(path, device)
        self.model.load_state_dict(state["model"])
        if path.stem.endswith("-final"):
            return True
        self.optimizer.load_state_dict(state["optimizer"])
        if self.teacher is not None:
            self.teacher.encoder.load_state_dict(state["teacher"])
        self.step = state["step"]
        log.info("%s goes on from step %d", self.stage.name, self.step)
        return False

    def save(self, final: bool = False) -> Path:
        state = {"model": self.model.state_dict()}
        if not final:
            state["optimizer"] = self.optimizer.state_dict()
            if self.teacher is not None:
                state["teacher"] = self.teacher.encoder.state_dict()
        return self.checkpoints.save(self.stage.name, self.step, state, final)

    def update(self, loss: Tensor) -> float:
        """One step of the optimiser; returns the gradient's norm before clipping."""
        rate = self.stage.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.stage.clip, error_if_nonfinite=True)
        self.optimizer.step()
        if self.teacher is not None:
            self.teacher.update(self.model.encoder)
        return float(norm)


def train_phase(
    phase: Phase,
    batches: Iterable[tuple[int, Batch | None]],
    loss_of: Callable[[int, Batch], dict[str, Tensor]],
    *,
    autocast: torch.autocast,
    device: torch.device,
    checkpoint_every: int,
    log_every: int,
    title: str,
) -> None:
    """Run `phase` to its last step over (step, batch) pairs, and leave its final checkpoint."""
    stage = phase.stage
    phase.model.train()
    with Progress(
        TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    ) as bar:  # fmt: skip
        task = bar.add_task(title, total=stage.steps, completed=phase.step, note="")
        began = time.perf_counter()
        for step, batch in batches:
            phase.step = step
            if batch is None:
                log.warning("%s step %d: no readable image among its rows, skipped", stage.name, step)
                continue
            batch = batch.to(device)
            with autocast:
                losses = loss_of(step, batch)
            norm = phase.update(losses["loss"])
            ended = time.perf_counter()
            line = {"loss_distill": 0.0}
            line |= {name: float(value.detach()) for name, value in losses.items() if name != "features"}
            if "features" in losses and (step % log_every == 0 or step == 1):
                line |= {f"features_{k}": v for k, v in feature_statistics(losses["features"]).items()}
            phase.metrics.write(
                stage=stage.name, step=step, **line, grad_norm=norm, regions=batch.packed.regions,
                tokens=int((batch.packed.image_index >= 0).sum()), seconds=ended - began,
            )  # fmt: skip
            began = ended
            bar.update(task, completed=step, note=f"loss {line['loss']:.3f}")
            if step % checkpoint_every == 0 and step < stage.steps:
                phase.save()
    phase.save(final=True)
