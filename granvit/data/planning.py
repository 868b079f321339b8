"""Which images and questions stand in which sequence: a pure function of the lengths, a seed and the number of packs.

A global batch has `packs` sequences; sequence number j of every batch is lane j's. The row groups of an epoch are dealt
to the lanes in a random order, and each lane packs what it was dealt with a window of its own, epoch after epoch: what
a lane does depends on no other, and whoever has a lane, whatever else it has, sees the same packs in the same order.

Batches are alike: packing sorts a window by length, so its packs are shuffled before they are handed out; the lanes
begin with windows of different sizes, so that they don't end one together; and row groups of long images are spread
evenly among those of short ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, islice
from typing import TYPE_CHECKING

import numpy as np

from granvit.data.lengths import Lengths
from granvit_kernels import plan_packing

if TYPE_CHECKING:
    from granvit.data.mixture import Mixed

FULL = 0.98
"""A pack that is filled less waits in the window for better company."""
PATIENCE = 8
"""So many times an image waits at most."""
MIX = 8
"""So many neighbouring row groups are shuffled together."""
CHUNK = 1024
"""So many rows are handed on at a time."""


@dataclass(frozen=True)
class Candidate:
    """An image that waits to be packed.

    row: its number in the dataset. questions: numbers of its questions in the order in which they are asked.
    totals: tokens of the image with the first 1, 2, ... of them. waited: how often it was left over.
    """

    row: int
    questions: Sequence[int]
    totals: Sequence[int]
    waited: int = 0


Pack = list[tuple[int, list[int]]]
"""One sequence: rows, each with the numbers of the questions that are asked of it."""
RowsOfPass = tuple[np.ndarray, np.ndarray]
"""int64 [n] row numbers, and which pass over their dataset each is of: questions are drawn anew in each."""


def fill(candidates: Sequence[Candidate], capacity: int, wanted: int | None) -> tuple[list[Pack], list[Candidate]]:
    """Pack candidates, as many as possible into nearly full packs. Returns those packs, and who is left over.

    Images are packed (`plan_packing`) with their first `wanted` questions, and room that remains is filled with their
    further ones. Where that leaves a pack emptier than FULL, its images are packed anew with one question less. With
    None images keep all questions that fit a sequence, and those of a pack emptier than FULL are left over.
    At least one pack is returned for any candidates, and nobody is left over more than PATIENCE times: who was comes
    first, in packs that the largest others that fit are put into.
    """
    packs: list[Pack] = []
    overdue = [candidate for candidate in candidates if candidate.waited >= PATIENCE]
    waiting = [candidate for candidate in candidates if candidate.waited < PATIENCE]
    for numbers in plan_packing([_tokens(candidate, wanted, capacity) for candidate in overdue], capacity):
        members = [overdue[i] for i in numbers]
        room = capacity - sum(_tokens(candidate, wanted, capacity) for candidate in members)
        apart = []
        for candidate in sorted(waiting, key=lambda candidate: -_tokens(candidate, wanted, capacity)):
            tokens = _tokens(candidate, wanted, capacity)
            (members if tokens <= room else apart).append(candidate)
            room -= tokens if tokens <= room else 0
        waiting = apart
        packs.append(_top_up(members, capacity, wanted)[1])
    targets = (None,) if wanted is None else range(wanted, 0, -1)
    for target in targets:
        if not waiting:
            break
        tried = [
            _top_up([waiting[i] for i in members], capacity, target)
            for members in plan_packing([_tokens(candidate, target, capacity) for candidate in waiting], capacity)
        ]
        fullest = max(used for used, *_ in tried)
        waiting = []
        for used, pack, members in tried:
            forced = target == targets[-1] and not packs and used == fullest
            if used >= FULL * capacity or forced:
                packs.append(pack)
            else:
                waiting += members
    return packs, [replace(candidate, waited=candidate.waited + 1) for candidate in waiting]


def _asked(candidate: Candidate, target: int | None, capacity: int) -> int:
    """How many questions an image has at `target` (None: all): at least one, and none that don't fit an empty
    sequence."""
    fitting = bisect_right(candidate.totals, capacity)
    return max(1, fitting if target is None else min(target, fitting))


def _tokens(candidate: Candidate, target: int | None, capacity: int) -> int:
    return candidate.totals[_asked(candidate, target, capacity) - 1]


def _top_up(members: list[Candidate], capacity: int, target: int | None) -> tuple[int, Pack, list[Candidate]]:
    """A pack of these images at `target` questions, and as many more, one an image in turn, as fit; its tokens."""
    asked = [_asked(candidate, target, capacity) for candidate in members]
    numbered = list(zip(members, asked, strict=True))
    pack = [(candidate.row, list(candidate.questions[:number])) for candidate, number in numbered]
    used = sum(candidate.totals[number - 1] for candidate, number in numbered)
    deepest = max(len(candidate.questions) for candidate in members)
    for depth in range(min(asked), deepest):
        for candidate, number, (_, questions) in zip(members, asked, pack, strict=True):
            if number <= depth < len(candidate.questions):
                length = candidate.totals[depth] - candidate.totals[depth - 1]
                if used + length <= capacity:
                    questions.append(candidate.questions[depth])
                    used += length
    return used, pack, members


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
        starts = np.repeat(np.cumsum(groups) - groups, pieces)
        number = np.arange(len(starts)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        self.starts = starts + number * np.repeat(groups, pieces) // np.repeat(pieces, pieces)
        self.ends = np.append(self.starts[1:], rows)
        self.lanes, self.seed, self.size = lanes, seed, rows
        self._single = len(self.starts) == rows  # each row alone: shuffled already
        self._by_length = np.arange(0)
        if not self._single:
            self._by_length = np.argsort(np.add.reduceat(image, self.starts) / (self.ends - self.starts), kind="stable")
        self._groups = lru_cache(2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        random = np.random.default_rng([self.seed, epoch])
        if self._single:
            return random.permutation(len(self.starts))
        place = np.empty(len(self.starts))
        for stratum in np.array_split(self._by_length, MIX):
            # Stratified sampling: as many as there are lanes stand together, somewhere in an interval of their own.
            together = np.arange(len(stratum)) // self.lanes
            intervals = -(-len(stratum) // self.lanes)
            place[random.permutation(stratum)] = (together + random.random(intervals)[together]) / intervals
        anyhow = random.permutation(len(place))
        return anyhow[np.argsort(place[anyhow], kind="stable")]

    def stream(self, lane: int, epochs: int | None) -> Iterator[RowsOfPass]:
        """The lane's rows of so many epochs (None: without end), at most CHUNK at a time."""
        for epoch in count() if epochs is None else range(epochs):
            for rows in self.rows(lane, epoch):
                yield rows, np.full(len(rows), epoch)

    def count(self, lane: int, epoch: int) -> int:
        """How many rows the lane has in this epoch."""
        mine = self._mine(lane, epoch)
        return int((self.ends[mine] - self.starts[mine]).sum())

    def _mine(self, lane: int, epoch: int) -> np.ndarray:
        # Another lane is the first in each epoch: where there are fewer groups than lanes, all have some in time.
        return self._groups(epoch)[(lane + epoch) % self.lanes :: self.lanes]

    def rows(self, lane: int, epoch: int) -> Iterator[np.ndarray]:
        """int64 arrays of at most CHUNK row numbers: all that the lane has in this epoch, in its order."""
        mine = self._mine(lane, epoch)
        for number, start in enumerate(range(0, len(mine), CHUNK if self._single else MIX)):
            if self._single:
                yield self.starts[mine[start : start + CHUNK]]
            else:
                near = np.concatenate([np.arange(self.starts[g], self.ends[g]) for g in mine[start : start + MIX]])
                mixed = np.random.default_rng([self.seed, epoch, lane, number]).permutation(near)
                yield from (mixed[i : i + CHUNK] for i in range(0, len(mixed), CHUNK))


