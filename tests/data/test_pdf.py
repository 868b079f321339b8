"""Pages of PDF files: boxes against the fonts' own outlines and against the ink; rules; hostile files."""

import io
import logging
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pypdfium2")
pytest.importorskip("reportlab")

import matplotlib
import pypdfium2
from fontTools.ttLib import TTFont as Outlines
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFont
from reportlab.pdfgen.canvas import Canvas

from granvit.data.__main__ import main
from granvit.data.build import build_dataset
from granvit.data.isolated import Isolated
from granvit.data.loader import GranDataset
from granvit.data.sources import pdf
from granvit.data.sources.pdf import Character, Pdf, render, text_lines
from granvit.questions.schema import DataFault

TOLERANCE = 0.02  # points: pdfium keeps a glyph's box in thousandths of its size, rounded outwards


FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
pdfmetrics.registerFont(TTFont("DejaVu", FONT))
_outlines = Outlines(FONT)


def canvas(width: float = 400, height: float = 300, **options) -> tuple[Canvas, io.BytesIO]:
    file = io.BytesIO()
    made = Canvas(file, (width, height), **options)
    made.setFont("DejaVu", 12)
    return made, file


def outline_box(text: str, size: float = 12) -> tuple[float, float, float, float]:
    """xyxy of the outlines of a line that starts at (0, 0) on its baseline, upwards, by the font's own tables."""
    glyphs, names, scale = _outlines["glyf"], _outlines.getBestCmap(), size / _outlines["head"].unitsPerEm
    pen, boxes = 0.0, []
    for letter in text:
        glyph = glyphs[names[ord(letter)]]
        if glyph.numberOfContours:
            x1, y1, x2, y2 = (side * scale for side in (glyph.xMin, glyph.yMin, glyph.xMax, glyph.yMax))
            boxes.append((pen + x1, y1, pen + x2, y2))
        pen += int(pdfmetrics.stringWidth(letter, "DejaVu", 1000)) * size / 1000  # pdfium draws with whole ones
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)


def read(file: io.BytesIO, dpi: float = 144):
    """(picture, {text: box in points}, dropped) of the first page."""
    png, lines, dropped = render(pypdfium2.PdfDocument(file.getvalue()), 0, dpi)
    scale = 72 / dpi
    return Image.open(io.BytesIO(png)), {text: np.array(box) * scale for text, box in lines}, dropped


def build(source, output, **options):
    return build_dataset(source, output, workers=0, **options)


def test_boxes_are_those_of_the_outlines_and_hold_the_ink():
    page, file = canvas()
    lines = {"Hello, agile typography": (40, 250), "ÉÀ second line": (60, 230), "x": (200, 100)}
    for text, place in lines.items():
        page.drawString(*place, text)
    page.save()
    picture, box_of, _ = read(file)
    assert list(box_of) == list(lines)
    ink = np.asarray(picture.convert("L")) < 250
    for text, (x, y) in lines.items():
        x1, y1, x2, y2 = outline_box(text)
        assert box_of[text] == pytest.approx([x + x1, 300 - y - y2, x + x2, 300 - y - y1], abs=TOLERANCE)
        left, top, right, bottom = box_of[text] * 2  # 144 dpi
        ink[int(top - 1) : int(bottom + 2), int(left - 1) : int(right + 2)] = False
    assert not ink.any()  # none anywhere else, a pixel of smoothing aside


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_turned_pages_and_turned_lines(rotation, turn):
    """The ink is in the box whichever way the page and its line are turned, with a crop box that starts elsewhere."""
    page, file = canvas(cropBox=(50, 20, 350, 290))
    page._pagesize = (400, 300)
    page.translate(200, 150)
    page.rotate(turn)
    page.drawString(-30, 0, "turned about")
    page.setPageRotation(rotation)
    page.save()
    document = pypdfium2.PdfDocument(file.getvalue())
    document[0].set_mediabox(0, 0, 400, 300)  # reportlab turns it with the page
    png, [(text, box)], dropped = render(document, 0, 144)
    picture = Image.open(io.BytesIO(png))
    assert picture.size == ((600, 540) if rotation % 180 == 0 else (540, 600))
    assert text == "turned about" and not dropped
    ink = Image.fromarray((np.asarray(picture.convert("L")) < 128).astype(np.uint8)).getbbox()
    assert box == pytest.approx(ink, abs=1.2)


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ("(an exam) Tj {}(-) Tj EMC", "an exam-"),  # as tagged files write a hyphen at a line's end
        ("(co) Tj {}(-) Tj EMC (op here) Tj", "co-op here"),
        ("(s) Tj {}(a) Tj EMC (me) Tj", "same"),
        ("{}(a/b) Tj EMC", "a/b"),
        ("{}(n) Tj {}(es) Tj EMC (ted) Tj EMC", "nested"),
    ],
)
@pytest.mark.parametrize("said", ["<FEFF00AD>", "(x of y)", "()"])
def test_a_region_is_what_can_be_read_whatever_the_file_says_instead(spans, text, said):
    pages = []
    for span in (f"/Span<</ActualText{said}>>BDC ", "/Span<<>>BDC "):
        page, file = canvas()
        page.setFont("Helvetica", 12)
        page._code.append(f"BT 20 50 Td {spans.replace('{}', span)} ET")
        page.save()
        pages.append(read(file))
    (_, told, _), (_, plain, _) = pages
    assert list(told) == list(plain) == [text]
    assert told[text] == pytest.approx(plain[text])


