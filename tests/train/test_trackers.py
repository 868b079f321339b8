import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from granvit.train import services, trackers
from granvit.train.guard import Terminated
from granvit.train.loop import Phase
from granvit.train.presets import save_config
from granvit.train.run import train
from granvit.train.trackers import Trackers


@pytest.fixture()
def mine(monkeypatch):
    """A module "mine" whose function `make` gives a tracker that keeps what it gets, and one that fails at once."""
    module = SimpleNamespace(made=[], got=[])

    def make(config, folder):
        module.made.append((config, folder))
        return module.got.append

    def failing(config, folder):
        def track(line):
            module.got.append("failed")
            raise ConnectionError("the server is gone")

        return track

    module.make, module.failing = make, failing
    module.broken, module.number = lambda config, folder: 1 / 0, lambda *_: 7
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses_of(folder, stage):
    return {line["step"]: line["loss"] for line in lines_of(folder) if line["stage"] == stage and "loss" in line}


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return events


def test_a_run_is_told_at_one_step_through_all_stages(small_config, tmp_path, mine, caplog):
    names = ("mine:failing", "mine:make", "tensorboard")
    config = replace(small_config, output=str(tmp_path / "run"), trackers=names, control=True)
    train(config)
    lines = lines_of(tmp_path / "run")
    own = lines_of(tmp_path / "run" / "control")
    assert sorted(map(str, mine.got)) == sorted(map(str, ["failed", *lines, "failed", *own]))
    assert caplog.text.count("the tracker mine:failing failed and is told no more: ConnectionError: the server") == 2
    assert [folder for _, folder in mine.made] == [tmp_path / "run", tmp_path / "run" / "control"]
    assert mine.made[0][0] == config

    events = events_of(tmp_path / "run")
    for stage, start in (("warmup", 0), ("pretrain", 3), ("adapt", 9)):  # of 3, 6 and 4 steps
        events_read = {e.step - start: e.value for e in events.Scalars(f"{stage}/loss")}
        assert events_read == pytest.approx(losses_of(tmp_path / "run", stage))
    (after,) = [line for line in lines if line["stage"] == "adapt" and line.get("evaluation") == "after"]
    (event,) = events.Scalars("adapt_after/caption2bbox_miou")
    assert event.value == pytest.approx(after["caption2bbox_miou"]) and event.step == 13
    pictures = {(name, e.step) for name in events.Tags()["images"] for e in events.Images(name)}
    assert pictures == {("pretrain/answers", 9), ("adapt/answers", 13), ("adapt/curves", 13)}
    assert "| pretrain.steps | 6 |" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert {e.step for e in events_of(tmp_path / "run" / "control").Scalars("adapt/loss")} == {10, 11, 12, 13}


@pytest.fixture()
def elsewhere(monkeypatch, tmp_path):
    """The services write under tmp_path and ask no network."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)


def stop_in_pretrain(config):
    """Train until SIGTERM in the third step of stage 1."""
    take = Phase.take

    def stopping(phase, batches):
        if (phase.stage.name, phase.step) == ("pretrain", 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return take(phase, batches)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Terminated):
        patch.setattr(Phase, "take", stopping)
        train(config)


@pytest.mark.slow
def test_mlflow_gets_the_run_and_a_stopped_one_goes_on_in_it(small_config, tmp_path, elsewhere):
    mlflow = pytest.importorskip("mlflow")
    config = replace(small_config, output=str(tmp_path / "run"), trackers=("mlflow",))
    stop_in_pretrain(config)
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "granvit"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "KILLED" and run.info.run_name == "run"
    train(config)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["pretrain.steps"] == "6" and run.data.params["model.llm_width"] == "32"
    history = client.get_metric_history(run.info.run_id, "pretrain/loss")
    losses = {metric.step - 3: metric.value for metric in history}
    assert losses == pytest.approx(losses_of(tmp_path / "run", "pretrain"))
    images = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert any("answers" in name and name.endswith(".png") for name in images), images


@pytest.mark.slow
def test_wandb_gets_the_run_and_a_stopped_one_goes_on_in_it(small_config, tmp_path, elsewhere):
    pytest.importorskip("wandb")
    config = replace(small_config, output=str(tmp_path / "run"), trackers=("wandb",))
    stop_in_pretrain(config)
    train(config)
    losses, steps, ids, said = {}, set(), set(), {}
    for folder in (tmp_path / "run" / "wandb").glob("offline-run-*"):
        inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        for record in map(json.loads, subprocess.run(inspect, capture_output=True, check=True).stdout.splitlines()):
            if record["type"] == "run":
                ids.add(record["run"]["run_id"])
                assert record["run"]["display_name"] == "run" and record["run"]["project"] == "granvit"
                said |= record["run"]["config"]["update"]
            if record["type"] == "history":
                values = record["history"]["item"]
                steps.add(step := values["global_step"])
                if "pretrain/loss" in values:
                    losses[step - 3] = values["pretrain/loss"]
    (identity,) = ids
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == {"wandb": {".": identity}}
    assert said["pretrain"]["steps"] == 6
    assert steps >= set(range(1, 14)) and max(steps) == 13
    assert losses == pytest.approx(losses_of(tmp_path / "run", "pretrain"))
    pictures = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/*/*.png")
    names = [f"{path.parent.name}/{path.name.partition('_')[0]}" for path in pictures]
    assert sorted(names) == ["adapt/answers", "adapt/curves", "pretrain/answers"]


NAMES = ["a", "a b", "", "none", "a//b", "/a", "../x", "./a", "a/", "a/.", "a|b", "a<b", "a_b", "x" * 300, "x" * 301]
"""Sources of data."""


def test_names_for_mlflow_are_short_clean_paths_and_stay_different():
    named = {name: services._mlflow_name(f"adapt_after/{name}/caption2bbox_acc50") for name in NAMES}
    assert len(set(named.values())) == len(NAMES)
    for name in named.values():
        assert os.path.normpath(name) == name and len(name) <= 250 and re.fullmatch(r"[/\w.\- :]+", name), name
        assert name.startswith("adapt_after/") and name.endswith("/caption2bbox_acc50")
    assert named["a b"] == "adapt_after/a b/caption2bbox_acc50" and named[""].startswith("adapt_after/none-")


@pytest.mark.slow
def test_mlflow_takes_figures_of_any_source(opened, elsewhere, caplog):
    mlflow = pytest.importorskip("mlflow")
    told = opened("mlflow")
    figures = {f"{name}/caption2bbox_acc50": number for number, name in enumerate(NAMES)}
    told.write({"stage": "adapt", "step": 1, "evaluation": "after"} | figures)
    told.close(True)
    assert "told no more" not in caplog.text
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert sorted(run.data.metrics.values()) == list(range(len(NAMES)))


BAD = {
    "tensorbord": "it has no colon",
    "no_such_module:make": "No module named 'no_such_module'",
    "mine:nothing": "has no attribute 'nothing'",
    ":make": "Empty module name",
}


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_a_name_that_leads_to_no_tracker_is_refused_before_training(small_config, tmp_path, mine, name, message):
    config = replace(small_config, output=str(tmp_path / "run"), trackers=("tensorboard", name))
    with pytest.raises(ValueError, match=f"trackers: {name!r}.*{message}.*accepted: tensorboard, wandb, mlflow, or"):
        train(config)
    assert not (tmp_path / "run").exists()  # nor claimed for the next try


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_said(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ValueError, match=rf"{name} is not installed \(pip install 'granvit\[{name}\]'\)"):
        Trackers((name,), tmp_path)


@pytest.fixture()
def opened(small_config, tmp_path):
    """opened(names) -> the trackers of a run's folder, opened for it."""

    def build(*names):
        config = replace(small_config, output=str(tmp_path))
        save_config(config, tmp_path / "config.yaml")
        made = Trackers(names, tmp_path)
        made.open(config)
        return made

    return build


