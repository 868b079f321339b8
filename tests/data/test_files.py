"""Files of a source: nothing leads out of a folder, and whatever is broken is said."""

import os
import zipfile

import pytest
from converting import convert, picture, regions

from granvit.data.files import inside, list_files, open_file, output_fault, read_file, read_image, rebase, state
from granvit.data.sources.voc import Voc
from granvit.questions.schema import DataFault


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "voc.zip"
    annotation = (
        "<annotation><filename>{}</filename><size><width>40</width><height>20</height></size><object><name>dog</name>"
        "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>15</ymax></bndbox></object></annotation>"
    )
    with zipfile.ZipFile(path, "w") as file:
        for name in ("a.jpg", "no.jpg", "broken.jpg"):
            file.writestr(f"Annotations/{name}.xml", annotation.format(name))
        file.writestr("JPEGImages/a.jpg", picture())
        file.writestr("JPEGImages/broken.jpg", bytes(10_000), zipfile.ZIP_DEFLATED)
        file.writestr("Annotations/../../evil.xml", annotation.format("a.jpg"))
    content = path.read_bytes()
    at = content.index(b"broken.jpg", content.index(b"JPEGImages/broken")) + 10
    path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
    return path


def test_an_archive_with_broken_members(archive, tmp_path, caplog):
    source = Voc(f"zip://Annotations::{archive}", f"zip://JPEGImages::{archive}")
    summary, rows = convert(source, tmp_path / "out")
    assert list(rows) == ["a.jpg"] and regions(rows["a.jpg"]) == [("a dog", [0.25, 0.25, 0.75, 0.75])]
    assert "image 'no.jpg' can't be read" in caplog.text and "image 'broken.jpg' can't be read" in caplog.text


def test_broken_and_missing_archives(tmp_path):
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no")
    for location in (f"zip://a::{tmp_path / 'broken.zip'}", f"zip://a::{tmp_path / 'no.zip'}", "nosuch://a/b"):
        for read in (lambda x: list_files(x, (".xml",)), state, lambda x: open_file(x).__enter__()):
            with pytest.raises(ValueError):
                read(location)


@pytest.mark.parametrize("folder", ["memory://a/b", "zip://a/b::/x.zip", "zip://::/x.zip", "here"])
def test_no_name_leaves_its_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("here")
    os.symlink("/etc", "here/etc")
    for name in (
        "../x",
        "a/../../x",
        "/etc/passwd",
        *(["etc/passwd", "a\0"] if folder == "here" else ["file:///x", "a::b"]),
    ):
        with pytest.raises(DataFault):
            inside(folder, name)
    assert inside(folder, "c/d.jpg") in (
        "memory://a/b/c/d.jpg",
        "zip://a/b/c/d.jpg::/x.zip",
        "zip://c/d.jpg::/x.zip",
        str(tmp_path / "here" / "c" / "d.jpg"),
    )


@pytest.mark.parametrize(
    ("folder", "name", "other", "expected"),
    [
        ("/a/json", "../img/x.jpg", "/a/img", "x.jpg"),
        ("/a/json", "../img/x.jpg", "/a/json", "../img/x.jpg"),
        ("json/", "../img/x.jpg", "img/", "x.jpg"),
        ("memory://a/json", "../img/deep/x.jpg", "memory://a/img", "deep/x.jpg"),
        ("zip://json::a.zip", "../img/x.jpg", "zip://img::a.zip", "x.jpg"),
        ("zip://json::a.zip", "../img/x.jpg", "zip://img::b.zip", ".."),
    ],
)
def test_a_name_seen_from_another_folder(folder, name, other, expected):
    assert rebase(folder, name, other) == expected


@pytest.fixture
def linked(tmp_path):
    """A folder of VOC whose pictures, and a folder of whose annotations, are links that lead out of it."""
    outside = tmp_path / "store"
    (outside / "more").mkdir(parents=True)
    (outside / "blob").write_bytes(picture())
    annotation = "<annotation><filename>{}</filename><object><name>dog</name><bndbox><xmin>11</xmin><ymin>6</ymin>"
    annotation += "<xmax>30</xmax><ymax>15</ymax></bndbox></object></annotation>"
    (outside / "more" / "b.xml").write_text(annotation.format("more\\b.jpg"))
    (outside / "more" / "b.jpg").write_bytes(picture())
    (outside / "more" / "round").symlink_to(outside / "more")
    folder = tmp_path / "voc"
    folder.mkdir()
    (folder / "a.xml").write_text(annotation.format("a.jpg"))
    (folder / "a.jpg").symlink_to("../store/blob")
    (folder / "more").symlink_to(outside / "more")
    (folder / ".hidden").symlink_to(outside / "more")
    return folder


def test_links_are_named_and_read_where_the_user_says_so(linked, tmp_path, caplog):
    summary, rows = convert(Voc(str(linked), str(linked), follow_links=True), tmp_path / "all")
    assert list(rows) == ["a", "more/b"] and not summary.faulty and not summary.dropped
    (linked / "c.xml").write_text((linked / "a.xml").read_text().replace("a.jpg", "c.jpg"))
    (linked / "c.jpg").write_bytes(picture())
    summary, rows = convert(Voc(str(linked), str(linked)), tmp_path / "inside")
    assert list(rows) == ["c"] and summary.faulty == 1
    assert summary.dropped == {"link to a folder (--follow-links reads it)": 1}
    assert f"link that leads out of {linked}, to '{tmp_path}/store/blob'; --follow-links accepts it" in caplog.text
    (linked / "c.jpg").unlink()
    (linked / "c.jpg").symlink_to("not-pulled")  # what DVC and git-annex leave of content that is elsewhere
    with pytest.raises(DataFault, match="'c.jpg' is no file .its link leads to '.*not-pulled'"):
        read_image(str(linked), "c.jpg")
    assert f"{linked}/more is a link to a folder" in caplog.text and "hidden" not in caplog.text


def test_names_still_climb_nowhere_where_links_are_followed(linked):
    for name in ("../store/blob", "more/../../store/blob", "/etc/passwd", "..\\store\\blob"):
        with pytest.raises(DataFault, match="image must lie in"):
            inside(str(linked), name, follow_links=True)


def test_backslashes_part_folders_unless_a_file_has_them(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(b"1")
    (tmp_path / "a\\c.jpg").write_bytes(b"2")
    assert read_image(str(tmp_path), "a\\b.jpg") == b"1" and read_image(str(tmp_path), "a\\c.jpg") == b"2"
    assert inside("memory://x", "a\\b.jpg") == "memory://x/a/b.jpg"


def test_limits_and_what_is_no_file(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    assert read_file(str(tmp_path), "x", 5, "xml") == b"12345"
    with pytest.raises(DataFault, match="xml 'x' has more than the limit of 4 bytes") as error:
        read_file(str(tmp_path), "x", 4, "xml")
    assert error.value.kind == "xml_bytes"
    for name in ("pipe", ".", "no"):
        with pytest.raises(DataFault, match="is no file"):
            read_image(str(tmp_path), name)
    with pytest.raises(ValueError, match="can't be opened"), open_file(str(tmp_path / "pipe")):
        pass


def test_where_no_file_can_be_written(tmp_path):
    assert output_fault(tmp_path / "new.json") is None
    (tmp_path / "old.json").write_text("{}")
    assert output_fault(tmp_path / "old.json") is None
    assert output_fault(tmp_path) == "it is a folder; give a file"
    assert output_fault(tmp_path / "none" / "new.json") == "there is no such folder"
