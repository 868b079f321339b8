"""Floors: what somebody reaches who sees nothing. A claim that a model sees is a claim against these.

most_frequent: the training caption that occurs most often in the region's kind.
most_frequent_words: of each attribute what most training captions of the region's source name (attributes alone).
blind: knows the box's kind, width and height. Of all training captions the one with the highest mean ROUGE-L
over
    the training regions of that kind and size class; asked for a box, of all training boxes of the kind the
    one that most training boxes overlap by IoU >= 0.5.
centre_box, whole_image, mean_box: the middle half of the image, all of it, the mean training box of the kind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from granvit.data.loader import spread
from granvit.data.measures import tokens
from granvit.data.sample import ATTRIBUTES
from granvit.eval.evaluation import TASKS, ask, readable
from granvit.eval.metrics import Prediction, box_iou, is_attribute, named, summarise
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

MIN_CLASS = 20  # a size class with fewer training regions than this falls back on its kind
MAX_CAPTIONS = 1000  # candidates for the blind caption: the most frequent ones
MAX_BOXES = 4000  # training boxes compared with each other, all against all; an even subset above


def rouge_l_matrix(candidates: list[str], references: list[str]) -> np.ndarray:
    """ROUGE-L F-measure of every candidate against every reference, float64 [candidates, references].

    Equal to `rouge_l` (a test compares them), but fast enough for all against all: the length
    of the longest common subsequence by Hyyro's bit-parallel recurrence (2004), one uint64 a pair, so that
    words past the 64th are cut off.
    """
    said = [[tokens(text)[:64] for text in texts] for texts in (candidates, references)]
    vocabulary = {word: i for i, word in enumerate(sorted({w for texts in said for t in texts for w in t}))}
    where = np.zeros((len(vocabulary) + 1, len(references)), dtype=np.uint64)  # bit p: word stands at place p
    for r, reference in enumerate(said[1]):
        for place, word in enumerate(reference):
            where[vocabulary[word], r] |= np.uint64(1 << place)
    sizes = [np.array([len(t) for t in texts]) for texts in said]
    padding = len(vocabulary)  # matches nowhere and so changes nothing
    padded = np.full((len(candidates), max(sizes[0], default=0)), padding)
    for c, candidate in enumerate(said[0]):
        padded[c, : len(candidate)] = [vocabulary[word] for word in candidate]

    state = np.full((len(candidates), len(references)), np.uint64(2**64 - 1))
    for column in padded.T:
        match = state & where[column]
        state = (state + match) | (state - match)
    used = np.uint64(1) << np.clip(sizes[1], 0, 63).astype(np.uint64)
    mask = np.where(sizes[1] >= 64, np.uint64(2**64 - 1), used - np.uint64(1))
    common = np.bitwise_count(~state & mask).astype(np.float64)
    total = sizes[0][:, None] + sizes[1][None, :]
    return np.divide(2 * common, total, out=np.zeros_like(common), where=common > 0)


def best_caption(captions: list[str]) -> str:
    """The caption with the highest mean ROUGE-L against all of `captions`; of several, the most frequent."""
    distinct = Counter(captions).most_common()
    texts = [text for text, _ in distinct]
    weights = np.array([count for _, count in distinct], dtype=np.float64)
    candidates = texts[:MAX_CAPTIONS]
    block = max(1, 2_000_000 // len(texts))  # 2 million pairs at a time, 16 MB
    blocks = [candidates[i : i + block] for i in range(0, len(candidates), block)]
    return candidates[int(np.argmax(np.concatenate([rouge_l_matrix(b, texts) @ weights for b in blocks])))]


def best_box(boxes: np.ndarray) -> np.ndarray:
    """Of `boxes` [N, 4] the one that overlaps most of them by IoU >= 0.5; of several, the one with the best
    mean IoU.
    """
    boxes = boxes[:: -(-len(boxes) // MAX_BOXES)]
    overlap = np.stack([box_iou(box, boxes) for box in boxes])
    return boxes[int(np.argmax((overlap >= 0.5).sum(axis=1) + overlap.mean(axis=1) / 2))]


class _Blind:
    """The speaker who knows a box's kind and size, fitted on training regions."""

    def __init__(self, train: list[dict[str, Any]]) -> None:
        self.thirds: dict[str, np.ndarray] = {}  # kind -> bounds of the thirds of widths and heights, [2, 2]
        by_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for region in train:
            by_kind[region["kind"]].append(region)
        self.caption: dict[Any, str] = {}
        for kind, regions in by_kind.items():
            boxes = np.array([r["box"] for r in regions])
            self.thirds[kind] = np.quantile(boxes[:, 2:] - boxes[:, :2], [1 / 3, 2 / 3], axis=0)
            self.caption[kind] = best_caption([r["caption"] for r in regions])
            classes: dict[Any, list[str]] = defaultdict(list)
            for region in regions:
                classes[self.size_class(region)].append(region["caption"])
            for size, captions in classes.items():
                if len(captions) >= MIN_CLASS:
                    self.caption[kind, size] = best_caption(captions)

    def size_class(self, region: dict[str, Any]) -> tuple[int, int]:
        """Which third of its kind's training widths, and of their heights, a region's box falls in."""
        x1, y1, x2, y2 = region["box"]
        bounds = self.thirds[region["kind"]]
        return int((x2 - x1 > bounds[:, 0]).sum()), int((y2 - y1 > bounds[:, 1]).sum())

    def __call__(self, region: dict[str, Any]) -> str:
        kind = region["kind"]
        if kind not in self.caption:  # never seen in training: what is best for another kind
            return next(iter(self.caption.values()))
        return self.caption.get((kind, self.size_class(region)), self.caption[kind])