def test_one_that_cannot_begin_is_refused_but_not_where_the_run_had_it(opened, mine, caplog):
    with pytest.raises(ValueError, match="'mine:broken' can't begin .ZeroDivisionError.*without it goes on"):
        opened("mine:broken")
    with pytest.raises(ValueError, match="'mine:number' can't begin .TypeError: it gave int, which can't be called"):
        opened("mine:number")
    opened("mine:make").close(True)
    mine.make = lambda config, folder: 1 / 0
    again = opened("mine:make")
    again.write({"stage": "adapt", "step": 1, "loss": 1.0})
    again.close(True)
    assert caplog.text.count("the tracker mine:make failed and is told no more: ZeroDivisionError") == 1


@pytest.mark.parametrize("text", ['{"tensorboard": ', "null", '{"tensorboard": 3}', '{"tensorboard": {".": null}}'])
def test_a_damaged_list_of_runs_is_named(opened, mine, tmp_path, text):
    (tmp_path / "trackers.json").write_text(text)
    with pytest.raises(ValueError, match=r"trackers.json is damaged; without it the trackers begin new runs: \w"):
        opened("mine:make")
    opened()  # no tracker needs it


def test_one_that_hangs_or_is_slow_holds_nothing_up(opened, mine, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    monkeypatch.setattr(trackers, "WAITING", 5)
    release = threading.Event()
    mine.make = lambda config, folder: lambda line: release.wait(60)
    hangs = opened("mine:make")
    began = time.monotonic()
    hangs.write({"stage": "adapt", "step": 1})
    hangs.close(True)
    assert "mine:make has not sent everything after" in caplog.text
    slow = opened("mine:make")
    for step in range(20):
        slow.write({"stage": "adapt", "step": step})
    assert caplog.text.count("it is 5 lines behind") == 1 and time.monotonic() - began < 30
    release.set()
    slow.close(True)


def test_a_picture_that_cannot_be_drawn_ends_nothing(opened, mine, caplog):
    told = opened("mine:make")
    told.show("adapt", 1, "answers", lambda: Image.open("/nonexistent.png"))
    told.write({"stage": "adapt", "step": 1})
    told.close(True)
    assert "no picture adapt/answers for the trackers: FileNotFoundError" in caplog.text
    assert mine.got == [{"stage": "adapt", "step": 1}]


def test_tensorboard_forgets_what_lies_past_the_checkpoint(opened, tmp_path):
    for numbers, loss in ((range(1, 8), 1.0), (range(5, 10), 2.0)):
        told = opened("tensorboard")
        told.write({"stage": "warmup", "step": numbers[0] - 1, "evaluation": "during", "heldout_loss": loss})
        for step in numbers:
            told.write({"stage": "warmup", "step": step, "loss": loss})
        told.close(False)
    assert [e.value for e in events_of(tmp_path).Scalars("warmup/loss")] == [1.0] * 4 + [2.0] * 5  # step 4 stays
    assert services.SERVICES.keys() == {"tensorboard", "wandb", "mlflow"}
