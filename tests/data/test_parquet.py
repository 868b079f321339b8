"""Rows of Parquet files: read by row groups, of which few are kept, and known by what the files hold."""

import multiprocessing
import shutil

import datasets
import pytest
import torch

from granvit.data.loader import GranDataset
from granvit.data.parquet import ParquetRows
from granvit.data.schema import FEATURES
from tests.helpers.loading import loader, seen, write_parquet


def test_parquet_is_read_by_row_groups_here_and_remotely(tmp_path, many_rows, processor, monkeypatch):
    monkeypatch.setattr("granvit.data.shards.ROW_GROUP_ROWS", 16)
    write_parquet(tmp_path / "set", many_rows)
    data = GranDataset(tmp_path / "set")
    assert data.groups.tolist() == [16, 16, 16, 16, 16] * 3 and len(data) == 240
    assert sorted(data.rows["id"]) == sorted(row["id"] for row in many_rows)
    assert data[100].id == data.annotations(100).id
    here = [seen(batch, processor) for batch in loader(data, processor, epochs=2)]
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "set"), "/loading/set", recursive=True)
    remote = GranDataset("memory://loading/set")
    assert [remote[i].id for i in (0, 239)] == [data[i].id for i in (0, 239)]
    there = loader(remote, processor, epochs=2)
    assert [seen(batch, processor) for batch in there] == here
    half = loader(data, processor, epochs=2, workers=2)
    half.step = len(here) // 2
    assert [seen(batch, processor) for batch in half] == here[len(here) // 2 :]


def test_a_file_that_changes_or_goes_is_named(tmp_path, many_rows, processor):
    write_parquet(tmp_path / "set", many_rows, files=2)
    data = GranDataset(tmp_path / "set")
    one, two = loader(data, processor), loader(data, processor)
    changed = tmp_path / "set" / "train-00001-of-00002.parquet"
    data.rows._forget()  # nothing is open, as in another process
    changed.write_bytes(changed.read_bytes() + b"PAR1")
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has changed"):
        list(one)
    changed.unlink()
    with pytest.raises(ValueError, match="no file or folder at .*train-00001-of-00002.parquet"):
        list(two)


def test_a_fingerprint_is_of_the_rows_wherever_they_lie(tmp_path, many_rows):
    import fsspec

    write_parquet(tmp_path / "set", many_rows[:5], files=1)
    write_parquet(tmp_path / "other", [many_rows[0] | {"caption": "another"}, *many_rows[1:5]], files=1)
    content = next((tmp_path / "set").iterdir()).read_bytes()
    fsspec.filesystem("memory").pipe("/written/train.parquet", content)
    here, there = GranDataset(tmp_path / "set").fingerprint, GranDataset("memory://written").fingerprint
    assert here == there != GranDataset(tmp_path / "other").fingerprint
    rows = datasets.Dataset.from_list(many_rows[:5], features=FEATURES)
    datasets.DatasetDict({"train": rows, "test": rows.select([1, 2])}).save_to_disk(tmp_path / "arrow")
    known = [GranDataset(tmp_path / "arrow", split).fingerprint for split in ("train", "test")]
    for name in ("set", "arrow"):  # a path may change with every job, and the files' dates with it
        shutil.copytree(tmp_path / name, tmp_path / "node 7" / name, copy_function=shutil.copyfile)
        shutil.rmtree(tmp_path / name)
    assert GranDataset(tmp_path / "node 7" / "set").fingerprint == here
    assert [GranDataset(tmp_path / "node 7" / "arrow", split).fingerprint for split in ("train", "test")] == known
    assert known[0] != known[1]


@pytest.mark.parametrize("workers", [0, 3, 8])
def test_row_groups_are_kept_for_lanes_not_for_workers(tmp_path, many_rows, processor, monkeypatch, workers):
    monkeypatch.setattr("granvit.data.shards.ROW_GROUP_ROWS", 4)
    write_parquet(tmp_path / "set", many_rows)
    data = GranDataset(tmp_path / "set")
    read, lane_bytes = ParquetRows._group, 4 * data.rows._group(0).nbytes
    monkeypatch.setattr("granvit.data.batches.LANE_BYTES", lane_bytes)
    most = multiprocessing.RawArray("q", max(workers, 1))

    def watched(rows: ParquetRows, group: int):
        table, worker = read(rows, group), torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        most[number] = max(most[number], rows._kept)
        return table

    monkeypatch.setattr(ParquetRows, "_group", watched)
    for _ in loader(data, processor, packs=8, ranks=2, workers=workers):
        pass
    assert 0.6 * 4 * lane_bytes < sum(most) <= 4 * lane_bytes
