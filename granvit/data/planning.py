"""Which images and questions stand in which sequence: a pure function of the lengths, a seed and the number of packs.

A global batch has `packs` sequences; sequence number j of every batch is lane j's. Each lane packs the rows that it was
dealt (granvit.data.order) with a window of its own, epoch after epoch: what a lane does depends on no other, and
whoever has a lane, whatever else it has, sees the same packs in the same order.

Batches are alike: packing sorts a window by length, so its packs are shuffled before they are handed out; and the lanes
begin with windows of different sizes, so that they don't end one together.

A lane can go on at any pack from its `Place` there, without what came before being planned again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from granvit.data.lengths import Lengths
from granvit.data.order import Order
from granvit_kernels import plan_packing

if TYPE_CHECKING:
    from granvit.data.mixture import Mixed

FULL = 0.98
"""A pack that is filled less waits in the window for better company."""
PATIENCE = 8
"""So many times an image waits at most."""


@dataclass(frozen=True)
class Candidate:
    """An image that waits to be packed.

    row: its number in the dataset. questions: numbers of its questions in the order in which they are asked.
    totals: tokens of the image with the first 1, 2, ... of them. waited: how often it was left over. pass_number: of
        the pass over its dataset that it comes from.
    """

    row: int
    questions: Sequence[int]
    totals: Sequence[int]
    waited: int = 0
    pass_number: int = 0


Pack = list[tuple[int, list[int]]]
"""One sequence: rows, each with the numbers of the questions that are asked of it."""


class Place(NamedTuple):
    """Where a lane stands between two packs. The packs that follow depend on nothing else of its past.

    window: number of the window whose packs are handed out, from 0. epoch, before, used: where the window's new images
    begin: in the Rows of this `epoch` and `before`, behind the first `used` images. handed: how many packs of the
    window were handed out. waiting: of each image that earlier windows left over, its row, its pass and how often it
    was left over.
    """

    window: int = 0
    epoch: int = 0
    before: int = 0
    used: int = 0
    handed: int = 0
    waiting: Sequence[tuple[int, int, int]] = ()

    @classmethod
    def parse(cls, values: Any) -> Place:
        """Of what JSON made of a Place. Raises ValueError for what never was one."""
        try:
            *numbers, waiting = values
            place = cls(*numbers, waiting=[(row, number, waited) for row, number, waited in waiting])
            numbers += [number for image in place.waiting for number in image]
            if len(place) == len(values) and all(type(number) is int and number in range(2**63) for number in numbers):
                return place
        except (TypeError, ValueError):
            pass
        raise ValueError(f"the place of a lane must be six fields of integers >= 0 (int64), got {values!r:.80}")


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
        return (pack for pack, _ in self.packs())

    def packs(self, place: Place = Place()) -> Iterator[tuple[Pack, Place]]:  # noqa: B008  (immutable)
        """The packs from a place on, each with the place after it. Raises ValueError for a place of other lengths."""
        waiting, arriving, handed = self._again(place), _Arriving(self, place), place.handed
        for number in count(place.window):
            left = [(candidate.row, candidate.pass_number, candidate.waited) for candidate in waiting]
            begin = Place(number, arriving.epoch, arriving.before, arriving.used, 0, left)
            room = self.window if number else self.window - self.window * self.lane // (2 * self.order.lanes)
            waiting += arriving.take(room - len(waiting))
            if not waiting:
                return
            over = len(waiting) < room  # what is left goes as it is
            packs, waiting = fill(waiting, self.capacity, self.wanted)
            if not over:
                np.random.default_rng([self.order.seed, self.lane, number]).shuffle(packs)
            for index in range(handed, len(packs)):
                yield packs[index], begin._replace(handed=index + 1)
            handed = 0

    def draw(self, rows: np.ndarray, passes: np.ndarray) -> list[Candidate]:
        return draw(self.lengths, rows, self.weights, self.capacity, self.order.seed, passes)

    def _again(self, place: Place) -> list[Candidate]:
        """The images that were left over, as they were."""
        if not place.waiting:
            return []
        rows, passes, waited = np.array(place.waiting, np.int64).T
        drawn = self.draw(rows, passes) if rows.max() < len(self.lengths.image) else []
        if len(drawn) != len(rows):
            raise ValueError(f"the place of lane {self.lane} is one of other data: it names images without questions")
        return [replace(candidate, waited=times) for candidate, times in zip(drawn, waited.tolist(), strict=True)]


class _Arriving:
    """A lane's images from a place on. epoch, before, used: the place of the next (see Place)."""

    def __init__(self, lane: Lane, place: Place) -> None:
        self.epoch, self.before, self.used = place.epoch, place.before, place.used
        self._draw, self._drawn = lane.draw, None
        self._stream = lane.order.stream(lane.lane, lane.epochs, place.epoch, place.before)

    def take(self, number: int) -> list[Candidate]:
        """So many, fewer where there are no more."""
        taken: list[Candidate] = []
        while len(taken) < number:
            if self._drawn is None or self.used >= len(self._drawn):
                if (rows := next(self._stream, None)) is None:
                    break
                if self._drawn is not None:
                    self.used = 0
                self.epoch, self.before, self._drawn = rows.epoch, rows.before, self._draw(rows.numbers, rows.passes)
            more = self._drawn[self.used : self.used + number - len(taken)]
            taken += more
            self.used += len(more)
        return taken


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
    for row, of, first, last in zip(rows.tolist(), passes.tolist(), cuts[:-1], cuts[1:], strict=True):
        if first < last:
            totals = lengths.image[row] + np.cumsum(lengths.question[number[first:last]])
            candidates.append(Candidate(row, offset[first:last].tolist(), totals.tolist(), pass_number=of))
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
