"""RefCOCO, RefCOCO+ and RefCOCOg: referring expressions for objects of COCO's train2014 pictures.

Three forms are read, told apart by what the file holds. Boxes are in pixels counted from 0:

    refs(unc).p, refs(google).p, refs(umd).p  pickles, the original's; instances.json beside them has boxes x, y, w, h
    Parquet with image_path and captions      one row an object, box x1, y1, x2, y2, no pictures (on hubs: jxu124)
    Parquet with image and answer             one row an object, box x, y, w, h, picture in the row (lmms-lab)
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from reprlib import repr as brief  # of an item nested deeply too
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tyro.conf import Positional

from granvit.data.files import inside, list_files, local, open_file, parent, suffix
from granvit.data.records import Notes, Record
from granvit.data.schema import is_unicode
from granvit.data.sources import plain_pickle
from granvit.data.sources.coco import is_key, read_instances
from granvit.data.sources.rows import FolderSource, PixelBox, is_box, picture_row
from granvit.questions.schema import DataFault

MAX_PICKLE, MAX_GROUP = 200_000_000, 2_000_000_000  # bytes
MAX_SENTENCES, MAX_SENTENCE = 100, 1000  # of an object; characters

_PATHS = {"image_id", "image_path", "split", "captions", "bbox"}
_PICTURES = {"image", "file_name", "answer", "bbox"}

_Object = tuple[Any, str, str, str]  # a row of the table refs
_Entry = tuple[str, Any, Callable[[], _Object]]  # what faults call an object, its split, and what reads it


@dataclass(frozen=True)
class RefCoco(FolderSource):
    """RefCOCO, RefCOCO+ or RefCOCOg, from the original's files or a hub's Parquet.

    Every expression is a region of its own, so that an object with three has its box three times: that is how these
    sets are trained on and counted everywhere. What two people said of one object counts twice in what is evaluated
    on; of the split "train" it is taken once. Ids are coco/IMAGE ID, as from `coco`: what is evaluated on can be
    excluded from what is trained on.
    """

    refs: Positional[str]
    """FILE or URL: refs(unc).p or its like, or Parquet; or a folder of Parquet."""
    images: str | None = None
    """Folder or URL of COCO's train2014 pictures; None: they are in the Parquet file."""
    instances: str | None = None
    """FILE or URL of instances.json; None: beside the pickle."""
    part: str = "train"
    """Which of the set's own splits is taken: train, val, testA, testB or test; "all" of them is the only one for
    Parquet whose rows name no split: there each file is one."""
    licence: str = ""
    """Noted in every row."""

    def inputs(self) -> list[str]:
        instances = [self._instances()] if self._is_pickle() else []
        return [*self._files(), *instances, *(local(self.images) if self.images else [])]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        _pictures.cache_clear()  # the file may be another by now
        with closing(sqlite3.connect(scratch / "refs.sqlite")) as database:
            # What comes of an object: its image, where its picture is, size, [sentence, box] pairs as JSON.
            database.execute("CREATE TABLE refs (n INTEGER PRIMARY KEY, image, place, size, regions)")
            splits, taken = set(), 0
            for name, split, parse in self._pickled(database, notes) if self._is_pickle() else self._rows():
                if self.part not in ("all", split):
                    splits.add(brief(split))
                    notes.drop("object of another split")
                    continue
                taken += 1
                try:
                    database.execute("INSERT INTO refs (image, place, size, regions) VALUES (?, ?, ?, ?)", parse())
                except DataFault as fault:
                    notes.unreadable(name, fault)
            if splits and not taken:
                raise ValueError(f"part must be one of {', '.join(sorted(splits)[:10])} or all, got {self.part!r}")
            database.execute("CREATE INDEX by_image ON refs (image)")
            firsts = database.execute("SELECT image, place, size, min(n) FROM refs GROUP BY image ORDER BY min(n)")
            for image, place, size, _ in firsts:
                listed = database.execute("SELECT regions FROM refs WHERE image = ? ORDER BY n", (image,))
                regions = [region for [some] in listed for region in json.loads(some)]
                data = {"place": json.loads(place), "size": json.loads(size), "regions": regions}
                yield Record(f"coco/{image}", f"{self.refs}: image {image}", data)

    def row(self, record: Record, notes: Notes) -> dict[str, Any]:
        data, boxes = record.data, []
        for sentence, box in data["regions"]:
            try:
                boxes.append(PixelBox.xywh(box, sentence))
            except DataFault as fault:
                notes.fault(record, fault)
        place = data["place"]
        if isinstance(place, str):
            picture = self.read_image(self.images or "", place)
        else:
            file, group, index = place
            picture = _pictures(file, group)[index]
            place = f"{record.id.rpartition('/')[2]}.jpg"
        return picture_row(record, picture, place, boxes, notes, data["size"], None, "refcoco", self.licence)

    def _is_pickle(self) -> bool:
        return suffix(self.refs) in (".p", ".pkl", ".pickle")

    def _instances(self) -> str:
        return self.instances or inside(parent(self.refs), "instances.json", self.follow_links)

    def _files(self) -> list[str]:
        if self._is_pickle() or suffix(self.refs) == ".parquet":
            return [self.refs]
        files = list_files(self.refs, (".parquet",), self.follow_links)
        if not files:
            raise ValueError(f"refs must be a pickle (.p), Parquet or a folder with Parquet in it, got {self.refs}")
        return [inside(self.refs, name, self.follow_links) for name in files]

    def _pickled(self, database: sqlite3.Connection, notes: Notes) -> Iterator[_Entry]:
        if self.images is None:
            raise ValueError("images must be the folder of COCO's train2014 pictures: a pickle holds none")
        read_instances(self._instances(), database, notes)
        database.execute("CREATE INDEX by_id ON annotations (id)")
        with open_file(self.refs) as file:
            content = file.read(MAX_PICKLE + 1)
        if len(content) > MAX_PICKLE:
            raise ValueError(f"{self.refs} has more than the limit of {MAX_PICKLE} bytes")
        try:
            refs = plain_pickle.load(content)
        except ValueError as error:
            raise ValueError(f"{self.refs} is {error}") from None
        if not isinstance(refs, list):
            raise ValueError(f"{self.refs} must hold a list of references, got {type(refs).__name__}")
        for index, ref in enumerate(refs):
            split = ref.get("split") if isinstance(ref, dict) else None
            yield f"{self.refs}[{index}]", split, partial(_pickled_object, ref, database)

    def _rows(self) -> Iterator[_Entry]:
        for location in self._files():
            with open_file(location) as opened:
                try:
                    file = pq.ParquetFile(opened)
                    names = set(file.schema_arrow.names)
                    if not (names >= _PATHS or names >= _PICTURES):
                        known = " or ".join(f"({', '.join(sorted(layout))})" for layout in (_PATHS, _PICTURES))
                        raise ValueError(f"must have the columns {known}, has ({', '.join(sorted(names))})")
                    if names >= _PATHS and self.images is None:
                        raise ValueError("images must be the folder of COCO's train2014 pictures: this file holds none")
                    if not names >= _PATHS and self.part != "all":
                        raise ValueError('its rows name no split: choose by file, with "all" as part')
                    columns = sorted(_PATHS if names >= _PATHS else _PICTURES - {"image"})
                    for group in range(file.num_row_groups):
                        for index, row in enumerate(file.read_row_group(group, columns).to_pylist()):
                            if names >= _PATHS:
                                parse = partial(_path_object, row)
                            else:
                                parse = partial(_picture_object, row, [location, group, index])
                            yield f"{location}: row {index} of row group {group}", row.get("split"), parse
                except (pa.ArrowException, OSError, ValueError) as error:
                    raise ValueError(f"{location} can't be read: {error}") from None


