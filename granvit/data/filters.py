"""A Source that is a Gran dataset without what the rules for training reject.

By default the paper's: short side of the picture, aspect of picture and boxes, area of boxes, at least one box. Every
other rule is off until its flag is given. A region is counted under the first rule that rejects it. The rules
themselves: `granvit.data.rules`.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Features
from tyro.conf import Positional

from granvit.data.files import MAX_BYTES, join, list_files
from granvit.data.loader import open_rows
from granvit.data.measures import normalised
from granvit.data.records import Notes, Record, Source
from granvit.data.rules import CHOICES, IMAGE_RULES, REGION_RULES, in_script, known_scripts
from granvit.data.schema import CHAT_FEATURES, FEATURES, check_size, conversation_turns, parse_row
from granvit.questions.pictures import decode_image
from granvit.questions.schema import DataFault, Region, Sample

BUCKETS = 2**22
"""Counters of the first pass over captions: 16 MiB, whatever the dataset's size."""


@dataclass(frozen=True)
class Filter(Source):
    """A Gran dataset without what the rules reject. Raises ValueError for limits that make no sense."""

    data: Positional[str]
    """A Gran dataset: a folder of Arrow or Parquet files."""
    split: str = "train"
    """Which split is read; the one that is written has its name."""
    short_side: float = 448
    """Pixels: a picture's short side must be longer. 0: any."""
    image_aspect: float = 3
    """The most that a picture's long side measures against its short one. inf: any."""
    box_aspect: float = 3
    """The same for boxes, in pixels."""
    box_area: float = 100**2
    """Square pixels: a box must be larger. 0: any."""
    text_side: float = 0
    """Pixels: the short side of a text's box must be longer; below 8 or so nobody can read it. 0: any."""
    ocr_boxes: bool = False
    """Hold boxes of text to box_aspect and box_area as well."""
    min_regions: int = 1
    """As many regions must be left in a picture; with 0 its caption or a conversation alone is enough."""
    same_box: float = 1
    """Two boxes of a kind in a picture are one where their IoU is above this: the better score stays, else the first.
    1: never."""
    repeats_in_image: int | None = None
    """As many regions of a picture may share a caption (but for case and punctuation): the best scores stay, else the
    first."""
    repeats: int | None = None
    """A caption that more regions of the dataset have than this is a stock phrase, and all of them go."""
    scripts: tuple[str, ...] = ()
    """Scripts that captions are written in, by the first word of their letters' Unicode names: LATIN CJK ..."""
    script_share: float = 0.9
    """The least share of a caption's letters, where it has any, that must belong to `scripts`."""
    min_words: int = 0
    """Words that a region's caption must have; of scripts without spaces, characters."""
    max_words: int | None = None
    max_characters: int | None = None
    """Characters that a region's caption may have; of texts, too."""
    unique_pictures: bool = False
    """Of files that are equal byte by byte the first stays. Files that only look alike: `granvit.data.overlap`."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("short_side", 0, math.inf), ("image_aspect", 1, math.inf), ("box_aspect", 1, math.inf),
            ("box_area", 0, math.inf), ("text_side", 0, math.inf), ("same_box", 0, 1), ("script_share", 0, 1),
            ("min_regions", 0, math.inf), ("repeats_in_image", 1, math.inf), ("repeats", 1, math.inf),
            ("min_words", 0, math.inf), ("max_words", self.min_words, math.inf), ("max_characters", 1, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")
        if unknown := set(self.scripts) - (known_scripts() if self.scripts else set()):
            raise ValueError(
                f"scripts: got {', '.join(sorted(unknown))}; accepted are LATIN, CYRILLIC, CJK and the like"
            )

    @property
    def features(self) -> Features:
        chats = "conversations" in open_rows(self.data, self.split).column_names
        return CHAT_FEATURES if chats else FEATURES

    def inputs(self) -> list[str]:
        open_rows(self.data, self.split)
        if self.data.endswith(".parquet") and not os.path.isdir(self.data):
            return [self.data]
        names = list_files(self.data, (".parquet", ".arrow", "state.json", "dataset_dict.json"), follow_links=True)
        return [join(self.data, name) for name in names]

    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        dataset = open_rows(self.data, self.split)
        columns = ["id"] + ["regions"] * (self.repeats is not None) + ["image"] * self.unique_pictures
        stock = frozenset() if self.repeats is None else repeated(lambda: _captions(dataset), self.repeats)
        with closing(sqlite3.connect(scratch / "pictures.sqlite")) as seen:
            seen.execute("PRAGMA synchronous = OFF")
            seen.execute("CREATE TABLE pictures (digest BLOB PRIMARY KEY) WITHOUT ROWID")
            for number, row in enumerate(dataset.select_columns(columns)):
                name = f"{self.data}[{self.split}][{number}]"
                if not isinstance(row["id"], str):
                    notes.unreadable(name, DataFault("id", f"id must be a string, got {row['id']!r:.80}"))
                    continue
                known = sorted(stock.intersection(map(_digest, _region_captions(row)))) if stock else []
                yield Record(row["id"], name, [number, known, self.unique_pictures and not _is_new(seen, row["image"])])

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        """A record's row without what the rules reject, None where that is all of it."""
        number, stock, repeats_a_picture = record.data
        row = open_rows(self.data, self.split)[number]
        sample = parse_row(row, lambda fault: notes.fault(record, fault), decode=False)
        if not sample.image.numel() and not self.min_regions:  # conversations alone, which no other rule is about
            return row | {"image": None}
        size = (row["width"], row["height"])
        if repeats_a_picture:
            notes.drop("same picture image")
            return None
        if not sample.image.numel():
            notes.drop("too few regions image")
            return None
        if rule := next((name for name, keeps in IMAGE_RULES.items() if not keeps(self, *size)), None):
            notes.drop(f"{rule} image")
            return None
        regions = self.keep_regions(sample, size, notes, stock)
        if sample.caption is not None and not in_script(self, sample.caption):
            notes.drop("script image caption")
            sample = replace(sample, caption=None)
        if len(regions) < self.min_regions or not (regions or sample.caption or sample.conversations):
            notes.drop("too few regions image")
            return None
        content = _content(row["image"])
        check_size(*size, decode_image(content).size)
        return {
            "id": record.id,
            "image": {"bytes": content, "path": os.path.basename(str(row["image"].get("path") or "")) or None},
            "width": size[0],
            "height": size[1],
            "caption": sample.caption,
            "regions": [region.fields() for region in regions],
            "source": sample.source,
            "licence": sample.licence,
            "conversations": [conversation_turns(conversation) for conversation in sample.conversations],
        }

    def keep_regions(
        self, sample: Sample, size: tuple[int, int], notes: Notes, stock: Collection[str] = ()
    ) -> list[Region]:
        """The regions that the rules on regions keep, in their order; size: (width, height) in pixels; stock: digests
        of captions that are stock phrases."""
        kept = []
        for region in sample.regions:
            rule = next((name for name, keeps in REGION_RULES.items() if not keeps(self, region, *size)), None)
            if stock and region.kind != "ocr" and _digest(normalised(region.caption)) in stock:
                notes.drop("stock phrase region")
            elif rule:
                notes.drop(f"{rule} region")
            else:
                kept.append(region)
        for rule, keep in CHOICES.items():
            left = keep(self, kept)
            notes.drop(f"{rule} region", len(kept) - len(left))
            kept = left
        return kept


