"""What a training step takes, put together out of samples and their questions. No dataset has to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from granvit.data.crops import ASKED, Crop, Crops
from granvit.questions.packing import PackedBatch, Part, pack_parts, write_parts
from granvit.questions.prompts import Question
from granvit.questions.schema import Sample
from granvit.questions.segments import find_segments

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor


@dataclass(frozen=True)
class Batch:
    """What a training step takes: samples, what is asked of each, and both packed. regions [R, 4] are relative xyxy
    float32, region_image [R] int64 their images.

    crop_regions: int64 [N], which of them a teacher looks at (`Crops`). Of each, on the host, as pack_patches takes it:
    crops, float64 [N, 5], its image and its box in pixels; crop_grids, int32 [N, 2], rows and columns of its patches.
    """

    samples: list[Sample]
    asked: list[list[Question]]
    packed: PackedBatch
    regions: Tensor
    region_image: Tensor
    crop_regions: Tensor
    crops: Tensor
    crop_grids: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch with what goes to a device in pinned memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        names = ("packed", "regions", "region_image", "crop_regions")
        return replace(self, **{name: change(getattr(self, name)) for name in names})

    def split(self, parts: int) -> list[Batch]:
        """The sequences, in their order, in so many batches of as many as can be alike: some have none where there are
        fewer sequences than parts. For a batch on the host."""
        rows = len(self.packed.input_ids)
        ends = [rows * part // parts for part in range(parts + 1)]
        return [self] if parts == 1 else [self._rows(*pair) for pair in pairwise(ends)]

    def _rows(self, first: int, end: int) -> Batch:
        packed, length = self.packed, self.packed.input_ids.shape[1]
        held = packed.image_index[first:end]
        width = max([min(end - first, 1), *(held >= 0).sum(1).tolist()])
        here, held = (slice(first, end), slice(width)), held[:, :width]
        kept = held[held >= 0].unique()
        place = torch.full((len(self.samples) + 1,), -1)  # of each sample among those kept; the last is padding's, -1
        place[kept] = torch.arange(len(kept))
        image_index, question_index = place[held], packed.question_index[here]

        def inside(slots: Tensor) -> Tensor:
            return (slots >= first * length) & (slots < end * length)

        def moved(slots: Tensor) -> Tensor:
            slots = slots[inside(slots)] - first * length
            return slots - slots // max(1, length) * (length - width)

        samples, asked = ([column[i] for i in kept.tolist()] for column in (self.samples, self.asked))
        boxes, regions = (place[owner] >= 0 for owner in (packed.box_image_index, self.region_image))
        looked_at = regions[self.crop_regions]
        crops = self.crops[looked_at]
        crops[:, 0] = place[crops[:, 0].long()].double()
        return Batch(
            samples,
            asked,
            PackedBatch(
                # Samples without an image come last, so images are numbered as their samples are.
                images=[packed.images[i] for i in kept.tolist() if i < len(packed.images)],
                input_ids=packed.input_ids[here],
                position_ids=packed.position_ids[here],
                labels=packed.labels[here],
                image_index=image_index,
                question_index=question_index,
                boxes=packed.boxes[boxes],
                box_image_index=place[packed.box_image_index[boxes]],
                image_slots=moved(packed.image_slots),
                region_slots=moved(packed.region_slots),
                answer_slots=moved(packed.answer_slots),
                targets=packed.targets[inside(packed.answer_slots)],
                segments=find_segments(image_index.numpy(), question_index.numpy()),
                regions=sum(question.region is not None for questions in asked for question in questions),
            ),
            self.regions[regions],
            place[self.region_image[regions]],
            (regions.cumsum(0) - 1)[self.crop_regions[looked_at]],
            crops,
            self.crop_grids[looked_at],
        )


@dataclass
class Read:
    """Sequences on their way to a batch: plan has for each the places of its images in samples, asked and parts; None:
    they are still to be planned."""

    plan: list[list[int]] | None
    samples: list[Sample]
    asked: list[list[Question]]
    parts: list[Part]


def collate(
    samples: list[Sample],
    asked: list[list[Question]],
    processor: GranViTProcessor,
    capacity: int,
    crops: Crops | None = ASKED,
) -> Batch:
    """Pack samples and their questions into sequences of at most `capacity` tokens (see `pack_questions`). crops: which
    regions a teacher looks at; None: there is no teacher."""
    return join([Read(None, samples, asked, write_parts(samples, asked, processor))], processor, capacity, crops)


def join(reads: Sequence[Read], processor: GranViTProcessor, capacity: int, crops: Crops | None = ASKED) -> Batch:
    """The batch of what was read, sequences of the reads in turn.

    Images of one shape become neighbours, because the encoder attends to each run of equal grids in one call. Samples
    without an image come last, so that images are numbered as their samples are.
    """
    samples = [sample for read in reads for sample in read.samples]
    asked = [questions for read in reads for questions in read.asked]
    parts = [part for read in reads for part in read.parts]
    shapes = [sample.image.shape for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: shapes[i][0] / shapes[i][1] if shapes[i][1] else float("inf"))
    place = np.argsort(order)
    firsts = np.cumsum([0, *(len(read.samples) for read in reads)])
    plans = [
        [[int(place[first + i]) for i in row] for row in read.plan]
        for read, first in zip(reads, firsts, strict=False)
        if read.plan is not None
    ]
    plan = [row for several in zip_longest(*plans) for row in several if row is not None] if plans else None
    samples, asked, parts = ([column[i] for i in order] for column in (samples, asked, parts))
    packed = pack_parts(samples, asked, parts, processor, capacity, plan)
    boxes = [region.box for sample in samples for region in sample.regions]
    owner = [i for i, sample in enumerate(samples) for _ in sample.regions]
    sequences = [row[row >= 0].unique_consecutive().tolist() for row in packed.image_index]
    chosen = [] if crops is None else crops.choose(samples, asked, sequences, processor)
    first = np.cumsum([0, *(len(sample.regions) for sample in samples)])
    return Batch(
        samples,
        asked,
        packed,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(owner, dtype=torch.int64),
        torch.tensor([first[crop.image] + crop.region for crop in chosen], dtype=torch.int64),
        torch.tensor([_pixels(samples[crop.image], crop) for crop in chosen], dtype=torch.float64).reshape(-1, 5),
        torch.tensor([crop.grid for crop in chosen], dtype=torch.int32).reshape(-1, 2),
    )


def _pixels(sample: Sample, crop: Crop) -> tuple[float, ...]:
    """A region's crop as pack_patches takes it."""
    height, width = sample.image.shape[:2]
    x1, y1, x2, y2 = sample.regions[crop.region].box
    return float(crop.image), x1 * width, y1 * height, min(x2 * width, width), min(y2 * height, height)
