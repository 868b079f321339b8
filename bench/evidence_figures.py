"""The figures of docs/evidence.md, from bench/results/evidence.json: a dot is a seed, a line their mean. Called by
bench/readme.py. Titles and figures are those of the tables (evidence_tables.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import evidence_tables as tables
from evidence_tables import ALL, ENCODER, STEP, TABLES, Columns, Row, at, differences, probed, runs_of, with_pair
from evidence_variants import ONE_STEP, PART, PARTS, TOKENS, WHOLE, WIDE
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOUR, QUIET, GRID = "#3730a3", "#64748b", "#e2e8f0"
PANELS: Columns = {
    "a region's kind: linear probe\nof the encoder's features": ENCODER["kind, linear"],
    "captions that name\nthe kind right": ALL["kind"],
    "boxes with an IoU\nof 0.5 or more": ALL["boxes, ACC@0.5"],
}
SCALED = {name: 1 / variant.part for name, variant in PARTS["scaling"].items() if name != WIDE} | {WHOLE: 1.0}
"""{variant: its share of the images}."""


def draw(folder: Path) -> None:
    """Those for which there are rows, as evidence-NAME.png."""
    for name, make in FIGURES.items():
        if figure := make():
            figure.savefig(folder / f"evidence-{name}.png", dpi=110)


Line = tuple[str, Callable[[str], Sequence[float]]]
"""A label, and the values of each seed in the panel of a title."""


def dots(panels: Sequence[str], lines: Sequence[Line], unit: str, zero: bool = False) -> Figure | None:
    """A panel beside another, in each a line of dots for each label. zero: with a mark at 0."""
    if not lines:
        return None
    figure = Figure(figsize=(10, 1.1 + 0.24 * len(lines)), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(panels), sharey=True)
    for axis, panel in zip(axes, panels, strict=True):
        if zero:
            axis.axvline(0, color=QUIET, linewidth=1)
        for place, (_, values_of) in enumerate(lines):
            if values := values_of(panel):
                axis.plot(values, [place] * len(values), "o", color=COLOUR, markersize=4, alpha=0.6)
                axis.plot([fmean(values)] * 2, [place - 0.35, place + 0.35], color=COLOUR, linewidth=1.5)
        dress(axis, panel, unit)
        axis.grid(axis="x", color=GRID, linewidth=0.8)
    axes[0].set_ylim(len(lines) - 0.4, -0.6)
    axes[0].set_yticks(range(len(lines)), [label for label, _ in lines])
    return figure


def dress(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def of_table(name: str) -> Figure | None:
    """By how many points each variant of a table differs from the first."""
    measure, *others = TABLES[name][0]
    base = runs_of(measure)

    def line(rows: Sequence[Row]) -> Callable[[str], Sequence[float]]:
        return lambda panel: differences(rows, base, PANELS[panel])

    lines = [(variant, line(rows)) for variant in others if with_pair(rows := runs_of(variant), base)]
    held_to = "with right captions" if measure == PART else measure
    return dots(list(PANELS), lines, f"points more or less than {held_to}", zero=True)


def of_probe() -> Figure | None:
    """What a linear probe tells from features before and after stage 1, and from pixels."""
    lines: list[Line] = [
        (label if encoder == "pixels" else f"{vectors}, {label}", told(rows, encoder, grid))
        for vectors, label, rows, encoder, grid in probed()
        if rows
    ]
    return dots(["colour", "pattern", "kind"], lines, "per cent told right by a linear probe")


def told(rows: Sequence[Row], encoder: str, grid: str) -> Callable[[str], Sequence[float]]:
    return lambda what: percent(rows, at("encoder", encoder, f"{what} linear {grid}"))


def percent(rows: Sequence[Row], figure: tables.Figure) -> list[float]:
    return [100 * value for value in tables.figures(rows, figure)]


def of_one_step() -> Figure | None:
    """How many boxes are near enough, told token by token and in one step."""
    panels = {f"IoU of {title.removeprefix('boxes, ').removeprefix('ACC@')} or more": figure
              for title, figure in STEP.items() if "ACC@" in title}  # fmt: skip

    def line(rows: Sequence[Row]) -> Callable[[str], Sequence[float]]:
        return lambda panel: percent(rows, panels[panel])

    lines = [(variant, line(rows)) for variant in (TOKENS, ONE_STEP) if (rows := runs_of(variant))]
    return dots(list(panels), lines, "per cent of the boxes")


def of_scaling() -> Figure | None:
    """What is reached with more of the images, of the seeds that all of these have, and by a wider model with all."""
    runs = {share: rows for name, share in SCALED.items() if (rows := runs_of(name))}
    for rows in list(runs.values()):
        runs = {share: with_pair(others, rows) for share, others in runs.items()}
    if not runs.keys() - {1.0} or not all(runs.values()):
        return None
    figure = Figure(figsize=(10, 2.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, len(PANELS))
    for axis, (title, of) in zip(axes, PANELS.items(), strict=True):
        known = [(share, percent(rows, of)) for share, rows in runs.items()]
        for share, values in known:
            axis.plot([share] * len(values), values, "o", color=COLOUR, markersize=4, alpha=0.6)
        axis.plot([x for x, _ in known], [fmean(v) for _, v in known], color=COLOUR, linewidth=1.5)
        wide = percent(runs_of(WIDE), of)
        axis.plot([1.0] * len(wide), wide, "D", color="#c2410c", markersize=5, label=WIDE)
        if wide:
            axis.legend(fontsize=8, loc="lower right", frameon=False)
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(SCALED.values()), ["1/8", "1/4", "1/2", "all"])
        axis.set_ylim(0, 1.1 * max(wide + [value for _, values in known for value in values]))
        dress(axis, f"{title}, %", "of the training images")
        axis.grid(color=GRID, linewidth=0.8)
    return figure


FIGURES: dict[str, Callable[[], Figure | None]] = {
    "probe": of_probe,
    **{name: (lambda name=name: of_table(name)) for name in ("distillation", "questions", "tuned", "quality")},
    "scaling": of_scaling,
    "one-step": of_one_step,
}
