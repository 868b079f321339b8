"""JSONL in, Gran dataset out; every fault is named with its line."""

import codecs
import json
import logging
import os
import time

import pytest
from PIL import Image

from granvit.data.__main__ import main
from granvit.data.build import Summary, build_dataset
from granvit.data.faults import FaultBudgetExceeded
from granvit.data.loader import GranDataset
from granvit.data.sources.jsonl import Jsonl

REGION = {"box": [0.1, 0.2, 0.5, 0.6], "caption": "red ball", "kind": "natural"}


def line(**changes) -> dict:
    base = {
        "image": "images/a.png",
        "width": 12,
        "height": 8,
        "caption": None,
        "regions": [REGION],
        "source": "mine",
        "licence": "CC0-1.0",
        "id": f"id{len(changes)}-{sorted(changes)}",
    }
    return {key: value for key, value in (base | changes).items() if value != "absent"}


def convert_jsonl(file, output, **options) -> Summary:
    return build_dataset(Jsonl(str(file)), output, workers=0, **options)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (12, 8), "red").save(tmp_path / "images" / "a.png")
    return tmp_path / "all.jsonl"


def write(file, *lines) -> None:
    file.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines))


def test_good_lines(file, tmp_path):
    write(
        file,
        line(),
        "",
        line(id="absent", caption="a picture", regions=[]),
        line(regions=[REGION | {"score": 0.5}]),
    )
    summary = convert_jsonl(file, tmp_path / "out", split="test")
    assert (summary.read, summary.kept, summary.regions, summary.faulty) == (3, 3, 2, 0)
    data = GranDataset(tmp_path / "out", "test")
    assert [data[i].id for i in range(3)][1] == "images/a.png"
    assert data[0].regions[0].box == pytest.approx((0.1, 0.2, 0.5, 0.6))
    assert data[2].regions[0].score == 0.5
    assert data.rows[0]["image"]["bytes"] == (tmp_path / "images" / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{broken", "not JSON"),
        ("[1]", "must be an object, got list"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": 1, "a": 2}', "repeated key 'a'"),
        ("[" * 100_000, "not JSON"),
        (line(image="absent"), "missing image"),
        (line(label="x"), "unknown key 'label'; known: caption"),
        (line(width="12"), "width must be an integer, got '12'"),
        (line(height=True), "height must be an integer, got True"),
        (line(caption=3), "caption must be a string or null, got 3"),
        (line(caption=" "), "caption must be null or have text"),
        (line(regions={}), "regions must be a list"),
        (line(regions=[]), "neither a caption nor a usable region"),
        (line(id=""), "id must not be empty"),
        (line(width=8, height=12), "width and height are 8x12, the image is 12x8"),
        (line(image="images/b.png"), "'images/b.png' is no file"),
        (line(image="../a.png"), "image must lie in"),
        (line(image="images/../../etc/passwd"), "image must lie in"),
        (line(image="/etc/passwd"), "image must lie in"),
        (line(image="a\0.png"), "can't be read"),
        (line(image="all.jsonl"), "not an image in one of the formats"),
        (line(image="images/out.png"), "leads out of"),
        (line(regions=[REGION, 3]), r"regions[1]: a region must be an object, got 3"),
        (line(regions=[REGION, REGION | {"name": "x"}]), r"regions[1]: unknown key 'name'"),
        (line(regions=[REGION, {"box": [0, 0, 1, 1]}]), r"regions[1]: missing caption, kind"),
        (line(regions=[REGION, REGION | {"box": "0 0 1 1"}]), r"regions[1]: box must be a list"),
        (line(regions=[REGION, REGION | {"box": [0, 0, 12, 8]}]), r"regions[1]: box must lie in [0, 1]"),
        (line(regions=[REGION, REGION | {"box": [0.5, 0, 0.5, 1]}]), r"regions[1]: box must have x1 < x2"),
        (line(regions=[REGION, REGION | {"box": [0, 0, 1e999, 1]}]), "no JSON number"),
        (line(caption="\ud800"), r"caption must be a string or null of Unicode, got '\ud800'"),
        (line(id="\ud800"), r"id must be a string of Unicode, got '\ud800'"),
        (line(source="\udfff"), r"source must be a string of Unicode, got '\udfff'"),
        (line(image="images/\udcff.png"), r"image must be a path relative to the file of Unicode"),
        (line(regions=[REGION, REGION | {"caption": "\ud800"}]), r"regions[1]: caption must be a string with text"),
        (line(regions=[REGION, REGION | {"box": [0, 0, 10**400, 1]}]), r"regions[1]: box must be 4 finite numbers"),
        (line(regions=[REGION, REGION | {"box": [0.5, 0.5, 0.5 + 1e-9, 0.6]}]), r"regions[1]: box must have x1 < x2"),
        (line(regions=[REGION, REGION | {"score": 10**400}]), r"regions[1]: score must be null or a finite number"),
        (line(regions=[REGION, REGION | {"kind": "text"}]), r"regions[1]: kind must be one of natural, ocr"),
        (line(regions=[REGION, REGION | {"caption": ""}]), r"regions[1]: caption must be a string with text"),
    ],
)
def test_every_fault_is_named_with_its_line(file, tmp_path, bad, message, caplog):
    os.symlink("/etc/hostname", tmp_path / "images" / "out.png")
    write(file, line(id="first"), bad, line(id="last"))
    with caplog.at_level(logging.WARNING):
        summary = convert_jsonl(file, tmp_path / "out", fault_budget=0.5)
    assert any(f"{file}:2: " in record.message and message in record.message for record in caplog.records)
    assert (summary.read, summary.faulty) == (3, 1)
    data = GranDataset(tmp_path / "out")
    kept = [data[i].id for i in range(len(data))]
    assert kept[0] == "first" and kept[-1] == "last"
    assert len(kept) == (3 if "regions[1]" in message else 2)


def test_what_the_picture_knows_need_not_be_told(file, tmp_path):
    short = {"image": "images/a.png", "regions": [REGION]}
    unknown = dict.fromkeys(("width", "height", "regions", "source", "licence"))  # null, as pandas writes it
    write(file, short, {"image": "images/a.png", "caption": "a picture", "id": "b"} | unknown)
    assert convert_jsonl(file, tmp_path / "out").kept == 2
    row = GranDataset(tmp_path / "out").rows[0]
    assert (row["id"], row["width"], row["height"], row["caption"]) == ("images/a.png", 12, 8, None)
    assert (row["source"], row["licence"]) == ("", "")


def test_byte_order_marks_are_read_over(file, tmp_path):
    lines = [json.dumps(line(id=name)).encode() for name in "ab"]
    file.write_bytes(b"".join(codecs.BOM_UTF8 + text + b"\n" for text in lines) + codecs.BOM_UTF8)
    assert convert_jsonl(file, tmp_path / "out").read == 2


def test_equal_faults_are_one_line(file, tmp_path, caplog):
    write(file, *[line(id=f"n{number}", licence=1) for number in range(16)], line(id="good"))
    summary = convert_jsonl(file, tmp_path / "out", fault_budget=1)
    assert summary.faulty == summary.faults["type"] == 16
    named = ", ".join(f"{file}:{number}" for number in range(1, 11))
    assert caplog.messages == [f"{named} and 6 more: licence must be a string, got 1"]


def test_a_used_id_is_a_fault(file, tmp_path, caplog):
    write(file, line(id="x"), line(id="x"))
    convert_jsonl(file, tmp_path / "out")
    assert f":2: id 'x' is already that of {file}:1" in caplog.text


def test_bytes_that_are_not_utf8(file, tmp_path, caplog):
    write(file, line(id="x"))
    file.write_bytes(file.read_bytes() + b"\xff\xfe\n")
    convert_jsonl(file, tmp_path / "out")
    assert ":2: not JSON in UTF-8" in caplog.text


def test_exif_turns_the_size(file, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 8)).save(tmp_path / "images" / "turned.jpg", exif=exif)
    write(file, line(image="images/turned.jpg", width=8, height=12))
    convert_jsonl(file, tmp_path / "out")
    data = GranDataset(tmp_path / "out")
    assert (data.rows[0]["width"], data.rows[0]["height"]) == (8, 12)
    assert data[0].image.shape == (12, 8, 3)