class Lane:
    """The packs of one lane, without end, or until `epochs` are over.

    weights: of each of `lengths.tasks` (see `draw`). wanted: questions an image; what fills a sequence may be more or
    fewer; None: all that fit a sequence. window: images that wait for a pack at a time; fewer at first, so that the
    lanes end their windows one after another.
    """

    def __init__(
        self,
        lengths: Lengths,
        order: Order | Mixed,
        lane: int,
        weights: Mapping[str, float],
        capacity: int,
        wanted: int | None,
        window: int,
        epochs: int | None = None,
    ) -> None:
        self.lengths, self.order, self.lane, self.epochs = lengths, order, lane, epochs
        self.weights, self.capacity, self.wanted, self.window = weights, capacity, wanted, window

    def __iter__(self) -> Iterator[Pack]:
        waiting: list[Candidate] = []
        arriving = self._candidates()
        room = self.window - self.window * self.lane // (2 * self.order.lanes)
        for number in count():
            waiting += islice(arriving, room - len(waiting))
            if not waiting:
                return
            over = len(waiting) < room  # what is left goes as it is
            packs, waiting = fill(waiting, self.capacity, self.wanted)
            room = self.window
            if not over:
                np.random.default_rng([self.order.seed, self.lane, number]).shuffle(packs)
            yield from packs

    def _candidates(self) -> Iterator[Candidate]:
        for rows, passes in self.order.stream(self.lane, self.epochs):
            yield from draw(self.lengths, rows, self.weights, self.capacity, self.order.seed, passes)