def _pickled_object(ref: Any, database: sqlite3.Connection) -> _Object:
    if not isinstance(ref, dict) or not is_key(ref.get("ann_id")) or not is_key(ref.get("image_id")):
        raise DataFault("ref", f"must be an object with an ann_id and an image_id, got {brief(ref)}")
    query = "SELECT image_id, x, y, w, h FROM annotations WHERE id = ?"
    image, *box = database.execute(query, (ref["ann_id"],)).fetchone() or (None, None)
    if image != ref["image_id"]:
        raise DataFault("ann_id", f"annotation {ref['ann_id']!r:.80} of image {ref['image_id']!r:.80} is not listed")
    query = "SELECT file, width, height FROM images WHERE id = ?"
    file, *size = database.execute(query, (image,)).fetchone() or (None, None)
    if file is None:
        raise DataFault("image_id", f"image {image!r:.80} is not listed")
    listed = _list(ref.get("sentences"))
    sentences = [sentence.get("sent") if isinstance(sentence, dict) else None for sentence in listed]
    return _object(image, file, size, sentences, box, ref["split"])


def _path_object(row: dict[str, Any]) -> _Object:
    path, box = row["image_path"], row["bbox"]
    if not is_key(row["image_id"]) or not isinstance(path, str):
        raise DataFault("ref", f"must have an image_id and an image_path, got {brief(row)}")
    if is_box(box):
        box = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
    return _object(row["image_id"], path.rpartition("/")[2], None, _list(row["captions"]), box, row["split"])


def _picture_object(row: dict[str, Any], place: list[Any]) -> _Object:
    name = row["file_name"]
    told = re.match(r"COCO_\w+?_(\d{12})(?!\d)", name, re.ASCII) if isinstance(name, str) else None
    if not told:
        raise DataFault("ref", f"file_name must begin with COCO_SET_ and 12 digits, got {brief(name)}")
    return _object(int(told[1]), place, None, _list(row["answer"]), row["bbox"])


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > MAX_SENTENCES:
        raise DataFault("ref", f"must have a list of at most {MAX_SENTENCES} sentences, got {brief(value)}")
    return value


def _object(image: Any, place: Any, size: Any, sentences: list[Any], box: Any, split: Any = None) -> _Object:
    """A row of the table refs. Sentences that are none, or too long, are a fault of the object."""
    for sentence in sentences:
        if not isinstance(sentence, str) or not is_unicode(sentence) or len(sentence) > MAX_SENTENCE:
            raise DataFault("region_caption", f"a sentence must be a string (Unicode), got {brief(sentence)}")
    said = [" ".join(sentence.split()) for sentence in sentences]
    # Training asks for no sentence that two regions share, as which it would take one that was said twice.
    said = list(dict.fromkeys(said)) if split == "train" else said
    regions = [[sentence, box if is_box(box) else None] for sentence in said]
    return image, json.dumps(place), json.dumps(size), json.dumps(regions)


@lru_cache(maxsize=1)
def _pictures(location: str, group: int) -> list[bytes]:
    """The pictures of a row group, kept for the next rows: they come in its order. Raises DataFault."""
    try:
        with open_file(location) as opened:
            file = pq.ParquetFile(opened)
            if file.metadata.row_group(group).total_byte_size > MAX_GROUP:
                raise ValueError(f"row group {group} has more than {MAX_GROUP} bytes")
            images = file.read_row_group(group, ["image"])["image"].to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataFault("path", f"{location} can't be read: {error}") from None
    return [image.get("bytes") or b"" if isinstance(image, dict) else b"" for image in images]
