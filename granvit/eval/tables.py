"""The tables of a run's report: who answered, by task, kind and source, with numbers of answers and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from granvit.eval.intervals import interval, wilson
from granvit.eval.metrics import SIZES, Score, is_attribute, is_share
from granvit.eval.names import FLOORS, STATES, figure_name, stage_name
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

Scores = Mapping[tuple[str, str], Mapping[str, list[Score]]]
"""{(stage, state): the scores of every metric}, of the states whose answers are known."""

TABLES = (
    ("Captions of boxes", BBOX2CAPTION, ("rouge_l", "exact", "cider")),
    ("Boxes of sentences", CAPTION2BBOX, ("acc50", "acc75", "acc90", "miou", "f1", "unparsed")),
)
SOURCES = 8
"""Sources that have columns and pictures of their own: those of the most questions."""
LESS = ("cer", "unparsed")  # metrics of which less is better


def headlines(summary: dict[str, Any], scores: Scores) -> list[dict[str, Any]]:
    """The claims of the stages that there were, each with its interval, the share of exact answers, and what it is to
    be measured against (in per cent)."""
    pretrain, adapt, sft = (summary["mean"]["stages"].get(name, {}) for name in ("pretrain", "adapt", "sft"))
    before = ("end of stage 1", pretrain["after"]) if pretrain else ("before stage 2", adapt.get("before", {}))
    claims = (
        ("Captions of boxes after stage 1", "ROUGE-L", "bbox2caption_rouge_l", "pretrain", (
            ("blind floor", summary["floors"].get("blind", {})),
            ("before stage 1", summary["mean"]["stages"].get("align", {}).get("after", {})),
            ("another image", pretrain.get("other_image", {})),
            ("text alone", pretrain.get("text_only", {})),
        )),
        ("Boxes of sentences after stage 2", "ACC@0.5", "caption2bbox_acc50", "adapt", (
            before,
            ("random encoder", adapt.get("control", {})),
            ("another image", adapt.get("other_image", {})),
            ("text alone", adapt.get("text_only", {})),
        )),
        ("Captions of boxes after stage 2", "ROUGE-L", "bbox2caption_rouge_l", "adapt", (before,)),
        ("Answers in conversations after stage 3", "tokens foreseen", "chat_token_accuracy", "sft", (
            ("before stage 3", sft.get("before", {})),
            ("another image", sft.get("other_image", {})),
        )),
    )  # fmt: skip
    numbers, images, claimed = _numbers(scores), _images(scores), []
    for title, unit, metric, stage, references in claims:
        model = summary["mean"]["stages"].get(stage, {}).get("after", {})
        if metric not in model:
            continue
        seeds = [run["stages"][stage]["after"] for run in summary["runs"]]
        cell = _cell(metric, model, seeds, scores.get((stage, "after"), {}), images.get(metric))
        exact = metric.replace("rouge_l", "exact")
        value = 100 * model[metric]
        against = [
            {"who": who, "value": 100 * metrics[metric], "distance": value - 100 * metrics[metric]}
            for who, metrics in references
            if metric in metrics
        ]
        claimed.append(
            {"title": title, "unit": unit, "value": value, "spread": cell["spread"], "number": numbers.get(metric)}
            | {"exact": 100 * model[exact] if exact != metric and exact in model else None, "against": against}
        )
    return claimed


def tables(summary: dict[str, Any], scores: Scores) -> list[dict[str, Any]]:
    """All of the report's tables that have a row."""
    metrics = {
        **{title: task_metrics(summary, task, names, _numbers(scores)) for title, task, names in TABLES},
        "Attributes that captions of boxes name right": attribute_metrics(summary),
        "Boxes of sentences by the object's size": size_metrics(),
        "Text regions, to the letter": ["ocr_cer", "ocr_exact"],
        "Answers in conversations": ["chat_token_accuracy"],
    }
    made = [table(summary, title, several, scores) for title, several in metrics.items()]
    return [table for table in made if table["rows"]]


def task_metrics(
    summary: dict[str, Any], task: str, names: tuple[str, ...], numbers: Mapping[str, int]
) -> list[str]:
    """The first metric of a task for every kind and for SOURCES, the others over all. numbers: of answers a metric."""
    first, *rest = names
    ending = f"{task}_{first}"
    known = sorted((n for n in _names(summary) if n.endswith(f"/{ending}")), key=lambda name: name.rpartition("/"))
    asked = sorted(known, key=lambda name: -numbers.get(name, 0))[:SOURCES]
    sources = [name for name in known if name in asked]
    return [ending, f"natural_{ending}", f"ocr_{ending}", *sources, *(f"{task}_{name}" for name in rest)]


