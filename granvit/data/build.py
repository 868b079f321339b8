"""Building a Gran dataset from a source: indexed, cut into shards, made by several processes, resumed after a kill.

OUTPUT/.unfinished/   plan.json: what is being built from what; the same command goes on, another is refused. What
                      else is there: `granvit.data.shards`
OUTPUT/               train-00000-of-00042.parquet, and README.md, a dataset card; then .unfinished is gone
"""

from __future__ import annotations

import fcntl
import json
import logging
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from granvit.data.faults import FaultLog
from granvit.data.files import state
from granvit.data.parallel import over_processes, progress_bar
from granvit.data.records import Source
from granvit.data.shards import PARTIAL, SHARD, WORK, Shards, write_index
from granvit.data.writer import check_split
from granvit.metrics_log import write_aside
from granvit.questions.schema import DataFault

log = logging.getLogger(__name__)

FINISHED = ".finished"
NAMED_FAULTS = 1000
"""As many faulty rows are named before a build that is over its budget ends early."""


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
        dropped = [(f"left out: {rule}", number) for rule, number in _most_first(self.dropped)]
        faults = [(f"fault: {kind}", number) for kind, number in _most_first(self.faults)]
        conversations = [("conversations written", self.conversations)] if self.conversations else []
        return [
            (f"{self.unit}s read", self.read), ("rows written", self.kept), ("regions written", self.regions),
            *conversations, *dropped, (f"{self.unit}s with faults", self.faulty), *faults,
        ]  # fmt: skip

    def add(self, made: dict[str, Any]) -> None:
        """Count what a shard has."""
        self.kept += made["kept"]
        self.regions += made["regions"]
        self.conversations += made["conversations"]
        self.dropped.update(made["dropped"])


def _most_first(counts: Counter[str]) -> list[tuple[str, int]]:
    """Equal numbers by name: shards are counted in the order in which they are made."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


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
                write_index(source, work, frozenset(exclude))
            except sqlite3.OperationalError as error:  # the disk is full
                raise OSError(f"{work} can't be written: {error}") from error
        indexed = json.loads((work / "index.json").read_text())
        faults = FaultLog(indexed["read"], fault_budget, source.unit)
        summary = Summary(source.unit, indexed["read"], dropped=Counter(indexed["dropped"]))
        _add_faults(faults, indexed["faults"])
        full, failing = [], []
        records = 0 if _hopeless(faults, faults.faulty) else indexed["records"]
        shards = Shards(source, work.absolute(), shard_rows, described["inputs"])
        for made in _make_all(shards, records, partial(over, workers=workers), title):
            _add_faults(faults, made["faults"])
            summary.add(made)
            full += [made["number"]] if made["kept"] else []
            failing += [made["number"]] if made["faults"] else []
            if _hopeless(faults, faults.faulty):
                break
        summary.faults, summary.faulty = faults.counts, len(faults.faulty)
        try:
            faults.check()
            if not summary.kept:
                rules = ", ".join(f"{rule} {number}" for rule, number in _most_first(summary.dropped))
                left_out = f"; left out: {rules}" if rules else ""
                raise ValueError(f"there is no usable {source.unit}: {faults.summary()}{left_out}")
        except ValueError:
            for shard in failing:  # to be made anew: what was missing may be there the next time
                (work / f"{shard:05d}.json").unlink()
            if not indexed["records"]:
                (work / "index.sqlite").unlink()
            (work / "refused").touch()
            raise
        _publish(output_dir, work, split, sorted(full))
        _write_card(output_dir, split, summary, described["source"].removeprefix("granvit.data."))
        _finish(work)
    return summary


def _make_all(
    shards: Shards, records: int, over: Callable[[Shards, Sequence[int]], Iterator[dict[str, Any]]], title: str
) -> Iterator[dict[str, Any]]:
    """What each shard has, as soon as it is there."""
    numbers = range(-(-records // shards.rows))
    done = shards.done()
    todo = [number for number in numbers if number not in done]
    shutil.rmtree(shards.work / PARTIAL, ignore_errors=True)
    with progress_bar() as bar:
        task = bar.add_task(title, total=records)
        for made in chain(map(shards, sorted(done.intersection(numbers))), over(shards, todo) if todo else ()):
            bar.advance(task, min(shards.rows, records - made["number"] * shards.rows))
            yield made


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
        write_aside(path, json.dumps(described))
        return
    begun = json.loads(path.read_text())
    differing = [key for key in described if begun.get(key) != described[key]]
    if differing == ["inputs"] and (work / "refused").exists():  # the source was mended: all begins anew
        for made in work.glob("[0-9i]*"):
            made.unlink()
        write_aside(path, json.dumps(described))
    elif differing:
        shown = "; ".join(f"{key}: {begun.get(key)!r:.300} there, {described[key]!r:.300} now" for key in differing)
        raise ValueError(
            f"{output_dir} holds unfinished work on something else ({shown}); choose another output or delete it"
        )


def _publish(output_dir: Path, work: Path, split: str, numbers: list[int]) -> None:
    """Move the shards to where readers look. A kill on the way leaves what the same command goes on with."""
    for index, number in enumerate(numbers):
        shard = work / f"{number:05d}.parquet"
        if shard.exists():
            shard.rename(output_dir / f"{split}-{index:05d}-of-{len(numbers):05d}.parquet")


def _finish(work: Path) -> None:
    """Have the folder vanish at once."""
    gone = work.with_name(FINISHED)
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
    write_aside(path, _CARD.format(files=files, sections="\n".join(sections)))


_CARD = """---
configs:
- config_name: default
  data_files:
{files}
---
# A Gran dataset

Boxes are relative xyxy after EXIF orientation.

{sections}"""
