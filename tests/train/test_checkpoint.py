import json
import logging
import os
import threading
import time
from pathlib import Path

import checkpointing
import pytest
import torch
from launching import forked, run_ranks
from safetensors.torch import load_file

from granvit.train import checkpoint
from granvit.train.checkpoint import Checkpoints, load, read_values
from granvit.train.folder import check_room
from granvit.train.manifest import digest_of


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.w": torch.full((3,), value), "model.b": torch.full((2, 2), value)}


def saved(folder: Path, step: int = 1, tensors: dict | None = None, values: dict | None = None, **kwargs) -> Path:
    """The one checkpoint of a run."""
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save("adapt", step, tensors or state(step), values or {}, **kwargs)
    return checkpoints.newest("adapt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path):
    tied = torch.randn(5, 4)
    tensors = {
        "float32": torch.tensor([1.0, float("nan"), -0.0, float("inf")]),
        "float64": torch.randn(3, dtype=torch.float64),
        "bfloat16": torch.randn(2, 3).bfloat16(),
        "int64": torch.tensor([2**62, -1]),
        "uint8": torch.get_rng_state(),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(7.0),
        "no rows": torch.empty(0, 9),
        "turned": torch.randn(3, 5).T,
        "needs gradient": torch.randn(2, 2, requires_grad=True),
        "embed_tokens.weight": tied,
        "lm_head.weight": tied,
        "part": tied[1:3],
    }
    values = {"seen": [1, 2.5, None, "ü"], "loader": {"lane": 3, "ends": True}}
    path = saved(tmp_path, 12, tensors, values)
    again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    again["lm_head.weight"] = again["embed_tokens.weight"]
    assert load(path, again) == values == read_values(path)
    for name, tensor in tensors.items():
        here, there = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (again[name], tensor))
        assert torch.equal(here, there), name
    assert names(path) == ["manifest.json", "rank-00000.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["phase"], manifest["step"], manifest["ranks"]) == ("adapt", 12, 1)


@pytest.mark.slow
def test_written_by_two_ranks_and_read_by_one_and_by_four(tmp_path):
    run_ranks(checkpointing.write, 2, tmp_path)
    path = tmp_path / "checkpoints" / "adapt-0000003-final"
    assert names(path) == ["manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"]
    expected = load_file(tmp_path / "expected.safetensors")
    got = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    assert load(path, got) == {"rank": 0}
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert any(name.endswith("exp_avg") for name in got) and "plain.nothing" in got
    run_ranks(checkpointing.read, 4, tmp_path)


@pytest.mark.slow
def test_a_rank_that_fails_makes_the_save_fail_on_all(tmp_path):
    run_ranks(checkpointing.fail, 2, tmp_path)


def test_the_last_ones_and_every_nth_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=100)
    assert checkpoints.newest("adapt") is None
    for step in range(50, 500, 50):
        checkpoints.save("adapt", step, state(step), {"step": step})
    checkpoints.save("pretrain", 9, state(9), {})
    checkpoints.wait()
    steps = [100, 200, 300, 400, 450]
    assert names(tmp_path) == [f"adapt-{step:07d}" for step in steps] + ["pretrain-0000009"]
    assert read_values(checkpoints.newest("adapt")) == {"step": 450}
    assert checkpoints.final("adapt") is None
    checkpoints.save("adapt", 470, state(470), {}, final=True)
    kept = [f"adapt-{step:07d}" for step in steps[:-1]] + ["adapt-0000470-final", "pretrain-0000009"]
    assert names(tmp_path) == kept
    assert checkpoints.newest("adapt") == checkpoints.final("adapt") == tmp_path / "adapt-0000470-final"
    assert Checkpoints(tmp_path, keep=1).newest("pretrain").name == "pretrain-0000009"


