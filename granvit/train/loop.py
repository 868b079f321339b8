"""One stage on its way: batches in, updated parameters, a log and checkpoints out."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from granvit.data.batches import PackLoader, with_all_places
from granvit.data.collate import Batch
from granvit.errors import Failed
from granvit.lora import ADAPTER, adapters
from granvit.metrics_log import MetricsLog
from granvit.model import GranViT
from granvit.train.checkpoint import Checkpoints, load
from granvit.train.distill import Teacher, feature_moments, feature_statistics
from granvit.train.guard import NotFinite, Spikes, Streak, Terminated, Termination
from granvit.train.optimizer import freeze, hidden_matrices, make_optimizer
from granvit.train.parallel.compiling import compile_blocks
from granvit.train.parallel.distributed import distribute, synchronise
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.presets import TrainConfig
from granvit.train.profiling import STEP, profiled
from granvit.train.retention import LOSS
from granvit.train.stages import Stage
from granvit.train.step import Share
from granvit.world import World

if TYPE_CHECKING:
    from granvit.train.heldout import HeldOut

log = logging.getLogger(__name__)

IMAGES_OF = "images {}"
"""Under which name a line of metrics.jsonl has a dataset's images, where several are mixed."""

LossOf = Callable[[GranViT, "Teacher | None", int, Batch, Share], dict[str, Tensor]]
"""(model, teacher, step, batch, share) -> losses, as `stage_loss` gives them."""


