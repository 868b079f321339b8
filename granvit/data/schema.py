"""The columns of a Gran dataset, and how one of its rows becomes a checked `Sample`.

A Gran dataset is a Hugging Face `datasets` dataset with the columns of `FEATURES`. Nothing here trusts a row:
whatever is wrong with it is a `DataFault` that says what and, where the caller wants to go on, which part was
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Features, Image, Sequence, Value

from granvit.questions.pictures import MAX_PIXELS, check_shape, decode_smaller
from granvit.questions.schema import KINDS, Conversation, DataFault, Region, Sample

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
user's (`role` "user") and the assistant's ("assistant") by turns. A row of these may have no picture: image, width and
height are null then, and so are caption and regions."""

BOX_TOLERANCE = 1e-3
"""A box may leave [0, 1] by this much (rounding of other people's converters) and is cut to the image."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def parse_row(
    row: Mapping[str, Any],
    drop: Callable[[DataFault], None] | None = None,
    max_pixels: int = MAX_PIXELS,
    decode: bool = True,
    divisor: Callable[[Sample], int] | None = None,
) -> Sample:
    """A row of a Gran dataset as a `Sample`; its `image` is decoded by `datasets` or {"bytes", "path"}.

    Without `drop`, the first fault is raised. With it, faults of single regions and conversations are handed to `drop`,
    those are left out, and only what makes the whole row useless is raised. Without `decode`, the picture
    is not looked at, and the sample's image is a blank of the row's width and height, which must be possible. With it,
    the picture must have that width and height. divisor: tells of the sample with a blank by how much smaller it is
    decoded (`decode_smaller`). A row of conversations may lack picture, width and height: its sample's image has no
    pixels.

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
    if width is None and height is None and _no_picture(row.get("image")):
        if not conversations or regions or caption is not None:
            raise DataFault("size", "a row without picture, width and height takes conversations, and nothing else")
        image = torch.zeros(0, 0, 3, dtype=torch.uint8)
    elif not all(isinstance(side, int) and side >= 1 for side in (width, height)):
        raise DataFault("size", f"width and height must be integers >= 1, got {width!r} and {height!r}")
    else:
        check_shape(width, height, max_pixels)
        image = torch.zeros((), dtype=torch.uint8).expand(height, width, 3)
    sample = Sample(
        id=row_id,
        image=image,
        caption=caption,
        regions=tuple(regions),
        source=row.get("source") or "",
        licence=row.get("licence") or "",
        conversations=tuple(conversations),
    )
    if not decode or not image.numel():
        return sample
    picture, size = decode_smaller(row.get("image"), 1 if divisor is None else divisor(sample), max_pixels)
    check_size(width, height, size)
    return replace(sample, image=torch.from_numpy(np.array(picture)))


def _no_picture(image: Any) -> bool:
    return image is None or (isinstance(image, Mapping) and not any(image.get(key) for key in ("bytes", "path")))


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


def check_size(width: int, height: int, size: tuple[int, int]) -> None:
    """Raises DataFault of kind `size` unless the picture's size is this width and height."""
    if (width, height) != size:
        given, real = f"{width}x{height}", "{}x{}".format(*size)
        raise DataFault("size", f"width and height are {given}, the image is {real} as EXIF turns it")


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
