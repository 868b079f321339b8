"""The embedded photographs: every file there, every box sensible, every licence named, the split fixed."""

import io
import json
import re

import datasets
import pytest
from PIL import Image

from granvit.data.sample.photographs import FOLDER, TEST, photographs, pictures
from granvit.data.schema import FEATURES, parse_row

ROWS = [json.loads(line) for line in (FOLDER / "annotations.jsonl").read_text(encoding="utf-8").splitlines()]
REGIONS = [(row["id"], region) for row in ROWS for region in row["regions"]]
FREE = {
    "CC0-1.0", "CC-BY-2.0", "CC-BY-4.0", "BSD-3-Clause", "public domain", "no known copyright restrictions"
}  # fmt: skip


def licence_table() -> dict[str, list[str]]:
    """The cells of LICENCES.md's table by file name."""
    lines = (FOLDER / "LICENCES.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if ".jpg |" in line]
    return {row[0]: row for row in cells}


def test_counts():
    assert len(ROWS) >= 20
    assert len(REGIONS) >= 80
    assert sum(region["kind"] == "ocr" for _, region in REGIONS) >= 10
    assert len({row["id"] for row in ROWS}) == len(ROWS)


def test_every_picture_is_annotated_once_and_every_annotation_has_its_picture():
    assert sorted(row["image"] for row in ROWS) == sorted(file.name for file in FOLDER.glob("*.jpg"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["image"])
def test_file_is_a_small_rgb_jpeg_of_the_stated_size(row):
    file = FOLDER / row["image"]
    assert file.stat().st_size <= 60 * 1024
    with Image.open(file) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert image.size == (row["width"], row["height"])
        assert max(image.size) <= 512
        assert not image.getexif()  # no orientation to apply, no camera data kept
        image.load()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["image"])
def test_regions_are_well_formed(row):
    assert set(row) == {"id", "image", "width", "height", "caption", "regions", "source", "licence"}
    assert 3 <= len(row["caption"].split()) <= 12
    assert row["regions"]
    captions = [region["caption"] for region in row["regions"]]
    assert len(set(captions)) == len(captions), "two regions of one picture must be told apart"
    for region in row["regions"]:
        x1, y1, x2, y2 = region["box"]
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
        assert 0.0015 <= (x2 - x1) * (y2 - y1) <= 0.95
        assert (x2 - x1) * row["width"] >= 8 and (y2 - y1) * row["height"] >= 8
        assert 1 <= len(region["caption"].split()) <= 10
        assert region["caption"] == region["caption"].strip()
        assert region["kind"] in ("natural", "ocr")
        if region["kind"] == "natural":
            assert re.fullmatch(r"[A-Za-z' ,\-]+", region["caption"]) and len(region["caption"].split()) >= 2


def test_no_two_boxes_of_a_picture_are_nearly_the_same():
    def overlap(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        both = max(width, 0) * max(height, 0)
        return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)

    for row in ROWS:
        boxes = [region["box"] for region in row["regions"]]
        for i, box in enumerate(boxes):
            assert all(overlap(box, other) < 0.75 for other in boxes[:i]), row["id"]


def test_every_file_has_a_licence_row_that_agrees():
    table = licence_table()
    assert set(table) == {row["image"] for row in ROWS}
    for row in ROWS:
        _, shows, package, author, licence = table[row["image"]]
        assert shows and package and author
        assert licence == row["licence"]
        assert licence in FREE


def test_the_split_is_fixed_and_complete():
    names = {split: [row["image"]["path"] for row in photographs(split)] for split in ("train", "test")}
    assert set(names["test"]) == {f"{name}.jpg" for name in TEST}
    assert sorted(names["train"] + names["test"]) == sorted(row["image"] for row in ROWS)
    assert 0.25 <= len(names["test"]) / len(ROWS) <= 0.35
    for split, kinds in (("train", {"natural", "ocr"}), ("test", {"natural", "ocr"})):
        assert {region["kind"] for row in photographs(split) for region in row["regions"]} == kinds


def test_rows_hold_the_files_bytes():
    row = next(photographs("train"))
    assert row["image"]["bytes"] == (FOLDER / row["image"]["path"]).read_bytes()
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (row["width"], row["height"])
    assert all(region["score"] is None for region in row["regions"])
    assert row["source"] == "photographs"


def test_rows_fit_the_gran_schema():
    rows = list(photographs("test"))
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    for read, row in zip(dataset, rows, strict=True):
        sample = parse_row(read)
        assert sample.image.shape == (row["height"], row["width"], 3)
        assert len(sample.regions) == len(row["regions"])


def test_pictures_are_the_splits_photographs_without_annotations():
    held_out = list(pictures("test"))
    assert [picture.size for picture in held_out] == [
        (row["width"], row["height"]) for row in photographs("test")
    ]
    assert all(picture.mode == "RGB" for picture in held_out)


@pytest.mark.parametrize("read", [photographs, pictures])
def test_an_unknown_split_is_named(read):
    with pytest.raises(ValueError, match='split must be "train" or "test", got \'val\''):
        next(read("val"))
