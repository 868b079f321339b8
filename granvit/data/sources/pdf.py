"""PDF: a page becomes a picture with its text lines, whose places and text the file itself tells.

A line's box is that of its glyphs, as their fonts draw them; its text is what can be read there, so a word that is
hyphenated at the line's end stays so. Lines are in the order in which the file draws them, which is nearly always that
of reading. Only what is certain is kept; rules leave out, and count, lines whose text is unknown or can't be seen.
Annotations and the contents of forms are not drawn: their text is no part of the page's.
"""

from __future__ import annotations

import io
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from ctypes import byref, c_double
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tyro.conf import Positional

from granvit.data.files import is_remote, local, parent, read_file, suffix
from granvit.data.isolated import Isolated
from granvit.data.records import Notes, Record
from granvit.data.schema import is_unicode
from granvit.data.sources.rows import FolderSource, PixelBox, picture_row
from granvit.questions.schema import DataFault

MAX_BYTES = 256_000_000
"""A PDF of more bytes is not read."""
MAX_PIXELS = 16_000_000
"""A page that would get more pixels (A4 at 400 dpi has fewer) is rendered at fewer dots per inch."""
MAX_CHARACTERS = 20_000
"""A page with more (a broadsheet has fewer) is left out: drawings made of letters, and attacks."""
MAX_FORMS = 32
"""Forms within forms that are looked into for what they say instead of their glyphs."""
SECONDS, MEMORY = 60.0, 2_000_000_000
"""What reading a page may take."""
MAX_CRASHES = 3
"""Pages of a file may crash or hang their reader, in one shard, before the rest are not tried."""
COLUMN, SPACE = 0.9, 0.15
"""A gap of this many heights of a line separates columns, or words that the file draws one by one. Of a justified line
with wider gaps the parts become lines of their own: better than to join two columns (LaTeX's are 1.0 apart)."""
SLANT = 3.0
"""Degrees that a line may deviate from horizontal or vertical."""
INK = 24
"""Steps of 256 between the darkest and the brightest pixel in the box of a line that can be seen."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Pdf(FolderSource):
    """Pages of PDF files, a row each, with their text lines."""

    files: Positional[str]
    """Folder or URL of PDF files, or one FILE or its URL."""
    dpi: float = 150.0
    """Dots per inch that pages are rendered at."""
    max_pages: int = 10_000
    """Pages of one file that are read; what is over is left out."""
    licence: str = ""
    """Noted in every row."""

    unit = "page"

    def inputs(self) -> list[str]:
        if not 10 <= self.dpi <= 1200:
            raise ValueError(f"dpi must lie in 10 to 1200, got {self.dpi}")
        if self.max_pages < 1:
            raise ValueError(f"max_pages must be >= 1, got {self.max_pages}")
        if not is_unicode(self.files):
            raise ValueError(f"files must be a path in Unicode, got {ascii(self.files)}")
        return local(self.files) if _folder(self.files)[1] is None else [self.files]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        folder, name = _folder(self.files)
        named = self.named_files(folder, (".pdf",), notes) if name is None else [(name, self.files)]
        for name, shown in named:
            try:
                pages = _isolated()("pages", folder, name, self._follows)
            except DataFault as fault:
                notes.unreadable(shown, fault)
                continue
            notes.drop("page over max_pages", max(0, pages - self.max_pages))
            for page in range(min(pages, self.max_pages)):
                yield Record(f"{name}/page-{page + 1:04d}", f"{shown}, page {page + 1}", [name, page])

    @property
    def _follows(self) -> bool:
        """Whether links are followed: one that the user named as FILE always is."""
        return self.follow_links or _folder(self.files)[1] is not None

    def rows(self, records: list[Record], notes: Notes) -> Iterator[dict[str, Any]]:
        folder, _ = _folder(self.files)
        crashes: Counter[str] = Counter()
        for record in records:
            name, page = record.data
            try:
                if crashes[name] >= MAX_CRASHES:
                    raise DataFault("pdf", f"not read: {MAX_CRASHES} pages of this file crashed their reader")
                content, lines, dropped = _isolated()("page", folder, name, self._follows, page, self.dpi)
                notes.dropped.update(dropped)
                if lines:
                    boxes = [PixelBox(box, text, "ocr") for text, box in lines]
                    file = f"page-{page + 1:04d}.png"
                    yield picture_row(record, content, file, boxes, notes, source="pdf", licence=self.licence)
                elif content:
                    notes.drop("page without text")
            except DataFault as fault:
                crashes[name] += fault.kind == "crash"
                notes.fault(record, fault)


def _folder(files: str) -> tuple[str, str | None]:
    """The folder of the PDF files and, where `files` is one of them, its name in it."""
    if suffix(files) == ".pdf" if is_remote(files) else os.path.isfile(files):
        path = next((part for part in files.split("::") if "://" in part), files)  # of an archive's parts the member
        return parent(files), path.rpartition("/")[2]
    return files, None


# ---- in a process of its own: pdfium is C++, and the files are anybody's


@cache
def _isolated() -> Isolated:
    return Isolated(_serve, SECONDS, MEMORY)


def _serve(what: str, folder: str, name: str, follow_links: bool, *arguments: Any) -> Any:
    try:
        document = _document(folder, name, follow_links)
        return len(document) if what == "pages" else render(document, *arguments)
    except (DataFault, MemoryError):
        raise
    except Exception as error:  # places at infinity, archives without the member: one file must not end a build
        raise DataFault("pdf", f"can't be read: {error}") from None


@lru_cache(maxsize=1)  # pages of a file follow each other
def _document(folder: str, name: str, follow_links: bool) -> Any:
    import pypdfium2

    return pypdfium2.PdfDocument(read_file(folder, name, MAX_BYTES, "pdf", follow_links))


def render(document: Any, page: int, dpi: float) -> tuple[bytes, list[tuple[str, Box]], Counter[str]]:
    """Page number `page` (from 0) of a pypdfium2 document: a PNG, its lines as text and xyxy in pixels, and how many
    lines which rule left out; no PNG where there are more than MAX_CHARACTERS.

    PNG, since letters have sharp edges, which JPEG blurs, and few colours: it is smaller, too, but where a page shows
    photographs.

    Raises DataFault of kind `pdf` for a page without a size, PdfiumError for one that can't be read.
    """
    opened = document[page]
    width, height = opened.get_size()
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise DataFault("pdf", f"a page of {width} x {height} points")
    scale = min(dpi / 72, math.sqrt(MAX_PIXELS / (width * height)))
    if max(width, height) * scale > 32_000:
        raise DataFault("pdf", f"a page of {width:g} x {height:g} points is no sheet")
    dropped: Counter[str] = Counter()
    lines: list[tuple[str, Box]] = []
    _forget_actual_text(opened)
    textpage = opened.get_textpage()
    if textpage.count_chars() > MAX_CHARACTERS:
        dropped["page with too many characters"] += 1
        return b"", [], dropped
    picture = opened.render(scale=scale, draw_annots=False, may_draw_forms=False).to_pil().convert("RGB")
    grey = np.asarray(picture.convert("L"))
    for line in text_lines(_characters(opened, textpage, dropped)):
        x1, y1, x2, y2 = line.box
        slack = 0.02 * min(x2 - x1, y2 - y1)
        box = tuple(
            min(max(side, 0.0), end) * pixels / end
            for side, end, pixels in zip(line.box, (width, height) * 2, picture.size * 2, strict=True)
        )
        left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
        ink = grey[top:bottom, left:right]
        if line.text is None:
            dropped["line with unknown characters"] += 1
        elif min(x1, y1) < -slack or x2 > width + slack or y2 > height + slack:
            dropped["line that leaves the page"] += 1
        elif not ink.size or int(ink.max()) - int(ink.min()) < INK:
            dropped["line that can't be seen"] += 1
        else:
            lines.append((line.text, box))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue(), lines, dropped


@dataclass(frozen=True)
class Character:
    """A glyph on a page, in points from the top left as the page is shown.

    text: what it reads, None where the file does not tell, " " and "\\n" between words and lines. ink: the box of its
    outline. cell: the box that it takes in its line. turn: quarter turns clockwise of its reading direction.
    """

    text: str | None
    ink: Box
    cell: Box
    turn: int = 0


@dataclass(frozen=True)
class Line:
    """A line of text; None where one of its characters is unknown. box: xyxy of its glyphs, as theirs."""

    text: str | None
    box: Box


def _forget_actual_text(page: Any) -> None:
    """Take away what tagged files say instead of their glyphs: a region's text is what can be read in the picture, and
    pdfium gives characters of such spans boxes of their own making. Before the page's text is loaded."""
    from pypdfium2 import raw

    def forget(thing: Any, depth: int) -> None:
        for number in range(max(raw.FPDFPageObj_CountMarks(thing), 0)):
            mark = raw.FPDFPageObj_GetMark(thing, number)
            if raw.FPDFPageObjMark_GetParamValueType(mark, b"ActualText") == raw.FPDF_OBJECT_STRING:
                raw.FPDFPageObjMark_RemoveParam(thing, mark, b"ActualText")
        if depth and raw.FPDFPageObj_GetType(thing) == raw.FPDF_PAGEOBJ_FORM:
            for number in range(max(raw.FPDFFormObj_CountObjects(thing), 0)):
                forget(raw.FPDFFormObj_GetObject(thing, number), depth - 1)

    for number in range(raw.FPDFPage_CountObjects(page)):
        forget(raw.FPDFPage_GetObject(page, number), MAX_FORMS)


