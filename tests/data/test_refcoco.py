"""RefCOCO in its three forms: the same rows from each, boxes exact though the forms differ in what a box is, but that
a form without splits has every expression, as what is evaluated on needs it."""

import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from converting import convert, picture, regions, to_memory, write_json

from granvit.data.__main__ import main
from granvit.data.loader import GranDataset
from granvit.data.sources import refcoco
from granvit.data.sources.coco import Coco
from granvit.data.sources.refcoco import RefCoco
from granvit.eval.evaluation import ask
from granvit.questions.prompts import CAPTION2BBOX, FIND_BOX, questions

FILE = "COCO_train2014_{:012d}.jpg"
OBJECTS = [  # ref_id, image_id, ann_id, split, box xywh, sentences
    (0, 581857, 11, "train", [10, 5, 20, 10], ["the lady with the blue shirt", "lady in blue", "lady  in blue"]),
    (1, 7, 12, "train", [0, 0, 40, 20], ["everything"]),
    (2, 581857, 13, "train", [0.5, 0.5, 1, 1], ["speck"]),
    (3, 8, 14, "val", [1, 1, 2, 2], ["dot"]),
    (4, 9, 15, "testA", [1, 1, 2, 2], ["dot"]),
]
EXPECTED = {
    "coco/581857": [
        ("the lady with the blue shirt", [0.25, 0.25, 0.75, 0.75]),
        ("lady in blue", [0.25, 0.25, 0.75, 0.75]),
        ("speck", pytest.approx([0.0125, 0.025, 0.0375, 0.075], rel=1e-7)),
    ],
    "coco/7": [("everything", [0, 0, 1, 1])],
}
SPLITLESS = {"coco/581857": [*EXPECTED["coco/581857"][:2], *EXPECTED["coco/581857"][1:]]} | {
    "coco/7": EXPECTED["coco/7"]
}  # of a split that may be evaluated on: "lady in blue" was said twice


def ref(ref_id, image_id, ann_id, split, box, sentences, /, **changes) -> dict:
    sents = [
        {"tokens": one.split(), "raw": one.upper(), "sent_id": 3 * ref_id + n, "sent": one}
        for n, one in enumerate(sentences)
    ]
    return {
        "sent_ids": [one["sent_id"] for one in sents],
        "file_name": FILE.format(image_id).replace(".jpg", f"_{ref_id}.jpg"),
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sents,
        "category_id": 1,
    } | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train2014").mkdir()
    for _, image, *_ in OBJECTS:
        (tmp_path / "train2014" / FILE.format(image)).write_bytes(picture())
    images = sorted({image for _, image, *_ in OBJECTS})
    instances = {
        "images": [{"id": n, "file_name": FILE.format(n), "width": 40, "height": 20} for n in images],
        "annotations": [
            {"id": ann, "image_id": image, "category_id": 1, "bbox": box, "iscrowd": 0}
            for _, image, ann, _, box, _ in OBJECTS
        ],
        "categories": [{"id": 1, "name": "person"}],
    }
    write_json(tmp_path / "refcoco" / "instances.json", instances)
    return tmp_path


def pickled(folder, refs, protocol=0, name="refs(unc).p") -> str:
    path = folder / "refcoco" / name
    path.write_bytes(pickle.dumps(refs, protocol))
    return str(path)


def with_paths(folder, objects=OBJECTS) -> str:
    """The columns of jxu124's, whose boxes are xyxy."""
    rows = []
    for one in objects:
        row, (x, y, w, h) = ref(*one), one[4]
        row |= {
            "raw_anns": json.dumps({"bbox": one[4]}),
            "raw_image_info": json.dumps({"id": one[1]}),
            "raw_sentences": json.dumps(row["sentences"]),
            "image_path": f"coco/train2014/{FILE.format(one[1])}",
            "bbox": [float(x), float(y), float(x + w), float(y + h)],
            "captions": one[5],
            "global_image_id": f"coco.{one[1]}",
            "anns_id": f"coco.{one[2]}",
        }
        rows.append(row)
    (folder / "paths").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows[:2]), folder / "paths" / "train-00000-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[2:]), folder / "paths" / "train-00001-of-00002.parquet")
    return str(folder / "paths")


