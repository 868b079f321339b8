"""Learning curves of a run through its stages, drawn from metrics.jsonl: the paper's Figure 4 in small."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#d97706", "#15803d", "#b91c1c", "#64748b"

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


def smooth(values: list[float], share: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    average, weight, out = 0.0, 0.0, []
    for value in values:
        average, weight = share * average + (1 - share) * value, share * weight + (1 - share)
        out.append(average / weight)
    return out


def draw_curves(lines: list[dict[str, Any]], summary: dict[str, Any]) -> Figure:
    """A figure of four panels: loss of the answers; distillation loss and features; the first two of EVALUATIONS that
    were measured, which are those of conversations where there are no regions.

    `lines` are metrics.jsonl's objects: a training line has "loss", an evaluation line has metrics; those of an
    evaluation while a stage trains are lines of their own in the figure. Steps count from 1 in each stage; here the
    stages stand one after the other.
    """
    from matplotlib.figure import Figure

    # The blinded model's evaluations stand in the same file; they are dashed lines here.
    during = [line for line in lines if line.get("evaluation") == "during"]
    lines = [line for line in lines if line.get("evaluation", "after") in ("before", "after")]
    stages: dict[str, int] = {}  # name -> its last step, in order of appearance
    for line in [*lines, *during]:
        stages[line["stage"]] = max(stages.get(line["stage"], 0), line["step"])
    start, at = {}, 0
    for stage, steps in stages.items():
        start[stage], at = at, at + steps

    def series(key: str, stage: str, lines: list[dict[str, Any]] = lines) -> tuple[list[int], list[float]]:
        chosen = [line for line in lines if line["stage"] == stage and line.get(key) is not None]
        return [start[stage] + line["step"] for line in chosen], [line[key] for line in chosen]

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e2e8f0", linewidth=0.8)
        axis.set_xlim(0, max(at, 1))
        for i, (stage, first) in enumerate(start.items()):
            middle = (first + stages[stage] / 2) / max(at, 1)
            axis.axvspan(first, first + stages[stage], color="#f1f5f9" if i % 2 else "white", zorder=0)
            axis.text(
                middle, 1.01, stage, transform=axis.transAxes, ha="center", va="bottom", color=GREY, size=8
            )
        axis.set_xlabel("step, through all stages", size=8, color=GREY)
        axis.tick_params(labelsize=8)

    _losses(axes[0, 0], series, stages, during)
    _features(axes[0, 1], series, stages)
    measured = [evaluation for evaluation in EVALUATIONS if any(series(evaluation[1], stage)[0] for stage in stages)]
    for axis in axes[1, len(measured) :]:
        axis.set_visible(False)
    for axis, (title, metric, floors) in zip(axes[1], measured, strict=False):
        axis.set_title(title, size=10, loc="left", pad=16)
        for some, look in (
            (during, {"color": ORANGE, "linewidth": 1, "markersize": 2.5, "label": "a few questions, while it trains"}),
            (lines, {"color": BLUE, "markersize": 5, "label": "all questions", "clip_on": False}),
        ):
            points = [point for stage in stages for point in zip(*series(metric, stage, some), strict=True)]
            if points:
                axis.plot([step for step, _ in points], [100 * value for _, value in points], marker="o", **look)
        if any(metric in line for line in during):
            axis.legend(fontsize=7, frameon=False, loc="upper left")
        known = {label: summary["floors"].get(name, {}).get(metric) for name, label in floors.items()}
        known |= _controls(summary, metric)
        _dashed(axis, {label: 100 * value for label, value in known.items() if value is not None})
        axis.set_ylim(bottom=0)
    return figure


def _losses(axis: Axes, series: Any, stages: dict[str, int], during: list[dict[str, Any]]) -> None:
    axis.set_title("Loss of the answers", size=10, loc="left", pad=16)
    handles = {}
    for stage in stages:
        steps, values = series("loss_caption", stage)
        axis.plot(steps, values, color=BLUE, alpha=0.2, linewidth=0.8)
        handles["training"] = axis.plot(steps, smooth(values), color=BLUE, linewidth=1.6)[0]
        steps, values = series("held_out_loss", stage, during)
        if values:
            handles["held out"] = axis.plot(steps, values, color=ORANGE, linewidth=1.2, marker="o", markersize=3)[0]
    if "held out" in handles:
        axis.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, loc="upper right")
    axis.set_ylim(bottom=0)


def _features(axis: Axes, series: Any, stages: dict[str, int]) -> None:
    """Distillation loss on the left; on the right the features' effective rank and spread: learning or
    from shrinkage."""
    axis.set_title("Self-distillation", size=10, loc="left", pad=16)
    right = axis.twinx()
    right.spines["top"].set_visible(False)
    right.tick_params(labelsize=8)
    handles = {}
    for stage in stages:
        steps, values = series("loss_distill", stage)
        if any(values):
            axis.plot(steps, values, color=ORANGE, alpha=0.2, linewidth=0.8)
            handles["distillation loss"] = axis.plot(steps, smooth(values), color=ORANGE, linewidth=1.6)[0]
        for key, label, scale, colour in (
            ("features_effective_rank", "effective rank (right)", 1, GREEN),
            ("features_std", "10 x standard deviation (right)", 10, RED),
        ):
            steps, values = series(key, stage)
            if values:
                handles[label] = right.plot(steps, [scale * v for v in values], color=colour)[0]
    for side in (axis, right):
        side.set_ylim(0, 1.25 * side.get_ylim()[1])  # room for the legend
    if handles:
        axis.legend(handles.values(), handles.keys(), fontsize=7, frameon=False, loc="upper left", ncols=2)


def _controls(summary: dict[str, Any], metric: str) -> dict[str, float | None]:
    stages = summary["mean"]["stages"]
    stage = {"bbox2caption": "pretrain", "caption2bbox": "adapt"}.get(metric.partition("_")[0], "sft")
    blinded = stages.get(stage, {}).get("other_image", {})
    controls = {"another image shown": blinded.get(metric)}
    if metric.startswith("caption2bbox"):
        controls["control: random frozen encoder"] = stages.get("adapt", {}).get("control", {}).get(metric)
    return controls


def _dashed(axis: Axes, values: dict[str, float]) -> None:
    """One dashed line a floor, named at its right end; names that would collide are moved apart."""
    top = max([axis.get_ylim()[1], *(1.1 * v for v in values.values())])
    axis.set_ylim(0, top)
    last = -1.0  # height of the label below
    for label, value in sorted(values.items(), key=lambda item: item[1]):
        colour = RED if "control" in label or "another" in label else GREY
        axis.axhline(value, color=colour, linestyle="--", linewidth=1)
        place = max(value / top, last + 0.055)
        axis.text(
            1.01, place, f"{label} {value:.1f}", transform=axis.transAxes, va="center", size=7, color=colour
        )
        last = place
