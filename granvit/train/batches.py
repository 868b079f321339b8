"""From a dataset to the batch of a step. The batch is a pure function of (seed, stage, step), so that a run that was
interrupted goes on with the pictures that it would have seen."""

from __future__ import annotations

import logging
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from granvit.data.batches import Batch, collate
from granvit.data.prompts import BBOX2CAPTION, GLOBAL_CAPTION, Question
from granvit.data.schema import Sample
from granvit.train.presets import Data
from granvit.train.stages import Stage

log = logging.getLogger(__name__)


class Order:
    """Which rows a step takes: one seeded permutation of `length` rows after the other, cut into batches."""

    def __init__(self, length: int, stage: Stage, seed: int) -> None:
        self.length, self.size = length, stage.batch_images
        self._name = f"{seed} {stage.name}"
        self._epochs: dict[int, list[int]] = {}

    def rows(self, step: int) -> list[int]:
        """Row numbers of `step`, counted from 1."""
        first = (step - 1) * self.size
        return [self._epoch(p // self.length)[p % self.length] for p in range(first, first + self.size)]

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of its own for every (seed, stage, purpose). Torch's takes 32 bits of a seed; hence the hash."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self._name} {purpose}".encode()))

    def _epoch(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            if len(self._epochs) > 2:
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = torch.randperm(self.length, generator=self.generator(f"epoch {epoch}")).tolist()
        return self._epochs[epoch]


def choose_questions(
    sample: Sample, stage: Stage, processor, capacity: int, most: int, generator: torch.Generator
) -> list[Question]:
    """At most `most` of the stage's questions about a sample, in random order, that fit a sequence with its image."""
    shares = {GLOBAL_CAPTION: stage.global_captions, BBOX2CAPTION: stage.box_captions}
    tasks = [
        task for task in stage.tasks if shares.get(task, 1) >= 1 or torch.rand((), generator=generator) < shares[task]
    ]
    found = processor.questions(sample, tasks)
    found = [found[i] for i in torch.randperm(len(found), generator=generator)[:most].tolist()]
    lengths = [
        len(prompt) + len(answer)
        for prompt, answer in zip(
            processor.prompt_ids([q.prompt for q in found]),
            processor.answer_ids([q.answer for q in found]),
            strict=True,
        )
    ]
    room = capacity - len(processor.image_part(processor.image_tokens(*sample.image.shape[:2])))
    while found and sum(lengths) > room:
        if len(found) == 1:
            log.warning("%s: a question of %d tokens leaves its image no place in %d", sample.id, *lengths, capacity)
        found.pop()
        lengths.pop()
    return found


def batches(
    read: Callable[[int], Sample | None],
    length: int,
    stage: Stage,
    seed: int,
    processor,
    data: Data,
    start: int,
) -> Iterator[tuple[int, Batch | None]]:
    """(step, batch) from `start` to the stage's last step, read ahead by data.workers threads.

    A row that `read` refuses leaves its place empty; a step without any good row gives None.
    """
    order = Order(length, stage, seed)

    def make(step: int) -> Batch | None:
        samples = [sample for sample in map(read, order.rows(step)) if sample is not None]
        generator = order.generator(f"questions of step {step}")
        asked = [
            choose_questions(sample, stage, processor, data.capacity, data.questions_per_image, generator)
            for sample in samples
        ]
        pairs = [(sample, found) for sample, found in zip(samples, asked, strict=True) if found]
        if not pairs:
            return None
        return collate(*map(list, zip(*pairs, strict=True)), processor, data.capacity)

    with ThreadPoolExecutor(max(1, data.workers)) as pool:
        ahead: deque = deque()
        for step in range(start, stage.steps + 1):
            while len(ahead) < max(1, data.workers) * 2 and step + len(ahead) <= stage.steps:
                ahead.append(pool.submit(make, step + len(ahead)))
            yield step, ahead.popleft().result()
