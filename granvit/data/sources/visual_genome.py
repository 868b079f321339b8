"""Visual Genome: region_descriptions.json, a list of images with regions in pixels counted from 0, and phrases."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of an item nested deeply too
from typing import Any

from tyro.conf import Positional

from granvit.data.files import local
from granvit.data.records import Notes, Record
from granvit.data.schema import is_number, is_unicode
from granvit.data.sources.coco import is_key
from granvit.data.sources.rows import FolderSource, PixelBox, picture_row
from granvit.data.sources.stream import elements
from granvit.questions.schema import DataFault

FOLDERS = ("", "VG_100K/", "VG_100K_2/")
"""Where a picture may lie: its two archives unpack to the last two."""


@dataclass(frozen=True)
class VisualGenome(FolderSource):
    """Visual Genome's region descriptions. Its boxes were drawn loosely: what leaves the picture is cut off."""

    regions: Positional[str]
    """FILE or URL of region_descriptions.json."""
    images: str
    """Folder or URL of the pictures, IMAGE_ID.jpg, in it or in its folders VG_100K and VG_100K_2."""
    image_data: str | None = None
    """FILE or URL of image_data.json. It tells which pictures are COCO's: --exclude finds those by coco/IMAGE ID too,
    the id from other converters. It tells sizes as well, which are then checked."""
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        return [self.regions, *([self.image_data] if self.image_data else []), *local(self.images)]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        with closing(sqlite3.connect(scratch / "images.sqlite")) as database:
            database.execute("CREATE TABLE images (id PRIMARY KEY, coco, width, height)")
            if self.image_data:
                _read_image_data(self.image_data, database, notes)
            for index, (_, item) in enumerate(elements(self.regions)):
                name = f"{self.regions}[{index}]"
                try:
                    image, regions = _image(item)
                except DataFault as fault:
                    notes.unreadable(name, fault)
                    continue
                if not regions:
                    notes.skip("image without annotation")
                    continue
                query = "SELECT coco, width, height FROM images WHERE id = ?"
                coco, *size = database.execute(query, (image,)).fetchone() or (None, None, None)
                aliases = () if coco is None else (f"coco/{coco}",)
                yield Record(f"vg/{image}", name, {"image": image, "size": size, "regions": regions}, aliases)

    def row(self, record: Record, notes: Notes) -> dict[str, Any]:
        data, boxes = record.data, []
        for index, (box, phrase) in enumerate(data["regions"]):
            try:
                boxes.append(PixelBox.xywh(box, phrase, cut=True))
            except DataFault as fault:
                notes.fault(record, DataFault(fault.kind, f"regions[{index}]: {fault}"))
        name, content = self._picture(data["image"])
        return picture_row(record, content, name, boxes, notes, data["size"], None, "visual_genome", self.licence)

    def _picture(self, image: int | str) -> tuple[str, bytes]:
        for folder in FOLDERS:
            name = f"{folder}{image}.jpg"
            try:
                return name, self.read_image(self.images, name)
            except DataFault as error:
                fault = error
        raise DataFault(fault.kind, f"{fault} (nor in {self.images} itself or its VG_100K)")


def _image(item: Any) -> tuple[int | str, list[Any]]:
    """An image's id and its regions as [box or null, phrase]."""
    image, regions = (item.get("id"), item.get("regions")) if isinstance(item, dict) else (None, None)
    if not is_key(image) or not isinstance(regions, list):
        raise DataFault("regions", f"must be an object of an id and a list of regions, got {brief(item)}")
    return image, [_region(region) for region in regions]


def _region(region: Any) -> tuple[list[Any] | None, Any]:
    if not isinstance(region, dict):
        return None, None
    box = [region.get(side) for side in ("x", "y", "width", "height")]
    phrase = region.get("phrase")
    return box if all(map(is_number, box)) else None, phrase if isinstance(phrase, str) and is_unicode(phrase) else None


def _read_image_data(location: str, database: sqlite3.Connection, notes: Notes) -> None:
    for index, (_, item) in enumerate(elements(location)):
        image = item.get("image_id") if isinstance(item, dict) else None
        if not is_key(image):
            shown = f"must be an object of an image_id, got {brief(item)}"
            notes.unreadable(f"{location}[{index}]", DataFault("id", shown))
            continue
        coco, *size = (item.get(key) for key in ("coco_id", "width", "height"))
        values = (image, coco if is_key(coco) else None, *(side if is_number(side) else None for side in size))
        database.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", values)