def _characters(page: Any, textpage: Any, dropped: Counter[str]) -> Iterator[Character]:
    from pypdfium2 import raw

    left, bottom, right, top = page.get_bbox()
    turns = page.get_rotation() // 90
    sides = [c_double() for _ in range(4)]
    loose = raw.FS_RECTF()

    def shown(x1: float, y1: float, x2: float, y2: float) -> Box:
        """From PDF's coordinates (upwards, from the bottom left, not turned)."""
        box = x1 - left, top - y2, x2 - left, top - y1
        for side in [top - bottom, right - left, top - bottom][:turns]:
            box = side - box[3], box[0], side - box[1], box[2]
        return box

    slanted = False
    for index in range(textpage.count_chars()):
        text = chr(raw.FPDFText_GetUnicode(textpage, index))
        if text.isspace():
            nothing = (0.0, 0.0, 0.0, 0.0)
            slanted = False
            yield Character("\n" if text in "\r\n" else " ", nothing, nothing)
            continue
        angle = math.degrees(raw.FPDFText_GetCharAngle(textpage, index)) / 90
        if abs(angle - round(angle)) * 90 > SLANT:
            dropped["slanted word"] += not slanted
            slanted = True
            continue
        drawn = raw.FPDFText_GetTextObject(textpage, index)
        if drawn and raw.FPDFTextObj_GetTextRenderMode(drawn) == raw.FPDF_TEXTRENDERMODE_INVISIBLE:
            dropped["invisible character"] += 1  # the text layer of a scan: recognised by a machine, and roughly placed
            continue
        raw.FPDFText_GetCharBox(textpage, index, *map(byref, sides))  # left, right, bottom, top
        x1, x2, y1, y2 = (side.value for side in sides)
        raw.FPDFText_GetLooseCharBox(textpage, index, byref(loose))
        known = not raw.FPDFText_HasUnicodeMapError(textpage, index)
        yield Character(
            _readable(text) if known else None,
            shown(x1, y1, x2, y2),
            shown(loose.left, loose.bottom, loose.right, loose.top),
            (round(angle) + turns) % 4,
        )


