"""LabelMe in, Gran dataset out."""

import base64
import json
import os

import pytest
from converting import convert, picture, regions, to_memory, write_json

from granvit.data.__main__ import main
from granvit.data.sources.labelme import Labelme


def shape(label, kind, *points, group=None) -> dict:
    listed = [list(point) for point in points]
    return {"label": label, "points": listed, "group_id": group, "shape_type": kind, "flags": {}}


def file(*shapes, **changes) -> dict:
    base = {"version": "5.1.1", "flags": {}, "shapes": list(shapes), "imagePath": "a.jpg", "imageData": None}
    return base | {"imageHeight": 20, "imageWidth": 40} | changes


GOOD = shape("person", "rectangle", (10, 5), (30, 15))


@pytest.fixture
def folder(tmp_path):
    for where in ("json", "images"):
        (tmp_path / where).mkdir()
        (tmp_path / where / "a.jpg").write_bytes(picture())
    return tmp_path


def test_boxes_of_shapes_are_exact(folder):
    write_json(
        folder / "json" / "a.json",
        file(
            shape("person", "rectangle", (30, 15), (10, 5)),
            shape("apple_tree", "polygon", (0, 0), (20, 0.5), (10, 10)),
            shape("ball", "circle", (30, 10), (33, 14)),
            shape("moon", "circle", (38, 10), (38, 0)),
            shape("sofa", "polygon", (0, 0), (4, 0), (4, 5), group=0),
            shape("road", "line", (0, 0), (4, 4)),
            shape("road", "linestrip", (0, 0), (4, 4), (5, 5)),
            shape("nail", "point", (0, 0)),
            shape("__ignore__", "polygon", (0, 0), (4, 0), (4, 5)),
            shape("sofa", "polygon", (20, 10), (40, 10), (40, 20), group=0),
            shape("the man on the left", "polygon", (0, 0), (40, 0), (40, 20)),
        ),
    )
    write_json(folder / "json" / "b.json", file())
    write_json(folder / "json" / "c.json", file(shape("nail", "point", (0, 0))))
    summary, rows = convert(Labelme(str(folder / "json"), licence="x"), folder / "out")
    assert list(rows) == ["a"]
    assert regions(rows["a"]) == [
        ("a person", [0.25, 0.25, 0.75, 0.75]),
        ("an apple tree", [0, 0, 0.5, 0.5]),
        ("a ball", [0.625, 0.25, 0.875, 0.75]),
        ("a moon", [pytest.approx(0.7), 0, 1, 1]),
        ("a sofa", [0, 0, 1, 1]),
        ("the man on the left", [0, 0, 1, 1]),
    ]
    assert summary.dropped == {"shape without area": 4, "shape to be ignored": 1, "image without annotation": 2}
    assert (summary.read, summary.faulty) == (3, 0)
    assert (rows["a"]["source"], rows["a"]["licence"]) == ("labelme", "x")


def test_shapes_of_other_tools(folder):
    turned = [(10, 5), (20, 0), (30, 10), (20, 15)]
    write_json(
        folder / "json" / "a.json",
        file(
            shape("mask", "mask", (10, 5), (30, 15)) | {"mask": "iVBORw0KGgo="},
            shape("turned", "oriented_rectangle", *turned),
            shape("turned", "rotation", *turned),
            shape("corners", "rectangle", (10, 5), (30, 5), (30, 15), (10, 15)),
            shape("outline", None, (10, 5), (30, 5), (30, 15)),
            shape("kerb", "quadrilateral", *turned),
            shape("corner", "rotation", (-9, 5), (0, -4), (20, 5), (0, 15)),  # a turned thing at the picture's edge
            shape("two", "mask", (0, 0), (9, 4), group=1.0),
            shape("two", "mask", (10, 5), (19, 9), group=1),
        ),
    )
    _, rows = convert(Labelme(str(folder / "json")), folder / "out")
    assert regions(rows["a"]) == [
        ("a mask", [0.25, 0.25, pytest.approx(31 / 40), pytest.approx(16 / 20)]),
        *[("a turned", [0.25, 0, 0.75, 0.75])] * 2,
        ("corners", [0.25, 0.25, 0.75, 0.75]),
        ("an outline", [0.25, 0.25, 0.75, 0.75]),
        ("a kerb", [0.25, 0, 0.75, 0.75]),
        ("a corner", [0, 0, 0.5, 0.75]),
        ("two", [0, 0, 0.5, 0.5]),
    ]


def test_a_byte_order_mark_and_broken_lines_in_the_picture(folder):
    inline = base64.encodebytes(picture()).decode()
    assert inline.count("\n") > 3
    (folder / "json" / "a.json").write_text(json.dumps(file(GOOD, imageData=inline)), encoding="utf-8-sig")
    write_json(folder / "json" / "b.json", file(GOOD, imageData=" \n", imageWidth=0, imageHeight=0))
    write_json(folder / "json" / "c.json", file(GOOD, imageData=f"data:image/jpeg;base64,{inline}"))
    write_json(folder / "json" / "d.json", file(GOOD, imagePath="..\\json\\a.jpg"))
    _, rows = convert(Labelme(str(folder / "json")), folder / "out")
    assert [row["image"]["bytes"] for row in rows.values()] == [picture()] * 4


def test_the_picture_inside_the_file_is_what_was_annotated(folder):
    inline = base64.b64encode(picture(8, 8)).decode()
    write_json(
        folder / "json" / "a.json",
        file(GOOD | {"points": [[0, 0], [4, 4]]}, imageData=inline, imageWidth=8, imageHeight=8),
    )
    _, rows = convert(Labelme(str(folder / "json")), folder / "out")
    assert rows["a"]["image"]["bytes"] == picture(8, 8) and regions(rows["a"]) == [("a person", [0, 0, 0.5, 0.5])]


