"""What a rank takes through the steps of a stage: on its device, a step ahead, with the counts of all ranks.

On a GPU a thread reads, pins and copies the next step's batches while this one's kernels run. The copies go into the
stream that computes: they take it some milliseconds a step, and in return memory is used again in order, however far
ahead the host is. Counts are exchanged on the host, once a step, while the GPU still works on the step before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from granvit.data.collate import Batch
from granvit.world import World

IMAGES_OF = "images {}"
"""Under which name a line of metrics.jsonl has a dataset's images, where several are mixed."""

T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """A part of a batch, on the rank's device.

    ids: of its images; none where the batch is a blank, which a rank goes through because others wait for it.
    answer_image: int32 [A] on the host, the number among `ids` of each answer token's image. counts: as `StepInput`'s.
    """

    batch: Batch
    ids: list[str]
    answer_image: Tensor
    counts: tuple[int, ...]

    def non_finite(self, finite: Tensor) -> list[str]:
        """Ids of the images with an answer token whose loss is not finite; finite: bool [A]."""
        return [self.ids[i] for i in self.answer_image[~finite.cpu()].unique().tolist()]


@dataclass(frozen=True)
class StepInput:
    """What a rank takes through a step. counts: of all ranks' batches, by name: targets (answer tokens), regions
    (distilled), asked (regions), images, tokens, and the images of each dataset of a mixture. stop: whether a rank is
    asked to stop before this step."""

    parts: list[MicroBatch]
    counts: dict[str, int]
    stop: bool = False


class Feed:
    """Makes the input of a stage's steps out of batches on the host.

    blank: a batch of an image without meaning, for a rank that has no image where others have. parts: micro-batches
    that a batch is split into, as many on each rank. datasets: the names of those of a mixture.
    """

    def __init__(self, blank: Batch, parts: int, datasets: Sequence[str], world: World, device: torch.device) -> None:
        self.parts, self.datasets, self.world, self.device = parts, datasets, world, device
        self.blank = blank.to(device)
        self.names = ("targets", "regions", "asked", "images", "tokens", *map(IMAGES_OF.format, datasets))
        self._copied = torch.cuda.Event(blocking=True) if device.type == "cuda" else None

    def step(self, batches: Sequence[Batch], stop: bool = False) -> StepInput:
        """The input of the step that has these batches on this rank. All ranks call it at once."""
        return self._agreed(self._moved(batches), stop)

    def steps(self, batches: Iterator[Sequence[Batch]], stop: Callable[[], bool]) -> Iterator[StepInput]:
        """The input of each step. All ranks call it. stop: whether this one is asked to stop."""
        moved = map(self._moved, batches)
        for parts in moved if self._copied is None else read_ahead(moved):
            yield self._agreed(parts, stop())

    def _moved(self, batches: Sequence[Batch]) -> list[MicroBatch]:
        parts = [part for batch in batches for part in batch.split(self.parts)]
        if self._copied is None:
            return [self._micro_batch(part, part.to(self.device)) for part in parts]
        # Until the GPU has come to the step before: pinned memory is taken for two steps, not for all launched ones.
        self._copied.synchronize()
        with torch.cuda.device(self.device):  # a thread begins with GPU 0, and would pin by it
            moved = [self._micro_batch(part, part.pin_memory().to(self.device, True)) for part in parts]
            self._copied.record()
        return moved

    def _micro_batch(self, host: Batch, moved: Batch) -> MicroBatch:
        packed = host.packed
        tokens = int((packed.image_index >= 0).sum())
        of = Counter(sample.dataset for sample in host.samples) if self.datasets else {}
        counts = len(packed.targets), len(host.crops), packed.regions, len(host.samples), tokens
        return MicroBatch(
            moved,
            [sample.id for sample in host.samples],
            packed.image_index.flatten()[packed.answer_slots].int(),
            (*counts, *(of[name] for name in self.datasets)),
        )

    def _agreed(self, parts: list[MicroBatch], stop: bool) -> StepInput:
        numbers = (number for part in parts for number in part.counts)
        *totals, stops = map(int, self.world.total(*numbers, stop))
        counts = {name: sum(totals[i :: len(self.names)]) for i, name in enumerate(self.names)}
        images = totals[self.names.index("images") :: len(self.names)]  # no rank goes through what all have none of
        parts = [
            part if part.ids else replace(part, batch=self.blank)
            for part, number in zip(parts, images, strict=True)
            if number
        ]
        return StepInput(parts, counts, stops > 0)


def read_ahead(source: Iterator[T]) -> Iterator[T]:
    """The items of `source`, none of which is None; a thread waits for the next one while an item is used."""
    with ThreadPoolExecutor(1, "read ahead") as pool:
        item = next(source, None)  # here: processes that read are started by the thread that ends them
        while item is not None:
            coming = pool.submit(next, source, None)
            yield item
            item = coming.result()
