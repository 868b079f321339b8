"""Every rule removes what it says and counts it; text is exempt where it must be; nothing that is broken ends a run."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from granvit.data import filters
from granvit.data.__main__ import main
from granvit.data.build import build_dataset
from granvit.data.filters import Filter, repeated
from granvit.data.loader import GranDataset
from granvit.data.measures import normalised
from granvit.data.schema import FEATURES

OFF = dict(short_side=0, image_aspect=100, box_aspect=1000, box_area=0)


def picture(size=(600, 500), seed=0) -> bytes:
    buffer = io.BytesIO()
    colour = tuple(np.random.default_rng(seed).integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def region(box=(0.1, 0.1, 0.5, 0.5), caption="a red ball", kind="natural", score=None) -> dict:
    return {"box": list(box), "caption": caption, "kind": kind, "score": score}


def row(name, *regions, size=(600, 500), caption=None, content=None) -> dict:
    content = picture(size, sum(name.encode())) if content is None else content
    return {
        "id": name, "image": {"bytes": content, "path": None}, "width": size[0], "height": size[1],
        "caption": caption, "regions": list(regions), "source": "toy", "licence": "CC0-1.0",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """run(rows, **limits) -> (Summary, {id: captions of regions}); the dataset is Arrow or, where asked, Parquet."""

    def build(rows, parquet=False, exclude=(), workers=0, **limits):
        data = datasets.Dataset.from_dict({name: [one[name] for one in rows] for name in FEATURES}, FEATURES)
        if parquet:
            (tmp_path / "in").mkdir()
            data.to_parquet(tmp_path / "in" / "train.parquet")
        else:
            data.save_to_disk(str(tmp_path / "in"))
        source = Filter(str(tmp_path / "in"), **limits)
        summary = build_dataset(source, tmp_path / "out", workers=workers, fault_budget=1, exclude=exclude)
        kept = GranDataset(tmp_path / "out")
        return summary, {s.id: [r.caption for r in s.regions] for s in (kept[i] for i in range(len(kept)))}

    return build


@pytest.mark.parametrize("parquet", [False, True])
def test_the_papers_rules(run, parquet):
    rows = [
        row("good", region(), region((0, 0, 0.5, 0.1), "too long"), region((0.1, 0.1, 0.2, 0.2), "too small")),
        row("short", region(), size=(600, 448)),
        row("long", region(), size=(1501, 500)),
        row("edge", region((0, 0, 1, 1), "three to one"), size=(1500, 500)),
        row("text", region((0, 0, 0.8, 0.04), "Total 12.50", "ocr")),
        row("none", region((0.1, 0.1, 0.2, 0.2)), caption="nothing left but this"),
    ]
    summary, kept = run(rows, parquet)
    assert kept == {"good": ["a red ball"], "edge": ["three to one"], "text": ["Total 12.50"]}
    assert summary.dropped == {
        "aspect region": 1, "area region": 2, "short side image": 1, "aspect image": 1, "too few regions image": 1
    }  # fmt: skip
    assert (summary.read, summary.kept, summary.regions, summary.faulty) == (6, 3, 3, 0)


def test_text_is_held_to_its_height_and_where_asked_to_the_rules_on_boxes(run):
    line, low = region((0, 0, 0.8, 0.04), "a line", "ocr"), region((0, 0, 0.8, 0.01), "unreadable", "ocr")
    summary, kept = run([row("a", line, low, region())], text_side=8)
    assert kept == {"a": ["a line", "a red ball"]} and summary.dropped == {"text side region": 1}


def test_ocr_boxes(run):
    summary, kept = run([row("a", region((0, 0, 0.8, 0.04), "a line", "ocr"), region())], ocr_boxes=True)
    assert kept == {"a": ["a red ball"]} and summary.dropped == {"aspect region": 1}


def test_a_caption_alone_is_enough_where_no_region_is_wanted(run):
    small = region((0.1, 0.1, 0.2, 0.2))
    _, kept = run([row("a", small, caption="a picture"), row("b", small), row("c", region())], min_regions=0)
    assert kept == {"a": [], "c": ["a red ball"]}


def test_of_boxes_that_are_nearly_the_same_the_best_score_stays_or_the_first(run):
    near = (0.1, 0.1, 0.5, 0.52)
    rows = [
        row("score", region(caption="low", score=0.2), region(near, "high", score=0.9), region(near, "none")),
        row("first", region(caption="first"), region(near, "second")),
        row("kinds", region(caption="a sign"), region(near, "EXIT", "ocr")),
        row("apart", region(caption="left"), region((0.5, 0.1, 0.9, 0.5), "right")),
    ]
    summary, kept = run(rows, same_box=0.8, **OFF)
    assert kept == {"score": ["high"], "first": ["first"], "kinds": ["a sign", "EXIT"], "apart": ["left", "right"]}
    assert summary.dropped == {"same box region": 3}


def test_captions_repeated_in_a_picture(run):
    boxes = [(x, 0.1, x + 0.1, 0.3) for x in (0.1, 0.3, 0.5)]
    three = [
        region(box, text, score=s) for box, text, s in zip(boxes, ("A car!", "a car", "a bus"), (1, 2, 0), strict=True)
    ]
    text = [region(box, "EXIT", "ocr") for box in boxes]
    summary, kept = run([row("a", *three), row("b", *text)], repeats_in_image=1, **OFF)
    assert kept == {"a": ["a car", "a bus"], "b": ["EXIT"] * 3} and summary.dropped == {"repeated in image region": 1}


def test_stock_phrases_go_from_the_whole_dataset(run):
    rows = [row(f"{i}", region(caption="A photo."), region((0, 0, 0.2, 0.2), f"dog {i}")) for i in range(4)]
    rows += [row("only", region(caption="a photo")), row("text", *[region(caption="EXIT", kind="ocr")] * 9)]
    summary, kept = run(rows, repeats=4, **OFF)
    assert kept == {f"{i}": [f"dog {i}"] for i in range(4)} | {"text": ["EXIT"] * 9}
    assert summary.dropped == {"stock phrase region": 5, "too few regions image": 1}


def test_repeated_is_exact_where_hashes_collide(monkeypatch):
    monkeypatch.setattr(filters, "BUCKETS", 2)
    texts = [f"{i}" for i in range(50)] + ["x"] * 4 + ["y"] * 3
    assert repeated(lambda: iter(texts), 3) == {filters._digest("x")}


@pytest.mark.parametrize(
    ("caption", "kept"),
    [
        ("a red ball", True), ("café à la crème", True), ("12:30", True), ("🙂🙂", True), ("красный мяч", False),
        ("ball мяч мяч", False), ("红色的球", False), ("<script>alert(1)</script>", True), ("كرة حمراء", False),
    ],
)  # fmt: skip
def test_scripts(run, caption, kept):
    summary, _ = run([row("a", region(), region(caption=caption))], scripts=("LATIN",), **OFF)
    assert summary.regions == 1 + kept and summary.dropped["script region"] == 1 - kept


def test_scripts_of_the_pictures_caption(run):
    summary, _ = run([row("a", region(), caption="красный мяч")], scripts=("LATIN",), **OFF)
    assert summary.kept == 1 and summary.dropped == {"script image caption": 1}


def test_lengths(run):
    captions = ("ball", "a red ball", "one two three four five", "红色的球", "x" * 1000)
    rows = [row("a", *(region(caption=c) for c in captions), region(caption="EXIT", kind="ocr"))]
    summary, kept = run(rows, min_words=2, max_words=4, max_characters=100, **OFF)
    assert kept == {"a": ["a red ball", "红色的球", "EXIT"]}
    assert summary.dropped == {"words region": 2, "characters region": 1}


def test_equal_pictures_and_excluded_ids(run):
    same = picture(seed=5)
    rows = [row("a", region(), content=same), row("b", region(), content=same), row("c", region()), row("d", region())]
    summary, kept = run(rows, unique_pictures=True, exclude=["d"], **OFF)
    assert list(kept) == ["a", "c"] and summary.dropped == {"same picture image": 1, "excluded": 1}


def test_what_is_broken_is_counted(run):
    bad = [region(caption=" "), region((0, 0, 2, 1)), region((0.5, 0.5, 0.5, 0.6)), None]
    rows = [row("good", region(), *bad), row("broken", region(), content=b"no picture")]
    rows += [row("lying", region(), content=picture((10, 10))), row("", region()), row("good", region())]
    rows += [row("nothing", content=picture())]
    summary, kept = run(rows, unique_pictures=True, repeats=9, **OFF)
    assert kept == {"good": ["a red ball"]}
    assert summary.faults == {
        "box": 2,
        "region_caption": 1,
        "regions": 1,
        "image": 1,
        "size": 1,
        "id": 2,
        "empty_row": 1,
    }


@pytest.mark.parametrize(
    "odd",
    [
        {"regions": "text"}, {"regions": ["text"]}, {"regions": [1]}, {"regions": [{"box": [0.0, 0.0, 1.0, 1.0]}]},
        {"image": {"bytes": "text", "path": None}}, {"image": {"bytes": None, "path": 3}}, {"licence": {"a": 1}},
    ],
)  # fmt: skip
def test_columns_of_other_types_are_faults_to_every_command(tmp_path, odd, caplog):
    (tmp_path / "in").mkdir()
    datasets.Dataset.from_list([row("a", region()) | odd]).to_parquet(tmp_path / "in" / "train.parquet")
    with pytest.raises(ValueError, match="there is no usable image: 1 of 1 images have faults"):
        build_dataset(
            Filter(str(tmp_path / "in"), repeats=1, unique_pictures=True, **OFF), tmp_path / "out", workers=0,
            fault_budget=1,
        )  # fmt: skip
    assert main(["audit", str(tmp_path / "in"), "--output", str(tmp_path / "audit"), "--workers", "0"]) == 0
    assert main(["overlap", *[str(tmp_path / "in")] * 2, "--other-split", "train", "--workers", "0"]) == 0


def test_a_file_with_a_broken_row_group_is_named(tmp_path):
    text = pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.Table.from_pylist([row("a", region())], FEATURES.arrow_schema)
    pq.write_table(table.set_column(4, "caption", text), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet: row group 0 can't be read: .*UTF8"):
        build_dataset(Filter(str(tmp_path), **OFF), tmp_path / "out", workers=0)


def test_nothing_left_says_why(run):
    with pytest.raises(ValueError, match="there is no usable image: 0 of 1 images .*; left out: short side image 1"):
        run([row("a", region())], short_side=9000)


def test_two_processes_give_the_same(run, tmp_path):
    rows = [row(f"{i}", region()) for i in range(5)]
    _, kept = run(rows, workers=2, **OFF)
    assert list(kept) == [f"{i}" for i in range(5)]


@pytest.mark.parametrize(
    "wrong", [dict(image_aspect=0.5), dict(same_box=2), dict(scripts=("LATEIN",)), dict(min_words=3, max_words=2)]
)
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(reversed(wrong))):
        Filter("x", **wrong)


def test_normalised():
    assert normalised("  A red,  BALL! ") == "a red ball" and normalised(" ?! ") == "?!"


def test_command_line(tmp_path, capsys):
    rows = [row("a", region()), row("b", region()), row("c", region(), size=(20, 20))]
    data = datasets.Dataset.from_dict({name: [one[name] for one in rows] for name in FEATURES}, FEATURES)
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "in"))
    (tmp_path / "ids").write_text("b\n")
    command = ["filter", str(tmp_path / "in"), "--split", "test", "--output", str(tmp_path / "out"), "--workers", "0"]
    assert main([*command, "--exclude", str(tmp_path / "ids")]) == 0
    assert "left out: short side image" in capsys.readouterr().err
    assert GranDataset(tmp_path / "out", "test")[0].id == "a"
    assert main(["filter", str(tmp_path / "no"), "--output", str(tmp_path / "o")]) == 2
    assert "error: no dataset at" in capsys.readouterr().err
