"""The same photographs as LabelMe's JSON, VOC and COCO: Debian's package labelme-examples.

Where it is installed, or GRANVIT_LABELME_EXAMPLES names its folder examples (dpkg -x does), all three must agree.
"""

import json
import os
from pathlib import Path

import pytest
from converting import convert, regions

from granvit.data.sources.coco import Coco
from granvit.data.sources.labelme import Labelme
from granvit.data.sources.voc import Voc

EXAMPLES = Path(os.environ.get("GRANVIT_LABELME_EXAMPLES", "/usr/share/doc/labelme-examples/examples"))
pytestmark = pytest.mark.skipif(
    not EXAMPLES.is_dir(), reason="labelme-examples is not there; set GRANVIT_LABELME_EXAMPLES to its folder examples"
)


def by_picture(rows: dict) -> dict[str, list]:
    return {Path(row["image"]["path"]).stem: (row, regions(row)) for row in rows.values()}


def test_voc_says_what_labelme_says(tmp_path):
    here = EXAMPLES / "bbox_detection"
    _, drawn = convert(Labelme(str(here / "data_annotated")), tmp_path / "labelme")
    exported = here / "data_dataset_voc"
    # The exporter writes the rectangles' corners as they were drawn: continuous, from 0.
    voc = Voc(str(exported / "Annotations"), str(exported / "JPEGImages"), origin=0)
    summary, rows = convert(voc, tmp_path / "voc")
    assert summary.kept == 3 and summary.regions == 9 and not summary.faulty
    drawn, rows = by_picture(drawn), by_picture(rows)
    assert {name: row[1] for name, row in rows.items()} == {name: row[1] for name, row in drawn.items()}


def test_coco_says_what_labelme_says(tmp_path):
    here = EXAMPLES / "instance_segmentation"
    summary, drawn = convert(Labelme(str(here / "data_annotated")), tmp_path / "labelme")
    assert summary.dropped == {"shape to be ignored": 2} and not summary.faulty
    exported = here / "data_dataset_coco"
    summary, rows = convert(Coco(str(exported / "annotations.json"), str(exported)), tmp_path / "coco")
    assert summary.kept == 3 and summary.regions == 12 and not summary.faulty
    drawn, rows = by_picture(drawn), by_picture(rows)
    assert set(drawn) == set(rows)
    for name, (row, objects) in rows.items():
        _, expected = drawn[name]
        assert [caption for caption, _ in objects] == [caption for caption, _ in expected]
        for (_, box), (_, other) in zip(objects, expected, strict=True):
            sides = (row["width"], row["height"]) * 2
            # The exporter paints the shape and boxes the painted pixels, whole: it rounds and adds the rim's pixel.
            assert [v * s for v, s in zip(box, sides, strict=True)] == pytest.approx(
                [v * s for v, s in zip(other, sides, strict=True)], abs=1.001
            )


def test_primitives_and_a_picture_inside_the_file(tmp_path):
    summary, rows = convert(Labelme(str(EXAMPLES / "primitives")), tmp_path / "primitives")
    assert summary.dropped == {"shape without area": 3} and not summary.faulty
    assert [caption for caption, _ in regions(rows["primitives"])] == [
        "a rectangle", "a circle", "a rectangle", "a polygon",
    ]  # fmt: skip
    told = json.loads((EXAMPLES / "tutorial" / "apc2016_obj3.json").read_text())
    _, rows = convert(Labelme(str(EXAMPLES / "tutorial")), tmp_path / "tutorial")
    assert len(rows["apc2016_obj3"]["regions"]) == len(told["shapes"]) == 4
