"""Pascal VOC in, Gran dataset out: its pixels count from 1 and its ends are inclusive."""

import pytest
from converting import convert, picture, regions, to_memory

from granvit.data.__main__ import main
from granvit.data.sources.voc import Voc


def thing(box, name="person", **flags) -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    )
    told = "".join(f"<{flag}>{value}</{flag}>" for flag, value in flags.items())
    return f"<object><name>{name}</name><pose>Left</pose>{told}<bndbox>{sides}</bndbox></object>"


def annotation(*things, filename="a.jpg", width=40, height=20) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><folder>VOC</folder><filename>{filename}</filename>{size}{''.join(things)}</annotation>"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "JPEGImages" / "a.jpg").write_bytes(picture())
    return tmp_path


def source(folder, **options) -> Voc:
    return Voc(str(folder / "Annotations"), str(folder / "JPEGImages"), **options)


def write(folder, text, name="a") -> None:
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def test_boxes_are_exact(folder):
    parts = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    person = thing((11, 6, 30, 15), truncated=1, difficult=0).replace("</object>", f"{parts}</object>")
    write(folder, annotation(person, thing((1, 1, 40, 20), "aeroplane"), thing((1, 1, 1, 1), "bus")))
    _, rows = convert(source(folder, licence="x"), folder / "out")
    assert regions(rows["a"]) == [
        ("a person", [0.25, 0.25, 0.75, 0.75]),
        ("an aeroplane", [0, 0, 1, 1]),
        ("a bus", pytest.approx([0, 0, 0.025, 0.05], rel=1e-7)),
    ]
    assert (rows["a"]["source"], rows["a"]["licence"]) == ("voc", "x")


def test_tools_that_count_from_0(folder):
    write(folder, annotation(thing((10.0, 5, 30, 15.0))))
    _, rows = convert(source(folder, origin=0), folder / "out")
    assert regions(rows["a"]) == [("a person", [0.25, 0.25, 0.75, 0.75])]


@pytest.mark.parametrize(
    "size",
    [
        "",
        "<size/>",
        "<size><width></width></size>",
        "<size><width>0</width><height>0</height></size>",
        "<size><width>40.0</width><height>20.0</height></size>",
        "<size><depth>3</depth></size>",
    ],
)
def test_a_size_that_is_not_told_is_the_pictures(folder, size):
    write(folder, f"<annotation><filename>a.jpg</filename>{size}{GOOD}</annotation>")
    _, rows = convert(source(folder), folder / "out")
    assert regions(rows["a"]) == [("a person", [0.25, 0.25, 0.75, 0.75])]


def test_a_label_may_stay_without_article(folder):
    write(folder, annotation(thing((11, 6, 30, 15), "Hund")))
    _, rows = convert(source(folder, articles=False), folder / "out")
    assert regions(rows["a"]) == [("Hund", [0.25, 0.25, 0.75, 0.75])]


@pytest.mark.parametrize("encoding", ["utf-16", "ISO-8859-1", "GBK", "gb2312", "Shift_JIS", "euc-kr"])
def test_encodings_that_the_file_declares(folder, encoding):
    name = "Stra\xdfe" if encoding == "ISO-8859-1" else "\uac1c" if encoding == "euc-kr" else "\u72ac"
    text = f'<?xml version="1.0" encoding="{encoding}"?>\n' + annotation(thing((11, 6, 30, 15), name))
    (folder / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
    _, rows = convert(source(folder, articles=False), folder / "out")
    assert regions(rows["a"]) == [(name, [0.25, 0.25, 0.75, 0.75])]


def test_difficult_objects_are_left_out(folder):
    write(folder, annotation(thing((11, 6, 30, 15)), thing((1, 1, 5, 5), difficult=" 1 ")))
    write(folder, annotation(thing((1, 1, 5, 5), difficult="True")), "b")
    write(folder, annotation(), "c")
    summary, rows = convert(source(folder), folder / "out")
    assert list(rows) == ["a"] and len(rows["a"]["regions"]) == 1 and not summary.faulty
    assert summary.dropped == {"difficult object": 2, "image without annotation": 2} and summary.read == 3


BOMB = "<!DOCTYPE a [<!ENTITY a '{}'>{}]><annotation>&h;</annotation>".format(
    "a" * 1000, "".join(f"<!ENTITY {chr(98 + n)} '{f'&{chr(97 + n)};' * 100}'>" for n in range(8))
)
GOOD = thing((11, 6, 30, 15))


@pytest.mark.parametrize(
    ("bad", "message", "kept"),
    [
        ("<annotation>", "no readable VOC annotation", 1),
        ("", "no readable VOC annotation", 1),
        (BOMB, "no readable VOC annotation", 1),
        ("<a>" * 100_000, "no readable VOC annotation", 1),
        ("<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation>&x;</annotation>", "no readable VOC", 1),
        (annotation(GOOD, width="wide"), "size/width must be a whole number of pixels, got 'wide'", 1),
        (annotation(GOOD, width="9" * 5000), "size/width must be a whole number of pixels", 1),
        (annotation(GOOD, width=20, height=40), "annotated as 20x40, the image is 40x20", 1),
        (annotation(GOOD, filename=""), "is no file", 1),
        (annotation(GOOD, filename="../Annotations/a.xml"), "image must lie in", 1),
        (annotation(GOOD, filename="/etc/passwd"), "image must lie in", 1),
        (annotation(GOOD, thing((1, 1, 5))), "object 1: bndbox must hold numbers", 2),
        (annotation(GOOD, thing((1, 1, 5, "x"))), "object 1: bndbox must hold numbers", 2),
        (annotation(GOOD, thing((1, 1, "nan", 5))), "box must be 4 finite numbers", 2),
        (annotation(GOOD, thing((1, 1, "1e999", 5))), "box must be 4 finite numbers", 2),
        (annotation(GOOD, thing((1, 1, 45, 5))), "box must lie in [0, 1]", 2),
        (annotation(GOOD, thing((9, 1, 5, 5))), "box must have x1 < x2", 2),
        (annotation(GOOD, thing((1, 1, 5, 5), "")), "caption must be a string with text", 2),
    ],
)
def test_faults_are_named_and_the_rest_is_kept(folder, caplog, bad, message, kept):
    write(folder, annotation(GOOD))
    write(folder, bad, "b")
    summary, rows = convert(source(folder), folder / "out")
    assert message in caplog.text and f"{folder}/Annotations/b.xml: " in caplog.text
    assert len(rows) == kept and summary.faulty == 1
    assert all(regions(row) == [("a person", [0.25, 0.25, 0.75, 0.75])] for row in rows.values())


def test_command_line_and_a_remote_source(folder, capsys):
    write(folder, annotation(GOOD))
    there = to_memory(folder, "voc")
    command = ["convert", "voc", f"{there}/Annotations", "--images", f"{there}/JPEGImages", "--workers", "0"]
    assert main([*command, "--output", str(folder / "out")]) == 0
    assert main(["convert", "voc", str(folder / "no"), "--images", str(folder), "--output", str(folder / "o")]) == 2
    assert "error: no file or folder at" in capsys.readouterr().err


def test_a_file_name_gives_the_terminal_no_orders(folder, caplog):
    write(folder, annotation(thing((1, 1, 9, 9))))
    write(folder, "no xml", name="\x1b[2J\n")
    convert(source(folder), folder / "out")
    [message] = caplog.messages
    assert r"\x1b[2J\n.xml: no readable VOC annotation" in message and message.isprintable()
