"""A run's report: runs/NAME/report/index.html, one self-contained file with curves, tables and pictures.

Drawn from the run's metrics.jsonl, report/summary.json and report/predictions.json; the pictures come from
the data set that summary.json names. Captions and answers are text from outside: Jinja escapes every value.
"""

from __future__ import annotations

import io
import json
import random
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from granvit.data.mixture import open_split
from granvit.data.page import encoded
from granvit.eval.curves import draw_curves
from granvit.eval.metrics import SIZES, Prediction, exact, iou, is_attribute, rouge_l
from granvit.eval.names import FLOORS, STAGES, STATES, stage_name
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

PICTURES = 4  # right ones and wrong ones a source and task
LONG_SIDE = 480  # pixels of a picture in the report

TABLES = (
    ("Captions of boxes", BBOX2CAPTION, (("ROUGE-L", "rouge_l"), ("exact", "exact"), ("CIDEr", "cider"))),
    (
        "Boxes of sentences",
        CAPTION2BBOX,
        (
            ("ACC@0.5", "acc50"), ("ACC@0.75", "acc75"), ("ACC@0.9", "acc90"), ("mean IoU", "miou"),
            ("mean F1", "f1"), ("unparsed", "unparsed"),
        ),
    ),
)


def write_report(run_dir: str | Path) -> Path:
    """Render a run's report/index.html (and report/curves.png) and return its path.

    Of a run of several seeds, which has a folder seed-N for each, curves and pictures are the first one's and
    the figures the means. ValueError naming the first of metrics.jsonl, report/summary.json and
    report/predictions.json (but where there are no floors: nothing was asked of regions) that is missing.
    """
    run = Path(run_dir)
    report = run / "report"
    seeds = sorted(int(folder.name.removeprefix("seed-")) for folder in run.glob("seed-*"))
    first = run / f"seed-{seeds[0]}" if seeds else run

    def text(path: Path) -> str:
        if not path.is_file():
            raise ValueError(f"{run} is no finished run: {path.relative_to(run)} is missing")
        return path.read_text()

    lines = [json.loads(line) for line in text(first / "metrics.jsonl").splitlines()]
    summary = json.loads(text(report / "summary.json"))
    predictions = json.loads(text(first / "report" / "predictions.json")) if summary["floors"] else {}

    draw_curves(lines, summary).savefig(report / "curves.png", dpi=150)

    chosen = choose(predictions)
    shown = {_place(p) for group in chosen for p in group["predictions"]}
    images = _images(summary["data"]["path"], shown) if shown else {}
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files("granvit.eval").joinpath("report.html").read_text(encoding="utf-8")
    )
    html = template.render(
        name=run.resolve().name,
        summary=summary,
        headlines=headlines(summary),
        curves=encoded((report / "curves.png").read_bytes(), "png"),
        tables=[table(summary, *spec) for spec in TABLES] + [
            attribute_table(summary), size_table(summary), text_table(summary), chat_table(summary),
        ],
        features=summary["mean"].get("features", {}),
        groups=[group | {"cards": [_card(p, images) for p in group["predictions"]]} for group in chosen],
    )
    page = report / "index.html"
    page.write_text(html, encoding="utf-8")
    return page


