"""By how much a photograph can be decoded smaller without student or teacher seeing less."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from granvit.data.crops import Crops
from granvit.questions.prompts import Question
from granvit.questions.schema import Sample

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor

SPARE = 3
"""Pixels along each side that a decoded picture keeps for every pixel of the patches made from it. A decoder averages
pixels in its own way: with three left the patches differ by about the rounding to 8 bits, with one by the sharpness of
edges (bench/results/loader-memory.json)."""


def divisor(
    sample: Sample, questions: Callable[[], Sequence[Question]], crops: Crops | None, processor: GranViTProcessor
) -> int:
    """By how much the picture can be decoded smaller along each side: 8, 4, 2 or 1 (whole). The whole picture and each
    crop that a teacher may look at keep their grids, and SPARE pixels for each pixel of a grid.

    sample: its image is a blank of the picture's size. questions: returns what is asked of the sample; called only
    where the answer depends on it.
    """
    from granvit.model.config import cached_fit_grid  # seconds to import, and datasets need none of it

    patch, (height, width) = processor.patch_size, sample.image.shape[:2]

    def grids(sample: Sample, regions: Sequence[int]) -> list[tuple[int, int]]:
        whole = cached_fit_grid(*sample.image.shape[:2], patch, processor.max_image_tokens)
        return [whole, *(crops.grid(sample, region, processor) for region in regions)]

    def most(sizes: Sequence[tuple[float, float]], grids: Sequence[tuple[int, int]]) -> float:
        pairs = zip(sizes, grids, strict=True)
        return min(min(h / rows, w / columns) for (h, w), (rows, columns) in pairs) / (SPARE * patch)

    sizes, regions = [(float(height), float(width))], []
    if most(sizes, grids(sample, regions)) < 2:
        return 1
    if crops is not None:
        regions = crops.wanted(sample, questions())
        boxes = [sample.regions[region].box for region in regions]
        sizes += [((y2 - y1) * height, (x2 - x1) * width) for x1, y1, x2, y2 in boxes]
    kept = grids(sample, regions)
    for number in (8, 4, 2):
        if number <= most(sizes, kept) and height % number == width % number == 0:
            smaller = replace(sample, image=sample.image[: height // number, : width // number])
            if grids(smaller, regions) == kept:
                return number
    return 1
