"""How well RapidOCR, as `python -m granvit.data annotate` runs it, reads pages whose lines are known exactly.

    python bench/ocr.py [--pages 24] [--seed 0]         writes bench/results/ocr.json

The pages are PDF files drawn here (a letter, two columns, a table, in four embedded fonts) and read back by granvit's
own PDF source, whose boxes are those of the glyphs. A line is found where a box of RapidOCR has IoU >= 0.5 with its
own, one each; a line that isn't found counts as read as nothing. "sample pages" are the sample set's, whose papers have
colours, structure and stains.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas

from granvit.data.annotate import Annotator, RapidOcr
from granvit.data.build import build_dataset
from granvit.data.loader import GranDataset
from granvit.data.sample import texts
from granvit.data.sample.pages import draw_page
from granvit.data.sources.pdf import Pdf
from granvit.eval.metrics import box_iou, cer
from granvit.machine import commit, device_name

RESULTS = Path(__file__).parent / "results" / "ocr.json"
FONTS = {
    "DejaVu Sans": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf"),
    "DejaVu Serif": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSerif.ttf"),
    "DejaVu Sans Mono": ("matplotlib", "mpl-data/fonts/ttf/DejaVuSansMono.ttf"),
    "Caladea": ("font_caladea", "files/Caladea-Regular.ttf"),
}
WIDTH, HEIGHT, MARGIN = 420, 595, 40  # points: A5
LAYOUTS = ("letter", "columns", "table")


def draw(path: Path, pages: int, seed: int) -> None:
    """A PDF file of `pages` pages; layouts and fonts take turns, sizes are 8 to 14 points, in tables to 10."""
    for name, (package, file) in FONTS.items():
        pdfmetrics.registerFont(TTFont(name, Path(importlib.util.find_spec(package).origin).parent / file))
    canvas, rng = Canvas(str(path), (WIDTH, HEIGHT), invariant=1), np.random.default_rng(seed)
    for number in range(pages):
        font, layout = list(FONTS)[number % len(FONTS)], LAYOUTS[number % len(LAYOUTS)]
        size = float(rng.choice((8, 9, 10) if layout == "table" else (8, 9, 10, 11, 12, 14)))
        canvas.setFont(font, size)
        for x, y, text in _lines(layout, font, size, rng):
            canvas.drawString(x, HEIGHT - y, text)
        canvas.showPage()
    canvas.save()


def _lines(layout: str, font: str, size: float, rng: np.random.Generator) -> Iterator[tuple[float, float, str]]:
    pitch = 1.4 * size
    rows = np.arange(MARGIN + size, HEIGHT - MARGIN, pitch)
    if layout == "table":
        for y in rows:
            yield MARGIN, y, texts.item(rng)
            yield MARGIN + 170, y, texts.price(rng)
            yield MARGIN + 250, y, texts.date(rng)
        return
    columns = 2 if layout == "columns" else 1
    width = (WIDTH - 2 * MARGIN - 20 * (columns - 1)) / columns
    for column in range(columns):
        for y in rows:
            line = ""
            while pdfmetrics.stringWidth(more := f"{line} {texts.sentence(rng)}".strip(), font, size) <= width:
                line = more
            if line:
                yield MARGIN + column * (width + 20), y, line


def measure(pages: int, seed: int, dpi: float = 150) -> dict[str, Any]:
    """Draws, reads and compares. Rates are shares of all lines, or of all of the known text's characters."""
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder) / "pages.pdf", pages, seed)
        build_dataset(Pdf(f"{folder}/pages.pdf", dpi=dpi), Path(folder) / "out", workers=0)
        stored = GranDataset(Path(folder) / "out").rows
        rows = [stored[i] for i in range(len(stored))]
    annotator = Annotator(ocr=RapidOcr())
    annotator({"image": [Image.new("RGB", (64, 64))]})  # loads the models
    start = time.process_time()
    read = annotator({"image": [row["image"] for row in rows]})["regions"]
    seconds = time.process_time() - start
    kinds = defaultdict(lambda: {"truths": [], "answers": [], "found": [], "overlaps": [], "extra": 0})
    for row, regions in zip(rows, read, strict=True):
        index = int(row["id"][-4:]) - 1
        for kind in ("PDF pages", LAYOUTS[index % len(LAYOUTS)], list(FONTS)[index % len(FONTS)]):
            _compare(kinds[kind], row["regions"], regions)
    rng = np.random.default_rng(seed)
    drawn = [draw_page("test", rng, long_side=768) for _ in range(pages)]
    for page, regions in zip(drawn, annotator({"image": [page.image for page in drawn]})["regions"], strict=True):
        truths = [{"box": line.box, "caption": line.text} for line in page.lines]
        _compare(kinds["sample pages"], truths, regions)
    return {
        "pages": len(rows),
        "dpi": dpi,
        "seed": seed,
        "cpu_seconds_a_pdf_page": round(seconds / len(rows), 2),
        **{kind: _rates(one) for kind, one in kinds.items()},
    }


def _compare(kind: dict[str, Any], truths: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    overlap = np.array([[box_iou(np.array(t["box"]), np.array(a["box"])) for a in answers] for t in truths])
    overlap = overlap.reshape(len(truths), len(answers))
    taken: dict[int, int] = {}
    for flat in np.argsort(-overlap, axis=None, kind="stable"):
        truth, answer = divmod(int(flat), max(len(answers), 1))
        if overlap[truth, answer] < 0.5:
            break
        if truth not in taken and answer not in taken.values():
            taken[truth] = answer
    kind["truths"] += [one["caption"] for one in truths]
    kind["answers"] += [answers[taken[i]]["caption"] if i in taken else "" for i in range(len(truths))]
    kind["found"] += [i in taken for i in range(len(truths))]
    kind["overlaps"] += [overlap[i, j] for i, j in taken.items()]
    kind["extra"] += len(answers) - len(taken)


def _rates(kind: dict[str, Any]) -> dict[str, Any]:
    truths, answers, hits = kind["truths"], kind["answers"], kind["found"]
    pairs = [(truth, answer) for truth, answer, there in zip(truths, answers, hits, strict=True) if there]
    return {
        "lines": len(truths),
        "recall": round(sum(hits) / len(hits), 4),
        "precision": round(len(pairs) / max(len(pairs) + kind["extra"], 1), 4),
        "mean_iou_of_found": round(float(np.mean(kind["overlaps"])), 4) if pairs else None,
        "cer": round(cer(truths, answers), 4),
        "cer_of_found": round(cer(*map(list, zip(*pairs, strict=True))), 4) if pairs else None,
        "cer_without_spaces": round(cer(*([t.replace(" ", "") for t in side] for side in (truths, answers))), 4),
    }


def main(pages: int = 24, seed: int = 0) -> None:
    """Measure and keep the figures.

    Args:
        pages: Pages to draw.
        seed: Draws other texts.
    """
    names = ("rapidocr", "onnxruntime", "opencv-python-headless", "pypdfium2", "pillow", "numpy")
    figures = {
        "device": device_name(),
        "threads": 1,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "commit": commit(),
        **measure(pages, seed),
    }
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    tyro.cli(main)
