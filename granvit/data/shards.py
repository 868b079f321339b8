"""Building a Gran dataset from a source: indexed, cut into shards, made by several processes, resumed after a kill.

    OUTPUT/.unfinished/   plan.json       what is being built from what; the same command goes on, another is refused
                          index.sqlite    one record an image, in order; on disk, since there may be millions
                          00007.parquet   a shard and, once it is whole, 00007.json: what was kept, dropped and faulty
                          partial/        shards in work, and those that a worker died over
    OUTPUT/               train-00000-of-00042.parquet, and README.md, a dataset card; then .unfinished is gone

Every file appears by a rename, so a shard is there whole or not at all: kill -9 at any moment loses the shards in work.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from granvit.data.faults import FaultLog
from granvit.data.files import state
from granvit.data.parallel import over_processes
from granvit.data.schema import FEATURES
from granvit.data.writer import check_split
from granvit.errors import Failed
from granvit.questions.schema import DataFault

log = logging.getLogger(__name__)

WORK, FINISHED, PARTIAL = ".unfinished", ".finished", "partial"
SHARD = re.compile(r"(.+)-\d+-of-\d+\.parquet")
"""What a split's files are called."""
DEATHS = 3
"""A shard that as many workers died over ends the build."""
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 64, 16_000_000
"""A Parquet row group ends at either: it is what a reader of one row has to fetch."""
NAMED_FAULTS = 1000
"""As many faulty rows are named before a build that is over its budget ends early."""


@dataclass(frozen=True)
class Record:
    """An image of a source, before it is opened.

    id: of the row that it becomes, unique in the source. name: what a fault calls it: file and line, or the like.
    data: whatever `Source.row` needs, as JSON can hold it. aliases: ids that the same picture has in other sources;
    a picture is excluded by any of them.
    """

    id: str
    name: str
    data: Any
    aliases: tuple[str, ...] = ()


