"""Pictures of a dataset's numbers, transparent and in colours that are read on white and on black."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)
import numpy as np  # noqa: E402
from markupsafe import Markup  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # noqa: E402

from granvit.audit.statistics import Statistics  # noqa: E402
from granvit.data.page import encoded  # noqa: E402
from granvit.eval.names import KINDS  # noqa: E402

INK, COLOURS = "#7c8aa0", {"natural": "#3b82f6", "ocr": "#f59e0b", "image": "#22c55e"}
NAMES = KINDS | {"image": "pictures"}


def draw_plots(statistics: Statistics) -> list[tuple[str, Markup]]:
    """(what it shows, PNG as a data: URI) of each plot that there is something for."""
    sides = {kind: np.array(values).reshape(-1, 2) for kind, values in statistics.sides.items()}
    short = {kind: side.min(1) for kind, side in sides.items() if len(side)}
    aspects = {kind: side[:, 0] / side[:, 1] for kind, side in sides.items() if len(side)}
    plots = (
        ("Regions of a picture", "regions", "pictures", {"image": statistics.regions_of}, _whole),
        ("Sizes of pictures", "short side, pixels", "pictures", {"image": [min(s) for s in statistics.sizes]}, _log),
        ("Sizes of boxes", "short side, pixels", "boxes", short, _log),
        ("Shapes of boxes", "width / height", "boxes", aspects, _log),
        ("Lengths of captions", "words", "captions", statistics.lengths, _whole),
    )
    drawn = [
        (title, _histogram(values, bins, across, up))
        for title, across, up, values, bins in plots
        if any(map(len, values.values()))
    ]
    boxes = np.array([box for kind in statistics.boxes.values() for box in kind]).reshape(-1, 4)
    if len(boxes):
        drawn.append(("Centres of boxes in their pictures", _map(boxes)))
    return drawn


def _whole(values: np.ndarray) -> np.ndarray:
    """Bins for counts: one each, up to 40, and the few largest values in the last."""
    top = max(5, int(np.quantile(values, 0.995)))
    return np.arange(-0.5, top + 1.5, max(1, round(top / 40)))


def _log(values: np.ndarray) -> np.ndarray:
    low, high = np.quantile(values, (0.001, 0.999))
    return np.geomspace(low / 1.1, high * 1.1, 41)


def _histogram(
    groups: dict[str, Iterable[float]], bins: Callable[[np.ndarray], np.ndarray], across: str, up: str
) -> Markup:
    groups = {name: np.asarray(values, float) for name, values in groups.items() if len(values)}
    edges = bins(np.concatenate(list(groups.values())))

    def draw(axis: Axes) -> None:
        for name, values in groups.items():
            axis.hist(np.clip(values, edges[0], edges[-1]), edges, color=COLOURS[name], alpha=0.65, label=NAMES[name])
        if bins is _log:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        if len(groups) > 1:
            axis.legend(fontsize=8, frameon=False, labelcolor=INK)

    return _drawn(draw, across, up)


def _map(boxes: np.ndarray) -> Markup:
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2

    def draw(axis: Axes) -> None:
        axis.hist2d(*centres.T, bins=24, range=((0, 1), (0, 1)), cmap="viridis")
        axis.invert_yaxis()

    return _drawn(draw, "share of the width", "share of the height")


def _drawn(draw: Callable[[Axes], None], across: str, up: str) -> Markup:
    figure, axis = plt.subplots(figsize=(3.6, 2.3), layout="constrained")
    draw(axis)
    axis.set_xlabel(across, size=8, color=INK)
    axis.set_ylabel(up, size=8, color=INK)
    axis.tick_params(labelsize=8, colors=INK, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["bottom", "left"]].set_color(INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=200, transparent=True)
    plt.close(figure)
    return encoded(buffer.getvalue(), "png")
