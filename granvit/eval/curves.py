"""Learning curves of a run through its stages, from metrics.jsonl: the paper's Figure 4 in small.

`panels` says what is drawn; the report's script and, for paper and README, `draw_curves` draw the same.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from granvit.eval.names import DURING, stage_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"blue": "#2563eb", "orange": "#d97706", "violet": "#7c3aed", "grey": "#64748b"}
POINTS = 1500  # a series has at most so many in a stage; of longer ones neighbours are averaged
FEW = 40  # points of a part that are marked one by one

# panel title, metric, floors drawn as dashed lines: name in summary["floors"] -> label
EVALUATIONS = (
    (
        "Captions of boxes: ROUGE-L (%)",
        "bbox2caption_rouge_l",
        {"most_frequent": "most frequent caption", "blind": "blind caption"},
    ),
    (
        "Boxes of sentences: ACC@0.5 (%)",
        "caption2bbox_acc50",
        {
            "mean_box": "mean box",
            "centre_box": "centre box",
            "whole_image": "whole image",
            "blind": "blind box",
        },
    ),
    ("Answers in conversations: tokens foreseen (%)", "chat_token_accuracy", {}),
)

# panel title, a training line's key, name of the series, whether it is so noisy that it is drawn smoothed
TRAINING = (
    ("Self-distillation: loss", "loss_distill", "training", True),
    ("Effective rank of the features", "features_effective_rank", "training images", False),
    ("Standard deviation of the features", "features_std", "training images", False),
    ("Gradient norm before clipping", "grad_norm", "training", True),
)

TRAINS, ENDS = "training", "ends"
KINDS = {None: TRAINS, DURING: DURING, "before": ENDS, "after": ENDS}
"""What a line is by its "evaluation"."""
METRICS = {metric for _, metric, _ in EVALUATIONS}  # shares, drawn as per cent
DRAWN = METRICS | {"loss_caption", "held_out_loss", "rate"} | {key for _, key, _, _ in TRAINING}


def smooth(values: list[float], share: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = share * average + (1 - share) * value, share * weight + (1 - share)
        out.append(average / weight)
    return out


def panels(lines: Iterable[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """What the curves show, as JSON can hold it: {"stages": [{"name", "start", "end"}], "panels": [{"title", "series",
    "levels"}]}.

    `lines` are metrics.jsonl's objects: a training line has "loss", an evaluation line has metrics; those of an
    evaluation while a stage trains are series of their own. Steps count from 1 in each stage; here the stages stand one
    after the other. A series has "name", "colour", "smooth" (whether it is noisy), "joined" (a curve, not single
    points) and "parts", a list of [step, value] for each stage; a level is a floor or a control: "name", "value".
    Panels without a series are left out.
    """
    steps, values = _columns(lines)
    start, at = {}, 0
    for stage, number in steps.items():
        start[stage], at = at, at + number
    rates = {stage: summary.get("config", {}).get(stage, {}).get("learning_rate", 1.0) for stage in steps}

    def series(name: str, key: str, kind: str, colour: str = "blue", **look: Any) -> dict[str, Any]:
        parts = []
        for stage in steps:
            points = np.array(values.get((kind, stage, key), ((), ())), float)  # [2, N]
            points[0] += start[stage]
            points[1] *= rates[stage] if key == "rate" else 100 if key in METRICS else 1
            points = points[:, np.isfinite(points[1])]
            if points.size and (key != "loss_distill" or points[1].any()):
                parts.append(_thinned(points))
        return {"name": name, "colour": colour, "smooth": False, "joined": True, "parts": parts} | look

    drawn = [("Loss of the answers (nats a token)", [
        series("training", "loss_caption", TRAINS, smooth=True),
        series("held out", "held_out_loss", DURING, "orange"),
    ], [])]  # fmt: skip
    for title, metric, floors in EVALUATIONS:
        known = {label: summary["floors"].get(name, {}).get(metric) for name, label in floors.items()}
        known |= _controls(summary, metric)
        levels = [{"name": name, "value": 100 * value} for name, value in known.items() if value is not None]
        few = series("a few questions, on the way", metric, DURING, "orange")
        drawn.append((title, [series("all test questions", metric, ENDS, joined=False), few], levels))
    drawn += [(title, [series(name, key, TRAINS, smooth=noisy)], []) for title, key, name, noisy in TRAINING]
    drawn.append(("Learning rate", [series("training", "rate", TRAINS)], []))
    return {
        "stages": [
            {"name": stage_name(stage), "start": start[stage], "end": start[stage] + number}
            for stage, number in steps.items()
        ],
        "panels": [
            {"title": title, "series": shown, "levels": levels}
            for title, several, levels in drawn
            if (shown := [series for series in several if series["parts"]])
        ],
    }


def _columns(lines: Iterable[dict[str, Any]]) -> tuple[dict[str, int], dict[tuple[str, str, str], tuple[array, array]]]:
    """{stage: its last step}, in order of appearance, and {(kind, stage, key): (steps, values)} of what is drawn: a
    long run's lines don't fit memory as objects."""
    steps: dict[str, int] = {}
    values: dict[tuple[str, str, str], tuple[array, array]] = {}
    for line in lines:
        # The blinded model's evaluations stand in the same file; they are levels.
        kind = KINDS.get(line.get("evaluation"))
        if kind is None:
            continue
        stage, step = line["stage"], line["step"]
        steps[stage] = max(steps.get(stage, 0), step)
        for key in DRAWN & line.keys():
            if line[key] is not None:
                column = values.setdefault((kind, stage, key), (array("d"), array("d")))
                column[0].append(step)
                column[1].append(line[key])
    return steps, values


def _thinned(points: np.ndarray) -> list[tuple[float, float]]:
    """At most POINTS of the points [2, N], each the mean of neighbours, in as many digits as are seen."""
    groups = np.array_split(points.T, min(POINTS, points.shape[1]))
    return [(round(float(step), 1), float(f"{value:.5g}")) for step, value in (group.mean(0) for group in groups)]


def _controls(summary: dict[str, Any], metric: str) -> dict[str, float | None]:
    stages = summary["mean"]["stages"]
    stage = {"bbox2caption": "pretrain", "caption2bbox": "adapt"}.get(metric.partition("_")[0], "sft")
    blinded = stages.get(stage, {}).get("other_image", {})
    controls = {"another image shown": blinded.get(metric)}
    if metric.startswith("caption2bbox"):
        controls["random frozen encoder"] = stages.get("adapt", {}).get("control", {}).get(metric)
    return controls


def draw_curves(curves: dict[str, Any]) -> Figure:
    """A figure of all `panels`, two a row."""
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(curves["panels"]) / 2))
    figure = Figure(figsize=(11, 3.1 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for axis, panel in zip(axes, curves["panels"], strict=False):
        _draw(axis, panel, curves["stages"])
    for axis in list(figure.axes)[len(curves["panels"]) :]:
        axis.set_visible(False)
    return figure


def _draw(axis: Axes, panel: dict[str, Any], stages: list[dict[str, Any]]) -> None:
    grey = COLOURS["grey"]
    axis.set_title(panel["title"], size=10, loc="left", pad=16)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    end = max([1, *(stage["end"] for stage in stages)])
    axis.set_xlim(0, end)
    for i, stage in enumerate(stages):
        axis.axvspan(stage["start"], stage["end"], color="#f1f5f9" if i % 2 else "white", zorder=0)
        middle = (stage["start"] + stage["end"]) / 2 / end
        place = {"transform": axis.transAxes, "ha": "center", "va": "bottom"}
        axis.text(middle, 1.01, stage["name"], color=grey, size=8, **place)
    axis.set_xlabel("step, through all stages", size=8, color=grey)
    axis.tick_params(labelsize=8)
    for series in panel["series"]:
        colour, label = COLOURS[series["colour"]], series["name"]
        parts = series["parts"] if series["joined"] else [sum(series["parts"], [])]
        for points in parts:
            steps, values = zip(*points, strict=True)
            if series["smooth"]:
                axis.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
                values = smooth(list(values))
            look = {"linewidth": 1.6} if series["joined"] else {"linestyle": "", "marker": "o", "markersize": 6}
            if series["joined"] and len(steps) <= FEW:
                look |= {"marker": "o", "markersize": 3}
            axis.plot(steps, values, color=colour, label=label, clip_on=False, zorder=3, **look)
            label = None
    levels = {level["name"]: level["value"] for level in panel["levels"]}
    values = [value for series in panel["series"] for part in series["parts"] for _, value in part]
    axis.set_ylim(bottom=1.05 * min(0.0, *values, *levels.values()))
    _dashed(axis, levels)
    if len(panel["series"]) > 1:
        axis.legend(fontsize=7, frameon=False)


def _dashed(axis: Axes, values: dict[str, float]) -> None:
    """One dashed line a level, named at its right end; names that would collide are moved apart."""
    low, top = axis.get_ylim()
    top = max([top, *(1.1 * v for v in values.values())])
    axis.set_ylim(low, top)
    last = -1.0  # height of the label below
    for label, value in sorted(values.items(), key=lambda item: item[1]):
        axis.axhline(value, color=COLOURS["grey"], linestyle="--", linewidth=1)
        height = max((value - low) / (top - low), last + 0.055)
        text = f"{label} {value:.1f}"
        axis.text(1.01, height, text, transform=axis.transAxes, va="center", size=7, color=COLOURS["grey"])
        last = height
