"""The tables and the figure of docs/evidence.md, from bench/results/evidence.json (bench/evidence.py). Called by
bench/readme.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from performance import RESULTS, markdown, spread

NOT_YET = "Not measured yet: `python bench/evidence.py`."
WHOLE = "the whole method"
RANDOM = "no stage 1: a random encoder"
Row = dict[str, Any]
Columns = dict[str, Callable[[Row], float | None]]
"""{title: a figure of a row, None where it has none}."""


def at(*keys: str) -> Callable[[Row], float | None]:
    """What lies in a row under keys within keys."""

    def value(row: Row) -> float | None:
        for key in keys:
            row = row.get(key, {})
        return row or None if isinstance(row, dict) else row

    return value


def share(part: str, whole: str) -> Callable[[Row], float | None]:
    """One of an audit's counts over another."""
    return lambda row: row["audit"][part] / row["audit"][whole] if "audit" in row else None


ENCODER: Columns = {
    "pattern, linear": at("encoder", "probe", "pattern linear 1x1"),
    "kind, linear": at("encoder", "probe", "kind linear 1x1"),
    "kind, neighbours": at("encoder", "probe", "kind knn 1x1"),
}
CAPTIONS: Columns = {
    "captions, ROUGE-L": at("adapt", "metrics", "natural_bbox2caption_rouge_l"),
    "exact": at("adapt", "metrics", "natural_bbox2caption_exact"),
}
BOXES: Columns = {
    "boxes, ACC@0.5": at("adapt", "metrics", "natural_caption2bbox_acc50"),
    "ACC@0.75": at("adapt", "metrics", "natural_caption2bbox_acc75"),
}
ALL = ENCODER | CAPTIONS | BOXES
ONE_STEP = BOXES | {
    "ACC@0.9": at("adapt", "metrics", "natural_caption2bbox_acc90"),
    "mean IoU": at("adapt", "metrics", "natural_caption2bbox_miou"),
    "no box": at("adapt", "metrics", "natural_caption2bbox_unparsed"),
    "captions, exact": CAPTIONS["exact"],
}
AUDIT: Columns = {
    "regions left out": share("left_out", "checked"),
    "wrong among them": share("wrong_left_out", "left_out"),
    "of all wrong ones": share("wrong_left_out", "wrong"),
}
PHOTOGRAPHS: Columns = {
    "captions, ROUGE-L": at("photographs", "bbox2caption_rouge_l"),
    "boxes, ACC@0.5": at("photographs", "caption2bbox_acc50"),
    "mean IoU": at("photographs", "caption2bbox_miou"),
}

TABLES: dict[str, tuple[tuple[str, ...], Columns]] = {
    "parts": ((WHOLE, RANDOM), ALL),
    "distillation": (
        (WHOLE, "no self-distillation", "lambda 0.3", "lambda 3", "alpha 0.9", "alpha 0.999",
         "crops as fine as the image"), ALL,
    ),
    "questions": (
        (WHOLE, "boxes as text", "boxes as text and region tokens", "no cell positions", "one question a sample"), ALL
    ),
    "tuned": ((WHOLE, "encoder tuned in stage 2"), ALL),
    "scaling": (("1/8 of the images", "1/4 of the images", "1/2 of the images", WHOLE, "four times as wide"), ALL),
    "one step": (("boxes token by token", "boxes in one step"), ONE_STEP),
    "quality": (
        ("1/4 of the images", "10 % wrong", "10 % wrong, audited", "30 % wrong", "30 % wrong, audited"), AUDIT | ALL
    ),
    "photographs": ((WHOLE, RANDOM), PHOTOGRAPHS),
}  # fmt: skip
"""{the name in the markers: (the variants, the columns)} of a table."""

GROUPS = {
    "stage 1": (WHOLE, RANDOM),
    "self-distillation": TABLES["distillation"][0][1:],
    "questions": TABLES["questions"][0][1:],
    "stage 2": (TABLES["tuned"][0][1],),
    "stage 2, twice as long": TABLES["one step"][0],
    "data and width": (*TABLES["scaling"][0][:3], TABLES["scaling"][0][4]),
    "captions, on 1/4 of the images": TABLES["quality"][0][1:],
}
"""{heading: its variants}: the figure's lines from top to bottom."""
PANELS: Columns = {
    "kind of a region, linear probe\nof the encoder's features": ENCODER["kind, linear"],
    "captions that are right\nword for word": CAPTIONS["exact"],
    "boxes with an IoU\nof 0.5 or more": BOXES["boxes, ACC@0.5"],
}


def kept(size: str = "small") -> list[Row]:
    """The rows of a size, with that of the data."""
    path = RESULTS / "evidence.json"
    return [row for row in json.loads(path.read_text()) if row["size"] == size] if path.exists() else []


def runs_of(variant: str) -> list[Row]:
    return [row for row in kept() if row["variant"] == variant]


def figures(rows: list[Row], figure: Callable[[Row], float | None]) -> list[float]:
    return [value for row in rows if (value := figure(row)) is not None]


