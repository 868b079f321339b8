import json

import pytest

from granvit.metrics_log import MetricsLog, write_aside


def test_lines_come_back_in_full_precision(tmp_path):
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.write(stage="pretrain", step=1, loss=1 / 3)
    log.write(stage="pretrain", step=2, loss=2 / 3)
    assert list(log.lines()) == [
        {"stage": "pretrain", "step": 1, "loss": 1 / 3}, {"stage": "pretrain", "step": 2, "loss": 2 / 3}
    ]  # fmt: skip


def test_a_line_cut_short_by_a_crash_is_left_out_and_the_next_write_is_whole(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(stage="adapt", step=1)
    with log.path.open("a") as file:
        file.write('{"stage": "adapt", "st')
    assert [line["step"] for line in log.lines()] == [1]
    log.go_back("adapt", 1)
    with log.path.open("ab") as file:  # as a disk that lost power may leave it
        file.write(b'{"stage": "adapt", "step": 2, "\xff\n')
    assert [line["step"] for line in log.lines()] == [1]
    log.go_back("adapt", 1)
    log.write(stage="adapt", step=2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_going_back_takes_out_the_lines_of_the_stage_past_the_step(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.go_back("adapt", 0)  # before there is a file
    for stage in ("pretrain", "adapt"):
        for step in range(1, 6):
            log.write(stage=stage, step=step)
        log.write(stage=stage, step=5, evaluation="during")
    left = {("warmup", 0): 12, ("adapt", 5): 12, ("adapt", 3): 9, ("pretrain", 2): 5, ("adapt", 0): 2}
    for (stage, step), number in left.items():
        log.go_back(stage, step)
        assert all(line["stage"] != stage or line["step"] <= step for line in log.lines())
        assert len(list(log.lines())) == number
    assert [(line["stage"], line["step"]) for line in log.lines()] == [("pretrain", 1), ("pretrain", 2)]
    assert not list(log.evaluations())


def test_of_a_long_run_s_steps_only_those_past_the_checkpoint_are_parsed(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    lines = [{"stage": stage, "step": step} for stage in ("pretrain", "adapt") for step in range(1, 5001)]
    evaluation = {"stage": "pretrain", "step": 5000, "evaluation": "after"}
    lines.insert(5000, evaluation)
    log.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parsed, parse = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or parse(text))
    log.go_back("adapt", 4990)
    assert list(log.evaluations()) == [evaluation]
    assert len(parsed) == 12
    assert [line["step"] for line in log.lines()] == [line["step"] for line in lines[:-10]]


def test_a_line_takes_the_place_of_one_that_was_cut_short(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.write_text('{"stage": "adapt", "step": 1}\n{"stage": "adapt", "st')
    log.write(stage="adapt", step=2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


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
    log.go_back("sft", 0)  # the stage that comes next
    assert [line["step"] for line in log.lines()] == [1, 2, 3]
    log.write(stage="adapt", step=4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4]


def test_a_file_for_which_there_is_no_room_stays_and_is_named(tmp_path):
    path = tmp_path / "result.json"
    write_aside(path, "1")
    (tmp_path / "result.json.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        write_aside(path, "2")
    assert path.read_text() == "1"
