import os

import pytest
import torch

from granvit.train.checkpoint import Checkpoints, load

CPU = torch.device("cpu")


def state(value: float) -> dict:
    return {"model": {"w": torch.full((3,), value)}}


def test_newest_counts_steps_and_keeps_the_last_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest("pretrain") is None
    for step in (5, 50, 500):
        checkpoints.save("pretrain", step, state(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pretrain-0000050.pt", "pretrain-0000500.pt"]
    loaded = load(checkpoints.newest("pretrain"), CPU)
    assert loaded["step"] == 500 and loaded["phase"] == "pretrain"
    assert torch.equal(loaded["model"]["w"], torch.full((3,), 500.0))
    assert checkpoints.newest("adapt") is None


def test_a_final_checkpoint_replaces_the_phase_s_running_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save("adapt", 7, state(1))
    assert checkpoints.final("adapt") is None
    final = checkpoints.save("adapt", 7, state(2), final=True)
    assert checkpoints.newest("adapt") == checkpoints.final("adapt") == final
    assert [p.name for p in tmp_path.iterdir()] == ["adapt-0000007-final.pt"]


def test_a_crash_while_writing_leaves_the_previous_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save("adapt", 1, state(1))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save("adapt", 2, state(2))
    assert load(checkpoints.newest("adapt"), CPU)["step"] == 1


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 cut short"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "adapt-0000001.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="adapt-0000001.pt is not a readable checkpoint"):
        load(path, CPU)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "adapt-0000001.pt"
    torch.save({"model": Evil()}, path)
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load(path, CPU)
    assert not (tmp_path / "owned").exists()


def test_somebody_else_s_checkpoint_is_named(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of granvit.train"):
        load(path, CPU)
