"""Which regions the teacher of self-distillation looks at."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from granvit.questions.prompts import Question
from granvit.questions.schema import Sample


@dataclass(frozen=True)
class Crops:
    """Those regions of a packed sequence that its questions ask about; with `per_image` so many of each image instead,
    drawn anew whenever its questions are.

    tokens: patches of a region's crop. capacity: patches of all crops of a sequence, at most (None: no bound). The
    sequence's images share it evenly, as a page of text could fill it alone. ocr: False leaves regions of text out.
    """

    tokens: int = 1
    capacity: int | None = None
    per_image: int | None = None
    ocr: bool = True

    def choose(
        self, samples: Sequence[Sample], asked: Sequence[Sequence[Question]], sequences: Sequence[Sequence[int]]
    ) -> list[tuple[int, int]]:
        """(image, region) of each crop, in order. asked: the questions of each sample, in the order drawn. sequences:
        the images in each, numbers of samples."""
        chosen: list[tuple[int, int]] = []
        for images in sequences:
            wanted = [self._wanted(samples[i], asked[i]) for i in images]
            turns = [
                (image, number)
                for turn in zip_longest(*wanted)
                for image, number in zip(images, turn, strict=True)
                if number is not None
            ]
            chosen += turns if self.capacity is None else turns[: self.capacity // self.tokens]
        return sorted(chosen)

    def _wanted(self, sample: Sample, asked: Sequence[Question]) -> list[int]:
        """Numbers of the sample's regions, first those that are wanted most."""
        numbers = list(dict.fromkeys(question.region for question in asked if question.region is not None))
        if self.per_image is not None:
            numbers = list(range(len(sample.regions)))
            random.Random(f"{sample.id} {[(question.task, question.region) for question in asked]}").shuffle(numbers)
        numbers = [n for n in numbers if self.ocr or sample.regions[n].kind != "ocr"]
        return numbers[: self.per_image]


ASKED = Crops()
"""All regions that are asked about."""
