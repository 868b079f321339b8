import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from granvit.train.metrics_log import MetricsLog, make_trackers
from granvit.train.run import train


def test_lines_come_back_in_full_precision(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write(stage="pretrain", step=1, loss=1 / 3)
    log.write(stage="pretrain", step=2, loss=2 / 3)
    assert log.lines() == [
        {"stage": "pretrain", "step": 1, "loss": 1 / 3}, {"stage": "pretrain", "step": 2, "loss": 2 / 3}
    ]  # fmt: skip


def test_a_line_cut_short_by_a_crash_is_left_out_and_the_next_write_is_whole(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(stage="adapt", step=1)
    with log.path.open("a") as file:
        file.write('{"stage": "adapt", "st')
    assert [line["step"] for line in log.lines()] == [1]
    log.drop(lambda line: False)
    log.write(stage="adapt", step=2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_drop_keeps_the_rest(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        log.write(stage="adapt", step=step)
    log.drop(lambda line: line["step"] > 3)
    assert [line["step"] for line in log.lines()] == [1, 2, 3]


def test_a_line_after_one_that_was_cut_short_is_on_a_line_of_its_own(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"stage": "adapt", "step": 1}\n{"stage": "adapt", "st')
    log.write(stage="adapt", step=2)
    assert [line["step"] for line in log.lines()] == [1, 2]


def test_on_a_full_disk_lines_wait(tmp_path, caplog):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(stage="adapt", step=1)
    log.path.rename(tmp_path / "kept")
    log.path.symlink_to("/dev/full")
    for step in (2, 3):
        log.write(stage="adapt", step=step)
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.text
    log.path.unlink()
    (tmp_path / "kept").rename(log.path)
    assert [line["step"] for line in log.lines()] == [1, 2, 3]
    log.write(stage="adapt", step=4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


@pytest.fixture()
def tracker(monkeypatch):
    """A module "mine" whose function `make` gives a tracker that keeps what it gets, and one that fails at once."""
    mine = SimpleNamespace(made=[], got=[])

    def make(config, folder):
        mine.made.append((config, folder))
        return mine.got.append

    def failing(config, folder):
        def track(line):
            mine.got.append("failed")
            raise ConnectionError("the server is gone")

        return track

    mine.make, mine.failing, mine.broken, mine.number = make, failing, lambda config, folder: 1 / 0, lambda *_: 7
    monkeypatch.setitem(sys.modules, "mine", mine)
    return mine


def test_trackers_get_every_line_of_a_run_and_one_that_fails_no_more(small_config, tmp_path, tracker, caplog):
    trackers = ("mine:failing", "mine:make", "tensorboard")
    config = replace(small_config, output=str(tmp_path / "run"), trackers=trackers)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert tracker.got == ["failed", *lines]
    assert caplog.text.count("a tracker failed and is told no more: ConnectionError: the server is gone") == 1
    ((made, folder),) = tracker.made
    assert made == config and folder == tmp_path / "run"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = {line["step"]: line["loss"] for line in lines if line["stage"] == "pretrain" and "loss" in line}
    assert {e.step: e.value for e in events.Scalars("pretrain/loss")} == pytest.approx(losses)
    (after,) = [line for line in lines if line["stage"] == "adapt" and line.get("evaluation") == "after"]
    (event,) = events.Scalars("adapt_after/caption2bbox_miou")
    assert event.value == pytest.approx(after["caption2bbox_miou"]) and event.step == after["step"]


BAD = {
    "tensorbord": "it has no colon",
    "no_such_module:make": "No module named 'no_such_module'",
    "mine:nothing": "has no attribute 'nothing'",
    "mine:broken": "ZeroDivisionError",
    "mine:number": "gave int, which can't be called",
    ":make": "Empty module name",
}


@pytest.mark.parametrize(("name", "message"), BAD.items())
def test_a_name_that_leads_to_no_tracker_is_refused_before_training(small_config, tmp_path, tracker, name, message):
    config = replace(small_config, output=str(tmp_path / "run"), trackers=("tensorboard", name))
    with pytest.raises(ValueError, match=f"trackers: {name!r}.*{message}"):
        train(config)
    assert not (tmp_path / "run").exists()  # nor claimed for the next try


def test_tensorboard_that_is_not_installed_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"tensorboard is not installed \(pip install tensorboard\)"):
        make_trackers(("tensorboard",), None, tmp_path)
