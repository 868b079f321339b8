"""JSONL in, Gran dataset out: one line an image. `Jsonl` has the format.

The schema is strict: an unknown or missing key, a wrong type and a repeated key are faults, like whatever
`granvit.data.schema` rejects.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tyro.conf import Positional

from granvit.data.files import open_file, parent
from granvit.data.records import Notes, Record
from granvit.data.schema import check_size, is_unicode, parse_region
from granvit.data.sources.rows import FolderSource, parse_json
from granvit.questions.pictures import decode_image
from granvit.questions.schema import DataFault

_KEYS = {  # key: (types, what a fault says is accepted)
    "image": ((str,), "a path relative to the file"),
    "width": ((int,), "an integer"),
    "height": ((int,), "an integer"),
    "caption": ((str,), "a string or null"),
    "regions": ((list,), "a list of objects"),
    "source": ((str,), "a string"),
    "licence": ((str,), "a string"),
    "id": ((str,), "a string"),
}
_OPTIONAL = {"id", "width", "height", "caption", "regions", "source", "licence"}
_REGION_KEYS = {"box", "caption", "kind", "score"}

MAX_LINE = 10_000_000  # bytes


@dataclass(frozen=True)
class Jsonl(FolderSource):
    """JSONL, a JSON object a line, one line an image:

    {"image": "photos/1.jpg", "regions": [{"box": [0.1, 0.2, 0.5, 0.9], "caption": "a red kite", "kind": "natural"}]}

    image: the picture's path, relative to the file. regions: box is [x1, y1, x2, y2] relative to the picture as EXIF
    turns it, each in [0, 1]; kind is "natural", or "ocr" for text, whose caption is what it says; a "score" may be
    added. Optional, and null where unknown: caption (of the whole picture), id (the path without it), source, licence,
    width and height in pixels (checked). A line without regions needs a caption.
    """

    file: Positional[str]
    """FILE or URL; images lie in its folder or below."""

    unit = "line"

    def inputs(self) -> list[str]:
        return [self.file]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        with open_file(self.file) as file:
            for number, line in enumerate(_lines(file), 1):
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                name = f"{self.file}:{number}"
                try:
                    data = _parse(line)
                except DataFault as fault:
                    notes.unreadable(name, fault)
                    continue
                yield Record(data.get("id", data["image"]), name, data)

    def row(self, record: Record, notes: Notes) -> dict[str, Any]:
        data = record.data
        regions = []
        for index, region in enumerate(data.get("regions", [])):
            try:
                regions.append(_region(region))
            except DataFault as fault:
                notes.fault(record, DataFault(fault.kind, f"regions[{index}]: {fault}"))
        if not regions and data.get("caption") is None:
            raise DataFault("empty_row", "neither a caption nor a usable region")
        content = self.read_image(parent(self.file), data["image"])
        picture = decode_image(content)
        width, height = data.get("width", picture.width), data.get("height", picture.height)
        check_size(width, height, picture.size)
        return {
            "id": record.id,
            "image": {"bytes": content, "path": data["image"].rpartition("/")[2]},
            "width": width,
            "height": height,
            "caption": data.get("caption"),
            "regions": regions,
            "source": data.get("source", ""),
            "licence": data.get("licence", ""),
        }


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    """The lines; of one of more than MAX_LINE bytes, so many and one more."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _parse(line: bytes) -> dict[str, Any]:
    """A line's object, checked but for its regions and its picture."""
    if len(line) > MAX_LINE:
        raise DataFault("json", f"a line has more than the limit of {MAX_LINE} bytes")
    data = parse_json(line)
    if not isinstance(data, dict):
        raise DataFault("json", f"a line must be an object, got {type(data).__name__}")
    data = {key: value for key, value in data.items() if value is not None or key not in _OPTIONAL}
    _check_keys(data, _KEYS, _OPTIONAL)
    for key, (types, accepted) in _KEYS.items():
        if key in data and (not isinstance(data[key], types) or isinstance(data[key], bool)):
            raise DataFault("type", f"{key} must be {accepted}, got {data[key]!r:.80}")
        if isinstance(data.get(key), str) and not is_unicode(data[key]):
            raise DataFault("type", f"{key} must be {accepted} of Unicode, got {data[key]!r:.80}")
    if data.get("caption") is not None and not data["caption"].strip():
        raise DataFault("caption", f"caption must be null or have text in it, got {data['caption']!r}")
    if not data.get("id", data["image"]):
        raise DataFault("id", "id must not be empty")
    return data


def _region(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise DataFault("type", f"a region must be an object, got {data!r:.80}")
    _check_keys(data, _REGION_KEYS, {"score"})
    if not isinstance(data["box"], list):
        raise DataFault("box", f"box must be a list [x1, y1, x2, y2], got {data['box']!r:.80}")
    return parse_region(data).fields()


def _check_keys(data: dict[str, Any], keys: Collection[str], optional: set[str]) -> None:
    missing, unknown = sorted(set(keys) - optional - set(data)), sorted(set(data) - set(keys))
    if missing:
        raise DataFault("missing_key", f"missing {', '.join(missing)}")
    if unknown:
        raise DataFault("unknown_key", f"unknown key {', '.join(map(repr, unknown))}; known: {', '.join(sorted(keys))}")
