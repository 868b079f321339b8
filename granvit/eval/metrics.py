"""What a list of predictions is worth: captions by ROUGE-L, CIDEr and exact match, boxes by IoU, text by CER.

A prediction is a plain dictionary (it goes to predictions.json as it is):

    {"id", "source", "task": "bbox2caption" | "caption2bbox", "kind": "natural" | "ocr",
     "box": [x1, y1, x2, y2], "caption": str, "answer": str, "predicted_box": [x1, y1, x2, y2] | None}

`box` and `caption` are the truth, relative xyxy; `answer` is the model's text and `predicted_box` what could
be read from it (caption2bbox only). Every metric is a fraction except CIDEr, which keeps its authors' scale
(at most 10).
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable, Mapping
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from granvit.data.measures import box_iou, nfc, tokens
from granvit.data.sample import ATTRIBUTES
from granvit.eval.cider import cider_d
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Prediction = dict[str, Any]
Vocabularies = Mapping[str, Mapping[str, Mapping[str, str]]]
"""{source: {attribute: {word: what it names}}}, as `granvit.data.sample.ATTRIBUTES`."""

SIZES = ("tiny", "small", "medium", "large")
BOUNDS = (0.15, 0.25, 0.35)
"""Sides from which an object is small, medium and large. Its side is the root of its box's share of the image."""

THRESHOLDS = tuple(percent / 100 for percent in range(50, 100, 5))
"""IoUs over which the F1 of boxes is averaged, as COCO's."""


@lru_cache(maxsize=1)
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=SimpleNamespace(tokenize=tokens))


def rouge_l(truth: str, answer: str) -> float:
    """F-measure of the longest common subsequence of `tokens` (Lin 2004), by the rouge-score library, without
    stemming. Its own tokenizer knows ASCII only, where ours gives the same words.
    """
    return _rouge().score(truth, answer)["rougeL"].fmeasure


def exact(truth: str, answer: str) -> bool:
    """Equal but for case, punctuation and spaces; text of nothing but signs is compared sign by sign."""
    return tokens(truth) == tokens(answer)


def exact_text(truth: str, answer: str) -> bool:
    """Equal to the letter, white space and Unicode's form normalised: the exact match of text that was to be read."""
    return nfc(truth) == nfc(answer)


def cider(truths: list[str], answers: list[str]) -> np.ndarray:
    """CIDEr-D (Vedantam et al. 2015) of each answer, float64 [N]: 10 for equal captions of at least four words, less
    for shorter ones, which lack the longer n-grams. Document frequencies are those of `truths`.
    """
    return cider_d([tokens(truth) for truth in truths], [tokens(answer) for answer in answers])


def cer(truths: list[str], answers: list[str]) -> float:
    """Character error rate over a corpus, by jiwer: edits / characters of the truths. It can exceed 1."""
    import jiwer

    return jiwer.cer([nfc(truth) for truth in truths], [nfc(answer) for answer in answers])


def iou(prediction: Prediction) -> float:
    """IoU of a caption2bbox prediction; a box that couldn't be parsed counts as 0."""
    if prediction["predicted_box"] is None:
        return 0.0
    return float(box_iou(prediction["box"], prediction["predicted_box"]))


def size(box: list[float]) -> str:
    """Which of SIZES a relative xyxy box has."""
    x1, y1, x2, y2 = box
    return SIZES[bisect_right(BOUNDS, math.sqrt(max(0.0, (x2 - x1) * (y2 - y1))))]


def named(text: str, words: Mapping[str, str]) -> set[str]:
    """What the words of `text` name of an attribute."""
    return {words[word] for word in tokens(text) if word in words}


def attributes(prediction: Prediction, vocabularies: Vocabularies) -> dict[str, bool]:
    """Of each attribute that the true caption names once: whether the answer names the same, and nothing else."""
    truths = {
        attribute: (named(prediction["caption"], words), named(prediction["answer"], words))
        for attribute, words in vocabularies.get(prediction["source"], {}).items()
    }
    return {attribute: truth == answer for attribute, (truth, answer) in truths.items() if len(truth) == 1}


def is_attribute(metric: str, vocabularies: Vocabularies = ATTRIBUTES) -> bool:
    """Whether a metric of this name is the share of captions that name an attribute right."""
    known = {attribute for attributes in vocabularies.values() for attribute in attributes}
    return BBOX2CAPTION in metric.rpartition("/")[2] and metric.rpartition("_")[2] in known


