"""What stages, states of a model and floors are called where people read them, and evaluations in metrics.jsonl."""

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
DURING = "during"
"""What a line of metrics.jsonl calls an evaluation while a stage trains, where those of whole stages are called
"before" or "after"."""


def stage_name(stage: str) -> str:
    return STAGES.get(stage, stage)
