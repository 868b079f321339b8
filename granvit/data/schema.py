"""The schema of a Gran dataset, and how one of its rows becomes a checked `Sample`.

A Gran dataset is a Hugging Face `datasets` dataset with the columns of `FEATURES`. Nothing here trusts a row:
whatever is wrong with it is a `DataFault` that says what and, where the caller wants to go on, which part was
left out.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Features, Image, Sequence, Value
from PIL import ExifTags, UnidentifiedImageError
from PIL import Image as PILImage

if TYPE_CHECKING:
    import torch

PILImage.init()  # else open(formats=...) knows only the five most common ones

KINDS = ("natural", "ocr")

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "width": Value("int32"),
        "height": Value("int32"),
        "caption": Value("string"),
        "regions": [
            {
                "box": Sequence(Value("float32"), length=4),
                "caption": Value("string"),
                "kind": Value("string"),
                "score": Value("float32"),
            }
        ],
        "source": Value("string"),
        "licence": Value("string"),
    }
)

CHAT_FEATURES = Features({**FEATURES, "conversations": [[{"role": Value("string"), "content": Value("string")}]]})
"""The columns with the optional one, for training on chat: conversations about the picture, each a list of turns, the
user's (`role` "user") and the assistant's ("assistant") by turns."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""The image formats that are read; Pillow's other decoders see no use and much hostile input."""

MAX_PIXELS = 64_000_000
"""Images with more pixels than this are refused before they are decoded (decompression bombs)."""

MIN_SIDE, MAX_ASPECT = 4, 100.0
"""An image with a shorter side, or a longer one against its short side, shows nothing and breaks patch
grids."""

BOX_TOLERANCE = 1e-3
"""A box may leave [0, 1] by this much (rounding of other people's converters) and is cut to the image."""

_TURNS = {
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}
"""What turns an image upright, by its EXIF orientation."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class DataFault(ValueError):
    """Something in a row that can't be used. `kind` is a short name that faults are counted under. Of a message, which
    may quote what is wrong, 500 characters are kept."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message if len(message) <= 500 else f"{message[:500]} …")
        self.kind = kind

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # by default it would be made of its message alone
        return type(self), (self.kind, str(self))


@dataclass(frozen=True)
class Region:
    """A box, relative xyxy after EXIF orientation, with the sentence or text that belongs to it."""

    box: tuple[float, float, float, float]
    caption: str
    kind: str
    score: float | None = None

    def fields(self) -> dict[str, Any]:
        """The region as an entry of a row's `regions`."""
        return {"box": list(self.box), "caption": self.caption, "kind": self.kind, "score": self.score}


Conversation = tuple[tuple[str, str], ...]
"""What the user says and what the assistant answers, turn by turn."""


@dataclass(frozen=True)
class Sample:
    """A checked row. `image` is uint8 [H, W, 3], oriented as EXIF says."""

    id: str
    image: torch.Tensor
    caption: str | None
    regions: tuple[Region, ...]
    source: str
    licence: str
    conversations: tuple[Conversation, ...] = ()


def parse_row(
    row: Mapping[str, Any],
    drop: Callable[[DataFault], None] | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
) -> Sample:
    """A row of a Gran dataset as a `Sample`; its `image` is decoded by `datasets` or {"bytes", "path"}.

    Without `drop`, the first fault is raised. With it, faults of single regions and conversations are handed to `drop`,
    those are left out, and only what makes the whole row useless is raised. Without `decode`, the picture
    is not looked at, and the sample's image is a blank of the row's width and height, which must be possible. With it,
    the picture must have that width and height.

    Raises DataFault of kind `id`, `caption`, `regions`, `conversations`, `empty_row`, `source`, `licence`, `size` or of
    `decode_image`, `parse_region` or `parse_conversation`.
    """
    import torch

    row_id = row.get("id")
    if not isinstance(row_id, str) or not row_id or not is_unicode(row_id):
        raise DataFault("id", f"id must be a non-empty string of Unicode, got {row_id!r}")
    caption = row.get("caption")
    if caption is not None and not _is_text(caption):
        raise DataFault("caption", f"caption must be null or a string with text in it (Unicode), got {caption!r}")
    regions = _parse_each(row, "regions", parse_region, drop)
    conversations = _parse_each(row, "conversations", parse_conversation, drop)
    if not regions and caption is None and not conversations:
        raise DataFault("empty_row", "neither a caption nor a usable region or conversation")
    for name in ("source", "licence"):
        if not isinstance(row.get(name) or "", str):
            raise DataFault(name, f"{name} must be null or a string, got {row[name]!r:.80}")
    width, height = row.get("width"), row.get("height")
    if not all(isinstance(side, int) and side >= 1 for side in (width, height)):
        raise DataFault("size", f"width and height must be integers >= 1, got {width!r} and {height!r}")
    if decode:
        picture = decode_image(row.get("image"), max_pixels)
        check_size(width, height, picture)
        image = torch.from_numpy(np.array(picture))
    else:
        _check_shape(width, height, max_pixels)
        image = torch.zeros((), dtype=torch.uint8).expand(height, width, 3)
    return Sample(
        id=row_id,
        image=image,
        caption=caption,
        regions=tuple(regions),
        source=row.get("source") or "",
        licence=row.get("licence") or "",
        conversations=tuple(conversations),
    )


