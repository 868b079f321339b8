"""Which regions a probe asks about, and what they are called: classes read from captions.

A source with a vocabulary (the sample set's scenes, `granvit.data.sample.ATTRIBUTES`) has a target for each attribute,
"kind", "colour" and "pattern": the value that a caption names, where it names one. Every other source has the target
"word": its captions as they are where they are names of classes, as COCO's are, else their head words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from granvit.data.loader import GranDataset, spread
from granvit.data.measures import words
from granvit.data.parallel import progress
from granvit.data.sample import ATTRIBUTES
from granvit.eval.metrics import named

WORD = "word"
REPEATS = 5
"""Captions of a source are names of classes where each distinct one stands at so many training regions on average."""

OF_THE_BOX = ("size",)
"""Attributes that the box tells without a look at the picture: no targets."""

# The head of an English noun phrase is the last word before one of these.
_BREAKS = frozenset(
    "of with without in on at by for from to near next behind under over above below beneath between against inside "
    "outside around through along across into onto off up down and or as is are was were has have had that which who "
    "whose where while wearing holding sitting standing riding walking playing looking lying laying leaning eating "
    "hanging flying running using covering carrying driving showing talking parked covered filled made".split()
)
# Not heads: articles, places in the picture.
_SKIPPED = frozenset("a an the this that these those s left right middle center centre front back background".split())
# "a group of people" is of people.
_PARTS = frozenset("group pair piece bunch couple lot set row part side kind type picture photo image view".split())


@dataclass(frozen=True)
class Regions:
    """Regions of a split's images, in the order of rows; text regions are counted and left out.

    rows: int64 [R], of the dataset. boxes: float32 [R, 4], relative xyxy. captions and sources: of each, R strings.
    ocr: how many text regions were left out.
    """

    rows: np.ndarray
    boxes: np.ndarray
    captions: list[str]
    sources: list[str]
    ocr: int = 0

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, kept: np.ndarray) -> Regions:
        """Those of a mask [R]."""
        places = np.flatnonzero(kept)
        texts = ([texts[i] for i in places] for texts in (self.captions, self.sources))
        return Regions(self.rows[places], self.boxes[places], *texts, self.ocr)


def read_regions(dataset: GranDataset, limit: int | None) -> Regions:
    """The regions of at most `limit` images, spread evenly. Pictures are not looked at. Faults are the dataset's."""
    rows, boxes, captions, sources, ocr = [], [], [], [], 0
    chosen = spread(len(dataset), limit)
    for row in progress(chosen, f"Reading regions of {dataset.split}", len(chosen)):
        sample = dataset.annotations(row)
        for region in sample.regions if sample is not None else ():
            if region.kind == "ocr":
                ocr += 1
                continue
            rows.append(row)
            boxes.append(region.box)
            captions.append(region.caption)
            sources.append(sample.source)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return Regions(np.array(rows, np.int64), boxes, captions, sources, ocr)


def head_word(caption: str) -> str | None:
    """The head of a caption that is an English noun phrase: the last word before a preposition, a relative pronoun or
    a verb of a short list. None where there is no such word.

    >>> head_word("a small brown dog with a ball"), head_word("group of people")
    ('dog', 'people')
    """
    head = None
    for word in words(caption):
        if word in _BREAKS:
            if head and not (word == "of" and head in _PARTS):
                break
            head = None
        elif word not in _SKIPPED and not word.isdecimal():
            head = word
    return head


@dataclass(frozen=True)
class Labels:
    """What regions are called, as the training regions (`of`) have it.

    names: sources whose captions are names of classes. heads: the head words of all others, by which a plural's s is
    known from another.
    """

    names: frozenset[str]
    heads: frozenset[str]

    @classmethod
    def of(cls, train: Regions) -> Labels:
        captions: dict[str, Counter[str]] = {}
        for source, caption in zip(train.sources, train.captions, strict=True):
            if source not in ATTRIBUTES:
                captions.setdefault(source, Counter())[_whole(caption)] += 1
        names = {source for source, counts in captions.items() if counts.total() >= REPEATS * len(counts)}
        heads = {head_word(text) for source in captions.keys() - names for text in captions[source]} - {None}
        return cls(frozenset(names), frozenset(heads))

    def label(self, caption: str, source: str) -> dict[str, str]:
        """Of each target that the region has: what it is called there."""
        if source in ATTRIBUTES:
            told = {name: named(caption, known) for name, known in ATTRIBUTES[source].items() if name not in OF_THE_BOX}
            return {name: next(iter(values)) for name, values in told.items() if len(values) == 1}
        word = _whole(caption) if source in self.names else self._singular(head_word(caption))
        return {WORD: word} if word else {}

    def targets(self, regions: Regions) -> dict[str, list[str | None]]:
        """{target: the label of each region, R of them, None where it has none}."""
        told = [self.label(*pair) for pair in zip(regions.captions, regions.sources, strict=True)]
        names = [name for vocabulary in ATTRIBUTES.values() for name in vocabulary] + [WORD]
        seen = {name for labels in told for name in labels}
        return {name: [labels.get(name) for labels in told] for name in dict.fromkeys(names) if name in seen}

    def _singular(self, head: str | None) -> str | None:
        return head[:-1] if head and head.endswith("s") and head[:-1] in self.heads else head


def _whole(caption: str) -> str:
    return " ".join(words(caption))


def classes(labels: Iterable[str | None], min_regions: int) -> dict[str, int]:
    """The labels that at least `min_regions` training regions have, with their numbers, the most frequent first."""
    counts = Counter(label for label in labels if label is not None)
    return {name: n for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= min_regions}


def numbers(labels: Iterable[str | None], known: Mapping[str, int]) -> np.ndarray:
    """int64 [R]: the place of each label in `known`, -1 where it is not there."""
    place = {name: i for i, name in enumerate(known)}
    return np.array([place.get(label, -1) for label in labels], np.int64)
