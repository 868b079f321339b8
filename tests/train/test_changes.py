"""What of its configuration a run may change when it goes on, and what comes of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import stopping

from granvit.metrics_log import MetricsLog
from granvit.train.folder import adopt, finished, resumes, same_data
from granvit.train.loop import Phase
from granvit.train.presets import load_config, save_config
from granvit.train.run import train
from granvit.train.stages import Stage


@pytest.fixture(scope="module")
def config(small_config):
    """Two stages that keep their rate, so that each can be given more steps."""
    steps = {"warmup": 2, "pretrain": 4, "adapt": 3}
    stages = {name: replace(getattr(small_config, name), steps=n, cooldown=0.0) for name, n in steps.items()}
    return replace(small_config, **stages, data=replace(small_config.data, eval_images=2))


def lines_of(folder: Path, stage: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["stage"] == stage]


def test_the_rate_keeps_until_its_cooldown():
    stage = Stage("adapt", train=("llm",), tasks=("caption2bbox",), steps=110, warmup_steps=10)
    assert [stage.rate(step) for step in (5, 10, 60, 110)] == pytest.approx([0.5, 1, 0.5, 0])
    late, never = replace(stage, cooldown=0.2), replace(stage, cooldown=0.0)
    assert [late.rate(step) for step in (5, 10, 90, 100, 110)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert [never.rate(step) for step in (5, 10, 110)] == [0.5, 1, 1]
    with pytest.raises(ValueError, match="adapt.cooldown is 2"):
        replace(stage, cooldown=2)


CHANGES = {
    # field, value, checkpoints that are there, why not (None: it may)
    "a stage that has not begun, in any way": ("adapt.learning_rate", 1.0, ["pretrain-0000002"], None),
    "a stage that has not begun, left out": ("adapt.steps", 0, ["pretrain-0000002"], None),
    "a stage at the end": ("sft.steps", 5, ["pretrain-0000004-final", "adapt-0000003-final"], None),
    "a stage of which there is none": ("align.learning_rate", 1.0, ["adapt-0000003-final"], None),
    "a stage before one that has begun": (
        "align.steps", 5, ["pretrain-0000002"], "steps: 0 there, 5 now, but pretrain, which comes after it, has begun"
    ),
    "more steps on the way": ("pretrain.steps", 9, ["pretrain-0000002"], None),
    "fewer steps on the way": ("pretrain.steps", 3, ["pretrain-0000002"], None),
    "fewer steps than are taken": ("pretrain.steps", 2, ["pretrain-0000003"], "3 steps are taken"),
    "more steps at the end": ("adapt.steps", 9, ["pretrain-0000004-final", "adapt-0000003-final"], None),
    "more steps before the next stage": (
        "pretrain.steps", 9, ["pretrain-0000004-final", "adapt-0000001"], "adapt, which comes after it, has begun"
    ),
    "a stage on its way": ("pretrain.packs", 4, ["pretrain-0000002"], "packs: 2 there, 4 now, but pretrain has begun"),
    "how long it cools down": ("pretrain.cooldown", 0.5, ["pretrain-0000002"], "pretrain has begun"),
    "in a seed": ("align.steps", 5, ["../seed-1/checkpoints/adapt-0000001"], "adapt, which comes after it, has begun"),
}  # fmt: skip


@pytest.mark.parametrize("field, value, checkpoints, why", CHANGES.values(), ids=CHANGES)
def test_what_may_change(config, tmp_path, field, value, checkpoints, why):
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints").mkdir()
    for name in checkpoints:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    stage, name = field.split(".")
    changed = replace(config, **{stage: replace(getattr(config, stage), **{name: value})})
    if why is not None:
        with pytest.raises(ValueError, match=why):
            resumes(tmp_path, changed)
        return
    assert resumes(tmp_path, changed)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").touch()
    assert finished(tmp_path, config) and finished(tmp_path, changed) == (not getattr(changed, stage).runs and value)


@pytest.mark.parametrize(
    ("checkpoint", "why"),
    [
        ("pretrain-0000001", None),  # in the warm-up the rate is the same
        ("pretrain-0000003", r"the rate would have been another; .*--pretrain.cooldown 0 keeps its rate"),
        ("pretrain-0000004-final", r"pretrain has ended, its rate down to zero; .*--pretrain.cooldown 0"),
    ],
)
def test_more_steps_are_refused_where_they_change_the_past(config, tmp_path, checkpoint, why):
    config = replace(config, pretrain=replace(config.pretrain, cooldown=1.0))
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / checkpoint).mkdir(parents=True)
    longer = replace(config, pretrain=replace(config.pretrain, steps=8))
    if why is None:
        assert resumes(tmp_path, longer)
    else:
        with pytest.raises(ValueError, match=why):
            resumes(tmp_path, longer)


def test_a_finished_run_whose_checkpoints_are_gone_is_still_finished(config, tmp_path):
    save_config(config, tmp_path / "config.yaml")
    (tmp_path / "result.json").touch()
    with pytest.raises(ValueError, match="adapt has begun"):
        resumes(tmp_path, replace(config, adapt=replace(config.adapt, learning_rate=1.0)))


def test_a_finished_run_goes_on_with_more_steps_and_another_stage_bit_for_bit(config, chats, tmp_path, monkeypatch):
    """Stage 1 is the last at first and has ended; then it is given more steps, cut short, and stage 2 and sft after
    it."""
    sft = replace(config.sft, steps=2, packs=2, warmup_steps=1, eval_every=0)
    data = replace(config.data, chat=str(chats))
    whole = replace(config, pretrain=replace(config.pretrain, steps=8), sft=sft, data=data)
    undisturbed = train(replace(whole, output=str(tmp_path / "undisturbed")))

    first = replace(config, output=str(tmp_path / "run"), adapt=replace(config.adapt, steps=0))
    folder = train(first)
    assert finished(folder, first)
    more = replace(first, pretrain=whole.pretrain)
    assert not finished(folder, more)
    stopping.cut(monkeypatch, more, "pretrain", 7)
    assert not (folder / "result.json").exists()
    assert lines_of(folder, "pretrain")[-1]["step"] == 6
    train(more)
    assert finished(folder, more)

    taken = []
    take = Phase.take
    monkeypatch.setattr(Phase, "take", lambda self, batches: taken.append(self.stage.name) or take(self, batches))
    train(replace(whole, output=str(folder)))
    assert taken == ["adapt"] * 3 + ["sft"] * 2
    for stage in ("warmup", "pretrain", "adapt", "sft"):
        lines, expected = ([line for line in lines_of(of, stage) if "loss" in line] for of in (folder, undisturbed))
        assert lines == expected
    results, expected = (json.loads((of / "result.json").read_text())["stages"] for of in (folder, undisturbed))
    assert results == expected and list(results) == ["pretrain", "adapt", "sft"]
    finals = ["adapt-0000003-final", "pretrain-0000008-final", "sft-0000002-final", "warmup-0000002-final"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == finals
    assert load_config(folder / "config.yaml").sft.steps == 2
    same_data(folder / "data.json", {})
    (tmp_path / "cut.json").write_text('{"train": ')
    with pytest.raises(ValueError, match="cut.json is damaged"):
        same_data(tmp_path / "cut.json", {})
    assert {"train", "test", "chat"} <= json.loads((folder / "data.json").read_text()).keys()
    page, other = ((of / "report" / "summary.json").read_text() for of in (folder, undisturbed))
    assert json.loads(page)["mean"] == json.loads(other)["mean"]
    weights = [(of / "export" / "model.safetensors").read_bytes() for of in (folder, undisturbed)]
    assert weights[0] == weights[1]


def test_lines_of_steps_that_a_stage_no_longer_has_go(config, tmp_path):
    """It was given more, killed before a checkpoint of them, and is to end where it had."""
    save_config(replace(config, pretrain=replace(config.pretrain, steps=9)), tmp_path / "config.yaml")
    for run in (tmp_path, tmp_path / "seed-1"):
        metrics = MetricsLog(run / "metrics.jsonl")
        for step in range(1, 7):
            metrics.write(stage="pretrain", step=step)
        metrics.write(stage="adapt", step=0, evaluation="before")
    adopt(tmp_path, config)
    for run in (tmp_path, tmp_path / "seed-1"):
        lines = [(line["stage"], line["step"]) for line in MetricsLog(run / "metrics.jsonl").lines()]
        assert lines == [("pretrain", step) for step in range(1, 5)] + [("adapt", 0)]
    assert load_config(tmp_path / "config.yaml") == config
