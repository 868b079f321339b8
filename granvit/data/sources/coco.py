"""COCO: one JSON file of images, annotations and categories, boxes [x, y, width, height] in pixels counted from 0.

Images and annotations come in any order and by the million: they are joined in SQLite, on disk.
"""

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
from granvit.data.sources.labels import class_phrase
from granvit.data.sources.rows import FolderSource, PixelBox, is_box, is_set, picture_row
from granvit.data.sources.stream import elements
from granvit.questions.schema import DataFault

Key = int | str  # COCO's ids are integers, those of some tools strings


@dataclass(frozen=True)
class Coco(FolderSource):
    """COCO's instances JSON; the category's name becomes the sentence ("a person")."""

    instances: Positional[str]
    """FILE or URL of the instances JSON."""
    images: str
    """Folder or URL of the pictures that its file_names are relative to."""
    captions: str | None = None
    """FILE or URL of COCO's captions JSON. Of an image's five captions the longest is taken: they were written
    independently, and the longest mostly names the most of what is seen."""
    name: str = "coco"
    """What ids (NAME/IMAGE ID) and `source` say. Ids of COCO's own images are the same from every converter, so
    that leakage shows; give other data in COCO's format another name."""
    articles: bool = True
    """Say "a person" for the class "person", where English is sure of the article; else the name stays as it is."""
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        return [self.instances, *([self.captions] if self.captions else []), *local(self.images)]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        with closing(sqlite3.connect(scratch / "coco.sqlite")) as database:
            read_instances(self.instances, database, notes)
            if self.captions:
                _read_captions(self.captions, database, notes)
            database.execute("CREATE INDEX by_image ON annotations (image_id)")
            categories = dict(database.execute("SELECT id, name FROM categories"))
            for image, file, width, height in database.execute("SELECT id, file, width, height FROM images"):
                columns = "id, category_id, crowd, no_box, x, y, w, h"
                query = f"SELECT {columns} FROM annotations WHERE image_id = ? ORDER BY n"
                objects = database.execute(query, (image,)).fetchall()
                told = database.execute("SELECT caption FROM captions WHERE image_id = ?", (image,)).fetchone()
                caption = told[0] if told else None
                things = [thing for thing in objects if not thing[2]]
                notes.drop("crowd region", len(objects) - len(things))
                if not things and caption is None:
                    notes.skip("image without annotation")
                    continue
                boxes = [[categories.get(category), no_box or box] for _, category, _, no_box, *box in things]
                data = {"file": file, "size": [width, height], "boxes": boxes, "caption": caption}
                record = Record(f"{self.name}/{image}", f"{self.instances}: image {image}", data)
                for number, category, *_ in things:
                    if category not in categories:
                        shown = f"annotation {number} is of category {category!r:.80}, which is not listed"
                        notes.fault(record, DataFault("category", shown))
                yield record
            known = "image_id IN (SELECT id FROM images)"
            for image, number in database.execute(
                f"SELECT image_id, count(*) FROM annotations WHERE NOT {known} GROUP BY image_id ORDER BY min(n)"
            ):
                notes.unreadable(
                    f"{self.instances}: image {image}",
                    DataFault("image_id", f"has annotations ({number}) and is not listed"),
                )
            [[unused]] = database.execute(f"SELECT count(*) FROM captions WHERE NOT {known}")
            notes.drop("caption of an image that is not listed", unused)

    def row(self, record: Record, notes: Notes) -> dict[str, Any]:
        data = record.data
        boxes = []
        for name, box in data["boxes"]:
            if name is not None:  # else noted while indexing
                try:
                    boxes.append(PixelBox.xywh(box, class_phrase(name, self.articles)))
                except DataFault as fault:
                    notes.fault(record, fault)
        picture = self.read_image(self.images, data["file"])
        told = {"size": data["size"], "caption": data["caption"], "source": self.name, "licence": self.licence}
        return picture_row(record, picture, data["file"], boxes, notes, **told)