class Notes:
    """What happened to records on the way: parts left out by a rule, and faults."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.faults: list[tuple[str, str, str, str]] = []  # what has it, its name, kind, message
        self.unread = 0

    def drop(self, rule: str, number: int = 1) -> None:
        """Count what is left out on purpose; `rule` says why, and of what: "crowd region"."""
        if number:
            self.dropped[rule] += number

    def skip(self, rule: str) -> None:
        """Count what was read and, on purpose, becomes no record: "image without annotation"."""
        self.unread += 1
        self.drop(rule)

    def fault(self, record: Record, fault: DataFault) -> None:
        """Note a fault of a record, or of one of its regions. It counts against the fault budget."""
        self.faults.append((record.id, record.name, fault.kind, str(fault)))

    def unreadable(self, name: str, fault: DataFault) -> None:
        """Note a fault of what should have become a record and could not."""
        self.unread += 1
        self.faults.append((name, name, fault.kind, str(fault)))


class Source(ABC):
    """Where images and what is known of them come from: one class a format, a dataclass of paths and settings.

    Its fields are the command line's flags. Instances go to other processes by pickle; what can't (an open file, a
    model) is made on first use.
    """

    unit = "image"
    """What faults and progress count."""
    features = FEATURES
    """The columns of its rows: CHAT_FEATURES with conversations."""

    @abstractmethod
    def inputs(self) -> list[str]:
        """Files and folders that everything is read from. Raises ValueError where one is missing. A file that changes
        between two calls ends the build."""

    @abstractmethod
    def records(self, notes: Notes, scratch: Path) -> Iterator[Record]:
        """Every image once, in an order that is the same at every call, in bounded memory; `scratch` is an empty
        folder for what does not fit. What is no record is noted as a fault."""

    def row(self, record: Record, notes: Notes) -> dict[str, Any] | None:
        """A record as a row of the schema, checked; None where it is left out by a rule, which is noted. Raises
        DataFault; faults of single regions are noted instead."""
        raise NotImplementedError

    def rows(self, records: list[Record], notes: Notes) -> Iterator[dict[str, Any]]:
        """Rows of the records that are good, in order; faults are noted. For sources that work by batches."""
        for record in records:
            try:
                row = self.row(record, notes)
            except DataFault as fault:
                notes.fault(record, fault)
            except RecursionError:  # what was parsed just so may be too deep to be shown
                notes.fault(record, DataFault("nesting", "nested too deeply"))
            else:
                if row is not None:
                    yield row


@dataclass
class Summary:
    """What a build read, kept and left out. faults: by kind, of `faulty` records."""

    unit: str
    read: int = 0
    kept: int = 0
    regions: int = 0
    conversations: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    faulty: int = 0

    def table(self) -> Table:
        table = Table(show_header=False, box=None)
        for name, number in self.lines():
            table.add_row(name, f"{number:,}")
        return table

    def lines(self) -> list[tuple[str, int]]:
        dropped = [(f"left out: {rule}", number) for rule, number in self.dropped.most_common()]
        faults = [(f"fault: {kind}", number) for kind, number in self.faults.most_common()]
        conversations = [("conversations written", self.conversations)] if self.conversations else []
        return [
            (f"{self.unit}s read", self.read), ("rows written", self.kept), ("regions written", self.regions),
            *conversations, *dropped, (f"{self.unit}s with faults", self.faulty), *faults,
        ]  # fmt: skip


def build_dataset(
    source: Source,
    output_dir: str | Path,
    split: str = "train",
    workers: int | None = None,
    shard_rows: int = 1000,
    fault_budget: float = 0.01,
    exclude: Collection[str] = (),
    title: str = "Converting",
    over: Callable[[Shards, Sequence[int], int | None], Iterator[dict[str, Any]]] = over_processes,
) -> Summary:
    """Write a source as a Gran dataset of Parquet files with one split, or go on with it where it was stopped.

    workers: processes (None: one a core; 0: this one). shard_rows: images a shard, the unit of work. fault_budget:
    the share of images that may have faults. exclude: ids of rows to leave out, or aliases of theirs. over: what calls
    `Shards` with each of several numbers, on so many workers, and yields what it returns in any order; else processes
    of this machine.

    Every fault is logged with its record's name. Raises ValueError where an input is missing, `output_dir` holds
    anything but this very build, or there is nothing to write, and FaultBudgetExceeded when too many images have
    faults; then what was made stays, and the same command goes on with a larger budget or a mended source.
    """
    check_split(split)
    output_dir = Path(output_dir)
    kind = type(source)
    described = {
        "source": f"{kind.__module__}.{kind.__qualname__}",
        "settings": json.loads(json.dumps(asdict(source), default=str)),
        "inputs": {location: state(location) for location in source.inputs()},
        "split": split,
        "shard_rows": shard_rows,
        "exclude": sorted(exclude),
    }
    FaultLog(0, fault_budget)  # a budget that is none must be said now
    if shard_rows < 1:
        raise ValueError(f"shard_rows must be >= 1, got {shard_rows}")
    with _work_folder(output_dir, split) as work:
        _claim(work, described, output_dir)
        if not (work / "index.sqlite").exists():
            try:
                _index(source, work, frozenset(exclude))
            except sqlite3.OperationalError as error:  # the disk is full
                raise OSError(f"{work} can't be written: {error}") from error
        indexed = json.loads((work / "index.json").read_text())
        faults = FaultLog(indexed["read"], fault_budget, source.unit)
        summary = Summary(source.unit, indexed["read"], dropped=Counter(indexed["dropped"]))
        _add_faults(faults, indexed["faults"])
        failing = []
        records = 0 if _hopeless(faults, faults.faulty) else indexed["records"]
        shards = Shards(source, work.absolute(), shard_rows, described["inputs"])
        for made in _make_all(shards, records, partial(over, workers=workers), title):
            _add_faults(faults, made["faults"])
            summary.kept += made["kept"]
            summary.regions += made["regions"]
            summary.conversations += made["conversations"]
            summary.dropped.update(made["dropped"])
            failing += [made["number"]] if made["faults"] else []
            if _hopeless(faults, faults.faulty):
                break
        summary.faults, summary.faulty = faults.counts, len(faults.faulty)
        try:
            faults.check()
            if not summary.kept:
                rules = ", ".join(f"{rule} {number}" for rule, number in summary.dropped.most_common())
                left_out = f"; left out: {rules}" if rules else ""
                raise ValueError(f"there is no usable {source.unit}: {faults.summary()}{left_out}")
        except ValueError:
            for shard in failing:  # to be made anew: what was missing may be there the next time
                (work / f"{shard:05d}.json").unlink()
            if not indexed["records"]:
                (work / "index.sqlite").unlink()
            (work / "refused").touch()
            raise
        _publish(output_dir, work, split, summary, described)
    return summary


@contextmanager
def _work_folder(output_dir: Path, split: str) -> Iterator[Path]:
    """OUTPUT/.unfinished, held by this process alone. A folder in which nothing was made yet vanishes with an error."""
    work = output_dir / WORK
    if output_dir.exists() and not work.is_dir():
        _check_free(output_dir, split)
    there = output_dir.exists()
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"another process is building {output_dir}") from None
        except OSError as error:  # some network file systems have no locks
            log.warning("%s can't be locked (%s): see that no other process builds there", output_dir, error)
        try:
            yield work
        except BaseException:  # work that never began leaves nothing behind
            if work.is_dir() and not (work / "index.sqlite").exists():
                shutil.rmtree(work)
                if not there:
                    output_dir.rmdir()
            raise


def _check_free(output_dir: Path, split: str) -> None:
    """Raises ValueError unless the folder is empty or holds other splits that were built here."""
    names = [path.name for path in output_dir.iterdir()] if output_dir.is_dir() else [output_dir.name]
    shards = {name: match[1] for name in names if (match := SHARD.fullmatch(name))}
    if split in shards.values():
        raise ValueError(f"output must be a new or an empty folder, or lack the split {split!r}, got {output_dir}")
    if set(names) - set(shards) - {"README.md", FINISHED} or (names and not shards):
        raise ValueError(f"output must be a new or an empty folder, got {output_dir}")


def check_built(folder: Path) -> None:
    """Raises ValueError unless `build_dataset` has written the folder, and is done with it."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "README.md" not in names or not any(map(SHARD.fullmatch, names)):
        raise ValueError(f"{folder} is no dataset that convert, annotate or filter wrote (README.md and Parquet files)")
    if WORK in names:
        raise ValueError(f"{folder} holds unfinished work: run the command that wrote it to its end")


