"""COCO in, Gran dataset out: exact boxes, one id an image wherever it comes from, every fault named."""

import json
import logging
import subprocess
import sys

import pytest
from converting import convert, picture, regions, to_memory, write_json

from granvit.data.__main__ import main
from granvit.data.sources.coco import Coco

CATEGORIES = [{"id": 1, "name": "person"}, {"id": 53, "name": "apple"}, {"id": 35, "name": "skis"}]


def image(number, **changes) -> dict:
    return {"id": number, "file_name": f"{number!s:0>12}.jpg", "width": 40, "height": 20} | changes


def annotation(number, image_id, box, category=1, **changes) -> dict:
    base = {"id": number, "image_id": image_id, "category_id": category, "bbox": box, "iscrowd": 0, "area": 1.0}
    return base | {"segmentation": [[1.0, 2.0, 3.0, 4.0]]} | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(1, 6):
        (tmp_path / "images" / f"{number:012d}.jpg").write_bytes(picture())
    return tmp_path


def write(folder, images, annotations, categories=CATEGORIES, **more) -> str:
    # annotations first, as some tools write them
    data = {"info": {"year": 2017}, "annotations": annotations, "images": images, "categories": categories, **more}
    return write_json(folder / "instances.json", data)


def test_boxes_are_exact_and_regions_in_order(folder):
    instances = write(
        folder,
        [image(2), image(1)],
        [
            annotation(7, 1, [10, 5, 20, 10]),
            annotation(8, 2, [0, 0, 40, 20], 53),
            annotation(9, 1, [0.5, 0.25, 1, 1], 35),
        ],
    )
    summary, rows = convert(Coco(instances, str(folder / "images"), licence="CC-BY-4.0"), folder / "out")
    assert list(rows) == ["coco/2", "coco/1"]
    assert regions(rows["coco/1"]) == [
        ("a person", [0.25, 0.25, 0.75, 0.75]),
        ("skis", pytest.approx([0.0125, 0.0125, 0.0375, 0.0625], rel=1e-7)),
    ]
    assert regions(rows["coco/2"]) == [("an apple", [0, 0, 1, 1])]
    row = rows["coco/1"]
    assert (row["width"], row["height"], row["caption"], row["source"], row["licence"]) == (
        40,
        20,
        None,
        "coco",
        "CC-BY-4.0",
    )
    assert row["image"]["bytes"] == picture() and row["image"]["path"] == "000000000001.jpg"
    assert (summary.read, summary.kept, summary.regions, summary.faulty) == (2, 2, 3, 0)


@pytest.mark.parametrize("crowd", [1, 1.0, True, "1", "true", "1.0", "TRUE"])
def test_a_crowd_however_it_is_written(folder, crowd):
    boxes = [annotation(1, 1, [1, 1, 5, 5]), annotation(2, 1, [1, 1, 5, 5], iscrowd=crowd)]
    instances = write(folder, [image(1)], boxes)
    summary, _ = convert(Coco(instances, str(folder / "images")), folder / "out")
    assert summary.dropped == {"crowd region": 1} and summary.regions == 1


def test_ids_that_pandas_wrote_and_sizes_that_are_not_told(folder):
    unknown = [image(1, id=1.0, width=0, height=0), image(2, width=None)]
    boxes = [annotation(1.0, 1, [1, 1, 5, 5]), annotation(2, 2.0, [1, 1, 5, 5])]
    summary, rows = convert(Coco(write(folder, unknown, boxes), str(folder / "images")), folder / "out")
    assert list(rows) == ["coco/1", "coco/2"] and not summary.faulty


def test_a_fault_shows_the_box_that_is_none(folder, caplog):
    instances = write(folder, [image(1)], [annotation(1, 1, [1, 1, 5, 5]), annotation(2, 1, [1, "a", 5, 5])])
    convert(Coco(instances, str(folder / "images")), folder / "out")
    assert "box must be 4 numbers [x, y, width, height] in pixels, got [1, 'a', 5, 5]" in caplog.text


