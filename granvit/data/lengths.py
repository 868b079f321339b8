"""How many tokens every image and question of a dataset takes: what batches are planned from, without a picture."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from granvit.data.loader import GranDataset
from granvit.data.parallel import begun, end_with_parent, progress
from granvit.data.schema import good_or_none
from granvit.machine import cache_folder
from granvit.questions.schema import DataFault, Region, Sample

if TYPE_CHECKING:
    from granvit.model import GranViTProcessor

log = logging.getLogger(__name__)

_CHUNK = 512  # rows that are tokenised together
_BLOCK = 1 << 20  # rows that are looked at together: millions more would take gigabytes for a moment
_WORTH = 4096  # rows that are worth a process more
_NOTHING = 1 << 40  # tokens of what can't be asked
_ARRAYS = {"image": np.int32, "starts": np.int64, "question": np.int32, "task": np.int8}
TOO_LONG = "the image with its shortest question takes more than {} tokens"


@dataclass(frozen=True)
class Lengths:
    """Tokens of N rows and their Q questions.

    image: int32 [N], the image part, of a row without picture bos alone; 0 where a row can't be used or nothing can be
        asked of it.
    starts: int64 [N + 1]: the questions of row i, in the order of `processor.questions`, are starts[i]:starts[i + 1].
    question: int32 [Q], prompt and answer, of all turns. task: int8 [Q], index into `tasks`.
    faults: (row, kind, message) of what could be seen without the pictures.
    """

    tasks: tuple[str, ...]
    image: np.ndarray
    starts: np.ndarray
    question: np.ndarray
    task: np.ndarray
    faults: list[tuple[int, str, str]]

    def shortest(self, weights: Mapping[str, float]) -> np.ndarray:
        """int64 [N]: tokens of each image with its shortest question of weight above 0; else _NOTHING or more."""
        asked = np.array([weights[task] > 0 for task in self.tasks])
        shortest = np.full(len(self.image), _NOTHING, np.int64)
        for first in range(0, len(self.image), _BLOCK):
            starts = self.starts[first : first + _BLOCK + 1]
            questions = slice(starts[0], starts[-1])
            length = np.where(asked[self.task[questions]], self.question[questions], np.int64(_NOTHING))
            some = np.flatnonzero(np.diff(starts))  # reduceat takes an empty stretch for one of a single number
            if len(some):
                shortest[first + some] = np.minimum.reduceat(length, starts[some] - starts[0])
        shortest += self.image
        return shortest

    def checksum(self, *more: np.ndarray) -> int:
        """Of all numbers, and of further int64 arrays: what is planned from other lengths is another plan."""
        return _crc(more, self._own_crc)

    @cached_property
    def _own_crc(self) -> int:
        """Of all numbers, which can be gigabytes: the cache is checked by it, and the loader's state."""
        return _crc(getattr(self, name) for name in _ARRAYS)


def _crc(arrays: Iterable[np.ndarray], crc: int = 0) -> int:
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array), crc)
    return crc


def too_long(shortest: np.ndarray, capacity: int) -> np.ndarray:
    """int64: the rows with questions, of which none fits together with the image; shortest: `Lengths.shortest`."""
    return np.flatnonzero((shortest > capacity) & (shortest < _NOTHING))


def image_length(sample: Sample, processor: GranViTProcessor) -> int:
    """Tokens of a sample's image part."""
    return len(processor.image_part(processor.image_tokens(*sample.image.shape[:2])))


def measure(dataset: GranDataset, processor: GranViTProcessor, tasks: Sequence[str]) -> Lengths:
    """The lengths of a dataset, read from the cache where they were measured before.

    The first time every row's text is read and tokenised, by a process a core where there are many, with a progress
    bar; of several processes on one machine (ranks) one does it and the others wait. The cache (`cache_folder`) knows
    dataset, tokenizer and settings apart; a mixture's datasets are measured one by one.
    """
    if len(dataset.parts) > 1:
        return _joined([measure(part, processor, tasks) for part in dataset.parts])
    folder = cache_folder() / f"lengths-{_fingerprint(dataset, processor, tasks)}"
    lengths = _cached(folder, tasks, quiet=True)
    if lengths is None:
        with _in_turn(folder):
            lengths = _cached(folder, tasks)
            if lengths is None:
                lengths = _measure(dataset, processor, tuple(tasks))
                _save(folder, lengths)
                lengths = _cached(folder, tasks, quiet=True) or lengths
    return lengths


@contextmanager
def _in_turn(folder: Path) -> Iterator[None]:
    """Of a machine's processes one at a time, where the file system has locks."""
    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(folder.with_suffix(".lock").open("w")), fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s can't be locked (%s): each process measures lengths for itself", folder.parent, error)
        yield


def _cached(folder: Path, tasks: Sequence[str], quiet: bool = False) -> Lengths | None:
    """None, with a warning unless `quiet`, where they can't be read. The arrays are mapped, not read: of many millions
    of rows they take gigabytes, which the ranks of a machine share."""
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        arrays = {
            name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _ARRAYS
        }
        lengths = Lengths(tuple(tasks), faults=[tuple(fault) for fault in about["faults"]], **arrays)
        for name, dtype in _ARRAYS.items():
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                raise ValueError(f"{name}.npy is no list of {dtype.__name__}")
        if _checksum(lengths) != about["checksum"]:
            raise ValueError("its checksum is another")
        return lengths
    except Exception as error:  # numpy and json raise whatever the damage leads to
        if not quiet:
            log.warning("lengths are measured anew, as %s can't be read: %s", folder, error)
        return None


