"""The picture of a probe: bars by encoder with their intervals, and the regions nearest to some regions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from granvit.data.loader import GranDataset

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#94a3b8", "#2563eb", "#d97706", "#15803d", "#b91c1c", "#7c3aed", "#0891b2", "#be185d")
INK, RIGHT, HALF, WRONG = "#64748b", "#15803d", "#f59e0b", "#b91c1c"
BARS = {"linear_top1": "linear", "knn_top1": "kNN", "retrieval_r1": "R@1", "retrieval_map": "mAP"}
CROP = 96  # pixels of a region's longer side
LONGEST = 24  # letters of a name


def draw(result: dict[str, Any], test: GranDataset) -> Figure:
    """A figure of what `probe` returned. test: the split that it asked about, from which the regions are cut.

    ValueError for a row that can't be read any more.
    """
    from matplotlib.figure import Figure

    targets, encoders = list(result["targets"]), [encoder["name"] for encoder in result["encoders"]]
    nearest = result["nearest"]
    height = 2.6 * len(targets) + 0.72 * len(encoders) * len(nearest["queries"]) / 2 + 0.8
    figure = Figure(figsize=(11, height), layout="constrained", facecolor="white")
    above, below = figure.subfigures(
        2, 1, height_ratios=(2.6 * len(targets), height - 2.6 * len(targets)), hspace=0.02
    )
    axes = above.subplots(len(targets), 1, squeeze=False)[:, 0]
    for axis, target in zip(axes, targets, strict=True):
        _bars(axis, result, target, encoders)
    handles, names = axes[0].get_legend_handles_labels()
    legend = above.legend(handles, names, loc="outside upper center", ncols=min(5, len(names)), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _regions(below, nearest, encoders, test)
    return figure


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"


def _bars(axis: Axes, result: dict[str, Any], target: str, encoders: list[str]) -> None:
    """A group for each grid and metric, a bar for each encoder; a dashed line across a group is chance."""
    rows = {(row["encoder"], row["grid"]): row for row in result["rows"] if row["target"] == target}
    grids = list(dict.fromkeys(grid for _, grid in rows))
    groups = [(metric, grid) for metric in BARS for grid in grids]
    width = 0.8 / len(encoders)
    for i, name in enumerate(encoders):
        at = [group + (i - (len(encoders) - 1) / 2) * width for group in range(len(groups))]
        values, errors = [], ([], [])
        for metric, grid in groups:
            row = rows[name, grid]
            value = row["metrics"].get(metric, 0.0)
            low, high = row["intervals"].get(metric, (value, value))
            values.append(100 * value)
            errors[0].append(100 * max(0.0, value - low))
            errors[1].append(100 * max(0.0, high - value))
        axis.bar(
            at, values, width, color=COLOURS[i % len(COLOURS)], yerr=errors, label=short(name),
            error_kw={"ecolor": "#1e293b", "elinewidth": 0.9, "capsize": 1.5},
        )  # fmt: skip
    for place, (metric, _) in enumerate(groups):
        level = 100 * result["chance"][target].get(metric, 0.0)
        axis.hlines(level, place - 0.45, place + 0.45, color="#1e293b", linestyle="--", linewidth=1)
    about = result["targets"][target]
    title = f"{target}: {len(about['classes'])} classes, {about['test']:,} regions (%; dashed: chance)"
    axis.set_title(title, size=10, loc="left", parse_math=False)
    axis.set_xticks(range(len(groups)), [f"{BARS[metric]} {grid}" for metric, grid in groups], size=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_ylim(0, 100)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axis.set_axisbelow(True)


def _regions(figure: Any, nearest: dict[str, Any], encoders: list[str], test: GranDataset) -> None:
    """Two queries side by side, under each other the next two: the region, and what each encoder finds nearest."""
    queries, by_encoder = nearest["queries"], nearest["by_encoder"]
    across, cells = 2, 1 + max(len(row) for rows in by_encoder.values() for row in rows)
    down = -(-len(queries) // across)
    axes = figure.subplots(down * len(encoders), across * (cells + 1), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for number, query in enumerate(queries):
        top, left = number // across * len(encoders), number % across * (cells + 1)
        for i, name in enumerate(encoders):
            label = axes[top + i, left]
            label.text(
                1.0, 0.5, short(name), ha="right", va="center", size=7, color=INK, transform=label.transAxes,
                parse_math=False,
            )  # fmt: skip
            row = axes[top + i, left + 1 :]
            if i == 0:
                _show(row[0], query, test, INK)
                row[0].set_title(short(" ".join(query["labels"].values())), size=8, color=INK, parse_math=False)
            for axis, region in zip(row[1:], by_encoder[name][number], strict=False):
                same = [region["labels"].get(name) == label for name, label in query["labels"].items()]
                _show(axis, region, test, RIGHT if all(same) else HALF if any(same) else WRONG)
    figure.suptitle(
        f"Regions of other images nearest to one drawn by lot, by {nearest['grid']} features. Green: all labels as its "
        "own, orange: some, red: none",
        size=10, x=0.01, ha="left",
    )  # fmt: skip


def _show(axis: Axes, region: dict[str, Any], test: GranDataset, colour: str) -> None:
    """A region's crop, with a frame."""
    from PIL import Image

    sample = test[region["row"]]
    if sample is None:
        raise ValueError(f"{test.name(region['row'])} can't be read any more")
    height, width = sample.image.shape[:2]
    x1, y1, x2, y2 = region["box"]
    crop = Image.fromarray(sample.image.numpy()).crop(
        (int(x1 * width), int(y1 * height), max(int(x1 * width) + 1, round(x2 * width)),
         max(int(y1 * height) + 1, round(y2 * height)))
    )  # fmt: skip
    scale = CROP / max(crop.size)
    axis.imshow(crop.resize([max(1, round(side * scale)) for side in crop.size], Image.Resampling.BICUBIC))
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2)