def test_a_run_that_went_back_leaves_its_later_checkpoints_behind(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    saved(tmp_path, 30)
    checkpoints.save("adapt", 20, state(20), {})
    assert checkpoints.newest("adapt").name == "adapt-0000020"
    checkpoints.save("adapt", 20, state(21), {"again": True})
    assert read_values(checkpoints.newest("adapt")) == {"again": True}
    assert names(tmp_path) == ["adapt-0000020"]


def test_a_crash_while_one_takes_the_place_of_another_loses_neither(tmp_path, monkeypatch):
    path = saved(tmp_path, 20)
    path.rename(tmp_path / ".adapt-0000020.old")
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert checkpoints.newest("adapt") == path
    rename = Path.rename

    def crash(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", crash)
    checkpoints.save("adapt", 20, state(21), {"again": True})
    assert checkpoints.newest("adapt") == path and read_values(path) == {} and checkpoints.failures == 1


def test_what_a_crash_leaves_of_an_old_one_is_none(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save("adapt", 1, state(1), {})
    checkpoints.wait()
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # it never gets to it
    checkpoints.save("adapt", 2, state(2), {})
    checkpoints.wait()
    assert names(tmp_path) == [".adapt-0000001.tmp", "adapt-0000002"]


def test_training_is_not_held_up_by_the_writing(tmp_path, monkeypatch):
    disk, writes = threading.Event(), checkpoint.save_file

    def slow(*args, **kwargs):
        assert disk.wait(30)
        writes(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    checkpoints, tensors, values = Checkpoints(tmp_path, keep=2), state(1), {"seen": [1]}
    checkpoints.save("adapt", 1, tensors, values)
    tensors["model.w"].fill_(99)  # the next step of training
    values["seen"].append(2)
    assert names(tmp_path) in ([], [".adapt-0000001.tmp"])
    began = time.perf_counter()
    threading.Timer(0.3, disk.set).start()
    checkpoints.save("adapt", 2, tensors, values)  # waits for the first
    assert time.perf_counter() - began > 0.2 and "adapt-0000001" in names(tmp_path)
    checkpoints.wait()
    for step, first in ((1, 1.0), (2, 99.0)):
        got = state(0)
        assert load(tmp_path / f"adapt-000000{step}", got) == {"seen": [1, 2][:step]}
        assert torch.equal(got["model.w"], torch.full((3,), first))


def test_a_killed_writer_leaves_the_previous_one(tmp_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "lines"
    process = forked(checkpointing.hang_while_writing, tmp_path, output=output)
    try:
        while process.is_alive() and not (output.exists() and output.read_text()):
            time.sleep(0.02)
        assert output.read_text() == "writing\n"
    finally:
        process.kill()
        process.join()
    assert names(tmp_path) == [".adapt-0000002.tmp", "adapt-0000001"]
    checkpoints = Checkpoints(tmp_path, keep=2)
    got = {"w": torch.zeros(1000)}
    assert load(checkpoints.newest("adapt"), got) == {"step": 1} and got["w"].sum() == 1000
    checkpoints.save("adapt", 3, got, {})
    checkpoints.wait()
    assert names(tmp_path) == ["adapt-0000001", "adapt-0000003"]


def test_an_interpreter_that_ends_writes_its_checkpoint_to_the_end(tmp_path):
    process = forked(checkpointing.end_while_writing, tmp_path, output=tmp_path / "lines")
    process.join(60)
    got = {"w": torch.zeros(1000)}
    assert load(tmp_path / "adapt-0000001", got) == {"step": 1} and got["w"].sum() == 1000


def test_a_full_disk_is_counted_and_outlived(tmp_path, tmp_path_factory):
    file = tmp_path_factory.mktemp("output") / "lines"
    process = forked(checkpointing.fill_the_disk, tmp_path, output=file)
    process.join(300)
    output = file.read_text()
    assert process.exitcode == 0, output
    assert output.count("adapt-0000002 could not be written, the one before it stands: ") == 2
    assert "File too large" in output


def test_a_folder_that_is_gone_fails_the_save_alone(tmp_path, caplog):
    folder = tmp_path / "checkpoints"
    checkpoints = Checkpoints(folder, keep=1)
    folder.rmdir()
    folder.write_text("in its place")
    checkpoints.save("adapt", 1, state(1), {})
    checkpoints.wait()
    assert checkpoints.failures == 1 and "Not a directory" in caplog.text


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit": (lambda p: flip(p / "rank-00000.safetensors", -1), r"rank-00000.safetensors is damaged.*SHA-256"),
    "a flipped header": (lambda p: flip(p / "rank-00000.safetensors", 20), "rank-00000.safetensors is damaged"),
    "a cut file": (lambda p: os.truncate(p / "rank-00000.safetensors", 30), r"rank-00000.safetensors.*has 30 bytes"),
    "no file": (lambda p: (p / "rank-00000.safetensors").unlink(), "rank-00000.safetensors is missing"),
    "one file more": (lambda p: (p / "more.pt").write_text(""), "more.pt is none of the checkpoint's files"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is not a checkpoint's manifest"),
    "half a manifest": (lambda p: os.truncate(p / "manifest.json", 50), "manifest.json is not a checkpoint's manifest"),
    "deep manifest": (lambda p: (p / "manifest.json").write_text("[" * 10**5), "manifest.json is not a checkpoint's"),
}


@pytest.mark.parametrize("harm, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_named_and_changes_no_tensor(tmp_path, harm, message):
    path, tensors = saved(tmp_path), state(5)
    harm(path)
    with pytest.raises(ValueError, match=message):
        load(path, tensors)
    assert all(bool((tensor == 5).all()) for tensor in tensors.values())


def test_a_link_is_no_file_of_a_checkpoint(tmp_path):
    path = saved(tmp_path / "a")
    file = path / "rank-00000.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is not a plain file"):
        load(path, state(0))


HOSTILE = {
    "leaves the folder": lambda m: m["files"].update({"../rank-00000.safetensors": m["files"].pop(FILE)}),
    "absolute": lambda m: m["files"].update({"/etc/passwd": m["files"].pop(FILE)}),
    "new line": lambda m: m["files"].update({FILE + "\n": m["files"].pop(FILE)}),
    "a pickle": lambda m: m["files"].update({"rank-00000.pt": m["files"].pop(FILE)}),
    "another size": lambda m: m["files"][FILE].update(size="9"),
    "more fields": lambda m: m.update(run="rm"),
    "no values": lambda m: m.pop("values"),
    "of another time": lambda m: m.update(format=2),
    "negative step": lambda m: m.update(step=-1),
}
FILE = "rank-00000.safetensors"


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_manifest_that_is_not_the_schema_is_refused(tmp_path, change):
    path = saved(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    manifest["sha256"] = digest_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="manifest.json is not a checkpoint's manifest"):
        load(path, state(0))
    with pytest.raises(ValueError, match=f"{path}/manifest.json is not a checkpoint's manifest.*; remove the folder"):
        Checkpoints(tmp_path, keep=1).newest("adapt")


def test_a_changed_value_is_seen(tmp_path):
    path = saved(tmp_path, values={"lane": 31})
    file = path / "manifest.json"
    file.write_text(file.read_text().replace("31", "32"))
    with pytest.raises(ValueError, match="SHA-256"):
        read_values(path)


@pytest.mark.parametrize(
    "tensors, message",
    [
        (state(0) | {"a": torch.ones(1), "b": torch.ones(1)}, r"lacks tensors \(2\): a, b"),
        ({"model.w": torch.zeros(3)}, r"not known here \(1\): model.b"),
        (state(0.0) | {"model.w": torch.zeros(4)}, r"another shape.*\(1\): model.w \(torch.float32 \[3\] there"),
        (state(0.0) | {"model.w": torch.zeros(3).double()}, r"another shape or dtype.*torch.float64 \[3\] here"),
    ],
)
def test_other_tensors_are_named_and_not_filled(tmp_path, tensors, message):
    path = saved(tmp_path, tensors=state(5.0))
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        load(path, tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_a_subset_can_be_loaded(tmp_path):
    path, tensors = saved(tmp_path, tensors=state(5.0)), {"model.w": torch.zeros(3)}
    load(path, tensors, subset=True)
    assert torch.equal(tensors["model.w"], torch.full((3,), 5.0))
    with pytest.raises(ValueError, match="lacks tensors"):
        load(path, {"model.z": torch.zeros(3)}, subset=True)


def test_values_are_json_and_names_are_names(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(TypeError):
        checkpoints.save("adapt", 1, state(1), {"t": torch.ones(1)})
    with pytest.raises(ValueError, match="can't be a checkpoint's name"):
        checkpoints.save("../adapt", 1, state(1), {})
    with pytest.raises(ValueError, match="at least one"):
        Checkpoints(tmp_path, keep=0)
    assert names(tmp_path) == []


def test_room_is_looked_at_before_training(tmp_path, monkeypatch, caplog):
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    folder = tmp_path / "checkpoints"
    with caplog.at_level(logging.WARNING):
        check_room(folder, 300, keep=2)
    assert caplog.text == "" and names(folder) == []
    check_room(folder, 400, keep=2)
    assert "keeping 2 checkpoints" in caplog.text
    with pytest.raises(ValueError, match="only 1 kB are free"):
        check_room(folder, 1001, keep=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written to"):
        check_room(tmp_path / "file", 1, keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_refused_before_training(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="can't be written to"):
        check_room(tmp_path / "checkpoints", 1, keep=1)
