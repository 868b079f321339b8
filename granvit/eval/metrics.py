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
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

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
    return BBOX2CAPTION in metric and metric.rpartition("_")[2] in known


def is_of_size(metric: str) -> bool:
    """Whether a metric of this name is of objects of one of SIZES."""
    return CAPTION2BBOX in metric and metric.rpartition("_")[2] in SIZES


def summarise(predictions: list[Prediction], vocabularies: Vocabularies = ATTRIBUTES) -> dict[str, float]:
    """Every metric by name: over all predictions, per kind (prefix natural_ or ocr_) and per source (prefix
    SOURCE/); of a mixture also per dataset (prefix "dataset NAME/").

    Names: bbox2caption_{rouge_l, exact, cider} and bbox2caption_ATTRIBUTE of the sources that have a vocabulary;
    caption2bbox_{acc50, acc75, acc90, miou, f1, unparsed}, acc50 and miou also by the object's size
    (caption2bbox_acc50_small, see SIZES);
    ocr_cer and ocr_exact (text regions of bbox2caption, to the letter). A metric without a prediction to measure is
    absent.
    """
    captions = [p for p in predictions if p["task"] == BBOX2CAPTION]
    scores = cider([p["caption"] for p in captions], [p["answer"] for p in captions]) if captions else []
    # One row of values a prediction, computed once and averaged over every group that the prediction belongs
    # to.
    rows: list[tuple[Prediction, dict[str, float]]] = []
    for prediction, score in zip(captions, scores, strict=True):
        truth, answer = prediction["caption"], prediction["answer"]
        row = {"rouge_l": rouge_l(truth, answer), "exact": exact(truth, answer), "cider": score}
        row |= attributes(prediction, vocabularies)
        rows.append((prediction, row))
    for prediction in predictions:
        if prediction["task"] == CAPTION2BBOX:
            overlap = iou(prediction)
            unparsed = prediction["predicted_box"] is None
            row = {"acc50": overlap >= 0.5, "miou": overlap}
            row |= {f"{name}_{size(prediction['box'])}": value for name, value in row.items()}
            row |= {"acc75": overlap >= 0.75, "acc90": overlap >= 0.9, "unparsed": unparsed}
            rows.append((prediction, row | {"f1": fmean(overlap >= threshold for threshold in THRESHOLDS)}))

    groups: dict[str, list[float]] = defaultdict(list)
    texts: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for prediction, row in rows:
        source, kind, task = prediction["source"], prediction["kind"], prediction["task"]
        for name, value in row.items():
            for prefix in ("", f"{kind}_", f"{source}/", *_of_dataset(prediction)):
                groups[f"{prefix}{task}_{name}"].append(float(value))
        if kind == "ocr" and task == BBOX2CAPTION:
            for prefix in ("", f"{source}/", *_of_dataset(prediction)):
                texts[prefix].append((prediction["caption"], prediction["answer"]))

    metrics = {name: fmean(values) for name, values in groups.items()}
    for name in metrics:
        if name.endswith(f"{CAPTION2BBOX}_f1"):  # of right boxes over sentences so far; F1 counts the boxes given, too
            metrics[name] *= 2 / (2 - metrics[name.removesuffix("f1") + "unparsed"])
    for prefix, pairs in texts.items():
        truths, answers = [p[0] for p in pairs], [p[1] for p in pairs]
        metrics[f"{prefix}ocr_cer"] = cer(truths, answers)
        metrics[f"{prefix}ocr_exact"] = fmean(exact_text(t, a) for t, a in pairs)
    return metrics


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
