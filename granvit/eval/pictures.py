"""The test pictures of a run's report: the same questions before training, after each stage and for the control, and
what the encoder's features look like."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from granvit.data.loader import GranDataset
from granvit.data.page import data_uri
from granvit.eval.metrics import Prediction, exact, iou, place, rouge_l
from granvit.eval.names import source_name
from granvit.eval.tables import SOURCES
from granvit.questions.prompts import BBOX2CAPTION, CAPTION2BBOX

PICTURES = 3  # right ones and wrong ones a source and task
LONG_SIDE = 480  # pixels of a picture in the report
MAPS, MAP_SIDE = 4, 260  # pictures whose features are drawn, and the maps' long side in pixels

log = logging.getLogger(__name__)

Place = tuple[str, str]  # see `metrics.place`


def is_right(prediction: Prediction) -> bool:
    """A box right by IoU >= 0.5, a caption by exact match."""
    if prediction["task"] == CAPTION2BBOX:
        return iou(prediction) >= 0.5
    return exact(prediction["caption"], prediction["answer"])


def choose(predictions: dict[str, list[Prediction]]) -> list[dict[str, Any]]:
    """Questions to show: for each stage's own task and each of SOURCES some with right and some with wrong answers,
    drawn at random (seeded) and each of another picture, with the number that there were of either."""
    groups = []
    for stage, task in (("pretrain", BBOX2CAPTION), ("adapt", CAPTION2BBOX)):
        asked = [p for p in predictions.get(stage, []) if p["task"] == task]
        frequent = Counter((p["kind"], p["source"]) for p in asked).most_common(SOURCES)
        for kind, source in sorted(pair for pair, _ in frequent):  # natural before ocr
            mine = [p for p in asked if p["kind"] == kind and p["source"] == source]
            right = [p for p in mine if is_right(p)]
            wrong = [p for p in mine if not is_right(p)]
            draw, shown, seen = random.Random(0), [], set()
            for part in (right, wrong):
                left = PICTURES
                for prediction in draw.sample(part, len(part)):
                    if left and place(prediction) not in seen:
                        seen.add(place(prediction))
                        shown.append(prediction)
                        left -= 1
            groups.append(
                {"stage": stage, "task": task, "source": source_name(source), "kind": kind}
                | {"right": len(right), "of": len(mine), "predictions": shown}
            )
    return groups


def compared(prediction: Prediction, states: dict[str, list[Prediction]]) -> dict[str, Prediction]:
    """The answers to a prediction's question in each of the states, as far as they have one: {state: prediction}."""

    def question(p: Prediction) -> tuple[Any, ...]:
        return place(p), p["task"], p["kind"], p["caption"], tuple(p["box"])

    wanted = question(prediction)
    answers = {}
    for state, several in states.items():
        same = next((p for p in several if p["id"] == prediction["id"] and question(p) == wanted), None)
        if same is not None:
            answers[state] = same
    return answers


def card(prediction: Prediction, states: dict[str, list[Prediction]], size: tuple[int, int]) -> dict[str, Any]:
    """A question and its answers for the template; boxes are in the pixels of a picture of this size."""
    boxes = prediction["task"] == CAPTION2BBOX
    return {
        "place": place(prediction),
        "size": size,
        "caption": prediction["caption"],
        "true_box": _rectangle(prediction["box"], size),
        "answers": [
            {
                "who": who,
                "right": is_right(p),
                "answer": p["answer"],
                "box": _rectangle(p["predicted_box"], size) if p["predicted_box"] else None,
                "score": f"IoU {iou(p):.2f}" if boxes else f"ROUGE-L {100 * rouge_l(p['caption'], p['answer']):.0f}",
            }
            for who, p in compared(prediction, states).items()
        ],
    }


def open_pictures(dataset: GranDataset, wanted: set[Place]) -> dict[Place, Image.Image]:
    """The images of these places; ValueError naming one that is not there. No other row is read."""
    images: dict[Place, Image.Image] = {}
    ids = {name for _, name in wanted}
    for i, name in enumerate(dataset.ids()):
        if name not in ids or (sample := dataset[i]) is None:
            continue
        where = sample.dataset, name
        if where in wanted and where not in images:
            images[where] = Image.fromarray(sample.image.numpy())
    if missing := wanted - images.keys():
        which, name = min(missing)
        raise ValueError(f"{dataset.path} has no test image {name!r}{f' of {which}' if which else ''}")
    return images


def shown_picture(image: Image.Image) -> dict[str, Any]:
    """{"uri", "size"} of a picture as the page has it."""
    image = image.copy()
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    return {"uri": data_uri(image, LONG_SIDE, quality=85), "size": image.size}


def draw_maps(run: Path, config: dict[str, Any], chosen: list[tuple[Image.Image, Prediction]]) -> list[dict[str, Any]]:
    """PCA of the features of a run's exported encoder and similarity to the middle of the asked box, as data: URIs,
    beside those of the encoder that it started from, or where it started from none, of random weights. Nothing without
    an export."""
    if not (run / "export" / "encoder" / "config.json").is_file():
        return []
    from granvit.eval.maps import load_features, pca_picture, similarity_picture

    model = config.get("model", {})
    start = model.get("encoder") or model.get("whole")
    try:
        trained = load_features(run / "export" / "encoder")
        if start:
            before, who = load_features(start), "before training"
        else:
            before, who = trained.with_random_weights(), "random weights"
    except ValueError as error:
        log.warning("no feature maps in the report: %s", error)
        return []
    maps = []
    for image, prediction in chosen:
        x1, y1, x2, y2 = prediction["box"]
        point = (min(max((x1 + x2) / 2, 0.0), 1.0), min(max((y1 + y2) / 2, 0.0), 1.0))
        drawn = [("picture", image)]
        for label, encoder in ((who, before), ("after training", trained)):
            features = encoder(image)
            drawn.append((f"features, {label}", pca_picture(image, features)))
            drawn.append((f"similarity, {label}", similarity_picture(image, features, point)))
        maps.append([{"label": label, "uri": data_uri(picture, MAP_SIDE)} for label, picture in drawn])
    return maps


def _rectangle(box: list[float], size: tuple[int, int]) -> dict[str, float]:
    """A relative xyxy box as an SVG rectangle in the image's pixels, kept inside it."""
    (x1, y1, x2, y2), (width, height) = ([min(max(v, 0.0), 1.0) for v in box], size)
    return {"x": x1 * width, "y": y1 * height, "w": max(x2 - x1, 0) * width, "h": max(y2 - y1, 0) * height}
