"""A source's records in an index, and the shards that are made of them, in any order and by any process.

    OUTPUT/.unfinished/   index.sqlite    one record an image, in order; on disk, since there may be millions
                          00007.parquet   a shard and, once it is whole, 00007.json: what was kept, dropped and faulty
                          partial/        shards in work, and those that a worker died over

Every file appears by a rename, so a shard is there whole or not at all: kill -9 at any moment loses the shards in work.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from granvit.data.files import state
from granvit.data.parallel import progress_bar
from granvit.data.records import Notes, Record, Source
from granvit.data.schema import FEATURES
from granvit.errors import Failed
from granvit.metrics_log import write_aside
from granvit.questions.schema import DataFault

WORK, PARTIAL = ".unfinished", "partial"
SHARD = re.compile(r"(.+)-\d+-of-\d+\.parquet")
"""What a split's files are called."""
DEATHS = 3
"""A shard that as many workers died over ends the build."""
ROW_GROUP_ROWS, ROW_GROUP_BYTES = 64, 16_000_000
"""A Parquet row group ends at either: it is what a reader of one row has to fetch."""


def write_index(source: Source, work: Path, exclude: frozenset[str]) -> None:
    """Write every record into index.sqlite, and what was noted on the way into index.json."""
    path, scratch = work / "index.partial", work / "scratch"
    for leftover in (path, work / "index.partial-journal"):
        leftover.unlink(missing_ok=True)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    notes = Notes()
    with closing(sqlite3.connect(path)) as database, progress_bar() as bar:
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
    write_aside(work / "index.json", json.dumps(counts))
    path.rename(work / "index.sqlite")


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
        unfinished.write_text(json.dumps(made))
        unfinished.rename(path.with_suffix(".json"))
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