def table(name: str) -> list[str]:
    """A line a variant: its seeds, and the mean and range of each figure."""
    variants, columns = TABLES[name]
    runs = {variant: rows for variant in variants if (rows := runs_of(variant))}
    if not runs:
        return [NOT_YET]
    lines = []
    for variant, rows in runs.items():
        cells = [spread(figures(rows, figure)) for figure in columns.values()]
        lines.append([variant, str(len(rows)), *cells])
    lines += [[label, "", *cells] for label, cells in CONTROLS.get(name, dict)().items()]
    rows = [row for rows in runs.values() for row in rows]
    devices, commits = (", ".join(sorted({row[key] for row in rows})) for key in ("device", "commit"))
    where = f"Mean of the seeds (lowest to highest): {devices}, commit {commits}, `python bench/evidence.py`."
    return [*markdown(["per cent", "seeds", *columns], lines), "", where]


def best(of: str, metric: str) -> str:
    """The best guess without the image."""
    known = [guess[metric] for row in runs_of("floors") for guess in row[of].values() if metric in guess]
    return spread(sorted(known)[-1:])


def guesses() -> dict[str, list[str]]:
    """What the box's plain pixels tell, and guesses without the image."""
    pixels = [figures(runs_of(RANDOM), at("encoder", "pixels", f"{what} 1x1"))[:1]
              for what in ("pattern linear", "kind linear", "kind knn")]  # fmt: skip
    metrics = ("bbox2caption_rouge_l", "bbox2caption_exact", "caption2bbox_acc50", "caption2bbox_acc75")
    return {
        "the mean colour of a box": [*map(spread, pixels), *[""] * len(metrics)],
        "best guess without the image": [""] * 3 + [best("floors", f"natural_{name}") for name in metrics],
    }


def guesses_of_photographs() -> dict[str, list[str]]:
    metrics = ("bbox2caption_rouge_l", "caption2bbox_acc50", "caption2bbox_miou")
    return {"best guess without the image": [best("floors_photographs", metric) for metric in metrics]}


CONTROLS = {"parts": guesses, "photographs": guesses_of_photographs}
"""{a table: what makes its further lines}."""


def regions() -> list[str]:
    """How much each model of the scaling table learnt from."""
    lines = []
    for variant in TABLES["scaling"][0]:
        for row in runs_of(variant)[:1]:
            seen = [row[stage]["regions_seen"] for stage in ("pretrain", "adapt")]
            lines.append([variant, *(f"{number:,}" for number in (row["regions"], *seen))])
    if not lines:
        return [NOT_YET]
    return markdown(["", "regions in the data", "learnt from in stage 1", "in stage 2"], lines)


def pace() -> list[str]:
    """What packing the questions saves."""
    paces = {stage: figures(runs_of("one question a sample"), at(f"{stage}_pace")) for stage in ("pretrain", "adapt")}
    if not paces["pretrain"]:
        return [NOT_YET]
    seen = [
        f"{fmean(figures(runs_of(name), at('pretrain', 'regions_seen'))):,.0f}"
        for name in (WHOLE, "one question a sample")
    ]
    return [
        f"A step of one question a sample takes {spread(paces['pretrain'], 1, 2)} of a packed one's CPU time in "
        f"stage 1, {spread(paces['adapt'], 1, 2)} in stage 2. In the time of {seen[0]} regions in stage 1 it learns "
        f"from {seen[1]}."
    ]


def speed() -> list[str]:
    """How fast boxes are told."""
    rows = runs_of("boxes in one step")
    ways = {way: figures(rows, at("boxes_a_second", way)) for way in ("one step", "token by token")}
    if not ways["one step"]:
        return [NOT_YET]
    ratio = [a / b for a, b in zip(*ways.values(), strict=True)]
    return [
        f"On one thread of the CPU, images encoded before: {spread(ways['one step'], 1, 0)} boxes a second in one "
        f"step, {spread(ways['token by token'], 1, 0)} token by token: {spread(ratio, 1, 2)} times as many."
    ]


def plot(path: Path) -> None:
    """Three figures of every variant: a dot a seed, a line their mean, and a band from the whole method's lowest seed
    to its highest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines: list[tuple[str, str | None]] = []  # a heading, or a variant's name twice
    for heading, variants in GROUPS.items():
        measured = [(variant, variant) for variant in variants if runs_of(variant)]
        lines += [(heading, None), *measured] if measured else []
    if not lines:
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 0.9 + 0.2 * len(lines)), sharey=True, layout="constrained")
    for axis, (title, of) in zip(axes, PANELS.items(), strict=True):
        whole = [100 * value for value in figures(runs_of(WHOLE), of)]
        if whole:
            axis.axvspan(min(whole), max(whole), color="#c7d2fe", linewidth=0)
        for place, (_, variant) in enumerate(lines):
            if variant is None:
                continue
            values = [100 * value for value in figures(runs_of(variant), of)]
            axis.plot(values, [place] * len(values), "o", color="#3730a3", markersize=4, alpha=0.8)
            if values:
                axis.plot([fmean(values)] * 2, [place - 0.35, place + 0.35], color="#3730a3", linewidth=1.5)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("per cent", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", color="#e2e8f0", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(len(lines) - 0.3, -0.7)
    for label, (_, variant) in zip(
        axes[0].set_yticks(range(len(lines)), [label for label, _ in lines], fontsize=8), lines, strict=True
    ):
        label.label1.set_fontweight("normal" if variant else "bold")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