def test_crowds_and_images_without_annotation_are_left_out(folder):
    instances = write(
        folder,
        [image(1), image(2), image(3)],
        [
            annotation(1, 1, [1, 1, 5, 5]),
            annotation(2, 1, [0, 0, 40, 20], iscrowd=1),
            annotation(3, 2, [0, 0, 9, 9], iscrowd=1),
        ],
    )
    summary, rows = convert(Coco(instances, str(folder / "images")), folder / "out")
    assert list(rows) == ["coco/1"] and len(rows["coco/1"]["regions"]) == 1
    assert summary.dropped == {"crowd region": 2, "image without annotation": 2}
    assert (summary.read, summary.kept, summary.faulty) == (3, 1, 0)


def test_the_longest_caption_is_taken(folder):
    instances = write(folder, [image(1), image(2)], [annotation(1, 1, [1, 1, 5, 5])])
    texts = [(1, "A man."), (1, "A man\nwith a hat. "), (2, "A dog."), (3, "An image that is not listed."), (1, "Men.")]
    captions = write_json(
        folder / "captions.json",
        {
            "images": [image(1)],
            "annotations": [{"id": n, "image_id": i, "caption": t} for n, (i, t) in enumerate(texts)],
        },
    )
    summary, rows = convert(Coco(instances, str(folder / "images"), captions), folder / "out")
    assert {key: row["caption"] for key, row in rows.items()} == {"coco/1": "A man with a hat.", "coco/2": "A dog."}
    assert rows["coco/2"]["regions"] == []
    assert summary.dropped == {"caption of an image that is not listed": 1}


@pytest.mark.parametrize(
    ("images", "annotations", "message", "kept"),
    [
        ([image(2, file_name="../instances.json")], [annotation(2, 2, [1, 1, 5, 5])], "image must lie in", 1),
        ([image(2, file_name="/etc/passwd")], [annotation(2, 2, [1, 1, 5, 5])], "image must lie in", 1),
        ([image(2, file_name="no.jpg")], [annotation(2, 2, [1, 1, 5, 5])], "'no.jpg' is no file", 1),
        ([image(2, file_name="\ud800")], [], "an image must have a file_name", 1),
        ([image(2, file_name=["x"])], [], "images, element 1 of the file: an image must have a file_name", 1),
        ([3], [], "an image must have a file_name", 1),
        ([image(1, id=[1])], [], "id must be an integer or a string", 1),
        ([image(2**70)], [], "id must be an integer or a string", 1),
        ([image(True)], [], "id must be an integer or a string", 1),
        ([image(1)], [], "id 'coco/1' is already that of", 1),
        ([image(2, width=20, height=40)], [annotation(2, 2, [1, 1, 5, 5])], "annotated as 20x40, the image is 40x", 1),
        ([], [annotation(2, 2, [1, 1, 5, 5])], "image 2: has annotations (1) and is not listed", 1),
        ([], [annotation(2, "1", [1, 1, 5, 5])], "image 1: has annotations (1) and is not listed", 1),
        ([], [[]], "image_id must be an integer or a string", 1),
        ([image(2)], [annotation(2, 2, [1, 1, 5, 5], 99)], "annotation 2 is of category 99, which is not", 1),
        ([image(2)], [annotation(2, 2, [1, 1, 5])], "box must be 4 numbers", 1),
        ([image(2)], [annotation(2, 2, [1, 1, 10**400, 5]), annotation(3, 2, [1, 1, 5, 5])], "box must be 4", 2),
        ([image(2)], [annotation(2, 2, [1, 1, float("nan"), 5])], "box must be 4 numbers", 1),
        ([image(2)], [annotation(2, 2, [1, 1, 45, 5]), annotation(3, 2, [1, 1, 5, 5])], "box must lie in", 2),
        ([image(2)], [annotation(2, 2, [1, 1, 0, 5]), annotation(3, 2, [1, 1, 5, 5])], "box must have x1 < x2", 2),
    ],
)
def test_faults_are_named_and_the_rest_is_kept(folder, caplog, images, annotations, message, kept):
    instances = write(folder, [*images, image(1)][::-1], [*annotations, annotation(1, 1, [1, 1, 5, 5])][::-1])
    if "element 1" in message:
        message = message.replace("element 1", "element 2")
    with caplog.at_level(logging.WARNING):
        summary, rows = convert(Coco(instances, str(folder / "images")), folder / "out")
    assert message in caplog.text
    assert len(rows) == summary.kept == kept and "coco/1" in rows
    assert summary.faulty == 1