def _frequent_words(known: list[Prediction], source: str) -> str:
    """Of each of the source's attributes what most training captions name, its own and those of sources with the same
    vocabulary."""
    frequent = []
    for attribute, words in ATTRIBUTES[source].items():
        alike = {name for name, attributes in ATTRIBUTES.items() if attributes.get(attribute) == words}
        things = [named(region["caption"], words) for region in known if region["source"] in alike]
        frequent += [thing for (thing,), _ in Counter(tuple(t) for t in things if len(t) == 1).most_common(1)]
    return " ".join(frequent)


def floors(
    train: Any, test: Any, limit: int | None = None, rows: Sequence[int] | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of every floor, {floor: {metric: value}}, fitted on `train` and measured on `test` (both
    GranDatasets).

    limit, rows: as in `evaluate`, so that no floor is measured on a row that a model is never asked about; training
    images are not looked at. Where `train` has no region, only the floors that need no fitting are there. ValueError
    where `test` has none.
    """
    known = [q.truth for q in ask(train, (BBOX2CAPTION,), range(len(train)))]
    rows = readable(test, spread(len(test), limit)) if rows is None else rows
    asked = [q.truth for q in ask(test, TASKS, rows)]
    if not asked:
        raise ValueError("test has no region; floors are measured on at least one")

    def answered(
        caption: Callable[[Prediction], str] | None, box: Callable[[Prediction], Any] | None
    ) -> dict[str, float]:
        """Metrics of a floor that captions boxes, finds them, or both."""
        predictions = []
        for truth in asked:
            if truth["task"] == BBOX2CAPTION and caption:
                predictions.append({**truth, "answer": caption(truth), "predicted_box": None})
            if truth["task"] == CAPTION2BBOX and box:
                predictions.append({**truth, "answer": "", "predicted_box": list(box(truth))})
        return summarise(predictions)

    constant = {
        "centre_box": answered(None, lambda r: (0.25, 0.25, 0.75, 0.75)),
        "whole_image": answered(None, lambda r: (0.0, 0.0, 1.0, 1.0)),
    }
    if not known:
        return constant

    kinds = {r["kind"] for r in known}
    of_kind = {kind: [r for r in known if r["kind"] == kind] for kind in kinds} | {None: known}
    frequent = {k: Counter(r["caption"] for r in v).most_common(1)[0][0] for k, v in of_kind.items()}
    boxes = {k: np.array([r["box"] for r in v]) for k, v in of_kind.items()}
    mean_box = {k: b.mean(axis=0) for k, b in boxes.items()}
    likely_box = {k: best_box(b) for k, b in boxes.items()}
    blind = _Blind(known)
    words = {source: _frequent_words(known, source) for source in ATTRIBUTES}
    spoken = answered(lambda r: words.get(r["source"], ""), None)

    def kind(region: dict[str, Any]) -> str | None:
        return region["kind"] if region["kind"] in kinds else None  # a kind never seen in training: all of it

    return {
        "most_frequent": answered(lambda r: frequent[kind(r)], None),
        "most_frequent_words": {name: value for name, value in spoken.items() if is_attribute(name)},
        "blind": answered(blind, lambda r: likely_box[kind(r)]),
        **constant,
        "mean_box": answered(None, lambda r: mean_box[kind(r)]),
    }
