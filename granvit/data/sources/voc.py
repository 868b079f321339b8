"""Pascal VOC: an XML file an image, boxes in whole pixels counted from 1, both ends inclusive (its development kit)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from tyro.conf import Positional

from granvit.data.files import local, read_file
from granvit.data.records import Notes, Record
from granvit.data.sources.labels import class_phrase
from granvit.data.sources.rows import FolderSource, PixelBox, is_set, picture_row
from granvit.questions.schema import DataFault

MAX_XML = 10_000_000  # bytes
_ENCODING = re.compile(
    rb"""<\?xml[^>]*?encoding=["'](gb(?:k|2312|18030)|big5(?:-hkscs)?|cp9(?:32|36|49|50)|shift_jis|euc-(?:jp|kr))["']""",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Voc(FolderSource):
    """Pascal VOC's XML, one file an image; the class's name becomes the sentence ("a person").

    Objects marked difficult are left out, as in VOC's own measure: what they are shows only from their surroundings.
    """

    annotations: Positional[str]
    """Folder or URL of the XML files (VOC's Annotations)."""
    images: str
    """Folder or URL of the pictures that they name (VOC's JPEGImages)."""
    origin: Literal[0, 1] = 1
    """What the first pixel is called. VOC counts from 1 and means xmax inclusive; many tools that write the format
    count from 0 and mean it exclusive."""
    articles: bool = True
    """Say "a person" for the class "person", where English is sure of the article; else the name stays as it is."""
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        return local(self.annotations) + local(self.images)

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        for name, shown in self.named_files(self.annotations, (".xml",), notes):
            yield Record(name[: -len(".xml")], shown, name)

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        content = read_file(self.annotations, record.data, MAX_XML, "xml", self.follow_links)
        try:
            root = ElementTree.fromstring(_readable(content))
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DataFault("xml", f"no readable VOC annotation: {error}") from None
        image, size = root.findtext("filename", "").strip(), _size(root)
        boxes, things = [], list(root.iter("object"))
        easy = [(index, item) for index, item in enumerate(things) if not is_set(item.findtext("difficult"))]
        notes.drop("difficult object", len(things) - len(easy))
        if not easy:
            notes.drop("image without annotation")
            return None
        for index, item in easy:
            try:
                boxes.append(self._box(item))
            except DataFault as fault:
                notes.fault(record, DataFault(fault.kind, f"object {index}: {fault}"))
        picture = self.read_image(self.images, image)
        return picture_row(record, picture, image, boxes, notes, size, source="voc", licence=self.licence)

    def _box(self, item: ElementTree.Element) -> PixelBox:
        texts = [item.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(float, texts)
        except ValueError:
            raise DataFault("box", f"bndbox must hold numbers xmin, ymin, xmax and ymax, got {texts}") from None
        phrase = class_phrase(item.findtext("name", ""), self.articles)
        return PixelBox((x1 - self.origin, y1 - self.origin, x2, y2), phrase)


def _readable(content: bytes) -> bytes | str:
    """Decoded where the XML declares an encoding of Chinese, Japanese or Korean, which expat has not."""
    declared = _ENCODING.match(content)
    return content.decode(declared[1].decode("ascii")) if declared else content


def _size(root: ElementTree.Element) -> list[int]:
    """[width, height] as annotated, 0 where the file does not tell. Raises DataFault of kind `xml`."""
    sides = []
    for side in ("width", "height"):
        text = root.findtext(f"size/{side}", "").strip() or "0"
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (number >= 0 and number.is_integer()):
            raise DataFault("xml", f"size/{side} must be a whole number of pixels, got {text!r:.40}")
        sides.append(int(number))
    return sides