def _readable(text: str) -> str | None:
    if text in "\x02\xad\ufffe":  # what pdfium and others make of a hyphen at a line's end
        return "-"
    if unicodedata.category(text) == "Cf":  # marks without a glyph
        return ""
    if unicodedata.category(text) in ("Cc", "Cn", "Co", "Cs") or text == "\ufffd":
        return None
    if "\ufb00" <= text <= "\ufb06":  # ligatures; other compatibility forms look different from what they stand for
        return unicodedata.normalize("NFKC", text)
    return text


class _Run:
    """Characters that follow each other, in a frame that is turned so that they read to the right."""

    def __init__(self, character: Character) -> None:
        self.characters, self.texts = [character], [character.text]
        self.turn = character.turn
        self.cell = _turned(character.cell, self.turn)

    @property
    def height(self) -> float:
        return self.cell[3] - self.cell[1]

    def gap(self, other: _Run) -> float:
        return max(self.cell[0] - other.cell[2], other.cell[0] - self.cell[2])

    def continues(self, other: _Run) -> bool:
        """Whether both are of one line: side by side at one height, of sizes as letters and exponents have them."""
        small, large = sorted((self.height, other.height))
        overlap = min(self.cell[3], other.cell[3]) - max(self.cell[1], other.cell[1])
        near = -0.5 * large <= self.gap(other) <= COLUMN * large
        return self.turn == other.turn and near and 0 < large <= 2 * small and overlap >= small / 2

    def append(self, other: _Run, space: bool) -> None:
        self.texts += [" ", *other.texts] if space else other.texts
        self.characters += other.characters
        self.cell = _union(self.cell, other.cell)


