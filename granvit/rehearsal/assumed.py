"""A Gran dataset that is assumed: pictures without meaning, with as many regions and words as it is said to have."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import datasets
import numpy as np
from PIL import Image

from granvit.cost.config import PlanConfig
from granvit.cost.reading import assumed_regions
from granvit.data.loader import GranDataset
from granvit.data.schema import FEATURES

WORDS = ("a", "the", "of", "on", "in", "with", "red", "blue", "green", "small", "old", "dog", "car", "tree", "street",
         "book", "sign")  # fmt: skip


def assumed_data(plan: PlanConfig) -> GranDataset:
    """`plan.rows` pictures of `plan.image_size`, with regions in numbers as of a dataset of `plan.images` and
    `plan.regions`, each answer of `plan.answer_tokens` words, each caption of `plan.caption_tokens`."""
    random, (height, width) = np.random.default_rng(0), plan.image_size
    picture = io.BytesIO()
    Image.new("RGB", (width, height), "gray").save(picture, "PNG")

    def text(words: int) -> str:
        return " ".join(random.choice(WORDS, words))

    def region() -> dict[str, Any]:
        corner, size = random.uniform(0, 0.6, 2), random.uniform(0.15, 0.4, 2)  # about a tenth of the picture
        box = [*corner, *(corner + size)]
        return {"box": box, "caption": text(plan.answer_tokens), "kind": "natural", "score": None}

    rows = [
        {
            "id": f"assumed-{number}",
            "image": {"bytes": picture.getvalue(), "path": None},
            "width": width,
            "height": height,
            "caption": text(plan.caption_tokens),
            "regions": [region() for _ in range(regions)],
            "source": "assumed",
            "licence": "none",
        }
        for number, regions in enumerate(assumed_regions(plan))
    ]
    data = datasets.Dataset.from_list(rows, features=FEATURES)
    data._fingerprint = hashlib.sha256(repr(rows).encode()).hexdigest()  # else one by lot: lengths are kept by it
    return GranDataset(data)
