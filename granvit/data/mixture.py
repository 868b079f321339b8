"""Several Gran datasets read as one, each image with a chance of its dataset's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from granvit.data.faults import FaultLog
from granvit.data.loader import GranDataset
from granvit.data.order import CHUNK, Order, Rows
from granvit.questions.schema import DataFault, Sample


class Mixture(GranDataset):
    """Gran datasets as one whose rows are the first's, then the second's, and so on. A sample's `dataset` is the name
    of its own: the last part of its path, without `.parquet`.

    Raises ValueError for fewer than two datasets, and for two of one name.
    """

    def __init__(self, parts: Sequence[GranDataset]) -> None:
        if len(parts) < 2:
            raise ValueError(f"a mixture is of two datasets or more, got {len(parts)}")
        self._parts, self.names = list(parts), [dataset_name(part.path) for part in parts]
        repeated = [name for name, times in Counter(self.names).items() if times > 1]
        if repeated:
            paths = [part.path for part, name in zip(parts, self.names, strict=True) if name == repeated[0]]
            raise ValueError(
                f"the datasets {' and '.join(paths)} have one name, {repeated[0]!r}, by which their shares and figures "
                "are told apart: rename a folder, or give a link of another name"
            )
        self.path, self.split = ", ".join(part.path for part in parts), parts[0].split
        self.ends = np.cumsum(self.sizes)
        self.groups = np.concatenate([part.groups for part in parts])
        self.faults = FaultLog(len(self), parts[0].faults.budget)

    @property
    def sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [len(part) for part in self._parts]

    @property
    def parts(self) -> list[GranDataset]:
        return self._parts

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(
        self,
        index: int,
        drop: Callable[[DataFault], None],
        decode: bool = True,
        divisor: Callable[[Sample], int] | None = None,
    ) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part, row = self._place(index)
        return replace(self._parts[part].read(row, drop, decode, divisor), dataset=self.names[part])

    def ids(self) -> list[str]:
        return [name for part in self._parts for name in part.ids()]

    def name(self, index: int) -> str:
        part, row = self._place(index)
        return self._parts[part].name(row)

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return part, index - int(self.ends[part] - len(self._parts[part]))


def dataset_name(path: str) -> str:
    """What a dataset of a mixture is called."""
    return Path(path.rstrip("/")).name.removesuffix(".parquet")


def open_split(paths: Sequence[str], split: str = "train", fault_budget: float = 0.01) -> GranDataset:
    """A split of the dataset at a path, or of a mixture of several. Raises what GranDataset and Mixture raise, and
    ValueError for one folder twice."""
    places = [str(Path(path).resolve()) if "://" not in path else path.rstrip("/") for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"the dataset {path} is named twice; a dataset's weight says how often it is drawn")
    parts = [GranDataset(path, split, fault_budget) for path in paths]
    return parts[0] if len(parts) == 1 else Mixture(parts)


def shares(sizes: Sequence[int], weights: Sequence[float] | None) -> list[float]:
    """The share of images that are drawn from each dataset: of its weight, or of its size."""
    chances = sizes if weights is None else weights
    return [chance / sum(chances) for chance in chances]


def described(data: GranDataset, weights: Sequence[float] | None) -> list[str]:
    """A line for each dataset of a mixture; none for a dataset that is none."""
    if len(data.parts) == 1:
        return []
    parts = zip(data.names, data.sizes, shares(data.sizes, weights), strict=True)
    return [f"{name}, {size:,} images, {100 * share:.1f} % of those drawn" for name, size, share in parts]


class Mixed:
    """In which order a lane sees the rows of a mixture (see Order, which says it for one dataset).

    orders: of each dataset. weights: shares of the images that are drawn; None: each image of each once an epoch. With
    weights an epoch has as many images as all datasets together, at least one of each. A dataset goes on in the next
    epoch where it was, so that none of its images is seen a second time before nearly all were seen once, however small
    its share; one of a large share begins anew within the epoch. In every CHUNK rows of a lane the shares hold to a
    row, and the order is random.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float] | None) -> None:
        self.orders, self.lanes, self.seed = list(orders), orders[0].lanes, orders[0].seed
        sizes = [order.size for order in orders]
        self._firsts = np.cumsum(sizes) - sizes
        self._drawn = None
        if weights is not None:
            self._drawn = [max(1, round(sum(sizes) * share)) for share in shares(sizes, weights)]

    def stream(self, lane: int, epochs: int | None, epoch: int = 0, before: int = 0) -> Iterator[Rows]:
        """The lane's rows, numbers of the mixture, from those of `epoch` on that come after its first `before`, which
        is where some Rows began."""
        streams = None
        while epochs is None or epoch < epochs:
            counts = np.array([self._count(part, lane, epoch) for part in range(len(self.orders))])
            blocks = max(1, int(counts.sum()) // CHUNK)
            for block in range(blocks):
                firsts, ends = counts * block // blocks, counts * (block + 1) // blocks
                if firsts.sum() < before:
                    continue
                if streams is None:
                    streams = [
                        _Stream(order, lane, *self._place(part, lane, epoch, int(first)))
                        for part, (order, first) in enumerate(zip(self.orders, firsts, strict=True))
                    ]
                part = np.repeat(np.arange(len(streams)), ends - firsts)
                part = np.random.default_rng([self.seed, epoch, lane, block]).permutation(part)
                rows, passes = np.empty(len(part), np.int64), np.empty(len(part), np.int64)
                for i, (stream, number) in enumerate(zip(streams, (ends - firsts).tolist(), strict=True)):
                    own, passes[part == i] = stream.take(number)
                    rows[part == i] = own + self._firsts[i]
                yield Rows(epoch, int(firsts.sum()), rows, passes)
            epoch, before = epoch + 1, 0

    def _count(self, part: int, lane: int, epoch: int) -> int:
        """Rows of a dataset that the lane sees in an epoch."""
        if self._drawn is None:
            return self.orders[part].count(lane, epoch)
        return self._before(part, lane, epoch + 1) - self._before(part, lane, epoch)

    def _place(self, part: int, lane: int, epoch: int, row: int) -> tuple[int, int]:
        """Where in a dataset the lane's row number `row` of an epoch is: its pass, and how many come before it there.
        Without weights an epoch is a pass, so that nothing is counted."""
        if self._drawn is None:
            return epoch, row
        return self.orders[part].place(lane, self._before(part, lane, epoch) + row)

    def _before(self, part: int, lane: int, epoch: int) -> int:
        """Rows of a dataset that the lane sees before an epoch, where there are weights; of all lanes, what is
        drawn."""
        return (self._drawn[part] * epoch + lane) // self.lanes


class _Stream:
    """A lane's rows of a dataset from a place on (see Order.place), pass after pass, in any portions."""

    def __init__(self, order: Order, lane: int, epoch: int, before: int) -> None:
        self._chunks = order.stream(lane, None, epoch, before)
        self._rows = self._passes = np.empty(0, np.int64)

    def take(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of so many rows, and the pass that each is of."""
        while len(self._rows) < number:
            _, _, rows, passes = next(self._chunks)
            self._rows, self._passes = np.append(self._rows, rows), np.append(self._passes, passes)
        taken = self._rows[:number], self._passes[:number]
        self._rows, self._passes = self._rows[number:], self._passes[number:]
        return taken
