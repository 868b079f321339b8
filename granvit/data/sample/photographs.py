"""The photographs of the sample set: real pictures with boxes drawn and described by hand.

The folder photographs/ beside this file holds the JPEGs, annotations.jsonl (one line an image, in the form
that `python -m granvit.data convert jsonl` reads) and LICENCES.md (each picture's origin and licence).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).with_name("photographs")

TEST = frozenset("camera coffee cow dogs honey_bee igloo lemurs mariachi multimeter mykonos wine".split())
"""The pictures of the test split, by file name without ending. Fixed by hand, so that neither a new picture
nor another order moves one across. Both splits have people, animals, buildings, small things, and text."""


def photographs(split: str) -> Iterator[dict[str, Any]]:
    """Rows of the Gran schema (granvit.data.schema.FEATURES) for `split`, in the order of annotations.jsonl.

    `image` is {"bytes": the JPEG file, "path": its name}, boxes are relative xyxy, `score` is None.
    Raises ValueError when `split` is neither "train" nor "test".
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    for line in (FOLDER / "annotations.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        file = FOLDER / row["image"]
        if (file.stem in TEST) != (split == "test"):
            continue
        row["image"] = {"bytes": file.read_bytes(), "path": file.name}
        row["regions"] = [region | {"score": None} for region in row["regions"]]
        yield row


def pictures(split: str) -> Iterator[Image.Image]:
    """The photographs of `split` as RGB pictures without their annotations: backgrounds for generated scenes.

    Raises ValueError as `photographs` does.
    """
    for row in photographs(split):
        yield Image.open(FOLDER / row["image"]["path"]).convert("RGB")