def with_pictures(folder, objects=OBJECTS[:3], **changes) -> str:
    """The columns of lmms-lab's, whose boxes are xywh."""
    rows = [
        {
            "question_id": str(one[2]),
            "image": {"bytes": picture(), "path": None},
            "question": "Please carefully observe the area circled in the image",
            "answer": one[5],
            "segmentation": [1.0, 2.0],
            "bbox": [float(side) for side in one[4]],
            "iscrowd": 0,
            "file_name": ref(*one)["file_name"],
        }
        | changes
        for one in objects
    ]
    path = folder / "val-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return str(path)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_pickle(folder, protocol):
    refs = pickled(folder, [ref(*one) for one in OBJECTS], protocol)
    summary, rows = convert(RefCoco(refs, str(folder / "train2014"), licence="x"), folder / "out")
    assert {key: regions(row) for key, row in rows.items()} == EXPECTED
    assert (summary.read, summary.kept, summary.regions) == (2, 2, 4)
    assert summary.dropped == {"object of another split": 2}
    row = rows["coco/581857"]
    assert (row["source"], row["licence"], row["image"]["path"]) == ("refcoco", "x", FILE.format(581857))


def test_parquet_with_paths_has_other_boxes(folder):
    _, rows = convert(RefCoco(with_paths(folder), str(folder / "train2014")), folder / "out")
    assert {key: regions(row) for key, row in rows.items()} == EXPECTED


def test_parquet_with_pictures(folder):
    _, rows = convert(RefCoco(with_pictures(folder), part="all"), folder / "out")
    assert {key: regions(row) for key, row in rows.items()} == SPLITLESS
    assert rows["coco/7"]["image"] == {"bytes": picture(), "path": "7.jpg"}


def test_parts(folder):
    refs = pickled(folder, [ref(*one) for one in OBJECTS])
    for part, expected in {"val": {"coco/8"}, "testA": {"coco/9"}, "all": {*EXPECTED, "coco/8", "coco/9"}}.items():
        _, rows = convert(RefCoco(refs, str(folder / "train2014"), part=part), folder / part, split=part)
        assert set(rows) == expected
    for source in (refs, with_paths(folder)):
        with pytest.raises(ValueError, match="part must be one of 'testA', 'train', 'val' or all, got 'tset'"):
            convert(RefCoco(source, str(folder / "train2014"), part="tset"), folder / "out")
    with pytest.raises(ValueError, match='its rows name no split: choose by file, with "all" as part'):
        convert(RefCoco(with_pictures(folder)), folder / "out")


@pytest.mark.parametrize("part", ["val", "testA", "testB"])
def test_every_expression_is_asked_when_a_part_is_evaluated(folder, part):
    """The official count is that of the pickle's sentences: one that is said twice, and one that fits two objects, or
    two objects of one box, count as often. What is learnt from is each sentence that stands once in its image."""
    objects = [
        (5, 581857, 11, part, [10, 5, 20, 10], ["left guy", "left guy", "man in red"]),
        (6, 581857, 13, part, [0.5, 0.5, 1, 1], ["left guy", "speck"]),
        (7, 7, 12, part, [0, 0, 40, 20], ["all of it"]),
        (8, 7, 12, part, [0, 0, 40, 20], ["all of it"]),
    ]
    refs = pickled(folder, [ref(*one) for one in [*(one for one in OBJECTS if one[3] != part), *objects]])
    convert(RefCoco(refs, str(folder / "train2014"), part=part), folder / "out", split=part)
    data = GranDataset(folder / "out", part)
    asked = [(a.truth["caption"], a.truth["box"]) for a in ask(data, (CAPTION2BBOX,), range(len(data)))]
    official = [(sentence, box) for *_, box, sentences in objects for sentence in sentences]
    pixels = [[x / 40, y / 20, (x + w) / 40, (y + h) / 20] for _, (x, y, w, h) in official]
    assert [caption for caption, _ in asked] == [sentence for sentence, _ in official]
    assert [box for _, box in asked] == [pytest.approx(box) for box in pixels]
    learnt = [q.prompt for row in range(len(data)) for q in questions(data[row], (CAPTION2BBOX,))]
    assert learnt == [FIND_BOX + sentence for sentence in ("man in red", "speck")]


def test_what_is_evaluated_on_is_excluded_from_coco(folder):
    refs = pickled(folder, [ref(*one) for one in OBJECTS])
    _, rows = convert(RefCoco(refs, str(folder / "train2014"), part="val"), folder / "val")
    coco = Coco(str(folder / "refcoco" / "instances.json"), str(folder / "train2014"))
    _, left = convert(coco, folder / "coco", exclude=list(rows))
    assert set(left) == {"coco/581857", "coco/7", "coco/9"}


