"""Reading Gran datasets: a map-style view with a budget for faulty rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np

from granvit.data.faults import FaultLog
from granvit.data.files import is_remote, join, list_files, parent
from granvit.data.parquet import ParquetRows
from granvit.data.schema import FEATURES, good_or_none, parse_row
from granvit.data.shards import SHARD, WORK
from granvit.questions.schema import DataFault, Sample

ACCEPTED = "a folder written by save_to_disk, or Parquet files (one, a folder or a URL of SPLIT*.parquet)"


class GranDataset:
    """A split of a Gran dataset, read row by row: `len(ds)`, `ds[i] -> Sample | None`.

    None stands for a row that can't be used. It is logged with its id and counted in `faults`; a bad region
    of a good image is left out and counted too.

    path_or_dataset: a folder written by `save_to_disk` (a Dataset or a DatasetDict), a folder or file of
        Parquet, here or a URL that fsspec reads, or a `datasets.Dataset` or `DatasetDict`.
    split: which split of those that there are. A source without splits has only "train".
    fault_budget: the share of rows that may have faults before FaultBudgetExceeded is raised.

    groups: int64 [G], runs of rows that lie together: reading them in turn is cheap. Parquet's row groups; in
        Arrow every row for itself.

    Raises ValueError for a folder that is no dataset, a split that isn't there and missing columns.
    """

    def __init__(
        self,
        path_or_dataset: str | Path | datasets.Dataset | datasets.DatasetDict,
        split: str = "train",
        fault_budget: float = 0.01,
    ) -> None:
        if isinstance(path_or_dataset, (str, Path)):
            dataset = open_dataset(str(path_or_dataset))
            self.path = str(path_or_dataset)
        else:
            dataset = path_or_dataset
            self.path = f"<{type(dataset).__name__} in memory>"
        splits = dataset if isinstance(dataset, dict) else {"train": dataset}
        if split not in splits:
            raise ValueError(f"split must be one of {sorted(splits)} in {self.path}, got {split!r}")
        rows = splits[split]
        if not isinstance(rows, (datasets.Dataset, ParquetRows)):
            raise ValueError(
                f"path_or_dataset: got {type(rows).__name__}, which has no rows by number; it takes {ACCEPTED}, or a "
                "datasets.Dataset or DatasetDict (of rows, Dataset.from_list makes one)"
            )
        missing = sorted(set(FEATURES) - set(rows.column_names))
        if missing:
            raise ValueError(f"{self.path} is no Gran dataset: it lacks the columns {missing}, has {rows.column_names}")
        if isinstance(rows, ParquetRows):
            self.groups, self.fingerprint = rows.groups, rows.fingerprint
        else:
            # decode=False: a broken image must come as bytes to us, not as an exception out of `datasets`.
            rows = rows.with_format(None).cast_column("image", datasets.Image(decode=False))
            self.groups, self.fingerprint = np.broadcast_to(np.int64(1), len(rows)), rows._fingerprint
        self.rows, self._texts = rows, rows.remove_columns("image")
        self.split = split
        self.faults = FaultLog(len(rows), fault_budget)

    @property
    def parts(self) -> list[GranDataset]:
        """The datasets that this one is a mixture of (granvit.data.mixture): itself alone."""
        return [self]

    def ids(self) -> list[str]:
        """All rows' ids, faulty ones' too."""
        return self._texts["id"][:]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | None:
        return self._counted(index, decode=True)

    def annotations(self, index: int) -> Sample | None:
        """`self[index]` without its picture, and far faster: `image` is a blank of the row's size."""
        return self._counted(index, decode=False)

    def read(
        self,
        index: int,
        drop: Callable[[DataFault], None],
        decode: bool = True,
        divisor: Callable[[Sample], int] | None = None,
    ) -> Sample:
        """A row, checked (`parse_row`); nothing is counted. Raises DataFault, and IndexError where there is no row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return parse_row((self.rows if decode else self._texts)[index], drop=drop, decode=decode, divisor=divisor)

    def name(self, index: int) -> str:
        """What a fault calls a row."""
        return f"{self.path}[{self.split}][{index}] id={self._texts[index]['id']!r}"

    def _counted(self, index: int, decode: bool) -> Sample | None:
        faults: list[DataFault] = []
        sample = good_or_none(lambda note: self.read(index, note, decode), faults.append)
        for fault in faults:
            self.faults.add(index, self.name(index), fault)
        self.faults.check()
        return sample


def spread(number: int, limit: int | None) -> Sequence[int]:
    """At most `limit` of the numbers below `number`, evenly."""
    return range(number) if limit is None or limit >= number else [i * number // limit for i in range(limit)]


@lru_cache(maxsize=4)
def open_rows(path: str, split: str) -> datasets.Dataset | ParquetRows:
    """The unchecked rows of a split, images still encoded, opened once a process. Raises what GranDataset raises."""
    return GranDataset(path, split).rows


def open_dataset(location: str) -> datasets.Dataset | datasets.DatasetDict | dict[str, ParquetRows]:
    """The dataset at a path or URL, whatever its columns are: see `ACCEPTED`. Raises ValueError where there is none."""
    path = Path(location)
    try:
        if not is_remote(location):
            if (path / WORK).exists():
                raise ValueError("it is not finished; the command that makes it goes on when given again")
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                return datasets.load_from_disk(location)
        if location.endswith(".parquet") and (is_remote(location) or path.is_file()):
            return _from_parquet(parent(location), [location.rpartition("/")[2]])
        if is_remote(location) or path.is_dir():
            names = list_files(location, (".parquet",), follow_links=True)
            if names or is_remote(location):
                return _from_parquet(location, names)
    # What `datasets` raises on damaged files is not documented; these have been seen.
    except (OSError, ValueError, KeyError, IndexError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"the dataset at {location} can't be opened: {error}") from error
    if not path.exists():
        raise ValueError(f"no dataset at {path}: there is nothing there; accepted: {ACCEPTED}")
    names = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else [f"the file {path.name}"]
    raise ValueError(f"no dataset at {path}: found {', '.join(names) or 'an empty folder'}; accepted: {ACCEPTED}")


def _from_parquet(folder: str, names: list[str]) -> dict[str, ParquetRows]:
    """Splits by names as on the hub: SPLIT-00000-of-00002.parquet, train.parquet, train/0.parquet; else "train"."""
    if not names:
        raise ValueError("it holds no Parquet files")
    splits: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        shard = SHARD.fullmatch(parts[-1])
        known = [split for part in parts for split in ("train", "validation", "test") if part.startswith(split)]
        splits.setdefault(shard[1] if shard else (known or ["train"])[0], []).append(join(folder, name))
    return {split: ParquetRows(files) for split, files in splits.items()}