def headlines(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """The claims of the stages that there were, each beside what it is to be measured against (in per cent)."""
    pretrain, adapt, sft = (summary["mean"]["stages"].get(name, {}) for name in ("pretrain", "adapt", "sft"))
    before = ("end of stage 1", pretrain["after"]) if pretrain else ("before stage 2", adapt.get("before", {}))
    claims = (
        ("Captions of boxes after stage 1", "ROUGE-L", "bbox2caption_rouge_l", pretrain.get("after", {}), (
            ("blind floor", summary["floors"].get("blind", {})),
            ("before stage 1", summary["mean"]["stages"].get("align", {}).get("after", {})),
            ("another image", pretrain.get("other_image", {})),
            ("text alone", pretrain.get("text_only", {})),
        )),
        ("Boxes of sentences after stage 2", "ACC@0.5", "caption2bbox_acc50", adapt.get("after", {}), (
            before,
            ("random encoder", adapt.get("control", {})),
            ("another image", adapt.get("other_image", {})),
            ("text alone", adapt.get("text_only", {})),
        )),
        ("Captions of boxes after stage 2", "ROUGE-L", "bbox2caption_rouge_l", adapt.get("after", {}), (before,)),
        ("Answers in conversations after stage 3", "of tokens", "chat_token_accuracy", sft.get("after", {}), (
            ("before stage 3", sft.get("before", {})),
            ("another image", sft.get("other_image", {})),
        )),
    )  # fmt: skip
    claimed = []
    for title, unit, metric, model, references in claims:
        if metric not in model:
            continue
        value = 100 * model[metric]
        against = [
            {"who": who, "value": 100 * metrics[metric], "distance": value - 100 * metrics[metric]}
            for who, metrics in references
            if metric in metrics
        ]
        claimed.append({"title": title, "unit": unit, "value": value, "against": against})
    return claimed


def _everybody(summary: dict[str, Any]) -> list[tuple[str, str, dict[str, float], list[dict[str, float]]]]:
    """(label, class, mean metrics, metrics of each seed) of every floor, control and state of the model."""
    rows = [(FLOORS.get(name, name), "floor", values, []) for name, values in summary["floors"].items()]
    end: dict[str, float] = {}  # of the stage before, which a stage's "before" only repeats
    for stage, states in summary["mean"]["stages"].items():
        for state, (label, css) in STATES.items():
            if state in states and states[state] != end:
                seeds = [run["stages"][stage][state] for run in summary["runs"]]
                rows.append((label.format(stage_name(stage)), css, states[state], seeds))
        end = states.get("after", {})
    return rows


def _rows(summary: dict[str, Any], columns: list[tuple[str, str, str]]) -> list[dict[str, Any]]:
    rows = []
    for label, css, mean, seeds in _everybody(summary):
        cells = [_cell(metric, mean, seeds) for _, _, metric in columns]
        if any(cell["text"] for cell in cells):
            rows.append({"who": label, "css": css, "cells": cells})
    return rows


def _cell(metric: str, mean: dict[str, float], seeds: list[dict[str, float]]) -> dict[str, Any]:
    """A table cell: its text, its spread over several seeds, and the length of its bar in per cent."""
    if metric not in mean:
        return {"text": "", "spread": "", "bar": 0}
    is_cider = metric.endswith("cider")
    scale, digits = (1, 2) if is_cider else (100, 1)
    values = [scale * seed[metric] for seed in seeds if metric in seed]
    spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}" if len(values) > 1 else ""
    bar = mean[metric] / 10 if is_cider else mean[metric]
    return {
        "text": f"{scale * mean[metric]:.{digits}f}",
        "spread": spread,
        "bar": 100 * min(max(bar, 0.0), 1.0),
    }