def test_too_many_faults_name_all_and_write_nothing(file, tmp_path, caplog):
    write(file, line(), *["{"] * 5)
    with pytest.raises(FaultBudgetExceeded, match="5 of 6 lines have faults .json 5."):
        convert_jsonl(file, tmp_path / "out")
    [message] = caplog.messages
    assert all(f"{file}:{number}" in message for number in range(2, 7))
    with pytest.raises(ValueError, match="not finished"):
        GranDataset(tmp_path / "out")
    assert convert_jsonl(file, tmp_path / "out", fault_budget=0.9).kept == 1
    write(file, "{")
    with pytest.raises(ValueError, match="no usable line"):
        convert_jsonl(file, tmp_path / "none", fault_budget=1)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["all.jsonl", "images", "out"]


def test_command_line(file, tmp_path, capsys):
    write(file, line())
    assert main(["convert", "jsonl", str(file), "--output", str(tmp_path / "out")]) == 0
    assert "lines read" in capsys.readouterr().err
    assert main(["convert", "jsonl", str(file), "--output", str(tmp_path / "out")]) == 2
    assert "error: output must be a new or an empty folder" in capsys.readouterr().err
    evil = ["--output", str(tmp_path / "deep" / "o"), "--split", "../../evil"]
    assert main(["convert", "jsonl", str(file), *evil]) == 2
    assert "error: split must be a name of letters" in capsys.readouterr().err
    assert not (tmp_path / "evil").exists() and not (tmp_path / "deep").exists()
    assert main(["convert", "jsonl", str(tmp_path / "no.jsonl"), "--output", str(tmp_path / "o")]) == 2
    assert "error: no file or folder at" in capsys.readouterr().err


