"""Rows and a processor that tests of loading share."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image

from granvit.data.schema import FEATURES


def encoded(height: int, width: int, value: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value % 256, np.uint8)).save(buffer, form)
    return buffer.getvalue()


def gran_rows(number: int, seed: int = 0) -> list[dict]:
    """Rows of random sizes and numbers of regions; every caption names its row."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(number):
        height, width = rng.integers(20, 90, 2).tolist()
        boxes = [[*(rng.random(2) * 0.5), *(0.5 + rng.random(2) * 0.5)] for _ in range(rng.integers(1, 7))]
        regions = [
            {"box": box, "caption": f"thing {i} of row {index}", "kind": "natural", "score": None}
            for i, box in enumerate(boxes)
        ]
        rows.append(
            {
                "id": f"r{index}",
                "image": {"bytes": encoded(height, width, index), "path": None},
                "width": width,
                "height": height,
                "caption": f"row {index}" if index % 3 else None,
                "regions": regions,
                "source": "test",
                "licence": "CC0-1.0",
            }
        )
    return rows


@pytest.fixture(scope="session")
def many_rows():
    return gran_rows(240)


@pytest.fixture(scope="session")
def gran(many_rows) -> datasets.Dataset:
    return datasets.Dataset.from_list(many_rows, features=FEATURES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Lengths of this session's datasets stay in it."""
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def processor(tiny):
    return tiny()[1]
