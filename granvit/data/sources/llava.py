"""LLaVA's conversations: a JSON list of {"id", "image", "conversations": [{"from": "human" or "gpt", "value"}, ...]}.

What tools that write the format call these is read too: "images" (a list), "messages", "role" and "content", "user" and
"assistant".

A picture is named by many items, one a conversation: they become one row, whose picture is then encoded once for all of
them. An item without a picture becomes a row of its own. Items are joined in SQLite, on disk, since there are millions.
"""

from __future__ import annotations

import json
import posixpath
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief  # of an item nested deeply too
from typing import Any

from tyro.conf import Positional

from granvit.data.files import is_remote, local
from granvit.data.records import Notes, Record
from granvit.data.schema import CHAT_FEATURES, conversation_turns, is_unicode, parse_conversation
from granvit.data.sources.rows import FolderSource, picture_row
from granvit.data.sources.stream import elements
from granvit.questions.prompts import IMAGE
from granvit.questions.schema import DataFault

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

# Pictures that other converters know by these ids, where they lie as LLaVA's own lists have it.
_ELSEWHERE = (
    ("coco", re.compile(r"(?:^|/)(?:train|val|test)20\d\d/(?:COCO_\w+_)?0*(\d+)\.jpg$")),
    ("vg", re.compile(r"(?:^|/)(?:VG_100K(?:_2)?|gqa/images)/(\d+)\.jpg$")),
)


@dataclass(frozen=True)
class Llava(FolderSource):
    """Conversations in LLaVA's JSON, for the stage sft. The picture always comes first: "<image>" is taken out."""

    annotations: Positional[str]
    """FILE or URL of the JSON list."""
    images: str
    """Folder or URL that the items' image paths are relative to."""
    name: str = "llava"
    """What ids (NAME/IMAGE PATH) and `source` say."""
    licence: str = ""
    """Noted in every row."""

    features = CHAT_FEATURES

    def inputs(self) -> list[str]:
        return [self.annotations, *local(self.images)]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        with closing(sqlite3.connect(scratch / "items.sqlite")) as database:
            database.execute("PRAGMA synchronous = OFF")
            database.execute("CREATE TABLE items (n INTEGER PRIMARY KEY, image TEXT, turns TEXT)")
            for index, (_, item) in enumerate(elements(self.annotations)):
                try:
                    values = (index, _image(item), json.dumps(_turns(item)))
                    database.execute("INSERT INTO items VALUES (?, ?, ?)", values)
                except DataFault as fault:
                    notes.unreadable(f"{self.annotations}[{index}]", fault)
            database.execute("CREATE INDEX by_image ON items (image, n)")
            apart = "CASE WHEN image IS NULL THEN n END"
            rows = database.execute(f"SELECT image, min(n) AS first FROM items GROUP BY image, {apart} ORDER BY first")
            for image, first in rows:
                if image is None:
                    (turns,) = database.execute("SELECT turns FROM items WHERE n = ?", (first,)).fetchone()
                    data = {"image": None, "conversations": [json.loads(turns)]}
                    yield Record(f"{self.name}/text/{first}", f"{self.annotations}[{first}]", data)
                    continue
                conversations = database.execute("SELECT turns FROM items WHERE image = ? ORDER BY n", (image,))
                data = {"image": image, "conversations": [json.loads(turns) for (turns,) in conversations]}
                aliases = tuple(f"{name}/{match[1]}" for name, known in _ELSEWHERE if (match := known.search(image)))
                yield Record(f"{self.name}/{image}", f"{self.annotations}[{first}]", data, aliases)

    def row(self, record: Record, notes: Notes) -> dict[str, Any]:
        image, conversations = record.data["image"], record.data["conversations"]
        told = {"source": self.name, "licence": self.licence, "conversations": conversations}
        if image is None:
            return {"id": record.id, **dict.fromkeys(("image", "width", "height", "caption")), "regions": [], **told}
        content = self.read_image(self.images, image)
        return picture_row(record, content, image, (), notes, **told)


def _image(item: Any) -> str | None:
    """The path of an item's only image, None where it has none."""
    image = _either(item, "image", "images") if isinstance(item, dict) else 0
    if image in (None, "", []):
        return None
    if isinstance(image, list):
        if len(image) > 1:
            raise DataFault("images", f"has {len(image)} images; a conversation about one is accepted")
        [image] = image
    if isinstance(image, dict):  # as `datasets` writes pictures
        image = image.get("path")
    if not isinstance(image, str) or not image or not is_unicode(image):
        raise DataFault("path", f"image must be a path relative to the folder, got {brief(item)}")
    return image if is_remote(image) else posixpath.normpath(image.replace("\\", "/"))


def _turns(item: dict[str, Any]) -> list[dict[str, str]]:
    """An item's conversation as the schema has it."""
    listed = _either(item, "conversations", "messages")
    if not isinstance(listed, list) or not all(isinstance(turn, dict) for turn in listed):
        raise DataFault("conversations", f"conversations must be a list of objects, got {brief(listed)}")
    turns, marked = [], 0
    for turn in listed:
        role, text = _either(turn, "from", "role"), _text(_either(turn, "value", "content"))
        if not isinstance(text, str):
            raise DataFault("conversation_text", f"value must be a string, got {brief(text)}")
        # A role that is none stays, to be named in the fault; it may be anything that JSON holds.
        role = ROLES.get(role.lower(), role) if isinstance(role, str) else brief(role)
        if role == "user":
            marked += text.count(IMAGE)
            text = text.replace(IMAGE, "").strip()
        turns.append({"role": role, "content": text})
    if marked and _image(item) is None:
        raise DataFault("images", f"says {IMAGE}, but names none")
    if marked > 1:
        raise DataFault("images", f"says {IMAGE} {marked} times; a conversation about one is accepted")
    return conversation_turns(parse_conversation(turns))


def _text(content: Any) -> Any:
    """What a turn says; of parts, as chat templates take them, {"type": "image"} is the marker."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [IMAGE if part.get("type") == "image" else part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def _either(item: dict[str, Any], name: str, other: str) -> Any:
    """The value under a key of LLaVA's, or under the one that other tools write."""
    return item[name] if item.get(name) is not None else item.get(other)