def table(
    summary: dict[str, Any], title: str, task: str, metrics: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    """A task's table: who answered, by the first metric for every kind and source, then by the others."""
    names = {name for _, _, mean, _ in _everybody(summary) for name in mean}
    (first_label, first), *rest = metrics
    sources = sorted(n.split("/")[0] for n in names if n.endswith(f"/{task}_{first}"))
    prefixes = {"all": "", "not text": "natural_", "text": "ocr_"} | {
        source: f"{source}/" for source in sources
    }
    columns = [(first_label, label, f"{prefix}{task}_{first}") for label, prefix in prefixes.items()]
    columns += [(label, "all", f"{task}_{metric}") for label, metric in rest]
    return _table(summary, title, [c for c in columns if c[2] in names])


def attribute_table(summary: dict[str, Any]) -> dict[str, Any]:
    """The words of captions that name an attribute right, over all sources that have a vocabulary."""
    names = {name for _, _, mean, _ in _everybody(summary) for name in mean if is_attribute(name)}
    own = sorted(name for name in names if name.startswith(BBOX2CAPTION))
    columns = [
        (name.rpartition("_")[2], source or "all", f"{source}/{name}" if source else name)
        for name in own
        for source in ("", *sorted({name.partition("/")[0] for name in names if "/" in name}))
    ]
    columns = [column for column in columns if column[2] in names]
    return _table(summary, "Attributes that captions of boxes name right", columns)


def size_table(summary: dict[str, Any]) -> dict[str, Any]:
    names = {name for _, _, mean, _ in _everybody(summary) for name in mean}
    columns = [
        (f"{size}: {what}", label, f"{prefix}{CAPTION2BBOX}_{metric}_{size}")
        for what, metric in (("ACC@0.5", "acc50"), ("mean IoU", "miou"))
        for size in SIZES
        for label, prefix in (("all", ""), ("not text", "natural_"))
    ]
    return _table(summary, "Boxes of sentences by the object's size", [c for c in columns if c[2] in names])


def text_table(summary: dict[str, Any]) -> dict[str, Any]:
    return _table(
        summary,
        "Text regions, to the letter",
        [("lower is better", "CER", "ocr_cer"), ("", "exact", "ocr_exact")],
    )


def chat_table(summary: dict[str, Any]) -> dict[str, Any]:
    columns = [("foreseen", "all", "chat_token_accuracy")]
    return _table(summary, "Tokens of the answers in conversations", columns)


def _table(summary: dict[str, Any], title: str, columns: list[tuple[str, str, str]]) -> dict[str, Any]:
    seen: set[Any] = set()
    everybody = [mean for _, _, mean, _ in _everybody(summary)]
    for column in list(columns):  # one source may be all there is of a kind: show it once
        values = (column[0], *(mean.get(column[2]) for mean in everybody))
        if values in seen:
            columns.remove(column)
        seen.add(values)
    heads: list[list[Any]] = []  # [metric, number of its columns]
    for label, _, _ in columns:
        if heads and heads[-1][0] == label:
            heads[-1][1] += 1
        else:
            heads.append([label, 1])
    return {
        "title": title,
        "heads": heads,
        "columns": [c[1] for c in columns],
        "rows": _rows(summary, columns),
    }


def is_right(prediction: Prediction) -> bool:
    """A box right by IoU >= 0.5, a caption by exact match."""
    if prediction["task"] == CAPTION2BBOX:
        return iou(prediction) >= 0.5
    return exact(prediction["caption"], prediction["answer"])


def choose(predictions: dict[str, list[Prediction]]) -> list[dict[str, Any]]:
    """Pictures to show: for each stage's own task and each source some right and some wrong answers, drawn at
    random (seeded), with the number that there were of either."""
    groups = []
    for stage, task in (("pretrain", BBOX2CAPTION), ("adapt", CAPTION2BBOX)):
        asked = [p for p in predictions.get(stage, []) if p["task"] == task]
        for kind, source in sorted({(p["kind"], p["source"]) for p in asked}):  # natural before ocr
            mine = [p for p in asked if p["kind"] == kind and p["source"] == source]
            right = [p for p in mine if is_right(p)]
            wrong = [p for p in mine if not is_right(p)]
            draw = random.Random(0)
            shown = [p for part in (right, wrong) for p in draw.sample(part, min(PICTURES, len(part)))]
            groups.append(
                {"stage": STAGES[stage], "task": task, "source": source, "kind": kind}
                | {"right": len(right), "of": len(mine), "predictions": shown}
            )
    return groups


def _place(prediction: Prediction) -> tuple[str, str]:
    """The dataset of a mixture, else "", and the id of the image that a prediction is about."""
    return prediction.get("dataset", ""), prediction["id"]


def _images(path: str | list[str], wanted: set[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """Data URI and shape of the test images of these datasets and ids; ValueError naming one that is not there.

    The run has already kept to its fault budget: no other row is read here, and no fault ends the report.
    """
    dataset = open_split([path] if isinstance(path, str) else path, "test", fault_budget=1.0)
    images: dict[tuple[str, str], dict[str, Any]] = {}
    ids = {name for _, name in wanted}
    for i, name in enumerate(dataset.ids()):
        if name not in ids or (sample := dataset[i]) is None:
            continue
        place = sample.dataset, name
        if place not in wanted or place in images:
            continue
        image = Image.fromarray(sample.image.numpy())
        image.thumbnail((LONG_SIDE, LONG_SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=88)
        images[place] = {"uri": encoded(buffer.getvalue(), "jpeg"), "size": image.size}
    if missing := wanted - images.keys():
        raise ValueError(f"{path} has no test image {sorted(missing)[0][1]!r}, of which predictions.json speaks")
    return images


def _rectangle(box: list[float], size: tuple[int, int]) -> dict[str, float]:
    """A relative xyxy box as an SVG rectangle in the image's pixels, kept inside it."""
    (x1, y1, x2, y2), (width, height) = ([min(max(v, 0.0), 1.0) for v in box], size)
    return {"x": x1 * width, "y": y1 * height, "w": max(x2 - x1, 0) * width, "h": max(y2 - y1, 0) * height}


def _card(prediction: Prediction, images: dict[str, dict[str, Any]]) -> dict[str, Any]:
    image = images[_place(prediction)]
    boxes = prediction["task"] == CAPTION2BBOX
    predicted = prediction["predicted_box"]
    return {
        "image": image["uri"],
        "size": image["size"],
        "right": is_right(prediction),
        "true_box": _rectangle(prediction["box"], image["size"]),
        "predicted_box": _rectangle(predicted, image["size"]) if predicted else None,
        "caption": prediction["caption"],
        "answer": None if boxes else prediction["answer"],
        "unparsed": prediction["answer"] if boxes and predicted is None else None,
        "score": f"IoU {iou(prediction):.2f}"
        if boxes
        else f"ROUGE-L {100 * rouge_l(prediction['caption'], prediction['answer']):.0f}",
    }
