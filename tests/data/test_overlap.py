"""A picture is found again after another JPEG quality or size, and no other picture, nor its mirror image."""

import io
import os

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from granvit.data import overlap
from granvit.data.__main__ import main
from granvit.data.build import build_dataset
from granvit.data.filters import Filter
from granvit.data.loader import GranDataset
from granvit.data.overlap import DISTANCE, find_overlap, nearest, picture_hash, write_ids
from granvit.data.parallel import process_map
from granvit.data.sample import build_sample
from granvit.data.schema import FEATURES
from granvit.questions.pictures import decode_image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Sixty pictures of the sample set: photographs, scenes, pages."""
    folder = tmp_path_factory.mktemp("overlap") / "sample"
    build_sample(folder, 80, seed=11, workers=0)
    rows = GranDataset(folder, "train").rows
    return [decode_image(rows[i]["image"]) for i in range(60)]


def encode(picture, form="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(picture, quality):
    return decode_image(encode(picture, "JPEG", quality=quality))


def scaled(picture, factor, filter=Image.Resampling.BICUBIC):
    return picture.resize([max(4, round(side * factor)) for side in picture.size], filter)


def bits(first, second) -> int:
    return int(np.bitwise_count(first ^ second).sum())


@pytest.mark.parametrize(
    "change",
    [
        lambda p: jpeg(p, 40),
        lambda p: scaled(p, 0.5),
        lambda p: scaled(p, 1.7, Image.Resampling.LANCZOS),
        lambda p: jpeg(scaled(p, 0.5, Image.Resampling.LANCZOS), 50),
        lambda p: p.point(lambda v: v * 0.9 + 10),
    ],
    ids=["quality", "half", "larger", "half and quality", "contrast"],
)
def test_another_quality_size_or_contrast_is_the_same_picture(pictures, change):
    assert max(bits(picture_hash(picture), picture_hash(change(picture))) for picture in pictures) <= DISTANCE


def test_other_pictures_and_mirror_images_are_not(pictures):
    codes = np.array([picture_hash(picture) for picture in pictures])
    assert not len(nearest(codes, None, DISTANCE))
    mirrored = np.array([picture_hash(ImageOps.mirror(picture)) for picture in pictures])
    assert not len(nearest(codes, mirrored, DISTANCE))
    turned = np.array([picture_hash(ImageOps.flip(picture)) for picture in pictures])
    assert not len(nearest(codes, turned, DISTANCE))


def test_a_single_grey_has_no_hash():
    assert picture_hash(Image.new("RGB", (50, 50), "white")) is None


@pytest.mark.parametrize("self", [False, True])
def test_nearest_is_what_comparing_each_with_each_finds(monkeypatch, self):
    monkeypatch.setattr(overlap, "_BLOCK", (7, 11))
    random = np.random.default_rng(0)
    first = random.integers(0, 2, (60, 256), dtype=np.uint8)
    second = random.integers(0, 2, (50, 256), dtype=np.uint8)
    for i, flips in enumerate((0, 3, 20, 40)):  # planted neighbours, in both halves of the bits
        second[10 * i] = first[i]
        second[10 * i, random.permutation(256)[:flips]] ^= 1
        first[20 + i] = second[10 * i]
    second[11] = second[10]  # two as near
    codes = [np.packbits(part, axis=1).view(np.uint64) for part in (first, second)]
    others = first if self else second
    distances = (first[:, None] != others).sum(-1)
    if self:
        distances[np.triu_indices(len(first))] = 999
    wanted = {i: row.min() for i, row in enumerate(distances) if row.min() <= 30}
    matches = nearest(codes[0], None if self else codes[1], 30)
    assert {int(i): int(d) for i, _, d in matches} == wanted and len(wanted) >= 3
    assert all(distances[i, j] == d for i, j, d in matches)
    assert nearest(codes[0][:0], codes[1], 30).shape == nearest(codes[0], codes[1][:0], 30).shape == (0, 3)


def save(folder, split, contents) -> str:
    """A dataset of (id, encoded picture)."""
    region = {"box": [0, 0, 1, 1], "caption": "all", "kind": "natural", "score": None}
    rows = []
    for name, content in contents:
        try:
            size = decode_image(content).size
        except ValueError:
            size = (9, 9)
        rows.append({"id": name, "image": {"bytes": content, "path": None}, "width": size[0], "height": size[1],
                     "caption": None, "regions": [region], "source": "toy", "licence": "CC0-1.0"})  # fmt: skip
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    datasets.DatasetDict({split: datasets.Dataset.from_dict(columns, FEATURES)}).save_to_disk(str(folder))
    return str(folder)


@pytest.fixture
def two(tmp_path, pictures):
    flat = encode(Image.new("RGB", (30, 30), "white"))
    training = [
        ("one", encode(pictures[0])), ("leak", encode(scaled(pictures[1], 0.6), "JPEG", quality=60)),
        ("by id", encode(pictures[2])), ("broken", b"no picture"), ("white", flat), ("white with id", flat),
        ("a\nb", encode(pictures[4])),
    ]  # fmt: skip
    test = [
        ("<b>test</b>", encode(pictures[1], "JPEG", quality=90)), ("by id", encode(pictures[3])), ("other white", flat),
        ("white with id", flat), ("x", encode(pictures[4])),
    ]  # fmt: skip
    return save(tmp_path / "train", "train", training), save(tmp_path / "test", "test", test)


def test_overlap_by_id_and_by_looks(two, tmp_path):
    overlap = find_overlap(*two, workers=0)
    assert [match.ids for match in overlap.matches] == [
        ("leak", "<b>test</b>"), ("by id", "by id"), ("white with id", "white with id"), ("a\nb", "x")
    ]  # fmt: skip
    assert [match.distance is None for match in overlap.matches] == [False, True, True, False]
    assert dict(overlap.lines()) == {
        "pictures of the first": 7, "pictures of the second": 5, "of the first found in the second": 4, "by id": 2,
        "by looks": 2, "not compared: flat": 4, "not compared: image": 1,
    }  # fmt: skip
    assert write_ids(overlap, tmp_path / "ids") == 1
    assert (tmp_path / "ids").read_text() == "leak\nby id\nwhite with id\n"


def test_a_split_against_itself(tmp_path, pictures):
    contents = [("a", encode(pictures[0])), ("b", encode(pictures[1])), ("c", encode(jpeg(pictures[0], 50)))]
    folder = save(tmp_path / "d", "train", [*contents, ("b", encode(pictures[5]))])
    overlap = find_overlap(folder, folder, other_split="train", workers=0)
    assert [match.ids for match in overlap.matches] == [("c", "a"), ("b", "b")]


def test_command_line_and_what_takes_its_ids(two, tmp_path, capsys):
    ids, page = tmp_path / "ids.txt", tmp_path / "page.html"
    assert main(["overlap", *two, "--output", str(ids), "--page", str(page), "--workers", "2"]) == 0
    assert "of the first found in the second" in capsys.readouterr().err
    html = page.read_text()
    assert "<b>test</b>" not in html and "&lt;b&gt;test" in html and html.count("<figure>") == 4
    assert "http-equiv" in html and 'src="http' not in html
    source = Filter(two[0], short_side=0, box_area=0)
    exclude = ids.read_text().splitlines()
    assert build_dataset(source, tmp_path / "out", workers=0, fault_budget=1, exclude=exclude).dropped["excluded"] == 3
    assert main(["overlap", *two, "--distance", "300"]) == 2
    assert main(["overlap", *two, "--workers", "-1"]) == 0
    assert "distance must be in" in capsys.readouterr().err
    assert main(["overlap", *two, "--other-split", "train"]) == 2
    assert main(["overlap", *two, "--output", str(tmp_path / "no" / "ids")]) == 2


def test_a_process_that_dies_is_told_in_one_line():
    with pytest.raises(ValueError, match="a worker process died"), process_map(2, 2) as run:
        list(run(os._exit, [1, 1]))
