"""In which order the lanes of a dataset see its rows: a pure function of its row groups, a seed and how many lanes
there are.

The row groups of an epoch are dealt to the lanes in a random order, those of long images spread evenly among those of
short ones, and of some groups at a time each lane mixes the rows. A lane's order can be entered anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

MIX = 8
"""So many neighbouring row groups are shuffled together."""
CHUNK = 1024
"""So many rows are handed on at a time."""


class Rows(NamedTuple):
    """Some rows of a lane, in its order. numbers: int64 [n]. passes: int64 [n], which pass over its dataset each is of:
    questions are drawn anew in each. They are of `epoch`, of which the lane had `before` rows before them."""

    epoch: int
    before: int
    numbers: np.ndarray
    passes: np.ndarray


class Order:
    """In which order a lane sees rows.

    groups: rows of each run that lies together (`GranDataset.groups`). Every row comes once an epoch, in one lane.
    Runs so long that lanes could not share them evenly are dealt out in pieces. image: int32 [N], tokens of each row's
    image (`Lengths.image`). Groups fall into MIX strata by their images' mean length, and of the MIX groups that a lane
    mixes about one is of each.
    """

    def __init__(self, groups: np.ndarray, lanes: int, seed: int, image: np.ndarray) -> None:
        rows = int(np.sum(groups))
        pieces = -(-groups // max(1, rows // (lanes * MIX)))
        self.lanes, self.seed, self.size = lanes, seed, rows
        self._groups = lru_cache(2)(self._shuffled)
        self._counts = lru_cache(None)(self._counted)
        self._single = int(pieces.sum()) == rows  # each row alone: shuffled already, and its own number is its group's
        if self._single:
            return
        starts = np.repeat(np.cumsum(groups) - groups, pieces)
        number = np.arange(len(starts)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.starts = starts + number * np.repeat(groups, pieces) // np.repeat(pieces, pieces)
        self.ends = np.append(self.starts[1:], rows)
        self._by_length = np.argsort(np.add.reduceat(image, self.starts) / (self.ends - self.starts), kind="stable")

    def _shuffled(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        if self._single:
            return random.permutation(self.size).astype(np.min_scalar_type(self.size))  # of millions, half the memory
        place = np.empty(len(self.starts))
        for stratum in np.array_split(self._by_length, MIX):
            # Stratified sampling: as many as there are lanes stand together, somewhere in an interval of their own.
            together = np.arange(len(stratum)) // self.lanes
            intervals = -(-len(stratum) // self.lanes)
            place[random.permutation(stratum)] = (together + random.random(intervals)[together]) / intervals
        anyhow = random.permutation(len(place))
        return anyhow[np.argsort(place[anyhow], kind="stable")]

    def stream(self, lane: int, epochs: int | None, epoch: int = 0, before: int = 0) -> Iterator[Rows]:
        """The lane's rows of so many epochs (None: without end), at most CHUNK at a time, from those of `epoch` on that
        come after its first `before`."""
        while epochs is None or epoch < epochs:
            for numbers in self.rows(lane, epoch, before):
                yield Rows(epoch, before, numbers, np.full(len(numbers), epoch))
                before += len(numbers)
            epoch, before = epoch + 1, 0

    def count(self, lane: int, epoch: int) -> int:
        """How many rows the lane has in this epoch."""
        return int(self._counts(epoch)[lane])

    def _counted(self, epoch: int) -> np.ndarray:
        return np.array([self._size(self._mine(lane, epoch)) for lane in range(self.lanes)])

    def _size(self, groups: np.ndarray) -> int:
        return len(groups) if self._single else int((self.ends[groups] - self.starts[groups]).sum())

    def place(self, lane: int, rows: int) -> tuple[int, int]:
        """Of which epoch the lane's row number `rows` of all epochs is, and how many of it come before."""
        epoch = 0
        while 0 < self.count(lane, epoch) <= rows or self.count(lane, epoch) < rows:
            rows -= self.count(lane, epoch)
            epoch += 1
        return epoch, rows

    def _mine(self, lane: int, epoch: int) -> np.ndarray:
        # Another lane is the first in each epoch: where there are fewer groups than lanes, all have some in time.
        return self._groups(epoch)[(lane + epoch) % self.lanes :: self.lanes]

    def rows(self, lane: int, epoch: int, before: int = 0) -> Iterator[np.ndarray]:
        """int64 arrays of at most CHUNK row numbers: all that the lane has in this epoch but its first `before`, in its
        order."""
        mine, together = self._mine(lane, epoch), CHUNK if self._single else MIX
        for number, start in enumerate(range(0, len(mine), together)):
            near = mine[start : start + together]
            size = self._size(near)
            if before >= size:
                before -= size
                continue
            if self._single:
                mixed = near.astype(np.int64)
            else:
                rows = np.concatenate([np.arange(self.starts[g], self.ends[g]) for g in near])
                mixed = np.random.default_rng([self.seed, epoch, lane, number]).permutation(rows)
            yield from (mixed[i : i + CHUNK] for i in range(before, size, CHUNK))
            before = 0
