"""Batches from a stream of rows, where there is no index: `datasets.load_dataset(..., streaming=True)` and its like."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset

from granvit.data.batches import Sent, beside, check_arguments, read_packs, send
from granvit.data.collate import Batch, join
from granvit.data.faults import FaultLog
from granvit.data.lengths import TOO_LONG, lengths_of, too_long
from granvit.data.planning import Candidate, Pack, draw, fill
from granvit.data.schema import good_or_none, parse_row
from granvit.questions.schema import DataFault, Sample

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor

_CHUNK = 32  # rows that are read and measured at a time


class StreamLoader:
    """A stream of Gran rows as batches of packed sequences, as `PackLoader` makes them of a dataset.

    Each rank takes its share of the stream (`split_dataset_by_node`), in the stream's order: shuffle it before. Ranks
    may end at different steps; `stream.repeat(None)` has no end.

    Resuming is best effort: `state_dict` holds the stream's own state from before the oldest image that waited for its
    pack. So nothing is lost, images that were handed out since that one was read come twice (some windows full; at most
    PATIENCE + 2), and the number of ranks must stay. What lay in the buffer of the stream's own `shuffle`, though, is
    lost, as `datasets` says: shuffle its shards alone (buffer_size=1) where that matters.

    fault_budget: the share of the rows read so far, of 1000 at least, that may have faults.
    Other arguments and errors: see `PackLoader`.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        processor: GranViTProcessor,
        tasks: Mapping[str, float],
        *,
        capacity: int = 8192,
        packs: int = 8,
        questions: int = 6,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 2,
        window: int = 512,
        fault_budget: float = 0.01,
    ) -> None:
        check_arguments(tasks, rank, capacity=capacity, packs=packs, questions=questions, ranks=ranks, window=window)
        if stream.features is not None:  # else nothing is decoded, or can be cast
            stream = stream.cast_column("image", datasets.Image(decode=False))
        stream = split_dataset_by_node(stream, rank, ranks)
        self._reader = _StreamReader(
            stream, processor, tasks, capacity, packs // ranks, questions, seed, window, workers
        )
        self._workers = workers
        self.faults = FaultLog(1000, fault_budget)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._reader.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reader.state = dict(state)

    def __iter__(self) -> Iterator[Batch]:
        for read, (faults, rows, state) in beside(self._reader, min(self._workers, 1)):
            for row, name, kind, message in faults:
                self.faults.add(row, name, DataFault(kind, message))
            self.faults.grow(rows)
            self.faults.check()
            self._reader.state = state
            if read is not None:
                yield join([read], self._reader.processor, self._reader.capacity)


class _StreamReader(IterableDataset):
    """state: how many rows and chunks were read before the oldest that waits, and the stream's own state there."""

    def __init__(
        self,
        stream: datasets.IterableDataset,
        processor: GranViTProcessor,
        tasks: Mapping[str, float],
        capacity: int,
        packs: int,
        questions: int,
        seed: int,
        window: int,
        threads: int,
    ) -> None:
        self.stream, self.processor, self.tasks = stream, processor, dict(sorted(tasks.items()))
        self.capacity, self.packs, self.questions, self.seed = capacity, packs, questions, seed
        self.window, self.threads = window, threads
        self.state: dict[str, Any] = {"rows": 0, "chunk": 0, "stream": None}

    def __iter__(self) -> Iterator[tuple[Sent | None, Any]]:
        first = self.state["rows"]
        if self.state["stream"] is not None:
            self.stream.load_state_dict(self.state["stream"])
        stream = iter(self.stream)
        rows: dict[int, Mapping[str, Any]] = {}  # what waits, by number, still encoded
        began: deque[dict[str, Any]] = deque()
        waiting: list[Candidate] = []
        ready: list[Pack] = []
        faults: list[tuple[int, str, str, str]] = []
        before = self.state["stream"]  # the stream itself knows it only once it has been read from
        for chunk in count(self.state["chunk"]):
            began.append({"rows": first, "chunk": chunk, "stream": before})
            read = dict(enumerate(islice(stream, _CHUNK), first))
            samples = [_annotations(number, row, faults) for number, row in read.items()]
            lengths = lengths_of(samples, self.processor, list(self.tasks))
            before = self.stream.state_dict()
            for number in (first + too_long(lengths.shortest(self.tasks), self.capacity)).tolist():
                faults.append((number, _name(number, read[number]), "capacity", TOO_LONG.format(self.capacity)))
            for one in draw(lengths, np.arange(len(read)), self.tasks, self.capacity, self.seed, chunk):
                waiting.append(replace(one, row=first + one.row))
                rows[first + one.row] = read[first + one.row]
            first += len(read)
            while len(waiting) >= self.window or (waiting and not read):
                packs, waiting = fill(waiting, self.capacity, self.questions)
                ready += packs
            while len(ready) >= self.packs or (ready and not read):
                now, ready = ready[: self.packs], ready[self.packs :]
                names = {number: _name(number, rows[number]) for pack in now for number, _ in pack}
                found, noted = read_packs(
                    now,
                    lambda number, note: parse_row(rows.pop(number), drop=note),
                    self.processor,
                    list(self.tasks),
                    self.threads,
                )
                faults += [(number, names[number], fault.kind, str(fault)) for number, fault in noted]
                while len(began) > 1 and began[1]["rows"] <= min(rows, default=first):
                    began.popleft()
                yield send(found), (faults, first, began[0])
                faults = []
            if faults:  # no batch may ever come to take them along
                yield None, (faults, first, began[0])
                faults = []
            if not read:
                return


def _annotations(number: int, row: Mapping[str, Any], faults: list[tuple[int, str, str, str]]) -> Sample | None:
    def note(fault: DataFault) -> None:
        faults.append((number, _name(number, row), fault.kind, str(fault)))

    return good_or_none(lambda note: parse_row(row, note, decode=False), note)


def _name(number: int, row: Mapping[str, Any]) -> str:
    return f"row {number} of the stream, id={row.get('id')!r}"
