"""The build itself: killed at any moment it goes on and ends as if it never was; whatever else is refused by name."""

import errno
import fcntl
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree as shutil_rmtree

import datasets
import pyarrow.parquet as pq
import pytest
from converting import picture

from granvit.data.build import build_dataset
from granvit.data.faults import FaultBudgetExceeded
from granvit.data.files import state
from granvit.data.loader import GranDataset
from granvit.data.records import Record, Source
from granvit.data.shards import WORK, Shards
from granvit.data.sources.rows import PixelBox, picture_row
from granvit.errors import Failed
from granvit.questions.schema import DataFault


@dataclass(frozen=True)
class Numbers(Source):
    """As many pictures, slowly, each named by its number; those in `bad` are faulty while the file `mended` is not."""

    number: int = 40
    seconds: float = 0.0
    bad: tuple[int, ...] = ()
    mended: str = ""
    dies: int = -1

    def inputs(self):
        return []

    def records(self, notes, scratch):
        assert list(scratch.iterdir()) == []
        for index in range(self.number):
            time.sleep(self.seconds)
            yield Record(f"n{index}", f"number {index}", index, (f"other/{index}",))
        notes.drop("odd one")

    def row(self, record, notes):
        time.sleep(self.seconds)
        if record.data == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if record.data in self.bad and not os.path.exists(self.mended):
            raise DataFault("bad", "it is bad")
        content = picture(record.data + 8, 20)
        return picture_row(record, content, "a.jpg", [PixelBox((0, 0, 4, 10), f"a {record.data}")], notes)


def rows_of(folder) -> list[dict]:
    files = sorted(Path(folder).glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


ZYGOTE = """
import json, os, sys
sys.path[:0] = sys.argv[1:]
from test_shards import Numbers, build_dataset
if __name__ == "__main__":
    for line in sys.stdin:
        output, source, options = json.loads(line)
        child = os.fork()
        if not child:
            build_dataset(Numbers(**source), output, **options)
            os._exit(0)
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)
"""


class Build:
    """One in a process of its own, forked off one that has imported everything, which takes seconds."""

    def __init__(self, zygote, output, source, **options) -> None:
        zygote.stdin.write(json.dumps([str(output), source, options]) + "\n")
        zygote.stdin.flush()
        self.answers, self.pid = zygote.stdout, int(zygote.stdout.readline())

    def running(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert int(self.answers.readline()) == signal.SIGKILL

    def finish(self) -> None:
        assert int(self.answers.readline()) == 0


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    script = tmp_path_factory.mktemp("zygote") / "zygote.py"
    script.write_text(ZYGOTE)
    here = Path(__file__).parent
    command = [sys.executable, str(script), str(here), str(here.parent / "helpers")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def wait_for(build: Build, folder: Path, names: str) -> None:
    while build.running() and not list((folder / WORK).glob(names)):
        time.sleep(0.002)


def test_killed_at_random_moments_it_ends_as_if_it_never_was(tmp_path, zygote):
    source, options = {"number": 60, "seconds": 0.01}, {"shard_rows": 4, "workers": 0}
    build_dataset(Numbers(**source), tmp_path / "whole", **options)
    moments = random.Random(0)
    kills = 0
    while True:
        build = Build(zygote, tmp_path / "out", source, **options)
        wait_for(build, tmp_path / "out", "plan.json")
        time.sleep(moments.uniform(0, 0.4))
        if kills == 8 or not build.running():
            break
        build.kill()
        kills += 1
        assert not list((tmp_path / "out").glob("*.parquet"))
        with pytest.raises(ValueError, match="not finished"):
            GranDataset(tmp_path / "out")
    build.finish()
    assert kills >= 3
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("out", "whole")]
    assert names[0] == names[1] and names[0][0] == "README.md" and len(names[0]) == 16


def test_killed_while_workers_work(tmp_path, zygote):
    source = {"number": 40, "seconds": 0.02}
    build = Build(zygote, tmp_path / "out", source, shard_rows=2, workers=2)
    wait_for(build, tmp_path / "out", "0*.json")
    build.kill()  # its workers are left, and end by themselves
    assert 0 < len(list((tmp_path / "out" / WORK).glob("0*.json"))) < 20
    Build(zygote, tmp_path / "out", source, shard_rows=2, workers=0).finish()
    build_dataset(Numbers(40), tmp_path / "whole", shard_rows=2, workers=0)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["plan.json", "index.json", "index.sqlite", "00001.parquet", "00001.json", "train"])
def test_killed_before_any_file_appears(tmp_path, monkeypatch, moment):
    """As a kill would leave it: nothing after that moment, temporary files in place."""

    class Killed(BaseException):
        pass

    def dying(method):
        def replace(self, target):
            if moment in Path(target).name and not (moment == "train" and "00001-of" not in Path(target).name):
                raise Killed
            return method(self, target)

        return replace

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "rename", dying(Path.rename))
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a kill tidies nothing
        with pytest.raises((Killed, OSError)):
            build_dataset(Numbers(20), tmp_path / "out", shard_rows=5, workers=0)
    summary = build_dataset(Numbers(20), tmp_path / "out", shard_rows=5, workers=0)
    assert (summary.read, summary.kept, summary.dropped) == (20, 20, {"odd one": 1})
    build_dataset(Numbers(20), tmp_path / "whole", shard_rows=5, workers=0)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert len(list((tmp_path / "out").iterdir())) == 5