def test_one_line_is_one_region_however_it_is_drawn():
    page, file = canvas()
    for x, word in ((20, "words"), (130, "one"), (64, "drawn"), (107, "one"), (157, "one")):  # out of order
        page.drawString(x, 250, word) if x != 130 else page.drawString(133, 250, "by")
    text = page.beginText(20, 200)
    text.textOut("E = mc")
    text.setRise(5)
    text.setFont("DejaVu", 7)
    text.textOut("2")
    page.drawText(text)
    page.setFont("DejaVu", 12)
    page.drawString(20, 150, "a cell")
    page.drawString(120, 150, "another")
    page.drawString(20, 100, "hyphen-")
    page.drawString(20, 86, "ated \ufb01ne")
    page.save()
    _, box_of, _ = read(file)
    assert set(box_of) == {"words drawn one by one", "E = mc2", "a cell", "another", "hyphen-", "ated fine"}


def test_columns_are_read_one_after_the_other():
    page, file = canvas()
    columns = [[f"left {i} of the column" for i in range(5)], [f"right {i}" for i in range(5)]]
    for x, lines in zip((20, 170), columns, strict=True):
        for i, line in enumerate(lines):
            page.drawString(x, 250 - 14 * i, line)
    page.save()
    assert list(read(file)[1]) == columns[0] + columns[1]


def test_what_is_not_certain_is_left_out_and_counted():
    page, file = canvas()
    page.drawString(20, 250, "kept")
    page.drawString(380, 250, "leaves the page")
    page.drawString(20, 500, "outside of it")
    page.setFillGray(1)
    page.drawString(20, 220, "white on white")
    page.setFillGray(0)
    page.drawString(20, 190, "redacted")
    page.rect(10, 180, 100, 30, fill=1)
    page.drawString(20, 160, "un\ue000known")
    page.drawString(20, 130, "\ue000 bullet")
    hidden = page.beginText(20, 100)
    hidden.setTextRenderMode(3)
    hidden.textOut("hidden")
    hidden.setTextRenderMode(0)
    page.drawText(hidden)
    page.translate(200, 50)
    page.rotate(30)
    page.drawString(0, 0, "a watermark")
    page.save()
    _, box_of, dropped = read(file)
    assert list(box_of) == ["kept", "bullet"]
    assert dropped == {
        "line that leaves the page": 2,
        "line that can't be seen": 2,
        "line with unknown characters": 1,
        "invisible character": 6,
        "slanted word": 2,
    }


def test_upright_columns_and_writing_to_the_left():
    def characters(text, step, size=10.0):
        boxes = [(step[0] * i, step[1] * i, step[0] * i + size, step[1] * i + size) for i in range(len(text))]
        return [Character(letter, box, box) for letter, box in zip(text, boxes, strict=True)]

    [line] = text_lines(characters("日本語", (0, 10)))
    assert (line.text, line.box) == ("日本語", (0, 0, 10, 30))
    assert [line.text for line in text_lines(characters("123", (0, 10)))] == ["1", "2", "3"]
    first, second = characters("שלום", (-10, 0)), characters("עולם", (-10, 0))
    moved = [
        Character(c.text, (c.ink[0] - 45, 0, c.ink[2] - 45, 10), (c.cell[0] - 45, 0, c.cell[2] - 45, 10))
        for c in second
    ]
    nothing = (0.0, 0.0, 0.0, 0.0)
    [line] = text_lines([*first, Character("\n", nothing, nothing), *moved])
    assert line.text == "שלום עולם"


def test_matplotlibs_type_3_fonts(tmp_path):
    import matplotlib.figure

    figure = matplotlib.figure.Figure((4, 3))
    figure.text(0.1, 0.5, "drawn by procedures")
    figure.savefig(tmp_path / "a.pdf", format="pdf")
    picture, box_of, _ = read(io.BytesIO((tmp_path / "a.pdf").read_bytes()))
    ink = Image.fromarray((np.asarray(picture.convert("L")) < 128).astype(np.uint8)).getbbox()
    assert list(box_of) == ["drawn by procedures"]
    left, top, right, bottom = box_of["drawn by procedures"] * 2
    assert left <= ink[0] + 1 and top <= ink[1] + 1 and right >= ink[2] - 1 and bottom >= ink[3] - 1


def hostile(folder) -> None:
    from reportlab.lib.pdfencrypt import StandardEncryption

    page, file = canvas(encrypt=StandardEncryption("secret"))
    page.drawString(20, 20, "locked")
    page.save()
    (folder / "locked.pdf").write_bytes(file.getvalue())
    (folder / "empty.pdf").write_bytes(b"")
    (folder / "noise.PDF").write_bytes(b"%PDF-1.4\n" + bytes(range(256)) * 10)
    os.symlink("/etc/hostname", folder / "link.pdf")
    os.mkfifo(folder / "pipe.pdf")


