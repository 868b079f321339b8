"""Visual Genome in, Gran dataset out."""

import pytest
from converting import convert, picture, regions, to_memory, write_json

from granvit.data.__main__ import main
from granvit.data.sources.visual_genome import VisualGenome


def region(number, image, x, y, width, height, phrase="a man") -> dict:
    box = {"x": x, "y": y, "width": width, "height": height}
    return {"region_id": number, "image_id": image, "phrase": phrase, **box}


@pytest.fixture
def folder(tmp_path):
    for where in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg"):
        path = tmp_path / "images" / where
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture())
    return tmp_path


def write(folder, *images) -> str:
    return write_json(folder / "region_descriptions.json", [{"id": n, "regions": described} for n, described in images])


def test_boxes_are_exact_and_cut_to_the_picture(folder):
    file = write(
        folder,
        (2, [region(1, 2, 10, 5, 20, 10, "the  clock\nis green"), region(2, 2, -4, -5, 44, 50)]),
        (1, [region(3, 1, 0, 0, 40, 20)]),
        (3, [region(4, 3, 39, 19, 1, 1)]),
    )
    summary, rows = convert(VisualGenome(file, str(folder / "images"), licence="CC-BY-4.0"), folder / "out")
    assert list(rows) == ["vg/2", "vg/1", "vg/3"]
    assert regions(rows["vg/2"]) == [("the clock is green", [0.25, 0.25, 0.75, 0.75]), ("a man", [0, 0, 1, 1])]
    assert regions(rows["vg/3"]) == [("a man", pytest.approx([0.975, 0.95, 1, 1], rel=1e-7))]
    assert [rows["vg/2"][key] for key in ("source", "licence", "caption")] == ["visual_genome", "CC-BY-4.0", None]
    assert rows["vg/2"]["image"]["path"] == "2.jpg" and summary.faulty == 0


def test_coco_ids_are_aliases_and_sizes_are_checked(folder, caplog):
    file = write(folder, *((n, [region(n, n, 1, 1, 5, 5)]) for n in (1, 2, 3)))
    image_data = write_json(
        folder / "image_data.json",
        [
            {"image_id": 3, "coco_id": None, "width": 41, "height": 20, "flickr_id": 5},
            {"image_id": 1, "coco_id": 581857, "width": 40, "height": 20},
            {"coco_id": 3},
        ],
    )
    source = VisualGenome(file, str(folder / "images"), image_data)
    summary, rows = convert(source, folder / "out", exclude=["coco/581857", "coco/3"])
    assert list(rows) == ["vg/2"] and summary.dropped == {"excluded": 1}
    assert "annotated as 41x20, the image is 40x20" in caplog.text and "must be an object of an image_id" in caplog.text
    _, rows = convert(source, folder / "other", exclude=["vg/1"])
    assert list(rows) == ["vg/2"]


@pytest.mark.parametrize(
    ("image", "message", "kept"),
    [
        ((4, [region(1, 4, 1, 1, 5, 5)]), "'VG_100K_2/4.jpg' is no file (nor in", 1),
        (("../../x", [region(1, 4, 1, 1, 5, 5)]), "image must lie in", 1),
        ((None, []), "must be an object of an id and a list of regions", 1),
        ((2, {}), "must be an object of an id and a list of regions", 1),
        ((3, [region(1, 1, 1, 1, 5, 5)]), "id 'vg/3' is already that of", 1),
        ((2, [region(1, 2, 1, 1, 0, 5), region(2, 2, 1, 1, 5, 5)]), "box 0: box must have x1 < x2", 2),
        ((2, [region(1, 2, 50, 1, 5, 5), region(2, 2, 1, 1, 5, 5)]), "box 0: box must have x1 < x2", 2),
        ((2, [region(1, 2, "1", 1, 5, 5), region(2, 2, 1, 1, 5, 5)]), "regions[0]: box must be 4 numbers", 2),
        ((2, [3, region(2, 2, 1, 1, 5, 5)]), "regions[0]: box must be 4 numbers", 2),
        ((2, [region(1, 2, 1, 1, 5, 5, " "), region(2, 2, 1, 1, 5, 5)]), "caption must be a string with text", 2),
        ((2, [region(1, 2, 1, 1, 5, 5, "\ud800"), region(2, 2, 1, 1, 5, 5)]), "caption must be a string with", 2),
    ],
)
def test_faults_are_named_and_the_rest_is_kept(folder, caplog, image, message, kept):
    file = write(folder, (3, [region(1, 3, 1, 1, 5, 5)]), image)
    summary, rows = convert(VisualGenome(file, str(folder / "images")), folder / "out")
    assert message in caplog.text and len(rows) == kept and summary.faulty == 1
    assert all(len(row["regions"]) == 1 for row in rows.values())


def test_command_line_and_a_remote_source(folder, capsys):
    write(folder, (1, [region(1, 1, 1, 1, 5, 5)]), (2, [region(1, 2, 1, 1, 5, 5)]), (3, []))
    there = to_memory(folder, "vg")
    command = ["convert", "visual-genome", f"{there}/region_descriptions.json", "--images", f"{there}/images"]
    assert main([*command, "--output", str(folder / "out"), "--workers", "0"]) == 0
    assert "left out: image without annotation" in capsys.readouterr().err
    here = VisualGenome(str(folder / "region_descriptions.json"), str(folder / "images"))
    assert convert(here, folder / "here")[0].kept == 2