def read_instances(location: str, database: sqlite3.Connection, notes: Notes) -> None:
    """Write an instances JSON into tables: images (n, id, file, width, height), annotations (n, id, image_id,
    category_id, crowd, x, y, w, h, no_box) and categories (id, name); captions (image_id, caption) stays empty.

    Columns have no type, so that 1 and "1" stay two. Where a box is no list of four numbers, its sides are null and
    no_box is what stands there, as a fault shows it. What has no usable id
    or no file's name is noted.
    """
    database.executescript(
        """
        PRAGMA synchronous = OFF; PRAGMA journal_mode = OFF; -- a build that is killed indexes anew
        CREATE TABLE images (n INTEGER PRIMARY KEY, id, file, width, height);
        CREATE TABLE annotations (n INTEGER PRIMARY KEY, id, image_id, category_id, crowd, x, y, w, h, no_box);
        CREATE TABLE categories (id PRIMARY KEY, name);
        CREATE TABLE captions (image_id PRIMARY KEY, caption);
        """
    )
    tables = {
        "images": (_image, "INSERT INTO images (id, file, width, height) VALUES (?, ?, ?, ?)"),
        "annotations": (
            _annotation,
            "INSERT INTO annotations (id, image_id, category_id, crowd, x, y, w, h, no_box) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        ),
        "categories": (_category, "INSERT OR REPLACE INTO categories VALUES (?, ?)"),
    }
    for index, (key, item) in enumerate(elements(location)):
        if key not in tables:
            continue
        parse, insert = tables[key]
        try:
            database.execute(insert, parse(item))
        except DataFault as fault:
            notes.unreadable(f"{location}: {key}, element {index} of the file", fault)
    database.execute("CREATE INDEX image_ids ON images (id)")


def _image(item: Any) -> tuple[Any, ...]:
    file = item.get("file_name") if isinstance(item, dict) else None
    if not isinstance(file, str) or not file or not is_unicode(file):
        raise DataFault("missing_key", f"an image must have a file_name, got {brief(item)}")
    size = [item.get(side) for side in ("width", "height")]
    return (_key(item, "id"), file, *(side if is_number(side) else None for side in size))


def _annotation(item: Any) -> tuple[Any, ...]:
    number = item.get("id") if isinstance(item, dict) else None
    number = number if is_key(number) else None
    box = item.get("bbox") if isinstance(item, dict) else None
    image, category = _key(item, "image_id"), _key(item, "category_id")
    crowd = is_set(item.get("iscrowd"))
    return (number, image, category, crowd, *(box if is_box(box) else [None] * 4), None if is_box(box) else brief(box))


def _category(item: Any) -> tuple[Any, ...]:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(name, str) or not name.strip() or not is_unicode(name):
        raise DataFault("missing_key", f"a category must have a name, got {brief(item)}")
    return _key(item, "id"), name


def _read_captions(location: str, database: sqlite3.Connection, notes: Notes) -> None:
    for index, (key, item) in enumerate(elements(location)):
        if key != "annotations":
            continue
        try:
            image = _key(item, "image_id")
            caption = item.get("caption")
            if not isinstance(caption, str) or not caption.strip() or not is_unicode(caption):
                raise DataFault("caption", f"caption must be a string with text in it (Unicode), got {brief(caption)}")
            database.execute(
                "INSERT INTO captions VALUES (?, ?) ON CONFLICT DO UPDATE SET caption = excluded.caption "
                "WHERE length(excluded.caption) > length(caption)",
                (image, " ".join(caption.split())),
            )
        except DataFault as fault:
            notes.unreadable(f"{location}: element {index} of the file", fault)


def is_key(value: Any) -> bool:
    """Whether it can be an id: an integer of 64 bits, or a string."""
    if isinstance(value, str):
        return is_unicode(value)
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _key(item: Any, name: str) -> Key:
    value = item.get(name) if isinstance(item, dict) else None
    if isinstance(value, float) and value.is_integer():  # as pandas writes integers of a column that lacks some
        value = int(value)
    if not is_key(value):
        raise DataFault("id", f"{name} must be an integer or a string, got {brief(item)}")
    return value
