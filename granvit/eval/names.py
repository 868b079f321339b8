"""What stages, states of a model, floors, sources and figures are called where people read them, and evaluations in
metrics.jsonl. docs/metrics.md has the same words."""

from __future__ import annotations

import re

from granvit.questions.prompts import TASKS

FLOORS = {
    "most_frequent": "most frequent caption",
    "most_frequent_words": "most frequent words",
    "blind": "blind: knows kind and size",
    "centre_box": "centre box",
    "whole_image": "whole image",
    "mean_box": "mean box",
}
FLOOR_WORDS = {
    "most frequent caption": "the most frequent training caption of the region's kind",
    "most frequent words": "of each attribute what most training captions name: its chance level",
    "blind: knows kind and size": "of a box its kind and size class: the caption that fits its training regions best; "
    "for a sentence the box that overlaps most training boxes",
    "centre box": "the middle half of the image",
    "whole image": "all of it",
    "mean box": "the mean training box of the kind",
}
"""{what a floor is called: what it answers}."""
STAGES = {"warmup": "warm-up", "align": "alignment", "pretrain": "stage 1", "adapt": "stage 2", "sft": "stage 3"}
STATES = {
    "before": ("before {}", "before"),
    "text_only": ("after {}, text alone", "control"),
    "other_image": ("after {}, shown another image", "control"),
    "control": ("{} on a random frozen encoder", "control"),
    "after": ("after {}", "after"),
}
"""{state: (its name, with a place for the stage's, and its class)}."""
CONTROL_WORDS = {
    "shown another image": "every question is asked of another test image: of the same source, where that has another",
    "text alone": "the question's text alone, no image",
    "on a random frozen encoder": "stage 2 on a frozen encoder with random weights: what stage 1 adds is the distance "
    "to it",
}
"""{what a control is called: what is done}."""
SOURCES = {
    "": "no source named",
    "scenes": "scenes (drawn)",
    "scenes-heldout": "scenes with held-out combinations",
    "pages": "pages of text",
}
"""Rows without a source, and those of the sample set; sources of other data are called what they call themselves."""
KINDS = {"": "all", "natural": "not text", "ocr": "text"}
"""{a region's kind: what its figures are of}."""
DURING = "during"
"""What a line of metrics.jsonl calls an evaluation while a stage trains, where those of whole stages are called
"before" or "after"."""

METRICS = {
    "ROUGE-L": "the model's caption of a box against the true one: F-measure of the longest common subsequence of "
    "words",
    "exact": "the same words in the same order; case and punctuation do not count",
    "CIDEr": "CIDEr-D: shared phrases, those that are rare in the test set weigh more (at most 10)",
    "colour, pattern, kind, size": "of the true captions that name one: share whose answer names the same and no other",
    "CER": "text regions: edit distance to the true text over its length; lower is better, above 1 is possible",
    "to the letter": "text regions: share of answers that are equal to the true text, sign by sign",
    "ACC@0.5, ACC@0.75, ACC@0.9": "share of sentences whose box the model gives with an IoU of at least so much",
    "IoU": "area that two boxes share over the area that they cover together: 1 where they are equal",
    "mean IoU": "mean IoU of the given and the true box",
    "mean F1": "2 x right boxes over boxes given and sentences asked, averaged over what counts as right: an IoU of at "
    "least 0.5, 0.55, ... 0.95",
    "tiny, small, medium, large": "by the object's size: the root of its box's share of the image is below 0.15, 0.25, "
    "0.35, or not",
    "unparsed": "share of answers that hold no box; they count as wrong",
    "tokens foreseen": "conversations: share of the answers' tokens that the model thinks likeliest, given what came "
    "before",
    "effective rank": "how many directions the features use: the exponential of the entropy of their singular values' "
    "shares",
}
"""The glossary: {what a metric is called, or several: what it is}."""

_FIGURES = {
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "cer": "CER",
    "acc50": "ACC@0.5",
    "acc75": "ACC@0.75",
    "acc90": "ACC@0.9",
    "miou": "mean IoU",
    "f1": "mean F1",
    "token_accuracy": "tokens foreseen",
    "effective_rank": "effective rank",
}
_FIGURE = re.compile(
    rf"((?P<kind>natural|ocr)_)?(({'|'.join(TASKS)}|features)_)?(?P<metric>.*?)(_(?P<size>tiny|small|medium|large))?",
    re.DOTALL,
)


def figure_name(figure: str) -> tuple[str, str]:
    """What a figure of an evaluation is of, and what it is called.

    >>> figure_name("scenes/caption2bbox_acc50_small"), figure_name("ocr_cer")
    (('scenes (drawn)', 'ACC@0.5, small'), ('text', 'CER'))
    """
    source, slash, name = figure.rpartition("/")
    parts = _FIGURE.fullmatch(name).groupdict()
    of = source_name(source) if slash else KINDS[parts["kind"] or ""]
    if name == "ocr_exact":  # ocr_bbox2caption_exact is by words
        return of, "to the letter"
    called = _FIGURES.get(parts["metric"], parts["metric"])
    return of, f"{called}, {parts['size']}" if parts["size"] else called


def stage_name(stage: str) -> str:
    return STAGES.get(stage, stage)


def source_name(source: str) -> str:
    return SOURCES.get(source, source)