@pytest.mark.parametrize(
    ("bad", "message", "kept"),
    [
        (3, "must be an object with an ann_id", 1),
        (ref(*OBJECTS[0], ann_id=99), "annotation 99 of image 581857 is not listed", 1),
        (ref(*OBJECTS[0], ann_id=12), "annotation 12 of image 581857 is not listed", 1),
        (ref(*OBJECTS[0], ann_id=[1]), "must be an object with an ann_id", 1),
        (ref(*OBJECTS[0], sentences="x"), "must have a list of at most 100 sentences", 1),
        (ref(*OBJECTS[0], sentences=[{}] * 101), "must have a list of at most 100 sentences", 1),
        (ref(*OBJECTS[0], sentences=[{}]), "a sentence must be a string", 1),
        (ref(*OBJECTS[0], sentences=[{"sent": "x" * 1001}]), "a sentence must be a string", 1),
        (ref(*OBJECTS[0], sentences=[{"sent": "good"}, {"sent": " "}]), "caption must be a string with text", 2),
    ],
)
def test_faults_are_named_and_the_rest_is_kept(folder, caplog, bad, message, kept):
    bad = bad | {"split": "train"} if isinstance(bad, dict) else bad
    part = "train" if isinstance(bad, dict) else "all"
    refs = pickled(folder, [bad, ref(*OBJECTS[1])])
    summary, rows = convert(RefCoco(refs, str(folder / "train2014"), part=part), folder / "out")
    assert message in caplog.text and len(rows) == kept and summary.faulty == 1


def test_faults_of_parquet(folder, caplog):
    objects = [(*OBJECTS[0][:4], [1, 2, 3], ["short box"]), OBJECTS[1]]
    _, rows = convert(RefCoco(with_pictures(folder, objects), part="all"), folder / "a")
    assert list(rows) == ["coco/7"] and "box must be 4 numbers [x, y, width, height]" in caplog.text
    with pytest.raises(ValueError, match="file_name must begin with COCO_SET_|no usable image"):
        convert(RefCoco(with_pictures(folder, file_name="a.jpg"), part="all"), folder / "c")
    with pytest.raises(ValueError, match="no usable image"):
        convert(
            RefCoco(with_pictures(folder, image={"bytes": b"GIF89a", "path": "/etc/passwd"}), part="all"), folder / "d"
        )


def test_a_file_of_other_columns_or_kind_is_refused(folder):
    path = folder / "x.parquet"
    pq.write_table(pa.table({"image": [1], "boxes": [2]}), path)
    with pytest.raises(ValueError, match=r"must have the columns \(bbox, captions, image_id, .*, has \(boxes, image\)"):
        convert(RefCoco(str(path)), folder / "out")
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=f"{path} can't be read"):
        convert(RefCoco(str(path)), folder / "out")
    with pytest.raises(ValueError, match="refs must be a pickle"):
        convert(RefCoco(str(folder / "train2014")), folder / "out")
    with pytest.raises(ValueError, match="images must be the folder"):
        convert(RefCoco(pickled(folder, [ref(*OBJECTS[0])])), folder / "out")
    with pytest.raises(ValueError, match="images must be the folder"):
        convert(RefCoco(with_paths(folder)), folder / "out")
    with pytest.raises(ValueError, match="must hold a list of references, got dict"):
        convert(RefCoco(pickled(folder, {}), str(folder / "train2014")), folder / "out")
    assert not (folder / "out").exists()


def test_a_hostile_pickle_is_refused(folder, capsys, monkeypatch):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {folder / 'HERE'}",)

    refs = pickled(folder, [Hostile()])
    command = ["convert", "refcoco", refs, "--images", str(folder / "train2014"), "--output", str(folder / "out")]
    assert main(command) == 2
    assert "is not a pickle of plain data: it wants to use 'posix system'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(refcoco, "MAX_PICKLE", 10)
    assert main(command) == 2
    assert "has more than the limit of 10 bytes" in " ".join(capsys.readouterr().err.split())
    assert not (folder / "HERE").exists() and not (folder / "out").exists()


def test_command_line(folder, capsys):
    refs = pickled(folder, [ref(*one) for one in OBJECTS])
    command = ["convert", "refcoco", refs, "--images", str(folder / "train2014"), "--output", str(folder / "out")]
    assert main([*command, "--part", "testA", "--split", "testA", "--workers", "0"]) == 0
    assert "object of another split" in capsys.readouterr().err


def test_remote_sources(folder):
    pickled(folder, [ref(*one) for one in OBJECTS])
    with_paths(folder)
    with_pictures(folder)
    there = to_memory(folder, "refcoco")
    for name, source in {
        "pickle": RefCoco(f"{there}/refcoco/refs(unc).p", f"{there}/train2014"),
        "paths": RefCoco(f"{there}/paths", f"{there}/train2014"),
        "pictures": RefCoco(f"{there}/val-00000-of-00001.parquet", part="all"),
    }.items():
        _, rows = convert(source, folder / "out" / name)
        expected = SPLITLESS if name == "pictures" else EXPECTED
        assert {key: regions(row) for key, row in rows.items()} == expected