def _claim(work: Path, described: dict[str, Any], output_dir: Path) -> None:
    """Note what is being built. Raises ValueError naming what differs from what was begun here."""
    path = work / "plan.json"
    if not path.exists() or not (work / "index.sqlite").exists():  # else nothing was made that could be lost
        _write(path, json.dumps(described))
        return
    begun = json.loads(path.read_text())
    differing = [key for key in described if begun.get(key) != described[key]]
    if differing == ["inputs"] and (work / "refused").exists():  # the source was mended: all begins anew
        for made in work.glob("[0-9i]*"):
            made.unlink()
        _write(path, json.dumps(described))
    elif differing:
        shown = "; ".join(f"{key}: {begun.get(key)!r:.300} there, {described[key]!r:.300} now" for key in differing)
        raise ValueError(
            f"{output_dir} holds unfinished work on something else ({shown}); choose another output or delete it"
        )


def _index(source: Source, work: Path, exclude: frozenset[str]) -> None:
    """Write every record into index.sqlite, and what was noted on the way into index.json."""
    path, scratch = work / "index.partial", work / "scratch"
    for leftover in (path, work / "index.partial-journal"):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    notes = Notes()
    with closing(sqlite3.connect(path)) as database, _progress() as bar:
        task = bar.add_task(f"Indexing {source.unit}s", total=None)
        database.execute("PRAGMA synchronous = OFF")  # the rename makes it whole; a power cut begins anew
        database.execute("CREATE TABLE records (n INTEGER PRIMARY KEY, id TEXT UNIQUE, name TEXT, data TEXT)")
        count = read = 0
        for record in source.records(notes, scratch):
            read += 1
            if not exclude.isdisjoint((record.id, *record.aliases)):
                notes.drop("excluded")
                continue
            try:
                values = (count, record.id, record.name, json.dumps(record.data))
            except RecursionError:
                read -= 1
                notes.unreadable(record.name, DataFault("nesting", "nested too deeply"))
                continue
            added = database.execute("INSERT OR IGNORE INTO records VALUES (?, ?, ?, ?)", values).rowcount
            if added:
                count += 1
            else:
                [first] = database.execute("SELECT name FROM records WHERE id = ?", (record.id,)).fetchone()
                read -= 1
                notes.unreadable(record.name, DataFault("id", f"id {record.id!r} is already that of {first}"))
            if read % 1000 == 0:
                bar.update(task, completed=read)
        database.commit()
    shutil.rmtree(scratch)
    counts = {"records": count, "read": read + notes.unread, "dropped": notes.dropped, "faults": notes.faults}
    _write(work / "index.json", json.dumps(counts))
    path.rename(work / "index.sqlite")


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal)