def _save(folder: Path, lengths: Lengths) -> None:
    # Machines that share the folder may write at once: each to a name of its own first.
    partial = folder.with_name(f".{folder.name}-{uuid4().hex}")
    try:
        partial.mkdir()
        for name in _ARRAYS:
            np.save(partial / f"{name}.npy", getattr(lengths, name))
        about = {"checksum": _checksum(lengths), "faults": lengths.faults}
        (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # one that can't be read
        folder.unlink(missing_ok=True)
        partial.rename(folder)
    except OSError as error:
        log.warning("lengths will be measured again next time, as %s can't be written: %s", folder, error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checksum(lengths: Lengths) -> int:
    return zlib.crc32(json.dumps(lengths.faults).encode(), lengths.checksum())


def lengths_of(samples: Sequence[Sample | None], processor: GranViTProcessor, tasks: Sequence[str]) -> Lengths:
    """The lengths of rows; None stands for one that can't be used. Only images' sizes are looked at."""
    written = [[] if sample is None else processor.questions(sample, tasks) for sample in samples]
    image = [image_length(sample, processor) if asked else 0 for sample, asked in zip(samples, written, strict=True)]
    flat = [question for asked in written for question in asked]
    turns = processor.turn_ids(flat)
    return Lengths(
        tuple(tasks),
        np.array(image, dtype=np.int32),
        np.cumsum([0, *map(len, written)], dtype=np.int64),
        np.array([sum(len(p) + len(a) for p, a in question) for question in turns], dtype=np.int32),
        np.array([tasks.index(question.task) for question in flat], dtype=np.int8),
        [],
    )


def _joined(parts: Sequence[Lengths]) -> Lengths:
    """The lengths of one dataset's rows behind another's."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("image", "question", "task")}
    starts = np.cumsum(np.concatenate([[0], *(np.diff(part.starts) for part in parts)]))
    firsts = np.cumsum([0, *(len(part.image) for part in parts)]).tolist()
    pairs = zip(parts, firsts, strict=False)
    faults = [(first + row, *fault) for part, first in pairs for row, *fault in part.faults]
    return Lengths(parts[0].tasks, starts=starts, faults=faults, **arrays)


def _measure(dataset: GranDataset, processor: GranViTProcessor, tasks: tuple[str, ...]) -> Lengths:
    chunks = [range(start, min(start + _CHUNK, len(dataset))) for start in range(0, len(dataset), _CHUNK)]
    workers = min(os.cpu_count() or 1, len(dataset) // _WORTH)
    reader = _Measured(dataset, processor, tasks)
    loader = DataLoader(
        reader,
        batch_size=None,
        sampler=chunks,
        num_workers=workers if workers > 1 else 0,
        collate_fn=as_it_is,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # else each start draws a number of the training's own
    )
    measured = [reader[range(0)], *progress(begun(loader), "Measuring questions", len(chunks))]
    faults = [fault for _, several in measured for fault in several]
    return replace(_joined([part for part, _ in measured]), faults=faults)


class _Measured(Dataset):
    """Rows in; their lengths, and the faults that can be seen without the pictures, out."""

    def __init__(self, dataset: GranDataset, processor: GranViTProcessor, tasks: tuple[str, ...]) -> None:
        self.dataset, self.processor, self.tasks = dataset, processor, tasks

    def __getitem__(self, rows: range) -> tuple[Lengths, list[tuple[int, str, str]]]:
        faults: list[tuple[int, str, str]] = []

        def annotations(row: int) -> Sample | None:
            def note(fault: DataFault) -> None:
                faults.append((row, fault.kind, str(fault)))

            return good_or_none(lambda note: self.dataset.read(row, note, decode=False), note)

        return lengths_of([annotations(row) for row in rows], self.processor, self.tasks), faults


def as_it_is(value: Any) -> Any:
    """For a DataLoader, which would make tensors of arrays and of numbers."""
    return value


def start_worker(_: int) -> None:
    """For a DataLoader's workers: tokenizers warn after a fork, and their threads are not wanted beside processes.
    Ctrl-C, which comes to them too, is the parent's to handle: a run needs them for the step that it saves."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(keep_from_sigterm=True)


def _fingerprint(dataset: GranDataset, processor: GranViTProcessor, tasks: Sequence[str]) -> str:
    # How questions are written is told by those of a sample of its own, so that no change of the code goes unseen.
    pixel = torch.zeros((), dtype=torch.uint8).expand(480, 640, 3)
    region = Region((0.1, 0.2, 0.6, 0.9), "a red ball, 7 <loc_1>", "natural")
    chat = (("What is it?", "A ball."), ("Which colour?", "Red."))
    sample = Sample("", pixel, "a scene", (region, replace(region, caption="OPEN 24 HOURS")), "", "", (chat,))
    ids = processor.turn_ids(processor.questions(sample, tasks))
    ids = [processor.image_part(0), ids]
    budget = [processor.patch_size, processor.max_image_tokens, processor.pixel_shuffle]
    vocabulary = processor.tokenizer.backend_tokenizer.to_str()
    known = json.dumps([dataset.fingerprint, len(dataset), list(tasks), ids, budget, vocabulary])
    return hashlib.sha256(known.encode()).hexdigest()[:16]
