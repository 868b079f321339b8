"""How far the perceptual hash of `python -m granvit.data overlap` moves when a picture is changed, and how far
different pictures are apart: what its default distance stands on.

    python bench/overlap.py          writes bench/results/overlap.json

On the sample set of 10,000 pictures: every third test picture changed, all pairs of different pictures compared.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from granvit.data.loader import GranDataset
from granvit.data.overlap import DISTANCE, hash_dataset, nearest, picture_hash
from granvit.data.parallel import progress
from granvit.data.sample import cached_sample
from granvit.machine import commit, device_name

RESULTS = Path(__file__).parent / "results" / "overlap.json"
IMAGES = 10_000
FAR = 48  # bits: the nearest pair of different pictures is looked for within this


def jpeg(picture: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def scaled(picture: Image.Image, scale: float) -> Image.Image:
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": lambda picture: jpeg(picture, 30),
    "half the size": lambda picture: scaled(picture, 0.5),
    "half the size, JPEG of quality 50": lambda picture: jpeg(scaled(picture, 0.5), 50),
    "1.7 times the size": lambda picture: scaled(picture, 1.7),
}


def bits(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.bitwise_count(first ^ second).sum())


def main() -> None:
    folder = cached_sample(IMAGES)
    test = GranDataset(folder, "test")
    moved: dict[str, list[int]] = {name: [] for name in CHANGES}
    rows = range(0, len(test), 3)
    for row in progress(rows, "Changing pictures", len(rows)):
        picture = Image.fromarray(test[row].image.numpy())
        code = picture_hash(picture)
        for name, change in CHANGES.items():
            moved[name].append(bits(code, picture_hash(change(picture))))
    train_codes, test_codes = (hash_dataset(folder, split).codes for split in ("train", "test"))
    every = np.concatenate([train_codes, test_codes])
    result = {
        "commit": commit(),
        "device": device_name(),
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
        "distance": DISTANCE,
        "changed": len(rows),
        "largest_change": {name: max(distances) for name, distances in moved.items()},
        "pictures": len(every),
        "pairs": len(every) * (len(every) - 1) // 2,
        "nearest": int(nearest(every, None, FAR)[:, 2].min()),
        "nearest_of_train_and_test": int(nearest(train_codes, test_codes, FAR)[:, 2].min()),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