def _make_all(
    shards: Shards, records: int, over: Callable[[Shards, Sequence[int]], Iterator[dict[str, Any]]], title: str
) -> Iterator[dict[str, Any]]:
    """What each shard has, as soon as it is there."""
    numbers = range(-(-records // shards.rows))
    done = shards.done()
    todo = [number for number in numbers if number not in done]
    shutil.rmtree(shards.work / PARTIAL, ignore_errors=True)
    with _progress() as bar:
        task = bar.add_task(title, total=records)
        for made in chain(map(shards, sorted(done.intersection(numbers))), over(shards, todo) if todo else ()):
            bar.advance(task, min(shards.rows, records - made["number"] * shards.rows))
            yield made


@dataclass(frozen=True)
class Shards:
    """The shards of an index, made one by one wherever an instance of this is sent: in the same process or in another,
    which may run on another machine that sees the same files.

    work: an absolute path. rows: records a shard. inputs: `files.state` of each of the source's inputs.
    """

    source: Source
    work: Path
    rows: int
    inputs: dict[str, str]

    def done(self) -> set[int]:
        """Numbers of the shards that are there."""
        return {int(path.stem) for path in self.work.glob("[0-9]*.json")}

    def check(self) -> None:
        """Raises Failed where this machine doesn't see the files that the index was made of."""
        for location, known in {str(self.work / "plan.json"): None, **self.inputs}.items():
            try:
                seen = state(location)
            except (ValueError, OSError) as error:
                raise Failed(f"{error}; all machines must see the same files at the same paths") from None
            if known not in (None, seen):
                raise Failed(f"{location} is another file here than where the work began")

    def __call__(self, number: int) -> dict[str, Any]:
        """What a shard has: its `number`, how much was `kept`, and so on. It is made unless it is there."""
        path = self.work / f"{number:05d}.parquet"
        if path.with_suffix(".json").exists():
            return json.loads(path.with_suffix(".json").read_text())
        records = self._records(number)
        unfinished = self.work / PARTIAL / f"{number:05d}.{uuid4().hex}"
        unfinished.parent.mkdir(exist_ok=True)
        if len(list(unfinished.parent.glob(f"{number:05d}.*"))) >= DEATHS:
            first, last = records[0].name, records[-1].name
            raise Failed(f"{DEATHS} workers died, for want of memory perhaps, each while it read {first} to {last}")
        notes, kept, regions, conversations = Notes(), 0, 0, 0
        with RowWriter(unfinished, self.source.features) as writer:
            for row in self.source.rows(records, notes):
                writer.write(row)
                kept, regions = kept + 1, regions + len(row["regions"])
                conversations += len(row.get("conversations", ()))
        unfinished.rename(path)
        made = {"number": number, "kept": kept, "regions": regions, "conversations": conversations}
        made |= {"dropped": notes.dropped, "faults": notes.faults}
        _write(path.with_suffix(".json"), json.dumps(made))
        return made

    def _records(self, number: int) -> list[Record]:
        index = self.work / "index.sqlite"
        with closing(sqlite3.connect(f"{index.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            query = "SELECT id, name, data FROM records WHERE n >= ? AND n < ? ORDER BY n"
            rows = database.execute(query, (number * self.rows, (number + 1) * self.rows)).fetchall()
        return [Record(row_id, name, json.loads(data)) for row_id, name, data in rows]


class RowWriter:
    """Writes rows of the schema to a Parquet file, a row group at a time."""

    def __init__(self, path: Path, features: Features = FEATURES) -> None:
        self._schema = features.arrow_schema
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._writer.close()

    def write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._bytes += len(row["image"]["bytes"]) if row["image"] else 0
        if len(self._rows) >= ROW_GROUP_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._bytes = [], 0


def _publish(output_dir: Path, work: Path, split: str, summary: Summary, described: dict[str, Any]) -> None:
    """Move the shards to where readers look. A kill on the way leaves what the same command goes on with."""
    full = [path.stem for path in sorted(work.glob("[0-9]*.json")) if json.loads(path.read_text())["kept"]]
    for index, stem in enumerate(full):
        shard = work / f"{stem}.parquet"
        if shard.exists():
            shard.rename(output_dir / f"{split}-{index:05d}-of-{len(full):05d}.parquet")
    _write_card(output_dir, split, summary, described["source"].removeprefix("granvit.data."))
    gone = output_dir / FINISHED
    shutil.rmtree(gone, ignore_errors=True)
    work.rename(gone)
    shutil.rmtree(gone)


def _write_card(output_dir: Path, split: str, summary: Summary, source: str) -> None:
    """The dataset card: which files are which split, for `datasets`, and what each split was made of, for people."""
    path = output_dir / "README.md"
    sections = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.M)[1:] if path.exists() else []
    counts = "\n".join(f"| {name} | {number} |" for name, number in summary.lines())
    section = f"## {split}\n\nMade by `python -m granvit.data` from {source}.\n\n| | |\n|---|---|\n{counts}\n"
    sections = [other.strip() + "\n" for other in sections if not other.startswith(f"## {split}\n")] + [section]
    splits = sorted({match[1] for file in output_dir.iterdir() if (match := SHARD.fullmatch(file.name))})
    files = "\n".join(f'  - split: {name}\n    path: "{name}-*.parquet"' for name in splits)
    _write(path, _CARD.format(files=files, sections="\n".join(sections)))


_CARD = """---
configs:
- config_name: default
  data_files:
{files}
---
# A Gran dataset

Boxes are relative xyxy after EXIF orientation.

{sections}"""


def _add_faults(log: FaultLog, faults: Iterable[tuple[str, str, str, str]]) -> None:
    added: list[tuple[str, str, DataFault]] = []
    rows = set(log.faulty)
    for key, name, kind, message in faults:
        if _hopeless(log, rows):
            break
        rows.add(key)
        added.append((key, name, DataFault(kind, message)))
    log.add_all(added)


def _hopeless(log: FaultLog, faulty: Collection[int | str]) -> bool:
    """Whether so many rows have faults that naming more of them helps nobody."""
    return len(faulty) > max(log.allowed, NAMED_FAULTS)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
