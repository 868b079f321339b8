"""Batches of packed sequences, nearly full, that any number of ranks sees in one order and finds again after a stop."""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from granvit.data.backlog import Backlog
from granvit.data.collate import Batch, Read, collate, join  # noqa: F401  (collate: for users' code)
from granvit.data.crops import ASKED, Crops
from granvit.data.faults import FaultLog
from granvit.data.lengths import TOO_LONG, Lengths, as_it_is, measure, start_worker, too_long
from granvit.data.loader import GranDataset
from granvit.data.mixture import Mixed
from granvit.data.order import Order
from granvit.data.parallel import begun, progress, shared_memory
from granvit.data.parquet import ParquetRows
from granvit.data.planning import Lane, Pack, Place
from granvit.data.scaling import divisor
from granvit.data.schema import good_or_none
from granvit.questions.packing import write_parts
from granvit.questions.prompts import Question
from granvit.questions.schema import DataFault, Sample

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor


LANE_BYTES = 384 << 20
"""A process keeps row groups of so many bytes for each lane that it reads, and of each dataset of a mixture: those of
the lane's window, and those that are mixed for the next one."""
PREFETCH_BYTES = 1 << 30
"""Pictures that a loader's processes read ahead of training take at most so much shared memory; those in use come on
top."""
PROCESS_ROWS = 20_000
"""Rows whose sequences are worth a process more to count."""
KEPT_PLACES = 256
"""The lanes' places are kept for so many of the steps planned last: more than are read ahead of training."""
NAMED_FAULTS = 1000
"""Faulty rows over the budget that are named before a loader gives up."""


def _check_arguments(tasks: Mapping[str, float], rank: int, **least: int) -> None:
    """Raises ValueError for numbers and weights of a PackLoader that make no sense."""
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    packs, ranks = least["packs"], least["ranks"]
    if packs % ranks or not 0 <= rank < ranks:
        raise ValueError(f"packs must be a multiple of ranks, rank below it; got {packs} packs, rank {rank} of {ranks}")
    if not all(0 <= weight < math.inf for weight in tasks.values()) or not any(tasks.values()):
        raise ValueError(f"tasks must map names to finite weights >= 0, one above 0, got {dict(tasks)}")


