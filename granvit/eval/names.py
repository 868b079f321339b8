"""What stages, states of a model, floors, sources and metrics are called where people read them."""

from __future__ import annotations

FLOORS = {
    "most_frequent": "most frequent caption",
    "most_frequent_words": "most frequent words",
    "blind": "blind: knows kind and size",
    "centre_box": "centre box",
    "whole_image": "whole image",
    "mean_box": "mean box",
}
STAGES = {"warmup": "warm-up", "align": "alignment", "pretrain": "stage 1", "adapt": "stage 2", "sft": "stage 3"}
STATES = {
    "before": ("before {}", "before"),
    "text_only": ("after {}, text alone", "control"),
    "other_image": ("after {}, shown another image", "control"),
    "control": ("{} on a random frozen encoder", "control"),
    "after": ("after {}", "after"),
}
"""{state: (its name, with a place for the stage's, and its class)}."""
SOURCES = {
    "scenes": "scenes (drawn)",
    "scenes-heldout": "scenes with held-out combinations",
    "pages": "pages of text",
}
"""Sources of the sample set; those of other data are called what they call themselves."""

METRICS = {
    "ROUGE-L": "the model's caption of a box against the true one: F-measure of the longest common subsequence of "
    "words",
    "exact": "the same words in the same order; case and punctuation do not count",
    "CIDEr": "CIDEr-D: shared phrases, those that are rare in the test set weigh more (at most 10)",
    "ACC@0.5": "share of sentences whose box the model gives with an IoU of at least 0.5",
    "IoU": "area that two boxes share over the area that they cover together: 1 where they are equal",
    "mean IoU": "mean IoU of the given and the true box",
    "mean F1": "2 x right boxes over boxes given and sentences asked, averaged over what counts as right: an IoU of at "
    "least 0.5, 0.55, ... 0.95",
    "unparsed": "share of answers that hold no box; they count as wrong",
    "CER": "text regions: edit distance to the true text over its length; lower is better, above 1 is possible",
    "colour, pattern, kind, size": "of the true captions that name one: share whose answer names the same and no other",
    "tokens foreseen": "conversations: share of the answers' tokens that the model thinks likeliest, given what came "
    "before",
    "effective rank": "how many directions the features use: the exponential of the entropy of their "
    "singular values' shares",
}
"""The glossary of the report. docs/metrics.md has the same words."""


def stage_name(stage: str) -> str:
    return STAGES.get(stage, stage)


def source_name(source: str) -> str:
    return SOURCES.get(source, source)
