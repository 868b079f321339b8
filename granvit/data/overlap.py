"""Pictures that two datasets share: what must not be trained on, since it is tested on.

Found by id, and by a perceptual hash of 256 bits that survives another JPEG quality and size. Mirrored pictures and
crops are not found. Measured on the sample set (bench/overlap.py): JPEG of quality 30 changes at most 26 bits, half the
size at quality 50 20, other sizes 6; none of the 49,995,000 pairs of its 10,000 pictures is nearer than 32, none of
train and test nearer than 38.

Search compares every picture with every other, in blocks: O(N * M) for N and M pictures, and 32 bytes of memory a
picture. Beside hashing that is little where one side is a benchmark.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from granvit.data.loader import open_rows
from granvit.data.page import data_uri, render
from granvit.data.parallel import process_map, progress
from granvit.questions.pictures import decode_image
from granvit.questions.schema import DataFault

SIDE, LOW = 64, 16
"""Pixels a side of the grey picture that is hashed, and frequencies an axis that are kept."""
DISTANCE = 28
"""Bits, the default: above what the transformations change, below what tells pictures apart."""
FLAT = 1.0
"""A picture whose grey values have a smaller standard deviation shows nothing to compare."""
PAIRS = 100
"""As many are shown on a page."""
_CHUNK, _BLOCK = 128, (128, 2048)  # pictures a task of hashing; pictures of either side compared at a time: 2 MiB


def picture_hash(picture: Image.Image) -> np.ndarray | None:
    """The perceptual hash of a picture, uint64 [4]; None for one of a single grey.

    Which of the 16 x 16 lowest frequencies of the cosine transform of the grey picture, brought to 64 x 64 pixels,
    lie above their median (pHash, with more bits). The constant is left out: brightness does not count.
    """
    grey = np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR), dtype=np.float64)
    if grey.std() < FLAT:
        return None
    waves = np.cos(np.pi * np.arange(1, LOW + 1)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))
    amounts = waves @ grey @ waves.T
    return np.packbits(amounts > np.median(amounts)).view(np.uint64)


@dataclass(frozen=True)
class Hashes:
    """A split's pictures. ids: of all rows. codes: uint64 [N, 4], their hashes; known: bool [N], whether there is one.
    missing: why there is none, counted: "flat" or a fault's kind."""

    ids: list[str]
    codes: np.ndarray
    known: np.ndarray
    missing: Counter[str]


def hash_dataset(data: str | Path, split: str, workers: int | None = None) -> Hashes:
    """Hash every picture of a split; workers: processes (None: one a core, 0: this one). Raises what GranDataset
    raises."""
    rows = open_rows(str(data), split)
    chunks = [range(start, min(start + _CHUNK, len(rows))) for start in range(0, len(rows), _CHUNK)]
    with process_map(workers, len(chunks)) as run:
        results = list(progress(run(partial(_hash_rows, str(data), split), chunks), f"Hashing {split}", len(chunks)))
    codes = [code for chunk, _ in results for code in chunk]
    known = np.array([code is not None for code in codes], dtype=bool)
    blank = np.zeros(4, np.uint64)
    return Hashes(
        [str(name) for name in rows["id"]],
        np.array([blank if code is None else code for code in codes], np.uint64).reshape(-1, 4),
        known,
        sum((missing for _, missing in results), Counter()),
    )


def nearest(first: np.ndarray, second: np.ndarray | None, distance: int, threads: int | None = None) -> np.ndarray:
    """For each hash of `first` [N, 4] that has one of `second` [M, 4] within `distance` bits, the nearest: int64 [P, 3]
    of row in first, row in second and distance, by row. second=None: among the rows of `first` that stand before it.
    """
    other = first if second is None else second
    ahead = np.ascontiguousarray(other[:, :2].T)

    def search(start: int) -> np.ndarray:
        rows = first[start : start + _BLOCK[0]]
        best = np.full(len(rows), distance + 1)
        place = np.full(len(rows), -1)
        end = len(other) if second is not None else start + len(rows)
        for begin in range(0, end, _BLOCK[1]):
            stop = min(begin + _BLOCK[1], end)
            # Half of the bits rule nearly every pair out.
            half = np.bitwise_count(rows[:, 0, None] ^ ahead[0, begin:stop])
            half += np.bitwise_count(rows[:, 1, None] ^ ahead[1, begin:stop])
            i, j = np.nonzero(half <= distance)
            j += begin
            if second is None:
                i, j = i[j < i + start], j[j < i + start]
            bits = np.bitwise_count(rows[i] ^ other[j]).sum(1, dtype=np.int64)
            order = np.argsort(bits, kind="stable")[::-1]  # the last that is written to a place is the nearest
            i, j, bits = i[order], j[order], bits[order]
            least, where = np.full(len(rows), distance + 1), np.full(len(rows), -1)
            least[i], where[i] = bits, j
            place, best = np.where(least < best, where, place), np.minimum(least, best)
        hit = np.flatnonzero(place >= 0)
        return np.stack([hit + start, place[hit], best[hit]], axis=1)

    with ThreadPoolExecutor(max(1, threads or os.cpu_count() or 1)) as pool:  # numpy lets go of the interpreter's lock
        starts = range(0, len(first), _BLOCK[0])
        results = list(progress(pool.map(search, starts), "Comparing", len(starts)))
    return np.concatenate([np.zeros((0, 3), np.int64), *results]).astype(np.int64)