class PackLoader:
    """A Gran dataset as batches of `packs` sequences of at most `capacity` tokens: `for batch in loader`.

    Which images and questions stand in which sequence is a function of the data, the arguments and `seed` alone
    (see granvit.data.planning): this rank of `ranks` gets sequences rank, rank + ranks, ... of every batch, and all
    ranks as many batches. A row whose picture turns out to be faulty leaves its slot empty; it is logged and counted in
    `faults`, as is an image too long for `capacity` with its shortest question. Rows without a question of these tasks
    are left out, which is no fault.

    tasks: weights of the tasks whose questions are drawn. questions: as many an image are aimed at; sequences are
        filled with more or fewer. None: all of an image's that fit a sequence. workers: processes beside this one that
        read and decode, each for lanes of its own, and where there are fewer lanes than that, threads in them; 0: here.
    epochs: passes over the data after which iteration ends (the last batches then have empty sequences); None: never.
        Assign to `steps` what another loader of these arguments counted, and no rank plans other ranks' sequences.
    weights: shares of the images that are drawn from each dataset of a mixture (granvit.data.mixture), of any sum;
        None: each image of each once an epoch. With weights an epoch has as many images as all of them.
    window: images a sequence's place chooses among. pixels: False leaves pictures undecoded, blanks of their size.
    crops: which regions a teacher looks at; None: there is no teacher. Large JPEGs are decoded smaller than they are
    where student and teacher keep their grids and enough pixels for them (granvit.data.scaling).

    The state is `step`, how many batches were handed out: set it, or load a `state_dict`, and iteration goes on
    there, on any number of ranks. A state also tells where this rank's lanes stood, and `with_all_places` of all ranks'
    states where all did: those go on at once. Of the others what came before is planned again, but not read.

    Raises ValueError where packs is no multiple of ranks, nothing can be asked, or a state is of other arguments;
    FaultBudgetExceeded, while it runs, when more than the dataset's budget of this rank's share of rows is faulty (of
    the rows that it was given, once they are more).
    """

    def __init__(
        self,
        dataset: GranDataset,
        processor: GranViTProcessor,
        tasks: Mapping[str, float],
        *,
        capacity: int = 8192,
        packs: int = 8,
        questions: int | None = 6,
        seed: int = 0,
        rank: int = 0,
        ranks: int = 1,
        workers: int = 2,
        epochs: int | None = None,
        window: int = 512,
        pixels: bool = True,
        crops: Crops | None = ASKED,
        weights: Sequence[float] | None = None,
    ) -> None:
        least = {"capacity": capacity, "packs": packs, "ranks": ranks, "window": window}
        _check_arguments(tasks, rank, **least | ({} if questions is None else {"questions": questions}))
        self.dataset, self.processor, self.capacity, self.packs = dataset, processor, capacity, packs
        self.rank, self.ranks, self.workers, self.pixels, self.crops = rank, ranks, workers, pixels, crops
        self.lengths = measure(dataset, processor, sorted(tasks))
        shortest = self.lengths.shortest(tasks)
        ends = np.cumsum([len(part) for part in dataset.parts])
        for part, fits in zip(dataset.parts, np.split(shortest <= capacity, ends[:-1]), strict=True):
            if not fits.any():
                kinds = Counter(kind for _, kind, _ in self.lengths.faults)
                faults = f"; faults: {dict(kinds)}" if kinds else ""
                raise ValueError(
                    f"{part.path}: no image with a question of {sorted(tasks)} fits {capacity} tokens{faults}"
                )
        order = _order(dataset, packs, seed, self.lengths, weights)
        self.lanes = [
            Lane(self.lengths, order, lane, tasks, capacity, questions, window, epochs) for lane in range(packs)
        ]
        self.step = 0
        # Of the last steps that were planned: the step, and of each lane the step it stood at and where.
        self._places: deque[tuple[int, dict[int, tuple[int, Place]]]] = deque(maxlen=KEPT_PLACES)
        self._known = {"seed": seed, "packs": packs, "capacity": capacity, "questions": questions, "window": window}
        self._known |= {"epochs": epochs, "rows": len(dataset), "tasks": {t: tasks[t] for t in self.lengths.tasks}}
        self._known["datasets"] = [len(part) for part in dataset.parts] if len(dataset.parts) > 1 else None
        self._known["weights"] = None if weights is None else [float(weight) for weight in weights]
        self._known["checksum"] = self.lengths.checksum(dataset.groups)
        self.faults = FaultLog(len(dataset) // ranks, dataset.faults.budget)
        self._note(fault for fault in self.lengths.faults if fault[0] % ranks == rank)
        rows = too_long(shortest, capacity).tolist()
        self._note((row, "capacity", TOO_LONG.format(capacity)) for row in rows if row % ranks == rank)

    @cached_property
    def steps(self) -> int | None:
        """How many batches there are in all; None without end. Plans every lane, with a progress bar."""
        return None if self.lanes[0].epochs is None else max(_count_packs(self.lanes))

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Where iteration stands, or stood at an earlier step: in integers; the rest is there to be compared."""
        step = self.step if step is None else step
        places = {str(lane): [at, *place] for lane, (at, place) in self._known_places(step).items()}
        return {"step": step, **self._known, "places": places}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader of the same arguments stood. Raises ValueError for another's state, or a damaged one."""
        differing = [key for key in self._known if state.get(key) != self._known[key]]
        if differing:
            shown = "; ".join(f"{key}: {state.get(key)!r} there, {self._known[key]!r} here" for key in differing)
            raise ValueError(f"the state is that of another loader ({shown})")
        places = _places_of(state, self.packs)
        self.step = state["step"]
        self._places.clear()
        self._places.append((self.step, places))

    def _known_places(self, step: int) -> dict[int, tuple[int, Place]]:
        """The newest places that are known of this step or one before it."""
        # A copy: a thread may read ahead meanwhile.
        return next((places for at, places in reversed(self._places.copy()) if at <= step), {})

    def __iter__(self) -> Iterator[Batch]:
        processes = min(self.workers, self.packs // self.ranks)
        threads = -(-self.workers // max(1, processes))
        reader = _Reader(self.dataset, self.processor, self.lengths.tasks, threads, self.pixels, self.crops)
        reads: list[Read] = []
        handed = 0  # rows; over epochs a rank sees more than its share of different ones
        for read, faults in _read_ahead(reader, processes, _Steps(self, max(1, processes))):
            self._note(faults)
            handed += len(read.samples) + len({row for row, *_ in faults})
            reads.append(read)
            if len(reads) < processes:
                continue
            self.faults.grow(min(handed, len(self.dataset)))
            self.faults.check()
            self.step += 1
            batch, reads = join(reads, self.processor, self.capacity, self.crops), []
            yield batch

    def plan(self) -> Iterator[list[Pack]]:
        """This rank's packs of each batch from `step` on; an empty pack where a lane is over."""
        mine, end = range(self.rank, self.packs, self.ranks), vars(self).get("steps")
        endless = self.lanes[0].epochs is None
        planned = mine if endless or end is not None else range(self.packs)  # the longest, whoever has it, is the end
        known = self._known_places(self.step)
        while self._places and self._places[-1][0] > self.step:  # of an iteration that went further
            self._places.pop()
        stood = {lane: known.get(lane, (0, Place())) for lane in planned}
        packs = {lane: self.lanes[lane].packs(place) for lane, (_, place) in stood.items()}

        def next_pack(lane: int) -> Pack | None:
            at, place = stood[lane]
            pack, place = next(packs[lane], (None, place))
            stood[lane] = at + 1, place
            return pack

        for lane in planned:
            for _ in range(stood[lane][0], self.step):
                next_pack(lane)
        for step in count(self.step + 1):
            if end is not None and step > end:
                return
            batch = {lane: next_pack(lane) for lane in planned}
            if end is None and not any(batch.values()):
                return
            self._places.append((step, dict(stood)))
            yield [batch[lane] or [] for lane in mine]

    def _note(self, faults: Iterable[tuple[int, str, str]]) -> None:
        for row, kind, message in faults:
            self.faults.add(row, self.dataset.name(row), DataFault(kind, message))
            if len(self.faults.faulty) > self.faults.allowed + NAMED_FAULTS:
                self.faults.check()


def with_all_places(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks' loaders at one step as one, from which any number of ranks goes on at once."""
    places = {lane: place for state in states for lane, place in state["places"].items()}
    return {**states[0], "places": places}


def _places_of(state: Mapping[str, Any], lanes: int) -> dict[int, tuple[int, Place]]:
    """Of each lane whose place a state tells, the step at which it stood there, and the place. Raises ValueError for
    what no loader of so many lanes has written."""
    step, told = state.get("step"), state.get("places", {})  # states had no places once
    if type(step) is not int or step < 0 or not isinstance(told, Mapping):
        raise ValueError(f"a state has a step >= 0 and its lanes' places, got {step!r:.80} and {told!r:.80}")
    numbers, places = {str(lane): lane for lane in range(lanes)}, {}
    for lane, values in told.items():
        match values:
            case [int(at), *place] if lane in numbers and 0 <= at <= step:
                places[numbers[lane]] = at, Place.parse(place)
            case _:
                raise ValueError(
                    f"places must be of lanes 0 to {lanes - 1}, each with a step from 0 to {step} first, got "
                    f"{values!r:.80} for lane {lane!r:.80}"
                )
    return places


def _order(
    dataset: GranDataset, lanes: int, seed: int, lengths: Lengths, weights: Sequence[float] | None
) -> Order | Mixed:
    """Raises ValueError for weights that don't fit the datasets."""
    parts = dataset.parts
    if weights is not None and (len(weights) != len(parts) or not all(0 < weight < math.inf for weight in weights)):
        raise ValueError(f"weights must be a finite number > 0 for each of {len(parts)} datasets, got {list(weights)}")
    ends = np.cumsum([len(part) for part in parts])
    orders = []
    for number, (part, end) in enumerate(zip(parts, ends.tolist(), strict=True)):
        # Another seed for each, or two datasets of the same pictures would show them at the same time.
        own = zlib.crc32(f"{seed} {number}".encode()) if number else seed
        orders.append(Order(part.groups, lanes, own, lengths.image[end - len(part) : end]))
    return orders[0] if len(orders) == 1 else Mixed(orders, weights)


class _Counted(Dataset):
    """Lanes in; how many packs each has, out."""

    def __init__(self, lanes: list[Lane]) -> None:
        self.lanes = lanes

    def __getitem__(self, lane: int) -> int:
        return sum(1 for _ in self.lanes[lane])


def _count_packs(lanes: list[Lane]) -> list[int]:
    """How many packs each lane has, counted by a process a core where there are many rows."""
    processes = min(os.cpu_count() or 1, len(lanes), len(lanes[0].lengths.image) // PROCESS_ROWS)
    loader = DataLoader(
        _Counted(lanes),
        batch_size=None,
        sampler=range(len(lanes)),
        num_workers=processes if processes > 1 else 0,
        collate_fn=as_it_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else each start draws a number of the training's own
    )
    return list(progress(begun(loader), "Counting sequences", len(lanes)))


class _Steps(Sampler):
    """What each process reads of each step, in turn: process p's are lanes p, p + processes, ... of this rank, so that
    a row group is read by one of them."""

    def __init__(self, loader: PackLoader, processes: int) -> None:
        self._loader, self._processes = loader, processes

    def __iter__(self) -> Iterator[list[Pack]]:
        for packs in self._loader.plan():
            yield from (packs[process :: self._processes] for process in range(self._processes))


class _Reader(Dataset):
    """Packs in; what was read for them, and the faults that were found, out."""

    def __init__(
        self,
        dataset: GranDataset,
        processor: GranViTProcessor,
        tasks: tuple[str, ...],
        threads: int,
        pixels: bool,
        crops: Crops | None,
    ) -> None:
        self.dataset, self.processor, self.tasks, self.threads, self.pixels = dataset, processor, tasks, threads, pixels
        self.crops = crops
        self.backlog: Backlog | None = None

    def __getitem__(self, packs: list[Pack]) -> tuple[Sent, list[tuple[int, str, str]]]:
        """Read and tokenised. A row with a fault leaves its slot empty."""
        for part in self.dataset.parts:
            if isinstance(part.rows, ParquetRows):  # every lane has row groups of its own in use
                part.rows.keep(LANE_BYTES * len(packs))
        rows = [place for pack in packs for place in pack]
        faults: list[tuple[int, str, str]] = []  # threads find them in any order
        read = partial(self._read, faults)
        if self.threads > 1:
            with ThreadPoolExecutor(self.threads) as pool:
                read_samples = iter(list(pool.map(read, rows)))
        else:
            read_samples = map(read, rows)
        samples, asked, plan = [], [], []
        for pack in packs:
            plan.append([])
            for _, numbers in pack:
                if (sample := next(read_samples)) is not None:
                    plan[-1].append(len(samples))
                    samples.append(sample)
                    asked.append(self._questions(sample, numbers))
        written = Read(plan, samples, asked, write_parts(samples, asked, self.processor))
        return _send(written, self.backlog), sorted(faults, key=lambda fault: fault[0])

    def _read(self, faults: list[tuple[int, str, str]], place: tuple[int, list[int]]) -> Sample | None:
        row, numbers = place

        def smaller(sample: Sample) -> int:
            return divisor(sample, lambda: self._questions(sample, numbers), self.crops, self.processor)

        return good_or_none(
            lambda note: self.dataset.read(row, note, self.pixels, smaller),
            lambda fault: faults.append((row, fault.kind, str(fault))),
        )

    def _questions(self, sample: Sample, numbers: Sequence[int]) -> list[Question]:
        questions = self.processor.questions(sample, self.tasks)
        return [questions[number] for number in numbers]


# Between processes every tensor costs a file descriptor: images travel as one, each with its shape and its part of it.
Sent = tuple[Tensor, list[tuple[tuple[int, ...], int]], Read]


def _send(read: Read, backlog: Backlog | None) -> Sent:
    images = [sample.image for sample in read.samples]
    images = [image if any(image.stride()) else image[:0] for image in images]  # a blank is one number, repeated
    flat = torch.empty(0, dtype=torch.uint8)
    worker = get_worker_info()
    if worker is not None:  # straight into memory that is shared, instead of a copy to it
        size = sum(image.numel() for image in images)
        backlog.hand(worker.id, size)
        flat = flat.new(flat.untyped_storage()._new_shared(size, device="cpu"))
    if images:
        torch.cat([image.reshape(-1) for image in images], out=flat)
    sizes = [(tuple(sample.image.shape), image.numel()) for sample, image in zip(read.samples, images, strict=True)]
    return flat, sizes, replace(read, samples=[replace(sample, image=None) for sample in read.samples])


def _receive(flat: Tensor, sizes: list[tuple[tuple[int, ...], int]], read: Read) -> Read:
    pixels = flat.split([size for _, size in sizes])
    images = [
        image.view(shape) if size else flat.new_zeros(()).expand(shape)
        for image, (shape, size) in zip(pixels, sizes, strict=True)
    ]
    samples = [replace(sample, image=image) for sample, image in zip(read.samples, images, strict=True)]
    return replace(read, samples=samples)


def _read_ahead(reader: _Reader, processes: int, sampler: Sampler) -> Iterator[tuple[Read, list[tuple[int, str, str]]]]:
    """What `reader` reads of each of the sampler's, in as many processes in turn, so that Python's lock is never held
    against the training step; 0: in this one. At most PREFETCH_BYTES of pictures lie ahead. Raises what `shared_memory`
    raises."""
    backlog = reader.backlog = Backlog(processes, PREFETCH_BYTES)
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=sampler,
        num_workers=processes,
        prefetch_factor=4 if processes else None,
        collate_fn=as_it_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else each start draws a number of the training's own
    )
    try:
        with shared_memory(processes):
            reads = begun(loader)  # by a name, so that it outlives the loop: its end waits for its processes
            for number, (sent, faults) in enumerate(reads):
                if processes:
                    backlog.take(number % processes, sent[0].numel())
                yield _receive(*sent), faults
    finally:  # a process that waits for room would not see that the loader is over
        backlog.release()
