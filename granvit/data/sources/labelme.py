"""LabelMe: a JSON file an image, shapes of points in pixels from 0, continuous: a pixel's area is x to x + 1."""

from __future__ import annotations

import base64
import binascii
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from granvit.data.files import MAX_BYTES, local, read_file, rebase
from granvit.data.records import Notes, Record
from granvit.data.schema import is_number, is_unicode
from granvit.data.sources.labels import class_phrase
from granvit.data.sources.rows import FolderSource, PixelBox, parse_json, picture_row
from granvit.questions.schema import DataFault

MAX_JSON = 10_000_000 + MAX_BYTES * 4 // 3  # bytes; a picture may be in it as base64

_NUMBERS = {
    "rectangle": (2, 4), "circle": (2,), "mask": (2,), "oriented_rectangle": (4,), "rotation": (4,),
    "quadrilateral": (4,), "polygon": (),
}  # fmt: skip
"""Points of a shape; a polygon has any number from 3 on."""

_CUT = ("circle", "oriented_rectangle", "rotation")
"""What may leave the picture, by its rim or a corner, though the thing does not."""

_NO_AREA = ("point", "points", "line", "linestrip")


@dataclass(frozen=True)
class Labelme(FolderSource):
    """LabelMe's JSON, one file an image; the label becomes the sentence ("a person").

    A region is what a shape reaches over; shapes of one label and group are one thing, as to LabelMe itself. Lines and
    points, having no area, and labels that begin with "__" (LabelMe's "__ignore__") are left out.
    """

    annotations: Positional[str]
    """Folder or URL of the JSON files."""
    images: str | None = None
    """Folder or URL in which the files' imagePaths, relative to each file, must end; None: the folder itself. A
    picture inside the JSON needs none."""
    articles: bool = True
    """Say "a person" for the class "person", where English is sure of the article; else the name stays as it is."""
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        return [folder for location in (self.annotations, self.images) if location for folder in local(location)]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        for name, shown in self.named_files(self.annotations, (".json",), notes):
            yield Record(name[: -len(".json")], shown, name)

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        data = parse_json(read_file(self.annotations, record.data, MAX_JSON, "json", self.follow_links))
        if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
            raise DataFault("json", "no LabelMe file: it must be an object with a list of shapes")
        faults = len(notes.faults)
        boxes = self._boxes(record, data["shapes"], notes)
        if not boxes and len(notes.faults) == faults:
            notes.drop("image without annotation")
            return None
        picture, name = self._picture(record.data, data)
        size = [data.get(key) for key in ("imageWidth", "imageHeight")]
        return picture_row(record, picture, name, boxes, notes, size, None, "labelme", self.licence)

    def _boxes(self, record: Record, shapes: list[Any], notes: Notes) -> list[PixelBox]:
        things: dict[Any, PixelBox] = {}
        for index, shape in enumerate(shapes):
            try:
                label, kind, group = _shape(shape)
                if label.startswith("__"):
                    notes.drop("shape to be ignored")
                    continue
                if kind in _NO_AREA:
                    notes.drop("shape without area")
                    continue
                box = _reach(kind, shape.get("points"))
            except DataFault as fault:
                notes.fault(record, DataFault(fault.kind, f"shapes[{index}]: {fault}"))
                continue
            key, cut = index if group is None else (label, group), kind in _CUT
            if key in things:
                x1, y1, x2, y2 = things[key].box
                box = (min(x1, box[0]), min(y1, box[1]), max(x2, box[2]), max(y2, box[3]))
                cut |= things[key].cut
            things[key] = PixelBox(box, class_phrase(label, self.articles), cut=cut)
        return list(things.values())

    def _picture(self, file: str, data: dict[str, Any]) -> tuple[bytes, str]:
        """The picture inside the file, which is what was annotated, or else the one that it names."""
        name = data.get("imagePath")
        name = name.replace("\\", "/") if isinstance(name, str) and is_unicode(name) else ""
        inline = data.get("imageData")
        if isinstance(inline, str):  # with line breaks, or as a URL: "data:image/png;base64,iVBO..."
            inline = "".join(inline.split()).rpartition(",")[2]
        if inline not in (None, ""):
            try:
                return base64.b64decode(inline, validate=True), name
            except (binascii.Error, ValueError, TypeError) as error:
                raise DataFault("image", f"imageData is not base64: {error}") from None
        if not name:
            raise DataFault("path", "it has neither imageData nor an imagePath")
        name = posixpath.normpath(posixpath.join(posixpath.dirname(file), name))
        folder = self.images or self.annotations
        name = rebase(self.annotations, name, folder)
        return self.read_image(folder, name), name


def _shape(shape: Any) -> tuple[str, str, float | str | None]:
    """Label, type and group."""
    if not isinstance(shape, dict):
        raise DataFault("shape", f"must be an object, got {type(shape).__name__}")
    label, kind, group = shape.get("label"), shape.get("shape_type"), shape.get("group_id")
    kind = "polygon" if kind is None else kind
    if not isinstance(label, str) or not label.strip() or not is_unicode(label):
        raise DataFault("region_caption", "label must be a string with text in it (Unicode)")
    if not isinstance(kind, str):
        raise DataFault("shape", "shape_type must be a string")
    return label, kind, group if isinstance(group, (int, float, str)) else None


def _reach(kind: str, points: Any) -> tuple[float, float, float, float]:
    """The box around a shape, xyxy in pixels. Raises DataFault of kind `shape`.

    A mask's points are its first and its last pixel. A rectangle of four corners, turned or not, is X-AnyLabeling's,
    whose "rotation" is LabelMe's "oriented_rectangle".
    """
    if kind not in _NUMBERS:
        raise DataFault("shape", f"shape_type {kind!r:.40} is not known")
    number = len(points) if isinstance(points, list) else 0
    if not (number >= 3 if kind == "polygon" else number in _NUMBERS[kind]) or not all(map(_is_point, points)):
        needed = " or ".join(map(str, _NUMBERS[kind])) or "3 or more"
        raise DataFault("shape", f"a {kind} must have {needed} points [x, y]")
    if kind == "circle":
        (x, y), rim = points
        radius = math.dist((x, y), rim)
        return x - radius, y - radius, x + radius, y + radius
    xs, ys = zip(*points, strict=True)
    end = 1 if kind == "mask" else 0
    return min(xs), min(ys), max(xs) + end, max(ys) + end


def _is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))