MEASURED_IMAGES = 16_384
"""So many images, drawn at random, tell how many a sequence holds."""


def packs_of(
    images: float, lengths: Lengths, weights: Mapping[str, float], capacity: int, wanted: int | None, seed: int
) -> int:
    """How many packs hold about so many images: 1, 2, 4 or a multiple of 8, since the ranks that share a batch mostly
    are a divisor of that. A function of its arguments, so the same on any number of ranks. Raises ValueError where
    nothing can be asked."""
    rows = len(lengths.image)
    order = Order(np.ones(rows, np.int64), 1, seed, lengths.image)
    packs = number = 0
    for pack in Lane(lengths, order, 0, weights, capacity, wanted, 512, epochs=1):
        packs, number = packs + 1, number + len(pack)
        if number >= MEASURED_IMAGES:
            break
    if not packs:
        raise ValueError(f"no image with a question of {sorted(weights)} fits {capacity} tokens")
    exact = images * packs / number
    return min((1, 2, 4, max(8, 8 * round(exact / 8))), key=lambda choice: abs(choice - exact))


def draw(
    lengths: Lengths, rows: np.ndarray, weights: Mapping[str, float], capacity: int, seed: int, passes: np.ndarray | int
) -> list[Candidate]:
    """Those of the rows (int64 [n]) of which something can be asked in `capacity` tokens, in their order, each with its
    questions in the order of this seed's pass (int64 [n], or of all): sampled without replacement by their tasks'
    weights (Efraimidis and Spirakis), never one of weight 0."""
    starts = lengths.starts
    asked = starts[rows + 1] > starts[rows]
    rows, passes = rows[asked], np.broadcast_to(passes, asked.shape)[asked]
    counts = starts[rows + 1] - starts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    offset = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    number = np.repeat(starts[rows], counts) + offset
    most = max(weights[task] for task in lengths.tasks)
    # What is divided by lies in [1e-300, 1], so that no weight, however small, makes all of its keys one.
    weight = np.array([weights[t] and max(weights[t] / most, 1e-300) for t in lengths.tasks])[lengths.task[number]]
    chosen = (weight > 0) & (lengths.question[number] <= (capacity - lengths.image[rows])[owner])
    owner, offset, number = owner[chosen], offset[chosen], number[chosen]
    key = np.log(_uniform(number, seed, passes[owner])) / weight[chosen]
    by = np.lexsort((-key, owner))
    offset, number = offset[by], number[by]
    cuts = np.searchsorted(owner, np.arange(len(rows) + 1))
    candidates = []
    for row, first, last in zip(rows, cuts[:-1], cuts[1:], strict=True):
        if first < last:
            totals = lengths.image[row] + np.cumsum(lengths.question[number[first:last]])
            candidates.append(Candidate(int(row), offset[first:last].tolist(), totals.tolist()))
    return candidates


def _uniform(number: np.ndarray, seed: int, passes: np.ndarray) -> np.ndarray:
    """A number in (0, 1) for each question of its pass, by SplitMix64: no state, so that it's the same whoever draws
    it."""
    different, which = np.unique(passes, return_inverse=True)
    salts = [np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)[0] for n in different.tolist()]
    salt = np.array(salts, np.uint64)[which]
    x = number.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
