"""Which regions the teacher of self-distillation looks at, and how closely."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

from granvit.questions.prompts import Question
from granvit.questions.schema import Sample

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor


class Crop(NamedTuple):
    """A region that a teacher looks at: numbers of the image and of its region, and the crop's grid of patches (rows,
    columns)."""

    image: int
    region: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Crops:
    """Those regions of a packed sequence that its questions ask about; with `per_image` so many of each image instead,
    drawn anew whenever its questions are.

    tokens: patches of a region's crop, at most, but where the student sees the region finer (see `grid`). capacity:
    patches of all crops of a sequence, at most (None: no bound). The sequence's images share it evenly, as a page of
    text could fill it alone. ocr: False leaves regions of text out.
    """

    tokens: int = 256
    capacity: int | None = None
    per_image: int | None = None
    ocr: bool = True

    def choose(
        self,
        samples: Sequence[Sample],
        asked: Sequence[Sequence[Question]],
        sequences: Sequence[Sequence[int]],
        processor: GranViTProcessor,
    ) -> list[Crop]:
        """The crops, those of equal grids together, as an encoder attends to each run of them in one call.

        asked: the questions of each sample, in the order drawn. sequences: the images in each, numbers of samples.
        Of the images only the sizes are looked at.
        """
        chosen: list[Crop] = []
        for images in sequences:
            room = self.capacity
            wanted = [self.wanted(samples[i], asked[i]) for i in images]
            for image, region in _by_turns(images, wanted):
                crop = Crop(image, region, self.grid(samples[image], region, processor))
                if room is not None:
                    room -= crop.patches
                    if room < 0:
                        break
                chosen.append(crop)
        return sorted(chosen, key=lambda crop: (crop.grid, crop))

    def grid(self, sample: Sample, region: int, processor: GranViTProcessor) -> tuple[int, int]:
        """Rows and columns of a region's crop: `fit_grid`'s of its pixels in `tokens` patches, so that it keeps the
        box's aspect ratio, but along neither side fewer than the cells of the student's grid that the box spans."""
        from granvit.model.config import cached_fit_grid  # seconds to import, and presets need none of it

        patch, (height, width) = processor.patch_size, sample.image.shape[:2]
        x1, y1, x2, y2 = sample.regions[region].box
        pixels = (max(1, round((y2 - y1) * height)), max(1, round((x2 - x1) * width)))
        rows, columns = cached_fit_grid(*pixels, patch, self.tokens)
        seen_rows, seen_columns = cached_fit_grid(height, width, patch, processor.max_image_tokens)
        return max(rows, ceil((y2 - y1) * seen_rows)), max(columns, ceil((x2 - x1) * seen_columns))

    def wanted(self, sample: Sample, asked: Sequence[Question]) -> list[int]:
        """Numbers of the sample's regions, first those that are wanted most."""
        numbers = list(dict.fromkeys(question.region for question in asked if question.region is not None))
        if self.per_image is not None:
            numbers = list(range(len(sample.regions)))
            random.Random(f"{sample.id} {[(question.task, question.region) for question in asked]}").shuffle(numbers)
        numbers = [n for n in numbers if self.ocr or sample.regions[n].kind != "ocr"]
        return numbers[: self.per_image]


def _by_turns(images: Sequence[int], wanted: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(image, region): the first region of each image, the second of each, and so on."""
    return [
        (image, region)
        for turn in zip_longest(*wanted)
        for image, region in zip(images, turn, strict=True)
        if region is not None
    ]


ASKED = Crops()
"""All regions that are asked about."""
