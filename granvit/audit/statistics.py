"""Counting what is in a split of a Gran dataset: sizes, lengths, words, repetitions and faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from granvit.data.loader import open_rows
from granvit.data.measures import box_iou, normalised, words
from granvit.data.overlap import DISTANCE, nearest, picture_hash
from granvit.data.parallel import process_map, progress
from granvit.data.schema import parse_row
from granvit.questions.prompts import box_fault
from granvit.questions.schema import KINDS, DataFault, Sample

SAME_BOX = 0.9
"""Boxes of one kind in one picture are counted as duplicates where their IoU is above this."""
EXAMPLES = 5
"""As many faults of a kind are quoted."""
SOURCE_COUNTS = ("rows", "faulty", "pictures", "captioned", *KINDS, "words")
_CHUNK = 128


@dataclass
class Statistics:
    """What was found in some rows; statistics of different rows can be added.

    rows, captioned, faulty: numbers of rows, of good ones with a caption of their own, of those with any fault.
    faults: by kind. examples: {kind: messages}. outside, empty: boxes that reach out of their picture, or have no area.
    ids, captions, vocabulary: how often each occurs (captions of natural regions, normalised, and their words).
    sizes [N, 2]: width and height of the good pictures in pixels. regions_of [N]: how many regions each has.
    boxes: {kind: [R, 4]}, relative xyxy; sides: {kind: [R, 2]}, their width and height in pixels. lengths: {kind or
    "image": words of the captions}. same_boxes, same_captions: regions that repeat one of their picture's. codes: the
    pictures' hashes. sources: {source: how many rows, faulty rows, pictures, captioned ones, regions of each kind, and
    words of their captions it has}, "" being that of rows without one.
    """

    rows: int = 0
    captioned: int = 0
    faulty: int = 0
    outside: int = 0
    empty: int = 0
    same_boxes: int = 0
    same_captions: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    ids: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    vocabulary: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    regions_of: list[int] = field(default_factory=list)
    boxes: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    sides: dict[str, list[Any]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    lengths: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in (*KINDS, "image")})
    codes: list[np.ndarray] = field(default_factory=list)
    sources: dict[str, Counter[str]] = field(default_factory=dict)

    def __iadd__(self, other: Statistics) -> Statistics:
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if name == "examples":
                for kind, messages in value.items():
                    mine[kind] = (mine.get(kind, []) + messages)[:EXAMPLES]
            elif name == "sources":
                for source, counts in value.items():
                    mine.setdefault(source, Counter()).update(counts)
            elif isinstance(value, dict) and not isinstance(value, Counter):
                for kind, values in value.items():
                    mine[kind].extend(values)
            elif isinstance(value, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)
        return self

    def fault(self, name: str, fault: DataFault) -> None:
        self.faults[fault.kind] += 1
        quoted = self.examples.setdefault(fault.kind, [])
        if len(quoted) < EXAMPLES:
            quoted.append(f"{name}: {str(fault):.300}")

    def numbers(self) -> dict[str, Any]:
        """As JSON can hold it. Quantiles are [least, 5 %, median, 95 %, most]."""
        pictures = nearest(np.array(self.codes, np.uint64).reshape(-1, 4), None, DISTANCE)
        regions = {kind: len(self.boxes[kind]) for kind in KINDS}
        return {
            "rows": self.rows,
            "good": len(self.sizes),
            "faulty": self.faulty,
            "faults": dict(self.faults.most_common()),
            "fault_examples": self.examples,
            "boxes_outside": self.outside,
            "boxes_empty": self.empty,
            "captioned": self.captioned,
            "width": quantiles([width for width, _ in self.sizes]),
            "height": quantiles([height for _, height in self.sizes]),
            "regions": regions,
            "regions_an_image": quantiles(self.regions_of),
            "box_short_side": {kind: quantiles(map(min, self.sides[kind])) for kind in KINDS},
            "box_aspect": {kind: quantiles(w / h for w, h in self.sides[kind]) for kind in KINDS},
            "caption_words": {kind: quantiles(values) for kind, values in self.lengths.items()},
            "distinct_captions": len(self.captions),
            "vocabulary": len(self.vocabulary),
            "frequent_captions": [[text[:300], number] for text, number in self.captions.most_common(20)],
            "frequent_words": [[text[:300], number] for text, number in self.vocabulary.most_common(20)],
            "sources": {
                source: {name: counts[name] for name in SOURCE_COUNTS}
                for source, counts in sorted(self.sources.items(), key=lambda item: (-item[1]["rows"], item[0]))
            },
            "repeated_ids": sum(number - 1 for number in self.ids.values()),
            "repeated_pictures": len(pictures),
            "repeated_boxes": self.same_boxes,
            "repeated_captions_in_image": self.same_captions,
        }


def count(data: str | Path, split: str, rows: Sequence[int], workers: int | None = None) -> Statistics:
    """Look at these rows and their pictures. Nothing that is wrong with a row raises: it is counted."""
    chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
    whole = Statistics()
    with process_map(workers, len(chunks)) as run:
        parts = run(partial(_count, str(data), split), chunks)
        for part in progress(parts, "Counting", len(chunks)):
            whole += part
    return whole


def quantiles(values: Iterable[float]) -> list[float] | None:
    """Least, 5 %, median, 95 %, most; None of nothing."""
    values = list(values)
    return [round(float(v), 3) for v in np.quantile(values, (0, 0.05, 0.5, 0.95, 1))] if values else None


def _count(data: str, split: str, chosen: Sequence[int]) -> Statistics:
    statistics, rows = Statistics(), open_rows(data, split)
    for number in chosen:
        row = rows[number]
        before = statistics.faults.total()
        name = f"{split}[{number}] id={str(row['id'])[:80]!r}"
        statistics.rows += 1
        statistics.ids[str(row["id"])] += 1
        source = statistics.sources.setdefault(str(row["source"] or "")[:300], Counter())
        source["rows"] += 1
        _count_boxes(statistics, row)
        try:
            sample = parse_row(row, lambda fault, name=name: statistics.fault(name, fault))
        except DataFault as fault:
            statistics.fault(name, fault)
        else:
            _count_sample(statistics, sample, source)
        faulty = statistics.faults.total() > before
        statistics.faulty += faulty
        source["faulty"] += faulty
    return statistics


def _count_boxes(statistics: Statistics, row: dict[str, Any]) -> None:
    """Which of the two ways a box is wrong in, which the kind of its fault does not tell."""
    for region in row["regions"] or []:
        box = region["box"] if isinstance(region, dict) else None
        if isinstance(box, list) and all(isinstance(side, (int, float)) for side in box):
            fault = box_fault(box) or ""
            statistics.outside += "outside" in fault
            statistics.empty += "no area" in fault


def _count_sample(statistics: Statistics, sample: Sample, source: Counter[str]) -> None:
    if not sample.image.numel():  # conversations alone
        return
    height, width = sample.image.shape[:2]
    statistics.sizes.append((width, height))
    source["pictures"] += 1
    statistics.regions_of.append(len(sample.regions))
    code = picture_hash(Image.fromarray(sample.image.numpy()))
    if code is not None:
        statistics.codes.append(code)
    if sample.caption is not None:
        statistics.captioned += 1
        source["captioned"] += 1
        statistics.lengths["image"].append(len(words(sample.caption)))
    captions: Counter[str] = Counter()
    for region in sample.regions:
        x1, y1, x2, y2 = region.box
        statistics.boxes[region.kind].append(region.box)
        statistics.sides[region.kind].append(((x2 - x1) * width, (y2 - y1) * height))
        said = words(region.caption)
        statistics.lengths[region.kind].append(len(said))
        source[region.kind] += 1
        source["words"] += len(said)
        if region.kind == "natural":
            captions[normalised(region.caption)] += 1
            statistics.vocabulary.update(said)
    statistics.captions.update(captions)
    statistics.same_captions += captions.total() - len(captions)
    for kind in KINDS:
        boxes = np.array([region.box for region in sample.regions if region.kind == kind])
        if len(boxes) > 1:
            statistics.same_boxes += int(np.tril(box_iou(boxes[:, None], boxes) > SAME_BOX, -1).any(1).sum())
