"""Pascal VOC: an XML file an image, boxes in whole pixels counted from 1, both ends inclusive (its development kit)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from tyro.conf import Positional

from granvit.data.files import list_files, local, read_file, read_image
from granvit.data.shards import Notes, Record, Source
from granvit.data.sources.rows import PixelBox, class_phrase, named, picture_row
from granvit.questions.schema import DataFault

MAX_XML = 10_000_000  # bytes


@dataclass(frozen=True)
class Voc(Source):
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
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        return local(self.annotations) + local(self.images)

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        for name, shown in named(self.annotations, list_files(self.annotations, (".xml",)), notes):
            yield Record(name[: -len(".xml")], shown, name)

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        content = read_file(self.annotations, record.data, MAX_XML, "xml")
        try:
            root = ElementTree.fromstring(content)
            image = root.findtext("filename", "").strip()
            size = tuple(int(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise DataFault("xml", f"no readable VOC annotation: {error}") from None
        boxes, things = [], list(root.iter("object"))
        easy = [(index, item) for index, item in enumerate(things) if item.findtext("difficult", "").strip() != "1"]
        notes.drop("difficult object", len(things) - len(easy))
        if not easy:
            notes.drop("image without annotation")
            return None
        for index, item in easy:
            try:
                boxes.append(self._box(item))
            except DataFault as fault:
                notes.fault(record, DataFault(fault.kind, f"object {index}: {fault}"))
        picture = read_image(self.images, image)
        return picture_row(record, picture, image, boxes, notes, size, source="voc", licence=self.licence)

    def _box(self, item: ElementTree.Element) -> PixelBox:
        found = [item.findtext(f"bndbox/{side}", "") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = map(float, found)
        except ValueError:
            raise DataFault("box", f"bndbox must hold numbers xmin, ymin, xmax and ymax, got {found}") from None
        return PixelBox((x1 - self.origin, y1 - self.origin, x2, y2), class_phrase(item.findtext("name", "")))