def attribute_metrics(summary: dict[str, Any]) -> list[str]:
    """The words of captions that name an attribute right, over all sources that have a vocabulary, and of each."""
    names = sorted(filter(is_attribute, _names(summary)))
    own = [name for name in names if "/" not in name]
    return [name for attribute in own for name in (attribute, *(n for n in names if n.endswith(f"/{attribute}")))]


def size_metrics() -> list[str]:
    return [
        f"{prefix}{CAPTION2BBOX}_{metric}_{size}"
        for metric in ("acc50", "miou")
        for size in SIZES
        for prefix in ("", "natural_")
    ]


def table(summary: dict[str, Any], title: str, metrics: list[str], scores: Scores) -> dict[str, Any]:
    """{"title", "heads": [what the metric is called, number of its columns], "columns": {"label", "number", "images"},
    "rows"} of the metrics that somebody has a value for; of those of the same answers only the first."""
    everybody = _everybody(summary)
    distinct: dict[Any, str] = {}  # one source may be all there is of a kind: show it once
    for metric in metrics:
        if any(metric in mean for _, _, _, mean, _ in everybody):
            distinct.setdefault((figure_name(metric)[1], _answers(metric, scores) or metric), metric)
    metrics = list(distinct.values())
    heads: list[list[Any]] = []
    for metric in metrics:
        called = figure_name(metric)[1] + (" (less is better)" if metric.endswith(LESS) else "")
        if heads and heads[-1][0] == called:
            heads[-1][1] += 1
        else:
            heads.append([called, 1])
    numbers, images, rows = _numbers(scores), _images(scores), []
    for label, css, key, mean, seeds in everybody:
        known = scores.get(key, {})
        cells = [_cell(metric, mean, seeds, known, images.get(metric)) for metric in metrics]
        if any(cell["text"] for cell in cells):
            rows.append({"who": label, "css": css, "cells": cells})
    columns = [
        {"label": figure_name(metric)[0], "number": numbers.get(metric), "images": images.get(metric)}
        for metric in metrics
    ]
    return {"title": title, "heads": heads, "columns": columns, "rows": rows}


def _everybody(
    summary: dict[str, Any],
) -> list[tuple[str, str, tuple[str, str], dict[str, float], list[dict[str, float]]]]:
    """(label, class, (stage, state), mean metrics, metrics of each seed) of every floor, control and state."""
    rows = [
        (FLOORS.get(name, name), "floor", ("", name), values, []) for name, values in summary["floors"].items()
    ]
    end: dict[str, float] = {}  # of the stage before, which a stage's "before" only repeats
    for stage, states in summary["mean"]["stages"].items():
        for state, (label, css) in STATES.items():
            if state in states and states[state] != end:
                seeds = [run["stages"][stage][state] for run in summary["runs"]]
                rows.append((label.format(stage_name(stage)), css, (stage, state), states[state], seeds))
        end = states.get("after", {})
    return rows


def _names(summary: dict[str, Any]) -> set[str]:
    """Of every metric that somebody has."""
    return {name for _, _, _, mean, _ in _everybody(summary) for name in mean}


def _numbers(scores: Scores) -> dict[str, int]:
    """How many answers each metric is of: everybody was asked the same questions."""
    return {name: len(values) for known in scores.values() for name, values in known.items()}


def _answers(metric: str, scores: Scores) -> tuple[Any, ...]:
    """Which answers of which states a metric is of; () where they are not known."""
    return tuple(
        (key, tuple(score.answer for score in known[metric])) for key, known in scores.items() if metric in known
    )


def _images(scores: Scores) -> dict[str, int]:
    """How many images each metric's answers are about."""
    return {name: len({score.image for score in values}) for known in scores.values() for name, values in known.items()}


def _cell(
    metric: str,
    mean: dict[str, float],
    seeds: list[dict[str, float]],
    scores: Mapping[str, list[Score]],
    images: int | None,
) -> dict[str, Any]:
    """A table cell: its text, its range over several seeds or its 95 % interval, the length of its bar in per cent
    (none where less is better), and what it is sorted by. images: how many its answers are about."""
    if metric not in mean:
        return {"text": "", "spread": "", "bar": 0, "value": ""}
    scale, digits = (1, 2) if metric.endswith("cider") else (100, 1)
    values = [seed[metric] for seed in seeds if metric in seed]
    if len(values) > 1:
        ends = (min(values), max(values))
    elif metric in scores:
        ends = interval(scores[metric], is_share(metric))
    else:  # a floor's single answers are not kept
        ends = wilson(mean[metric], images) if is_share(metric) and images else None
    full = 10 if metric.endswith("cider") else 1
    return {
        "text": f"{scale * mean[metric]:.{digits}f}",
        "spread": "{:.{d}f} to {:.{d}f}".format(*(scale * end for end in ends), d=digits) if ends else "",
        "bar": 0 if metric.endswith(LESS) else 100 * min(max(mean[metric] / full, 0.0), 1.0),
        "value": mean[metric],
    }
