"""A picture of a model's answers about test images, drawn by lot: right and wrong stand in their true shares."""

from __future__ import annotations

import io
import random
import textwrap
import warnings
from typing import TYPE_CHECKING

from PIL import Image

from granvit.data.loader import GranDataset
from granvit.eval.metrics import Prediction, place
from granvit.eval.pictures import open_pictures
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = 6  # of each task
TRUTH, ANSWER = "#16a34a", "#ea580c"


def draw_answers(predictions: list[Prediction], test: GranDataset) -> Image.Image:
    """Captions of boxes in the first row and boxes of sentences in the second, some of each. A box that was asked about
    or is right is green, the answered one is orange. predictions: of images of `test`.

    Raises ValueError where there is no prediction.
    """
    from matplotlib.figure import Figure

    tasks = [[p for p in predictions if p["task"] == task] for task in (BBOX2CAPTION, CAPTION2BBOX)]
    rows = [random.Random(0).sample(asked, min(DRAWN, len(asked))) for asked in tasks if asked]
    if not rows:
        raise ValueError("there is no prediction to draw")
    pictures = open_pictures(test, {place(p) for row in rows for p in row})
    figure = Figure(figsize=(2.4 * DRAWN, 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), DRAWN, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row, some in zip(axes, rows, strict=True):
        for axis, prediction in zip(row, some, strict=False):
            _draw(axis, prediction, pictures[place(prediction)])
    return rendered(figure)


def rendered(figure: Figure) -> Image.Image:
    """A figure of matplotlib's as an RGB picture."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that its font lacks
        figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")


def _draw(axis: Axes, prediction: Prediction, picture: Image.Image) -> None:
    axis.imshow(picture)
    boxes = prediction["task"] == CAPTION2BBOX
    for box, colour in ((prediction["box"], TRUTH), (prediction["predicted_box"] if boxes else None, ANSWER)):
        if box:
            x1, y1, x2, y2 = (v * side for v, side in zip(box, 2 * picture.size, strict=True))
            axis.add_patch(_rectangle(x1, y1, x2, y2, colour))
    said = [f"asked: {prediction['caption']}"] if boxes else [f"true: {prediction['caption']}"]
    if not boxes or not prediction["predicted_box"]:
        said.append(f"answer: {prediction['answer']}")
    lines = [line for text in said for line in textwrap.wrap(text, 34)[:2]]
    axis.set_title("\n".join(lines), size=7, loc="left", parse_math=False)


def _rectangle(x1: float, y1: float, x2: float, y2: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5, clip_on=True)
