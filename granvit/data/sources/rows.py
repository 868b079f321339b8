"""From a picture and boxes in pixels to a checked row: what every converter ends with."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from granvit.data.files import list_files, read_image
from granvit.data.records import Notes, Record, Source
from granvit.data.schema import is_number, is_unicode, parse_region
from granvit.questions.pictures import decode_image
from granvit.questions.schema import DataFault

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderSource(Source):
    """A source whose files lie in folders that the user names, and are named by annotations or found by listing."""

    follow_links: bool = field(default=False, kw_only=True)
    """Follow links inside of the folders, out of them too (data sets of DVC, git-annex and the hub's cache are links).
    Without it, a link to a folder is not listed, and a file whose link leads out is a fault."""

    def named_files(self, folder: str, suffixes: tuple[str, ...], notes: Notes) -> Iterator[tuple[str, str]]:
        """(name, what a fault calls it) of each file of these endings in the folder and below. One whose name is no
        Unicode is noted, and links to folders that are not followed are counted and named."""
        links: list[str] = []
        for name in list_files(folder, suffixes, self.follow_links, links.append):
            shown = f"{folder}/{name}"
            if is_unicode(name):
                yield name, shown
            else:
                notes.unreadable(ascii(shown), DataFault("path", "the file's name is no Unicode"))
        notes.drop("link to a folder (--follow-links reads it)", len(links))
        for name in links[:10]:
            log.warning("%s/%s is a link to a folder and was not read: --follow-links does", folder, ascii(name)[1:-1])

    def read_image(self, folder: str, name: str) -> bytes:
        """As files.read_image, following links where the user wants it."""
        return read_image(folder, name, self.follow_links)


@dataclass(frozen=True)
class PixelBox:
    """xyxy in pixels of the picture as annotated, x2 and y2 exclusive: a box of one pixel has x2 = x1 + 1.

    cut: it may reach beyond the picture and is cut to it. Without, more than a pixel of overhang is a fault, since it
    mostly means another size or another convention than was thought.
    """

    box: tuple[float, float, float, float]
    caption: str
    kind: str = "natural"
    score: float | None = None
    cut: bool = False

    @classmethod
    def xywh(cls, box: Any, caption: str, kind: str = "natural", cut: bool = False) -> PixelBox:
        """From a list [x, y, width, height]. Raises DataFault for anything else; a string is what stood there."""
        if not is_box(box):
            shown = box if isinstance(box, str) else repr(box)
            raise DataFault("box", f"box must be 4 numbers [x, y, width, height] in pixels, got {shown:.80}")
        x, y, width, height = map(float, box)
        return cls((x, y, x + width, y + height), caption, kind, cut=cut)


def is_box(value: Any) -> bool:
    """Whether it is a list of 4 finite numbers."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_set(flag: Any) -> bool:
    """Whether a yes or no is yes, however a tool writes it: 1, 1.0, true, "1", "True"."""
    return flag == 1 or (isinstance(flag, str) and flag.strip().lower() in ("1", "1.0", "true"))


def parse_json(content: bytes) -> Any:
    """What a small JSON file or a line holds; a byte order mark before it is read over. Raises DataFault of kind
    `json`: not JSON in UTF-8, nested too deeply, NaN or Infinity in it, a key that is repeated."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise (error if isinstance(error, DataFault) else DataFault("json", f"not JSON in UTF-8: {error}")) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DataFault("json", f"repeated key {key!r:.80}")
    return data


def _constant(name: str) -> float:
    raise DataFault("json", f"{name} is no JSON number")


def picture_row(
    record: Record,
    content: bytes,
    name: str,
    boxes: Iterable[PixelBox],
    notes: Notes,
    size: Sequence[float | None] | None = None,
    caption: str | None = None,
    source: str = "",
    licence: str = "",
    conversations: Sequence[list[dict[str, str]]] = (),
) -> dict[str, Any]:
    """A row of the schema; boxes become relative, and those that leave the picture by a pixel or less are cut to it.

    content, name: the encoded picture and its file's name. size: (width, height) that the boxes were drawn on; None, or
    a side that is None or 0, where the annotation does not tell. Faults of single boxes are noted. Raises DataFault:
    the picture's own (`decode_image`), `size` where it has not the annotated size as EXIF turns it, `empty_row`.
    """
    picture = decode_image(content)
    if size is not None and not any(side in (None, 0) for side in size) and tuple(size) != picture.size:
        raise DataFault("size", "annotated as {}x{}, the image is {}x{} as EXIF turns it".format(*size, *picture.size))
    regions = []
    for index, given in enumerate(boxes):
        try:
            regions.append(_region(given, *picture.size))
        except DataFault as fault:
            notes.fault(record, DataFault(fault.kind, f"box {index}: {fault}"))
    if not regions and caption is None and not conversations:
        raise DataFault("empty_row", "neither a caption nor a usable region")
    row = {
        "id": record.id,
        "image": {"bytes": content, "path": name.rpartition("/")[2]},
        "width": picture.width,
        "height": picture.height,
        "caption": caption,
        "regions": regions,
        "source": source,
        "licence": licence,
    }
    return row | {"conversations": list(conversations)} if conversations else row


def _region(given: PixelBox, width: int, height: int) -> dict[str, Any]:
    sides = (width, height, width, height)
    # Up to a pixel of overhang is rounding; more is a fault, which parse_region names.
    box = [min(max(v, 0.0), s) if given.cut or -1 <= v <= s + 1 else v for v, s in zip(given.box, sides, strict=True)]
    relative = [v / s for v, s in zip(box, sides, strict=True)]
    caption = " ".join(given.caption.split()) if isinstance(given.caption, str) else given.caption
    entry = {"box": relative, "caption": caption, "kind": given.kind, "score": given.score}
    return parse_region(entry).fields()