def repeated(texts: Callable[[], Iterable[str]], most: int) -> frozenset[str]:
    """Digests of the texts that occur more than `most` times. `texts` is called twice and gives the same both times.

    Exact, and bounded in memory: the first pass counts into BUCKETS of hashes, the second only what falls into a
    bucket with more than `most`, of which n texts fill at most n / most.
    """
    buckets = np.zeros(BUCKETS, np.uint32)
    for text in texts():
        buckets[_bucket(_digest(text))] += 1
    full = buckets > most
    counts = Counter(digest for text in texts() if full[_bucket(digest := _digest(text))])
    return frozenset(digest for digest, number in counts.items() if number > most)


def _captions(rows: datasets.Dataset) -> Iterator[str]:
    for row in rows.select_columns(["regions"]):
        yield from _region_captions(row)


def _region_captions(row: dict[str, Any]) -> Iterator[str]:
    """The regions' captions, normalised, without texts and what is no caption."""
    for region in row["regions"] or []:
        if isinstance(region, dict) and isinstance(region.get("caption"), str) and region.get("kind") != "ocr":
            yield normalised(region["caption"])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).hexdigest()


def _bucket(digest: str) -> int:
    return int(digest[:8], 16) % BUCKETS


def _is_new(seen: sqlite3.Connection, image: Any) -> bool:
    """Whether a picture's bytes have not been seen; one that can't be read is a fault, later."""
    try:
        digest = hashlib.blake2b(_content(image), digest_size=16).digest()
    except DataFault:
        return True
    return seen.execute("INSERT OR IGNORE INTO pictures VALUES (?)", (digest,)).rowcount > 0


def _content(image: Any) -> bytes:
    """The encoded bytes of an entry of the column `image`. Raises DataFault of kind `image`."""
    content, path = (image.get(key) for key in ("bytes", "path")) if isinstance(image, dict) else (None, None)
    if content and isinstance(content, bytes):
        return content
    if not isinstance(path, str) or not os.path.isfile(path):  # to open a FIFO or a device could take for ever
        raise DataFault("image", f"image must be encoded bytes or the path of a file, got path {path!r:.80}")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataFault("image", f"image {path!r:.80} can't be read: {error}") from None
    if len(content) > MAX_BYTES:
        raise DataFault("image", f"image {path!r:.80} has more than the limit of {MAX_BYTES} bytes")
    return content
