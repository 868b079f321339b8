"""One stage on its way: batches in, updated parameters, a log and checkpoints out."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from granvit.data.collate import Batch
from granvit.errors import Failed
from granvit.metrics_log import MetricsLog
from granvit.model import GranViT
from granvit.model.adapter import AdaptedEncoder
from granvit.train.checkpoint import Checkpoints, load
from granvit.train.distill import Teacher, feature_moments, feature_statistics
from granvit.train.feed import Feed, MicroBatch, StepInput
from granvit.train.guard import Gate, NotFinite, Spikes, Streak, Terminated, Termination
from granvit.train.optimizer import freeze, hidden_matrices, make_optimizer
from granvit.train.parallel.compiling import compile_blocks
from granvit.train.parallel.distributed import distribute, synchronise
from granvit.train.parallel.memory import checkpoint_activations
from granvit.train.parallel.sharing import COPIES, Sharing
from granvit.train.pending import Launched, Pending
from granvit.train.presets import TrainConfig
from granvit.train.profiling import STEP, profiled
from granvit.train.retention import LOSS
from granvit.train.stages import Stage
from granvit.train.step import Share
from granvit.train.tensors import frozen_norm, learnt_tensors, model_tensors
from granvit.world import World

if TYPE_CHECKING:
    from granvit.data.batches import PackLoader
    from granvit.train.heldout import HeldOut

log = logging.getLogger(__name__)

LossOf = Callable[[GranViT, "Teacher | None", int, Batch, Share], dict[str, Tensor]]
"""(model, teacher, step, batch, share) -> losses, as `stage_loss` gives them."""


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """The autocast of the run's precision. On meta there is none: parallel.meta.OnGPU stands for it."""
    lower = config.precision == "bfloat16" and device.type != "meta"
    return torch.autocast(device.type, torch.bfloat16) if lower else nullcontext()