class Losses(nn.Module):
    """The losses of a model as a module of their own, because DDP and FSDP2 wrap what is called."""

    def __init__(self, model: GranViT, teacher: Teacher | None, loss_of: LossOf) -> None:
        super().__init__()
        self.model, self.teacher, self.loss_of = model, teacher, loss_of

    def forward(self, step: int, batch: Batch, share: Share) -> dict[str, Tensor]:
        return self.loss_of(self.model, self.teacher, step, batch, share)


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """A context of the run's precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16")


class Phase:
    """A stage of a run: model, optimiser, teacher and the place in the data, which are what a checkpoint holds.

    The model is trained in place; with FSDP its parameters become pieces. blank: a batch of an image without meaning,
    that a rank goes through where it has none, because the others wait for it. parts: micro-batches that a batch is
    split into, as many on each rank.
    """

    def __init__(
        self,
        config: TrainConfig,
        stage: Stage,
        model: GranViT,
        loader: PackLoader,
        loss_of: LossOf,
        blank: Batch,
        world: World,
        device: torch.device,
    ) -> None:
        self.config, self.stage, self.model, self.loader = config, stage, model, loader
        self.loss_of, self.blank, self.world, self.device = loss_of, blank, world, device
        freeze(model.groups(), stage.train)
        self.teacher = Teacher(model.encoder, config.distill.alpha) if stage.distill > 0 else None
        teacher = self.teacher.encoder if self.teacher else None
        if config.checkpointing:
            checkpoint_activations(model)
        for module in filter(None, (model, teacher)) if config.compile else ():
            compile_blocks(module)
        precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        losses = Losses(model, self.teacher, loss_of)
        self.losses = distribute(losses, model, teacher, world, config.parallel, precision)
        groups = model.groups()  # anew: FSDP has put pieces in the parameters' places
        self.trained = [p for name in stage.train for p in groups[name]]
        self.optimizer = make_optimizer(groups, stage, hidden_matrices(model))
        self.parts = -(-(stage.packs // world.ranks) // config.micro_packs) if config.micro_packs else 1
        self.step = 0
        self.spikes, self.streak = Spikes(), Streak(config.nonfinite_limit)

    # What a checkpoint holds

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name. They are the phase's own: to write to them is to load."""
        tensors = model_tensors(self.model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
        if self.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.tensors().items()}
        return tensors

    def values(self) -> dict[str, Any]:
        """The rest of a checkpoint: the place in the data, and what is remembered of past losses. All ranks ask for it
        together."""
        states = self.world.gather(self.loader.state_dict(self.step * self.stage.accumulate))
        place = {"stage": self.stage.name, "step": self.step, "loader": with_all_places(states)}
        return place | {"spikes": self.spikes.state(), "streak": self.streak.length}

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError where it is damaged, or of other data or arguments."""
        values = load(path, self.tensors(), world=self.world)
        try:
            self.loader.load_state_dict(values["loader"])
            self.step, self.streak.length = values["step"], values["streak"]
            self.spikes.restore(values["spikes"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no checkpoint of a stage on its way: {error!r} in its values") from error

    # Steps

    def batches(self) -> Iterator[list[Batch]]:
        """This rank's batches of each step that is left."""
        batches = iter(self.loader)
        for _ in range(self.step, self.stage.steps):
            yield list(islice(batches, self.stage.accumulate))

    def take(self, batches: list[Batch]) -> dict[str, Any]:
        """One step of the optimiser on what all ranks have, a micro-batch at a time. Returns its line for the log:
        without "loss" where no image could be read, with "skipped" where loss or gradient was not finite."""
        self.step += 1
        names = getattr(self.loader.dataset, "names", [])  # of a mixture's datasets
        counts = ("targets", "regions", "asked", "images", "tokens", *map(IMAGES_OF.format, names))
        batches = [part for batch in batches for part in batch.split(self.parts)]
        totals = self.world.total(*(number for batch in batches for number in _count(batch, names)))
        step = {name: sum(totals[i :: len(counts)]) for i, name in enumerate(counts)}
        images = totals[counts.index("images") :: len(counts)]  # no rank goes through what all have none of
        batches = [batch for batch, number in zip(batches, images, strict=True) if number]
        line = {"regions": int(step["asked"]), "images": int(step["images"]), "tokens": int(step["tokens"])}
        line |= {name: int(step[name]) for name in counts[5:]}
        if not step["targets"]:
            return line
        # What a model draws at random is a function of the step: there is no generator's state to be kept.
        seed = f"{self.config.seed} {self.stage.name} {self.step} {self.world.rank}"
        torch.manual_seed(zlib.crc32(seed.encode()))
        self.optimizer.zero_grad(set_to_none=True)
        logged, parts = self.step % self.config.log_every == 0 or self.step == 1, []
        for number, batch in enumerate(batches):
            synchronise(self.losses, number == len(batches) - 1)
            share = Share(step["targets"], step["regions"], weight=float(bool(batch.samples)))
            parts.append(self._learn(batch if batch.samples else self.blank, share, logged))
        line |= self._update(parts, batches)
        # There is no rank of what isn't finite, and none of no features: conversations alone have no picture.
        seen = [part["seen"] for part in parts if "seen" in part]
        if seen and "skipped" not in line:
            line |= {f"features_{k}": v for k, v in feature_statistics(sum(seen)).items()}
        return line

    def _learn(self, batch: Batch, share: Share, logged: bool) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to those that are there. Returns its losses, and with `logged` what
        `feature_statistics` takes of its features as "seen"; a function, so that nothing else of it is kept."""
        with autocast(self.config, self.device):
            losses = self.losses(self.step, batch.to(self.device), share)
        # The ranks' gradients are averaged, but their losses are parts of a sum.
        (losses["loss"] * self.world.ranks).backward()
        features = losses.pop("features", ())
        if logged and share.weight and len(features):
            losses["seen"] = feature_moments(features)
        return {name: value.detach() for name, value in losses.items()}

    def _update(self, parts: list[dict[str, Tensor]], batches: list[Batch]) -> dict[str, Any]:
        rate = self.stage.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        norm = nn.utils.clip_grad_norm_(self.trained, self.stage.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        captions, distills = ([part[k] for part in parts if k in part] for k in ("loss_caption", "loss_distill"))
        # Here alone a step waits for the device: it has to know whether the update is good.
        norm, *losses = torch.stack([norm, *captions, *distills]).tolist()
        caption, distill = self.world.total(sum(losses[: len(captions)]), sum(losses[len(captions) :]))
        loss = caption + self.stage.distill * distill
        finite = math.isfinite(loss) and math.isfinite(norm)
        self.streak.add(finite)
        if not finite:
            self.optimizer.zero_grad(set_to_none=True)
            log.warning("%s step %d: loss %.4g, gradient norm %.4g; the step is skipped, its images: %s",
                        self.stage.name, self.step, loss, norm, ", ".join(self._suspects(parts, batches)))  # fmt: skip
            return {"skipped": True}
        with record_function("granvit.optimizer"):
            self.optimizer.step()
            if self.teacher is not None:
                self.teacher.update(self.model.encoder)
                if "moments" in parts[0]:
                    self.teacher.statistics.update(self.world.sum(sum(part["moments"] for part in parts)))
        if self.spikes.add(loss):
            ids = [sample.id for batch in batches for sample in batch.samples]
            log.warning("%s step %d: the loss jumped to %.4g; images: %s", self.stage.name, self.step, loss,
                        ", ".join(ids))  # fmt: skip
        return {"loss": loss, "loss_caption": caption, "loss_distill": distill, "grad_norm": norm, "rate": rate}

    def _suspects(self, parts: list[dict[str, Tensor]], batches: list[Batch]) -> list[str]:
        """Ids of the images of all ranks with an answer whose loss is not finite; of all images if none has one."""
        pairs = [(losses, batch) for losses, batch in zip(parts, batches, strict=True) if batch.samples]
        blamed = [batch.samples[i].id for losses, batch in pairs for i in faulty(losses["answers"], batch)]
        ranks = self.world.gather((blamed, [sample.id for _, batch in pairs for sample in batch.samples]))
        return [i for some, _ in ranks for i in some] or [i for _, every in ranks for i in every]


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors under the names that they have in a checkpoint. The weights under an LLM's adapters are left
    out: they never change, and are read where the LLM is."""
    under = {f"llm.{name}" for name, _ in model.llm.named_parameters()} if adapters(model.llm) else set()
    under -= {name for name in under if ADAPTER in name}
    return {f"model.{name}": value for name, value in model.state_dict().items() if name not in under}