def _parse_each(
    row: Mapping[str, Any], column: str, parse: Callable[[Any], Any], drop: Callable[[DataFault], None] | None
) -> list[Any]:
    """The entries of a column's list, parsed; faults name their place, and are handed to `drop` where there is one."""
    listed = row.get(column) or []
    if not isinstance(listed, list):
        raise DataFault(column, f"{column} must be a list, got {type(listed).__name__}")
    parsed = []
    for index, entry in enumerate(listed):
        try:
            parsed.append(parse(entry))
        except DataFault as fault:
            named = DataFault(fault.kind, f"{column}[{index}]: {fault}")
            if drop is None:
                raise named from None
            drop(named)
    return parsed


def good_or_none(
    read: Callable[[Callable[[DataFault], None]], Sample], note: Callable[[DataFault], None]
) -> Sample | None:
    """The sample that `read(note)` returns (see `parse_row`), None where it raises a DataFault, which is noted too."""
    try:
        return read(note)
    except DataFault as fault:
        note(fault)
        return None


def parse_region(region: Mapping[str, Any]) -> Region:
    """One entry of `regions`, checked.

    Raises DataFault of kind `regions` (no such structure), `box` (not 4 finite numbers, outside the image,
    inverted, no area), `region_caption`, `region_kind` or `region_score`.
    """
    if not isinstance(region, Mapping):
        raise DataFault("regions", f"a region must have named fields, got {region!r:.80}")
    box = region.get("box")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(is_number(side) for side in box):
        raise DataFault("box", f"box must be 4 finite numbers [x1, y1, x2, y2], got {box!r}")
    if min(box) < -BOX_TOLERANCE or max(box) > 1 + BOX_TOLERANCE:
        raise DataFault("box", f"box must lie in [0, 1], relative to the image, got {list(box)}")
    x1, y1, x2, y2 = (min(max(float(side), 0.0), 1.0) for side in box)
    if np.float32(x1) >= np.float32(x2) or np.float32(y1) >= np.float32(y2):  # a dataset stores float32
        raise DataFault("box", f"box must have x1 < x2 and y1 < y2, in float32 too, got {list(box)}")
    caption = region.get("caption")
    if not _is_text(caption):
        raise DataFault("region_caption", f"caption must be a string with text in it (Unicode), got {caption!r}")
    kind = region.get("kind")
    if kind not in KINDS:
        raise DataFault("region_kind", f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    score = region.get("score")
    if score is not None and not is_number(score):
        raise DataFault("region_score", f"score must be null or a finite number, got {score!r}")
    return Region((x1, y1, x2, y2), caption, kind, None if score is None else float(score))


def parse_conversation(turns: Any) -> Conversation:
    """One entry of `conversations`, checked.

    Raises DataFault of kind `conversations` (no such structure), `conversation_roles` (not user and assistant by turns,
    from a user's turn to an assistant's) or `conversation_text` (a turn says nothing).
    """
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataFault("conversations", f"a conversation must be a list of turns of named fields, got {turns!r:.80}")
    roles = [turn.get("role") for turn in turns]
    if not roles or len(roles) % 2 or roles != ["user", "assistant"] * (len(roles) // 2):
        told = f"{roles[:6]!r:.80}{' …' if len(roles) > 6 else ''}"
        raise DataFault("conversation_roles", f"roles must be user, assistant by turns to an assistant's, got {told}")
    for number, turn in enumerate(turns):
        if not _is_text(turn.get("content")):
            told = f"turn {number}: content must be a string with text in it (Unicode), got {turn.get('content')!r:.80}"
            raise DataFault("conversation_text", told)
    return tuple((turn["content"], answer["content"]) for turn, answer in zip(turns[::2], turns[1::2], strict=True))


def conversation_turns(conversation: Conversation) -> list[dict[str, str]]:
    """A conversation as an entry of a row's `conversations`."""
    return [
        {"role": role, "content": text}
        for turn in conversation
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def check_size(width: int, height: int, picture: PILImage.Image) -> None:
    """Raises DataFault of kind `size` unless the decoded picture has this width and height."""
    if (width, height) != picture.size:
        given, real = f"{width}x{height}", "{}x{}".format(*picture.size)
        raise DataFault("size", f"width and height are {given}, the image is {real} as EXIF turns it")


def decode_image(image: Any, max_pixels: int = MAX_PIXELS) -> PILImage.Image:
    """An encoded image ({"bytes", "path"} or bytes) or a PIL image as an RGB PIL image, oriented as EXIF
    says.

    Transparency is laid on white; 16-bit images are scaled to 8 bits. Raises DataFault of kind `image`
    (missing, of a format not in `FORMATS`, broken or truncated), `image_pixels` or `image_shape`.
    """
    if isinstance(image, PILImage.Image):
        opened = image
    else:
        try:
            opened = PILImage.open(_image_file(image), formats=FORMATS)
        except UnidentifiedImageError:  # its own text holds an address in memory
            raise DataFault("image", f"not an image in one of the formats {', '.join(FORMATS)}") from None
        except (OSError, ValueError, SyntaxError, PILImage.DecompressionBombError) as error:
            raise DataFault("image", f"can't be opened: {error}") from None
    _check_shape(*opened.size, max_pixels)
    try:
        opened.load()  # a TIFF is turned by this, and then has no orientation any more
        # ImageOps.exif_transpose writes all of EXIF anew too, and fails where any other tag of it is damaged.
        turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation))
        return _to_rgb(opened if turn is None else opened.transpose(turn))
    # Pillow's decoders raise these and more on hostile files; one bad file must not end a run.
    except (
        OSError,
        ValueError,
        SyntaxError,
        TypeError,
        IndexError,
        KeyError,
        OverflowError,
        EOFError,
        struct.error,
    ) as error:
        raise DataFault("image", f"can't be decoded: {error}") from None


def _check_shape(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataFault("image_pixels", f"{width}x{height} is more than the limit of {max_pixels} pixels")
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise DataFault(
            "image_shape", f"{width}x{height}: sides must be >= {MIN_SIDE} and their ratio <= {MAX_ASPECT:g}"
        )


def _image_file(image: Any) -> io.BytesIO | str:
    if isinstance(image, bytes):
        return io.BytesIO(image)
    if isinstance(image, Mapping):
        if image.get("bytes") and isinstance(image["bytes"], bytes):
            return io.BytesIO(image["bytes"])
        if image.get("path") and isinstance(image["path"], str):
            if not os.path.isfile(image["path"]):  # to open a FIFO or a device could take for ever
                raise DataFault("image", f"path must be that of a regular file, got {image['path']!r}")
            return image["path"]
    raise DataFault("image", f"image must be encoded bytes or a path, got {type(image).__name__} without either")


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode == "F":
        raise DataFault("image", "floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16-bit greys; Pillow's own conversion to 8 bits clips instead of scaling
        grey = np.asarray(image).astype(np.float64)
        if grey.min() < 0 or grey.max() > 65535:
            raise DataFault("image", "grey values outside 16 bits have no known range")
        return PILImage.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, (255, 255, 255, 255))
        return PILImage.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def is_number(value: Any) -> bool:
    """Whether it is a number that is finite in float32, as which it is stored. NaN compares as False."""
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool) and abs(value) <= _FLOAT32_MAX


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def is_unicode(text: str) -> bool:
    """False for half of a surrogate pair, which JSON can write as "\\ud800" and UTF-8, in Arrow, can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
