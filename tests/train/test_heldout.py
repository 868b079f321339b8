"""Evaluations while a stage trains: they change nothing that is learnt, are done once, and keep the best checkpoint."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import ranks
import stopping
import torch
from launching import run_ranks
from safetensors.torch import load_file

from granvit.data.schema import CHAT_FEATURES
from granvit.eval import evaluation
from granvit.export import find_source
from granvit.train.checkpoint import Checkpoints, read_values
from granvit.train.folder import resumes
from granvit.train.guard import STOPPED
from granvit.train.heldout import HeldOut
from granvit.train.presets import save_config
from granvit.train.run import train
from granvit.world import World

STAGES = ("warmup", "pretrain", "adapt")


@pytest.fixture(scope="module")
def config(small_config):
    return replace(small_config, **evaluated(small_config, 2))


def evaluated(config, every: int) -> dict:
    return {name: replace(getattr(config, name), eval_every=every) for name in STAGES}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return train(replace(config, output=str(tmp_path_factory.mktemp("runs") / "run")))


def lines_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def during(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line.get("evaluation") == "during"]


def test_what_is_learnt_is_the_same_bit_for_bit_with_evaluations_and_without(config, finished, tmp_path):
    off = replace(config, output=str(tmp_path / "run"), **evaluated(config, 0))
    lines = lines_of(finished)
    assert lines_of(train(off)) == [line for line in lines if line.get("evaluation") != "during"]
    assert resumes(tmp_path / "run", config)  # it may be switched on and off on the way


def test_a_stage_is_evaluated_before_its_first_step_every_second_and_after_its_last(config, finished):
    lines = during(lines_of(finished))
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("warmup", 0), ("warmup", 2), ("warmup", 3), ("pretrain", 0), ("pretrain", 2), ("pretrain", 4),
        ("pretrain", 6), ("adapt", 0), ("adapt", 2), ("adapt", 4),
    ]  # fmt: skip
    for line in lines:
        tasks = getattr(config, line["stage"]).tasks
        each = [line[f"held_out_loss_{task}"] for task in tasks]
        assert min(each) < line["held_out_loss"] < max(each) and "loss" not in line
        assert ("caption2bbox_acc50" in line and "bbox2caption_rouge_l" in line) == (line["stage"] != "warmup")
        assert not any("/" in name for name in line)


def test_the_best_checkpoint_is_kept_and_can_be_exported(finished):
    for stage in STAGES:
        lines = [line for line in during(lines_of(finished)) if line["stage"] == stage and line["step"]]
        best = min(lines, key=lambda line: line["held_out_loss"])
        assert [line["step"] for line in lines if line["best"]][-1] == best["step"]
        path = finished / "checkpoints" / f"{stage}-best"
        assert path.is_symlink() and int(path.resolve().name.split("-")[1]) == best["step"]
        assert read_values(path)["held_out_loss"] == best["held_out_loss"]
    best = finished / "checkpoints" / "pretrain-best"
    stored = load_file(best / "rank-00000.safetensors")
    began = load_file(finished / "checkpoints" / "warmup-0000003-final" / "rank-00000.safetensors")
    model = find_source(best).load()[0].state_dict()
    for name, value in model.items():
        frozen = name.startswith("llm.")  # it stands where the stage began
        assert (f"model.{name}" in stored) != frozen
        assert torch.equal(value, (began if frozen else stored)[f"model.{name}"])


def test_a_killed_run_evaluates_nothing_twice(config, finished, tmp_path, monkeypatch):
    """Killed behind an evaluation whose checkpoint is written, and before one is. The pictures are looked at once."""
    config = replace(config, output=str(tmp_path / "run"))
    monkeypatch.setattr(evaluation, "readable", None)  # the run knows by its own which rows can be asked about
    for stage, step in (("pretrain", 5), ("adapt", 2)):
        stopping.cut(monkeypatch, config, stage, step)
    assert lines_of(train(config)) == lines_of(finished)


def test_a_stop_while_it_evaluates_is_heard_and_the_evaluation_done_later(config, finished, tmp_path, monkeypatch):
    config = replace(config, output=str(tmp_path / "run"))
    losses = HeldOut.losses

    def asked(self, model, stopping_):
        if (self.phase.stage.name, self.phase.step) == ("pretrain", 4):
            stopping.hit("self", stopping.signal.SIGTERM)
        return losses(self, model, stopping_)

    with monkeypatch.context() as patch:
        patch.setattr(HeldOut, "losses", asked)
        with pytest.raises(SystemExit) as raised:
            train(config)
    assert raised.value.code == STOPPED
    last = lines_of(tmp_path / "run")[-1]
    assert (last["stage"], last["step"], "evaluation" in last) == ("pretrain", 4, False)
    assert lines_of(train(config)) == lines_of(finished)
    assert (tmp_path / "run" / "checkpoints" / "pretrain-best").resolve().name == (
        (finished / "checkpoints" / "pretrain-best").resolve().name
    )


@pytest.mark.slow
def test_two_ranks_find_what_one_process_does(config, tmp_path):
    config = replace(config, output="", precision="float32")
    save_config(config, tmp_path / "config.yaml")
    ranks.keep_held_out(World(), tmp_path)
    run_ranks(ranks.keep_held_out, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"held_out-{number}.pt") for number in (1, 2))
    for parallel in ("ddp", "fsdp"):
        assert len(two[parallel]) == len(one["ddp"]) == 5
        for line, expected in zip(two[parallel], one["ddp"], strict=True):
            assert line.keys() == expected.keys()
            for name, value in expected.items():
                if name.startswith("held_out_loss"):
                    assert line[name] == pytest.approx(value, abs=1e-5), (parallel, name)
        assert two[parallel][-1] == one["ddp"][-1]


def test_conversations_and_bfloat16(config, sample_set, tmp_path):
    """The stage sft is measured on conversations of the test split, without them by questions alone."""
    rows = datasets.load_from_disk(str(sample_set))
    talk = [{"role": role, "content": text} for role, text in (("user", "What is it?"), ("assistant", "A picture."))]
    few_rows = datasets.DatasetDict({name: rows[name].select(range(10)) for name in ("train", "test")})
    chats = few_rows.map(lambda _: {"regions": [], "caption": None, "conversations": [talk]}, features=CHAT_FEATURES)
    chats.save_to_disk(tmp_path / "chats")
    chats["train"].save_to_disk(tmp_path / "train_alone")
    few = {"steps": 2, "packs": 2, "eval_every": 1}
    config = replace(
        config, precision="bfloat16", sft=replace(config.sft, **few),
        **{name: replace(getattr(config, name), steps=0) for name in STAGES},
    )  # fmt: skip
    for name, has_loss in (("chats", True), ("train_alone", False)):
        data = replace(config.data, chat=str(tmp_path / name))
        lines = during(lines_of(train(replace(config, data=data, output=str(tmp_path / f"run-{name}")))))
        assert [line["step"] for line in lines] == [0, 1, 2]
        for line in lines:
            assert "bbox2caption_rouge_l" in line
            assert {"held_out_loss_chat", "chat_token_accuracy"} <= line.keys() or not has_loss
            assert ("held_out_loss" in line) == has_loss


def test_pruning_keeps_the_best_of_what_lies_behind(tmp_path):
    def save(step: int, loss: float | None, final: bool = False) -> None:
        values = {} if loss is None else {"held_out_loss": loss}
        checkpoints.save("adapt", step, {"x": torch.ones(1)}, values, final=final)
        checkpoints.wait()

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink())

    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, None)):
        save(step, loss)
    assert names() == ["adapt-0000002", "adapt-0000004"]
    assert (tmp_path / "adapt-best").readlink() == Path("adapt-0000002")
    save(5, 0.5)
    assert names() == ["adapt-0000005"] and (tmp_path / "adapt-best").readlink() == Path("adapt-0000005")
    (tmp_path / "adapt-best").unlink()  # as in a copy of a run that has followed the link
    (tmp_path / "adapt-best").mkdir()
    save(6, None, final=True)
    assert names() == ["adapt-0000005", "adapt-0000006-final"]
    assert (tmp_path / "adapt-best").readlink() == Path("adapt-0000005")
    save(6, 0.1, final=True)
    assert names() == ["adapt-0000006-final"] and (tmp_path / "adapt-best" / "manifest.json").is_file()
