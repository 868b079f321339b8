"""Rows of Parquet files, here or wherever fsspec reaches, found by an index of row-group counts; nothing is copied."""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from granvit.data.files import is_remote, state

READERS = 16  # footers read at a time: over a network each costs a round trip or two
OPEN_FILES = 16
KEPT_BYTES = 1 << 30
"""Row groups that were read are kept up to this size, the latest in any case: rows are asked for in mixed order."""


class ParquetRows:
    """Map-style rows of Parquet files: `rows[i]` is a dict, `rows["id"]` a column's values.

    A row costs its whole row group, of which the latest are kept: read rows of a group soon after each other.
    Reads of several threads take turns; each process opens files of its own.

    groups: int64 [G], rows of each row group, in order. fingerprint: of the files' footers, which hold the size and the
    bounds of every column's every part: it tells these rows from others wherever they lie, and from what the files held
    before they changed.
    Raises ValueError where a file is no Parquet or the files' columns differ, and in reading where one that is opened
    again, or in another process, has changed or gone.
    """

    def __init__(self, files: Sequence[str]) -> None:
        self.files = list(files)
        with ThreadPoolExecutor(READERS) as pool:
            footers = list(pool.map(_footer, self.files))
            self._states = list(pool.map(state, self.files))
        self.column_names = footers[0].schema.to_arrow_schema().names
        for file, footer in zip(self.files, footers, strict=True):
            names = footer.schema.to_arrow_schema().names
            if sorted(names) != sorted(self.column_names):
                raise ValueError(f"{file} has the columns {names}, {self.files[0]} has {self.column_names}")
        counts = [[footer.row_group(g).num_rows for g in range(footer.num_row_groups)] for footer in footers]
        self.groups = np.array([rows for file in counts for rows in file], dtype=np.int64)
        known = hashlib.sha256()
        for footer in footers:
            written = io.BytesIO()
            footer.write_metadata_file(written)
            known.update(written.getvalue())
        self.fingerprint = known.hexdigest()
        # Arrays, not lists: processes that read would each copy millions of Python's numbers to count references.
        self._firsts = np.cumsum([0, *map(len, counts)])  # of each file, the number of its first row group
        self._ends = np.cumsum(self.groups)
        self._columns: list[str] | None = None  # all
        self._limit = KEPT_BYTES
        self._forget()

    def _forget(self) -> None:
        self._lock, self._process = threading.RLock(), os.getpid()
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()
        self._kept = 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_open", "_tables")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            with self._here():
                return [value for g in range(len(self.groups)) for value in self._read(g, [key])[key].to_pylist()]
        if not 0 <= key < len(self):
            raise IndexError(f"row {key} of {len(self)}")
        group = int(np.searchsorted(self._ends, key, side="right"))
        start = int(self._ends[group] - self.groups[group])
        return self._group(group).slice(key - start, 1).to_pylist()[0]

    def remove_columns(self, name: str) -> ParquetRows:
        """The same rows without a column, which is then never read."""
        return self.select_columns([column for column in self.column_names if column != name])

    def select_columns(self, names: Sequence[str]) -> ParquetRows:
        """The same rows with these columns alone; the others are never read."""
        other = object.__new__(ParquetRows)
        other.__setstate__(self.__getstate__())
        other.column_names = other._columns = list(names)
        return other

    def keep(self, size: int) -> None:
        """Keep row groups of at most so many bytes from now on, in this process, and the latest in any case."""
        self._limit = size

    def _group(self, group: int) -> pa.Table:
        with self._here():
            if group in self._tables:
                self._tables.move_to_end(group)
            else:
                self._tables[group] = self._read(group, self._columns)
                self._kept += self._tables[group].nbytes
                while self._kept > self._limit and len(self._tables) > 1:
                    self._kept -= self._tables.popitem(last=False)[1].nbytes
            return self._tables[group]

    def _here(self) -> threading.RLock:
        """The lock of this process, which has opened nothing yet if it was forked: files' offsets would be shared."""
        if self._process != os.getpid():
            self._forget()
        return self._lock

    def _read(self, group: int, columns: list[str] | None) -> pa.Table:
        index = int(np.searchsorted(self._firsts, group, side="right")) - 1
        inside = group - int(self._firsts[index])
        if index not in self._open:
            file = self.files[index]
            if state(file) != self._states[index]:
                raise ValueError(f"{file} has changed since the dataset was opened")
            self._open[index] = _open(file)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        try:
            table = self._open[index].read_row_group(inside, columns=columns, use_threads=False)
            table.validate(full=True)  # that strings are UTF-8, among other things
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{self.files[index]}: row group {inside} can't be read: {error}") from error
        return table


def _open(file: str) -> pq.ParquetFile:
    if is_remote(file):
        return pq.ParquetFile(fsspec.open(file, "rb").open(), pre_buffer=True)
    return pq.ParquetFile(file, memory_map=True)


def _footer(file: str) -> pq.FileMetaData:
    try:
        with _open(file) as opened:
            return opened.metadata
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{file} can't be opened as Parquet: {error}") from error