def test_hostile_lines_cost_little_and_are_told_in_little(file, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("granvit.data.sources.jsonl.MAX_LINE", 1_000_000)
    keys = ",".join(f'"k{number}":0' for number in range(50_000))
    write(
        file,
        f'{{{keys},"k49999":0}}',  # to count each key takes minutes
        line(id="keys", **{f"k{number}": 1 for number in range(50_000)}),
        line(id="long", caption=" " * 1_000_100),
        line(id="exact", caption="a" * (999_999 - len(json.dumps(line(id="exact", caption=""))))),
        line(id="box", regions=[REGION, REGION | {"box": [0] * 50_000}]),
    )
    started = time.process_time()
    summary = convert_jsonl(file, tmp_path / "out", fault_budget=1)
    assert time.process_time() - started < 20
    assert (summary.read, summary.kept) == (5, 2)
    assert summary.faults == {"json": 2, "unknown_key": 1, "box": 1}
    assert "repeated key 'k49999'" in caplog.text and ":3: a line has more than the limit" in caplog.text
    assert max(map(len, caplog.messages)) < 1000


def test_ids_to_exclude_as_windows_writes_them(file, tmp_path, capsys):
    write(file, line(id="a"), line(id="b"))
    ids = tmp_path / "ids.txt"
    ids.write_bytes("\ufeffx\r\n\ufeffa\r\n".encode())  # two files joined
    command = ["convert", "jsonl", str(file), "--exclude", str(ids), "--workers", "0"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    assert GranDataset(tmp_path / "out").rows["id"] == ["b"]
    for wrong in (b"\xff\xfea", "a\n".encode("utf-16-le")):
        ids.write_bytes(wrong)
        assert main([*command, "--output", str(tmp_path / "other")]) == 2
        assert "ids.txt is no text in UTF-8" in capsys.readouterr().err


def test_a_mended_file_begins_anew(file, tmp_path):
    write(file, line(id="a"), line(id="b"), "{", "{")
    with pytest.raises(FaultBudgetExceeded):
        convert_jsonl(file, tmp_path / "out")
    write(file, line(id="a"), line(id="b"), line(id="c"), line(id="d"))
    assert convert_jsonl(file, tmp_path / "out").kept == 4
    assert len(GranDataset(tmp_path / "out")) == 4
    write(file, line(id="a"), "{", "{")
    with pytest.raises(FaultBudgetExceeded):
        convert_jsonl(file, tmp_path / "other")
    write(file, line(id="a"))
    with pytest.raises(ValueError, match="holds unfinished work on something else .*split: 'train' there"):
        convert_jsonl(file, tmp_path / "other", split="test")