def test_workers_change_nothing(tmp_path):
    for workers in (0, 2):
        summary = build_dataset(
            Numbers(30, bad=(3,)), tmp_path / f"{workers} ?#%41", shard_rows=4, workers=workers, fault_budget=0.1
        )
        assert (summary.read, summary.kept, summary.regions, summary.faulty) == (30, 29, 29, 1)
    built = [rows_of(tmp_path / f"{workers} ?#%41") for workers in (0, 2)]
    assert built[0] == built[1] and [row["id"] for row in built[0]] == [f"n{n}" for n in range(30) if n != 3]


def test_another_command_in_the_folder_is_refused_with_the_difference(tmp_path):
    with pytest.raises(FaultBudgetExceeded):
        build_dataset(Numbers(20, bad=(1,)), tmp_path / "out", workers=0, fault_budget=0)
    for other, options, shown in [
        (Numbers(21, bad=(1,)), {}, "'number': 20"),
        (Numbers(20, bad=(1,)), {"split": "test"}, "split: 'train' there, 'test' now"),
        (Numbers(20, bad=(1,)), {"shard_rows": 3}, "shard_rows: 1000 there, 3 now"),
        (Numbers(20, bad=(1,)), {"exclude": ["n3"]}, r"exclude: \[\] there, \['n3'\] now"),
    ]:
        with pytest.raises(ValueError, match=f"holds unfinished work on something else .*{shown}"):
            build_dataset(other, tmp_path / "out", workers=0, fault_budget=1, **options)
    assert build_dataset(Numbers(20, bad=(1,)), tmp_path / "out", workers=0, fault_budget=1).kept == 19
    with pytest.raises(ValueError, match="output must be a new or an empty folder"):
        build_dataset(Numbers(20, bad=(1,)), tmp_path / "out", workers=0, fault_budget=1)


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert build_dataset(Numbers(3), tmp_path / "out", workers=0).kept == 3
    assert "can't be locked" in caplog.text


def test_two_at_once_are_refused(tmp_path, zygote):
    build = Build(zygote, tmp_path / "out", {"number": 40, "seconds": 0.02}, workers=0)
    wait_for(build, tmp_path / "out", "plan.json")
    with pytest.raises(ValueError, match="another process is building"):
        build_dataset(Numbers(40, 0.02), tmp_path / "out", workers=0)
    build.finish()
    assert len(rows_of(tmp_path / "out")) == 40


def test_exclude_by_id_and_by_alias(tmp_path):
    summary = build_dataset(Numbers(6), tmp_path / "out", workers=0, exclude=["n1", "other/4", "n4", "other/99"])
    assert [row["id"] for row in rows_of(tmp_path / "out")] == ["n0", "n2", "n3", "n5"]
    assert summary.dropped["excluded"] == 2 and summary.read == 6


def test_too_many_faults_leave_work_to_go_on_with(tmp_path):
    source = Numbers(20, bad=(2, 3, 13), mended=str(tmp_path / "mended"))
    for _ in range(2):
        with pytest.raises(FaultBudgetExceeded, match="3 of 20 images have faults .bad 3."):
            build_dataset(source, tmp_path / "out", shard_rows=5, workers=0, fault_budget=0.1)
    made = {path.name for path in (tmp_path / "out" / WORK).glob("0*.json")}
    assert made == {"00001.json", "00003.json"}  # the good ones
    (tmp_path / "mended").touch()
    summary = build_dataset(source, tmp_path / "out", shard_rows=5, workers=0, fault_budget=0.1)
    assert summary.kept == 20 and summary.faulty == 0
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [f"n{n}" for n in range(20)]


