"""Datasets are read from every accepted place; faults are counted, skipped and limited."""

import io
import logging
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from granvit.data.faults import FaultBudgetExceeded
from granvit.data.loader import GranDataset
from granvit.data.schema import FEATURES, parse_row
from granvit.data.writer import write_dataset

BROKEN = {"image": {"bytes": b"broken", "path": None}}
EMPTY = {"box": [0.1, 0.1, 0.2, 0.2], "caption": "", "kind": "natural", "score": None}
GOOD = {"box": [0.1, 0.2, 0.5, 0.6], "caption": "red ball", "kind": "natural", "score": 0.5}


def rows(number: int = 20, changes: dict[int, dict] | None = None) -> list[dict]:
    made = []
    for index in range(number):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 12, 3), index, np.uint8)).save(buffer, "PNG")
        made.append(
            {
                "id": f"r{index}",
                "image": {"bytes": buffer.getvalue(), "path": None},
                "width": 12,
                "height": 8,
                "caption": None,
                "regions": [GOOD],
                "source": "test",
                "licence": "CC0-1.0",
            }
            | (changes or {}).get(index, {})
        )
    return made


@pytest.fixture
def folder(tmp_path):
    write_dataset(tmp_path / "set", {"train": rows(5), "test": rows(2)})
    return tmp_path / "set"


def test_what_is_written_is_read_back(folder):
    stored = datasets.load_from_disk(str(folder))
    assert stored["train"].features == FEATURES
    train, test = GranDataset(folder), GranDataset(str(folder), "test")
    assert (len(train), len(test)) == (5, 2)
    sample = train[3]
    assert sample.id == "r3" and sample.caption is None and bool((sample.image == 3).all())
    assert sample.regions[0].score == 0.5
    assert sample.regions[0].box == pytest.approx((0.1, 0.2, 0.5, 0.6))
    with pytest.raises(IndexError):
        train[5]


def test_parquet_in_memory_and_unsplit_sets_are_read(folder, tmp_path):
    stored = datasets.load_from_disk(str(folder))
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    for split in stored:
        stored[split].to_parquet(str(parquet / f"{split}-00000-of-00001.parquet"))
    assert len(GranDataset(parquet, "test")) == 2
    assert len(GranDataset(parquet / "test-00000-of-00001.parquet", "test")) == 2
    assert GranDataset(parquet)[4].id == "r4"
    assert len(GranDataset(stored, "test")) == 2
    assert len(GranDataset(stored["test"])) == 2
    stored["train"].save_to_disk(str(tmp_path / "one"))
    assert len(GranDataset(tmp_path / "one")) == 5


def test_a_format_of_tensors_is_no_hindrance():
    set_ = datasets.Dataset.from_list(rows(3), features=FEATURES).with_format("torch")
    assert GranDataset(set_)[2].regions[0].caption == "red ball"


def test_a_dataset_streams(folder, tmp_path):
    stored = datasets.load_from_disk(str(folder))["train"]
    stored.to_parquet(str(tmp_path / "a.parquet"))
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), streaming=True)
    assert [parse_row(row).id for row in stream["train"]] == [f"r{i}" for i in range(5)]


def test_a_faulty_row_is_none_counted_once_and_logged(caplog):
    set_ = datasets.Dataset.from_list(rows(100, {7: BROKEN}), features=FEATURES)
    data = GranDataset(set_)
    with caplog.at_level(logging.WARNING):
        assert [data[7], data[7]] == [None, None]
    assert dict(data.faults.counts) == {"image": 1}
    assert [
        ("r7" in record.message, "not an image in one of the formats" in record.message)
        for record in caplog.records
    ] == [(True, True)]
    assert data[8].id == "r8"


def test_a_bad_region_is_left_out_and_counted():
    set_ = datasets.Dataset.from_list(rows(changes={2: {"regions": [EMPTY, GOOD]}}), features=FEATURES)
    data = GranDataset(set_)
    assert [region.caption for region in data[2].regions] == ["red ball"]
    assert dict(data.faults.counts) == {"region_caption": 1}
    assert data.faults.summary() == "1 of 20 rows have faults (region_caption 1)"


def test_annotations_leave_the_picture_alone():
    made = rows(20, {0: BROKEN, 1: {"width": None}, 2: {"regions": [EMPTY, GOOD]}})
    data = GranDataset(datasets.Dataset.from_list(made, features=FEATURES), fault_budget=0.2)
    assert data.annotations(0).image.shape == (8, 12, 3)
    assert data.annotations(1) is None and dict(data.faults.counts) == {"size": 1}
    assert data.annotations(2).regions == data[2].regions
    assert dict(data.faults.counts) == {"size": 1, "region_caption": 1}


def test_the_budget():
    set_ = datasets.Dataset.from_list(rows(20, {1: BROKEN, 2: BROKEN, 3: BROKEN}), features=FEATURES)
    data = GranDataset(set_, fault_budget=0.1)
    assert data[1] is None and data[2] is None
    with pytest.raises(
        FaultBudgetExceeded, match="3 of 20 rows have faults .image 3.; the fault budget allows 2"
    ):
        data[3]
    with pytest.raises(FaultBudgetExceeded):
        GranDataset(set_, fault_budget=0)[1]
    with pytest.raises(ValueError, match="fault_budget"):
        GranDataset(set_, fault_budget=2)


