"""What is looked at while a stage trains: its loss on test images it never learns from, and a few answered questions.

Nothing of it changes what is learnt: the losses of training are the same bit for bit with it and without.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from granvit.data.batches import PackLoader
from granvit.data.collate import Batch
from granvit.data.loader import GranDataset
from granvit.eval.chat import score_chat
from granvit.eval.evaluation import evaluate
from granvit.eval.names import DURING
from granvit.metrics_log import MetricsLog
from granvit.model import GranViT
from granvit.questions.prompts import TASKS
from granvit.train.console import FIGURES, figures
from granvit.train.counting import order_arguments
from granvit.train.loop import Phase, autocast
from granvit.train.parallel.compiling import eager
from granvit.train.parallel.in_step import compute, in_step
from granvit.train.retention import LOSS
from granvit.train.step import Share

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor

log = logging.getLogger(__name__)

QUESTIONS = 48
"""Questions about regions that are answered each time, at most, and conversations that are scored."""
WINDOW = 64  # images that a held-out sequence's place chooses among: few, so that few row groups are read


def never() -> bool:
    return False


class HeldOut:
    """The evaluations of a stage on its way, every `stage.eval_every` steps, before the first and after the last too.

    A model in pieces (FSDP) stays in them: the ranks go through it in step. splits: of the run (`splits.open_splits`);
    the stage's loss is of "test", that of sft of "chat_test". Without the split there is no loss, nor a best
    checkpoint. test_rows: gives those of the images of "test" that can be asked about, on all ranks at once.
    """

    def __init__(
        self,
        phase: Phase,
        processor: GranViTProcessor,
        splits: Mapping[str, GranDataset],
        test_rows: Callable[[], Sequence[int]],
        metrics: MetricsLog,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.phase, self.processor, self.metrics, self.say = phase, processor, metrics, say
        self.test, self.test_rows, self.chats, self.loader = splits.get("test"), test_rows, None, None
        self.every, self.best = 0, math.inf
        self._done: set[int] = set()
        if not phase.stage.eval_every:
            return
        if phase.stage.name == phase.config.sft.name:
            self.chats = splits.get("chat_test")
        if (data := self.test if phase.stage.name != phase.config.sft.name else self.chats) is not None:
            self.loader = self._open(data)
        if splits.keys() & {"test", "chat_test"}:  # else there is nothing to measure
            self.every = phase.stage.eval_every
        for line in phase.world.first(self._lines):
            self._done.add(line["step"])
            self._better(line["step"], line.get(LOSS))

    @property
    def due(self) -> bool:
        """Whether the phase is at a step that is to be evaluated and is not yet."""
        step, last = self.phase.step, self.phase.stage.steps
        return self.every > 0 and (step % self.every == 0 or step == last) and step not in self._done

    def evaluate(self, stopping: Callable[[], bool] = never) -> float | None:
        """Evaluate, if this is due, and write it down. Returns the loss where it
        is the lowest so far, so that this step's weights are to be kept, else None.

        All ranks call it at the same step. Where `stopping` says so, the same on each, before the end, nothing is
        written, and it is due again when the run goes on from this step.
        """
        phase, step = self.phase, self.phase.step
        if not self.due:
            return None
        if step == phase.stage.steps:  # there is no going on from it
            stopping = never
        began, model = time.perf_counter(), phase.model
        model.eval()
        with torch.no_grad(), autocast(phase.config, phase.device), eager():
            values = compute(phase.root, lambda: self.losses(model, stopping))
            values = None if values is None or stopping() else values | self._answers(model)
        model.train()
        if values is None:
            return None
        self._done.add(step)
        best = self._better(step, values.get(LOSS))
        if phase.world.leads:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line = finite | ({"best": best} if LOSS in values else {})
            seconds = time.perf_counter() - began
            self.metrics.write(stage=phase.stage.name, step=step, evaluation=DURING, **line, seconds=seconds)
            self.say(f"{phase.stage.name} {step}: {_words(values, best)}")
        return values[LOSS] if best else None

    def losses(self, model: GranViT, stopping: Callable[[], bool] = never) -> dict[str, float] | None:
        """{"held_out_loss", "held_out_loss_TASK"}: nats a token of the answers, over all and of each task; {} without
        data, None where it was to stop. All ranks call it, each with its sequences."""
        if self.loader is None:
            return {}
        phase = self.phase
        sums = torch.zeros(2, len(TASKS), dtype=torch.float64)
        self.loader.step = 0
        for batch in self.loader:
            if stopping():
                return None
            for part in batch.split(phase.parts):
                if not part.samples:
                    if phase.pieces:  # the others wait
                        phase.loss_of(model, None, 0, phase.feed.blank, Share.whole(phase.feed.blank))
                    continue
                task, part = _tasks(part), part.to(phase.device)
                answers = phase.loss_of(model, None, 0, part, Share.whole(part))["answers"].double().cpu()
                sums[0].index_add_(0, task, answers)
                sums[1] += task.bincount(minlength=len(TASKS))
        sums = phase.world.sum(sums)
        each = {f"{LOSS}_{task}": (s / n).item() for task, s, n in zip(TASKS, *sums, strict=True) if n}
        return {LOSS: (sums[0].sum() / sums[1].sum()).item()} | each if each else {}

    def _answers(self, model: GranViT) -> dict[str, float]:
        """The metrics of a few questions, those of single sources left out: they would be of one or two. The warm-up
        has none: its model has not seen a picture."""
        phase, world, values = self.phase, self.phase.world, {}
        if self.test is not None and phase.stage.name != phase.config.warmup.name:
            rows = self.test_rows()
            metrics = in_step(phase.root, model, world, lambda world: evaluate(
                model, self.processor, self.test, rows=rows, questions=QUESTIONS, world=world,
            )).metrics  # fmt: skip
            values = {name: value for name, value in metrics.items() if "/" not in name}
        if self.chats is not None:
            capacity = phase.config.data.capacity
            values |= in_step(phase.root, model, world, lambda world: score_chat(
                model, self.processor, self.chats, capacity, limit=QUESTIONS, world=world,
            ))  # fmt: skip
        return values

    def _open(self, data: GranDataset) -> PackLoader | None:
        """About half as many images of `data` as data.eval_images, with questions and in sequences as the stage draws
        them: the same for every seed and any number of ranks."""
        phase, config = self.phase, self.phase.config
        arguments = order_arguments(config, phase.stage) | {"seed": 0, "epochs": 1}
        pixels, world = phase.stage.name != config.warmup.name, phase.world
        try:
            loader = PackLoader(
                data, self.processor, phase.stage.weights, **arguments, rank=world.rank, ranks=world.ranks,
                workers=0, window=WINDOW, pixels=pixels, crops=None,
            )  # fmt: skip
        except ValueError as error:
            log.warning("%s: no held-out loss, and so no best checkpoint: %s", phase.stage.name, error)
            return None
        steps = images = 0
        for packs in zip_longest(*loader.lanes, fillvalue=()):
            if images >= config.data.eval_images / 2:
                break
            steps, images = steps + 1, images + sum(map(len, packs))
        loader.steps = steps
        return loader

    def _lines(self) -> list[dict]:
        lines, stage = self.metrics.evaluations(), self.phase.stage.name
        return [line for line in lines if line["stage"] == stage and line["evaluation"] == DURING]

    def _better(self, step: int, loss: float | None) -> bool:
        """Whether this is the lowest loss so far. Before the first step the model is the stage before's."""
        better = step > 0 and loss is not None and loss < self.best
        self.best = loss if better else self.best
        return better


def _tasks(batch: Batch) -> Tensor:
    """int64 [A]: the number, in TASKS, of the task of each answer token."""
    packed, slots = batch.packed, batch.packed.answer_slots
    place = torch.stack([packed.image_index.flatten()[slots], packed.question_index.flatten()[slots]])
    _, question = place.unique_consecutive(dim=1, return_inverse=True)
    return torch.tensor([TASKS.index(question.task) for asked in batch.asked for question in asked])[question]


def _words(values: Mapping[str, float], best: bool) -> str:
    loss = [f"held-out loss {values[LOSS]:.3f}{' (the lowest so far)' if best else ''}"] if LOSS in values else []
    return ", ".join([*loss, *([figures(values, {})] if FIGURES.keys() & values.keys() else [])])