def is_of_size(metric: str) -> bool:
    """Whether a metric of this name is of objects of one of SIZES."""
    return CAPTION2BBOX in metric.rpartition("/")[2] and metric.rpartition("_")[2] in SIZES


def summarise(predictions: list[Prediction], vocabularies: Vocabularies = ATTRIBUTES) -> dict[str, float]:
    """Every metric by name: over all predictions, per kind (prefix natural_ or ocr_) and per source (prefix
    SOURCE/); of a mixture also per dataset (prefix "dataset NAME/").

    Names: bbox2caption_{rouge_l, exact, cider} and bbox2caption_ATTRIBUTE of the sources that have a vocabulary;
    caption2bbox_{acc50, acc75, acc90, miou, f1, unparsed}, acc50 and miou also by the object's size
    (caption2bbox_acc50_small, see SIZES);
    ocr_cer and ocr_exact (text regions of bbox2caption, to the letter). A metric without a prediction to measure is
    absent.
    """
    return {
        name: math.fsum(s.value for s in scores) / math.fsum(s.weight for s in scores)
        for name, scores in scored(predictions, vocabularies).items()
    }


class Score(NamedTuple):
    """What an answer adds to a metric, which is the sum of `value` over the sum of `weight`; image: which (`place`);
    answer: its place among the predictions."""

    image: Hashable
    value: float
    weight: float = 1.0
    answer: int = 0


def scored(predictions: list[Prediction], vocabularies: Vocabularies = ATTRIBUTES) -> dict[str, list[Score]]:
    """The scores of the answers that each metric is about, by the names of `summarise`."""
    captions = [p for p in predictions if p["task"] == BBOX2CAPTION]
    ciders = iter(cider([p["caption"] for p in captions], [p["answer"] for p in captions]) if captions else [])
    groups: dict[str, list[Score]] = defaultdict(list)
    for number, prediction in enumerate(predictions):
        task, prefixes = prediction["task"], ["", f"{prediction['source']}/", *_of_dataset(prediction)]
        truth, answer = prediction["caption"], prediction["answer"]
        if task == BBOX2CAPTION:
            row = {"rouge_l": rouge_l(truth, answer), "exact": exact(truth, answer), "cider": next(ciders)}
            row |= attributes(prediction, vocabularies)
            if prediction["kind"] == "ocr" and (characters := len(nfc(truth))):  # none: there is nothing to read
                edits = cer([truth], [answer]) * characters
                read = (("cer", edits, characters), ("exact", exact_text(truth, answer), 1.0))
                for name, value, weight in read:
                    for prefix in prefixes:
                        groups[f"{prefix}ocr_{name}"].append(Score(place(prediction), float(value), weight, number))
        else:
            overlap, unparsed = iou(prediction), prediction["predicted_box"] is None
            row = {"acc50": overlap >= 0.5, "miou": overlap}
            row |= {f"{name}_{size(prediction['box'])}": value for name, value in row.items()}
            row |= {"acc75": overlap >= 0.75, "acc90": overlap >= 0.9, "unparsed": unparsed}
            row["f1"] = 2 * fmean(overlap >= threshold for threshold in THRESHOLDS)
        for name, value in row.items():
            # of F1: the sentence that was asked and the box that was given
            weight = 2.0 - row["unparsed"] if name == "f1" else 1.0
            for prefix in (*prefixes, f"{prediction['kind']}_"):
                groups[f"{prefix}{task}_{name}"].append(Score(place(prediction), float(value), weight, number))
    return groups


def place(prediction: Prediction) -> tuple[str, str]:
    """The dataset of a mixture, else "", and the id of the image that a prediction is about."""
    return prediction.get("dataset", ""), prediction["id"]


def is_share(metric: str) -> bool:
    """Whether a metric of this name is the share of the answers that are right, not a mean of degrees."""
    return re.search("(rouge_l|cider|cer|f1|miou(_[a-z]+)?)$", metric) is None


def _of_dataset(prediction: Prediction) -> tuple[str, ...]:
    """The prefix of a prediction's dataset, where several were mixed."""
    return (f"dataset {prediction['dataset']}/",) if prediction.get("dataset") else ()


def counts(predictions: list[Prediction]) -> dict[str, int]:
    """Number of predictions a task: over all, per kind, source and dataset, with the prefixes of `summarise`."""
    total: dict[str, int] = defaultdict(int)
    for p in predictions:
        for prefix in ("", f"{p['kind']}_", f"{p['source']}/", *_of_dataset(p)):
            total[prefix + p["task"]] += 1
    return dict(total)