def test_folders_that_are_no_dataset(tmp_path):
    with pytest.raises(ValueError, match="nothing there; accepted: a folder written by save_to_disk"):
        GranDataset(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found an empty folder"):
        GranDataset(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="found model.safetensors; accepted"):
        GranDataset(tmp_path)
    with pytest.raises(ValueError, match="found the file model.safetensors"):
        GranDataset(tmp_path / "model.safetensors")


def test_other_datasets_and_missing_splits(folder):
    with pytest.raises(ValueError, match=r"one of \['test', 'train'\].*'validation'"):
        GranDataset(folder, "validation")
    with pytest.raises(ValueError, match="no Gran dataset: it lacks the columns .*'regions'.*'text'"):
        GranDataset(datasets.Dataset.from_dict({"text": ["a"]}))


def test_writing_is_all_or_nothing(tmp_path, folder):
    def failing():
        yield rows(1)[0]
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        write_dataset(tmp_path / "new", {"train": failing()})
    with pytest.raises(ValueError, match="new or an empty folder"):
        write_dataset(folder, {"train": rows(1)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]
    assert len(GranDataset(folder)) == 5
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", {"train": rows(1)})
    assert len(GranDataset(tmp_path / "empty")) == 1


@pytest.mark.parametrize("split", ["", "../evil", "../../evil", "a/b", ".", "..", "a\n", "-x", "a\0"])
def test_a_split_stays_in_its_folder(tmp_path, split):
    with pytest.raises(ValueError, match=f"split must be a name of letters.*got {re.escape(repr(split))}"):
        write_dataset(tmp_path / "sets" / "new", {split: rows(1)})
    assert list(tmp_path.iterdir()) == []
    write_dataset(tmp_path / "new", {"my-split.v1_2": rows(1)})
    assert len(GranDataset(tmp_path / "new", "my-split.v1_2")) == 1


def test_a_split_without_rows_is_not_written_and_named_when_opened(tmp_path):
    with pytest.raises(ValueError, match="split 'test' has no rows"):
        write_dataset(tmp_path / "new", {"train": rows(1), "test": []})
    assert list(tmp_path.iterdir()) == []
    empty = datasets.Dataset.from_dict({name: [] for name in FEATURES}, FEATURES)
    datasets.DatasetDict(train=empty).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="empty can't be opened"):
        GranDataset(tmp_path / "empty")


def test_damaged_datasets(folder, tmp_path):
    (folder / "dataset_dict.json").write_text("{")
    with pytest.raises(ValueError, match="set can't be opened"):
        GranDataset(folder)
    (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (folder / "train" / "data-00000-of-00001.arrow").write_bytes(b"broken")
    with pytest.raises(ValueError, match="set can't be opened"):
        GranDataset(folder)
    (tmp_path / "a.parquet").write_bytes(b"broken")
    with pytest.raises(ValueError, match="a.parquet can't be opened"):
        GranDataset(tmp_path / "a.parquet")


def test_columns_of_another_shape_are_faults():
    made = [row | {"regions": "boxes"} for row in rows(3)]
    data = GranDataset(datasets.Dataset.from_list(made), fault_budget=1)
    assert data[0] is None and dict(data.faults.counts) == {"regions": 1}
    made = [row | {"regions": ["boxes"], "caption": "a scene"} for row in rows(3)]
    data = GranDataset(datasets.Dataset.from_list(made), fault_budget=1)
    assert data[0].regions == () and dict(data.faults.counts) == {"regions": 1}


def test_files_may_have_their_columns_in_another_order(tmp_path):
    stored = datasets.Dataset.from_list(rows(4), features=FEATURES)
    stored.to_parquet(str(tmp_path / "train-0.parquet"))
    stored.select_columns(stored.column_names[::-1]).to_parquet(str(tmp_path / "train-1.parquet"))
    data = GranDataset(tmp_path)
    assert [data[i].id for i in range(8)] == [f"r{i}" for i in range(4)] * 2
    stored.remove_columns("licence").to_parquet(str(tmp_path / "train-1.parquet"))
    with pytest.raises(ValueError, match="train-1.parquet has the columns"):
        GranDataset(tmp_path)


def test_row_groups_are_kept_within_bounds(tmp_path, monkeypatch):
    stored = datasets.Dataset.from_list(rows(12), features=FEATURES)
    stored.to_parquet(str(tmp_path / "a.parquet"), batch_size=3)
    data = GranDataset(tmp_path / "a.parquet")
    assert data.groups.tolist() == [3, 3, 3, 3]
    read = []
    original = data.rows._read
    monkeypatch.setattr(data.rows, "_read", lambda group, columns: read.append(group) or original(group, columns))
    assert [data[i].id for i in (0, 11, 1, 2)] == ["r0", "r11", "r1", "r2"] and read == [0, 3]
    monkeypatch.setattr(data.rows, "_limit", 1)
    assert [data[i].id for i in (3, 0, 1, 4)] == ["r3", "r0", "r1", "r4"] and read == [0, 3, 1, 0, 1]


def test_what_has_no_rows_by_number_is_refused():
    given = datasets.Dataset.from_list(rows(2), FEATURES)
    assert len(GranDataset(given)) == 2
    stream = given.to_iterable_dataset()
    for source in (stream, {"train": stream}, rows(2), None):
        with pytest.raises(ValueError, match=r"path_or_dataset: got \w+, which has no rows by number; it takes"):
            GranDataset(source)