def test_a_folder_with_good_and_broken_files(tmp_path, caplog):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    page, file = canvas()
    for text in ("first", None, "third", "fourth"):
        if text:
            page.setFont("DejaVu", 12)
            page.drawString(20, 20, text)
        page.showPage()
    page.save()
    (folder / "deep" / "good.pdf").write_bytes(file.getvalue())
    hostile(folder)
    with caplog.at_level(logging.WARNING):
        summary = build(Pdf(str(folder), max_pages=3, licence="mine"), tmp_path / "out", fault_budget=0.9)
    assert (summary.kept, summary.faulty) == (2, 5)
    assert summary.dropped == {"page over max_pages": 1, "page without text": 1}
    for name in ("locked", "empty", "noise", "link", "pipe"):
        assert any(f"/{name}." in record.message for record in caplog.records)
    data = GranDataset(tmp_path / "out")
    assert [data[i].id for i in range(2)] == ["deep/good.pdf/page-0001", "deep/good.pdf/page-0003"]
    [region] = data[1].regions
    assert (region.caption, region.kind, data[1].caption, data[1].licence) == ("third", "ocr", None, "mine")
    one = build(Pdf(str(folder / "deep" / "good.pdf")), tmp_path / "one")
    assert one.kept == 3
    shutil.make_archive(str(tmp_path / "all"), "zip", folder, "deep")
    for i, files in enumerate(("zip://deep", "zip://deep/good.pdf")):
        assert build(Pdf(f"{files}::{tmp_path}/all.zip"), tmp_path / f"zip{i}").kept == 3


def test_damaged_files_never_end_a_build(tmp_path):
    page, file = canvas()
    for i in range(20):
        page.drawString(20, 280 - 14 * i, f"line {i} of a page")
    page.save()
    content, draw = file.getvalue(), np.random.default_rng(0)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.pdf").write_bytes(content)
    for i in range(60):
        damaged = np.frombuffer(content[: draw.integers(len(content)) if i % 3 == 0 else None], np.uint8).copy()
        places = draw.integers(len(damaged), size=draw.integers(1, 30))
        damaged[places] = draw.integers(256, size=len(places))
        (folder / f"{i:02}.pdf").write_bytes(damaged.tobytes())
    summary = build(Pdf(str(folder)), tmp_path / "out", fault_budget=1)
    assert summary.kept >= 1 and summary.read >= 61


def test_a_file_that_hangs_is_given_up(tmp_path, monkeypatch):
    page, file = canvas()
    for _ in range(6):
        page.drawString(20, 20, "a line")
        page.showPage()
    page.save()
    (tmp_path / "a.pdf").write_bytes(file.getvalue())
    calls = []

    def reader(what, *arguments):
        if what == "pages":
            return 6
        calls.append(arguments)
        raise DataFault("crash", "not done")

    monkeypatch.setattr(pdf, "_isolated", lambda: reader)
    with pytest.raises(ValueError, match="6 of 6 pages have faults .crash 3, pdf 3."):
        build(Pdf(str(tmp_path / "a.pdf")), tmp_path / "out", fault_budget=1)
    assert len(calls) == 3


def test_a_huge_page_is_rendered_smaller_and_no_sheet_is_a_fault():
    page, file = canvas(14_000, 14_000)
    page.setFont("DejaVu", 1000)
    page.drawString(1000, 7000, "poster")
    page.save()
    picture, box_of, _ = read(file, 600)
    assert list(box_of) == ["poster"] and picture.width * picture.height <= 16_100_000
    page, file = canvas(14_000, 3)
    page.showPage()
    page.save()
    with pytest.raises(DataFault, match="no sheet"):
        read(file, 600)


def test_settings_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="dpi must lie in"):
        build(Pdf(str(tmp_path), dpi=0), tmp_path / "out")
    with pytest.raises(ValueError, match="no file or folder at"):
        build(Pdf(str(tmp_path / "none")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_crashes_loops_and_floods_are_faults():
    isolated = Isolated(misbehave, seconds=1.0, memory=300_000_000)
    try:
        assert isolated("answer") == 42
        for how in ("crash", "sleep", "flood"):
            with pytest.raises(DataFault, match="crashed|not done after 1 seconds"):
                isolated(how)
        with pytest.raises(KeyError):
            isolated("raise")
        assert isolated("answer") == 42
    finally:
        isolated.close()


def misbehave(how):
    if how == "crash":
        os.abort()
    if how == "sleep":
        time.sleep(60)
    if how == "flood":
        bytearray(1_000_000_000)
    if how == "raise":
        raise KeyError(how)
    return 42


def test_command_line(tmp_path, capsys):
    page, file = canvas()
    page.drawString(20, 20, "a line")
    page.save()
    (tmp_path / "a.pdf").write_bytes(file.getvalue())
    arguments = ["convert", "pdf", str(tmp_path / "a.pdf"), "--dpi", "72", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "pages read" in capsys.readouterr().err
    assert GranDataset(tmp_path / "out").rows[0]["width"] == 400
