"""The page about a dataset.

`audit` writes OUTPUT/index.html, one file that needs no other, and OUTPUT/audit.json with its numbers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup
from PIL import Image, ImageDraw

from granvit.data.loader import open_rows, spread
from granvit.data.page import data_uri, render
from granvit.data.parallel import progress
from granvit.data.schema import good_or_none, parse_row
from granvit.data.writer import whole_folder
from granvit.eval.names import KINDS, source_name
from granvit.questions.prompts import Box
from granvit.questions.schema import Region, Sample

SOURCES = 50
"""Sources that the page's table has, those of the most rows; audit.json has all."""
CARDS = 48
"""Random regions, and doubtful ones, that the page shows."""
DOUBTS = 1000
"""Doubtful regions that audit.json names."""
THUMBNAIL, WHOLE = 240, 480  # pixels of a card's picture, and of the whole one that a click opens
GREEN, RED = (34, 197, 94), (239, 68, 68)


def audit(
    data: str | Path,
    output: str | Path,
    split: str = "train",
    model: str | Path | None = None,
    images: int | None = 10_000,
    checked_images: int = 500,
    device: str = "cpu",
    workers: int | None = None,
) -> dict[str, Any]:
    """Write a page about a split to the new or empty folder `output`; returns what stands in audit.json.

    images: how many rows are looked at, spread evenly over the split (None: all). model: a run's or a model's folder;
    it checks the regions of `checked_images` of them on `device` (see granvit.audit.cycle). workers: processes.
    Faulty rows are counted. Raises ValueError for a folder that is no dataset or no model, or has something in it.
    """
    from granvit.audit.plots import draw_plots
    from granvit.audit.statistics import count

    for name, number in (("images", images), ("checked_images", checked_images)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    with whole_folder(output) as folder:
        rows = open_rows(str(data), split)
        if model is not None:  # what is wrong with it is said before the work
            from granvit.eval.loading import load_model

            loaded = load_model(model, device)
        chosen = spread(len(rows), images)
        statistics = count(data, split, chosen, workers)
        result = {"data": str(data), "split": split, "rows": len(rows), "numbers": statistics.numbers()}
        values = {"plots": draw_plots(statistics), "regions": _random_regions(rows, chosen), "model": model}
        if model is not None:
            doubts = _check(*loaded, rows, [chosen[i] for i in spread(len(chosen), checked_images)])
            scores = [doubt["score"] for doubt in doubts if doubt["score"] is not None]
            result |= {
                "model": str(model), "checked": len(doubts), "mean_score": fmean(scores) if scores else None,
                "below": sum(score < 0 for score in scores), "doubts": doubts[:DOUBTS],
            }  # fmt: skip
            values["doubts"] = [
                card for card in (_doubt(rows, doubt) for doubt in doubts[: len(scores)][:CARDS]) if card
            ]
        (folder / "audit.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        title = f"Audit of {Path(data).name}"
        shown = [(source_name(name), of) for name, of in result["numbers"]["sources"].items()][:SOURCES]
        html = render("audit.html", "granvit.audit", title=title, sources=shown, **{**result, **values})
        (folder / "index.html").write_text(html, encoding="utf-8")
    return result


def _check(model: Any, processor: Any, rows: Any, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Every region of the chosen rows, the most doubtful first, those that could not be scored last."""
    from granvit.audit.cycle import IMAGES, check_regions

    places: list[int] = []  # rows of the samples that the model was given

    def good() -> Iterator[Sample]:
        for number in chosen:
            if (sample := _sample(rows, number)) is not None:
                places.append(number)
                yield sample

    groups = progress(check_regions(model, processor, good()), "Checking captions", -(-len(chosen) // IMAGES))
    checks = [check for group in groups for check in group]
    checks.sort(key=lambda check: (isnan(check.score), check.score))
    return [
        {
            "row": places[check.row], "region": check.place, "score": _number(check.score),
            "box": list(check.region.box), "caption": check.region.caption[:1000], "kind": check.region.kind,
            "said": check.said, "found": check.found,
            "parts": {name: _number(value) for name, value in check.parts.items()},
        }
        for check in checks
    ]  # fmt: skip


def _number(value: float) -> float | None:
    """As JSON has it, which knows no NaN."""
    return None if isnan(value) else value


def _random_regions(rows: Any, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """Cards of CARDS regions, of images drawn at random (seeded), one or more an image."""
    draw = random.Random(0)
    cards: list[dict[str, Any]] = []
    for number in draw.sample(chosen, min(4 * CARDS, len(chosen))):
        if len(cards) == CARDS:
            break
        sample = _sample(rows, number)
        if sample is not None and sample.regions:
            cards.append(_card(sample, draw.choice(sample.regions)))
    return cards


def _card(sample: Sample, region: Region) -> dict[str, Any]:
    """A region with half its size around it, and its box drawn; and the whole picture."""
    picture = Image.fromarray(sample.image.numpy())
    x1, y1, x2, y2 = (v * side for v, side in zip(region.box, picture.size * 2, strict=True))
    margin = 0.25 * max(x2 - x1, y2 - y1) + 4
    corner = (max(0, round(x1 - margin)), max(0, round(y1 - margin)))
    end = (min(picture.width, round(x2 + margin)), min(picture.height, round(y2 + margin)))
    crop = _scaled(picture.crop((*corner, *end)), THUMBNAIL)
    scale = crop.width / (end[0] - corner[0]), crop.height / (end[1] - corner[1])
    box = [(v - at) * by for v, at, by in zip((x1, y1, x2, y2), corner * 2, scale * 2, strict=True)]
    return {
        "picture": data_uri(_outlined(crop, box, GREEN), THUMBNAIL), "whole": _whole(picture, {GREEN: region.box}),
        "caption": region.caption, "kind": KINDS[region.kind], "size": (round(x2 - x1), round(y2 - y1)),
        "id": sample.id, "source": source_name(sample.source),
    }  # fmt: skip


def _doubt(rows: Any, doubt: dict[str, Any]) -> dict[str, Any] | None:
    """A whole picture with the box of the dataset and the one that the model finds."""
    sample = _sample(rows, doubt["row"])
    if sample is None:
        return None
    picture = Image.fromarray(sample.image.numpy())
    boxes = {GREEN: doubt["box"], RED: doubt["found"]}
    shown = {"picture": _whole(picture, boxes, THUMBNAIL), "whole": _whole(picture, boxes)}
    return doubt | shown | {"id": sample.id, "source": source_name(sample.source)}


def _whole(picture: Image.Image, boxes: dict[tuple[int, int, int], Box | None], long_side: int = WHOLE) -> Markup:
    """A picture with relative xyxy boxes drawn in their colours, as a data: URI."""
    picture = _scaled(picture, long_side)
    for colour, box in boxes.items():
        if box:
            sides = [v * side for v, side in zip(box, picture.size * 2, strict=True)]
            picture = _outlined(picture, sides, colour)
    return data_uri(picture, long_side, quality=72)


def _scaled(picture: Image.Image, long_side: int) -> Image.Image:
    """Brought to so many pixels on the long side; a small one is enlarged, so that a line is a line."""
    scale = long_side / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(size, Image.Resampling.BICUBIC)


def _outlined(picture: Image.Image, box: list[float], colour: tuple[int, int, int]) -> Image.Image:
    """A line around xyxy in pixels, on a dark one: it is seen on any picture."""
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    x1, y1, x2, y2 = (min(max(v, 0), side - 1) for v, side in zip(box, picture.size * 2, strict=True))
    pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=(15, 23, 42), width=4)
    pen.rectangle((x1, y1, max(x1, x2), max(y1, y2)), outline=colour, width=2)
    return picture


def _sample(rows: Any, number: int) -> Sample | None:
    """A row without its faulty regions, None where it is faulty itself; the statistics have counted both."""
    return good_or_none(lambda note: parse_row(rows[number], note), lambda fault: None)
