"""Wrong captions planted on purpose, to see whether they are found."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from granvit.questions.schema import Region, Sample

Pool = dict[str, list[tuple[str, str]]]


def other_image(region: Region, sample: Sample, pool: Pool, draw: random.Random) -> Region | None:
    """The caption of a region of another image, of the same kind."""
    captions = [caption for name, caption in draw.sample(pool[region.kind], min(20, len(pool[region.kind])))
                if name != sample.id and caption != region.caption]  # fmt: skip
    return replace(region, caption=captions[0]) if captions else None


def same_image(region: Region, sample: Sample, pool: Pool, draw: random.Random) -> Region | None:
    """The caption of another region of the same image, of the same kind."""
    captions = [r.caption for r in sample.regions if r.kind == region.kind and r.caption != region.caption]
    return replace(region, caption=draw.choice(captions)) if captions else None


def one_word(region: Region, sample: Sample, pool: Pool, draw: random.Random) -> Region | None:
    """One word of the caption replaced by the word in its place in another image's caption."""
    words = region.caption.split()
    for name, caption in draw.sample(pool[region.kind], min(20, len(pool[region.kind]))):
        other_words = caption.split()
        places = [i for i in range(min(len(words), len(other_words))) if words[i].lower() != other_words[i].lower()]
        if name != sample.id and places:
            place = draw.choice(places)
            return replace(region, caption=" ".join([*words[:place], other_words[place], *words[place + 1 :]]))
    return None


def moved_box(region: Region, sample: Sample, pool: Pool, draw: random.Random) -> Region | None:
    """The box, of the same size, in another place, where it does not meet the old one; the caption stays."""
    x1, y1, x2, y2 = region.box
    width, height = x2 - x1, y2 - y1
    for _ in range(50):
        x, y = draw.uniform(0, 1 - width), draw.uniform(0, 1 - height)
        if x > x2 or x + width < x1 or y > y2 or y + height < y1:
            return replace(region, box=(x, y, min(x + width, 1.0), min(y + height, 1.0)))
    return None


VARIANTS: dict[str, Callable[[Region, Sample, Pool, random.Random], Region | None]] = {
    "other_image": other_image,
    "same_image": same_image,
    "one_word": one_word,
    "moved_box": moved_box,
}


def plant(
    samples: Sequence[Sample], variant: str, share: float = 0.1, seed: int = 0
) -> tuple[list[Sample], set[tuple[int, int]]]:
    """The samples with a share of their regions made wrong by one of VARIANTS, and (row, place) of those regions; fewer
    than the share where there is nothing to make it of."""
    draw = random.Random(seed)
    pool: Pool = {}
    for sample in samples:
        for region in sample.regions:
            pool.setdefault(region.kind, []).append((sample.id, region.caption))
    places = [(row, place) for row, sample in enumerate(samples) for place in range(len(sample.regions))]
    made = {}
    for row, place in draw.sample(places, round(share * len(places))):
        wrong = VARIANTS[variant](samples[row].regions[place], samples[row], pool, draw)
        if wrong is not None:
            made[row, place] = wrong
    planted = [
        replace(sample, regions=tuple(made.get((row, i), region) for i, region in enumerate(sample.regions)))
        for row, sample in enumerate(samples)
    ]
    return planted, set(made)
