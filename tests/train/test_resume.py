"""A run that was stopped, however and wherever, goes on as if it had not been."""

import json
import multiprocessing
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import stopping
from launching import environment, output_of, torchrun
from safetensors.torch import load_file, save_file

from granvit.train import loop, run
from granvit.train.checkpoint import Checkpoints
from granvit.train.folder import locked, resumes
from granvit.train.guard import INTERRUPTED, STOPPED
from granvit.train.presets import load_config, save_config
from granvit.train.run import train


@pytest.fixture(scope="module")
def config(small_config):
    """Sequences for up to four ranks, and a checkpoint every third step."""
    steps = {"warmup": 2, "pretrain": 10, "adapt": 6}
    stages = {name: replace(getattr(small_config, name), steps=n, packs=4) for name, n in steps.items()}
    data = replace(small_config.data, capacity=128, eval_images=2)
    return replace(small_config, **stages, data=data, checkpoint_every=3)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The lines of a run that nothing came between."""
    return lines_of(train(replace(config, output=str(tmp_path_factory.mktemp("runs") / "run"))))


def lines_of(folder: Path) -> list[dict]:
    """Of training and evaluations, without what they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_close(lines: list[dict], expected: list[dict]) -> None:
    """The same sequences at each step, and losses to 1e-5."""
    lines, expected = ([line for line in some if "evaluation" not in line] for some in (lines, expected))
    for name in ("stage", "step", "images", "tokens", "regions"):
        assert [line[name] for line in lines] == [line[name] for line in expected], name
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=1e-5), (line["stage"], line["step"])


@pytest.mark.parametrize(("stage", "step"), [("pretrain", 3), ("pretrain", 10)])
def test_an_interrupted_run_goes_on_bit_for_bit_wherever_its_data_is(
    config, undisturbed, tmp_path, monkeypatch, stage, step
):
    """A job's copy of the data on its node lies elsewhere than the last one's."""
    config = replace(config, output=str(tmp_path / "run"))
    stopping.cut(monkeypatch, config, stage, step)
    shutil.copytree(config.data.path, tmp_path / "copy")
    moved = replace(config, data=replace(config.data, path=str(tmp_path / "copy")))
    train(moved)
    assert lines_of(tmp_path / "run") == undisturbed
    assert load_config(tmp_path / "run" / "config.yaml").data.path == str(tmp_path / "copy")


def test_it_goes_on_in_other_micro_batches_along_the_same_curves(config, undisturbed, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"), micro_packs=1)
    stopping.cut(monkeypatch, config, "pretrain", 5)
    train(replace(config, micro_packs=3))
    lines, expected = ([line for line in some if "loss" in line] for some in (lines_of(tmp_path / "run"), undisturbed))
    assert len(lines) == 18 and any(line["loss_distill"] for line in lines)
    for line, other in zip(lines, expected, strict=True):
        assert line.pop("stage") == other["stage"]
        assert line == pytest.approx({k: v for k, v in other.items() if k != "stage"}, rel=1e-5)


def test_momenta_of_muon_go_on_bit_for_bit(small_config, tmp_path, monkeypatch):
    """Where the numbers of steps 1, 2, 4 and 6 are read: at checkpoints and log steps."""
    pretrain = replace(small_config.pretrain, optimizer="muon")
    config = replace(small_config, pretrain=pretrain, adapt=replace(small_config.adapt, steps=0), log_every=4)
    undisturbed = lines_of(train(replace(config, output=str(tmp_path / "undisturbed"))))
    config = replace(config, output=str(tmp_path / "run"))
    stopping.cut(monkeypatch, config, "pretrain", 5)
    assert lines_of(train(config)) == undisturbed


@pytest.mark.slow
def test_killed_and_asked_to_stop_again_and_again_it_ends_bit_for_bit(config, undisturbed, tmp_path):
    """At steps and at moments between, and when a stage's last checkpoint is written but nothing after it."""
    places = [
        "warmup:1:KILL:later", "pretrain:2:KILL:later", "pretrain:5:KILL", f"pretrain:{random.choice((7, 8))}:INT",
        "pretrain:9:KILL:later", "pretrain:10:KILL", "pretrain:final:KILL", "adapt:1:TERM:later",
        f"adapt:{random.choice((4, 5))}:KILL:later", "adapt:6:TERM",
    ]  # fmt: skip
    config = replace(config, output=str(tmp_path / "run"), data=replace(config.data, workers=1))
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, stopping.__file__, ",".join(places), "--config", tmp_path / "config.yaml"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout, done.stderr)
    for place in places:
        code = STOPPED if "TERM" in place else INTERRUPTED if "INT" in place else -9
        assert f"{place} -> {code}" in done.stdout, done.stdout
    asked = places[3].split(":")[1]  # where Ctrl-C came, not where a checkpoint was due
    assert f"pretrain goes on from step {asked}" in done.stdout
    assert lines_of(tmp_path / "run") == undisturbed, places


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_ranks(config, undisturbed, tmp_path):
    """Two ranks are killed; one goes on, and four do; those are asked to stop, and one ends their run."""
    config = replace(config, output=str(tmp_path / "two"), parallel="fsdp", data=replace(config.data, workers=1))
    save_config(config, tmp_path / "config.yaml")
    process = torchrun(2, stopping.__file__, "pretrain:8:KILL", "--config", tmp_path / "config.yaml")
    output = output_of(process, 240)
    assert process.returncode == 1 and "-9" in output, output
    one, four = (replace(config, output=str(tmp_path / name), parallel="ddp") for name in ("one", "four"))
    for other in (one, four):
        shutil.copytree(config.output, other.output)
        assert Checkpoints(tmp_path / "two" / "checkpoints", 1).newest("pretrain").name == "pretrain-0000006"

    train(one)
    assert_close(lines_of(tmp_path / "one"), undisturbed)

    save_config(four, tmp_path / "config.yaml")
    process = torchrun(4, stopping.__file__, "adapt:4:TERM:parent", "--config", tmp_path / "config.yaml")
    output = output_of(process, 240)
    assert process.returncode == 1 and "stopped after step 4" in output, output  # torchrun's own, whatever ours
    assert "goes on from step 6" in output
    assert Checkpoints(tmp_path / "four" / "checkpoints", 1).newest("adapt").name == "adapt-0000004"
    train(four)
    assert_close(lines_of(tmp_path / "four"), undisturbed)


