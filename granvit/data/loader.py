"""Reading Gran datasets: a map-style view with a budget for faulty rows."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import datasets

from granvit.data.faults import FaultLog
from granvit.data.schema import FEATURES, DataFault, Sample, parse_row
from granvit.data.shards import WORK

ACCEPTED = "a folder written by save_to_disk, or Parquet files (one, or a folder of SPLIT*.parquet)"


class GranDataset:
    """A split of a Gran dataset, read row by row: `len(ds)`, `ds[i] -> Sample | None`.

    None stands for a row that can't be used. It is logged with its id and counted in `faults`; a bad region
    of a good image is left out and counted too. Each worker process of a data loader keeps a log of its own.

    path_or_dataset: a folder written by `save_to_disk` (a Dataset or a DatasetDict), a folder or file of
        Parquet, or a `datasets.Dataset` or `DatasetDict`, which is how data from a hub comes in.
    split: which split of those that there are. A source without splits has only "train".
    fault_budget: the share of rows that may have faults before FaultBudgetExceeded is raised.

    Raises ValueError for a folder that is no dataset, a split that isn't there and missing columns.
    """

    def __init__(
        self,
        path_or_dataset: str | Path | datasets.Dataset | datasets.DatasetDict,
        split: str = "train",
        fault_budget: float = 0.01,
    ) -> None:
        if isinstance(path_or_dataset, (str, Path)):
            found = _open(Path(path_or_dataset))
            self.path = str(path_or_dataset)
        else:
            found = path_or_dataset
            self.path = f"<{type(found).__name__} in memory>"
        splits = found if isinstance(found, dict) else {"train": found}
        if split not in splits:
            raise ValueError(f"split must be one of {sorted(splits)} in {self.path}, got {split!r}")
        rows = splits[split]
        missing = sorted(set(FEATURES) - set(rows.column_names))
        if missing:
            raise ValueError(f"{self.path} is no Gran dataset: it lacks the columns {missing}, has {rows.column_names}")
        # decode=False: a broken image must come as bytes to us, not as an exception out of `datasets`.
        self.rows = rows.cast_column("image", datasets.Image(decode=False))
        self._texts = self.rows.remove_columns("image")
        self.split = split
        self.faults = FaultLog(len(self.rows), fault_budget)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample | None:
        return self._read(self.rows, index, decode=True)

    def annotations(self, index: int) -> Sample | None:
        """`self[index]` without its picture, and far faster: `image` is a blank of the row's size."""
        return self._read(self._texts, index, decode=False)

    def _read(self, rows: datasets.Dataset, index: int, decode: bool) -> Sample | None:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = rows[index]
        name = f"{self.path}[{self.split}][{index}] id={row['id']!r}"
        sample = None
        try:
            sample = parse_row(row, drop=lambda fault: self.faults.add(index, name, fault), decode=decode)
        except DataFault as fault:
            self.faults.add(index, name, fault)
        self.faults.check()
        return sample


@lru_cache(maxsize=4)
def open_rows(path: str, split: str) -> datasets.Dataset:
    """The unchecked rows of a split, images still encoded, opened once a process. Raises what GranDataset raises."""
    return GranDataset(path, split).rows


def _open(path: Path) -> datasets.Dataset | datasets.DatasetDict:
    if not path.exists():
        raise ValueError(f"no dataset at {path}: there is nothing there; accepted: {ACCEPTED}")
    try:
        if (path / WORK).exists():
            raise ValueError("it is not finished; the command that makes it goes on when given again")
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        files = [path] if path.suffix == ".parquet" else sorted(path.rglob("*.parquet"))
        if files:
            return _from_parquet(path, files)
    # What `datasets` raises on damaged files is not documented; these have been seen.
    except (OSError, ValueError, KeyError, IndexError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"the dataset at {path} can't be opened: {error}") from error
    names = sorted(entry.name for entry in path.iterdir())[:8] if path.is_dir() else [f"the file {path.name}"]
    raise ValueError(f"no dataset at {path}: found {', '.join(names) or 'an empty folder'}; accepted: {ACCEPTED}")


def _from_parquet(path: Path, files: list[Path]) -> datasets.DatasetDict:
    """Splits by names as on the hub: train.parquet, train-00000-of-00002.parquet, train/0.parquet; else
    "train"."""
    splits: dict[str, list[str]] = {}
    for file in files:
        inside = file.relative_to(path).parts[0] if file != path else file.name
        split = next((name for name in ("train", "validation", "test") if inside.startswith(name)), "train")
        splits.setdefault(split, []).append(str(file))
    return datasets.DatasetDict({split: datasets.Dataset.from_parquet(found) for split, found in splits.items()})