def text_lines(characters: Iterator[Character] | list[Character]) -> list[Line]:
    """Lines of characters that come in a page's own order, in the order of their first characters.

    What stands at one height and close together is one line, however the file draws it; columns and cells of a table
    stay apart. Unknown characters at a line's ends (bullets of a symbol font) are left out.
    """
    runs: list[_Run] = []
    space, new, last = False, True, None
    for character in _upright_columns(list(characters)):
        if character.text in (" ", "\n"):
            space, new = True, new or character.text == "\n"
            continue
        run = _Run(character)
        ligature = last is not None and character.cell == last.characters[-1].cell  # told as letters of one box
        if not new and last is not None and (ligature or last.continues(run)):
            last.append(run, space)
        else:
            runs.append(run)
            last = run
        space = new = False
    lines = [_line(group) for group in _groups(runs)]
    return [line for line in lines if line is not None]


def _upright_columns(characters: list[Character]) -> list[Character]:
    """Chinese and Japanese characters that stand one below another, as ones that read downwards."""
    wide = [i for i, c in enumerate(characters) if c.text and unicodedata.east_asian_width(c.text[0]) in "WF"]
    for i, j in zip(wide, wide[1:], strict=False):
        above, below = characters[i].cell, characters[j].cell
        size = above[2] - above[0]
        side_by_side = abs(above[0] + above[2] - below[0] - below[2]) > 0.5 * size
        if not side_by_side and abs(below[1] - above[3]) < 0.3 * size and characters[j].turn == 0:
            for index in (i, j):
                characters[index] = Character(characters[index].text, characters[index].ink, characters[index].cell, 1)
    return characters


def _groups(runs: list[_Run]) -> list[list[_Run]]:
    """Runs of one line together: those that `continues` links, directly or over others."""
    group = {id(run): [run] for run in runs}
    ordered = sorted(runs, key=lambda run: run.cell[1])
    for i, run in enumerate(ordered):
        for j in range(i + 1, len(ordered)):
            other = ordered[j]
            if other.cell[1] >= run.cell[3]:
                break
            mine, theirs = group[id(run)], group[id(other)]
            if mine is not theirs and run.continues(other):
                mine += theirs
                group.update((id(member), mine) for member in theirs)
    place = {id(run): i for i, run in enumerate(runs)}
    groups = {id(members): members for members in group.values()}.values()
    return sorted(groups, key=lambda members: min(place[id(run)] for run in members))


def _line(group: list[_Run]) -> Line | None:
    letters = "".join(text for run in group for text in run.texts if text)
    leftwards = sum(unicodedata.bidirectional(c) in ("R", "AL") for c in letters) * 2 > len(letters)
    first, *following = sorted(group, key=lambda run: run.cell[0], reverse=leftwards)
    for run in following:
        first.append(run, first.gap(run) > SPACE * max(first.height, run.height))
    texts, glyphs = first.texts, first.characters
    while texts and texts[0] in (None, " "):
        glyphs = glyphs[texts[0] is None :]
        texts = texts[1:]
    while texts and texts[-1] in (None, " "):
        glyphs = glyphs[: len(glyphs) - (texts[-1] is None)]
        texts = texts[:-1]
    if not texts:
        return None
    box = _union(*(glyph.ink for glyph in glyphs if glyph.ink[0] < glyph.ink[2] and glyph.ink[1] < glyph.ink[3]))
    text = None if None in texts else unicodedata.normalize("NFC", "".join(filter(None, texts)))
    return Line(text, box) if box else None


def _turned(box: Box, turns: int) -> Box:
    for _ in range(turns):
        box = box[1], -box[2], box[3], -box[0]
    return box


def _union(*boxes: Box) -> Box | None:
    if not boxes:
        return None
    x1, y1, x2, y2 = zip(*boxes, strict=True)
    return min(x1), min(y1), max(x2), max(y2)
