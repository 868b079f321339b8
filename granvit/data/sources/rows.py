"""From a picture and boxes in pixels to a checked row: what every converter ends with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from granvit.data.schema import DataFault, decode_image, parse_region
from granvit.data.shards import Notes, Record


@dataclass(frozen=True)
class PixelBox:
    """xyxy in pixels of the picture as annotated, x2 and y2 exclusive: a box of one pixel has x2 = x1 + 1."""

    box: tuple[float, float, float, float]
    caption: str
    kind: str = "natural"
    score: float | None = None

    @classmethod
    def xywh(cls, box: Any, caption: str, kind: str = "natural") -> PixelBox:
        """From a list [x, y, width, height]. Raises DataFault for anything else."""
        if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, (int, float)) for side in box):
            raise DataFault("box", f"box must be 4 numbers [x, y, width, height] in pixels, got {box!r:.80}")
        x, y, width, height = map(float, box)
        return cls((x, y, x + width, y + height), caption, kind)


def picture_row(
    record: Record,
    content: bytes,
    name: str,
    boxes: Iterable[PixelBox],
    notes: Notes,
    size: tuple[int, int] | None = None,
    caption: str | None = None,
    source: str = "",
    licence: str = "",
) -> dict[str, Any]:
    """A row of the schema; boxes become relative, and those that leave the picture by less than a pixel are cut to it.

    content, name: the encoded picture and its file's name. size: (width, height) that the boxes were drawn on, None
    where the annotation does not tell. Faults of single boxes are noted. Raises DataFault: the picture's own
    (`decode_image`), `size` where it has not the annotated size as EXIF turns it, `empty_row`.
    """
    picture = decode_image(content)
    if size is not None and tuple(size) != picture.size:
        raise DataFault("size", "annotated as {}x{}, the image is {}x{} as EXIF turns it".format(*size, *picture.size))
    regions = []
    for index, one in enumerate(boxes):
        try:
            regions.append(_region(one, *picture.size))
        except DataFault as fault:
            notes.fault(record, DataFault(fault.kind, f"box {index}: {fault}"))
    if not regions and caption is None:
        raise DataFault("empty_row", "neither a caption nor a usable region")
    return {
        "id": record.id,
        "image": {"bytes": content, "path": name.rpartition("/")[2]},
        "width": picture.width,
        "height": picture.height,
        "caption": caption,
        "regions": regions,
        "source": source,
        "licence": licence,
    }


def _region(one: PixelBox, width: int, height: int) -> dict[str, Any]:
    sides = (width, height, width, height)
    # Up to a pixel of overhang is rounding; more is a fault, which parse_region names.
    box = [min(max(v, 0.0), s) if -1 <= v <= s + 1 else v for v, s in zip(one.box, sides, strict=True)]
    relative = [v / s for v, s in zip(box, sides, strict=True)]
    caption = " ".join(one.caption.split()) if isinstance(one.caption, str) else one.caption
    entry = {"box": relative, "caption": caption, "kind": one.kind, "score": one.score}
    return parse_region(entry).fields()