def test_a_category_must_have_a_name(folder, caplog):
    instances = write(folder, [image(1)], [annotation(1, 1, [1, 1, 5, 5])], [*CATEGORIES, {"id": 3, "name": " "}])
    convert(Coco(instances, str(folder / "images")), folder / "out")
    assert "a category must have a name" in caplog.text


def test_a_file_that_is_no_json_ends_with_one_line(folder, capsys):
    (folder / "instances.json").write_text('{"images": [')
    command = ["convert", "coco", str(folder / "instances.json"), "--images", str(folder / "images")]
    assert main([*command, "--output", str(folder / "out")]) == 2
    assert "instances.json is not readable as JSON" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_command_line(folder, capsys):
    instances = write(folder, [image(1), image(2)], [annotation(n, n, [1, 1, 5, 5]) for n in (1, 2)])
    (folder / "ids.txt").write_text("coco/2\n")
    command = ["convert", "coco", instances, "--images", str(folder / "images"), "--output", str(folder / "out")]
    assert main([*command, "--exclude", str(folder / "ids.txt"), "--workers", "0"]) == 0
    shown = capsys.readouterr().err
    assert "left out: excluded" in shown and "rows written" in shown
    command = ["convert", "coco", instances, "--images", str(folder / "no"), "--output", str(folder / "other")]
    assert main(command) == 2
    assert "error: no file or folder at" in capsys.readouterr().err


def test_a_remote_source(folder):
    instances = write(
        folder, [image(1), image(2, file_name="../x.jpg")], [annotation(n, n, [1, 1, 5, 5]) for n in (1, 2)]
    )
    here, _ = convert(Coco(instances, str(folder / "images")), folder / "out")
    there = to_memory(folder, "coco")
    summary, rows = convert(Coco(f"{there}/instances.json", f"{there}/images"), folder / "remote")
    assert summary == here and list(rows) == ["coco/1"]


INDEX = """
import resource, sys, tempfile, time
from pathlib import Path
from granvit.data.records import Notes
from granvit.data.sources.coco import Coco
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.monotonic()
with tempfile.TemporaryDirectory(dir=sys.argv[2]) as scratch:
    count = sum(len(record.data["boxes"]) for record in Coco(sys.argv[1], ".").records(Notes(), Path(scratch)))
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(count, (after - before) // 1024, after // 1024, round(time.monotonic() - begun, 1))
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    number = 200_000
    with (tmp_path / "instances.json").open("w") as file:
        file.write('{"annotations": [')
        for n in range(number):
            file.write((", " if n else "") + json.dumps(annotation(n, n * 7919 % number, [1.5, 2.5, 3, 4])))
        file.write('], "images": [' + ", ".join(json.dumps(image(n)) for n in range(number)))
        file.write('], "categories": ' + json.dumps(CATEGORIES) + "}")
    command = [sys.executable, "-c", INDEX, str(tmp_path / "instances.json"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=400)
    count, grown, *_ = map(float, done.stdout.split())
    assert count == number
    assert grown < 100, f"{done.stdout}: 200,000 images may take 100 MiB"


def test_a_file_of_nothing_but_faults_is_told_in_little(folder, caplog, monkeypatch):
    monkeypatch.setattr("granvit.data.build.NAMED_FAULTS", 20)
    instances = write(folder, [image(1), *[0] * 1000], [annotation(1, 1, [0, 0, 9, 9])])
    with pytest.raises(ValueError, match="21 of 1001 images have faults"):
        convert(Coco(instances, str(folder / "images")), folder / "out", fault_budget=0.01)
    [message] = caplog.messages
    assert "images, element 2 of the file" in message and " and 11 more: an image must have a file_name" in message