def test_a_request_that_comes_in_a_stage_s_last_step_is_heard_when_it_is_saved(config, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    take = loop.Phase.take

    def asking(self, batches):
        if self.step == self.stage.steps - 1:
            stopping.hit("self", stopping.signal.SIGTERM)
        return take(self, batches)

    monkeypatch.setattr(loop.Phase, "take", asking)
    with pytest.raises(SystemExit) as raised:
        train(config)
    assert raised.value.code == STOPPED
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["warmup-0000002-final"]


def test_a_line_of_an_evaluation_that_was_cut_short_is_measured_again(config, undisturbed, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    stopping.cut(monkeypatch, config, "pretrain", 1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = [line for line in metrics.read_text().splitlines() if '"pretrain"' not in line]
    metrics.write_text("\n".join([*before, '{"stage": "pretrain", "step": 0, "eval']))
    train(config)
    assert lines_of(tmp_path / "run") == undisturbed


def test_a_second_process_in_a_run_s_folder_is_refused_and_one_after_it_is_not(config, tmp_path):
    config = replace(config, output=str(tmp_path / "run"), warmup=replace(config.warmup, steps=0))
    config = replace(config, pretrain=replace(config.pretrain, steps=1), adapt=replace(config.adapt, steps=0))
    (tmp_path / "run").mkdir()
    fork = multiprocessing.get_context("fork")
    holds, never = fork.Event(), fork.Event()

    def hold() -> None:
        with locked(tmp_path / "run"):
            holds.set()
            never.wait()

    other = fork.Process(target=hold)
    other.start()
    assert holds.wait(60)
    with pytest.raises(ValueError, match=f"another process trains in {tmp_path / 'run'} just now"):
        train(config)
    other.kill()
    other.join()
    train(config)


def test_a_run_that_was_killed_before_it_wrote_its_configuration_begins_again(config, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "save_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert (tmp_path / "run" / "checkpoints").is_dir() and not resumes(tmp_path / "run", config)
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="not an empty folder and holds no run"):
        resumes(tmp_path / "run", config)


def test_another_configuration_is_refused_with_the_difference(config, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    stopping.cut(monkeypatch, config, "warmup", 1)
    other = replace(config, seed=5, data=replace(config.data, capacity=256))
    with pytest.raises(ValueError, match="data.capacity: 128 there, 256 now; seed: 0 there, 5 now"):
        train(other)


def test_a_changed_dataset_is_refused_with_the_difference(config, tmp_path, monkeypatch):
    rows = datasets.load_from_disk(config.data.path)
    rows.save_to_disk(tmp_path / "data")
    config = replace(config, output=str(tmp_path / "run"), data=replace(config.data, path=str(tmp_path / "data")))
    stopping.cut(monkeypatch, config, "pretrain", 1)
    shutil.rmtree(tmp_path / "data")
    rows["train"] = rows["train"].select(range(1, len(rows["train"])))
    rows.save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"train: \{'rows': 67, .* there, \{'rows': 66, .* now"):
        train(config)


def test_a_frozen_llm_that_was_changed_meanwhile_is_refused(config, llm_folder, tmp_path, monkeypatch):
    """Checkpoints on their way leave out what is frozen, which is read where it was."""
    llm = shutil.copytree(llm_folder("llama"), tmp_path / "llm")
    model = replace(config.model, llm=str(llm))
    config = replace(config, output=str(tmp_path / "run"), model=model, warmup=replace(config.warmup, steps=0))
    stopping.cut(monkeypatch, config, "pretrain", 4)
    tensors = load_file(llm / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, llm / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="what pretrain does not train is no longer what it began with"):
        train(config)


def test_a_damaged_checkpoint_is_refused_and_the_run_goes_on_without_it(config, undisturbed, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    stopping.cut(monkeypatch, config, "pretrain", 8)
    newest = Checkpoints(tmp_path / "run" / "checkpoints", 1).newest("pretrain")
    file = newest / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is damaged.*; remove the folder {newest}, and the same command"):
        train(config)
    shutil.rmtree(newest)
    train(config)
    assert lines_of(tmp_path / "run") == undisturbed