def faulty(answers: Tensor, batch: Batch) -> list[int]:
    """Numbers of the batch's images that have an answer whose loss (answers [A], of its tokens) is not finite."""
    owner = batch.packed.image_index.flatten()[batch.packed.answer_slots]
    return owner[~answers.isfinite().to(owner.device)].unique().tolist()


def _count(batch: Batch, names: Sequence[str]) -> tuple[int, ...]:
    tokens = int((batch.packed.image_index >= 0).sum())
    of = Counter(sample.dataset for sample in batch.samples) if names else {}
    numbers = len(batch.packed.targets), len(batch.crops), batch.packed.regions, len(batch.samples), tokens
    return *numbers, *(of[name] for name in names)


def train_phase(
    phase: Phase,
    checkpoints: Checkpoints,
    metrics: MetricsLog,
    termination: Termination,
    stepped: Callable[[int, int, str], None],
    held_out: HeldOut,
) -> None:
    """Run `phase` to its last step, and leave its final checkpoint. stepped: called after each step with the step, its
    images and what is to be said of it (`console.RunConsole.stage`). held_out: evaluates it while it trains.

    Raises Terminated, after saving, when the run is asked to stop; NotFinite, with a dump that reproduces it, after too
    many steps without a finite loss in a row; Failed where checkpoints can't be written any more.
    """
    stage, config, world = phase.stage, phase.config, phase.world
    folder, profiled_step = checkpoints.folder.parent, STEP if config.profile and world.leads else None
    phase.model.train()
    level = logging.WARNING if world.leads else logging.DEBUG  # what all ranks have to say

    def stopping() -> bool:
        return any(world.total(termination.asked))

    with termination.awaited():
        if (best := held_out.evaluate(stopping)) is not None:  # of the step it goes on from, where a stop prevented it
            _save(phase, checkpoints, best)
        began = time.perf_counter()
        for number, batches in enumerate(phase.batches(), start=1):
            with nullcontext() if number != profiled_step else profiled(folder / "profile" / stage.name, phase.device):
                line = phase.take(batches)
            ended = time.perf_counter()
            if "skipped" not in line and "loss" not in line:
                log.log(level, "%s step %d: no readable image among its rows, skipped", stage.name, phase.step)
            elif world.leads:
                metrics.write(stage=stage.name, step=phase.step, **line, seconds=ended - began)
            stepped(phase.step, line["images"], f"loss {line['loss']:.3f}" if "loss" in line else "skipped")
            if phase.streak.over:
                _give_up(phase, checkpoints)
            best = held_out.evaluate(stopping)
            if phase.step == stage.steps:
                break
            asked = stopping()
            if asked or best is not None or phase.step % config.checkpoint_every == 0:
                _save(phase, checkpoints, best)
            if asked:
                checkpoints.wait()
                if checkpoints.failures:
                    raise Failed(
                        f"{stage.name}: stopped after step {phase.step}, which could not be saved; the same command "
                        "goes on from the checkpoint before it"
                    )
                log.log(level, "%s: stopped after step %d; the same command goes on", stage.name, phase.step)
                raise Terminated(termination.code)
            began = time.perf_counter()
        values = {"step": phase.step} | _known(best)
        checkpoints.save(stage.name, phase.step, model_tensors(phase.model), values, final=True)
        if checkpoints.failures:
            raise Failed(f"the final checkpoint of {stage.name} could not be written to {checkpoints.folder}")
        if stopping():  # while the last step was taken, or saved
            log.log(level, "%s: stopped at its end; the same command goes on", stage.name)
            raise Terminated(termination.code)


def _save(phase: Phase, checkpoints: Checkpoints, best: float | None) -> None:
    """A checkpoint of the phase on its way. best: its held-out loss, where that is the lowest so far."""
    checkpoints.save(phase.stage.name, phase.step, phase.tensors(), phase.values() | _known(best))
    if checkpoints.failures >= phase.config.failed_saves:
        raise Failed(
            f"{checkpoints.failures} checkpoints in a row could not be written to {checkpoints.folder} "
            "(config.failed_saves); what was learnt since the last one is lost"
        )


def _known(best: float | None) -> dict[str, float]:
    return {} if best is None else {LOSS: best}


def _give_up(phase: Phase, checkpoints: Checkpoints) -> None:
    """Leave a checkpoint from before the last step, which was skipped as those before it were, and raise NotFinite."""
    step = phase.step
    checkpoints.wait()  # it may be the last good one
    phase.step -= 1  # nothing has changed since but the place in the data
    dumps = Checkpoints(checkpoints.folder.parent / "faults", keep=1, world=phase.world)
    dumps.save(phase.stage.name, phase.step, phase.tensors(), phase.values() | {"config": asdict(phase.config)})
    dumps.wait()
    advice = f"no dump of it could be written to {dumps.folder}"
    if not dumps.failures:
        path = dumps.newest(phase.stage.name)
        advice = f"`granvit train replay {path}` shows where it begins"
    raise NotFinite(
        f"{phase.stage.name} step {step}: {phase.streak.length} steps in a row had a loss or gradient that is not "
        f"finite (config.nonfinite_limit); {advice}"
    )