@dataclass(frozen=True)
class Match:
    """Row numbers and ids of a picture of the first dataset and of one of the second. distance: bits between their
    hashes, None where they only have one id."""

    rows: tuple[int, int]
    ids: tuple[str, str]
    distance: int | None

    @property
    def how(self) -> str:
        same = ["one id"] if self.ids[0] == self.ids[1] else []
        return ", ".join(same + ([] if self.distance is None else [f"distance {self.distance}"]))


@dataclass(frozen=True)
class Overlap:
    """matches: for each picture of the first dataset that the second has, by id or by looks, one match."""

    first: Hashes
    second: Hashes
    matches: list[Match]

    def lines(self) -> list[tuple[str, int]]:
        """What was found, as (name, number)."""
        by_id = sum(match.ids[0] == match.ids[1] for match in self.matches)
        by_looks = sum(match.distance is not None for match in self.matches)
        missing = self.first.missing + self.second.missing
        return [
            ("pictures of the first", len(self.first.ids)), ("pictures of the second", len(self.second.ids)),
            ("of the first found in the second", len(self.matches)), ("by id", by_id), ("by looks", by_looks),
            *((f"not compared: {reason}", number) for reason, number in missing.most_common()),
        ]  # fmt: skip


def find_overlap(
    first: str | Path,
    second: str | Path,
    split: str = "train",
    other_split: str = "test",
    distance: int = DISTANCE,
    workers: int | None = None,
) -> Overlap:
    """Pictures of `first`[split] that `second`[other_split] has as well. Of one split against itself, each picture that
    an earlier one resembles.

    distance: bits of 256. Pictures that are broken, or of a single grey, are counted and compared by id alone. Raises
    ValueError for a distance out of [0, 128] (there chance begins), and what GranDataset raises.
    """
    if not 0 <= distance <= 128:
        raise ValueError(f"distance must be in [0, 128] bits, got {distance}")
    same = split == other_split and os.path.realpath(first) == os.path.realpath(second)
    mine = hash_dataset(first, split, workers)
    theirs = mine if same else hash_dataset(second, other_split, workers)
    here, there = np.flatnonzero(mine.known), np.flatnonzero(theirs.known)
    pairs = nearest(mine.codes[here], None if same else theirs.codes[there], distance, workers)
    matched = {int(here[i]): (int(there[j]), int(bits)) for i, j, bits in pairs}
    by_id: dict[str, int] = {}
    matches = []
    if not same:
        by_id = {name: row for row, name in reversed(list(enumerate(theirs.ids)))}
    for row, name in enumerate(mine.ids):
        other, bits = matched.get(row, (by_id.get(name), None))
        if same:
            by_id.setdefault(name, row)
            other = by_id[name] if other is None and by_id[name] != row else other
        if other is not None:
            matches.append(Match((row, other), (name, theirs.ids[other]), bits))
    return Overlap(mine, theirs, matches)


def write_ids(overlap: Overlap, path: str | Path) -> int:
    """Write the ids of the first dataset's matched pictures, one a line, as `convert --exclude` takes them. Returns how
    many could not be written, since no line can hold them."""
    ids = list(dict.fromkeys(match.ids[0] for match in overlap.matches))
    fit = [name for name in ids if name.strip() == name and len(name.splitlines()) == 1]
    Path(path).write_text("".join(f"{name}\n" for name in fit), encoding="utf-8")
    return len(ids) - len(fit)


def write_page(
    overlap: Overlap, first: str | Path, second: str | Path, split: str, other_split: str, path: str | Path
) -> None:
    """Write an HTML page with PAIRS matches side by side, those of the largest distance first: where errors are."""
    shown = sorted(overlap.matches, key=lambda match: -1 if match.distance is None else match.distance, reverse=True)
    pairs = [
        {
            "ids": match.ids,
            "how": match.how,
            "pictures": [
                _picture(data, part, row)
                for data, part, row in zip((first, second), (split, other_split), match.rows, strict=True)
            ],
        }
        for match in shown[:PAIRS]
    ]
    html = render(
        "overlap.html", title="Pictures in two datasets", first=str(first), second=str(second), first_split=split,
        second_split=other_split, counts=overlap.lines(), pairs=pairs, matches=len(overlap.matches),
    )  # fmt: skip
    Path(path).write_text(html, encoding="utf-8")


def _hash_rows(data: str, split: str, chosen: range) -> tuple[list[np.ndarray | None], Counter[str]]:
    rows, missing, codes = open_rows(data, split), Counter(), []
    for number in chosen:
        try:
            code = picture_hash(decode_image(rows[number]["image"]))
            missing["flat"] += code is None
        except DataFault as fault:
            code = None
            missing[fault.kind] += 1
        codes.append(code)
    return codes, +missing


def _picture(data: str | Path, split: str, row: int) -> str | None:
    try:
        return data_uri(decode_image(open_rows(str(data), split)[row]["image"]), 240)
    except DataFault:
        return None