class Phase:
    """A stage of a run: model, optimiser, teacher and the place in the data, of which a checkpoint holds what changes.

    The model is trained in place; in pieces it is on meta at first, and filled from `weights` (see `distribute`). root
    is what computes with it. blank: a batch of an image without meaning, that a rank goes through where it has none,
    because the others wait for it. parts: micro-batches that a batch is split into, as many on each rank.
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
        sharing: Sharing = COPIES,
        weights: GranViT | None = None,
    ) -> None:
        self.config, self.stage, self.model, self.loader = config, stage, model, loader
        self.loss_of, self.world, self.device = loss_of, world, device
        self.pieces = sharing.pieces
        freeze(model.groups(), stage.train)
        self.teacher = Teacher(model.encoder, config.distill.alpha, device) if stage.distill > 0 else None
        teacher = self.teacher.encoder if self.teacher else None
        if config.checkpointing:
            checkpoint_activations(model)
        for module in filter(None, (model, teacher)) if config.compile else ():
            compile_blocks(module)
        self.root = distribute(model, teacher, world, sharing, config.dtype, device, self._leaves_out(), weights)
        groups = model.groups()  # anew: FSDP has put pieces in the parameters' places
        self.trained = [p for name in stage.train for p in groups[name]]
        self.optimizer = make_optimizer(groups, stage, hidden_matrices(model))
        self.parts = -(-(stage.packs // world.ranks) // config.micro_packs) if config.micro_packs else 1
        # A mixture has names of its datasets.
        self.feed = Feed(blank, self.parts, getattr(loader.dataset, "names", ()), world, device)
        self.step = 0
        self.spikes, self.streak = Spikes(), Streak(config.nonfinite_limit)
        self.gate = Gate(config.nonfinite_limit, device)
        self.pending = Pending(stage, self.spikes, self.streak, world)

    def _leaves_out(self) -> bool:
        """Whether there are steps that leave out some of what learns: the warm-up has no features to project, an
        encoder has no use for positions where there is no picture, and not for every weight of other families."""
        learns, name = "encoder" in self.stage.train, self.stage.name
        if name == self.config.warmup.name:
            return True
        return learns and (name == self.config.sft.name or isinstance(self.model.encoder, AdaptedEncoder))

    # What a checkpoint holds

    def tensors(self, whole: bool = False) -> dict[str, Tensor]:
        """All tensors of a checkpoint, by name: of what learns, or where `whole` of all. They are the phase's own: to
        write to them is to load."""
        tensors = model_tensors(self.model) if whole else learnt_tensors(self.model)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, state in self.optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
        if self.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.tensors().items()}
        return tensors

    def values(self) -> dict[str, Any]:
        """The rest of a checkpoint: the place in the data, and what is remembered of past losses. All ranks ask for it
        together."""
        from granvit.data.batches import with_all_places  # a step is taken without the package datasets too

        states = self.world.gather(self.loader.state_dict(self.step * self.stage.accumulate))
        place = {"stage": self.stage.name, "step": self.step, "loader": with_all_places(states)}
        return place | {"spikes": self.spikes.state(), "streak": self.streak.length, "frozen": self.frozen}

    @cached_property
    def frozen(self) -> float:
        """`frozen_norm` of the model, which never changes. All ranks ask for it together."""
        return frozen_norm(self.model)

    def resume(self, path: Path, whole: bool = False) -> None:
        """Go on from a checkpoint of this phase, whose model is what the phase began with (where the checkpoint is
        `whole`, any). Raises ValueError where it is damaged, or of other data or arguments."""
        # There may be more in it: before frozen weights were left out, all checkpoints were whole.
        values = load(path, self.tensors(whole), subset=True, world=self.world)
        try:
            self.loader.load_state_dict(values["loader"])
            self.step = values["step"]
            self.streak.restore(values["streak"])
            self.spikes.restore(values["spikes"])
            self.gate.restore(self.streak.length)
            frozen = float(values.get("frozen", self.frozen))  # older checkpoints were whole
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no checkpoint of a stage on its way: {error!r} in its values") from error
        if not whole and not math.isclose(frozen, self.frozen, rel_tol=1e-6):
            raise ValueError(
                f"{path}: what {self.stage.name} does not train is no longer what it began with (norm {frozen:.9g} "
                f"then, {self.frozen:.9g} now); have the files behind --encoder or --llm changed?"
            )

    # Steps

    def batches(self, stop: Callable[[], bool] = lambda: False) -> Iterator[StepInput]:
        """What this rank takes through each step that is left. All ranks call it. stop: whether this one is asked to
        stop."""
        return self.feed.steps(self._loaded(), stop)

    def _loaded(self) -> Iterator[list[Batch]]:
        batches = iter(self.loader)
        for _ in range(self.step, self.stage.steps):
            yield list(islice(batches, self.stage.accumulate))

    @property
    def logs(self) -> bool:
        """Whether the step is one whose numbers are read."""
        return self.step == 1 or self.step % self.config.log_every == 0 or self.step == self.stage.steps

    def take(self, given: StepInput) -> None:
        """Launch one step of the optimiser on what all ranks have, a micro-batch at a time. Nothing waits for the
        device; a step whose loss or gradient is not finite changes nothing there."""
        self.step += 1
        counts = given.counts
        line = {"step": self.step, "regions": counts["asked"]}
        line |= {name: number for name, number in counts.items() if name not in ("targets", "regions", "asked")}
        if not counts["targets"]:
            self.pending.add(Launched(line))
            return
        # What a model draws at random is a function of the step: there is no generator's state to be kept.
        seed = f"{self.config.seed} {self.stage.name} {self.step} {self.world.rank}"
        torch.manual_seed(zlib.crc32(seed.encode()))
        self.optimizer.zero_grad(set_to_none=True)
        learnt = []
        for number, part in enumerate(given.parts):
            synchronise(self.root, number == len(given.parts) - 1)
            learnt.append(self._learn(part, Share(counts["targets"], counts["regions"], weight=float(bool(part.ids)))))
        numbers = self._update(learnt)
        parts = tuple(replace(part, batch=None) for part in given.parts)
        finite = tuple(losses["answers"].isfinite() for losses in learnt)
        self.pending.add(Launched(line | {"rate": self.stage.rate(self.step)}, numbers, parts, finite))

    def read(self) -> list[dict[str, Any]]:
        """The lines of the steps since the last reading, for the log; waits for the device. All ranks call it at the
        same step. A line is without "loss" where no image could be read, with "skipped" where loss or gradient was not
        finite. Where the streak is over, the phase is then at its last step: nothing was learnt since."""
        lines = self.pending.read()
        if self.streak.over:
            self.step = lines[-1]["step"] if lines else self.step
        return lines

    def losses(self, step: int, batch: Batch, share: Share) -> dict[str, Tensor]:
        return self.loss_of(self.model, self.teacher, step, batch, share)

    def _learn(self, part: MicroBatch, share: Share) -> dict[str, Tensor]:
        """Add the gradients of a micro-batch to those that are there. Returns its losses, and on the first rank's log
        steps what `feature_statistics` takes of its features as "seen"; a function, so that nothing else of it is kept.
        """
        with autocast(self.config, self.device):
            losses = self.root(self.losses, self.step, part.batch, share)
        # The ranks' gradients are averaged, but their losses are parts of a sum. NaN where the loss is not finite,
        # which a gradient can be all the same: so every rank gets to know.
        loss = losses["loss"]
        loss.backward(loss.detach() * 0 + self.world.ranks)
        features = losses.pop("features", ())
        if self.logs and self.world.leads and share.weight and len(features):
            losses["seen"] = feature_moments(features)
        return {name: value.detach() for name, value in losses.items()}

    def _update(self, learnt: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One step of the optimiser, if the gradient is finite. Returns what is to be read of it."""
        rate = self.stage.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate
        norm = nn.utils.clip_grad_norm_(self.trained, self.stage.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        taken = self.gate.admit(norm)
        numbers = {"taken": taken}
        for name in ("loss_caption", "loss_distill"):
            parts = [losses[name].double() for losses in learnt if name in losses]
            numbers[name] = sum(parts, start=torch.zeros((), dtype=torch.float64, device=self.device))
        numbers["grad_norm"] = norm
        with record_function("granvit.optimizer"):
            self.optimizer.found_inf = (~taken).float()
            self.optimizer.step()
            if self.teacher is not None:
                self.teacher.update(self.model.encoder, taken)
                if "moments" in learnt[0]:
                    moments = self.world.sum_on_device(sum(losses["moments"] for losses in learnt))
                    self.teacher.statistics.update(moments, taken)
        seen = [losses["seen"] for losses in learnt if "seen" in losses]
        if seen:  # conversations without a picture have no features
            numbers |= {f"features_{name}": value for name, value in feature_statistics(sum(seen)).items()}
        return numbers


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
    began, note = time.perf_counter(), ""

    def stopping() -> bool:
        return any(world.total(termination.asked))

    def write() -> None:
        """Write down the steps since the last time. Their numbers are read at once, and they share the time that they
        took: a device's steps have no other that the host knows."""
        nonlocal began, note
        lines = phase.read()
        seconds = (time.perf_counter() - began) / max(1, len(lines))
        for line in lines:
            note = f"loss {line['loss']:.3f}" if "loss" in line else "skipped"
            if "skipped" not in line and "loss" not in line:
                log.log(level, "%s step %d: no readable image among its rows, skipped", stage.name, line["step"])
            elif world.leads:
                metrics.write(stage=stage.name, **line, seconds=seconds)
        if phase.streak.over:
            _give_up(phase, checkpoints)
        began = time.perf_counter()

    with termination.awaited():
        if (best := held_out.evaluate(stopping)) is not None:  # of the step it goes on from, where a stop prevented it
            _save(phase, checkpoints, best)
        began, saved = time.perf_counter(), phase.step
        for number, given in enumerate(phase.batches(lambda: termination.asked), start=1):
            if given.stop:
                write()
                if saved != phase.step:
                    _save(phase, checkpoints, None)
                checkpoints.wait()
                if checkpoints.failures:
                    raise Failed(
                        f"{stage.name}: stopped after step {phase.step}, which could not be saved; the same command "
                        "goes on from the checkpoint before it"
                    )
                log.log(level, "%s: stopped after step %d; the same command goes on", stage.name, phase.step)
                raise Terminated(termination.code)
            with nullcontext() if number != profiled_step else profiled(folder / "profile" / stage.name, phase.device):
                phase.take(given)
            saves = phase.step % config.checkpoint_every == 0
            reads = phase.logs or saves or held_out.due
            if reads:
                write()
            stepped(phase.step, given.counts["images"], note)
            if reads:
                best = held_out.evaluate(stopping)
                if phase.step < stage.steps and (saves or best is not None):
                    _save(phase, checkpoints, best)
                    saved = phase.step
                began = time.perf_counter()
        tensors, values = model_tensors(phase.model), {"step": phase.step}
        if not stage.cooldown:  # it may be given more steps
            tensors, values = phase.tensors(whole=True), phase.values()
        checkpoints.save(stage.name, phase.step, tensors, values | _known(best), final=True)
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
    values = phase.values() | {"config": asdict(phase.config)}
    dumps.save(phase.stage.name, phase.step, phase.tensors(whole=True), values)
    dumps.wait()
    advice = f"no dump of it could be written to {dumps.folder}"
    if not dumps.failures:
        path = dumps.newest(phase.stage.name)
        advice = f"`granvit train replay {path}` shows where it begins"
    raise NotFinite(
        f"{phase.stage.name} step {step}: {phase.streak.length} steps in a row had a loss or gradient that is not "
        f"finite (config.nonfinite_limit); {advice}"
    )