def test_datasets_and_gran_dataset_read_the_result(tmp_path):
    build_dataset(Numbers(10), tmp_path / "out", split="val", shard_rows=4, workers=0)
    hub = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(hub) == {"val"} and len(hub["val"]) == 10 and hub["val"][9]["image"].size == (17, 20)
    data = GranDataset(tmp_path / "out", "val")
    assert [data[n].id for n in range(10)] == [f"n{n}" for n in range(10)]
    assert data[0].regions[0].box == (0, 0, 0.5, 0.5) and not data.faults.counts
    streamed = datasets.load_dataset(str(tmp_path / "out"), split="val", streaming=True)
    assert [row["id"] for row in streamed] == hub["val"]["id"][:]


def test_a_worker_that_dies_ends_the_build_and_leaves_its_work(tmp_path):
    with pytest.raises(ValueError, match="a worker process died"):
        build_dataset(Numbers(20, dies=13), tmp_path / "out", shard_rows=2, workers=2)
    with sqlite3.connect(tmp_path / "out" / WORK / "index.sqlite") as index:
        assert index.execute("SELECT count(*) FROM records").fetchone() == (20,)
    with pytest.raises(ValueError, match="not finished"):
        GranDataset(tmp_path / "out")


def test_a_machine_that_sees_other_files_is_named(tmp_path):
    """What Ray's workers ask first."""
    (tmp_path / "plan.json").touch()
    (tmp_path / "input").write_text("a")
    shards = Shards(Numbers(), tmp_path, 8, {str(tmp_path / "input"): state(str(tmp_path / "input"))})
    shards.check()
    (tmp_path / "input").write_text("other")
    with pytest.raises(Failed, match="input is another file here than where the work began"):
        shards.check()
    (tmp_path / "input").unlink()
    with pytest.raises(Failed, match="no file or folder at .*input; all machines must see the same files"):
        shards.check()
    with pytest.raises(Failed, match="no file or folder at .*nowhere/plan.json"):
        Shards(Numbers(), tmp_path / "nowhere", 8, {}).check()


def test_a_row_group_ends_by_rows_and_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("granvit.data.shards.ROW_GROUP_ROWS", 3)
    build_dataset(Numbers(8), tmp_path / "out", workers=0)
    [file] = (tmp_path / "out").glob("*.parquet")
    described = pq.ParquetFile(file).metadata
    assert [described.row_group(n).num_rows for n in range(described.num_row_groups)] == [3, 3, 2]
    monkeypatch.setattr("granvit.data.shards.ROW_GROUP_BYTES", 1)
    build_dataset(Numbers(8), tmp_path / "other", workers=0)
    [file] = (tmp_path / "other").glob("*.parquet")
    assert pq.ParquetFile(file).metadata.num_row_groups == 8


def test_nothing_to_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no usable image"):
        build_dataset(Numbers(0), tmp_path / "deep" / "out", workers=0)
    assert not (tmp_path / "deep" / "out").exists()


def test_the_card_counts(tmp_path):
    build_dataset(Numbers(5, bad=(1,)), tmp_path / "out", workers=0, fault_budget=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| images read | 5 |" in card and "| left out: odd one | 1 |" in card and "| fault: bad | 1 |" in card


def test_a_second_split_joins_the_first(tmp_path):
    for split, number in (("train", 5), ("test", 3)):
        build_dataset(Numbers(number), tmp_path / "out", split, workers=0)
    assert [len(GranDataset(tmp_path / "out", split)) for split in ("train", "test")] == [5, 3]
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 5, "test": 3}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("## train") < card.index("## test") and card.count("# A Gran dataset") == 1
    with pytest.raises(ValueError, match="or lack the split 'test'"):
        build_dataset(Numbers(2), tmp_path / "out", "test", workers=0)
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ValueError, match="new or an empty folder, got"):
        build_dataset(Numbers(2), tmp_path / "out", "val", workers=0)


def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("granvit.data.build.write_index", full)
    with pytest.raises(OSError, match=f"{WORK} can't be written: database or disk is full"):
        build_dataset(Numbers(2), tmp_path / "out", workers=0)
    assert not (tmp_path / "out").exists()


def test_killed_at_the_very_end_another_split_still_joins(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **_: None if path.name == ".finished" else shutil_rmtree(path, **_))
        build_dataset(Numbers(5), tmp_path / "out", "train", workers=0)
    assert (tmp_path / "out" / ".finished").exists()
    build_dataset(Numbers(3), tmp_path / "out", "test", workers=0)
    assert [len(GranDataset(tmp_path / "out", split)) for split in ("train", "test")] == [5, 3]
    assert not (tmp_path / "out" / ".finished").exists()
