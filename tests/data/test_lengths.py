"""Lengths of questions: measured once, and anew where what is kept of them is of no use."""

import errno
import io
import json
import shutil

import numpy as np
import pytest

from granvit.data.lengths import _measure
from granvit.data.loader import GranDataset
from tests.helpers.loading import loader


def test_lengths_are_measured_once_and_anew_for_other_data(gran, processor, monkeypatch, tmp_path):
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path))

    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)  # as on some network file systems
    first = loader(GranDataset(gran), processor).lengths
    monkeypatch.setattr("granvit.data.lengths._measure", lambda *_: pytest.fail("measured again"))
    again = loader(GranDataset(gran), processor).lengths
    for name in ("image", "starts", "question", "task"):
        assert (getattr(first, name) == getattr(again, name)).all()
    monkeypatch.undo()
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path))
    loader(GranDataset(gran.select(range(100))), processor)
    assert len(list(tmp_path.glob("lengths-*/about.json"))) == 2


def test_lengths_are_measured_anew_where_the_cache_is_of_no_use(gran, processor, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path / "cache"))
    first = loader(GranDataset(gran), processor).lengths
    assert isinstance(first.question.base, np.memmap)  # ranks of a machine share its memory

    def again() -> int:
        """Their checksum; what the cache holds afterwards is read."""
        lengths = loader(GranDataset(gran), processor).lengths
        with monkeypatch.context() as patch:
            patch.setattr("granvit.data.lengths._measure", lambda *_: pytest.fail("measured again"))
            loader(GranDataset(gran), processor)
        return lengths.checksum()

    (folder,) = (tmp_path / "cache").glob("lengths-*/")
    about = json.loads((folder / "about.json").read_text())
    other_shape = io.BytesIO()
    np.save(other_shape, first.image[None])
    damages = {
        "question.npy": [None, b"", b"broken", b"\x93NUMPY\1\0\2\0((", (folder / "question.npy").read_bytes()[:-9]],
        "image.npy": [other_shape.getvalue()],
        "about.json": [None, b"[" * 9999, json.dumps(about | {"faults": [["x"]]}).encode(), b"{}"],
    }
    for name, contents in damages.items():
        for damaged in contents:
            (folder / name).unlink()  # what is mapped stays as it is
            if damaged is not None:
                (folder / name).write_bytes(damaged)
            caplog.clear()
            assert again() == first.checksum() and caplog.text.count("measured anew") == 1
    shutil.rmtree(folder)
    folder.write_bytes(b"")
    assert again() == first.checksum()
    (tmp_path / "a file").write_bytes(b"")
    monkeypatch.setenv("GRANVIT_CACHE", str(tmp_path / "a file"))
    assert loader(GranDataset(gran), processor).lengths.checksum() == first.checksum()
    assert "can't be locked" in caplog.text and "can't be written" in caplog.text


def test_lengths_are_measured_by_several_processes_alike(gran, processor, monkeypatch):
    alone = _measure(GranDataset(gran), processor, ("bbox2caption", "global_caption"))
    monkeypatch.setattr("granvit.data.lengths._WORTH", 60)
    monkeypatch.setattr("granvit.data.lengths._CHUNK", 50)
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    several = _measure(GranDataset(gran), processor, ("bbox2caption", "global_caption"))
    assert several.checksum() == alone.checksum() and len(several.image) == len(gran)