def test_paths_that_climb_end_in_the_folder_of_images(folder):
    write_json(folder / "json" / "deep" / "a.json", file(GOOD, imagePath="..\\..\\images\\a.jpg"))
    write_json(folder / "json" / "b.json", file(GOOD, imagePath="../images/../images/a.jpg"))
    source = Labelme(str(folder / "json"), str(folder / "images"))
    summary, rows = convert(source, folder / "out")
    assert list(rows) == ["b", "deep/a"] and rows["b"]["image"]["path"] == "a.jpg"
    there = to_memory(folder, "labelme")
    assert convert(Labelme(f"{there}/json", f"{there}/images"), folder / "remote")[0] == summary


@pytest.mark.parametrize(
    ("bad", "message", "kept"),
    [
        (file(GOOD, imagePath="../a.jpg"), "image must lie in", 1),
        (file(GOOD, imagePath="../../../../etc/passwd"), "image must lie in", 1),
        (file(GOOD, imagePath="/etc/passwd"), "image must lie in", 1),
        (file(GOOD, imagePath="out.jpg"), "leads out of", 1),
        (file(GOOD, imagePath="b.jpg"), "'b.jpg' is no file", 1),
        (file(GOOD, imagePath=None), "neither imageData nor an imagePath", 1),
        (file(GOOD, imagePath="\ud800"), "neither imageData nor an imagePath", 1),
        (file(GOOD, imagePath="a\0.jpg"), "can't be read", 1),
        (file(GOOD, imageData="%%%"), "imageData is not base64", 1),
        (file(GOOD, imageData=["x"]), "imageData is not base64", 1),
        (file(GOOD, imageData="é"), "imageData is not base64", 1),
        (file(GOOD, imageData="AAAA"), "not an image", 1),
        (file(GOOD, imageHeight=21), "annotated as 40x21", 1),
        (file(GOOD, imageHeight=[[21]]), "annotated as 40x[[21]]", 1),
        ([], "no LabelMe file", 1),
        (file() | {"shapes": {}}, "no LabelMe file", 1),
        (file(GOOD, 3), "shapes[1]: must be an object, got int", 2),
        (file(GOOD, shape("x", "rectangle", (1, 1))), "shapes[1]: a rectangle must have 2 or 4 points", 2),
        (file(GOOD, shape("x", "polygon", (1, 1), (2, 2))), "shapes[1]: a polygon must have 3 or more points", 2),
        (file(GOOD, shape("x", "polygon", (1, 1), (2, 2), (3, "a"))), "shapes[1]: a polygon must have", 2),
        (file(GOOD, shape("x", "circle", (1, 1), (1e999, 2))), "Infinity is no JSON number", 1),
        (file(GOOD, shape("x", "circle", (1, 1), (10**400, 2))), "shapes[1]: a circle must have", 2),
        (file(GOOD, shape("x", "star", (1, 1))), "shapes[1]: shape_type 'star' is not known", 2),
        (file(GOOD, shape("x", ["y"], (1, 1))), "shapes[1]: shape_type must be a string", 2),
        (file(GOOD, shape(" ", "polygon", (1, 1))), "shapes[1]: label must be a string with text", 2),
        (file(GOOD, shape("\ud800", "polygon", (1, 1))), "shapes[1]: label must be a string with text", 2),
        (file(GOOD, shape("x", "rectangle", (1, 1), (50, 5))), "box must lie in [0, 1]", 2),
        (file(GOOD, shape("x", "rectangle", (1, 1), (1, 5))), "box must have x1 < x2", 2),
        ("{", "not JSON in UTF-8", 1),
        ("[" * 100_000, "not JSON in UTF-8", 1),
        ("\ufeff{", "not JSON in UTF-8", 1),
    ],
)
def test_faults_are_named_and_the_rest_is_kept(folder, caplog, bad, message, kept):
    os.symlink("/etc/hostname", folder / "json" / "out.jpg")
    write_json(folder / "json" / "a.json", file(GOOD))
    write_json(folder / "json" / "b.json", bad)
    if isinstance(bad, str):
        (folder / "json" / "b.json").write_text(bad)
    summary, rows = convert(Labelme(str(folder / "json")), folder / "out")
    assert message in caplog.text and f"{folder}/json/b.json: " in caplog.text
    assert len(rows) == kept and summary.faulty == 1
    assert all(regions(row) == [("a person", [0.25, 0.25, 0.75, 0.75])] for row in rows.values())


@pytest.mark.parametrize("depth", range(300, 1000, 50))
def test_whatever_is_nested_however_deeply_is_a_fault(folder, depth):
    write_json(folder / "json" / "a.json", file(GOOD))
    deep = "[" * depth + "]" * depth
    for index, text in enumerate((f'"imageHeight": {deep}, "imageWidth": 1', f'"group_id": {deep}')):
        (folder / "json" / f"{index}.json").write_text(f'{{"shapes": [{deep}, {{"points": {deep}}}], {text}}}')
    summary, rows = convert(Labelme(str(folder / "json")), folder / "out")
    assert list(rows) == ["a"] and summary.faulty == 2


def test_command_line(folder, capsys):
    write_json(folder / "json" / "a.json", file(GOOD))
    command = ["convert", "labelme", str(folder / "json"), "--output", str(folder / "out"), "--workers", "0"]
    assert main(command) == 0
    assert "rows written" in capsys.readouterr().err
