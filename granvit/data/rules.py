"""Rules for what is worth training on: each says which of its pictures or regions stay, under a `Filter`'s limits.

Text regions (kind ocr) are exempt from the rules on aspect and area: a line of text is long and thin by nature, and
one of 20 px height would need 500 px of width, so the two would leave headlines alone. Whether text can be read is a
matter of its height: `text_side`. Nor do the rules on repeated captions and on words look at text: "EXIT" is read and
not described, however often it stands on a door.
"""

from __future__ import annotations

import math
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from granvit.data.measures import box_iou, normalised, words
from granvit.questions.schema import Region

if TYPE_CHECKING:
    from granvit.data.filters import Filter

# Rules on pictures: of their width and height in pixels.


def long_enough(limits: Filter, width: int, height: int) -> bool:
    """Short side above `short_side`."""
    return min(width, height) > limits.short_side


def square_enough(limits: Filter, width: int, height: int) -> bool:
    """Aspect in [1 / image_aspect, image_aspect]."""
    return max(width, height) <= limits.image_aspect * min(width, height)


# Rules on regions: of one region, and the picture's width and height in pixels.


def box_square_enough(limits: Filter, region: Region, width: int, height: int) -> bool:
    """Aspect in [1 / box_aspect, box_aspect]; text is exempt."""
    short, long = sorted(_sides(region, width, height))
    return _exempt(limits, region) or long <= limits.box_aspect * short * (1 + 1e-6)  # boxes are stored as float32


def box_large_enough(limits: Filter, region: Region, width: int, height: int) -> bool:
    """Area above `box_area`; text is exempt."""
    return _exempt(limits, region) or math.prod(_sides(region, width, height)) > limits.box_area


def text_tall_enough(limits: Filter, region: Region, width: int, height: int) -> bool:
    """Short side of a text's box above `text_side`: of upright text its height, of vertical text its width."""
    return region.kind != "ocr" or min(_sides(region, width, height)) > limits.text_side


def region_in_script(limits: Filter, region: Region, width: int, height: int) -> bool:
    """The caption is `in_script`. Text too: what a recogniser makes up shows in its script."""
    return in_script(limits, region.caption)


def in_script(limits: Filter, text: str) -> bool:
    """At least `script_share` of the letters belong to `scripts`; what has none ("12:30", emoji) passes."""
    if not limits.scripts:
        return True
    letters = Counter(script(letter) for letter in text if letter.isalpha())
    return sum(letters[name] for name in limits.scripts) >= limits.script_share * letters.total()


def word_count_fits(limits: Filter, region: Region, width: int, height: int) -> bool:
    """min_words to max_words words; text is exempt."""
    if region.kind == "ocr" or not (limits.min_words or limits.max_words is not None):
        return True
    return (
        limits.min_words
        <= len(words(region.caption))
        <= (limits.max_words if limits.max_words is not None else math.inf)
    )


def short_enough(limits: Filter, region: Region, width: int, height: int) -> bool:
    """At most `max_characters` characters."""
    return limits.max_characters is None or len(region.caption) <= limits.max_characters


# Rules on a picture's regions together: what they keep, in order.


def drop_same_boxes(limits: Filter, regions: list[Region]) -> list[Region]:
    """Greedy, best score first: a box goes where it overlaps one of its kind that stays by more than `same_box`. Text
    and thing are two regions, were their boxes equal."""
    if limits.same_box >= 1 or len(regions) < 2:
        return regions
    boxes = np.array([region.box for region in regions])
    same_kind = np.array([[first.kind == second.kind for second in regions] for first in regions])
    near = (box_iou(boxes[:, None], boxes) > limits.same_box) & same_kind
    kept: list[int] = []
    for index in _best_first(regions):
        if not near[index, kept].any():
            kept.append(index)
    return [regions[index] for index in sorted(kept)]


def drop_repeated_captions(limits: Filter, regions: list[Region]) -> list[Region]:
    """At most `repeats_in_image` regions with one caption, best scores first; text is exempt."""
    if limits.repeats_in_image is None:
        return regions
    counts: Counter[str] = Counter()
    kept = []
    for index in _best_first(regions):
        if regions[index].kind != "ocr":
            text = normalised(regions[index].caption)
            counts[text] += 1
            if counts[text] > limits.repeats_in_image:
                continue
        kept.append(index)
    return [regions[index] for index in sorted(kept)]


@lru_cache(maxsize=65536)
def script(letter: str) -> str:
    """The script of a letter: the first word of its Unicode name."""
    return unicodedata.name(letter, "").partition(" ")[0]


@lru_cache(maxsize=1)
def known_scripts() -> frozenset[str]:
    """The scripts of all letters."""
    return frozenset(script(letter) for letter in map(chr, range(sys.maxunicode + 1)) if letter.isalpha())


def _exempt(limits: Filter, region: Region) -> bool:
    return region.kind == "ocr" and not limits.ocr_boxes


def _sides(region: Region, width: int, height: int) -> tuple[float, float]:
    """Width and height of a box in pixels."""
    x1, y1, x2, y2 = region.box
    return (x2 - x1) * width, (y2 - y1) * height


def _best_first(regions: list[Region]) -> list[int]:
    """Places by score, highest first; those without one come last, in their order."""
    return sorted(
        range(len(regions)), key=lambda i: -math.inf if regions[i].score is None else regions[i].score, reverse=True
    )


IMAGE_RULES: dict[str, Callable[[Filter, int, int], bool]] = {
    "short side": long_enough,
    "aspect": square_enough,
}
REGION_RULES: dict[str, Callable[[Filter, Region, int, int], bool]] = {
    "aspect": box_square_enough,
    "area": box_large_enough,
    "text side": text_tall_enough,
    "characters": short_enough,
    "words": word_count_fits,
    "script": region_in_script,
}
CHOICES: dict[str, Callable[[Filter, list[Region]], list[Region]]] = {
    "same box": drop_same_boxes,
    "repeated in image": drop_repeated_captions,
}
