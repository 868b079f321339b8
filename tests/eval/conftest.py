"""Small Gran datasets in memory, for the tests of evaluation."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from reported import made_summary

from granvit.data.schema import FEATURES
from granvit.toy.tiny import TinyLLM, TinyVision, build_tiny


def _row(name, regions, source="toy", size=(48, 32)):
    """A row whose picture is of one colour, made from its name ("broken": no picture).

    regions: (box, caption, kind)."""
    colour = np.random.default_rng(sum(name.encode())).integers(0, 256, 3).tolist()
    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(buffer, "PNG")
    return {
        "id": name,
        "image": {"bytes": b"no picture" if name == "broken" else buffer.getvalue(), "path": None},
        "width": size[0],
        "height": size[1],
        "caption": None,
        "regions": [{"box": list(b), "caption": c, "kind": k, "score": None} for b, c, k in regions],
        "source": source,
        "licence": "CC0-1.0",
    }


@pytest.fixture(scope="session")
def gran_rows():
    """gran_rows([(id, regions, source), ...]) -> datasets.Dataset of the Gran schema."""

    def build(rows):
        made = [_row(*row) for row in rows]
        return datasets.Dataset.from_dict({name: [row[name] for row in made] for name in FEATURES}, FEATURES)

    return build


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A run's folder with a tiny untrained model in export/, and the model."""
    torch.manual_seed(0)
    size = {"width": 32, "layers": 1, "heads": 2, "mlp": 32}
    model, processor = build_tiny(
        ["a red circle", "Total 12"], TinyVision(**size), TinyLLM(**size, vocab=300)
    )
    export = tmp_path_factory.mktemp("run") / "export"
    model.save_pretrained(export)
    processor.save_pretrained(export)
    return export.parent, model


@pytest.fixture
def summary(tmp_path, gran_rows):
    """What a fabricated run found."""
    return made_summary(tmp_path / "data", gran_rows)
